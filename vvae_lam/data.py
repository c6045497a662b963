"""Sequences of latent frames for training and validation, as batches.

A batch is a dict: latents (B, T, C, H, W) float32 in the VAE's units and, in training, anchor (B,) int64, the frame
where the rollout starts. The global batch of a step is a function of (seed, step) alone; a rank and a micro-step take
their slice of it.
"""

import functools

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common import DataError, ignore_signals


class Sequences(Dataset):
    """Windows of `length` frames, `gap` apart, that start every `stride` frames of a recording; item: (T, C, H, W)."""

    def __init__(self, recordings, length, gap=1, stride=1):
        self.recordings, self.length, self.gap = recordings, length, gap
        starts = [np.arange(0, max(0, len(r) - (length - 1) * gap), stride) for r in recordings]
        self.owner = np.repeat(np.arange(len(starts)), [len(some) for some in starts])
        self.first = np.concatenate([*starts, np.empty(0, np.int64)])

    def __len__(self):
        return len(self.first)

    def __getitem__(self, i):
        return self.recordings[self.owner[i]].read(self.first[i] + self.gap * np.arange(self.length))


class TrainBatches(Dataset):
    """Item (step * accum + micro) is this rank's slice of the step's global batch, `latents` and `anchor`.

    Every sequence comes once per pass; the order is a permutation drawn from (seed, pass), so any step can be reached
    directly. anchor: the frame where the rollout of training starts, drawn per sample of the global batch.
    """

    def __init__(self, sequences, batch_size, seed=0, accum=1, rank=0, world=1):
        self.sequences, self.batch_size, self.seed, self.accum = sequences, batch_size, seed, accum
        self.rank, self.world = rank, world
        if not len(sequences):
            longest = max((len(r) for r in sequences.recordings), default=0)
            needed = (sequences.length - 1) * sequences.gap + 1
            raise DataError(
                f"no sequence of {needed} latent frames to train on (the longest recording of the split has {longest}):"
                " a shorter --sequence-length or --gap, or more recordings"
            )

    @functools.lru_cache(maxsize=2)  # noqa: B019  (lives as long as the loader)
    def order(self, number):
        return np.random.default_rng([self.seed, number]).permutation(len(self.sequences))

    def read(self, samples):
        """Latents (n, T, C, H, W) of the samples that have those numbers, counted from step 0 on."""
        number, place = np.divmod(samples, len(self.sequences))
        return np.stack([self.sequences[self.order(n)[i]] for n, i in zip(number, place, strict=True)])

    def head(self, step, count):
        """The first `count` sequences of the global batches from `step` on; the same on every rank."""
        return torch.from_numpy(self.read(step * self.batch_size + np.arange(count)))

    def __getitem__(self, item):
        step, micro = divmod(item, self.accum)
        size = self.batch_size // (self.accum * self.world)
        first = (micro * self.world + self.rank) * size
        latents = self.read(step * self.batch_size + np.arange(first, first + size))
        drawn = np.random.default_rng([self.seed, step, 1])  # two steps follow the anchor
        anchor = drawn.integers(0, self.sequences.length - 2, self.batch_size)[first : first + size]
        return dict(latents=torch.from_numpy(latents), anchor=torch.from_numpy(anchor))


def train_loader(batches, first, steps, workers=0, repeat=False, pin_memory=False):
    """This rank's micro-batches of the steps first to steps - 1. repeat: those of step 0 again and again."""
    items = range(first * batches.accum, steps * batches.accum)
    items = [item % batches.accum for item in items] if repeat else items
    loading = dict(num_workers=workers, worker_init_fn=ignore_signals, pin_memory=pin_memory)
    return iter(DataLoader(batches, batch_size=None, sampler=items, **loading))


def validation_loaders(recordings, length, gap, batch_size, rank=0, world=1):
    """{source: loader of latents (B, T, C, H, W)} of the validation split, no transition twice.

    A source without a whole sequence has no loader. Whole batches are dealt to the ranks: a batch, among which codes
    are shuffled, is the same on any number of them.
    """
    loaders = {}
    for name in dict.fromkeys(r.source for r in recordings):
        held_out = [r for r in recordings if r.source == name and r.split == "validation"]
        sequences = Sequences(held_out, length, gap, stride=(length - 1) * gap)
        if len(sequences):
            batches = torch.arange(len(sequences)).split(batch_size)[rank::world]
            loaders[name] = DataLoader(sequences, batch_sampler=batches)
    return loaders
