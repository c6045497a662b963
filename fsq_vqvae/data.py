"""Robot actions from npz folders, LeRobot data sets (v2.1, v3.0) and robomimic HDF5, as chunks for the tokenizer.

A batch is a dict: actions (B, T, A) float32 in robot units, mask (B, T) bool (False past the episode's end), source
(B,) int64; shorter chunks and narrower actions of some sources are padded to the largest. The global batch of a step
depends on (seed, step) alone; a rank and a micro-step take their slice of it.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from torch.utils.data import DataLoader, Dataset


@dataclass
class Source:
    """One data set: `actions` (steps of all episodes, A) float32; episode i is rows start[i] : start[i] + length[i]."""

    name: str
    ids: list
    actions: np.ndarray
    length: np.ndarray
    fps: float | None
    chunk: int = 0
    validation: np.ndarray | None = None  # bool per episode

    @classmethod
    def whole(cls, name, actions, chunk):
        """All of `actions` as one training episode."""
        return cls(name, ["0"], actions, np.array([len(actions)]), None, chunk, np.array([False]))

    @cached_property
    def start(self):
        return np.cumsum(self.length) - self.length

    @cached_property
    def scale(self):
        """Half of each dim's range in the training episodes, q01 to q99; (A,)."""
        low, high = np.quantile(self.rows(validation=False), [0.01, 0.99], axis=0)
        return ((high - low) / 2).astype(np.float32)

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


# --- readers: each gives (episode ids, list of (T, A) arrays, fps or None)


def read_npz(folder):
    ids, episodes, rates = [], [], []
    for file in sorted(folder.glob("*.npz")):
        try:
            with np.load(file, allow_pickle=False) as arrays:
                if "actions" not in arrays:
                    raise ValueError(f"has no array `actions`, only {', '.join(arrays)}")
                episodes.append(np.asarray(arrays["actions"], np.float32))
                if "timestamps" in arrays and len(arrays["timestamps"]) > 1:
                    step = np.median(np.diff(arrays["timestamps"]))
                    if not step > 0:
                        raise ValueError("its `timestamps` do not increase")
                    rates.append(1 / step)
        except Exception as error:  # numpy and zipfile raise a dozen kinds for a broken file
            raise ValueError(f"{file}: {str(error) or type(error).__name__}") from None
        ids.append(file.stem)
    return ids, episodes, float(np.median(rates)) if rates else None


