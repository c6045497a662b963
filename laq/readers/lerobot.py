"""LeRobotDatasets v2.x (a parquet and, per camera, a video for each episode) and v3.x (many episodes in each file).

Each row's frame is the one that the video shows at the row's timestamp. What is contradictory is an error that names
the file: timestamps that are no seconds, spans that do not hold the rows, episodes that overlap in a video.
"""

import functools
import itertools
import json

import numpy as np
import pyarrow
import pyarrow.parquet

from common import DataError
from readers.recording import Entry, Recording, as_rows, check_file, read_json, read_text, short
from readers.video import Timeline, decoded, picture

FEATURES = dict(actions=("action", "actions"), state=("observation.state", "state", "observation.states"))


def entries(source, root):
    """(an Entry for each camera of each episode, notes)."""
    file = root / "meta/info.json"
    info, notes = read_json(file), []
    try:
        version, features, fps = str(info["codebase_version"]), info["features"], float(info["fps"])
        if version[:2] not in ("v2", "v3"):
            raise DataError(f"{file}: codebase_version is {version}, expected v2.x or v3.x")
        if not 0 < fps < 1e6:
            raise DataError(f"{file}: fps is {fps}, expected a number above 0")
        cameras = {name: feature for name, feature in features.items() if feature["dtype"] in ("video", "image")}
        for camera in [name for name, feature in cameras.items() if is_depth(feature)]:
            del cameras[camera]
            notes.append(f"left out {camera}: a depth map, no colours")
        for name, spellings in FEATURES.items():
            if not set(spellings) & set(features):
                notes.append(f"no {name}: its features are {', '.join(sorted(features))}")
        found, episodes = [], read_episodes(root, version)
        names = {index: task for task, index in read_tasks(root, version)}
        for episode in episodes:
            number = episode["episode_index"]
            path_of = dict(episode_index=number, episode_chunk=number // info.get("chunks_size", 1000))
            table = str(root / info["data_path"].format(**path_of, **file_of(episode, "data")))
            for camera, feature in cameras.items():
                path, start, about = table, None, dict(table=table, column=camera, actions="absolute", fps=fps)
                if feature["dtype"] == "video":
                    video = f"videos/{camera}"
                    place = file_of(episode, video)
                    if version >= "v3" and not place:
                        notes.append(f"left out {camera}: meta/episodes names no video of it")
                        continue
                    path = str(root / info["video_path"].format(video_key=camera, **path_of, **place))
                    about["column"] = None
                    if version >= "v3":
                        start = float(episode[f"{video}/from_timestamp"])
                        check_span(episode, video, start, fps, root)
                tasks = tasks_of(episode, names)
                about |= dict(instruction=tasks, length=episode.get("length"), start=start, camera=short(camera))
                about |= dict(tasks={str(index): task for index, task in names.items() if tasks in ("", task)})
                found.append(Entry(source, str(number), "lerobot", path, **about))
    except (KeyError, TypeError, AttributeError, ValueError, pyarrow.ArrowException) as error:
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{root}/meta: not a LeRobotDataset v2 or v3: {why}") from None
    check_overlap(found, fps)
    return found, notes


def is_depth(feature):
    tables = [feature, feature.get("info") or {}, feature.get("video_info") or {}]
    return any(table.get(name) for table in tables for name in ("is_depth_map", "video.is_depth_map"))


def read_lines(path):
    """The tables of a .jsonl file."""
    check_file(path)
    found = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not readable as JSON ({error})") from None
    return found


def read_episodes(root, version):
    """What meta tells of each episode, in order."""
    if version < "v3":
        episodes = read_lines(root / "meta/episodes.jsonl")
    else:
        episodes = []
        for file in sorted((root / "meta/episodes").rglob("[!.]*.parquet")):
            check_file(file)
            names = [name for name in pyarrow.parquet.read_schema(file).names if not name.startswith("stats/")]
            episodes += pyarrow.parquet.read_table(file, columns=names, use_threads=False).to_pylist()
        if not episodes:
            raise DataError(f"{root}/meta/episodes: no episodes (*.parquet) in it")
    return sorted(episodes, key=lambda episode: episode["episode_index"])


def read_tasks(root, version):
    """(task, task_index) of each task; nothing where the data set has no such file."""
    path = root / ("meta/tasks.jsonl" if version < "v3" else "meta/tasks.parquet")
    if not path.exists():
        return []
    if version < "v3":
        return [(line["task"], line["task_index"]) for line in read_lines(path)]
    check_file(path)
    table = pyarrow.parquet.read_table(path, use_threads=False).to_pydict()
    index = table.pop("task_index")
    texts = table.get("task") or table.get("__index_level_0__") or next(iter(table.values()))
    return list(zip(texts, index, strict=True))


def tasks_of(episode, names):
    """The one task of an episode, or "" where its rows name it (there is none, or there are several)."""
    tasks = episode.get("tasks") or []
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    return str(names.get(tasks[0], tasks[0])) if len(tasks) == 1 or (tasks and not names) else ""


def file_of(episode, kind):
    """In which file a v3.x episode's data or video is."""
    parts = {part: episode.get(f"{kind}/{part}") for part in ("chunk_index", "file_index")}
    return {part: number for part, number in parts.items() if number is not None}


def check_span(episode, video, start, fps, root):
    """A DataError unless an episode's span holds its rows; to_timestamp is the last frame's time or the one after."""
    end, length = episode.get(f"{video}/to_timestamp"), episode.get("length")
    if end is not None and length and not -1.5 < (end - start) * fps - length < 1.5:
        span = f"{video} from {start:g} to {end:g} s at {fps:g} fps"
        raise DataError(f"{root}/meta/episodes: episode {episode['episode_index']} has {length} rows, but {span}")


def check_overlap(found, fps):
    """Episodes follow one another in a video."""
    spans = sorted((e.path, e.start, e.length, e.episode) for e in found if e.start is not None and e.length)
    for (path, start, length, name), (path2, start2, _, name2) in itertools.pairwise(spans):
        if path == path2 and start2 < start + (length - 0.5) / fps:
            raise DataError(f"{path}: episodes {name} and {name2} overlap: from_timestamp in meta/episodes is wrong")


# --- one episode


def opened(entry):
    notes = []
    check_file(entry.path)
    rows, times, instruction, cells = read_table(entry)
    if entry.length is not None and entry.length != len(times):
        raise DataError(f"{entry.table}: episode {entry.episode} has {len(times)} rows, meta says {entry.length}")
    if entry.column is None:
        shown = frame_times(entry, times, notes)
        frames, length = pick_frames(entry, shown), len(shown)
        rows = {name: table[:length] for name, table in rows.items()}
        instruction = instruction if isinstance(instruction, str) else instruction[:length]
    else:
        length = len(times)
        cells = (cell["bytes"] if isinstance(cell, dict) else cell for cell in cells)
        frames = (picture(cell, f"{entry.column} of row {row}") for row, cell in enumerate(cells))
    more = dict(length=length, camera=entry.camera, more=dict(entry.more), notes=notes)
    yield Recording(frames, entry.fps, instruction, rows, **more)


def read_table(entry):
    """An episode's rows, timestamps from 0 on, instruction (a list where it changes), cells of pictures."""
    check_file(entry.table)
    try:
        names = pyarrow.parquet.read_schema(entry.table).names
    except pyarrow.ArrowException as error:
        raise DataError(f"{entry.table}: {error}") from None
    spelled = {name: [s for s in spellings if s in names] for name, spellings in FEATURES.items()}
    spelled = {name: found[0] for name, found in spelled.items() if found}
    more = [name for name in ("timestamp", "task_index" if entry.tasks else "", entry.column) if name in names]
    episode = [("episode_index", "==", int(entry.episode))]
    columns = ["frame_index", *spelled.values(), *more]
    table = pyarrow.parquet.read_table(entry.table, columns=columns, filters=episode, use_threads=False)
    if not len(table):
        raise DataError(f"{entry.table}: no rows of episode {entry.episode}")
    if table["frame_index"].to_pylist() != list(range(len(table))):
        raise DataError(f"{entry.table}: frame_index of episode {entry.episode} is not 0 to {len(table) - 1}")
    rows = {name: as_rows(f"{entry.table}: {name}", table[c].to_pylist()) for name, c in spelled.items()}
    times = np.arange(len(table)) / entry.fps
    if "timestamp" in more and len(table) > 1:
        stamps = np.array(table["timestamp"].to_pylist(), float).reshape(len(table))
        stamps = stamps - stamps[0]
        if not np.abs(stamps - times).max() < 0.5 / entry.fps:
            rate = (len(stamps) - 1) / stamps[-1] if stamps[-1] > 0 else np.inf
            why = f"make {rate:.3g} rows a second, info.json says {entry.fps:g} fps: are they in seconds?"
            raise DataError(f"{entry.table}: the timestamps of episode {entry.episode} {why}")
        times = stamps
    instruction = entry.instruction
    if "task_index" in more:
        indices = list(map(str, table["task_index"].to_pylist()))
        if not set(indices) <= entry.tasks.keys():
            raise DataError(f"{entry.table}: task_index of episode {entry.episode} is not that of its tasks in meta")
        instruction = [str(entry.tasks[index]) for index in indices]
    return rows, times, instruction, table[entry.column].to_pylist() if entry.column in more else None


@functools.lru_cache(maxsize=8)
def timeline(path):
    """A video's Timeline; v3 has many episodes in one."""
    return Timeline(path)


def frame_times(entry, times, notes):
    """When the video shows the frame of each row, in seconds: the nearest to the row's time, to half a row."""
    shown = timeline(entry.path).times
    if shown is None:
        raise DataError(f"{entry.path}: its frames have no times")
    if entry.start is None:
        shown = shown - shown[0]  # v2: from its own beginning, whatever the file calls that
    wanted, period = (entry.start or 0.0) + times, 1 / entry.fps
    after = np.searchsorted(shown, wanted).clip(1, max(1, len(shown) - 1))
    nearest = np.where(wanted - shown[after - 1] <= shown[after % len(shown)] - wanted, after - 1, after % len(shown))
    off = np.abs(shown[nearest] - wanted) > 0.5 * period + 1e-3
    count = int(off.argmax()) if off.any() else len(wanted)
    if count < len(wanted) - 1:
        why = f"{len(shown)} frames, but {len(wanted)} rows at {entry.fps:g} fps"
        raise DataError(f"{entry.path} shows no frame at {wanted[count]:.3f} s, the time of row {count}: {why}")
    over = shown[-1] - wanted[-1] if entry.start is None else 0.0
    if over > 1.5 * period:
        raise DataError(f"{entry.path}: {len(shown)} frames, but {len(wanted)} rows at {entry.fps:g} fps")
    if count < len(wanted) or over > 0.5 * period:
        notes.append("one row more than frames, or one frame more than rows: the common part is kept")
    return shown[nearest[:count]]


def pick_frames(entry, times):
    """The frames shown at these times (ascending), decoded from the keyframe before the first."""
    origin, number = None, 0
    for frame in decoded(entry.path, entry.start):
        if origin is None:
            origin = frame.time if entry.start is None else 0.0
        while number < len(times) and frame.time - origin >= times[number] - 1e-6:
            yield frame
            number += 1
        if number == len(times):
            return
