"""Recorded episodes on disk: the npz layout, LeRobotDataset v2.1 and v3.0; which are for training, which held out.

npz layout: DATA/episodes/*.npz (or DATA/*.npz) with `actions` (T, A), `timestamps` (T,) in seconds, `obs.KEY` with
first dimension T (vectors, or images (T, H, W, 3) uint8), and `task`, a text. LeRobot's `observation.KEY` is
`obs.KEY` here, so the same spec fits both.
"""

import functools
import hashlib
import io
import json
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import pyarrow
import pyarrow.parquet
from spec import DatasetSpec, load_spec

# --- one episode


class MissingFile(ValueError):
    """An episode of a partial copy: the description knows it, a file of it is not there."""


@dataclass
class Episode:
    """actions (T, A) and each of vectors (T, D) float32, timestamps (T,) float64 in seconds, frames {key: Frames}."""

    source: str
    id: str
    actions: np.ndarray
    timestamps: np.ndarray
    vectors: dict
    frames: dict
    task: str
    marks: dict = field(default_factory=dict)  # camera -> what tells its content apart, without decoding it

    def __len__(self):
        return len(self.actions)

    def state(self, spec):
        """(T, S): the proprio keys of the spec side by side."""
        return np.concatenate([self.vectors[key] for key in spec.required_proprio_keys], axis=1)

    def digest(self):
        """Hash of all numbers and the text; of a camera its checksum or size."""
        digest = hashlib.sha256(f"{self.id}\0{self.task}\0{sorted(self.marks.items())}".encode())
        for name, array in [("actions", self.actions), ("timestamps", self.timestamps), *sorted(self.vectors.items())]:
            digest.update(f"{name}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


class ArrayFrames:
    """Images (T, H, W, 3) of an npz: mapped from the file if stored, kept in memory if compressed."""

    def __init__(self, path, name, shape):
        self.path, self.name, self.shape = path, name, shape

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, i):
        return np.asarray(npz_array(self.path, self.name)[i])


class ImageFrames:
    """Images that LeRobot keeps inside its parquet file."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        from PIL import Image

        return np.asarray(Image.open(io.BytesIO(self.images[i])).convert("RGB"))


class VideoFrames:
    """`count` frames of an mp4 from the time `start` on, `fps` a second, by seeking; the file stays open."""

    def __init__(self, path, start, fps, count):
        self.path, self.start, self.fps, self.count = path, start, fps, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return open_video(str(self.path), os.getpid()).at(self.start + i / self.fps, 0.5 / self.fps)


class Video:
    """An open mp4 that gives the frame of a time; goes on decoding where the next frame is near."""

    def __init__(self, path):
        try:
            self.path, self.container = path, av.open(path)
            self.stream = self.container.streams.video[0]
        except (av.FFmpegError, IndexError) as error:
            raise ValueError(f"{path}: not a video ({error})") from None
        self.stream.thread_type = "NONE"  # threads of a forked loader process would never come back
        self.decoder, self.time = None, 0.0

    def at(self, time, slack):
        """Frame (H, W, 3) uint8 whose time is within `slack` seconds."""
        if self.decoder is None or not self.time < time < self.time + 16 * slack:
            self.container.seek(int((time - slack) / self.stream.time_base), stream=self.stream)
            self.decoder = self.container.decode(self.stream)
        try:
            for frame in self.decoder:
                self.time = float(frame.pts * self.stream.time_base)
                if self.time >= time - slack:
                    if self.time > time + slack:
                        break
                    return frame.to_ndarray(format="rgb24")
        except av.FFmpegError as error:
            raise ValueError(f"{self.path}: cannot be decoded at {time:.3f} s ({error})") from None
        finally:
            self.decoder = self.decoder if self.time <= time + slack else None
        raise ValueError(f"{self.path}: has no frame at {time:.3f} s")


@functools.lru_cache(maxsize=16)
def open_video(path, process):
    """An open Video; one per process, as a forked one would share the file's position."""
    return Video(path)


