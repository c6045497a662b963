"""Which episodes are held out: by the recording's own name, or by the flags; and what a checkpoint keeps of it."""

import hashlib
import re
import zlib
from pathlib import Path

import numpy as np

from common import DataError


def named_paths(data):
    """["g1=PATH", "PATH"] -> [(name, path)]; without a name it is the path's own. A path may hold `=`."""
    pairs = []
    for word in data:
        name, equals, path = word.partition("=")
        if not equals or not re.fullmatch(r"[\w.-]+", name) or Path(word).exists():
            name, path = re.sub(r"@.*", "", word) if word.startswith("hub:") else word, word
            name = Path(name.removeprefix("module:")).stem.replace("$", "") or "data"  # $ begins a formula in figures
        pairs.append((name, path))
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise DataError(f"--data: two sources are called {max(names, key=names.count)}: write NAME=PATH")
    return pairs


def per_source(values, names, flag):
    """["g1=30", "droid=15"] or ["30"] -> {name: "30"}; a bare value is for all other sources.

    Several values of one source are joined by commas: lists of episodes, and nothing else.
    """
    table = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if equals and name not in names:
            raise DataError(f"{flag} {value}: no source is called {name}; there are {', '.join(names)}")
        table.setdefault(name if equals else None, []).append(rest if equals else value)
    return {name: ",".join(found) for name in names if (found := table.get(name) or table.get(None))}


def held_out_ids(entries, ids):
    """Entries such as 56-69, 80 or ep_03 -> (ids that they name, entries that name none). 3 also finds ep_03."""
    number = {identity: int(found[0]) for identity in ids if (found := re.findall(r"\d+$", identity))}
    found, unknown = set(), []
    for entry in entries:
        first, dash, last = entry.partition("-")
        if entry in ids:
            named = {entry}
        elif first.isdecimal() and (last.isdecimal() if dash else True):
            named = {identity for identity, n in number.items() if int(first) <= n <= int(last or first)}
        else:
            named = set()
        found |= named
        unknown += [] if named else [entry]
    return found, unknown


def episode_hash(identity):
    """A number in [0, 1) that depends on the recording's own name alone: the same in every run and every folder."""
    return int.from_bytes(hashlib.sha256(identity.encode(errors="surrogateescape")).digest()[:8], "big") / 2**64


def fingerprints(source):
    """A checksum of each episode's actions: a recording is known again under any name."""
    parts = np.split(source.actions, source.start[1:])
    return [f"{zlib.crc32(np.ascontiguousarray(part).tobytes()):08x}" for part in parts]


def split_of(sources):
    """What a checkpoint keeps: {source: number of episodes, ids held out, checksums of those trained on}."""
    return {
        source.name: dict(
            episodes=len(source.ids),
            held_out=[source.ids[i] for i in np.flatnonzero(source.validation)],
            trained_on=[f for f, out in zip(fingerprints(source), source.validation, strict=True) if not out],
        )
        for source in sources
    }


def restore_split(sources, split):
    """Hold out what the checkpoint held out, in place. Returns a line for each source that has changed since."""
    lines = []
    for source in sources:
        before = split.get(source.name, dict(episodes=0, held_out=[]))
        source.validation = np.isin(source.ids, before["held_out"])
        if before["held_out"] and not source.validation.any():
            raise DataError(f"{source.name}: no episode that the run held out is there: other data, or other names")
        now = split_of([source])[source.name]
        if now != before:
            new = len(set(now["trained_on"]) - set(before.get("trained_on", ())))
            text = f"{now['episodes']} episodes, {before['episodes']} when the run began; new or changed: {new}"
            lines.append(f"{source.name}: {text}")
    return lines


def in_order(sources, before):
    """The sources in the order of a checkpoint's (dicts, see Config); DataError if they are others."""
    there = {source.name: source for source in sources}
    if set(there) != {known["name"] for known in before}:
        names = ", ".join(known["name"] for known in before)
        raise DataError(f"--resume: the run's data are called {names}, not {', '.join(there)}; --init takes in others")
    for known in before:
        source = there[known["name"]]
        here, then = (source.chunk, source.actions.shape[1]), (known["chunk"], known["action_dim"])
        if here != then:
            raise DataError(f"--resume: chunks of {source.name} (steps, dims) are {here}, those of the run {then}")
    return [there[known["name"]] for known in before]
