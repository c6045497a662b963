"""The kinds of video data that videos_to_shards.py reads, each as a list of entries that can be opened one by one.

entries(source, path) sees what a path holds: a LeRobotDataset, RLDS tfrecords, or videos and folders of pictures. It
opens no video, so that a plan of a million clips is made in minutes. opened(entry) gives the frames and what goes with
them. To read another kind of data, write two such functions.
"""

import io
import itertools
import json
import os
import re
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import pyarrow
import pyarrow.parquet
from shards import key_of

KINDS = ("delta", "absolute")
VIDEOS = {".mp4", ".avi", ".webm", ".mkv", ".gif", ".mov"}
PICTURES = {".png", ".jpg", ".jpeg"}
LANGUAGE = ("language_instruction", "observation/natural_language_instruction", "observation/instruction")
# what a damaged file may raise; anything else is a mistake in this script
DAMAGED = (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, ArithmeticError)
DAMAGED += (av.FFmpegError, pyarrow.ArrowException, zipfile.BadZipFile)


@dataclass
class Entry:
    """One camera of one episode as the plan lists it: where its frames are, and what is known without opening them."""

    source: str
    episode: str
    camera: str
    kind: str  # video, pictures (a folder), parquet or tfrecord: which function opens it
    path: str
    actions: str  # "delta" or "absolute", where there are any
    fps: float | None = None  # None: the video's own
    instruction: str = ""
    table: str | None = None  # LeRobot: the parquet with actions and state
    column: str | None = None  # the pictures' column in a parquet, or their key in a tfrecord
    span: list | None = None  # from and to, in seconds of the video, or bytes of the tfrecord; None: all of it
    more: dict = field(default_factory=dict)  # further fields of KEY.json

    @property
    def key(self):
        return key_of(self.source, self.episode, self.camera)


# --- what a path holds: one function per kind of source yields its entries


def entries(source, path, grouped=False):
    """The entries of a file or folder, whatever kind of source it is.

    grouped: videos side by side in a folder are the cameras of one episode, not episodes of their own.
    """
    root = Path(path).resolve()
    if not root.exists():
        raise ValueError(f"--data {source}={path}: no such file or folder")
    if (root / "meta/info.json").exists():
        try:
            return list(lerobot(source, root))
        except (KeyError, TypeError, AttributeError, ValueError, pyarrow.ArrowException) as error:
            why = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"--data {source}={path}: its meta is not a LeRobotDataset's v2 or v3: {why}") from None
    files = files_under(root)
    if any(file.parts[-2:] == ("meta", "info.json") for file in files):
        raise ValueError(f"--data {source}={path}: holds LeRobotDatasets: give each of them as NAME=PATH")
    root = root if root.is_dir() else root.parent
    tfrecords = [file for file in files if ".tfrecord" in file.name]
    return list(rlds(source, tfrecords) if tfrecords else videos(source, root, files, grouped))


def files_under(root):
    """All files below a folder, links followed once, hidden ones left out, in natural order."""
    found, seen = [root] if root.is_file() else [], set()
    for here, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        found += [] if real in seen else [Path(here, name) for name in files if not name.startswith(".")]
        seen.add(real)
    return sorted(found, key=natural)


