"""Recordings of video-VAE latents in HDF5, read lazily, and their split into train, validation and test.

One file per recording, data set `embeddings`: [N_chunks, C, T_latent, H, W], any float type, compressed or not; or
[N, C, H, W], one latent frame each (T_latent 1). Chunks follow one another: N_chunks * T_latent latent frames.

The leak of jointly encoded chunks: a VAE that is not causal (VideoVAE+) encodes a chunk's frames together, so its first
latent frame has seen the second's video, and predicting the second from the first is partly reading, not predicting.
causal_only keeps the last latent frame of each chunk: it holds nothing later than itself.
"""

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

KEY = "embeddings"


# --- recordings


@dataclass
class Recording:
    """One file. A frame is a latent frame: all of them, or with causal_only the last of each chunk."""

    source: str
    id: str
    path: Path
    chunks: int
    chunk_frames: int  # T_latent
    shape: tuple  # C H W
    attributes: dict
    causal_only: bool = False
    split: str = "train"

    def __len__(self):
        return self.chunks if self.causal_only else self.chunks * self.chunk_frames

    def place(self, frames):
        """(chunk, slot inside the chunk) of frame numbers."""
        frames = np.asarray(frames)
        if self.causal_only:
            return frames, np.full_like(frames, self.chunk_frames - 1)
        return np.divmod(frames, self.chunk_frames)

    def read(self, frames):
        """Latents (n, C, H, W) float32 of increasing frame numbers; one strided read of the chunks that hold them."""
        chunk, slot = self.place(frames)
        step = int(np.gcd.reduce(np.diff(chunk), initial=0)) or 1
        try:
            block = opened(self.path, os.getpid())[KEY][chunk[0] : chunk[-1] + 1 : step].astype(np.float32)
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{self.path}: `{KEY}` cannot be read at chunk {chunk[0]} ({brief(error)})") from None
        if block.ndim == 4:
            block = block[:, :, None]
        latents = block[(chunk - chunk[0]) // step, :, slot]
        if not np.isfinite(latents).all():
            bad = chunk[~np.isfinite(latents).all((1, 2, 3))][0]
            raise ValueError(
                f"{self.path}: `{KEY}` holds NaN or infinity in chunk {bad}: encode it again, or leave it out"
            )
        return latents

    def actions(self):
        """Data set `actions`, one row per latent frame (row t: what happens from t on), or None."""
        with h5py.File(self.path, "r", locking=False) as file:
            if "actions" not in file:
                return None
            actions = file["actions"][()]
        frames = self.chunks * self.chunk_frames
        if actions.ndim not in (1, 2) or len(actions) != frames:
            raise ValueError(
                f"{self.path}: `actions` has shape {actions.shape}, expected ({frames}, A): a row per latent frame"
            )
        chunk, slot = self.place(np.arange(len(self)))
        return actions[chunk * self.chunk_frames + slot]


def brief(error):
    return (str(error) or type(error).__name__).splitlines()[0][:150]


@functools.lru_cache(maxsize=64)
def opened(path, process):
    """One handle per file and process: HDF5 handles do not survive a fork."""
    return h5py.File(path, "r", locking=False)


def inspect(path, source="data", name=None, causal_only=False):
    """The recording of a file, from its header alone; ValueError says what is wrong with it."""
    path = Path(path)
    try:
        with h5py.File(path, "r", locking=False) as file:
            if not isinstance(file.get(KEY), h5py.Dataset):
                raise ValueError(f"no data set `{KEY}`, only {', '.join(map(str, file)) or 'an empty file'}")
            shape, kind, attributes = file[KEY].shape, file[KEY].dtype.kind, {**file.attrs, **file[KEY].attrs}
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path}: not a whole HDF5 file ({brief(error)})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {brief(error)}") from None
    if len(shape) not in (4, 5) or 0 in shape:
        raise ValueError(f"{path}: `{KEY}` has shape {shape}, expected [N_chunks, C, T_latent, H, W] or [N, C, H, W]")
    if kind != "f":
        raise ValueError(f"{path}: `{KEY}` holds {kind!r} numbers, expected floating point")
    chunk_frames = shape[2] if len(shape) == 5 else 1
    sizes = (shape[1], *shape[-2:])
    return Recording(source, name or path.stem, path, shape[0], chunk_frames, sizes, attributes, causal_only)


# --- sources and their split


