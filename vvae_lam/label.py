"""Write the latent actions of recordings: for every file of latents one H5 file of codes.

Run:
  python vvae_lam/label.py --checkpoint runs/x/checkpoints/best --data DIR --out LABELS

OUT/NAME.h5: `codes` (T', S) int16 and `vectors` (T', S, D) float16 before quantisation; row t is the transition from
latent frame t to t + gap, T' = T - gap (frame numbers after --causal-only, if the model was trained so; both are
attributes). Files that are there already are passed over; recordings that cannot be read are named, and the exit code
is then 1.
"""

import sys
from pathlib import Path

import h5py
import numpy as np
import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
from model import VVAELatentActionVQVAE
from recordings import read_sources
from tqdm import tqdm

import common


def parse(argv=None):
    parser = common.Parser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--checkpoint", required=True, metavar="DIR", help="folder with config.json, such as RUN/checkpoints/best")
    add("--data", nargs="+", required=True, metavar="PATH", help="folders of H5 latents, NAME=DIR or DIR")
    add("--out", required=True, metavar="DIR", help="folder of the labels; with several sources one below it for each")
    add("--batch-size", default=64, help="transitions at a time", **whole)
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    args = parser.parse_args(argv)
    args.seed = 0  # common.setup wants one; nothing here is random
    if args.batch_size < 1:
        parser.error("--batch-size must be above 0")
    return args


def label(model, recording, batch_size):
    """codes (T', S) and vectors (T', S, D) of all transitions of a recording, arrays."""
    codes, vectors = [], []
    transitions = len(recording) - model.gap
    for first in range(0, transitions, batch_size):
        some = np.arange(first, min(first + batch_size, transitions))
        frames = recording.read(np.arange(some[0], some[-1] + model.gap + 1))
        pairs = torch.from_numpy(np.stack([frames[some - first], frames[some - first + model.gap]], 1))
        found = model.encode(pairs.to(model.mean.device), vectors=True)
        codes.append(found[0][:, 0].cpu().numpy())
        vectors.append(found[1][:, 0].cpu().numpy())
    return np.concatenate(codes), np.concatenate(vectors)


def main(argv=None):
    args = parse(argv)
    model = VVAELatentActionVQVAE.from_pretrained(args.checkpoint).to(common.setup(args).device)
    recordings = read_sources(args.data, val_share=0.0, causal_only=model.causal_only)
    several = len({recording.source for recording in recordings}) > 1
    about = dict(checkpoint=str(args.checkpoint), gap=model.gap, causal_only=model.causal_only)
    about |= dict(num_embeddings=len(model.quantizer.codebook))
    failed, done = 0, 0
    for recording in tqdm(recordings, unit="recording", disable=not sys.stderr.isatty()):
        target = Path(args.out, recording.source if several else "", f"{recording.id}.h5")
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            with h5py.File(target, "r", locking=False) as file:
                was = {name: file.attrs.get(name) for name in about}
            if was != about:
                raise ValueError(f"{target} holds labels of {was['checkpoint']}: give another --out, or remove it")
            continue
        try:
            if len(recording) <= model.gap:
                raise ValueError(
                    f"{recording.path}: {len(recording)} latent frames, but --gap {model.gap} of the checkpoint"
                )
            codes, vectors = label(model, recording, args.batch_size)
        except ValueError as error:
            print(f"left out: {error}", flush=True)
            failed += 1
            continue
        with common.atomic(target) as path, h5py.File(path, "w") as file:
            file["codes"], file["vectors"] = codes.astype(np.int16), vectors.astype(np.float16)
            file.attrs.update(about | dict(latents=recording.path.name, frames=len(recording)))
        done += 1
    before = len(recordings) - done - failed
    print(f"{args.out}: {done} recordings labelled, {failed} left out, {before} were there already")
    return 1 if failed else 0


if __name__ == "__main__":
    common.run(main)
