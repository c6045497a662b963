"""Reference clips for a walker, from stac-mjx and track-mjx h5 files, and their split into training and held-out clips.

stac-mjx: datasets `qpos` (T nq), `xpos` (T nb 3), `qvel` (T nv, often empty or saturated), names and a YAML
`config` with the frames per clip; clips lie one after another. ReferenceClip: a group with `position`, `quaternion`,
`joints`, `body_positions` (clips T ...) and velocities. Both become one `Clips`.
"""

import hashlib
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from teacher.walker import body_names, check_clip, positions, velocities

from common import DataError

REFERENCE_CLIP = ("position", "quaternion", "joints")
LOCKED = "another process has it open, or its file system has no locks: HDF5_USE_FILE_LOCKING=FALSE reads it still"


@dataclass
class Clips:
    """C clips of up to T frames; a shorter clip repeats its last frame. Angles in rad, lengths in the walker's unit.

    qpos (C T nq), qvel (C T nv) per second, xpos (C T nb 3) world positions of `bodies` (names, in the file's order,
    or none), length (C,) in frames, ids FILE/number of every clip, source (C,) name of the data set, held_out (C,)
    bool, notes: lines for the user.
    """

    ids: list
    source: np.ndarray
    qpos: np.ndarray
    qvel: np.ndarray
    xpos: np.ndarray
    bodies: list
    length: np.ndarray
    held_out: np.ndarray
    notes: list


# --- one file


def read_dataset(h5, key):
    """All of a dataset. HDF5 reads chunks that were never written, and virtual sources that are gone, as zeros."""
    dataset = h5[key]
    if dataset.is_virtual:
        sources = [Path(h5.file.filename).parent / part.file_name for part in dataset.virtual_sources()]
        if gone := [path for path in sources if path.name != "." and not path.exists()]:
            raise DataError(f"`{key}` is virtual, and its source {gone[0]} is not there")
    elif dataset.chunks and dataset.size:
        chunks = np.prod([-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True)])
        if (written := dataset.id.get_num_chunks()) < chunks:
            raise DataError(f"{chunks - written:.0f} of {chunks:.0f} chunks of `{key}` were never written")
    elif dataset.size and dataset.id.get_storage_size() == 0:
        raise DataError(f"`{key}` was never written")
    return dataset[()]


def names_of(h5, key):
    """Names without the prefix that attaching a model gives them (rodent/torso)."""
    words = h5[key][()] if key in h5 else []
    return [(word.decode() if isinstance(word, bytes) else str(word)).rpartition("/")[2] for word in words]


def read_stac(h5, clip_frames):
    """(clips, names of bodies, names of qpos entries, frames left over) of a stac-mjx file."""
    qpos, config = read_dataset(h5, "qpos"), h5["config"][()] if "config" in h5 else b""
    text = config.decode() if isinstance(config, bytes) else str(config)
    match = re.search(r"n_frames_per_clip:\s*(\d+)", text)
    frames = clip_frames or (int(match[1]) if match else len(qpos))
    if len(qpos) == 0:
        raise DataError("`qpos` is empty")
    if frames < 2:
        raise DataError(f"clips of {frames} frame: give their length with --clip-frames")
    if len(qpos) < frames:
        raise DataError(f"{len(qpos)} frames are less than one clip of {frames}: give its length with --clip-frames")
    arrays = dict(qpos=qpos)
    for key in ("xpos", "qvel"):
        if key in h5 and h5[key].shape[:1] == (len(qpos),):
            arrays[key] = read_dataset(h5, key)
        elif key == "xpos" and key in h5 and h5[key].size:
            raise DataError(f"`xpos` has shape {h5[key].shape}, but `qpos` has {len(qpos)} frames")
    starts = range(0, len(qpos) - frames + 1, frames)
    clips = [{key: value[i : i + frames] for key, value in arrays.items()} for i in starts]
    return clips, names_of(h5, "names_xpos"), names_of(h5, "names_qpos"), len(qpos) % frames


def read_reference_clip(group):
    """The same of a ReferenceClip group; it holds no names."""
    if missing := [key for key in REFERENCE_CLIP if key not in group]:
        raise DataError(f"its ReferenceClip has no `{missing[0]}`")
    arrays = dict(qpos=np.concatenate([read_dataset(group, key) for key in REFERENCE_CLIP], -1))
    if "body_positions" in group:
        arrays["xpos"] = read_dataset(group, "body_positions")
        if arrays["xpos"].shape[:2] != arrays["qpos"].shape[:2]:
            raise DataError(f"`body_positions` has shape {arrays['xpos'].shape}, but `joints` {group['joints'].shape}")
    velocity = ("velocity", "angular_velocity", "joints_velocity")
    if all(key in group for key in velocity):
        arrays["qvel"] = np.concatenate([read_dataset(group, key) for key in velocity], -1)
    return [{key: value[i] for key, value in arrays.items()} for i in range(len(arrays["qpos"]))], [], [], 0


