"""Which episodes a data set holds, its spec, and which of them are held out."""

import hashlib
import re
from collections import Counter
from pathlib import Path

import numpy as np

from common import DataError, warn

from .episode import MissingFile, control_rate, visible
from .lerobot import list_lerobot
from .npz import list_npz
from .spec import DatasetSpec, load_spec

# vectors of simulators and of reinforcement learning that are no measurement of the robot
NO_STATE = re.compile(
    r"reward|done|success|terminal|truncat|discount|is_(first|last)|^states?s$|^object|^next\.|action"
)


def list_episodes(source, root):
    """All episodes of a folder as EpisodeRef, in order; only the descriptions are read."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"--data {root}: {'a file; give its folder' if root.is_file() else 'no such folder'}")
    if (root / "meta" / "info.json").exists():
        return list_lerobot(source, root)
    files = [file for folder in (root / "episodes", root) if folder.is_dir() for file in visible(folder.iterdir())]
    arrays = [file for file in files if file.suffix.lower() == ".npz"]
    arrays = [file for file in arrays if file.parent == arrays[0].parent]
    if not arrays:
        other = sorted({file.suffix.lower() for file in files if file.suffix.lower() in (".hdf5", ".h5", ".tar")})
        cure = f"; it holds {other[0]} files: convert.py reads HDF5" if other else ""
        expected = "expected episodes/*.npz, or meta/info.json of a LeRobotDataset"
        raise DataError(f"--data {root}: no episodes ({expected}){cure}")
    repeated = [stem for stem, count in Counter(file.stem for file in arrays).items() if count > 1]
    if repeated:
        raise DataError(f"--data {root}: two files are called {repeated[0]}")
    return list_npz(source, arrays)


def find_spec(data, path=None):
    """The spec at `path`; else DATA/spec.yaml; else what the first whole episode and its description tell."""
    if path is not None or (Path(data) / "spec.yaml").exists():
        return load_spec(path or Path(data) / "spec.yaml")
    missing = "no episodes"
    for ref in list_episodes(Path(data).name, data):
        try:
            episode = ref.load(None)
        except MissingFile as error:
            missing = error
            continue
        return spec_of(episode, ref, Path(data).name, control_rate(episode.timestamps, episode.name))
    raise DataError(f"--data {data}: every episode lacks a file, such as {missing}")


def spec_of(episode, ref, name, rate):
    """What an episode and its description tell. The state: `state`, or every vector that looks like a measurement."""
    vectors = {key: value for key, value in episode.vectors.items() if len(value) == len(episode)}
    for key in episode.vectors.keys() - vectors.keys():
        warn(f"{name}: {key} has {len(episode.vectors[key])} rows for {len(episode)} actions, so it is no state")
    keys = ["state"] if "state" in vectors else sorted(key for key in vectors if not NO_STATE.search(key))
    names = [dim for key in keys for dim in ref.proprio_names.get(key, [None] * vectors[key].shape[1])]
    return DatasetSpec(
        name=name,
        action_dim=episode.actions.shape[1],
        control_freq_hz=round(rate, 3),
        required_obs_keys=sorted(episode.frames),
        required_proprio_keys=keys,
        action_names=ref.action_names,
        proprio_names=None if None in names else names,
    )


def named_paths(data):
    """["g1=PATH", "PATH"] -> [(name, path)]; without a name it is the path's own."""
    pairs = []
    for word in data:
        name, equals, path = word.partition("=")
        plain = not equals or Path(word).exists() or "/" in name  # a folder may be called lr=0.1
        name = (Path(word).resolve().name or "data") if plain else name
        pairs.append((name.replace("$", ""), word if plain else path))  # $ begins a formula in figures
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise DataError(f"--data: two data sets are called {max(names, key=names.count)}: write NAME=PATH")
    return pairs


def episode_hash(episode):
    """A number in [0, 1) that depends on the episode's id alone."""
    return int.from_bytes(hashlib.sha256(episode.encode(errors="surrogateescape")).digest()[:8], "big") / 2**64


