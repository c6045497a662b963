"""Which clips a run uses and which it holds out: shards.py reads clips, data.py makes batches of them."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from shards import clip_marks, held_out, owner, read_clips

from common import DataError

MEMBERS = dict(latents="latents.npz", actions="actions.npy")


@dataclass
class Source:
    """The usable clips of one entry of --data, split by episode."""

    name: str
    kind: str  # latents or actions: what its clips teach
    labels: dict | None  # labels.json, where it teaches latents
    train: list
    validation: list
    held_out: list  # names of the episodes that validation keeps


# --- reading


def named_paths(words):
    """NAME=PATH or PATH -> [(name, path)]. A path is named by its last part; it may hold = itself."""
    pairs = []
    for word in words:
        name, equals, path = word.partition("=")
        named = equals and "/" not in name and not Path(word).exists()
        pairs.append((name, path) if named else (Path(word).resolve().name, word))
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise DataError(f"--data: two sources are called {max(names, key=names.count)}: write NAME=PATH")
    return pairs


def named(values, names, flag):
    """["g1=3", "droid=5"] or ["3"] -> {name: "3"}; a bare value is for all other sources.

    Several values of one source are joined by commas: lists of episodes, and nothing else.
    """
    table = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if equals and name not in names:
            raise DataError(f"{flag} {value}: no source is called {name}; there are {', '.join(names)}")
        table.setdefault(name if equals else None, []).append(rest if equals else value)
    return {name: ",".join(found) for name in names if (found := table.get(name) or table.get(None))}


def read_sources(data, kind, labels=None, val_share=0.1, val_episodes=(), instruction=None, say=print):
    """The sources of the entries of --data, with those clips that teach `kind`.

    labels: their folders of label shards. instruction: for clips that have none. val_episodes: IDS or NAME=IDS, such as
    56-69,80. What cannot be used is named with the reason.
    """
    pairs, sources = named_paths(data), []
    wanted = named(val_episodes, [name for name, _ in pairs], "--val-episodes")
    if kind == "latents" and not labels:
        raise DataError("--labels is needed: the folders that laq/label.py wrote, one for each entry of --data")
    if labels and len(labels) != len(pairs):
        raise DataError(f"--labels names {len(labels)} folders, --data {len(pairs)}: one each, in the same order")
    for (name, path), folder in zip(pairs, labels or [None] * len(pairs), strict=True):
        about = read_labels(folder) if kind == "latents" else None
        clips, usable, reasons = read_clips(path, folder, say), [], {}
        held = held_out(clips, val_share, wanted.get(name, ""))  # of all clips, as in every stage
        for clip in clips:
            clip.meta["instruction"] = clip.meta["instruction"].strip() or instruction
            if reason := unusable(clip, kind, about):
                reasons.setdefault(reason, []).append(clip)
            else:
                usable.append(clip)
        for reason, left in reasons.items():
            say(f"{name}: {len(left)} of {len(clips)} clips left out: {reason} (the first is {left[0]})")
        if not usable:
            raise DataError(f"--data {path}: no clip can be used: {', '.join(reasons)}")
        sources.append(Source(name, kind, about, usable, [], []))
        hold_out(sources[-1], held)
        if not sources[-1].train:
            raise DataError(f"--data {path}: every usable episode is held out, none is left to train on")
    return sources


def unusable(clip, kind, labels):
    """Why a clip cannot teach `kind`, or None."""
    if MEMBERS[kind] not in clip.members:
        cure = "label these shards with laq/label.py" if kind == "latents" else "no commands to learn"
        return f"has no {MEMBERS[kind]}: {cure}"
    if not clip.meta["instruction"]:
        return "has no instruction: --instruction TEXT gives one"
    return None if num_rows(clip, labels) > 0 else "is not longer than the gap of its labels"


def num_rows(clip, labels):
    """Frames that can be drawn: all, or those whose later frame, a gap on, is in the clip."""
    return len(clip) - (labels["gap"] if labels else 0)


def read_labels(folder):
    """labels.json beside label shards: codebook_size K, code_seq_len N, code_dim C, gap in frames, codebook (N, K, C).

    A codebook (K, C) in the file is every position's.
    """
    path = Path(folder) / "labels.json"
    try:
        about = json.loads(path.read_text())
        K, N, C = (int(about[name]) for name in ("codebook_size", "code_seq_len", "code_dim"))
        codebook = np.array(about["codebook"], float)
        codebook = np.stack([codebook] * N) if codebook.ndim == 2 else codebook
        if codebook.shape != (N, K, C) or not np.isfinite(codebook).all():
            raise ValueError(f"the codebook has shape {codebook.shape}, expected {(N, K, C)} finite numbers")
        if (gap := int(about["gap"])) < 1:
            raise ValueError(f"gap is {gap}")
        return dict(codebook_size=K, code_seq_len=N, code_dim=C, gap=gap, codebook=codebook.tolist())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: not there; --labels wants the folder that laq/label.py writes") from None
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: needs codebook_size, code_seq_len, code_dim, gap and codebook ({error})") from None


def read_latents(clip, labels):
    """codes (T', N) int64, vectors (T', N, C) float32, valid (T',) bool, False across a cut; T' = T - gap."""
    found, name = clip.archive("latents.npz"), f"{clip.members['latents.npz'][0]}:{clip.key}.latents.npz"
    try:
        codes, vectors, gap = found["codes"], found["vectors"].astype(np.float32), int(found["gap"])
        valid = found["valid"].astype(bool) if "valid" in found else np.ones(len(codes), bool)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{name}: needs codes, vectors and gap ({error})") from None
    if codes.dtype.kind not in "iu" or not 0 < gap <= labels["gap"]:  # a gap in seconds differs with the rate
        raise DataError(f"{name}: {codes.dtype} codes, gap {gap}; expected whole numbers, gap {labels['gap']} at most")
    codes, shape = codes.astype(np.int64), (max(0, len(clip) - gap), labels["code_seq_len"], labels["code_dim"])
    if codes.shape != shape[:2] or vectors.shape != shape or valid.shape != shape[:1]:
        shapes = f"codes {codes.shape}, vectors {vectors.shape}; expected vectors {shape} for a gap of {gap}"
        raise DataError(f"{name}: {shapes}: label these shards again")
    if codes.size and not 0 <= codes.min() <= codes.max() < labels["codebook_size"]:
        raise DataError(f"{name}: code {codes.max()}, but labels.json has a codebook of {labels['codebook_size']}")
    if not np.isfinite(vectors).all():
        raise DataError(f"{name}: vectors hold NaN or infinity")
    if not valid.any():
        raise DataError(f"{name}: has no pair within one scene")
    return codes, vectors, valid


def split_of(sources):
    """What a checkpoint keeps of the data: {source: its number of episodes, those held out, clip_marks}."""
    table = {}
    for source in sources:
        clips = source.train + source.validation
        episodes = len({clip.episode for clip in clips})
        table[source.name] = dict(episodes=episodes, held_out=source.held_out, clips=clip_marks(clips))
    return table


def hold_out(source, names):
    """Hold out these episodes of a source and no others, in place."""
    clips, source.held_out, held = source.train + source.validation, names, set(names)
    source.train = [clip for clip in clips if clip.episode not in held]
    source.validation = [clip for clip in clips if clip.episode in held]


def restore_split(sources, split):
    """Hold out what the checkpoint held out, in place. Returns a line for each source that has changed since."""
    lines = []
    for source, now in zip(sources, split_of(sources).values(), strict=True):
        clips = source.train + source.validation
        before = split.get(source.name) or owner(source.name, clips, split) or dict(episodes=0, held_out=[])
        hold_out(source, before["held_out"])
        if before["episodes"] != now["episodes"]:
            lines.append(f"{source.name}: {now['episodes']} episodes, {before['episodes']} when the run began")
    return lines


def split_for_report(source, split):
    """Hold out what the checkpoint did if this is the run's own data under any name; new data are held out whole.

    Returns a line that tells which.
    """
    clips = source.train + source.validation
    own = owner(source.name, clips, split)
    hold_out(source, own["held_out"] if own else sorted({clip.episode for clip in clips}))
    return f"{source.name}: {'the episodes that training held out' if own else 'new data, all episodes'} are measured"
