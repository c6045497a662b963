"""Sequences of latent frames for training and validation, as batches; a look at a folder of latents.

A batch is a dict: latents (B, T, C, H, W) float32 in the VAE's units and, in training, anchor (B,) int64, the frame
where the rollout starts. The global batch of a step depends on (seed, step) alone; a rank and a micro-step take their
slice of it.

Run:
  python vvae_lam/data.py --data DIR
"""

import argparse
import functools
import sys
import time

import numpy as np
import torch
from recordings import leak_report, read_sources
from torch.utils.data import DataLoader, Dataset

# --- sequences and batches


class Sequences(Dataset):
    """Windows of `length` frames, `gap` apart, that start every `stride` frames of a recording; item: (T, C, H, W)."""

    def __init__(self, recordings, length, gap=1, stride=1):
        self.recordings, self.length, self.gap = recordings, length, gap
        counts = [max(0, len(r) - (length - 1) * gap) for r in recordings]
        self.owner = np.concatenate([np.full(len(range(0, n, stride)), i) for i, n in enumerate(counts)] or [[]])
        self.first = np.concatenate([np.arange(0, n, stride) for n in counts] or [[]])
        self.owner, self.first = self.owner.astype(np.int64), self.first.astype(np.int64)

    def __len__(self):
        return len(self.first)

    def frames(self, i):
        return self.first[i] + self.gap * np.arange(self.length)

    def __getitem__(self, i):
        return self.recordings[self.owner[i]].read(self.frames(i))


class TrainBatches(Dataset):
    """Item (step * accum + micro) is this rank's slice of the step's global batch, `latents` and `anchor`.

    Every sequence comes once per pass; the order is a permutation drawn from (seed, pass), so any step can be reached
    directly. anchor: the frame where the rollout of training starts, drawn per sample of the global batch. flip: mirror
    half of the sequences left-right (latents of an image VAE mirror nearly as pixels do).
    """

    def __init__(self, sequences, batch_size, seed=0, accum=1, rank=0, world=1, horizon=2, flip=False):
        if batch_size % (accum * world):
            raise ValueError(f"--batch-size {batch_size} is not divisible by {accum} micro-steps x {world} processes")
        self.sequences, self.batch_size, self.seed, self.accum = sequences, batch_size, seed, accum
        self.rank, self.world, self.horizon, self.flip = rank, world, horizon, flip
        if not len(sequences):
            longest = max((len(r) for r in sequences.recordings), default=0)
            needed = (sequences.length - 1) * sequences.gap + 1
            raise ValueError(
                f"no sequence of {needed} latent frames to train on (the longest recording of the split has {longest}):"
                " a shorter --sequence-length or --gap, or more recordings"
            )

    @functools.lru_cache(maxsize=2)  # noqa: B019  (lives as long as the loader)
    def order(self, number):
        return np.random.default_rng([self.seed, number]).permutation(len(self.sequences))

    def __getitem__(self, item):
        step, micro = divmod(item, self.accum)
        size = self.batch_size // (self.accum * self.world)
        first = (micro * self.world + self.rank) * size
        samples = step * self.batch_size + np.arange(first, first + size)
        number, place = np.divmod(samples, len(self.sequences))
        latents = np.stack([self.sequences[self.order(n)[i]] for n, i in zip(number, place, strict=True)])
        draw = np.random.default_rng([self.seed, step, 1])
        anchor = draw.integers(0, max(1, self.sequences.length - self.horizon), self.batch_size)[first : first + size]
        mirrored = draw.random(self.batch_size)[first : first + size] < 0.5 * self.flip
        latents[mirrored] = latents[mirrored][..., ::-1]
        return dict(latents=torch.from_numpy(latents), anchor=torch.from_numpy(anchor))


class Named(Dataset):
    """Another data set whose errors come back as text: from a worker they would come with its traceback on top."""

    def __init__(self, inner):
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, i):
        try:
            return self.inner[i]
        except ValueError as error:
            return str(error)