def select_ids(words, name, ids):
    """(those of `ids` that --val-episodes names for data set `name`, or None if it names none; parts that fit no id).

    words: 56-69,80 or g1=56-69,80. A number stands for the id that ends in it: 3 is also episode_003.
    """
    number = {identity: re.search(r"\d+$", identity) for identity in ids}
    found, unknown, named = set(), [], False
    for word in words:
        owner, equals, rest = word.partition("=")
        if equals and owner != name:
            continue
        named = True
        for part in (rest if equals else word).split(","):
            first, _, last = part.partition("-")
            hits = {part} & set(ids)
            if not hits and first.isdecimal() and (last or first).isdecimal():
                span = range(int(first), int(last or first) + 1)
                hits = {identity for identity, match in number.items() if match and int(match[0]) in span}
                if len(hits) > len(span):
                    raise DataError(f"--val-episodes {part}: fits several episodes of {name}, such as {min(hits)}")
            found |= hits
            if not hits and equals:
                raise DataError(f"--val-episodes {word}: no episode of {name} is called {part}")
            unknown += [] if hits else [part]
    return (found if named else None), unknown


def split(episodes, val_share=0.1, val_episodes=()):
    """(training, held out) of a list of episodes, per data set by name or by the hash of the id."""
    train, held, unknown = [], [], Counter()
    sources = list(dict.fromkeys(episode.source for episode in episodes))
    for word in val_episodes:
        if "=" in word and word.partition("=")[0] not in sources:
            raise DataError(f"--val-episodes {word}: no data set of that name, only {', '.join(sources)}")
    for name in sources:
        mine = [episode for episode in episodes if episode.source == name]
        wanted, missed = select_ids(val_episodes, name, [episode.id for episode in mine])
        unknown.update(list(dict.fromkeys(missed)))
        if wanted is None:
            wanted = {episode.id for episode in mine if episode_hash(episode.id) < val_share}
            if val_share > 0 and len(wanted) in (0, len(mine)):
                # too few episodes for a share: hold out the one with the smallest hash, unless it is the only one
                first = min(mine, key=lambda episode: episode_hash(episode.id)).id
                wanted = {first} if len(mine) > 1 else set()
        held += [episode for episode in mine if episode.id in wanted]
        train += [episode for episode in mine if episode.id not in wanted]
    for part, count in unknown.items():
        if count == len(sources):
            raise DataError(f"--val-episodes: no episode is called {part}; the first one is {episodes[0].id}")
    if not train:
        raise DataError("--val-share, --val-episodes: every episode is held out, none is left to train on")
    return train, held


def describe(spec, state_index=None):
    """Lines on what the policy sees, in the order in which it sees it."""
    lines = [
        f"cameras in this order: {', '.join(f'{name} <- {key}' for name, key in spec.cameras.items())}",
        f"state: {', '.join(spec.required_proprio_keys)}; actions ({spec.action_type}): {', '.join(spec.names)}",
    ]
    if state_index is not None:
        absolute = [name for name, index in zip(spec.names, state_index, strict=True) if index < 0]
        lines.append(f"actions are relative to the state; absolute: {', '.join(absolute) or 'none'}")
    return lines


def split_of(data, spec, train, held_out):
    """What a checkpoint's data.json holds."""
    parts = dict(train=train, held_out=held_out)
    digests = {name: {episode.key: episode.digest() for episode in part} for name, part in parts.items()}
    return dict(data=data, spec=vars(spec), **digests)


