"""One recorded episode in memory, and the checks that every reader shares."""

import fnmatch
import hashlib
import io
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common import DataError


class MissingFile(DataError):
    """The description lists an episode of which a file is not there: a partial copy."""


@dataclass
class Episode:
    """actions (T, A) and each of vectors (T, D) float32, timestamps (T,) float64 in seconds, frames {key: sequence}.

    A sequence of frames has a length and gives frame i as (H, W, 3) uint8. tasks: one text, or one per step.
    """

    source: str
    id: str
    actions: np.ndarray
    timestamps: np.ndarray
    vectors: dict
    frames: dict
    tasks: list
    fingerprint: dict = field(default_factory=dict)  # camera -> what tells its content apart without decoding it
    notes: list = field(default_factory=list)  # what the reader left out or repaired; said once per data set

    def __len__(self):
        return len(self.actions)

    @property
    def name(self):
        return f"{self.source}, episode {self.id}"

    @property
    def key(self):
        return f"{self.source}/{self.id}"

    def task_at(self, step):
        return self.tasks[step if len(self.tasks) > 1 else 0]

    def state(self, spec):
        """(T, S): the proprio keys of the spec side by side."""
        if not spec.required_proprio_keys:
            raise DataError(f"{self.name}: Pi05 reads a state: name vectors in the spec's required_proprio_keys")
        return np.concatenate([self.vectors[key] for key in spec.required_proprio_keys], axis=1)

    def check_lengths(self):
        """Raise where something has another number of rows than the actions."""
        for name, array in [("timestamps", self.timestamps), *self.vectors.items(), *self.frames.items()]:
            if len(array) != len(self):
                raise DataError(f"{self.name}: {len(array)} rows of {name}, but {len(self)} actions")

    def digest(self):
        """Hash of all numbers and texts; of a camera its fingerprint. It does not depend on names of files or sets."""
        digest = hashlib.sha256(f"{self.tasks}\0{sorted(self.fingerprint.items())}".encode())
        for name, array in [("actions", self.actions), ("timestamps", self.timestamps), *sorted(self.vectors.items())]:
            digest.update(f"{name}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


@dataclass
class EpisodeRef:
    """An episode on disk. read(keys) returns the Episode; keys None reads every observation."""

    source: str
    id: str
    read: object
    action_names: list | None = None
    proprio_names: dict = field(default_factory=dict)  # key of a vector -> names of its dims

    def load(self, spec):
        state = [dim for key in spec.required_proprio_keys for dim in self.proprio_names.get(key, [])] if spec else []
        both = [(self.action_names, spec.action_names), (state, spec.proprio_names)] if spec else []
        for here, there in both:
            if here and there and here != there and sorted(here) == sorted(there):
                raise DataError(f"{self.source}: dims in the order {', '.join(here)}, the spec has {', '.join(there)}")
        return self.read(None if spec is None else {*spec.required_obs_keys, *spec.required_proprio_keys})


def visible(files):
    """Sorted paths without those whose name begins with a dot: a Mac leaves ._NAME beside NAME."""
    return sorted(file for file in files if not file.name.startswith("."))


def check_file(file):
    """Raise for a file that is empty, a Git LFS pointer or a link to nothing; a whole file passes."""
    try:
        with open(file, "rb") as opened:
            head = opened.read(40)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{file}: a Git LFS pointer, not the file; fetch it with `git lfs pull`")
    if not head:
        raise DataError(f"{file}: an empty file; copy it again")


def decode_image(data, where):
    """The bytes of a PNG or JPEG file -> (H, W, 3) uint8."""
    from PIL import Image, ImageOps

    try:
        image = Image.open(io.BytesIO(bytes(data)))
        if image.mode[0] in "IF":
            raise DataError(f"{where}: a picture of mode {image.mode} (depth?), expected colours or grey")
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, TypeError, ValueError) as error:
        raise DataError(f"{where}: an image cannot be decoded ({short(error)})") from None


def as_rows(array, name, dtype=np.float32):
    """A vector per step: (T,) or (T, D) numbers -> (T, D) float32."""
    array = np.asarray(array)
    if array.ndim not in (1, 2) or array.dtype.kind not in "fiub":
        raise DataError(f"`{name}` has shape {array.shape} and type {array.dtype}, expected numbers (T, D)")
    return (array[:, None] if array.ndim == 1 else array).astype(dtype)


def as_tasks(array, steps, name="task"):
    """A text, bytes, or an array of 1 or `steps` of them -> a list of 1 or `steps` texts."""
    array = np.asarray(array)
    if array.dtype.kind not in "US" or array.ndim > 1 or array.size not in (1, steps):
        shape = f"shape {array.shape} and type {array.dtype}"
        raise DataError(f"`{name}` has {shape}, expected one text, or one for each of the {steps} steps")
    try:
        texts = [text.decode() if isinstance(text, bytes) else str(text) for text in array.reshape(-1)]
    except UnicodeDecodeError:
        raise DataError(f"`{name}` holds bytes that are no UTF-8 text") from None
    texts = [text.replace("\ufeff", "").strip() for text in texts]
    return texts[:1] if len(set(texts)) == 1 else texts


def as_images(array, name):
    """Images (T, H, W, C) or (T, C, H, W), uint8 or float in [0, 1], C 3 or 4 -> (T, H, W, 3) uint8. None: depth."""
    if array.ndim != 4 or 1 in (array.shape[1], array.shape[-1]):
        return None
    if array.shape[-1] not in (3, 4) and array.shape[1] in (3, 4):
        array = np.moveaxis(array, 1, -1)
    if array.shape[-1] not in (3, 4):
        raise DataError(f"`{name}` has shape {array.shape}, expected images (T, H, W, 3) or (T, 3, H, W)")
    array = array[..., :3]
    if array.dtype != np.uint8:
        if array.dtype.kind != "f" or array.size == 0 or not 0 <= array.min() <= array.max() <= 1:
            raise DataError(f"`{name}` holds {array.dtype} images, expected uint8, or floats in [0, 1]")
        array = np.round(array * 255).astype(np.uint8)
    return array


def control_rate(timestamps, where):
    """Steps per second of rising timestamps in seconds; anything else is an error that names them."""
    gaps = np.diff(timestamps)
    if len(gaps) == 0:
        raise DataError(f"{where}: one step only, so that its timestamps tell no control rate")
    middle = float(np.median(gaps))
    if not np.isfinite(middle) or middle <= 0:
        raise DataError(f"{where}: timestamps do not rise from step to step (are they float32 seconds of the epoch?)")
    if not 0.99 <= 1 / middle <= 2000:
        raise DataError(f"{where}: timestamps tell {1 / middle:.3g} steps per second: are they in seconds?")
    return 1 / middle


def trim(episode, arrays):
    """Cut observations that have one row more than there are actions (the one after the last action)."""
    for key, array in arrays.items():
        if len(array) == len(episode) + 1:
            arrays[key] = array[:-1]
            episode.notes.append(f"{key} has one row more than there are actions; the last one is left out")


def short(error):
    """The first line of a library's message, at most 150 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:150] or type(error).__name__


def known_paths(folder, pattern):
    """Visible files below `folder` whose name fits the pattern; links to folders are followed."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place) / name for name in names if fnmatch.fnmatch(name.lower(), pattern)]
    return visible(found)
