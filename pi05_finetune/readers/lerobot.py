"""LeRobotDataset v2.1 and v3.0. `observation.KEY` is `obs.KEY` of the npz layout, so the same spec fits both.

Features are read by the description: sets written by openpi's converters call them `actions`, `state` and `image`.
"""

import functools
import json

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from common import DataError, read_json

from .episode import Episode, EpisodeRef, MissingFile, as_rows, check_file, decode_image, known_paths, short, trim
from .video import VideoFrames

BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")


class ImageFrames:
    """Images that LeRobot keeps inside its parquet file. where: what to call them in an error."""

    def __init__(self, images, where):
        self.images, self.where = images, where

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return decode_image(self.images[i], self.where)


@functools.lru_cache(maxsize=4)
def read_table(file):
    check_file(file)
    try:
        return pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a whole parquet file ({short(error)})") from None


def read_lines(file):
    """A list of one JSON value per line; [] if the file is not there."""
    if not file.exists():
        return []
    check_file(file)
    try:
        return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    except ValueError as error:
        raise DataError(f"{file}: not readable as JSON ({short(error)})") from None


class LeRobot:
    """The description of a LeRobotDataset: where its files are, its rate, tasks and features."""

    def __init__(self, root):
        self.root, path = root, root / "meta" / "info.json"
        check_file(path)
        self.info = read_json(path)
        try:
            self.fps, self.features = float(self.info["fps"]), self.info["features"]
            if not 0 < self.fps < 1e6:
                raise ValueError(f"fps is {self.fps}")
            self.is_v3 = self.info["codebase_version"].startswith("v3")
            self.video_keys = [key for key, feature in self.features.items() if feature["dtype"] == "video"]
            self.names = {key: flat_names(feature) for key, feature in self.features.items()}
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: not the description of a LeRobotDataset ({short(error)})") from None
        self.action = next((key for key in ("action", "actions") if key in self.features), None)
        if self.action is None:
            raise DataError(f"{path}: no feature `action` or `actions`, only {', '.join(sorted(self.features))}")
        features = {name: f for name, f in self.features.items() if name not in {self.action, *BOOKKEEPING}}
        features = {name: f for name, f in features.items() if f["dtype"] not in ("string", "language")}
        self.keys = {name.removeprefix("observation."): name for name, f in features.items() if not is_depth(f)}
        self.rows, self.tasks = self.read_v3() if self.is_v3 else self.read_v2()

    def read_v3(self):
        """(a row of the description per episode, {task_index: text})."""
        file, rows, tasks = self.root / "meta" / "tasks.parquet", [], {}
        if file.exists():
            table = read_table(file).to_pydict()
            texts = table.get("__index_level_0__", table.get("task"))
            if texts is None or "task_index" not in table:
                raise DataError(f"{file}: no columns `task` and `task_index`")
            tasks = dict(zip(table["task_index"], texts, strict=True))
        for file in known_paths(self.root / "meta" / "episodes", "*.parquet"):
            table = read_table(file)
            if "episode_index" not in table.column_names:
                raise DataError(f"{file}: no column `episode_index`")
            rows += table.select([name for name in table.column_names if not name.startswith("stats/")]).to_pylist()
        return rows, tasks

    @functools.cache  # noqa: B019  a description lives as long as its episodes
    def check_spans(self, key):
        """Raise where two episodes claim the same stretch of one video file of camera `key`."""
        spans = {}
        for row in self.rows:
            file = row[f"videos/{key}/chunk_index"], row[f"videos/{key}/file_index"]
            start = row[f"videos/{key}/from_timestamp"]
            spans.setdefault(file, []).append((start, row["episode_index"], row.get("length") or 1))
        for file, stretch in spans.items():
            stretch.sort()
            for (start, one, length), (following, two, _) in zip(stretch[:-1], stretch[1:], strict=True):
                if following < start + (length - 1.5) / self.fps:
                    text = f"from_timestamp of episodes {one} and {two} overlap in chunk {file[0]}, file {file[1]}"
                    raise DataError(f"{self.root / 'meta' / 'episodes'}: {key}: {text}")

    def read_v2(self):
        tasks, rows = self.root / "meta" / "tasks.jsonl", self.root / "meta" / "episodes.jsonl"
        try:
            texts = {row["task_index"]: row["task"] for row in read_lines(tasks)}
            described = {int(row["episode_index"]): row for row in read_lines(rows)}
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{tasks} or {rows.name}: a line lacks a whole number or a text ({short(error)})") from None
        for file in known_paths(self.root / "data", "episode_*.parquet"):
            if file.stem[8:].isdecimal():  # not "episode_000001 (1)"
                described.setdefault(int(file.stem[8:]), dict(episode_index=int(file.stem[8:])))
        return [described[index] for index in sorted(described)], texts

    def file_of(self, row, key=None):
        """The data file of an episode, or the video of one of its cameras."""
        index, template = row["episode_index"], "video_path" if key else "data_path"
        part = f"videos/{key}" if key else "data"
        try:
            values = dict(video_key=key, episode_index=index, episode_chunk=index // self.info.get("chunks_size", 1000))
            if self.is_v3:
                values |= dict(chunk_index=row[f"{part}/chunk_index"], file_index=row[f"{part}/file_index"])
            path = self.root / self.info[template].format(**values)
        except (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise DataError(f"{self.root / 'meta'}: no {template} of episode {index} ({short(error)})") from None
        if not path.exists():
            raise MissingFile(f"{path}: not there (a partial copy?)")
        try:
            check_file(path)
        except DataError as error:
            raise MissingFile(str(error)) from None
        return path

    def frames(self, row, name, count):
        """(VideoFrames of one camera, its fingerprint). The span in the description must agree with the rows."""
        file, part = self.file_of(row, name), f"videos/{name}"
        start = float(row[f"{part}/from_timestamp"]) if self.is_v3 else 0.0
        end = row.get(f"{part}/to_timestamp")
        if self.is_v3:
            self.check_spans(name)
        if self.is_v3 and end is not None:
            span = round((float(end) - start) * self.fps)
            if not count - 1 <= span <= count + 1:  # some converters give the time of the last frame
                text = f"{name} spans {span} frames ({start:g} to {end:g} s), but the episode has {count} rows"
                raise DataError(f"{self.root / 'meta' / 'episodes'}: episode {row['episode_index']}: {text}")
        return VideoFrames(file, start, self.fps, count), (file.stat().st_size, start)

    def tasks_of(self, row, table):
        """A list of one text, or one per row: by task_index, or from the episode's own description."""
        if "task_index" in table.column_names and self.tasks:
            indices = table["task_index"].to_pylist()
            unknown = [index for index in indices if self.tasks.get(index) is None]
            if unknown:
                raise DataError(f"task_index {unknown[0]} has no text in meta/tasks")
            texts = [str(self.tasks[index]).strip() for index in indices]
        else:
            described = row.get("tasks") or []
            texts = [described] if isinstance(described, str) else list(described) or [""]
            if len(texts) > 1:
                raise DataError(f"{len(texts)} tasks, but no column task_index tells which holds when")
        return texts[:1] if len(set(texts)) == 1 else texts


def is_depth(feature):
    parts = (feature, feature.get("info") or {}, feature.get("video_info") or {})
    return any(part.get(name) for part in parts for name in ("is_depth_map", "video.is_depth_map"))


def flat_names(feature):
    """The names of a feature's dims, however LeRobot nests them; None if they are not one text per dim."""
    names = feature.get("names")
    while isinstance(names, dict) or (isinstance(names, list) and len(names) == 1 and isinstance(names[0], list)):
        names = list(names.values())[0] if isinstance(names, dict) and names else names[0] if names else None
    return list(map(str, names)) if isinstance(names, list) and len(names) == feature["shape"][0] else None


def list_lerobot(source, root):
    data = LeRobot(root)
    if not data.rows:
        raise DataError(f"--data {root}: meta lists no episodes")
    numbers = [row["episode_index"] for row in data.rows]
    if None in numbers or len(set(numbers)) < len(numbers):
        raise DataError(f"{root / 'meta' / 'episodes'}: episode_index is empty or repeated")
    vectors = {key: data.names[name] for key, name in data.keys.items() if data.names[name]}
    names, refs = data.names[data.action], []
    for row in data.rows:
        read = functools.partial(read_lerobot, source, data, row)
        refs.append(EpisodeRef(source, str(row["episode_index"]), read, names, vectors))
    return refs


def read_lerobot(source, data, row, keys):
    """The Episode of one row of the description. keys: the observations to read; None reads all."""
    file, index = data.file_of(row), row["episode_index"]
    table = read_table(file)
    vectors, frames, fingerprint = {}, {}, {}
    try:
        table = table.filter(pyarrow.compute.equal(table["episode_index"], index))
        if not len(table):
            raise MissingFile(f"{file}: holds no row of episode {index}")
        if "frame_index" in table.column_names:
            table = table.sort_by("frame_index")
            if (np.diff(table["frame_index"].to_numpy()) != 1).any():
                raise DataError("frames are missing or repeated (frame_index is not consecutive)")
        if row.get("length") not in (None, len(table)):
            raise DataError(f"{len(table)} rows, but meta/episodes says {row['length']}")
        actions = as_rows(np.stack(table[data.action].to_numpy()), data.action)
        timestamps = table["timestamp"].to_numpy().astype(np.float64)
        period = np.median(np.diff(timestamps)) if len(timestamps) > 1 else 1 / data.fps
        if period > 0 and abs(period * data.fps - 1) > 0.1:
            raise DataError(f"timestamps tell {1 / period:.4g} Hz, but meta/info.json says fps {data.fps:g}")
        for key in data.keys if keys is None else sorted(keys):
            name = data.keys.get(key)
            if name is None:
                raise DataError(f"no feature `observation.{key}`, only {', '.join(sorted(data.features))}")
            if name in data.video_keys:
                frames[key], fingerprint[key] = data.frames(row, name, len(table))
            elif data.features[name]["dtype"] == "image":
                images = [cell["bytes"] for cell in table[name].to_pylist()]
                frames[key] = ImageFrames(images, f"{file}, episode {index}, {name}")
                fingerprint[key] = sum(map(len, images))
            else:
                values = np.stack(table[name].to_numpy())
                if keys is not None or (values.ndim <= 2 and values.dtype.kind in "fiub"):
                    vectors[key] = as_rows(values, name)
        tasks = data.tasks_of(row, table)
    except MissingFile:
        raise
    except DataError as error:
        raise DataError(f"{file}, episode {index}: {error}") from None
    except (pyarrow.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}, episode {index}: {short(error)}") from None
    episode = Episode(source, str(index), actions, timestamps, vectors, frames, tasks, fingerprint)
    trim(episode, vectors)
    return episode
