"""Recordings and their split, and sequences of latent frames as batches.

A batch is a dict: latents (B, T, C, H, W) float32 in the VAE's units and, in training, anchor (B,) int64, the frame
where the rollout starts. The global batch of a step is a function of (seed, step) alone; a rank and a micro-step take
their slice of it.
"""

import functools
import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from recordings import AXES, inspect, reason
from torch.utils.data import DataLoader, Dataset

from common import DataError, ignore_signals, warn

# --- recordings: what --data names, and how they are split


def episode_hash(episode):
    """A number in [0, 1) that depends on the episode's name alone."""
    return int.from_bytes(hashlib.sha256(str(episode).encode()).digest()[:8], "big") / 2**64


def named_paths(words):
    """["demo=PATH", "PATH"] -> [(name, path)]. A word that is a path as it stands is one, whatever it holds."""
    pairs = []
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or Path(word).exists():
            name, path = Path(word).resolve().name, word
        if not path or not Path(path).exists():
            raise DataError(f"--data {word}: no such file or folder (write PATH or NAME=PATH)")
        pairs.append((name, Path(path)))
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise DataError(f"--data: two sources are called {max(names, key=names.count)}: write NAME=PATH")
    return pairs


def find_files(folder, suffixes=(".h5", ".hdf5")):
    """Files below a folder with these suffixes, sorted; links to folders are followed, hidden files are left out."""
    found, seen = [], set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(where, n) for n in names if n.lower().endswith(suffixes) and not n.startswith(".")]
    if bad := [str(file) for file in found if "\\udc" in ascii(file)]:
        raise DataError(f"{ascii(bad[0])}: its name is not UTF-8: rename it")
    return sorted(found)


def read_manifest(path, folder):
    """{file: split} of a manifest.json with `splits`: train, validation (or val), test.

    Names are relative to the folder or absolute; an absolute one from another machine is looked up by its file name.
    """
    try:
        splits = json.loads(Path(path).read_text())["splits"]
        table = [(Path(name), split) for split, names in splits.items() for name in names]
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path}: not a manifest ({reason(error)}): make_manifest.py writes one") from None
    split_of, missing = {}, []
    for name, split in table:
        split = {"val": "validation"}.get(split, split)
        if split not in ("train", "validation", "test"):
            raise DataError(f"{path}: unknown split {split!r}, expected train, validation, test")
        places = [folder / name, folder / name.name, folder / f"{name}.h5"]
        file = next((place for place in places if place.is_file() and place.is_relative_to(folder)), None)
        if file is None:
            missing.append(name)
        elif split_of.setdefault(file, split) != split:
            raise DataError(f"{path}: {name} is in two splits")
    if not table:
        raise DataError(f"{path}: its splits are empty: make_manifest.py writes one")
    if missing:
        raise DataError(f"{path}: {len(missing)} files are not there, the first is {missing[0]}: run make_manifest.py")
    return split_of


def read_sources(data, manifest=None, val_share=0.1, val_episodes=()):
    """All recordings of the --data words (NAME=PATH or PATH, folders or single files), split.

    The split is that of val_episodes (an episode, a recording, or NAME=ID), else of the manifest (one for all, or
    DIR/manifest.json), else a hash of each episode's name. All recordings must be of one VAE.
    """
    recordings = []
    for name, path in named_paths(data):
        path = path.absolute()  # as a manifest may name its files
        folder = path if path.is_dir() else path.parent
        listed = Path(manifest) if manifest else folder / "manifest.json"
        split_of = read_manifest(listed, folder) if path.is_dir() and (manifest or listed.exists()) else {}
        files = list(split_of) or (find_files(path) if path.is_dir() else [path])
        if more := len(set(find_files(path)) - set(files)) if split_of else 0:
            warn(f"{listed}: names no split for {more} files of {path}: they are left out")
        if not files:
            raise DataError(f"--data {path}: no .h5 files (video_vae/encode_videos.py writes them)")
        for file in files:
            recording = inspect(file, name, str(file.relative_to(folder).with_suffix("")))
            recording.split = split_of.get(file, "")
            recordings.append(recording)
    same = [name for name, count in Counter((r.source, r.id) for r in recordings).items() if count > 1]
    if same:
        raise DataError(f"--data {same[0][0]}: two files are called {same[0][1]}")
    check_alike(recordings)
    hold_out(recordings, val_share, val_episodes)
    if all(recording.split != "train" for recording in recordings):
        raise DataError("--data: no recording is left to train on: hold out fewer episodes")
    return recordings


def hold_out(recordings, val_share, val_episodes):
    """Set the split of every recording: see read_sources."""
    if val_episodes:
        for recording in recordings:
            recording.split = "train"
        for word in val_episodes:
            for recording in find_episodes(recordings, word):
                recording.split = "validation"
        return
    free = [recording for recording in recordings if not recording.split]
    hashes = {recording.episode: episode_hash(recording.episode) for recording in free}
    held = {episode for episode, number in hashes.items() if number < val_share}
    if val_share > 0 and not held:  # too few for a share
        held = {min(hashes, key=hashes.get)} if hashes else set()
    if len(held) == len(hashes):  # one is left to train on
        held -= {max(hashes, key=hashes.get)} if hashes else set()
    for recording in free:
        recording.split = "validation" if recording.episode in held else "train"


