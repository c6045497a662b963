"""The npz layout: DATA/episodes/*.npz or DATA/*.npz.

A file holds `actions` (T, A), `timestamps` (T,) in seconds, `obs.KEY` with first dimension T (vectors, or images
(T, H, W, 3) uint8), and `task` (or `instruction`): one text, or one per step.
"""

import functools
import zipfile

import numpy as np

from common import DataError

from .episode import Episode, EpisodeRef, as_rows, as_tasks, check_file, short, trim


class ArrayFrames:
    """Images (T, H, W, 3) of an npz: mapped from the file if stored, kept in memory if compressed."""

    def __init__(self, path, name, count):
        self.path, self.name, self.count = path, name, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        """Frame i; of a slice such as [:-1] the first frames, unread."""
        if isinstance(i, slice):
            return ArrayFrames(self.path, self.name, len(range(self.count)[i]))
        return np.asarray(npz_array(self.path, self.name)[i])


@functools.lru_cache(maxsize=512)
def npz_map(path, name):
    """(offset, shape, dtype) of a stored array inside the file, or None for a compressed one."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            return None
        with archive.open(info) as member:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(member)
            header = member.tell()
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        skip = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
    return None if fortran or dtype.hasobject else (info.header_offset + 30 + skip + header, shape, dtype)


@functools.lru_cache(maxsize=8)
def npz_loaded(path, name):
    with np.load(path, allow_pickle=False) as arrays:
        return arrays[name]


def npz_array(path, name):
    """One array of an npz; a stored (not compressed) one is mapped, so that a frame is read alone."""
    place = npz_map(path, name)
    return npz_loaded(path, name) if place is None else np.memmap(path, place[2], "r", place[0], place[1])


def list_npz(source, files):
    return [EpisodeRef(source, file.stem, functools.partial(read_npz, source, file)) for file in files]


def read_npz(source, file, keys):
    """The Episode of one file. keys: the observations to read; None reads all."""
    check_file(file)
    vectors, frames, fingerprint, left_out = {}, {}, {}, []
    try:
        with np.load(file, allow_pickle=False) as arrays, zipfile.ZipFile(file) as archive:
            there = [name.removeprefix("obs.") for name in arrays if name.startswith("obs.")]
            for name in ["actions", "timestamps", *(f"obs.{key}" for key in sorted(keys or ()))]:
                if name not in arrays:
                    raise DataError(f"has no array `{name}`, only {', '.join(arrays)}")
            actions = as_rows(arrays["actions"], "actions")
            timestamps = as_rows(arrays["timestamps"], "timestamps", np.float64).reshape(-1)
            for key in there if keys is None else sorted(keys):
                info, array = archive.getinfo(f"obs.{key}.npy"), npz_array(str(file), f"obs.{key}")
                if array.ndim == 4:
                    if array.shape[3] != 3 or array.dtype != np.uint8:
                        if keys is None and 3 not in (array.shape[1], array.shape[3]):
                            left_out.append(f"{key} {array.shape[1:]} is no colour camera (depth?) and is left out")
                            continue
                        raise DataError(f"`obs.{key}` is {array.dtype} {array.shape}, expected uint8 (T, H, W, 3)")
                    frames[key] = ArrayFrames(str(file), f"obs.{key}", len(array))
                    fingerprint[key] = (info.CRC, info.file_size)
                elif array.ndim in (1, 2) or keys is not None:
                    vectors[key] = as_rows(array, f"obs.{key}")
                else:
                    left_out.append(f"{key} {array.shape[1:]} is no colour camera and no vector, and is left out")
            named = next((name for name in ("task", "instruction") if name in arrays), None)
            tasks = as_tasks(arrays[named], len(actions), named) if named else [""]
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    except Exception as error:  # numpy and zipfile raise a dozen kinds for a broken file
        pickled = "allow_pickle" in str(error)
        reason = "holds pickled objects, which can run code; save plain arrays" if pickled else short(error)
        raise DataError(f"{file}: {reason}") from None
    episode = Episode(source, file.stem, actions, timestamps, vectors, frames, tasks, fingerprint)
    episode.notes += left_out
    trim(episode, vectors)
    trim(episode, frames)
    return episode
