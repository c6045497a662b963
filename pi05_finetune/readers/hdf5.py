"""HDF5 of robosuite and robomimic (`data/demo_*`) and of ALOHA (`action`, `observations`, one file per episode)."""

import contextlib
import functools
import json
import math
from pathlib import Path

import h5py
import numpy as np

from common import DataError

from .episode import Episode, EpisodeRef, as_images, as_rows, check_file, decode_image, short, trim


def list_hdf5(source, files, rate):
    """The episodes of HDF5 files. rate: steps per second, or None to take the file's own."""
    episodes = []
    for file in files:
        with opened(file) as h5:
            stored = control_freq(h5)
            if (own := rate or stored) is None:
                raise DataError(f"{file}: does not say its control rate: give --rate (robosuite 20, ALOHA 50)")
            if stored and abs(own / stored - 1) > 0.1:
                raise DataError(f"--rate {rate:g}: {file} says {stored:g} steps a second")
            if "data" in h5 and isinstance(h5["data"], h5py.Group):
                names = sorted(h5["data"], key=lambda name: int("0" + "".join(filter(str.isdigit, name))))
                stem = f"{file.stem}_" if len(files) > 1 else ""
                places = {f"{stem}{name}": f"data/{name}" for name in names}
            elif "action" in h5 and "observations" in h5:
                places = {file.stem: "/"}
            else:
                expected = "`data` (robosuite, robomimic), or `action` and `observations` (ALOHA)"
                raise DataError(f"{file}: holds {', '.join(sorted(h5)) or 'nothing'}; expected {expected}")
        for identity, path in places.items():
            read = functools.partial(read_demo, source, file, path, own, identity)
            episodes.append(EpisodeRef(source, identity, read))
    return episodes


@contextlib.contextmanager
def opened(file):
    check_file(file)
    try:
        with h5py.File(file) as h5:
            yield h5
    except BlockingIOError:
        raise DataError(f"{file}: another process has it open for writing: close it there first") from None
    except (OSError, RuntimeError) as error:
        raise DataError(f"{file}: not a whole HDF5 file ({short(error)})") from None


def control_freq(h5):
    """Steps per second as robomimic writes them (`env_args`), or None."""
    try:
        rate = float(json.loads(h5["data"].attrs["env_args"])["env_kwargs"]["control_freq"])
        return rate if 0 < rate < math.inf else None
    except (KeyError, TypeError, ValueError, OSError):
        return None


def check_written(dataset, file):
    """Raise where HDF5 would give zeros for what was never written or is not there."""
    if dataset.is_virtual:
        for part in dataset.virtual_sources():
            name = Path(file).parent / part.file_name
            if part.file_name != "." and not name.exists():
                raise DataError(f"`{dataset.name}` is a view of {name}, which is not there")
    elif dataset.chunks and dataset.size:
        total = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
        stored = dataset.id.get_num_chunks()
        if stored < total:
            raise DataError(f"`{dataset.name}`: {total - stored} of {total} chunks were never written")
    elif dataset.size and dataset.id.get_storage_size() == 0:
        raise DataError(f"`{dataset.name}` was never written")


def numbers(dataset, file):
    check_written(dataset, file)
    try:
        return dataset[:]
    except OSError as error:
        cure = "; pip install hdf5plugin for its filter" if "filter" in str(error) else ""
        raise DataError(f"`{dataset.name}` cannot be read ({short(error)}{cure})") from None


def read_demo(source, file, path, rate, identity, keys):
    """One demonstration: actions, what has a row per step, and the images of `obs` or `observations`."""
    try:
        with opened(file) as h5:
            demo, arrays = h5[path], {}
            if not isinstance(demo, h5py.Group):
                raise DataError("is an array, expected a group with `actions`")
            name = "actions" if "actions" in demo else "action"
            if name not in demo:
                raise DataError(f"has no `actions`, only {', '.join(sorted(demo))}")
            actions = as_rows(numbers(demo[name], file), name)
            episode = Episode(source, identity, actions, np.arange(len(actions)) / rate, {}, {}, [""])
            for group in (demo, demo.get("obs"), demo.get("observations")):
                arrays |= dict(group or {})
            if isinstance(arrays.get("images"), h5py.Group):
                arrays |= {f"images.{key}": item for key, item in arrays.pop("images").items()}
            for key, item in arrays.items():
                if key == name or not isinstance(item, h5py.Dataset) or (keys is not None and key not in keys):
                    continue
                jpeg = key.startswith("images.") and item.ndim in (1, 2)  # as ALOHA keeps them: T rows of bytes
                if jpeg or item.ndim >= 3:
                    images = numbers(item, file)
                    images = np.stack([decode_image(x, key) for x in images]) if jpeg else as_images(images, key)
                    if images is None:
                        episode.notes.append(f"{key} {item.shape} is no colour camera (depth?) and is left out")
                    else:
                        episode.frames[key] = images
                elif item.ndim in (1, 2) and abs(len(item) - len(actions)) <= 1 and item.dtype.kind in "fiub":
                    episode.vectors[key] = as_rows(numbers(item, file), key)
    except DataError as error:
        raise DataError(f"{file}, {path}: {error}".replace(f"{file}, {path}: {file}", str(file))) from None
    except (KeyError, ValueError) as error:
        raise DataError(f"{file}, {path}: {short(error)}") from None
    trim(episode, episode.vectors)
    trim(episode, episode.frames)
    return episode
