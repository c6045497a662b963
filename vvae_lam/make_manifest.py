"""Split a folder of latents into train, validation and test by recording, checking every file -> DIR/manifest.json.

Run:
  python vvae_lam/make_manifest.py DIR --train-ratio 0.8 --val-ratio 0.1 --test-ratio 0.1 --seed 42

Bad files are named with the reason and belong to no split.
"""

import json
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
from data import find_files, kind_of
from recordings import inspect
from tqdm import tqdm

import common

SPLITS = ("train", "validation", "test")


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    add, real = parser.add_argument, dict(type=float, metavar="X")
    add("folder", metavar="DIR", help="folder of the H5 files, searched with its sub-folders")
    add("--train-ratio", default=0.8, help="share of the recordings to train on", **real)
    add("--val-ratio", default=0.1, help="share to validate on", **real)
    add("--test-ratio", default=0.1, help="share for evaluate.py", **real)
    add("--seed", default=42, type=int, metavar="N", help="of the split")
    add("--every-chunk", action="store_true", help="look for NaN and zeros in every chunk, not in 8 of each file")
    add("--out", metavar="FILE", help="the manifest; without it DIR/manifest.json")
    args = parser.parse_args(argv)
    ratios = args.train_ratio, args.val_ratio, args.test_ratio
    if min(ratios) < 0 or abs(sum(ratios) - 1) > 1e-6 or not args.train_ratio > 0:
        parser.error(f"--train-ratio, --val-ratio and --test-ratio are {ratios}: not negative, and 1 together")
    if args.seed < 0:
        parser.error("--seed must not be negative")
    return args


def check(files, every_chunk):
    """([recording], {file: reason}): files that can be read, of the sizes and the VAE that most of them have."""
    good, bad = [], {}
    for file in tqdm(files, unit="file", disable=not sys.stderr.isatty()):
        try:
            recording = inspect(file)
            some = np.linspace(0, len(recording) - 1, min(8, recording.chunks)).astype(int)
            for frame in range(len(recording)) if every_chunk else some:
                recording.read([frame])
            good.append(recording)
        except common.DataError as error:
            bad[file] = str(error).removeprefix(f"{file}: ")
    kinds = {recording.path: str(kind_of(recording)) for recording in good}
    usual = next((kind for kind, _ in Counter(kinds.values()).most_common(1)), None)
    bad |= {path: f"has {kind}, but most files have {usual}" for path, kind in kinds.items() if kind != usual}
    return [recording for recording in good if recording.path not in bad], bad


def split(recordings, ratios, seed):
    """{split: recordings}: seeded shuffle of episodes; a split with a ratio above 0 has one, while they last."""
    order = sorted({recording.episode for recording in recordings})
    random.Random(seed).shuffle(order)
    n, held = len(order), []
    for ratio in ratios[1:]:
        held.append(min(max(round(n * ratio), ratio > 0), max(0, n - 1 - sum(held))))
    cuts = n - sum(held), n - held[1]
    parts = [set(part) for part in (order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :])]
    return {name: [r for r in recordings if r.episode in part] for name, part in zip(SPLITS, parts, strict=True)}


def main(argv=None):
    args = parse(argv)
    folder = Path(args.folder)
    files = find_files(folder)
    if not files:
        raise common.DataError(f"{folder}: no .h5 files (video_vae/encode_videos.py writes them)")
    good, bad = check(files, args.every_chunk)
    for file, reason in bad.items():
        print(f"left out: {file}: {reason}", flush=True)
    if not good:
        raise common.DataError(f"{folder}: none of its {len(files)} files can be used")
    splits = split(good, (args.train_ratio, args.val_ratio, args.test_ratio), args.seed)
    counts = {name: dict(recordings=len(some), frames=sum(map(len, some))) for name, some in splits.items()}
    manifest = dict(counts=counts, seed=args.seed, shape=good[0].shape, left_out=len(bad))
    manifest["splits"] = {name: [str(r.path.relative_to(folder)) for r in some] for name, some in splits.items()}
    target = Path(args.out) if args.out else folder / "manifest.json"
    with common.atomic(target) as path:
        path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False))
    for name, count in counts.items():
        print(f"{name}: " + ", ".join(f"{number:,} {what}" for what, number in count.items()))
    print(f"manifest: {target}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
