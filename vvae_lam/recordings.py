"""Recordings of video-VAE latents in HDF5, read lazily, and their split into train, validation and test.

One file per recording, data set `embeddings`: [N_chunks, C, T_latent, H, W], any float type, compressed or not; or
[N, C, H, W], one latent frame each. Chunks follow one another: N_chunks * T_latent latent frames. Optional data sets,
a row per latent frame: `actions` (what happens from that frame on; floats (A), or class numbers), `states` (A) and
`frame_index` (the last frame of the video that the latent holds). Attributes are listed in README.md.

A VAE that is not causal (VideoVAE+, CogVideoX) encodes the frames of a chunk together: all latents but the chunk's last
have seen later frames. Only the last one is used, unless the file's attribute `causal` is true or all_latents is asked.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from common import DataError

KEY = "embeddings"
AXES = "[N_chunks, C, T_latent, H, W] or [N, C, H, W]"
with contextlib.suppress(ImportError):
    import hdf5plugin  # noqa: F401  (filters such as blosc and zstd)


# --- recordings


@dataclass(eq=False)
class Recording:
    """One file. A frame is a latent frame that is used: every one, or the last of each chunk."""

    source: str
    id: str  # path below the source's folder, without suffix
    path: Path
    chunks: int
    chunk_frames: int  # T_latent
    shape: tuple  # C H W
    attributes: dict
    all_latents: bool = False
    split: str = "train"

    def __post_init__(self):
        self.every = self.all_latents or self.chunk_frames == 1 or bool(self.attributes.get("causal", False))

    def __len__(self):
        return self.chunks * self.chunk_frames if self.every else self.chunks

    @property
    def episode(self):
        """What the split goes by: all cameras of an episode are on one side."""
        return str(self.attributes.get("episode", self.id))

    @property
    def fps(self):
        """Frames per second, or None if the file does not say."""
        fps = self.attributes.get("fps")
        return None if fps is None else float(fps) / (1 if self.every else self.chunk_frames)

    def row(self, frames):
        """Number of a frame among all latents of the file."""
        frames = np.asarray(frames)
        return frames if self.every else frames * self.chunk_frames + self.chunk_frames - 1

    def read(self, frames):
        """Latents (n, C, H, W) float32 of increasing frame numbers; one strided read of the chunks that hold them."""
        chunk, place = np.divmod(self.row(frames), self.chunk_frames)
        step = int(np.gcd.reduce(np.diff(chunk), initial=0)) or 1
        try:
            block = opened(self.path, os.getpid())[KEY][chunk[0] : chunk[-1] + 1 : step].astype(np.float32)
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise DataError(f"{self.path}: `{KEY}` cannot be read at chunk {chunk[0]} ({reason(error)})") from None
        block = block[:, :, None] if block.ndim == 4 else block
        latents = block[(chunk - chunk[0]) // step, :, place]
        for bad, what in ((~np.isfinite(latents), "NaN or infinity"), (~latents.any((1, 2, 3)), "nothing but zeros")):
            if bad.any():
                where = chunk[bad.reshape(len(bad), -1).any(1)][0]
                raise DataError(f"{self.path}: `{KEY}` holds {what} in chunk {where}: encode it again, or leave it out")
        return latents

    def fingerprint(self):
        """What tells the recording from others, whatever its file is called: number of latents and first chunk."""
        try:
            first = opened(self.path, os.getpid())[KEY][0]
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise DataError(f"{self.path}: `{KEY}` cannot be read at chunk 0 ({reason(error)})") from None
        return f"{self.chunks * self.chunk_frames}-{zlib.crc32(first.tobytes()):08x}"

    def motion(self, gap):
        """(what happens from frame t to t + gap (T - gap, ...), its name), or (None, None) if the file does not say.

        states: their difference; a dim that jumps by more than pi within [-pi, pi] is an angle, and is unwrapped.
        actions: the sum of the rows from t on; class numbers only where these are one row. Rows may hold NaN.
        """
        with h5py.File(self.path, "r", locking=False) as file:
            name = next((name for name in ("states", "actions") if name in file), None)
            values = None if name is None else file[name][()]
        if name is None or len(self) <= gap:
            return None, None
        rows = self.chunks * self.chunk_frames
        if values.ndim not in (1, 2) or len(values) != rows:
            shape = values.shape
            raise DataError(f"{self.path}: `{name}` has shape {shape}, expected ({rows}, A): a row per latent frame")
        first = self.row(np.arange(len(self) - gap))
        last = self.row(np.arange(gap, len(self)))
        if name == "actions" and values.dtype.kind != "f":
            return (values[first].reshape(-1), name) if (last == first + 1).all() else (None, None)
        values = values.reshape(rows, -1).astype(np.float64)
        if name == "states":
            jumps = np.abs(np.diff(values, axis=0))
            angle = (np.nanmax(np.abs(values), 0) < 3.2) & (np.nanmax(jumps, 0, initial=0) > np.pi)
            change = values[last] - values[first]
            return np.where(angle, (change + np.pi) % (2 * np.pi) - np.pi, change), name
        return np.stack([values[a:b].sum(0) for a, b in zip(first, last, strict=True)]), name

    def frame_index(self):
        """The last video frame that each frame holds, (T,) int64, or None if the file does not say."""
        with h5py.File(self.path, "r", locking=False) as file:
            return (
                file["frame_index"][()].astype(np.int64)[self.row(np.arange(len(self)))]
                if "frame_index" in file
                else None
            )


def reason(error):
    """The first line of a library's error, with the remedy where it is known."""
    text = (str(error) or type(error).__name__).splitlines()[0][:150]
    return f"{text}; pip install hdf5plugin" if "filter" in text.lower() else text