def find_episodes(recordings, word):
    """The recordings of an episode or of an id, or of numbers such as 56-69,80 (leading zeros aside), or NAME=these."""
    source, equals, rest = word.partition("=")
    named = [r for r in recordings if r.source == source] if equals else []
    pool, found = named or recordings, []
    for part in (rest if named else word).split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        numbers = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else ()
        some = [r for r in pool if part in (r.episode, r.id) or (r.episode.isdecimal() and int(r.episode) in numbers)]
        if not some:
            names = ", ".join(dict.fromkeys(r.episode for r in pool[:5]))
            raise DataError(f"--val-episodes: no episode {part!r}, but {names} ...")
        found += some
    return found


def split_of(recordings):
    """{split: {fingerprint: name}}, what a checkpoint keeps of its data."""
    table = {"train": {}, "validation": {}, "test": {}}
    for recording in recordings:
        table[recording.split][recording.fingerprint()] = f"{recording.source}/{recording.id}"
    return table


def restore_split(recordings, table):
    """Set the splits of a checkpoint's data.json, "new" where it does not know a recording -> lines on what changed."""
    lines, known = [], {mark: (split, name) for split, marks in table.items() for mark, name in marks.items()}
    marks = [recording.fingerprint() for recording in recordings]
    for recording, mark in zip(recordings, marks, strict=True):
        recording.split, _ = known.get(mark, ("new", None))
    new = [f"{r.source}/{r.id}" for r in recordings if r.split == "new"]
    gone = [name for mark, (_, name) in known.items() if mark not in marks]
    if new:
        lines.append(f"{len(new)} recordings are new since the run began ({new[0]} ...) and are left out")
    if gone:
        lines.append(f"{len(gone)} recordings of the run are gone or changed ({gone[0]} ...): the rest is trained on")
    return lines


def kind_of(recording):
    """What recordings of one data set share: sizes, and the VAE with its scaling, as far as the file says."""
    attributes = {name: recording.attributes.get(name, "unknown") for name in ("vae", "scaling", "shift")}
    return {"C, H, W": recording.shape, **{name: np.asarray(value).tolist() for name, value in attributes.items()}}


def check_alike(recordings):
    """DataError where a recording has other sizes or is of another VAE than the first."""
    first = recordings[0]
    for recording in recordings:
        for name, value in kind_of(recording).items():
            if value != kind_of(first)[name]:
                what = f"read as {AXES}" if name == "C, H, W" else "latents of several VAEs"
                other = f"{kind_of(first)[name]} in {first.path}"
                raise DataError(f"{recording.path}: {what}: {name} is {value}, but {other}")


def describe_recordings(recordings):
    """Lines on how the files were read: axes, frame rates, and what the chunks of a VAE leak."""
    first = recordings[0]
    chunk = sorted({r.chunk_frames for r in recordings})
    C, H, W = first.shape
    yield f"{len(recordings)} recordings read as {AXES}: C {C}, H {H}, W {W}, T_latent {', '.join(map(str, chunk))}"
    rates = Counter("unknown" if r.fps is None else f"{r.fps:g}" for r in recordings)
    if len(rates) > 1:
        said = ", ".join(f"{rate} ({count})" for rate, count in rates.most_common())
        yield f"warning: the frame rates of the recordings differ: {said} frames a second; a gap is not one time"
    last = [r for r in recordings if not r.every]
    if last:
        share = f"{len(last)} recordings" if len(last) < len(recordings) else "all recordings"
        yield f"of each chunk only the last latent is used ({share}): the others have seen later frames"


def normalisation(recordings, frames=512):
    """Per-channel mean and deviation, (C,) each, of about `frames` frames spread over the recordings."""
    picked = []
    some = recordings[:: max(1, 2 * len(recordings) // frames)]
    for recording in some:
        count = min(len(recording), max(2, frames // len(some)))
        picked += [recording.read([i]) for i in np.unique(np.linspace(0, len(recording) - 1, count).astype(int))]
    sample = np.concatenate(picked).astype(np.float64)
    mean, deviation = sample.mean((0, 2, 3)), sample.std((0, 2, 3))
    return mean.tolist(), np.where(deviation > 1e-6, deviation, 1.0).tolist()


# --- sequences and batches


class Sequences(Dataset):
    """Windows of `length` frames, `gap` apart, that start every `stride` frames of a recording; item: (T, C, H, W).

    most: only so many of them, spread over all recordings.
    """

    def __init__(self, recordings, length, gap=1, stride=1, most=None):
        self.recordings, self.length, self.gap = recordings, length, gap
        starts = [np.arange(0, max(0, len(r) - (length - 1) * gap), stride) for r in recordings]
        self.owner = np.repeat(np.arange(len(starts)), [len(some) for some in starts])
        self.first = np.concatenate([*starts, np.empty(0, np.int64)])
        if most is not None and most < len(self):
            some = np.linspace(0, len(self) - 1, most).astype(int)
            self.owner, self.first = self.owner[some], self.first[some]

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
            why = f"no sequence of {needed} latent frames to train on (the longest recording has {longest})"
            raise DataError(f"{why}: a shorter --sequence-length or --gap, or more recordings")

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


def train_loader(batches, first, steps, workers=0, pin_memory=False):
    """This rank's micro-batches of the steps first to steps - 1."""
    items = range(first * batches.accum, steps * batches.accum)
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