def read_h5(file, clip_frames):
    """(clips, names of bodies, names of qpos entries, frames left over) of a file in either layout."""
    head = file.open("rb").read(64) if file.is_file() else b""
    if not head or head.startswith(b"version https://git-lfs"):
        raise DataError(f"{file}: {'a Git LFS pointer, fetch it with `git lfs pull`' if head else 'an empty file'}")
    try:
        with h5py.File(file, "r") as h5:
            group = next((h5[key] for key in ("all_clips", "clips") if key in h5), h5)
            if "qpos" in h5:
                return read_stac(h5, clip_frames)
            if "position" in group:
                return read_reference_clip(group)
            raise DataError("neither stac-mjx (`qpos`) nor ReferenceClip (`position`, `quaternion`, `joints`)")
    except BlockingIOError:
        raise DataError(f"{file}: {LOCKED}") from None
    except Exception as error:  # for a broken file h5py raises a dozen kinds
        text = " ".join(str(error).split())[:150]
        text += "; `pip install hdf5plugin` brings filters" if "filter" in text else ""
        text = LOCKED if "unable to lock" in text else f"not readable as reference clips ({text})"
        raise DataError(f"{file}: {text}") from None


def read_file(file, model, mocap_hz, clip_frames=0):
    """(clips, names of their bodies, notes) of a file, checked; a clip is dict(qpos, qvel, xpos)."""
    clips, bodies, joints, rest = read_h5(file, clip_frames)
    if not clips:
        raise DataError(f"{file}: holds no clip")
    notes = [f"{file}: the last {rest} frames are no whole clip and are left out"] if rest else []
    if "xpos" not in clips[0]:
        notes.append(f"{file}: no xpos: unit, order of joints and walker of the clips are not checked")
    recomputed = 0
    for i, clip in enumerate(clips):
        check_clip(model, clip, bodies, joints, f"{file}, clip {i}")
        velocity = velocities(model, clip["qpos"], mocap_hz)
        if not usable(clip.get("qvel"), velocity):
            clip["qvel"], recomputed = velocity, recomputed + 1
        if "xpos" not in clip:
            clip["xpos"], bodies = positions(model, clip["qpos"]), body_names(model)
    if recomputed:
        notes.append(f"{file}: qvel of {recomputed} clips is absent or wrong and was computed from qpos")
    return clips, bodies, notes


def usable(stored, computed):
    """False if the stored qvel is absent, of another shape, not finite, or far from the differences of qpos."""
    if stored is None or stored.shape != computed.shape or not np.isfinite(stored).all():
        return False
    return np.abs(stored - computed).mean() <= 0.5 * np.abs(computed).mean() + 1e-6


# --- many files


def named_path(word):
    """ "mouse=PATH" -> (name, path); without a name it is the path's own. What exists is a path, = in it or not."""
    name, equals, path = word.partition("=")
    name, path = (name, path) if equals and not Path(word).exists() else (Path(word).stem or "data", word)
    return name.replace("$", ""), path  # $ begins a formula in figures


def find_files(path):
    """The .h5 and .hdf5 files under a folder, links to folders followed, hidden files left out; or the file itself."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"--data {path}: no such file or folder")
    files, seen = [] if path.is_dir() else [path], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        fit = [name for name in names if name.lower().endswith((".h5", ".hdf5")) and not name.startswith(".")]
        files += [] if real in seen else [Path(folder) / name for name in sorted(fit)]
        seen.add(real)
    if not files:
        raise DataError(f"--data {path}: holds no .h5 file")
    return files


def labels(files):
    """A short name for every file: its stem, or as much of its path as tells it from the others."""
    known = {}
    for file in files:
        first = known.setdefault(file.resolve(), file)
        if first is not file:
            raise DataError(f"--data names a file twice: {first} and {file}")
    for name in (lambda f: f.stem, lambda f: f.name, lambda f: f"{f.parent.name}/{f.name}", str):
        names = [name(file) for file in files]
        if len(set(names)) == len(names):
            return names
    return names


def episode_hash(name):
    """A number in [0, 1) that depends on the clip's own name (stem of its file, number) alone."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8], "big") / 2**64


