"""What the readers share: an entry of the plan, a recording that is open, and how files are found and read."""

import json
import os
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import pyarrow
from shards import key_of

from common import DataError

KINDS = ("delta", "absolute")
# what a damaged file may raise; anything else is a bug
DAMAGED = (DataError, OSError, ValueError, KeyError, IndexError, TypeError, EOFError, ArithmeticError)
DAMAGED += (av.FFmpegError, pyarrow.ArrowException, zipfile.BadZipFile)


@dataclass
class Entry:
    """One recording as the plan lists it: where its frames are, and what is known without opening them."""

    source: str
    episode: str
    kind: str  # lerobot, pictures, tfrecord or video: which module opens it
    path: str
    actions: str  # "delta" or "absolute", where there are any
    camera: str = ""  # of a tfrecord: empty, all of its cameras
    fps: float | None = None  # None: the video's own
    instruction: str = ""
    table: str | None = None  # LeRobot: the parquet with actions and state
    column: str | None = None  # LeRobot: the pictures' column in that parquet; pictures: their series in the folder
    start: float | None = None  # LeRobot v3: where the episode begins in the video, in seconds
    length: int | None = None  # how many rows it should have, if the meta data tells
    tasks: dict | None = None  # LeRobot: task_index -> text, where the table must tell the task
    more: dict = field(default_factory=dict)  # further fields of KEY.json

    @property
    def key(self):
        return key_of(self.source, self.episode, self.camera)


@dataclass
class Recording:
    """What an entry holds, opened."""

    frames: object  # iterator of av.VideoFrame or arrays (H W 3) uint8 RGB, at constant rate, as many as rows
    fps: float
    instruction: str | list  # a list: one text per row
    rows: dict  # actions and state, (T A) each, as far as they are known
    length: int | None = None  # how many frames there are, if that is known beforehand
    camera: str = ""
    copy: bool = False  # the file is an h264 mp4 of just these frames, which readers can seek in
    more: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)  # what the user should know, said once per source


# --- files


def files_under(root):
    """All files below a folder, links followed once, hidden ones (and macOS's ._NAME) left out, in natural order."""
    found, seen = [root] if root.is_file() else [], set()
    for here, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        found += [] if real in seen else [Path(here, name) for name in files if not name.startswith(".")]
        seen.add(real)
    return sorted(found, key=natural)


def natural(path):
    """frame2 before frame10."""
    parts = re.split(r"([0-9]+)", str(path))
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], str(path)


def relative(path, root):
    """The path below `root` as text that can be written anywhere, even if its name is not UTF-8."""
    text = path.relative_to(root).as_posix()
    return "" if text == "." else plain(text)


def short(camera):
    """observation.images.cam_high -> cam_high."""
    return re.sub(r"^observation\.(images\.)?", "", camera)


def plain(text):
    return text.encode("utf-8", "backslashreplace").decode()


def check_file(path):
    """DataError if a file is not there, empty, or a Git LFS pointer."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file")
    size = path.stat().st_size if path.is_file() else None
    if size == 0:
        raise DataError(f"{path}: an empty file")
    if size and size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
        raise DataError(f"{path}: a Git LFS pointer, not the file itself: git lfs pull")


def read_text(path):
    """A text file in UTF-8, with or without a byte order mark, UTF-16 with one, or else Windows' Latin-1."""
    data = Path(path).read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") and b"\0\0" not in data:
        return data.decode("utf-16", "replace")
    if b"\0" in data:
        raise DataError(f"{path}: holds zero bytes: save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def read_json(path):
    """The table in a JSON file; DataError names the file if it is broken or holds something else."""
    check_file(path)
    try:
        found = json.loads(read_text(path))
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds a {type(found).__name__}, expected a JSON table")
    return found


def common_part(frames, tables, notes):
    """How many frames and rows go together. One more of either at the end is usual, more is an error."""
    for name, table in tables.items():
        if table.ndim == 0 or abs(len(table) - frames) > 1:
            raise DataError(f"{frames} frames, but {name} of shape {table.shape}: they disagree")
    length = min([frames, *map(len, tables.values())])
    if any(len(table) != frames for table in tables.values()):
        notes.append("one row more than frames, or one frame more than rows: the common part is kept")
    return length


def as_rows(name, values):
    """Numbers as (T A) float32, finite."""
    try:
        table = np.asarray(values)
        if table.dtype.kind not in "biuf":
            raise ValueError(f"{table.dtype} values")
    except ValueError as error:
        raise DataError(f"{name}: not rows of numbers ({str(error).partition('.')[0]})") from None
    table = table.astype(np.float32)
    table = table.reshape(len(table), -1) if table.ndim else table
    if not np.isfinite(table).all():
        raise DataError(f"{name} of row {np.argwhere(~np.isfinite(table))[0, 0]} holds NaN or infinity")
    return table
