"""Write the demo data: a planar arm, 40 reference clips in stac-mjx's layout, a track-mjx teacher that follows them.

Run:
  python vae_distill/demo.py --out runs/demo/vae_distill
"""

import json
import sys
import time
from pathlib import Path

import h5py
import mujoco
import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
from teacher.arm import make
from teacher.walker import positions

import common

ABOUT = dict(version=2, clips=40, frames=250, rate=50, substeps=4, seed=0)
# two links in a vertical plane, 0.5 m and 1 kg
WALKER = """<mujoco model="planar_arm">
  <option timestep="0.005"><flag eulerdamp="disable"/></option>
  <worldbody>
    <body name="upper">
      <joint name="shoulder" axis="0 1 0" damping="0.1" armature="0.01"/>
      <geom type="capsule" fromto="0 0 0 0.25 0 0" size="0.03" mass="0.6"/>
      <body name="lower" pos="0.25 0 0">
        <joint name="elbow" axis="0 1 0" damping="0.05" armature="0.01"/>
        <geom type="capsule" fromto="0 0 0 0.25 0 0" size="0.02" mass="0.4"/>
        <body name="hand" pos="0.25 0 0"><geom size="0.03" mass="0.05"/></body>
      </body>
    </body>
  </worldbody>
  <actuator>
    <motor joint="shoulder" gear="8" ctrllimited="true" ctrlrange="-1 1"/>
    <motor joint="elbow" gear="3" ctrllimited="true" ctrlrange="-1 1"/>
  </actuator>
</mujoco>
"""


def motion(rng):
    """Joint angles (T 2) in rad: three sinusoids of 0.2 to 1.2 Hz per joint around a random posture."""
    t = np.arange(ABOUT["frames"])[:, None, None] / ABOUT["rate"]
    rate, phase = rng.uniform(0.2, 1.2, (2, 3)), rng.uniform(0, 2 * np.pi, (2, 3))
    waves = np.sin(2 * np.pi * rate * t + phase) * rng.uniform(0.1, 0.4, (2, 3))
    return rng.uniform([-0.5, 0.3], [1.5, 1.7]) + waves.sum(-1)


def write_clips(file, model, qpos):
    """qpos (C T nq) as a stac-mjx file: clips one after another, qvel empty, names, the configuration as YAML text."""
    rows = qpos.reshape(-1, model.nq)
    with h5py.File(file, "w") as h5:
        h5["qpos"], h5["xpos"], h5["qvel"] = rows, positions(model, rows), np.zeros(0)
        h5["names_qpos"] = [model.joint(i).name for i in range(model.njnt)]
        h5["names_xpos"] = [model.body(i).name for i in range(model.nbody)]
        h5["config"] = f"stac:\n  n_frames_per_clip: {qpos.shape[1]}\nmodel:\n  SCALE_FACTOR: 1.0\n"


def there(folder):
    """True if a folder holds this demo's data, all of it."""
    about = Path(folder) / "demo.json"
    return about.exists() and json.loads(about.read_text()) == ABOUT


def wait(folder):
    """Wait until another process has written the data, by looking: a first collective of JAX gives up before that."""
    while not there(folder):
        time.sleep(0.5)


def write(folder):
    """Write the data unless it is there already, all of it or nothing. Another version is replaced, folder and all."""
    folder = Path(folder).resolve()
    if there(folder):
        return
    if folder.is_file() or (any(folder.glob("*")) and not (folder / "demo.json").exists()):
        raise common.DataError(f"{folder}: is there, and is no demo's data; give another folder")
    rng = np.random.default_rng(ABOUT["seed"])
    with common.atomic(folder, folder=True) as made:
        (made / "arm.xml").write_text(WALKER)
        clips = np.stack([motion(rng) for _ in range(ABOUT["clips"])])
        write_clips(made / "clips.h5", mujoco.MjModel.from_xml_string(WALKER), clips)
        words = [str(made / "clips.h5")]
        make(made / "arm.xml", words, made, ABOUT["rate"], ABOUT["substeps"], seed=ABOUT["seed"])
        (made / "demo.json").write_text(json.dumps(ABOUT))


def main(argv=None):
    parser = common.ArgumentParser(__doc__)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; another demo's data are replaced")
    write(parser.parse_args(argv).out)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