@functools.lru_cache(maxsize=32)
def npz_array(path, name):
    """One array of an npz; a stored (not compressed) one is mapped, so that a frame is read alone."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
        if info.compress_type == zipfile.ZIP_STORED:
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(member)
                header = member.tell()
            with open(path, "rb") as file:
                file.seek(info.header_offset + 26)
                skip = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
            offset = info.header_offset + 30 + skip + header
            if not fortran and not dtype.hasobject:
                return np.memmap(path, dtype, "r", offset, shape)
    with np.load(path, allow_pickle=False) as arrays:
        return arrays[name]


def rows(array, what):
    """A vector per step: (T,) or (T, D) numbers -> (T, D) float32."""
    array = np.asarray(array)
    if array.ndim not in (1, 2) or array.dtype.kind not in "fiub":
        raise ValueError(f"`{what}` has shape {array.shape} and type {array.dtype}, expected numbers (T, D)")
    return (array[:, None] if array.ndim == 1 else array).astype(np.float32)


# --- readers


@dataclass
class Stored:
    """An episode on disk. load(spec) reads it; None in place of a spec reads every observation."""

    source: str
    id: str
    read: object
    action_names: list | None = None

    def load(self, spec):
        wanted = None if spec is None else {*spec.required_obs_keys, *spec.required_proprio_keys}
        return self.read(self, wanted)


def list_episodes(source, root):
    """All episodes of a folder as Stored, in order; nothing of them is read yet, except the descriptions."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"--data {root}: no such folder")
    if (root / "meta" / "info.json").exists():
        return list_lerobot(source, root)
    files = sorted((root / "episodes").glob("*.npz")) or sorted(root.glob("*.npz"))
    if not files:
        raise ValueError(f"--data {root}: no episodes (expected episodes/*.npz, or meta/info.json of a LeRobotDataset)")
    return [Stored(source, file.stem, functools.partial(read_npz, file)) for file in files]


def read_npz(file, stored, wanted):
    vectors, frames, marks = {}, {}, {}
    try:
        with np.load(file, allow_pickle=False) as arrays, zipfile.ZipFile(file) as archive:
            for name in ("actions", "timestamps"):
                if name not in arrays:
                    raise ValueError(f"has no array `{name}`, only {', '.join(arrays)}")
            keys = [name.removeprefix("obs.") for name in arrays if name.startswith("obs.")]
            for key in keys if wanted is None else sorted(wanted):
                if key not in keys:
                    raise ValueError(f"has no array `obs.{key}`, only {', '.join(arrays)}")
                array, info = npz_array(str(file), f"obs.{key}"), archive.getinfo(f"obs.{key}.npy")
                if array.ndim == 4:
                    if array.shape[3] != 3 or array.dtype != np.uint8:
                        raise ValueError(f"`obs.{key}` is {array.dtype} {array.shape}, expected uint8 (T, H, W, 3)")
                    frames[key] = ArrayFrames(str(file), f"obs.{key}", array.shape)
                    marks[key] = (info.CRC, info.file_size)
                else:
                    vectors[key] = rows(array, f"obs.{key}")
            task = next((str(arrays[name]) for name in ("task", "instruction") if name in arrays), "")
            actions = rows(arrays["actions"], "actions")
            timestamps = np.asarray(arrays["timestamps"], np.float64).reshape(-1)
    except Exception as error:  # numpy and zipfile raise a dozen kinds for a broken file
        raise ValueError(f"{file}: {str(error) or type(error).__name__}") from None
    return Episode(stored.source, stored.id, actions, timestamps, vectors, frames, task, marks)


@functools.lru_cache(maxsize=4)
def read_table(file):
    try:
        return pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a whole parquet file ({str(error).splitlines()[0][:150]})") from None


def read_jsonl(file):
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()] if file.exists() else []