def read_lerobot(folder):
    """The parquet files of a LeRobotDataset v2.1 (one per episode) or v3.0 (many per file), column `action`."""
    info = folder / "meta" / "info.json"
    try:
        fps = float(json.loads(info.read_text())["fps"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{info}: no readable `fps` ({error})") from None
    parts = {}
    for file in sorted((folder / "data").glob("**/*.parquet")):
        try:
            table = pyarrow.parquet.read_table(file, columns=["action", "episode_index", "frame_index"])
            column = table["action"].combine_chunks()
            flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
            actions = flat.reshape(len(table), -1) if len(table) else np.zeros((0, 1), np.float32)
            if np.diff(np.unique(column.value_lengths().to_numpy(zero_copy_only=False))).any():
                raise ValueError("rows of `action` differ in length")
            index, frame = table["episode_index"].to_numpy(), table["frame_index"].to_numpy()
        except (pyarrow.ArrowException, OSError, ValueError, AttributeError) as error:
            raise ValueError(f"{file}: not a parquet file with `action` and `episode_index` ({error})") from None
        for episode in np.unique(index):
            rows = index == episode
            parts.setdefault(int(episode), []).append((frame[rows], actions[rows], file))
    ids, episodes = [], []
    for episode in sorted(parts):
        widths = {rows.shape[1] for _, rows, _ in parts[episode]}
        if len(widths) > 1:
            raise ValueError(f"{parts[episode][-1][2]}: `action` has another width than in the file before")
        order = np.argsort(np.concatenate([frame for frame, _, _ in parts[episode]]), kind="stable")
        ids.append(str(episode))
        episodes.append(np.concatenate([rows for _, rows, _ in parts[episode]])[order])
    return ids, episodes, fps


def read_hdf5(files):
    """robosuite and robomimic: data/demo_N/actions. The rate is not in these files."""
    ids, episodes = [], []
    for file in files:
        try:
            with h5py.File(file, "r") as h5:
                names = sorted(h5["data"], key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
                for name in names:
                    ids.append(name if len(files) == 1 else f"{file.stem}/{name}")
                    episodes.append(np.asarray(h5["data"][name]["actions"], np.float32))
        except (OSError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{file}: not an HDF5 file with data/demo_N/actions ({error})") from None
    return ids, episodes, None


def read_source(name, path):
    """Read one source, whatever its format, and check every episode."""
    path = Path(path)
    hdf5 = [path] if path.is_file() else sorted([*path.glob("*.hdf5"), *path.glob("*.h5")])
    if not path.exists():
        raise ValueError(f"--data {path}: no such file or folder")
    if (path / "meta" / "info.json").exists():
        ids, episodes, fps = read_lerobot(path)
    elif hdf5:
        ids, episodes, fps = read_hdf5(hdf5)
    else:
        ids, episodes, fps = read_npz(path)
    if not episodes:
        raise ValueError(f"--data {path}: no episodes (expected *.npz, meta/info.json of LeRobot, or *.hdf5)")
    dims = episodes[0].shape[-1] if episodes[0].ndim else 0
    for identity, actions in zip(ids, episodes, strict=True):
        where = f"{path}, episode {identity}"
        if actions.ndim != 2 or len(actions) == 0:
            raise ValueError(f"{where}: actions have shape {actions.shape}, expected (T, A) with T above 0")
        if actions.shape[1] != dims:
            raise ValueError(f"{where}: {actions.shape[1]} action dims, but {dims} in episode {ids[0]}")
        if not np.isfinite(actions).all():
            step, dim = np.argwhere(~np.isfinite(actions))[0]
            raise ValueError(f"{where}: actions hold NaN or infinity at step {step}, dim {dim}")
    length = np.array([len(actions) for actions in episodes])
    return Source(name, ids, np.concatenate(episodes), length, fps)


# --- split and normalisation


def episode_hash(source, episode):
    """A number in [0, 1) that depends on the two names alone."""
    digest = hashlib.sha256(f"{source}/{episode}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def is_validation(source, episode, share):
    """True for about `share` of the episodes; decided by a hash, so the same in every run and every folder."""
    return episode_hash(source, episode) < share


def named_paths(data):
    """["g1=PATH", "PATH"] -> [(name, path)]; without a name it is the path's own."""
    pairs = [word.partition("=") for word in data]
    return [(name, path) if equals else (Path(name).stem or "data", name) for name, equals, path in pairs]


def named(values, names, flag):
    """["g1=30", "droid=15"] or ["30"] -> {name: "30"}; one bare value is for all."""
    table = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if equals and name not in names:
            raise ValueError(f"{flag} {value}: no source is called {name}; there are {', '.join(names)}")
        table.update({name: rest} if equals else dict.fromkeys(names, value))
    return table


def read_sources(data, chunk, val_share=0.1, val_episodes=()):
    """The sources of the flags' words. data: NAME=PATH or PATH; chunk: 1s, 30 or g1=30; val_episodes: g1=56-69,80."""
    pairs = named_paths(data)
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"--data: two sources are called {max(names, key=names.count)}: write NAME=PATH")
    chunks, held_out = named(chunk, names, "--chunk"), named(val_episodes, names, "--val-episodes")
    sources = [read_source(name, path) for name, path in pairs]
    for source in sources:
        size = chunks.get(source.name, "1s")
        if not re.fullmatch(r"\d+|\d*\.?\d+s", size):
            raise ValueError(f"--chunk {size}: expected steps (30) or seconds (1s)")
        if size.endswith("s") and source.fps is None:
            raise ValueError(f"--data {source.name}: its files do not tell the rate; give --chunk {source.name}=STEPS")
        source.chunk = round(float(size[:-1]) * source.fps) if size.endswith("s") else int(size)
        if source.chunk < 1:
            raise ValueError(f"--chunk {size}: less than one step of {source.name}")
        if source.name in held_out:
            wanted = set()
            for word in held_out[source.name].split(","):
                first, dash, last = word.partition("-")
                number = first.isdigit() and last.isdigit() and dash
                wanted |= {str(n) for n in range(int(first), int(last) + 1)} if number else {word}
            if wanted - set(source.ids):
                raise ValueError(
                    f"--val-episodes {source.name}: no episode is called {sorted(wanted - set(source.ids))[0]}"
                )
            source.validation = np.array([identity in wanted for identity in source.ids])
        else:
            source.validation = np.array([is_validation(source.name, identity, val_share) for identity in source.ids])
            if source.validation.all() or (val_share > 0 and len(source.ids) > 1 and not source.validation.any()):
                # too few episodes for a share: hold out the one with the smallest hash
                hashes = [episode_hash(source.name, identity) for identity in source.ids]
                source.validation[:] = False
                source.validation[np.argmin(hashes)] = len(source.ids) > 1
        if source.validation.all():
            raise ValueError(f"--val-episodes {source.name}: all {len(source.ids)} episodes are held out, none is left")
    return sources


def split_of(sources):
    """What a checkpoint keeps of the data: {source: its number of episodes, the ids of those held out}."""
    return {
        source.name: dict(episodes=len(source.ids), held_out=[source.ids[i] for i in np.flatnonzero(source.validation)])
        for source in sources
    }


def restore_split(sources, split):
    """Hold out what the checkpoint held out, in place. Returns a line for each source that has changed since."""
    lines = []
    for source in sources:
        before = split.get(source.name, dict(episodes=0, held_out=[]))
        source.validation = np.isin(source.ids, before["held_out"])
        if before["episodes"] != len(source.ids):
            lines.append(f"{source.name}: {len(source.ids)} episodes, {before['episodes']} when the run began")
    return lines


def describe(source, normalise="quantile"):
    """What the model keeps of a source: name, dims, chunk, rate and the normalisation fitted on its training episodes.

    quantile: q01 and q99 of each dim go to -1 and 1 (no clipping). std: zero mean, unit deviation. A dim that hardly
    moves is only centred, in its own units.
    """
    rows = source.rows(validation=False).astype(np.float64)
    low, high = np.quantile(rows, [0.01, 0.99], axis=0)
    if normalise == "std":
        center, scale = rows.mean(0), rows.std(0)
    else:
        center, scale = (low + high) / 2, (high - low) / 2
    constant = scale < 1e-4 * np.maximum(np.abs(center), 1e-2)
    span = (rows.max(0) - rows.min(0)) / 2
    scale = np.where(
        constant, np.where(span > 1e-6, span, 1.0), scale
    )  # a rare event, such as a gripper's, keeps its span
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


def pad(actions, mask, steps, dims):
    """Chunks (B, T, A) and masks (B, T) to (B, steps, dims)."""
    extra = steps - actions.shape[1]
    actions = np.pad(actions, ((0, 0), (0, extra), (0, dims - actions.shape[2])))
    return actions.astype(np.float32), np.pad(mask, ((0, 0), (0, extra)))


class TrainBatches(Dataset):
    """Item (step * accum + micro) is this rank's slice of the step's global batch, augmented.

    Augmentation, each on half of the chunks, because what a policy will meet is wider than what was recorded: a chunk
    is mixed with another of its source (weights -mix to 1 + mix); a constant is added to each dim (about `offset` times
    the dim's scale), for joints drift between recordings.
    """

    def __init__(self, sources, batch_size, seed, accum=1, rank=0, world=1, mix=0.5, offset=0.2):
        if batch_size % (accum * world):
            raise ValueError(f"--batch-size {batch_size} is not divisible by {accum} micro-steps x {world} processes")
        self.sources, self.batch_size, self.seed, self.accum, self.rank, self.world = (
            sources, batch_size, seed, accum, rank, world,
        )  # fmt: skip
        self.mix, self.offset = mix, offset
        self.starts = [source.starts(validation=False) for source in sources]
        # the square root keeps a small source from drowning and a large one from being starved
        size = np.sqrt([len(rows) for rows, _ in self.starts])
        self.share = size / size.sum()
        self.steps, self.dims = max(s.chunk for s in sources), max(s.actions.shape[1] for s in sources)

    def __getitem__(self, item):
        step, micro = divmod(item, self.accum)
        draw = np.random.default_rng([self.seed, step])
        B = self.batch_size
        source = draw.choice(len(self.sources), B, p=self.share)
        pick, other = draw.random((2, B))
        weight = draw.uniform(-self.mix, 1 + self.mix, B)
        weight = np.where(draw.random(B) < 0.5 * (self.mix > 0), weight, 1.0).astype(np.float32)
        shift = draw.normal(0, 1, (B, self.dims)) * draw.random((B, 1)) * (draw.random((B, 1)) < 0.5) * self.offset
        size = B // (self.accum * self.world)
        first = (micro * self.world + self.rank) * size
        mine = slice(first, first + size)
        source, pick, other, weight, shift = source[mine], pick[mine], other[mine], weight[mine], shift[mine]
        actions = np.zeros((size, self.steps, self.dims), np.float32)
        mask = np.zeros((size, self.steps), bool)
        for s in np.unique(source):
            rows, episodes = self.starts[s]
            here = source == s
            a, b = (np.int64(u[here] * len(rows)) for u in (pick, other))
            one, valid = self.sources[s].gather(rows[a], episodes[a])
            two, _ = self.sources[s].gather(rows[b], episodes[b])
            one = np.where(weight[here, None, None] == 1, one, two + weight[here, None, None] * (one - two))
            one = one + (shift[here, : one.shape[2]] * self.sources[s].scale)[:, None]
            actions[here], mask[here] = pad(one, valid, self.steps, self.dims)
        return dict(actions=torch.from_numpy(actions), mask=torch.from_numpy(mask), source=torch.from_numpy(source))


class ValidationChunks(Dataset):
    """Whole chunks of one source's validation episodes; every world-th of them is this rank's, so none counts twice."""

    def __init__(self, sources, index, stride=5, rank=0, world=1):
        self.source, self.index = sources[index], index
        rows, episodes = self.source.starts(validation=True, stride=stride, whole=True)
        self.rows, self.episodes = rows[rank::world], episodes[rank::world]
        self.steps, self.dims = max(s.chunk for s in sources), max(s.actions.shape[1] for s in sources)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        actions, mask = self.source.gather(self.rows[i : i + 1], self.episodes[i : i + 1])
        actions, mask = pad(actions, mask, self.steps, self.dims)
        return dict(actions=actions[0], mask=mask[0], source=self.index)


def prepare_dataloaders(
    batch_size,
    sources,
    seed=0,
    steps=1000,
    first=0,
    accum=1,
    rank=0,
    world=1,
    workers=0,
    val_stride=5,
    mix=0.5,
    offset=0.2,
):
    """(example action tensor (T, A), train loader, {source name: validation loader}) for `sources` of read_sources.

    The train loader yields this rank's micro-batches of the optimizer steps first to steps - 1. A source without a
    whole validation chunk has no validation loader.
    """
    batches = TrainBatches(sources, batch_size, seed, accum, rank, world, mix, offset)
    items = range(first * accum, steps * accum)
    train = DataLoader(batches, batch_size=None, sampler=items, num_workers=workers)
    validation = {}
    for index, source in enumerate(sources):
        if len(source.starts(validation=True, whole=True)[0]):
            chunks = ValidationChunks(sources, index, val_stride, rank, world)
            validation[source.name] = DataLoader(chunks, batch_size=256)
    return batches[0]["actions"][0], train, validation