def episode_hash(source, episode):
    """A number in [0, 1) that depends on the two names alone."""
    digest = hashlib.sha256(f"{source}/{episode}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def named_paths(words):
    """["demo=PATH", "PATH"] -> [(name, path)]; without a name it is the path's own."""
    pairs = [word.partition("=") for word in words]
    return [(name, path) if equals else (Path(name).stem or "data", name) for name, equals, path in pairs]


def find_files(folder):
    """HDF5 files below a folder, sorted; hidden ones are half-written and left out."""
    files = [path for kind in ("*.h5", "*.hdf5") for path in Path(folder).rglob(kind)]
    return sorted(path for path in files if not path.name.startswith("."))


def read_manifest(path, folder):
    """{split: [file]} of a manifest.json with `splits`: train, validation (or val), test.

    Names are relative to the folder or absolute; an absolute one from another machine is looked up by its file name.
    """
    try:
        splits = json.loads(Path(path).read_text())["splits"]
        table = {split: [Path(name) for name in names] for split, names in splits.items()}
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path}: not a manifest with `splits` ({brief(error)}): make_manifest.py writes one"
        ) from None
    table = {{"val": "validation"}.get(split, split): names for split, names in table.items()}
    unknown, missing = set(table) - {"train", "validation", "test"}, []
    if unknown:
        raise ValueError(f"{path}: unknown split {sorted(unknown)[0]!r}, expected train, validation, test")
    for names in table.values():
        for i, name in enumerate(names):
            places = [folder / name, folder / name.name, folder / f"{name}.h5"]
            names[i] = next((place for place in places if place.is_file()), None)
            missing += [str(name)] if names[i] is None else []
    if missing:
        raise ValueError(f"{path}: {len(missing)} files are not there, the first is {missing[0]}: run make_manifest.py")
    return table


def split_by_name(name, ids, val_share, val_episodes):
    """{id: split} by the ids held out, or by hash of source and id."""
    if val_episodes:
        unknown = set(val_episodes) - set(ids)
        if unknown:
            raise ValueError(
                f"--val-episodes: {name} has no recording {sorted(unknown)[0]!r}, but {', '.join(ids[:5])} ..."
            )
        held = set(val_episodes)
    else:
        held = {i for i in ids if episode_hash(name, i) < val_share}
        if val_share > 0 and len(ids) > 1 and not 0 < len(held) < len(ids):
            held = {min(ids, key=lambda i: episode_hash(name, i))}  # too few for a share
    return {i: "validation" if i in held else "train" for i in ids}


def read_sources(data, manifest=None, val_share=0.1, val_episodes=(), causal_only=False):
    """All recordings of the flags' words, split. data: NAME=DIR or DIR (or one file).

    The split is that of val_episodes (ID or NAME=ID), else of the manifest (one path for all, or DIR/manifest.json),
    else by hash. All recordings must have the same C, H, W.
    """
    recordings, pairs = [], named_paths(data)
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"--data: two sources are called {max(names, key=names.count)}: write NAME=PATH")
    for name, path in pairs:
        path = Path(path)
        if not path.exists():
            raise ValueError(f"--data {path}: no such file or folder")
        folder = path if path.is_dir() else path.parent
        listed = Path(manifest) if manifest else folder / "manifest.json"
        held = [
            word.removeprefix(f"{name}=") for word in val_episodes if "=" not in word or word.startswith(f"{name}=")
        ]
        if not val_episodes and path.is_dir() and (manifest or listed.exists()):
            table = read_manifest(listed, folder)
            split_of = {file: split for split, files in table.items() for file in files}
        else:
            split_of = dict.fromkeys(find_files(path) if path.is_dir() else [path])
        ids = {file: str(file.relative_to(folder).with_suffix("")) for file in split_of}
        if None in split_of.values():
            table = split_by_name(name, list(ids.values()), val_share, held)
            split_of = {file: table[ids[file]] for file in split_of}
        if not split_of:
            raise ValueError(f"--data {path}: no .h5 files (encode_videos.py writes them)")
        for file, split in split_of.items():
            recording = inspect(file, name, ids[file], causal_only)
            recording.split = split
            recordings.append(recording)
    first = recordings[0]
    for recording in recordings:
        if recording.shape != first.shape:
            raise ValueError(f"{recording.path}: C, H, W are {recording.shape}, but {first.shape} in {first.path}")
    return recordings


def same_chunk(recording, frames):
    """True where two consecutive frames of `frames` (n) lie in one jointly encoded chunk; (n - 1,) bool."""
    chunk, _ = recording.place(frames)
    return chunk[1:] == chunk[:-1]


def leak_report(recordings):
    """One line on the share of transitions inside a jointly encoded chunk, or None if there is none."""
    open_ones = [r for r in recordings if r.chunk_frames > 1 and not r.causal_only and not r.attributes.get("causal")]
    inside = sum(r.chunks * (r.chunk_frames - 1) for r in open_ones)
    total = sum(len(r) - 1 for r in recordings)
    if not inside:
        return None
    return (
        f"{inside} of {total} transitions lie inside a chunk of {open_ones[0].chunk_frames} latent frames encoded "
        "together: unless the VAE is causal, the first has seen the second (--causal-only leaves them out)"
    )


def describe(recordings, frames=512):
    """Per-channel mean and deviation, (C,) each, of about `frames` frames spread over the recordings."""
    picked = []
    some = recordings[:: max(1, 2 * len(recordings) // frames)]
    for recording in some:
        count = min(len(recording), max(2, frames // len(some)))
        picked += [recording.read([i]) for i in np.unique(np.linspace(0, len(recording) - 1, count).astype(int))]
    sample = np.concatenate(picked).astype(np.float64)
    mean, deviation = sample.mean((0, 2, 3)), sample.std((0, 2, 3))
    return mean.tolist(), np.where(deviation > 1e-6, deviation, 1.0).tolist()
