"""Recorded episodes from npz folders, LeRobot data sets (v2.1, v3.0), HDF5 (robomimic, ALOHA) and a user's own loaders.

Each reader gives a Recording. Hidden files are no data; folders that are links are followed; what is broken is named.
"""

import importlib.util
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet

from common import DataError, read_json, warn

SUFFIXES = dict(npz=(".npz",), parquet=(".parquet",), hdf5=(".hdf5", ".h5", ".hdf"))
STATE_KEYS = ("observation.state", "state", "obs.state", "observations/qpos", "obs/joint_states")
MODULE_CHUNKS = 200_000  # read at most from a user's training loader


@dataclass
class Recording:
    """Episodes of one robot: ids, actions and states as lists of (T, A) and (T, S) float32, states None where missing.

    rates: Hz of each episode, empty where the files do not tell. names, state_names: of the dims, where known.
    """

    ids: list = field(default_factory=list)
    actions: list = field(default_factory=list)
    states: list = field(default_factory=list)
    rates: list = field(default_factory=list)
    names: list | None = None
    state_names: list | None = None
    held_out: set = field(default_factory=set)  # ids that the source itself calls validation

    def add(self, identity, actions, state=None, rate=None):
        """TypeError for what is no array of numbers, such as texts or complex numbers."""
        self.ids.append(identity)
        actions = np.asarray(actions).astype(np.float32, casting="same_kind")
        self.actions.append(actions[:, None] if actions.ndim == 1 else actions)
        self.states.append(None if state is None else np.asarray(state).astype(np.float32, casting="same_kind"))
        self.rates += [rate] if rate else []


# --- files


def files(folder, kind):
    """Files of a kind below `folder` (or it itself, a file), sorted; links are followed, each folder is read once."""
    found, seen = [folder] if folder.is_file() else [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        first = os.path.realpath(root) not in seen
        seen.add(os.path.realpath(root))
        folders[:] = [name for name in folders if first and not name.startswith(".")]
        found += [Path(root, name) for name in names if first and not name.startswith(".")]
    return sorted(path for path in found if path.name.lower().endswith(SUFFIXES[kind]))


def check_file(path):
    """Name a file that is empty, a link to nothing, or a Git LFS pointer in place of the data."""
    try:
        with open(path, "rb") as file:
            start = file.read(40)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if not start:
        raise DataError(f"{path}: the file is empty; copy it again")
    if start.startswith(b"version https://git-lfs"):
        raise DataError(f"{path}: a Git LFS pointer, not the data; run `git lfs pull` there")


def rate_of(timestamps, where):
    """Hz from timestamps in seconds; DataError where they stand still or cannot be seconds."""
    timestamps = np.asarray(timestamps)
    if timestamps.dtype.kind not in "fiu":
        raise DataError(f"{where}: `timestamps` are {timestamps.dtype}, expected seconds")
    steps = np.diff(timestamps.astype(np.float64).ravel())
    if len(steps) == 0:
        return None
    median = np.median(steps)
    if not steps.min() > 0:
        raise DataError(f"{where}: `timestamps` do not increase (float32 is too coarse for seconds since 1970)")
    if not 0.99 <= 1 / median <= 2000:
        raise DataError(f"{where}: `timestamps` give {1 / median:.3g} Hz; are they in seconds?")
    if steps.max() > 3 * median:
        warn(f"{where}: {steps.max():.3g} s pass between two steps of {median:.3g} s: chunks run across it")
    return 1 / median


def fetch(name):
    """OWNER/NAME or OWNER/NAME@REVISION of the Hugging Face hub -> folder in its cache, without videos."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise DataError(f"--data hub:{name} needs a package: pip install huggingface_hub") from None
    repository, _, revision = name.partition("@")
    try:
        patterns = ["meta/*", "data/*", "*.npz", "*.hdf5", "*.h5"]
        kind = dict(repo_type="dataset", revision=revision or None, allow_patterns=patterns)
        return Path(snapshot_download(repository, **kind))
    except Exception as error:  # httpx, requests and the hub raise some twenty kinds
        text = " ".join(str(error).split())[:200]
        raise DataError(f"--data hub:{name} cannot be fetched ({type(error).__name__}: {text})") from None


# --- formats


def read_npz(folder, paths):
    """`actions` (T, A); `timestamps` (T,) in seconds give the rate; `obs.state` or `state` (T, S)."""
    found = Recording()
    for path in paths:
        check_file(path)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                if "actions" not in arrays:
                    raise DataError(f"{path}: has no array `actions`, only {', '.join(arrays)}")
                actions = arrays["actions"]
                state = next((arrays[key] for key in STATE_KEYS if key in arrays), None)
                times = arrays.get("timestamps")
                if times is not None and times.size != len(actions):
                    raise DataError(f"{path}: {times.size} `timestamps`, but {len(actions)} actions")
                rate = None if times is None else rate_of(times, path)
                identity = path.stem if path == folder else str(path.relative_to(folder).with_suffix(""))
                found.add(identity, actions, state, rate)
        except DataError:
            raise
        except Exception as error:  # numpy and zipfile raise a dozen kinds for a broken file
            text = "it holds Python objects" if "pickle" in str(error) else str(error) or type(error).__name__
            raise DataError(f"{path}: not readable as npz ({text[:150]})") from None
    return found


def flat_names(feature):
    """The names of a LeRobot feature's dims: a list, a list in a list, or a dict of one list."""
    names = feature.get("names")
    names = next(iter(names.values()), None) if isinstance(names, dict) else names
    names = names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], list) else names
    names = list(map(str, names)) if isinstance(names, list) else []
    return names if list(np.ravel(feature.get("shape"))) == [len(names)] == [len(set(names))] else None


