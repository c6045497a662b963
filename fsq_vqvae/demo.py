"""Write the demo data: 80 episodes of a 7-joint arm with gripper that picks and places, as npz files.

Run:
  python fsq_vqvae/demo.py --out runs/demo/fsq_vqvae
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import common

ABOUT = dict(version=1, episodes=80, rate=20, joints=7, seed=0)


def episode(rng, rest):
    """One pick and place: minimum-jerk moves through rest, above, grasp, above, goal, rest; (T, 8) joints and gripper.

    The joints follow a 3-D task (where the object and the goal are), as a real arm's do, with tremor of 0.3 % on top.
    """
    mixing = np.random.default_rng(7).normal(size=(3, 7)) * 0.35  # the arm's fixed kinematics
    spot, goal = rng.uniform(-1, 1, (2, 3)) @ mixing
    lift = np.array([0, 0.25, 0, -0.2, 0, 0.15, 0])
    points = np.stack([rest, spot + lift, spot, spot + lift, goal + lift, goal, goal + lift, rest])
    closed = np.array([0, 0, 1, 1, 1, 0, 0])
    joints, gripper = [], []
    for a, b, grip in zip(points[:-1], points[1:], closed, strict=True):
        steps = int(rng.uniform(0.5, 1.2) * ABOUT["rate"])
        s = np.arange(steps) / steps
        joints.append(a + (b - a) * (10 * s**3 - 15 * s**4 + 6 * s**5)[:, None])
        gripper.append(np.full(steps, grip))
    joints = np.concatenate(joints)
    return np.c_[joints + rng.normal(0, 0.003, joints.shape), np.concatenate(gripper)].astype(np.float32)


def write(folder):
    """Write the data unless it is there already, all of it or nothing. Another version is replaced, folder and all."""
    folder = Path(folder).resolve()
    about = folder / "demo.json"
    if about.exists() and common.read_json(about) == ABOUT:
        return
    if folder.is_file() or (any(folder.glob("*")) and not about.exists()):
        raise common.DataError(f"{folder}: is there, and is no demo's data; give another folder")
    rng = np.random.default_rng(ABOUT["seed"])
    rest = np.array([0, -0.8, 0, 1.6, 0, 0.8, 0])
    with common.atomic(folder, folder=True) as made:
        for number in range(ABOUT["episodes"]):
            actions = episode(rng, rest)
            timestamps = np.arange(len(actions)) / ABOUT["rate"]
            np.savez(made / f"episode_{number:03d}.npz", actions=actions, timestamps=timestamps)
        (made / about.name).write_text(json.dumps(ABOUT))


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