class LeRobot:
    """The description of a LeRobotDataset, v2.1 or v3.0: where its files are, its rate, tasks and features."""

    def __init__(self, root):
        self.root, path = root, root / "meta" / "info.json"
        try:
            self.info = json.loads(path.read_text())
            self.fps, self.features = float(self.info["fps"]), self.info["features"]
            self.new = self.info["codebase_version"].startswith("v3")
            self.videos = [key for key, about in self.features.items() if about["dtype"] == "video"]
            self.names = flat(self.features["action"].get("names"), self.features["action"]["shape"][0])
            if self.new:
                table = read_table(root / "meta" / "tasks.parquet").to_pydict()
                text = "__index_level_0__" if "__index_level_0__" in table else "task"
                self.tasks = dict(zip(table["task_index"], table[text], strict=True))
                files = sorted((root / "meta" / "episodes").glob("**/*.parquet"))
                tables = [read_table(file) for file in files]
                columns = [name for name in tables[0].column_names if not name.startswith("stats/")]
                self.rows = [row for table in tables for row in table.select(columns).to_pylist()]
            else:
                self.tasks = {row["task_index"]: row["task"] for row in read_jsonl(root / "meta" / "tasks.jsonl")}
                known = {row["episode_index"] for row in read_jsonl(root / "meta" / "episodes.jsonl")}
                found = {int(file.stem[8:]) for file in (root / "data").glob("**/episode_*.parquet")}
                self.rows = [dict(episode_index=index) for index in sorted(known | found)]
        except (KeyError, IndexError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path}: not the description of a LeRobotDataset ({type(error).__name__} {error})"
            ) from None

    def place(self, row, key=None):
        """The data file of an episode, or the video of one of its cameras."""
        index, template = row["episode_index"], self.info["video_path" if key else "data_path"]
        kind = f"videos/{key}" if key else "data"
        values = dict(video_key=key, episode_index=index, episode_chunk=index // self.info.get("chunks_size", 1000))
        if self.new:
            values |= dict(chunk_index=row[f"{kind}/chunk_index"], file_index=row[f"{kind}/file_index"])
        path = self.root / template.format(**values)
        if not path.exists() or path.stat().st_size < 200:  # a Git LFS pointer is shorter
            raise MissingFile(f"{path}: not there (a partial copy?)")
        return path


def flat(names, count):
    """The names of a feature's dims, however LeRobot nests them; None if they are not `count` texts."""
    while isinstance(names, dict) or (isinstance(names, list) and len(names) == 1 and isinstance(names[0], list)):
        names = list(names.values())[0] if isinstance(names, dict) and names else names[0] if names else None
    return names if isinstance(names, list) and len(names) == count else None


def list_lerobot(source, root):
    about = LeRobot(root)
    if not about.rows:
        raise ValueError(f"--data {root}: the description lists no episodes")
    reads = [(str(row["episode_index"]), functools.partial(read_lerobot, about, row)) for row in about.rows]
    return [Stored(source, identity, read, about.names) for identity, read in reads]


def read_lerobot(about, row, stored, wanted):
    file, index = about.place(row), row["episode_index"]
    table = read_table(file)
    try:
        table = table.filter(pyarrow.compute.equal(table["episode_index"], index))
        table = table.sort_by("frame_index") if "frame_index" in table.column_names else table
        if not len(table):
            raise MissingFile(f"{file}: holds no row of episode {index}")
        vectors, frames, marks = {}, {}, {}
        keys = [name.removeprefix("observation.") for name in about.features if name.startswith("observation.")]
        for key in keys if wanted is None else sorted(wanted):
            name = f"observation.{key}"
            if key not in keys:
                raise ValueError(f"has no `{name}`, only {', '.join(sorted(about.features))}")
            if name in about.videos:
                video = about.place(row, name)
                start = float(row[f"videos/{name}/from_timestamp"]) if about.new else 0.0
                frames[key] = VideoFrames(video, start, about.fps, len(table))
                marks[key] = (video.stat().st_size, start)
            elif about.features[name]["dtype"] == "image":
                images = [cell["bytes"] for cell in table[name].to_pylist()]
                frames[key], marks[key] = ImageFrames(images), sum(map(len, images))
            elif about.features[name]["dtype"] != "string":
                vectors[key] = rows(np.stack(table[name].to_numpy()), name)
        actions = rows(np.stack(table["action"].to_numpy()), "action")
        timestamps = table["timestamp"].to_numpy().astype(np.float64)
        task = about.tasks.get(table["task_index"][0].as_py(), "") if "task_index" in table.column_names else ""
    except MissingFile:
        raise
    except (pyarrow.ArrowException, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}, episode {index}: {error}") from None
    return Episode(stored.source, stored.id, actions, timestamps, vectors, frames, task, marks)


# --- which episodes


def find_spec(data, path=None):
    """The spec at `path`; else DATA/spec.yaml; else what the first whole episode and info.json tell."""
    if path is not None or (Path(data) / "spec.yaml").exists():
        return load_spec(path or Path(data) / "spec.yaml")
    for stored in list_episodes(Path(data).name, data):
        try:
            episode = stored.load(None)
        except MissingFile:
            continue
        vectors = [key for key in episode.vectors if key == "state"] or sorted(episode.vectors)
        rate = 1 / float(np.median(np.diff(episode.timestamps))) if len(episode.timestamps) > 1 else 1.0
        return DatasetSpec(
            name=Path(data).name,
            action_dim=episode.actions.shape[1],
            control_freq_hz=round(rate, 3),
            required_obs_keys=sorted(episode.frames),
            required_proprio_keys=vectors,
            action_names=stored.action_names,
        )
    raise ValueError(f"--data {data}: no whole episode to tell what the spec is; give --spec")


def named_paths(data):
    """["g1=PATH", "PATH"] -> [(name, path)]; without a name it is the path's own."""
    pairs = [word.partition("=") for word in data]
    pairs = [(name, path) if equals else (Path(name).name or "data", name) for name, equals, path in pairs]
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"--data: two data sets are called {max(names, key=names.count)}: write NAME=PATH")
    return pairs