@functools.lru_cache(maxsize=64)
def opened(path, process):
    """One handle per file and process: HDF5 handles do not survive a fork."""
    return h5py.File(path, "r", locking=False)


def inspect(path, source="data", name=None, all_latents=False):
    """The recording of a file, from its header alone; DataError says what is wrong with it."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(40)
        if not head or head.startswith(b"version https://git-lfs"):
            raise DataError(f"{path}: {'an empty file' if not head else 'a Git LFS pointer: run git lfs pull'}")
        with h5py.File(path, "r", locking=False) as file:
            data = file.get(KEY)
            if not isinstance(data, h5py.Dataset):
                names = ", ".join(map(str, file)) or "an empty file"
                raise DataError(f"{path}: no data set `{KEY}`, only {names}")
            shape, kind, attributes = data.shape, data.dtype.kind, {**file.attrs, **data.attrs}
            missing = never_written(data, path.parent)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise DataError(f"{path}: not a whole HDF5 file ({reason(error)})") from None
    if len(shape) not in (4, 5) or 0 in shape:
        raise DataError(f"{path}: `{KEY}` has shape {shape}, expected {AXES}")
    if kind != "f":
        raise DataError(f"{path}: `{KEY}` holds {kind!r} numbers, expected float16, float32 or float64")
    if missing:
        raise DataError(f"{path}: {missing} of `{KEY}`: they would read as zeros; encode it again, or leave it out")
    C, H, W = shape[1], *shape[-2:]
    other = None
    if attributes.get("axes", AXES) not in (AXES, "NCTHW", "NCHW"):
        other = f"its attribute `axes` is {attributes['axes']}"
    elif "axes" not in attributes and "vae" not in attributes:
        if len(shape) == 5 and shape[2] > C:
            other = "they look like [N, T, C, H, W]"
        elif W < H and W < C and W <= 32:
            other = "they look like channels last"
    if other:
        hint = "reorder the axes, or write the attribute axes='NCTHW' if they are right"
        raise DataError(f"{path}: `{KEY}` {shape} is read as {AXES}, but {other}: {hint}")
    chunk_frames = shape[2] if len(shape) == 5 else 1
    return Recording(source, name or path.stem, path, shape[0], chunk_frames, (C, H, W), attributes, all_latents)


def never_written(data, folder):
    """What of a data set was never written, in words, or None. Its writer died, or the files it points to are gone."""
    if data.is_virtual:
        files = {source.file_name for source in data.virtual_sources()} - {"."}
        gone = [name for name in sorted(files) if not (folder / name).exists()]
        return f"{len(gone)} source files are not there ({gone[0]})" if gone else None
    if data.chunks is None:
        return "no value was written" if data.id.get_storage_size() == 0 and data.size else None
    expected = int(np.prod([-(-size // chunk) for size, chunk in zip(data.shape, data.chunks, strict=True)]))
    written = data.id.get_num_chunks()
    return f"{expected - written} of {expected} chunks were never written" if written < expected else None


# --- sources and their split


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
        if not Path(path).exists():
            raise DataError(f"--data {word}: no such file or folder (write PATH or NAME=PATH)")
        pairs.append((name, Path(path)))
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise DataError(f"--data: two sources are called {max(names, key=names.count)}: write NAME=PATH")
    return pairs


def find_files(folder):
    """HDF5 files below a folder, sorted; links to folders are followed, hidden files are left out."""
    found, seen = [], set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(where, n) for n in names if n.lower().endswith((".h5", ".hdf5")) and not n.startswith(".")]
    return sorted(found)


def read_manifest(path, folder):
    """{file: split} of a manifest.json with `splits`: train, validation (or val), test.

    Names are relative to the folder or absolute; an absolute one from another machine is looked up by its file name.
    """
    try:
        splits = json.loads(Path(path).read_text())["splits"]
        table = [(Path(name), split) for split, names in splits.items() for name in names]
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{path}: not a manifest with `splits` ({reason(error)}): make_manifest.py writes one"
        ) from None
    split_of, missing = {}, []
    for name, split in table:
        split = {"val": "validation"}.get(split, split)
        if split not in ("train", "validation", "test"):
            raise DataError(f"{path}: unknown split {split!r}, expected train, validation, test")
        places = [folder / name, folder / name.name, folder / f"{name}.h5"]
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            missing.append(name)
        elif split_of.setdefault(file, split) != split:
            raise DataError(f"{path}: {name} is in two splits")
    if missing:
        raise DataError(f"{path}: {len(missing)} files are not there, the first is {missing[0]}: run make_manifest.py")
    return split_of


def read_sources(data, manifest=None, val_share=0.1, val_episodes=(), all_latents=False):
    """All recordings of the --data words (NAME=PATH or PATH, folders or single files), split.

    The split is that of val_episodes (an episode, a recording, or NAME=ID), else of the manifest (one for all, or
    DIR/manifest.json), else a hash of each episode's name. All recordings must be of one VAE.
    """
    recordings = []
    for name, path in named_paths(data):
        folder = path if path.is_dir() else path.parent
        listed = Path(manifest) if manifest else folder / "manifest.json"
        split_of = read_manifest(listed, folder) if path.is_dir() and (manifest or listed.exists()) else {}
        files = list(split_of) or (find_files(path) if path.is_dir() else [path])
        if not files:
            raise DataError(f"--data {path}: no .h5 files (video_vae/encode_videos.py writes them)")
        for file in files:
            recording = inspect(file, name, str(file.relative_to(folder).with_suffix("")), all_latents)
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
    if val_share > 0 and len(hashes) > 1 and not 0 < len(held) < len(hashes):
        held = {min(hashes, key=hashes.get)}  # too few for a share
    for recording in free:
        recording.split = "validation" if recording.episode in held else "train"


def find_episodes(recordings, word):
    """The recordings of an episode or of an id, or of numbers such as 56-69,80 (leading zeros aside), or NAME=these."""
    source, equals, rest = word.partition("=")
    named = [r for r in recordings if r.source == source] if equals else []
    exact = [r for r in recordings if word in (r.episode, r.id)]
    if exact:
        return exact
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
    """Set the splits of a checkpoint's data.json, "new" where it does not know a recording; lines on what changed."""
    known = {mark: split for split, marks in table.items() for mark in marks}
    for recording in recordings:
        recording.split = known.pop(recording.fingerprint(), "new")
    new = [f"{r.source}/{r.id}" for r in recordings if r.split == "new"]
    if new:
        yield f"{len(new)} recordings are new since the run began ({new[0]} ...) and are left out"
    if known:
        gone = [table[split][mark] for mark, split in known.items()]
        yield f"{len(gone)} recordings of the run are gone or changed ({gone[0]} ...): the rest is trained on"


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
    leaky = [r for r in recordings if r.chunk_frames > 1 and r.every and not r.attributes.get("causal")]
    if last:
        share = f"{len(last)} recordings" if len(last) < len(recordings) else "all recordings"
        yield f"of each chunk only the last latent is used ({share}): the others have seen later frames (--all-latents)"
    if leaky:
        yield f"--all-latents: in {len(leaky)} recordings latents have seen frames that come after them: a leak"


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
