"""Clips and their labels: which a run uses, which it holds out, and what the model keeps of their statistics."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from model import ActionConfig, LatentConfig, VLAConfig
from shards import episode_hash, held_out, read_clips

from common import DataError

MEMBERS = dict(latents="latents.npz", actions="actions.npy")


@dataclass
class Source:
    """The usable clips of one --data word, split by episode."""

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
        pairs.append((name, path) if equals and not Path(word).exists() else (Path(word).resolve().name, word))
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise DataError(f"--data: two sources are called {max(names, key=names.count)}: write NAME=PATH")
    return pairs


def read_sources(data, kind, labels=None, val_share=0.1, val_episodes=(), instruction=None, say=print):
    """The sources of --data words whose clips teach `kind`.

    labels: their folders of label shards. instruction: for clips that have none. val_episodes: IDS or NAME=IDS, such as
    56-69,80. What cannot be used is named with the reason.
    """
    pairs, sources, wanted = named_paths(data), [], {}
    if kind == "latents" and not labels:
        raise DataError("--labels is needed: the folders that laq/label.py wrote, one for each word of --data")
    if labels and len(labels) != len(pairs):
        raise DataError(f"--labels names {len(labels)} folders, --data {len(pairs)}: one each, in the same order")
    for word in val_episodes:
        name, equals, ids = word.rpartition("=")
        if equals and name not in dict(pairs):
            raise DataError(f"--val-episodes {word}: no source is called {name}; there are {', '.join(dict(pairs))}")
        wanted |= {name: ids} if equals else dict.fromkeys(dict(pairs), ids)
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
        if codebook.shape != (N, K, C):
            raise ValueError(f"the codebook has shape {codebook.shape}, expected {(N, K, C)}")
        sizes = dict(codebook_size=K, code_seq_len=N, code_dim=C)
        return dict(**sizes, gap=int(about["gap"]), codebook=codebook.tolist())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: not there; --labels wants the folder that laq/label.py writes") from None
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: needs codebook_size, code_seq_len, code_dim, gap and codebook ({error})") from None


def read_latents(clip, labels):
    """codes (T', N) int64, vectors (T', N, C) float32, valid (T',) bool, False across a cut; T' = T - gap."""
    found, name = clip.archive("latents.npz"), f"{clip.members['latents.npz'][0]}:{clip.key}.latents.npz"
    try:
        codes, vectors, gap = found["codes"].astype(np.int64), found["vectors"].astype(np.float32), int(found["gap"])
        valid = found["valid"].astype(bool) if "valid" in found else np.ones(len(codes), bool)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{name}: needs codes, vectors and gap ({error})") from None
    shape = max(0, len(clip) - gap), labels["code_seq_len"], labels["code_dim"]
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


def few(clips, episodes, seed):
    """The clips of `episodes` episodes; a smaller number's are among a larger one's."""
    order = sorted({clip.episode for clip in clips}, key=lambda name: episode_hash(name, salt=f"{seed}:"))
    if len(order) < episodes:
        raise DataError(f"--episodes {episodes}: there are only {len(order)} training episodes")
    chosen = set(order[:episodes])
    return [clip for clip in clips if clip.episode in chosen]


def split_of(sources):
    """What a checkpoint keeps of the data: {source: its number of episodes, the names of those held out}."""
    table = {}
    for source in sources:
        episodes = len({clip.episode for clip in source.train + source.validation})
        table[source.name] = dict(episodes=episodes, held_out=source.held_out)
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
        before = split.get(source.name, dict(episodes=0, held_out=[]))
        hold_out(source, before["held_out"])
        if before["episodes"] != now["episodes"]:
            lines.append(f"{source.name}: {now['episodes']} episodes, {before['episodes']} when the run began")
    return lines


def split_for_report(source, split):
    """Hold out what the checkpoint did if this is the run's own data under any name; new data are held out whole.

    Returns a line that tells which.
    """
    names = {clip.episode for clip in source.train + source.validation}
    own = [one for one in split.values() if one["episodes"] == len(names) and names.issuperset(one["held_out"])]
    own = [split[source.name]] if source.name in split else own
    hold_out(source, own[0]["held_out"] if own else sorted(names))
    return f"{source.name}: {'the episodes that training held out' if own else 'new data, all episodes'} are measured"


# --- what the model keeps of the data


def collect(read, clips, limit=1000, say=print):
    """[read(clip)] of at most about `limit` clips, spread evenly. Those that cannot be read are named and left out."""
    found, error = [], None
    for clip in clips[:: max(1, len(clips) // limit)]:
        try:
            found.append(read(clip))
        except (OSError, DataError) as problem:
            say(f"skipping a clip: {(error := problem)}")
    if not found:
        raise DataError(f"no clip can be read: {error}")
    return found


def check_labels(sources, known):
    """A DataError unless all sources were labelled with the codebook of `known`. Gaps may differ, as rates do.

    known: LatentConfig's fields, or None for a model without a latent head, which no source may teach.
    """
    if bool(sources) != bool(known):
        raise DataError("--videos: a run goes on with them if it began with them, and only then")
    for source in sources:
        for name in ("code_seq_len", "codebook_size", "code_dim", "codebook"):
            if source.labels[name] != known[name]:
                other = f"{source.name} was labelled by another model ({name} differs)"
                raise DataError(f"--labels: {other}: label all sources with one tokenizer")


def describe_latents(sources, say=print):
    """model.LatentConfig's fields but the target: sizes, codebook, and mean, std, weight (N, C) of the vectors.

    weight: each dim's share of its position's variance. A tokenizer's vectors vary in few dims, and the noise of the
    others is not worth learning.
    """
    first = {name: value for name, value in sources[0].labels.items() if name != "gap"}
    check_labels(sources, first)
    pairs = {id(clip): (clip, source.labels) for source in sources for clip in source.train}.values()
    vectors = np.concatenate(collect(lambda pair: read_latents(*pair)[1], [*pairs], say=say))
    mean, std = vectors.mean(0), np.maximum(vectors.std(0), 1e-6)
    weight = std**2 / (std**2).sum(1, keepdims=True)
    return first | dict(mean=mean.tolist(), std=std.tolist(), weight=weight.tolist())


def baselines(source, say=print):
    """Accuracies on the held-out frames of predictors that see neither image nor instruction: {metric: value}.

    majority: each position's most frequent code. bigram: the most frequent code after the true code of the position
    before (first position: its most frequent). Both are counted on training clips, as is the most frequent action.
    """

    def valid_codes(clip):
        codes, _, valid = read_latents(clip, source.labels)
        return codes[valid]

    K, N = source.labels["codebook_size"], source.labels["code_seq_len"]
    known, held = (np.concatenate(collect(valid_codes, clips, say=say)) for clips in (source.train, source.validation))
    top = np.array([np.bincount(known[:, n], minlength=K).argmax() for n in range(N)])
    majority = held == top
    bigram = majority.copy()
    for n in range(1, N):
        counts = np.zeros((K, K), int)
        np.add.at(counts, (known[:, n - 1], known[:, n]), 1)
        bigram[:, n] = counts.argmax(1)[held[:, n - 1]] == held[:, n]
    actions, counts = np.unique(known, axis=0, return_counts=True)
    exact = (held == actions[counts.argmax()]).all(1).mean()
    return dict(majority_accuracy=majority.mean(), bigram_accuracy=bigram.mean(), majority_exact_match=exact)


def describe_actions(sources, chunk_size, bins=0, use_state=False, say=print):
    """model.ActionConfig's fields: dims, chunk size, and the normalisation fitted on the training episodes.

    Each dim's 1 % and 99 % quantile goes to -1 and 1, nothing is clipped. bins: edges at quantiles, as in LAPA, and
    each bin's mean (A, W).
    """
    clips = [clip for source in sources for clip in source.train]

    def rows_of(extension):
        def read(clip):
            if extension not in clip.members:
                raise DataError(f"{clip}: has no {extension}, which --state needs")
            return clip.array(extension)

        arrays = collect(read, clips, say=say)
        dims = {array.shape[1] for array in arrays}
        if len(dims) > 1:
            raise DataError(f"--data: clips with {sorted(dims)} dims in {extension}: train one robot at a time")
        return np.concatenate(arrays)

    def normalisation(rows):
        low, high = np.quantile(rows.astype(np.float64), [0.01, 0.99], axis=0)
        smallest = 1e-6 * np.maximum(1, np.abs(rows).max(0))  # below it a dim is constant, and the rest is rounding
        span = np.where(high - low > smallest, high - low, np.ptp(rows, 0))  # a rare event's own range
        return ((low + high) / 2).tolist(), (np.where(span > smallest, span, 2.0) / 2).tolist()

    rows = rows_of("actions.npy")
    center, scale = normalisation(rows)
    about = dict(action_dim=rows.shape[1], chunk_size=chunk_size, center=center, scale=scale, bins=bins)
    if bins:
        edges = np.quantile(rows, np.linspace(0, 1, bins + 1)[1:-1], axis=0).T  # A W-1
        values = np.empty((rows.shape[1], bins))
        for a, column in enumerate(rows.T):
            which = np.searchsorted(edges[a], column, side="right")
            for b in range(bins):  # an empty bin: the edge below it
                values[a, b] = column[which == b].mean() if (which == b).any() else edges[a][max(b - 1, 0)]
        about |= dict(edges=edges.tolist(), values=values.tolist())
    if use_state:
        rows = rows_of("state.npy")
        center, scale = normalisation(rows)
        about |= dict(state_dim=rows.shape[1], state_center=center, state_scale=scale)
    return about


def finetune_config(args, robots, videos, say):
    """The VLAConfig of stage 3: that of --init, or a new one, with a command head and, for --videos, a latent head."""
    config = VLAConfig.from_pretrained(args.init) if args.init else VLAConfig()
    before, config.latent = config.latent, None
    if videos:
        config.latent = LatentConfig(**describe_latents(videos, say), target=before.target if before else "vectors")
        if before and before.codebook == config.latent.codebook:
            config.latent = before  # with the statistics that its head was trained with
        config.num_queries = config.num_queries if args.init else config.latent.code_seq_len
    action = ActionConfig(**describe_actions(robots, args.chunk, args.bins, args.state, say))
    if args.keep_head:
        if config.action is None:
            raise DataError(f"--keep-head: {args.init} has no command head")
        for name in ("action_dim", "state_dim"):
            old, new = getattr(config.action, name), getattr(action, name)
            if old != new:
                raise DataError(f"--keep-head: {args.init} has {name} {old}, --data {new}")
        action = config.action
    changes = dict(action=action, lora_rank=args.lora_rank)
    changes |= dict(prompt=args.prompt or config.prompt, image_size=args.image_size or config.image_size)
    return replace(config, **changes)