def matrix(table, key):
    """A column of numbers or of lists of numbers -> (rows, width) float32."""
    column = table[key].combine_chunks()
    if not pyarrow.types.is_nested(column.type):
        return column.to_numpy(zero_copy_only=False).astype(np.float32)[:, None]
    width = np.unique(column.value_lengths().to_numpy(zero_copy_only=False)) if len(table) else [1]
    if len(width) != 1:
        raise ValueError(f"rows of `{key}` differ in length")
    return column.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(table), int(width[0]))


def read_lerobot(folder, action_key=None):
    """The parquet files of a LeRobotDataset v2.1 (one per episode) or v3.0 (many per file)."""
    info = folder / "meta" / "info.json"
    check_file(info)
    description = read_json(info)
    try:
        fps, features = float(description["fps"]), description.get("features") or {}
        features = {key: dict(feature) for key, feature in features.items()}
        expected = int(description.get("total_episodes") or 0)
        if not 0 < fps < 1e6:
            raise ValueError(f"fps is {fps}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{info}: no readable `fps` and `features` ({error})") from None
    wanted = [action_key] if action_key else ["action", "actions"]
    action = next((key for key in wanted if key in features), None if features else wanted[0])
    if action is None:
        raise DataError(f"{info}: no feature {' or '.join(wanted)}; --action-key names one of {', '.join(features)}")
    state = next((key for key in STATE_KEYS if key in features), None)
    parts = {}  # episode: its parts in file after file
    for path in files(folder / "data", "parquet"):
        check_file(path)
        for episode, *part in read_parquet(path, action, state):
            parts.setdefault(episode, []).append((*part, path))
    found = Recording(names=flat_names(features.get(action, {})), state_names=flat_names(features.get(state, {})))
    for episode in sorted(parts):
        where = f"{parts[episode][-1][-1]}, episode {episode}"
        columns = join_parts(parts[episode], where)
        rate = rate_of(columns["time"], where) if columns["time"] is not None else None
        if rate and abs(rate / fps - 1) > 0.1:
            raise DataError(f"{where}: `timestamps` give {rate:.3g} Hz, but {info} says fps {fps:g}")
        found.add(str(episode), columns["actions"], columns["state"], fps)
    if len(parts) < expected:
        warn(f"{folder}: {len(parts)} of {expected} episodes are there (a partial copy?)")
    return found