def by_hash(names, share):
    """Which of a source's clips are held out: about `share` of them, one at least of two."""
    hashes = np.array([episode_hash(name) for name in names])
    held = hashes < share
    if held.all() or (share > 0 and len(names) > 1 and not held.any()):
        held = (np.arange(len(names)) == hashes.argmin()) & (len(names) > 1)
    return held


def by_name(ids, source, wanted):
    """Which clips --val-episodes names: 56-69,80 by number, FILE/3 or FILE (all) by file; NAME=... of one source."""
    held = np.zeros(len(ids), bool)
    for word in wanted:
        name, _, parts = word.rpartition("=")
        for part in parts.split(","):
            file, _, numbers = part.rpartition("/")
            low, _, high = numbers.partition("-")
            span = range(int(low), int(high or low) + 1) if low.isdecimal() and (high or low).isdecimal() else ()
            found = np.zeros(len(ids), bool)
            for i, (clip, own) in enumerate(zip(ids, source, strict=True)):
                stem, _, number = clip.rpartition("/")
                found[i] = name in ("", own) and (stem == part or (file in ("", stem) and int(number) in span))
            if not found.any():
                raise DataError(f"--val-episodes {word}: there is no clip {part}; the first is {ids[0]} of {source[0]}")
            held |= found
    return held


def read_clips(words, model, mocap_hz, val_share=0.1, val_episodes=(), clip_frames=0):
    """All clips of `--data` words (NAME=FILE.h5 or NAME=FOLDER) for a walker (mujoco.MjModel) as one `Clips`."""
    found = [(name, file) for name, path in map(named_path, words) for file in find_files(path)]
    clips, ids, own, source, notes, bodies = [], [], [], [], [], None
    for (name, file), label in zip(found, labels([file for _, file in found]), strict=True):
        some, names, more = read_file(file, model, mocap_hz, clip_frames)
        if bodies is not None and names != bodies:
            raise DataError(f"{file}: names_xpos differs from {found[0][1]}: one --data holds one walker")
        if clips and some[0]["xpos"].shape[1] != clips[0]["xpos"].shape[1]:
            raise DataError(f"{file}: another number of bodies than {found[0][1]}: one --data holds one walker")
        bodies, notes, clips = names, notes + more, clips + some
        ids += [f"{label}/{i}" for i in range(len(some))]
        own += [f"{file.stem}/{i}" for i in range(len(some))]
        source += [name] * len(some)
    source, length = np.array(source), np.array([len(clip["qpos"]) for clip in clips])
    held = by_name(ids, source, val_episodes)
    for name in () if val_episodes else dict.fromkeys(source):
        chosen = np.flatnonzero(source == name)
        held[chosen] = by_hash([own[i] for i in chosen], val_share)

    def stack(key):
        rows = (np.asarray(clip[key], np.float32) for clip in clips)
        return np.stack([np.concatenate([x, np.repeat(x[-1:], length.max() - len(x), 0)]) for x in rows])

    arrays = {key: stack(key) for key in ("qpos", "qvel", "xpos")}
    return Clips(ids, source, **arrays, bodies=bodies, length=length, held_out=held, notes=notes)


def split_of(clips):
    """What a checkpoint keeps of the data: names and checksums of all clips, the names of those held out."""
    frames = zip(clips.qpos, clips.length, strict=True)
    checksums = [zlib.crc32(np.ascontiguousarray(qpos[:length]).tobytes()) for qpos, length in frames]
    held_out = [clips.ids[i] for i in np.flatnonzero(clips.held_out)]
    return dict(clips=clips.ids, checksums=checksums, held_out=held_out)


def restore_split(clips, split):
    """Hold out what a checkpoint lists, whatever was added or renamed since. Returns a line if clips changed."""
    pairs = list(zip(clips.ids, split_of(clips)["checksums"], strict=True))
    before = dict(zip(split["clips"], split.get("checksums", ()), strict=False))
    known = {checksum: name for name, checksum in before.items()}
    then = [name if before.get(name) == checksum else known.get(checksum, name) for name, checksum in pairs]
    clips.held_out = np.isin(then, split["held_out"])
    new, gone = len(set(then) - set(split["clips"])), len(set(split["clips"]) - set(then))
    other = sum(before.get(name, checksum) != checksum for name, checksum in pairs)
    text = f"the clips changed since the checkpoint: {new} new (trained on), {gone} gone, {other} with other frames"
    return text if other or clips.ids != split["clips"] else ""