def episode_hash(source, episode):
    """A number in [0, 1) that depends on the two names alone."""
    digest = hashlib.sha256(f"{source}/{episode}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def ids_of(words, name):
    """The ids that --val-episodes holds out of data set `name`, or None. words: 56-69,80 or g1=56-69,80."""
    wanted = None
    for word in words:
        owner, equals, rest = word.partition("=")
        if equals and owner != name:
            continue
        for part in (rest if equals else word).split(","):
            first, dash, last = part.partition("-")
            spread = dash and first.isdigit() and last.isdigit()
            more = {str(n) for n in range(int(first), int(last) + 1)} if spread else {part}
            wanted = (wanted or set()) | more
    return wanted


def split(stored, val_share=0.1, val_episodes=()):
    """(training, held out) of a list of Stored, per data set by name or by the hash of source/episode."""
    train, held = [], []
    for name in dict.fromkeys(item.source for item in stored):
        mine, wanted = [item for item in stored if item.source == name], ids_of(val_episodes, name)
        if wanted is not None:
            unknown = sorted(wanted - {item.id for item in mine})
            if unknown:
                raise ValueError(f"--val-episodes: no episode of {name} is called {unknown[0]}")
        else:
            wanted = {item.id for item in mine if episode_hash(name, item.id) < val_share}
            if val_share > 0 and len(wanted) in (0, len(mine)):
                # too few episodes for a share: hold out the one with the smallest hash, unless it is the only one
                first = min(mine, key=lambda item: episode_hash(name, item.id)).id
                wanted = {first} if len(mine) > 1 else set()
        held += [item for item in mine if item.id in wanted]
        train += [item for item in mine if item.id not in wanted]
    if not train:
        raise ValueError("--val-share, --val-episodes: every episode is held out, none is left to train on")
    return train, held


def open_data(data, spec=None, val_share=0.1, val_episodes=(), max_episodes=None, say=print):
    """(spec, training episodes, held-out episodes) of the flags' words, read and checked for shape.

    Episodes with a missing file are named and left out; any other fault is an error. All data sets share one spec.
    """
    pairs = named_paths(data)
    spec = spec if isinstance(spec, DatasetSpec) else find_spec(pairs[0][1], spec)
    stored, whole = [item for name, path in pairs for item in list_episodes(name, path)], []
    absent = []
    for item in stored[:max_episodes]:
        try:
            whole.append((item, check_shapes(item.load(spec), spec)))
        except MissingFile as error:
            absent.append(f"{item.id} ({error})")
    if absent:
        say(f"{len(absent)} of {len(stored)} episodes lack a file and are left out, such as {absent[0]}")
    if not whole:
        raise ValueError(f"--data {' '.join(data)}: no whole episode")
    first = whole[0][1]
    for _, episode in whole:
        for key in spec.required_proprio_keys:
            here, there = episode.vectors[key].shape[1], first.vectors[key].shape[1]
            if here != there:
                where = f"{episode.source}, episode {episode.id}"
                raise ValueError(f"{where}: `obs.{key}` has {here} dims, but {there} in episode {first.id}")
    train, held = split([item for item, _ in whole], val_share, val_episodes)
    loaded = {(item.source, item.id): episode for item, episode in whole}
    return spec, *([loaded[item.source, item.id] for item in part] for part in (train, held))


def check_shapes(episode, spec):
    """The episode, if its arrays fit the spec and each other; clipped where the spec says so."""
    where, T = f"{episode.source}, episode {episode.id}", len(episode)
    if T == 0:
        raise ValueError(f"{where}: no steps")
    if episode.actions.shape[1] != spec.action_dim:
        raise ValueError(f"{where}: {episode.actions.shape[1]} action dims, but the spec has {spec.action_dim}")
    for key in spec.required_obs_keys:
        if key not in episode.frames:
            raise ValueError(f"{where}: `obs.{key}` is no camera (uint8 images or a video); list it as proprio")
    for key in spec.required_proprio_keys:
        if key not in episode.vectors:
            raise ValueError(f"{where}: `obs.{key}` is a camera; list it in required_obs_keys")
    for name, array in [("timestamps", episode.timestamps), *episode.vectors.items(), *episode.frames.items()]:
        if len(array) != T:
            raise ValueError(f"{where}: {len(array)} rows of {name}, but {T} actions")
    if not spec.allow_nan:
        for name, array in [("actions", episode.actions), *episode.vectors.items()]:
            if not np.isfinite(array).all():
                step, dim = np.argwhere(~np.isfinite(array))[0]
                raise ValueError(f"{where}: {name} hold NaN or infinity at step {step}, dim {dim}")
    episode.actions = spec.clip(episode.actions).astype(np.float32)
    return episode


def data_hash(episodes):
    """One hash for a list of episodes: another order, value, text or file is another hash."""
    return hashlib.sha256("".join(f"{e.source}/{e.digest()}" for e in episodes).encode()).hexdigest()[:16]
