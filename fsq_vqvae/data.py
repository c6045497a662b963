"""Sources of chunks for the tokenizer: their split, their normalisation, and the batches.

A batch is a dict: actions (B, T, A) float32 in robot units, mask (B, T) bool (False past the episode's end), context
(B, R, A) (what a policy knows at the chunk's first step; CONTEXT in model.py), source (B,) int64. Shorter chunks and
narrower actions of some sources are padded to the largest. The global batch of a step depends on (seed, step) alone; a
rank and a micro-step take their slice of it.
"""

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import readers
import torch
from split import episode_hash, held_out_ids, named_paths, per_source
from torch.utils.data import DataLoader, Dataset

from common import DataError, ignore_signals

MOST_VALUES = 20_000  # of a chunk: the closed form squares them


@dataclass
class Source:
    """One data set: `actions` (steps of all episodes, A) float32; episode i is rows start[i] : start[i] + length[i]."""

    name: str
    ids: list
    actions: np.ndarray
    length: np.ndarray
    fps: float | None
    state: np.ndarray | None  # (steps, A), in the order and units of the actions
    remark: str | None  # why there is no state, or how it was paired
    chunk: int  # steps
    validation: np.ndarray  # bool per episode: held out

    @cached_property
    def start(self):
        return np.cumsum(self.length) - self.length

    def rows(self, validation):
        """All steps of the training (or validation) episodes, (n, A)."""
        return self.actions[np.repeat(self.validation == validation, self.length)]

    def starts(self, validation, stride=1, whole=False):
        """Row and episode of every chunk's first step. whole: only chunks that end inside their episode."""
        rows, episodes = [], []
        for i in np.flatnonzero(self.validation == validation):
            first = np.arange(0, self.length[i] - (self.chunk - 1 if whole else 0), stride)
            rows.append(self.start[i] + first)
            episodes.append(np.full(len(first), i))
        empty = [np.zeros(0, np.int64)]
        return np.concatenate(empty + rows), np.concatenate(empty + episodes)

    def gather(self, rows, episodes):
        """Chunks (B, chunk, A) that start at `rows`, and their masks; past its end an episode repeats its last step."""
        steps = rows[:, None] + np.arange(self.chunk)
        end = (self.start + self.length)[episodes][:, None]
        return self.actions[np.minimum(steps, end - 1)], steps < end

    def context(self, rows, episodes, context):
        """(B, R, A): the rows of `context`, (what, at which step); before its start an episode repeats its first."""
        first, parts = self.start[episodes], [np.zeros((len(rows), 0, self.actions.shape[1]), np.float32)]
        for what, step in context:
            parts.append((self.state if what == "state" else self.actions)[np.maximum(rows + step, first)][:, None])
        return np.concatenate(parts, 1)

    def batch(self, rows, episodes, context):
        """dict of actions, mask, context for the chunks that start at `rows`."""
        actions, mask = self.gather(rows, episodes)
        return dict(actions=actions, mask=mask, context=self.context(rows, episodes, context))

    def sample(self, context, validation=False, most=20_000):
        """Up to `most` whole chunks, evenly spaced; padded ones where none is whole; None where there are none."""
        rows, episodes = self.starts(validation, whole=True)
        rows, episodes = (rows, episodes) if len(rows) else self.starts(validation)
        most = min(most, len(rows), 20_000_000 // (self.chunk * self.actions.shape[1]))  # 160 MB in float64
        some = np.linspace(0, len(rows) - 1, most).astype(int)
        batch = self.batch(rows[some], episodes[some], context)
        return {key: torch.from_numpy(value) for key, value in batch.items()} if most else None


# --- sources


def read_source(name, path, size="1s", action_key=None):
    """One source, whatever its format. size: chunk length in steps ("30") or seconds ("1s")."""
    if not re.fullmatch(r"\d+|\d*\.?\d+s", size):
        raise DataError(f"--chunk {size}: expected steps (30) or seconds (1s)")
    if str(path).startswith("module:"):
        found, steps = readers.read_module(str(path)[7:])
        size = str(steps)
        readers.check(found, path)
    else:
        found = readers.read(path, action_key)
    fps = float(np.median(found.rates)) if found.rates else None
    if size.endswith("s") and fps is None:
        raise DataError(f"--data {name}: its files do not tell the rate; give --chunk {name}=STEPS")
    chunk = round(float(size[:-1]) * fps) if size.endswith("s") else int(size)
    values = chunk * found.actions[0].shape[1]
    if not 0 < values <= MOST_VALUES:
        raise DataError(f"--chunk {size}: {values} values of {name}; expected one step or more, {MOST_VALUES} at most")
    states, remark = readers.pair_state(found)
    return Source(
        name=name,
        ids=found.ids,
        actions=np.concatenate(found.actions),
        length=np.array([len(actions) for actions in found.actions]),
        fps=fps,
        state=None if states is None else np.concatenate(states),
        remark=remark,
        chunk=chunk,
        validation=np.isin(found.ids, list(found.held_out)),
    )


def read_sources(data, chunk, val_share=0.1, val_episodes=(), condition="none", action_key=None):
    """The sources that the flags name. data: NAME=PATH or PATH; chunk: 1s, 30 or g1=30; val_episodes: g1=56-69,80."""
    pairs = named_paths(data)
    names = [name for name, _ in pairs]
    chunks, held_out = per_source(chunk, names, "--chunk"), per_source(val_episodes, names, "--val-episodes")
    bare = [word for value in val_episodes if "=" not in value for word in value.split(",")]
    sources = [read_source(name, path, chunks.get(name, "1s"), action_key) for name, path in pairs]
    for word in bare:
        if not any(held_out_ids([word], source.ids)[0] for source in sources):
            raise DataError(f"--val-episodes: no episode is called {word}")
    for source in sources:
        if condition == "state" and source.state is None:
            raise DataError(f"--condition state, source {source.name}: {source.remark}")
        if source.validation.any():  # a user's own loaders have split already
            if source.name in held_out:
                raise DataError(f"--val-episodes: the loaders of {source.name} hold out by themselves")
            continue
        hashes = np.array([episode_hash(identity) for identity in source.ids])
        source.validation = hashes < val_share
        if source.name in held_out:
            chosen, unknown = held_out_ids(held_out[source.name].split(","), source.ids)
            unknown = [word for word in unknown if word not in bare]
            if unknown:
                raise DataError(f"--val-episodes {source.name}: no episode is called {unknown[0]}")
            source.validation = np.isin(source.ids, list(chosen))
            if source.validation.all():
                raise DataError(f"--val-episodes {source.name}: all {len(source.ids)} are held out, none is left")
        elif source.validation.all() or (val_share > 0 and len(source.ids) > 1 and not source.validation.any()):
            # too few episodes for a share: hold out the one with the smallest hash
            source.validation = (np.arange(len(source.ids)) == hashes.argmin()) & (len(source.ids) > 1)
    return sources


def describe(source):
    """What the model keeps of a source: name, dims, chunk, rate and the normalisation fitted on its training episodes.

    q01 and q99 of each dim go to -1 and 1 (no clipping). A dim that hardly moves is only centred, in its own units; a
    rare event, such as a gripper's, is scaled by its span.
    """
    rows = source.rows(validation=False).astype(np.float64)
    low, high = np.quantile(rows, [0.01, 0.99], axis=0)
    center, scale = (low + high) / 2, (high - low) / 2
    span, noise = (rows.max(0) - rows.min(0)) / 2, 1e-6 + 1e-5 * np.abs(center)  # float32 keeps 7 digits
    scale = np.where(scale < 1e-4 * np.maximum(np.abs(center), 1e-2), np.where(span > noise, span, 1.0), scale)
    return dict(
        name=source.name,
        action_dim=rows.shape[1],
        chunk=source.chunk,
        fps=source.fps,
        center=center.astype(np.float32).tolist(),
        scale=scale.astype(np.float32).tolist(),
        low=rows.min(0).astype(np.float32).tolist(),
        high=rows.max(0).astype(np.float32).tolist(),
    )


# --- batches


def pad(array, *shape):
    """An array (B, ...) with zeros behind, to (B, *shape)."""
    return np.pad(array, [(0, 0), *((0, to - now) for to, now in zip(shape, array.shape[1:], strict=True))])


class TrainBatches(Dataset):
    """Item (step * accum + micro) is this rank's slice of the step's global batch.

    Half of the chunks are mixed with another of their source (weights -mix to 1 + mix), because what a policy will meet
    is wider than what was recorded.
    """

    def __init__(self, sources, batch_size, seed, accum=1, rank=0, world=1, mix=0.5, context=()):
        self.sources, self.batch_size, self.seed, self.accum = sources, batch_size, seed, accum
        self.rank, self.world, self.mix, self.context = rank, world, mix, context
        self.starts = [source.starts(validation=False) for source in sources]
        # the square root keeps a small source from drowning and a large one from being starved
        size = np.sqrt([len(rows) for rows, _ in self.starts])
        self.sampling_prob = size / size.sum()
        self.steps, self.dims = max(s.chunk for s in sources), max(s.actions.shape[1] for s in sources)

    def __getitem__(self, item):
        step, micro = divmod(item, self.accum)
        draw = np.random.default_rng([self.seed, step])
        B = self.batch_size
        source = draw.choice(len(self.sources), B, p=self.sampling_prob)
        first, second = draw.random((2, B))
        weight = draw.uniform(-self.mix, 1 + self.mix, B)
        weight = np.where(draw.random(B) < 0.5 * (self.mix > 0), weight, 1.0).astype(np.float32)
        size = B // (self.accum * self.world)
        begin = (micro * self.world + self.rank) * size
        mine = slice(begin, begin + size)
        source, first, second, weight = source[mine], first[mine], second[mine], weight[mine]
        R, T, A = len(self.context), self.steps, self.dims
        shapes = dict(actions=(size, T, A), mask=(size, T), context=(size, R, A))
        batch = {key: np.zeros(shape, bool if key == "mask" else np.float32) for key, shape in shapes.items()}
        for s in np.unique(source):
            here, (rows, episodes) = source == s, self.starts[s]
            picked = (np.int64(u[here] * len(rows)) for u in (first, second))
            one, two = (self.sources[s].batch(rows[i], episodes[i], self.context) for i in picked)
            w = weight[here, None, None]
            for key, value in one.items():
                mixed = value if key == "mask" else np.where(w == 1, value, two[key] + w * (value - two[key]))
                batch[key][here] = pad(mixed, *shapes[key][1:])
        return {key: torch.from_numpy(value) for key, value in batch.items()} | dict(source=torch.from_numpy(source))


class ValidationBatches:
    """Whole chunks of one source's validation episodes; every world-th of them is this rank's, so none counts twice."""

    def __init__(self, sources, index, stride=5, rank=0, world=1, context=()):
        self.source, self.index, self.context = sources[index], index, context
        rows, episodes = self.source.starts(validation=True, stride=stride, whole=True)
        self.rows, self.episodes = rows[rank::world], episodes[rank::world]
        T, A = max(s.chunk for s in sources), max(s.actions.shape[1] for s in sources)
        self.shapes = dict(actions=(T, A), mask=(T,), context=(len(context), A))

    def __iter__(self):
        for first in range(0, len(self.rows), 256):
            some = slice(first, first + 256)
            batch = self.source.batch(self.rows[some], self.episodes[some], self.context)
            batch = {key: torch.from_numpy(pad(batch[key], *shape)) for key, shape in self.shapes.items()}
            yield batch | dict(source=torch.full((len(batch["mask"]),), self.index))


def train_loader(batches, first, steps, workers=0, pin_memory=False):
    """This rank's micro-batches of the optimizer steps first to steps - 1."""
    items = range(first * batches.accum, steps * batches.accum)
    loading = dict(num_workers=workers, worker_init_fn=ignore_signals, pin_memory=pin_memory)
    return iter(DataLoader(batches, batch_size=None, sampler=items, **loading))


def validation_batches(sources, stride, rank=0, world=1, context=()):
    """{source name: ValidationBatches}; a source without a whole validation chunk has none."""
    return {
        source.name: ValidationBatches(sources, index, stride, rank, world, context)
        for index, source in enumerate(sources)
        if len(source.starts(validation=True, whole=True)[0])
    }