def read_parquet(path, action, state):
    """Yields (episode, frame_index (T,), columns) of each episode in a file; columns: actions, state, time or None."""
    try:
        schema = pyarrow.parquet.read_schema(path).names
        missing = [key for key in (action, "episode_index", "frame_index") if key not in schema]
        if missing:
            raise ValueError(f"no column `{missing[0]}`, only {', '.join(schema)}")
        keys = [action, "episode_index", "frame_index", *(k for k in (state, "timestamp") if k in schema)]
        table = pyarrow.parquet.read_table(path, columns=keys)
        columns = dict(actions=matrix(table, action), state=matrix(table, state) if state in keys else None)
        columns["time"] = table["timestamp"].to_numpy() if "timestamp" in keys else None
        if table["episode_index"].null_count:
            raise ValueError("`episode_index` is empty in some rows")
        episodes, frames = table["episode_index"].to_numpy(), table["frame_index"].to_numpy()
    except (pyarrow.ArrowException, OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not the parquet file of a LeRobotDataset ({error})") from None
    for episode in np.unique(episodes):
        rows = episodes == episode
        yield int(episode), frames[rows], {k: None if v is None else v[rows] for k, v in columns.items()}


def join_parts(parts, where):
    """The columns of an episode that lies in one or several files, in the order of its frames."""
    frames, joined = np.concatenate([frames for frames, _, _ in parts]), {}
    order = np.argsort(frames, kind="stable")
    if (np.diff(frames[order]) != 1).any():
        raise DataError(f"{where}: frames are missing or repeated (frame_index is not consecutive)")
    for key in parts[0][1]:
        values = [columns[key] for _, columns, _ in parts]
        if len({None if v is None else v.shape[1:] for v in values}) > 1:
            raise DataError(f"{where}: `{key}` has another width than in the file before")
        joined[key] = None if values[0] is None else np.concatenate(values)[order]
    return joined


def dataset(h5, key):
    """An HDF5 data set as an array; DataError where it was never written or its sources are gone (they read as 0)."""
    data = h5[key]
    holes = data.size and data.id.get_storage_size() == 0 and not data.is_virtual
    if data.chunks and not holes:
        holes = data.id.get_num_chunks() < np.prod([-(-n // c) for n, c in zip(data.shape, data.chunks, strict=True)])
    if data.is_virtual:
        sources = {Path(h5.file.filename).parent / s.file_name for s in data.virtual_sources() if s.file_name != "."}
        holes = any(not path.exists() for path in sources)
    if holes:
        raise DataError(f"{h5.file.filename}: {key} was not written to its end, or its sources are missing")
    return np.asarray(data)


def read_hdf5(folder, paths):
    """robomimic and robosuite: data/demo_N/actions, many in a file. ALOHA: action and observations/qpos, one a file."""
    found = Recording()
    for path in paths:
        check_file(path)
        prefix = "" if path == folder else f"{path.relative_to(folder).with_suffix('')}/"
        try:
            with h5py.File(path, "r") as h5:
                if "action" in h5 and "observations" in h5:
                    state = dataset(h5, "observations/qpos") if "observations/qpos" in h5 else None
                    found.add(prefix.rstrip("/") or path.stem, dataset(h5, "action"), state)
                    continue
                if "data" not in h5:
                    raise KeyError(f"it holds {', '.join(h5)}")
                settings = str(h5["data"].attrs.get("env_args", h5["data"].attrs.get("env_info", "")))
                rate = re.search(r'"control_freq": *(\d+\.?\d*)', settings)
                rate = float(rate[1]) if rate and float(rate[1]) > 0 else None
                for name in sorted(h5["data"], key=lambda name: [int(n) for n in re.findall(r"\d+", name)]):
                    demo = h5["data"][name]
                    if "actions" not in demo:
                        raise KeyError(f"{name} holds {', '.join(demo) or 'nothing'}")
                    state = next((dataset(demo, key) for key in STATE_KEYS if key in demo), None)
                    found.add(prefix + name, dataset(demo, "actions"), state, rate)
        except (OSError, KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            text = str(error)
            text += "; it is open elsewhere, or set HDF5_USE_FILE_LOCKING=FALSE" if "lock" in text else ""
            hint = "expected data/demo_N/actions, or ALOHA's action and observations"
            raise DataError(f"{path}: not readable as HDF5 of robot actions ({text}); {hint}") from None
    return found


def read_module(path):
    """A user's own loaders: `--data module:FILE.py`, whose `prepare_dataloaders(batch_size)` returns an example action
    tensor (T, A), a training loader, and {data set name: validation loader}. Runs the user's file, as asked.

    A batch is a tensor (B, T, A), a tuple that starts with one, or a dict with `actions` and, where chunks are padded,
    `mask` (B, T). Each chunk becomes an episode of its own. Every process reads the same: shard nothing by rank.
    """
    import torch

    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if not Path(path).is_file() or spec is None:
        raise DataError(f"--data module:{path}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "prepare_dataloaders"):
        raise DataError(f"{path}: has no function prepare_dataloaders(batch_size)")
    torch.manual_seed(0)  # the same chunks in the same order on every rank
    example, train, validation = module.prepare_dataloaders(128)
    found, shape = Recording(), tuple(example.shape[-2:])
    for name, loader in dict(train=train, **{f"validation/{name}": v for name, v in validation.items()}).items():
        count = 0
        for item in loader:
            item = item[0] if isinstance(item, (tuple, list)) else item
            item = item if isinstance(item, dict) else dict(actions=item)
            actions = torch.as_tensor(item["actions"]).float()
            if actions.ndim != 3 or actions.shape[1:] != shape:
                raise DataError(f"{path}: a batch is {tuple(actions.shape)}, expected (B, {shape[0]}, {shape[1]})")
            mask = torch.as_tensor(item.get("mask", torch.ones(actions.shape[:2], dtype=torch.bool))).bool()
            for chunk, valid in zip(actions.numpy(), mask.numpy(), strict=True):
                found.add(f"{name}/{count}", chunk[valid])
                count += 1
            if count >= MODULE_CHUNKS:
                break
        if name != "train":
            found.held_out |= {f"{name}/{i}" for i in range(count)}
    if len(found.ids) == len(found.held_out):
        raise DataError(f"{path}: its training loader is empty")
    return found, shape[0]


def read(path, action_key=None):
    """The recordings at a path, whatever their format, every episode checked; hub:OWNER/NAME is fetched first."""
    path = fetch(str(path)[4:]) if str(path).startswith("hub:") else Path(path)
    if not path.exists():
        raise DataError(f"--data {path}: no such file or folder")
    hdf5, npz = files(path, "hdf5"), files(path, "npz")
    if (path / "meta" / "info.json").exists():
        found = read_lerobot(path, action_key)
    elif hdf5 and npz:
        raise DataError(f"--data {path}: holds {npz[0].name} and {hdf5[0].name}; name the files or folder of one kind")
    else:
        found = read_hdf5(path, hdf5) if hdf5 else read_npz(path, npz)
    if not found.ids:
        names = [path] if path.is_file() else path.iterdir()
        there = sorted({name.suffix or name.name for name in names if not name.name.startswith(".")})[:8]
        expected = "*.npz, meta/info.json of LeRobot, or *.hdf5"
        raise DataError(f"--data {path}: no episodes (expected {expected}; there is {', '.join(there) or 'nothing'})")
    check(found, path)
    return found


def check(found, path):
    """DataError names the episode whose actions or state cannot be trained on, or the two rates of one folder."""
    width = found.actions[0].shape[-1] if found.actions[0].ndim else 0
    for identity, actions, state in zip(found.ids, found.actions, found.states, strict=True):
        where = f"{path}, episode {identity}"
        if actions.ndim != 2 or 0 in actions.shape:
            raise DataError(f"{where}: actions have shape {actions.shape}, expected (T, A) with T above 0")
        if actions.shape[1] != width:
            raise DataError(f"{where}: {actions.shape[1]} action dims, but {width} in episode {found.ids[0]}")
        if state is not None and (state.ndim != 2 or len(state) != len(actions)):
            raise DataError(f"{where}: state has shape {state.shape}, but there are {len(actions)} actions")
        for what, values in (("actions", actions), ("state", state)):
            if values is not None and not np.isfinite(values).all():
                step, dim = np.argwhere(~np.isfinite(values))[0]
                raise DataError(f"{where}: {what} hold NaN or infinity at step {step}, dim {dim}")
    rates = sorted(found.rates)
    if rates and len(rates) < len(found.ids):
        warn(f"{path}: {len(found.ids) - len(rates)} episodes do not tell their rate; {rates[0]:.3g} Hz is taken")
    if rates and rates[-1] > 1.1 * rates[0]:
        raise DataError(
            f"--data {path}: episodes of {rates[0]:.3g} Hz and of {rates[-1]:.3g} Hz in one folder; put each rate into "
            "a folder of its own: --data slow=FOLDER fast=FOLDER"
        )


def pair_state(found):
    """(states in the order of the action's dims or None, a remark or None): paired by names, else by position."""
    if any(state is None for state in found.states):
        return None, "its episodes hold no state"
    if found.names and found.state_names:
        lost = [name for name in found.names if name not in found.state_names]
        if lost:
            return None, f"its state has no dims called {', '.join(lost[:5])}, only {', '.join(found.state_names[:20])}"
        order = [found.state_names.index(name) for name in found.names]
        return [state[:, order] for state in found.states], None
    widths = found.actions[0].shape[1], found.states[0].shape[1]
    if widths[0] != widths[1] or len({state.shape[1] for state in found.states}) > 1:
        return None, f"its {widths[0]} action dims and {widths[1]} state dims have no names to pair them by"
    return found.states, "the dims have no names; state and action are paired by position"