def lerobot(source, root):
    """A LeRobotDataset v2.x (a parquet and, per camera, a video for each episode) or v3.x (many episodes in each)."""
    info = json.loads((root / "meta/info.json").read_text())
    version, features = str(info["codebase_version"]), info["features"]
    if version[:2] not in ("v2", "v3"):
        raise ValueError(f"codebase_version is {version}, expected v2.x or v3.x")
    cameras = [name for name, about in features.items() if about["dtype"] in ("video", "image")]
    for episode in lerobot_episodes(root, version):
        number, span = episode["episode_index"], None
        names = dict(episode_index=number, episode_chunk=number // info.get("chunks_size", 1000))
        table = str(root / info["data_path"].format(**names, **place(episode, "data")))
        for camera in cameras:
            about = dict(fps=float(info["fps"]), table=table, column=camera, actions="absolute")
            about |= dict(instruction=(episode.get("tasks") or [""])[0])
            if features[camera]["dtype"] == "video":
                kind, video = "video", f"videos/{camera}"
                path = root / info["video_path"].format(video_key=camera, **names, **place(episode, video))
                if version >= "v3":
                    span = [episode[f"{video}/from_timestamp"], episode[f"{video}/to_timestamp"]]
            else:
                kind, path = "parquet", table
            yield Entry(source, str(number), short(camera), kind, str(path), span=span, **about)


def lerobot_episodes(root, version):
    """What meta tells of each episode, in order."""
    if version < "v3":
        lines = (root / "meta/episodes.jsonl").read_text().splitlines()
        episodes = [json.loads(line) for line in lines if line.strip()]
    else:
        episodes = []
        for file in sorted((root / "meta/episodes").rglob("*.parquet")):
            names = [name for name in pyarrow.parquet.read_schema(file).names if not name.startswith("stats/")]
            episodes += pyarrow.parquet.read_table(file, columns=names, use_threads=False).to_pylist()
    return sorted(episodes, key=lambda episode: episode["episode_index"])


def place(episode, kind):
    """In which file a v3.x episode's data or video is."""
    parts = {part: episode.get(f"{kind}/{part}") for part in ("chunk_index", "file_index")}
    return {part: number for part, number in parts.items() if number is not None}


def short(camera):
    """observation.images.cam_high -> cam_high."""
    return re.sub(r"^observation\.(images\.)?", "", camera)


def rlds(source, files):
    """RLDS tfrecords as in Open X: a record is an episode, its cameras are those of its file's first whole record."""
    protobuf()
    root = Path(os.path.commonpath([file.parent for file in files]))
    for file in files:
        spans = list(records(file)) or [(0, 1)]  # an empty file counts as one broken record
        cameras = next((found for span in spans[:3] if (found := cameras_of(file, span))), [None])
        stem = re.sub(r"\.tfrecord|-of-[0-9]+", "", relative(file, root))
        for number, span in enumerate(spans):
            for camera in cameras:
                name = camera.removeprefix("steps/observation/") if camera else "unknown"
                about = dict(kind="tfrecord", path=str(file), column=camera, span=list(span), actions="delta")
                yield Entry(source, f"{stem}-{number}", name, **about)


def records(file):
    """[from, to) in bytes of each record's data in a tfrecord: length (8 bytes), its crc (4), data, data's crc (4)."""
    with open(file, "rb") as stream:
        while header := stream.read(12):
            first = stream.tell()
            last = first + int.from_bytes(header[:8], "little")
            yield first, last
            stream.seek(last + 4)


def videos(source, root, files, grouped):
    """Every video and every folder of pictures is a clip; in a grouped source a folder of them is an episode."""
    clips = [file for file in files if file.suffix.lower() in VIDEOS]
    folders = {file.parent for file in files if file.suffix.lower() in PICTURES} - {file.parent for file in clips}
    names = Counter(file.with_suffix("") for file in clips)
    for path in sorted([*clips, *folders], key=natural):
        kind = "pictures" if path in folders else "video"
        stem = path if kind == "pictures" or names[path.with_suffix("")] > 1 else path.with_suffix("")
        episode, camera = relative(stem, root), "video"
        if grouped:
            episode, _, camera = episode.rpartition("/")
        yield Entry(source, episode or root.name, camera or "video", kind, str(path), actions="delta")


def natural(path):
    """frame2 before frame10."""
    parts = re.split(r"([0-9]+)", str(path))
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], str(path)


def relative(path, root):
    """The path below `root` as text that can be written anywhere, even if its name is not UTF-8."""
    text = path.relative_to(root).as_posix()
    return "" if text == "." else plain(text)


def plain(text):
    return text.encode("utf-8", "backslashreplace").decode()


def beside(entry, ending):
    """The sidecar of a video or of a folder of pictures: a.mp4 -> a.txt."""
    path = Path(entry.path)
    return path.with_name((path.name if entry.kind == "pictures" else path.stem) + ending)


def look(entry):
    """An error if a file of the entry is not there or empty, without opening it."""
    for needed in filter(None, (entry.path, entry.table)):
        if not Path(needed).exists():
            raise ValueError(f"{needed}: no such file")
        if Path(needed).is_file() and Path(needed).stat().st_size == 0:
            raise ValueError(f"{needed}: an empty file")


def describe(entry):
    """Add what VIDEO.txt and VIDEO.json say. Only plain values of the latter: KEY.json is read by every script."""
    if entry.table or entry.kind == "tfrecord":
        return
    text, facts = beside(entry, ".txt"), beside(entry, ".json")
    if text.exists():
        entry.instruction = text.read_text(encoding="utf-8", errors="replace").strip()
    try:
        about = json.loads(facts.read_text()) if facts.exists() else {}
        about = {name: value for name, value in about.items() if isinstance(value, str | int | float)}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{facts}: expected a JSON table of names and values ({error})") from None
    for name in ("instruction", "episode", "camera", "actions"):
        setattr(entry, name, plain(str(about.pop(name, getattr(entry, name)))))
    entry.fps, entry.more = about.pop("fps", None), about
    if entry.actions not in KINDS:
        raise ValueError(f"{facts}: actions {entry.actions}, expected {' or '.join(KINDS)}")
    if entry.fps is not None and not (isinstance(entry.fps, int | float) and entry.fps > 0):
        raise ValueError(f"{facts}: fps {entry.fps}, expected a number above 0")