def endless(loader):
    """Batches of a loader over `Named`; its errors are raised here, in the training process."""
    for batch in loader:
        if isinstance(batch, str):
            raise ValueError(batch)
        yield batch


def train_loader(batches, first, steps, workers=0, repeat=False):
    """This rank's micro-batches of the steps first to steps - 1. repeat: the first step's again and again."""
    accum = batches.accum
    items = [item % accum if repeat else item for item in range(first * accum, steps * accum)]
    return endless(DataLoader(Named(batches), batch_size=None, sampler=items, num_workers=workers))


def as_batch(sequences):
    return dict(latents=torch.from_numpy(np.stack(sequences)))


def validation_loaders(recordings, length, gap, batch_size, rank=0, world=1):
    """{source: loader} over the validation split, no transition twice; a source without a whole sequence has none.

    Whole batches are dealt to the ranks: a batch, among which codes are shuffled, is the same on any number of them.
    """
    loaders = {}
    for name in dict.fromkeys(r.source for r in recordings):
        held = [r for r in recordings if r.source == name and r.split == "validation"]
        sequences = Sequences(held, length, gap, stride=(length - 1) * gap)
        if len(sequences):
            batches = torch.arange(len(sequences)).split(batch_size)[rank::world]
            loaders[name] = DataLoader(sequences, batch_sampler=batches, collate_fn=as_batch)
    return loaders


# --- a look at the data


def report(recordings, length, gap, batch_size, workers, seconds):
    """Lines on shapes, ranges, splits, sequence counts, and the loader's throughput over `seconds`."""
    frames, kinds = sum(map(len, recordings)), sorted({r.chunk_frames for r in recordings})
    yield f"{len(recordings)} recordings, {frames:,} latent frames of (C, H, W) {recordings[0].shape}"
    yield f"latent frames per chunk {kinds}, recordings of {min(map(len, recordings))} to {max(map(len, recordings))}"
    for name in sorted({f"{key} {value}" for r in recordings for key, value in r.attributes.items()})[:12]:
        yield f"attribute {name}"
    sample = np.stack([r.read([i])[0] for r in recordings[:: max(1, len(recordings) // 16)] for i in (0, len(r) - 1)])
    yield f"values {sample.min():.3g} to {sample.max():.3g}, mean {sample.mean():.3g}, std {sample.std():.3g}"
    if leak_report(recordings):
        yield leak_report(recordings)
    for split in ("train", "validation", "test"):
        held = [r for r in recordings if r.split == split]
        yield f"{split}: {len(held)} recordings, {len(Sequences(held, length, gap)):,} sequences of {length}"
    batches = TrainBatches(Sequences(recordings, length, gap), batch_size)
    loader, start, count = train_loader(batches, 0, 10**6, workers), time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        batch, count = next(loader), count + 1
    shape = tuple(batch["latents"].shape)
    yield f"loader: batches {shape}, {count * batch_size / spent:.0f} sequences/s with {workers} workers"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--data", nargs="+", required=True, metavar="DIR", help="folders of H5 files, NAME=DIR or DIR")
    add("--manifest", metavar="FILE", help="split of the recordings; without it DIR/manifest.json, if there is one")
    add("--causal-only", action="store_true", help="keep only the last latent frame of each jointly encoded chunk")
    add("--sequence-length", default=8, help="latent frames per sequence [8]", **whole)
    add("--gap", default=1, help="latent frames between two frames of a sequence [1]", **whole)
    add("--batch-size", default=32, help="sequences per batch [32]", **whole)
    add("--workers", default=0, help="loader processes; 0 loads in this one [0]", **whole)
    add("--seconds", default=5.0, type=float, metavar="X", help="how long to time the loader [5]")
    args = parser.parse_args(argv)
    try:
        recordings = read_sources(args.data, args.manifest, causal_only=args.causal_only)
        sizes = args.sequence_length, args.gap, args.batch_size, args.workers, args.seconds
        for line in report(recordings, *sizes):
            print(line, flush=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
