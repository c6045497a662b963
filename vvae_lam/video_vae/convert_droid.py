"""DROID latents as published with Ctrl-World (arXiv 2510.10125) -> H5 in this folder's layout, with states.

Run:
  python vvae_lam/video_vae/convert_droid.py --data PATH/droid_subset --out runs/droid

In: annotation/SPLIT/N.json (`states`: one row per latent frame, 6 cartesian + gripper) and latent_videos/SPLIT/N/C.pt,
(T, 4, 24, 40) per-frame latents of camera C. Out: OUT/N_camC.h5. All cameras of an episode share its `episode`.
"""

import sys
from pathlib import Path

import h5py
import numpy as np
import torch

if __name__ == "__main__":  # as a script: the folder and common.py come first on the path
    sys.path[:1] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]
import common

FPS = 5.0  # every third frame of the 15 Hz recording


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    parser.add_argument("--data", required=True, metavar="DIR", help="folder with annotation/ and latent_videos/")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the H5 files")
    parser.add_argument("--cameras", nargs="+", metavar="C", help="only these; 2 is the one on the wrist")
    return parser.parse_args(argv)


def convert(latents_file, states_file, target, episode):
    """One camera of one episode."""
    try:
        states = np.asarray(common.read_json(states_file)["states"], np.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise common.DataError(f"{states_file}: no readable `states` ({error})") from None
    latents = common.load(latents_file)
    if not torch.is_tensor(latents):
        raise common.DataError(f"{latents_file}: holds a {type(latents).__name__}, expected a tensor")
    latents = latents.float().numpy()
    if latents.ndim != 4 or states.ndim != 2 or len(latents) != len(states):
        raise common.DataError(f"{latents_file}: latents {latents.shape} do not go with states {states.shape}")
    with common.atomic(target) as path, h5py.File(path, "w") as file:
        file["embeddings"], file["states"] = latents[:, :, None], states
        file.attrs.update(vae="AutoencoderKLTemporalDecoder", fps=FPS, causal=True, episode=episode)
        file.attrs.update(scaling=np.float32([0.18215]), shift=[0.0])  # as encode_videos.py writes them


def main(argv=None):
    args = parse(argv)
    root, out = Path(args.data), Path(args.out)
    files = sorted(root.glob("latent_videos/*/*/*.pt"))
    files = [file for file in files if args.cameras is None or file.stem in args.cameras]
    if not files:
        raise common.DataError(f"--data {root}: no latent_videos/SPLIT/N/C.pt of such a camera")
    common.make_folder(out)
    for file in files:
        split, episode = file.parts[-3:-1]
        states = root / "annotation" / split / f"{episode}.json"
        convert(file, states, out / f"{episode}_cam{file.stem}.h5", episode)
    print(f"{len(files)} recordings in {out}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
