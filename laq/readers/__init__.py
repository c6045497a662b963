"""Kinds of recordings that videos_to_shards.py reads: LeRobotDatasets, RLDS tfrecords, videos and folders of pictures.

entries(source, path) lists what a path holds without opening a video, so that a plan of a million clips is made in
minutes. opened(entry) yields the recordings of an entry. To read another kind of data, write two such functions.
"""

from pathlib import Path

from common import DataError
from readers import lerobot, rlds, video
from readers.recording import files_under


def entries(source, path, grouped=False):
    """(entries, notes) of a file or folder, whatever it holds.

    grouped: videos side by side in a folder are the cameras of one episode, not episodes of their own.
    """
    root = Path(path).resolve() if Path(path).is_dir() else Path(path).absolute()  # a link may bear the ending
    if not root.exists():
        raise DataError(f"--data {source}={path}: no such file or folder")
    if (root / "meta/info.json").exists():
        return lerobot.entries(source, root)
    files = files_under(root)
    if any(file.parts[-2:] == ("meta", "info.json") for file in files):
        raise DataError(f"--data {source}={path}: holds LeRobotDatasets: give each of them as NAME=PATH")
    root = root if root.is_dir() else root.parent
    tfrecords = [file for file in files if ".tfrecord" in file.name]
    return rlds.entries(source, tfrecords) if tfrecords else video.entries(source, root, files, grouped)


def describe(entry):
    """Add what small files beside the recording say; raises one of DAMAGED if they are broken."""
    if entry.kind in ("video", "pictures"):
        video.describe(entry)


def opened(entry):
    """Yields the Recordings of an entry; raises one of DAMAGED, at once or while frames are read, if it is broken."""
    modules = dict(lerobot=lerobot, tfrecord=rlds, video=video, pictures=video)
    return modules[entry.kind].opened(entry)
