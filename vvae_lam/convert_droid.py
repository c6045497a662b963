"""DROID latents as published with Ctrl-World (arXiv 2510.10125) -> H5 in this folder's layout, with actions.

Run:
  python vvae_lam/convert_droid.py --data PATH/droid_subset --out runs/droid

In: annotation/SPLIT/N.json (`states`: one row per latent frame, 6 cartesian + gripper) and latent_videos/SPLIT/N/C.pt,
(T, 4, 24, 40) per-frame latents of camera C. Out: OUT/N_camC.h5; `actions` row t is the state at t + 1 minus that at t.
"""

import json
import sys
from pathlib import Path

import h5py
import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import common

FPS = 5.0  # every third frame of the 15 Hz recording


def parse(argv=None):
    parser = common.Parser(__doc__)
    parser.add_argument("--data", required=True, metavar="DIR", help="folder with annotation/ and latent_videos/")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the H5 files")
    return parser.parse_args(argv)


def convert(latents_file, states_file, target):
    """One camera of one episode."""
    try:
        states = np.asarray(json.loads(states_file.read_text())["states"], np.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{states_file}: no readable `states` ({common.brief(error)})") from None
    latents = common.load(latents_file).numpy()
    if latents.ndim != 4 or states.ndim != 2 or len(latents) != len(states):
        raise ValueError(f"{latents_file}: latents {latents.shape} do not go with states {states.shape}")
    moved = np.diff(states, axis=0, append=states[-1:])  # nothing happens after the last frame
    with common.atomic(target) as path, h5py.File(path, "w") as file:
        file["embeddings"], file["actions"] = latents[:, :, None], moved
        file.attrs.update(vae="stable-video-diffusion image VAE, per frame", scaling=0.18215, fps=FPS, causal=True)


def main(argv=None):
    args = parse(argv)
    root, out = Path(args.data), Path(args.out)
    files = sorted(root.glob("latent_videos/*/*/*.pt"))
    if not files:
        raise ValueError(f"--data {root}: no latent_videos/SPLIT/N/C.pt")
    out.mkdir(parents=True, exist_ok=True)
    for file in files:
        split, episode = file.parts[-3:-1]
        convert(file, root / "annotation" / split / f"{episode}.json", out / f"{episode}_cam{file.stem}.h5")
    print(f"{len(files)} recordings in {out}")
    return 0


if __name__ == "__main__":
    common.run(main)