# --- opening an entry: one function per kind


@dataclass
class Opened:
    """What an entry holds. rows: actions and state, (T, A) each, as far as they are known."""

    frames: object  # iterator of av.VideoFrame, upright
    rows: dict
    length: int | None  # how many frames there should be, if anything tells
    fps: float
    instruction: str
    bare: bool = False  # the file is an h264 mp4 with just these frames: it can be copied
    more: dict = field(default_factory=dict)


def opened(entry):
    """Opened; raises one of DAMAGED, now or while the frames are read, if something is wrong with the files."""
    kinds = dict(video=open_video, parquet=open_parquet, pictures=open_pictures, tfrecord=open_tfrecord)
    return kinds[entry.kind](entry)


def open_video(entry):
    with av.open(entry.path) as video:
        if not video.streams.video:
            raise ValueError("no video stream in what there is of it")
        stream = video.streams.video[0]
        fps = entry.fps or float(stream.average_rate or stream.guessed_rate or 0)
        if not fps:
            raise ValueError(f"does not tell its frame rate: give --fps {entry.source}=X")
        first, last = entry.span or (0, np.inf)
        whole = first < 0.5 / fps and last > seconds(video, stream) - 0.5 / fps
        codec = stream.codec_context
        bare = whole and len(video.streams) == 1 and Path(entry.path).suffix.lower() == ".mp4"
        bare = bare and (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        bare = bare and not any(frame.rotation for frame in itertools.islice(video.decode(stream), 1))
    rows, length = lerobot_rows(entry) if entry.table else (sidecar_rows(entry), None)
    return Opened(video_frames(entry, fps), rows, length, fps, entry.instruction, bare)


def seconds(video, stream):
    """When a video should end by its header, in seconds; 0 if that does not say."""
    if stream.duration:
        return float((stream.duration + (stream.start_time or 0)) * stream.time_base)
    return (video.duration or 0) / av.time_base if len(video.streams) == 1 else 0.0


def video_frames(entry, fps):
    """The frames of a whole video, or those whose time is in the entry's span."""
    first, last = entry.span or (None, None)
    half, end = 0.5 / fps, None
    with av.open(entry.path) as video:
        stream = video.streams.video[0]
        stream.codec_context.thread_count = 1  # the processes already use the cores
        if first:
            video.seek(int(first / stream.time_base), stream=stream)  # to the keyframe before
        for frame in video.decode(stream):
            if entry.span and frame.time < first - half:
                continue
            if entry.span and frame.time >= last - half:
                return
            if frame.is_corrupt:
                raise ValueError(f"damaged at {frame.time or 0:.2f} s")
            if frame.pts is not None:
                end = float((frame.pts + (frame.duration or 0)) * frame.time_base)
            yield upright(frame)
        if end is not None and seconds(video, stream) - end > 5 * half and not entry.span:
            raise ValueError(f"truncated: its frames end at {end:.2f} s of {seconds(video, stream):.2f} s")


def upright(frame):
    """Phones store the picture as the sensor sees it, and how to turn it."""
    turns = round(frame.rotation / 90) % 4
    return av.VideoFrame.from_ndarray(np.rot90(frame.to_ndarray(format="rgb24"), turns).copy()) if turns else frame


def lerobot_rows(entry):
    """(actions and state of a LeRobot episode, how many rows it has)."""
    names = pyarrow.parquet.read_schema(entry.table).names
    columns = dict(actions="action", state="observation.state")
    columns = {name: column for name, column in columns.items() if column in names}
    table = parquet_rows(entry, ["frame_index", *columns.values()])
    if table["frame_index"].to_pylist() != list(range(len(table))):
        raise ValueError(f"{entry.table}: frame_index of episode {entry.episode} is not 0 to {len(table) - 1}")
    return {name: np.array(table[column].to_pylist(), np.float32) for name, column in columns.items()}, len(table)


def parquet_rows(entry, columns):
    episode = [("episode_index", "==", int(entry.episode))]
    return pyarrow.parquet.read_table(entry.table, columns=columns, filters=episode, use_threads=False)


def sidecar_rows(entry):
    """actions and state of VIDEO.npz, if there is one."""
    path = beside(entry, ".npz")
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: np.float32(arrays[name]) for name in ("actions", "state") if name in arrays}
    except (ValueError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected the arrays actions and state ({error})") from None


def open_parquet(entry):
    """Pictures inside a LeRobot parquet."""
    cells = parquet_rows(entry, [entry.column])[entry.column].to_pylist()
    return Opened(pictures([cell["bytes"] for cell in cells]), *lerobot_rows(entry), entry.fps, entry.instruction)


def open_pictures(entry):
    files = [file for file in Path(entry.path).iterdir() if file.suffix.lower() in PICTURES and file.name[0] != "."]
    frames = pictures(file.read_bytes() for file in sorted(files, key=natural))
    return Opened(frames, sidecar_rows(entry), len(files), entry.fps, entry.instruction)


def pictures(cells):
    """The frames in the bytes of PNGs or JPEGs."""
    for number, data in enumerate(cells):
        try:
            with av.open(io.BytesIO(data)) as image:
                frame = next(image.decode(video=0))
            # a JPEG that is cut off decodes too; its end marker cannot occur within the picture
            whole = data[:2] != b"\xff\xd8" or b"\xff\xd9" in data[-1024:]
        except (av.FFmpegError, StopIteration, IndexError, TypeError):
            whole = False
        if not whole:
            raise ValueError(f"picture {number} is not a whole PNG or JPEG")
        yield frame


def open_tfrecord(entry):
    example = example_of(entry.path, entry.span)
    cells = example.get(entry.column)
    if not cells:
        raise ValueError(f"its record has no {entry.column or 'pictures'}")
    actions, action_parts = numbers(example, "steps/action", len(cells))
    state, state_parts = numbers(example, "steps/observation/state", len(cells))
    rows = {name: table for name, table in (("actions", actions), ("state", state)) if table is not None}
    parts = dict(actions_parts=action_parts, state_parts=state_parts)
    more = {name: names for name, names in parts.items() if len(names) > 1}
    words = [example[f"steps/{key}"] for key in LANGUAGE if example.get(f"steps/{key}")]
    return Opened(pictures(cells), rows, len(cells), entry.fps, sentence(words[0]) if words else "", more=more)


def numbers(example, prefix, length):
    """A feature, or all below it side by side by name: ((length, A) or None, their names)."""
    tables = {}
    for key, values in sorted(example.items()):
        if (key == prefix or key.startswith(f"{prefix}/")) and values and not isinstance(values[0], bytes):
            if len(values) % length:
                raise ValueError(f"{key}: {len(values)} numbers for {length} frames")
            tables[key.removeprefix(f"{prefix}/")] = np.float32(values).reshape(length, -1)
    return np.concatenate(list(tables.values()), 1) if tables else None, list(tables)


def sentence(values):
    """The first text of a tfrecord's list; Language Table has its letters as numbers."""
    text = next(filter(None, values), b"") if isinstance(values[0], bytes) else bytes(values).partition(b"\0")[0]
    return text.decode("utf-8", "replace").strip()


def protobuf():
    """(the message tf.train.Example, the error of bytes that are none). Only RLDS needs this package."""
    try:
        from google.protobuf.message import DecodeError
        from tfrecord.example_pb2 import Example
    except ImportError:
        raise ValueError("RLDS tfrecords need one more package: pip install tfrecord") from None
    return Example, DecodeError


def example_of(path, span):
    """The record in bytes [from, to) of a tfrecord as {feature: list}."""
    Example, DecodeError = protobuf()
    with open(path, "rb") as file:
        file.seek(span[0])
        data = file.read(span[1] - span[0]) if span[1] <= os.path.getsize(path) else b""
    if len(data) < span[1] - span[0]:
        raise ValueError("truncated: its last record is not whole")
    try:
        features = Example.FromString(data).features.feature
    except DecodeError as error:
        raise ValueError(f"not a tfrecord of tf.train.Example ({error})") from None
    kinds = {key: feature.WhichOneof("kind") for key, feature in features.items()}
    return {key: list(getattr(features[key], kind).value) for key, kind in kinds.items() if kind}


def cameras_of(path, span):
    """The features of a record that hold pictures of 8 bits (depth has 16)."""
    try:
        example = example_of(path, span)
    except (OSError, ValueError):
        return []  # it will be opened once more, and then counted as broken
    found = []
    for key, values in sorted(example.items()):
        head = values[0][:25] if values and isinstance(values[0], bytes) else b""
        png = head.startswith(b"\x89PNG") and head[24:] == b"\x08"
        if key.startswith("steps/observation/") and (png or head.startswith(b"\xff\xd8\xff")):
            found.append(key)
    return found