def restore_split(episodes, saved, spec):
    """(training, held out, lines on what changed) as a checkpoint's data.json has them; new episodes are not used."""
    there, lines = {episode.key: episode for episode in episodes}, []
    other = [name for name, value in vars(spec).items() if saved["spec"].get(name) != value]
    if other:
        lines.append(f"warning: the spec has changed: {', '.join(other)}")
    parts = [[there[key] for key in saved[part] if key in there] for part in ("train", "held_out")]
    before = {**saved["train"], **saved["held_out"]}
    changed = [key for key, digest in before.items() if key in there and there[key].digest() != digest]
    for text, keys in (
        ("are gone", [key for key in before if key not in there]),
        ("have changed", changed),
        ("are new and not used: a resumed run keeps its episodes", [key for key in there if key not in before]),
    ):
        if keys:
            lines.append(f"warning: {len(keys)} episodes {text}, such as {keys[0]}")
    if not parts[0]:
        raise DataError("--resume: none of the episodes that the run was trained on is in --data (other NAMEs?)")
    return *parts, lines


def open_data(data, spec=None, max_episodes=None, say=print):
    """(spec, episodes) of the flags' words, read and checked for shape. All data sets share one spec.

    Episodes with a missing file are named and left out; any other fault is an error.
    """
    pairs = named_paths(data)
    spec = spec if isinstance(spec, DatasetSpec) else find_spec(pairs[0][1], spec)
    refs = [ref for name, path in pairs for ref in list_episodes(name, path)][:max_episodes]
    episodes, missing = [], []
    for ref in refs:
        try:
            episodes.append(check_episode(ref.load(spec), spec, *episodes[:1]))
        except MissingFile as error:
            missing.append(f"{ref.id} ({error})")
    if missing:
        say(f"{len(missing)} of {len(refs)} episodes lack a file and are left out, such as {missing[0]}")
    if not episodes:
        raise DataError(f"--data {' '.join(data)}: every episode lacks a file, such as {missing[0]}")
    notes = Counter((episode.source, note) for episode in episodes for note in episode.notes)
    for (source, note), count in notes.items():
        say(f"{source}: {note} ({count} episodes)")
    return spec, episodes


def check_episode(episode, spec, first=None):
    """The episode, if its arrays fit the spec, each other and the first episode; clipped where the spec says so."""
    if len(episode) == 0:
        raise DataError(f"{episode.name}: no steps")
    if episode.actions.shape[1] != spec.action_dim:
        raise DataError(f"{episode.name}: {episode.actions.shape[1]} action dims, but the spec has {spec.action_dim}")
    for key in spec.required_obs_keys:
        if key not in episode.frames:
            raise DataError(f"{episode.name}: `obs.{key}` is no camera (uint8 images or a video); list it as proprio")
    for key in spec.required_proprio_keys:
        if key not in episode.vectors:
            raise DataError(f"{episode.name}: `obs.{key}` is a camera; list it in required_obs_keys")
        here, there = (e.vectors[key].shape[1] for e in (episode, first or episode))
        if here != there:
            raise DataError(f"{episode.name}: `obs.{key}` has {here} dims, but {there} in {first.name}")
    dims = sum(episode.vectors[key].shape[1] for key in spec.required_proprio_keys)
    if spec.proprio_names and len(spec.proprio_names) != dims:
        raise DataError(f"the spec has {len(spec.proprio_names)} proprio_names for {dims} dims of the state")
    episode.check_lengths()
    if not spec.allow_nan:
        for name, array in [("actions", episode.actions), *episode.vectors.items()]:
            if not np.isfinite(array).all():
                step, dim = np.argwhere(~np.isfinite(array))[0]
                raise DataError(f"{episode.name}: {name} hold NaN or infinity at step {step}, dim {dim}")
    clipped = spec.clip(episode.actions).astype(np.float32)
    beyond = int((clipped != episode.actions).sum()) if spec.clip_actions and not spec.allow_nan else 0
    if beyond:
        episode.notes.append("actions beyond action_min or action_max are clipped to them (clip_actions)")
    episode.actions = clipped
    return episode


def data_hash(episodes):
    """One hash for a list of episodes: another order, value, text or file is another hash."""
    return hashlib.sha256("".join(episode.digest() for episode in episodes).encode()).hexdigest()[:16]
