"""Pairs (frame t, frame t + gap) of whole clips in WebDataset shards.

A batch is a dict: frames (B, 2, S, S, 3) uint8, the first and the second of each pair; actions (B, A) float32, what the
robot did in between, and labelled (B,) bool, whether that is known; when training also crop (B, 3) and jitter (B, 3)
for `augment`. The global batch of a step depends on (seed, step) alone; a rank, a micro-step and a loader process take
their share of it. Each of the batch's slots stays with one clip for a few steps, so that a clip is decoded once for
several pairs and a step decodes only few clips.
"""

import hashlib
import re
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from shards import pictures, read_clips
from torch.utils.data import DataLoader, Dataset

WINDOW = 24  # a slot takes its pairs from so many neighbouring frames and the gap, so that long clips cost no more
THUMB = 32  # sides of the small pictures that cuts and motion are seen in
CUT, JUMP = 0.08, 6  # a scene cut: this mean difference of thumbnails (of 1), and this many times the clip's usual one


@dataclass
class Source:
    """The clips of one --data word that hold at least one pair, split by episode."""

    name: str
    train: list
    validation: list
    low: float  # the gap's range, in frames or (seconds=True) in seconds
    high: float
    seconds: bool
    short: int = 0  # clips shorter than the gap
    weight: float = 1.0

    def gaps(self, clip):
        """The smallest and the largest gap of a clip, in frames, at least 1."""
        rate = clip.meta["fps"] if self.seconds else 1
        low = max(1, round(self.low * rate))
        return low, max(low, round(self.high * rate))

    def middle(self, clip):
        """The middle of that range: the gap of validation, labels and reports."""
        return sum(self.gaps(clip)) // 2


# --- flags: NAME=PATH, gaps, split


def named_paths(data):
    """["g1=PATH", "PATH"] -> [(name, path)]; without a name it is the path's own."""
    pairs = [word.partition("=") for word in data]
    return [
        (name, path) if equals else (re.split(r"[/\\]", name.rstrip("/"))[-1], name) for name, equals, path in pairs
    ]


def named(values, names, flag):
    """["g1=30", "droid=15"] or ["30"] -> {name: "30"}; one bare value is for all."""
    table = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if equals and name not in names:
            raise ValueError(f"{flag} {value}: no source is called {name}; there are {', '.join(names)}")
        table.update({name: rest} if equals else dict.fromkeys(names, value))
    return table


def parse_gap(text):
    """3 (frames), 0.6s, or a range 0.4s-1.2s -> (low, high, in seconds?)."""
    found = re.fullmatch(r"(\d+|\d*\.?\d+s)(?:-(\d+|\d*\.?\d+s))?", text)
    if not found or (found[2] and found[1].endswith("s") != found[2].endswith("s")):
        raise ValueError(f"--gap {text}: expected frames (3), seconds (0.6s) or a range (0.4s-1.2s)")
    low, high = (float(part.rstrip("s")) for part in (found[1], found[2] or found[1]))
    if not 0 < low <= high:
        raise ValueError(f"--gap {text}: must be above 0, the smaller number first")
    return low, high, found[1].endswith("s")


def episode_hash(source, episode):
    """A number in [0, 1) that depends on the two names alone."""
    digest = hashlib.sha256(f"{source}/{episode}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def identity(clip):
    """What the split knows a clip by: all cameras of an episode go to the same side."""
    return clip.meta["source"], clip.meta["episode"]


def split(clips, share, wanted, name):
    """(training clips, validation clips): `wanted` episodes such as 56-69,80, or about `share` of them by hash."""
    if wanted is not None:
        ids = set()
        for word in wanted.split(","):
            first, dash, last = word.partition("-")
            number = first.isdigit() and last.isdigit() and dash
            ids |= {str(n) for n in range(int(first), int(last) + 1)} if number else {word}
        known = {clip.meta["episode"] for clip in clips}
        if ids - known:
            raise ValueError(f"--val-episodes {name}: no episode is called {sorted(ids - known)[0]}")
        held = {identity(clip) for clip in clips if clip.meta["episode"] in ids}
    else:
        hashes = {identity(clip): episode_hash(*identity(clip)) for clip in clips}
        held = {key for key, number in hashes.items() if number < share}
        if len(hashes) > 1 and (len(held) == len(hashes) or (share > 0 and not held)):
            held = {min(hashes, key=hashes.get)}  # too few episodes for a share: the one with the smallest hash
        held = held if len(hashes) > 1 else set()
    train = [clip for clip in clips if identity(clip) not in held]
    if not train:
        raise ValueError(f"--val-episodes {name}: every episode is held out, none is left")
    return train, [clip for clip in clips if identity(clip) in held]


def read_sources(data, gap, val_share=0.1, val_episodes=(), weights=(), say=print):
    """The sources of the flags' words. data: NAME=PATH or PATH; gap: 0.6s, 3 or g1=18; weights: 1 or g1=2.

    Without weights every pair is as likely as any other, whatever source it is in.
    """
    pairs = named_paths(data)
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"--data: two sources are called {max(names, key=names.count)}: write NAME=PATH")
    held, gap = named(val_episodes, names, "--val-episodes"), named(gap, names, "--gap")
    weights, sources = named(weights, names, "--weights"), []
    for name, path in pairs:
        clips = read_clips(path, say)
        source = Source(name, [], [], *parse_gap(gap.get(name, "0.6s")))
        source.train, source.validation = split(clips, val_share, held.get(name), name)
        for part in ("train", "validation"):
            whole = [clip for clip in getattr(source, part) if clip.meta["length"] > source.gaps(clip)[0]]
            source.short += len(getattr(source, part)) - len(whole)
            setattr(source, part, whole)
        if not source.train:
            raise ValueError(f"--data {path}: its {len(clips)} clips are all shorter than the gap ({gap.get(name)})")
        try:
            source.weight = float(weights.get(name, sum(clip.meta["length"] for clip in source.train)))
        except ValueError:
            raise ValueError(f"--weights {name}={weights[name]}: not a number") from None
        if not source.weight >= 0:
            raise ValueError(f"--weights {name}={weights[name]}: must not be negative")
        sources.append(source)
    if not sum(source.weight for source in sources) > 0:
        raise ValueError("--weights: at least one must be above 0")
    return sources


# --- what lies between two frames


def thumbnails(frames):
    """Frames (T, S, S, 3) uint8 -> (T, 3, 16, 16) in [0, 1]: enough to see cuts and motion."""
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    return F.adaptive_avg_pool2d(x, 16)


def scene_cuts(small):
    """(T,) bool: True where frame t belongs to another scene than frame t - 1. small: thumbnails (T, 3, 16, 16)."""
    change = (small[1:] - small[:-1]).abs().mean((1, 2, 3))
    usual = change.median() if len(change) else 0.0
    return F.pad((change > CUT) & (change > JUMP * usual), (1, 0)).numpy()


def pair_starts(frames, gap, min_motion=0.0):
    """(T - gap,) bool: which t make a pair (t, t + gap) that crosses no cut and moves enough.

    min_motion: least mean absolute difference of the two thumbnails, of 1.
    """
    small = thumbnails(frames)
    scene = np.cumsum(scene_cuts(small))
    motion = (small[gap:] - small[:-gap]).abs().mean((1, 2, 3)).numpy()
    return (scene[gap:] == scene[:-gap]) & (motion >= min_motion)


def between(clip, starts, gap):
    """What the robot did from `starts` to starts + gap, (n, A): deltas summed, absolute actions subtracted.

    None if the clip has no actions. The last dim of deltas (by custom the gripper) is summed like the others.
    """
    actions = clip.array("actions.npy")
    if actions is None:
        return None
    if actions.ndim != 2 or len(actions) != clip.meta["length"]:
        raise ValueError(f"{clip}.actions.npy: shape {actions.shape}, expected ({clip.meta['length']}, A)")
    actions = actions.astype(np.float64)
    if clip.meta.get("actions", "delta") == "delta":
        actions = np.cumsum(actions, 0) - actions  # what was done before step t
    return (actions[starts + gap] - actions[starts]).astype(np.float32)


# --- training pairs


class TrainPairs(Dataset):
    """Item (step, first slot, end): those slots of the step's global batch.

    Slot p keeps a clip for `reuse` steps and takes another pair of it in each; slots change clips at different steps.
    """

    def __init__(self, sources, size, seed, reuse=8, min_motion=0.0, crop=0.9, jitter=0.1, label_share=0.0):
        self.sources, self.size, self.seed, self.reuse = sources, size, seed, reuse
        self.min_motion, self.crop, self.jitter, self.label_share = min_motion, crop, jitter, label_share
        weights = np.array([source.weight for source in sources])
        self.share = weights / weights.sum()
        self.chance = []
        for source in sources:
            pairs = np.array([clip.meta["length"] - source.gaps(clip)[0] for clip in source.train], float)
            self.chance.append(pairs / pairs.sum())
        self.actions = action_width(sources) if label_share else 0
        self.held, self.broken = {}, set()

    def prepare(self, slot, turn):
        """`reuse` pairs of the clip of a slot's turn-th turn: frames (reuse, 2, S, S, 3), actions, labelled."""
        draw = np.random.default_rng([self.seed, 1, slot, turn])
        for _ in range(50):
            source = draw.choice(len(self.sources), p=self.share)
            clip = self.sources[source].train[draw.choice(len(self.chance[source]), p=self.chance[source])]
            low, high = self.sources[source].gaps(clip)
            gap = int(draw.integers(low, min(high, clip.meta["length"] - 1) + 1))
            begin = int(draw.integers(0, max(1, clip.meta["length"] - gap - WINDOW + 1)))
            try:
                end = min(begin + WINDOW + gap, clip.meta["length"])
                thumb, square = pictures(THUMB), pictures(self.size)  # only few are wanted in full
                frames = clip.decoded(begin, end, lambda frame, thumb=thumb: (thumb(frame), frame))
                good = np.flatnonzero(pair_starts(np.stack([small for small, _ in frames]), gap, self.min_motion))
                if len(good) == 0:
                    continue
                starts = draw.choice(good, self.reuse, replace=len(good) < self.reuse)
                known = self.actions and seen(clip, self.label_share)
                moves = between(clip, begin + starts, gap) if known else None
            except (OSError, ValueError) as error:
                if str(clip) not in self.broken:
                    print(f"passing over a clip: {error}", file=sys.stderr, flush=True)
                self.broken.add(str(clip))
                continue
            labelled = moves is not None and moves.shape[1] == self.actions
            moves = moves if labelled else np.zeros((self.reuse, self.actions), np.float32)
            pairs = np.stack([square(frames[t][1]) for start in starts for t in (start, start + gap)])
            return pairs.reshape(self.reuse, 2, *pairs.shape[1:]), moves, labelled
        raise ValueError("50 clips in a row hold no pair to train on: lower --min-motion, or look at the data")

    def __getitem__(self, item):
        step, first, end = item
        frames, actions, labelled = [], [], []
        for slot in range(first, end):
            turn, number = divmod(step + slot % self.reuse, self.reuse)
            if self.held.get(slot, (None,))[0] != turn:
                self.held[slot] = turn, *self.prepare(slot, turn)
            _, pairs, moves, known = self.held[slot]
            frames.append(pairs[number])
            actions.append(moves[number])
            labelled.append(known)
        draw = [np.random.default_rng([self.seed, 2, step, slot]).random(6) for slot in range(first, end)]
        draw = torch.tensor(np.array(draw), dtype=torch.float32)
        scale = 1 - (1 - self.crop) * draw[:, :1]
        corner = draw[:, 1:3] * (1 - scale)
        return dict(
            frames=torch.from_numpy(np.stack(frames)),
            actions=torch.from_numpy(np.stack(actions)),
            labelled=torch.tensor(labelled),
            crop=torch.cat([scale, corner], 1),
            jitter=1 + self.jitter * (2 * draw[:, 3:] - 1),
        )


def action_width(sources):
    """A of the first clip that has actions, over all sources; clips with another width count as unlabelled."""
    for source in sources:
        for clip in source.train:
            actions = clip.array("actions.npy")
            if actions is not None and actions.ndim == 2:
                return actions.shape[1]
    return 0


def action_moments(sources, share):
    """Mean and standard deviation (A,) each of the moves whose labels may be seen, from up to 256 clips."""
    width, moves = action_width(sources), []
    for source in sources:
        for clip in [clip for clip in source.train if seen(clip, share)][:256]:
            gap = source.gaps(clip)[0]
            found = between(clip, np.arange(clip.meta["length"] - gap), gap)
            if found is not None and found.shape[1] == width:
                moves.append(found)
    if not moves:
        raise ValueError(f"--label-share {share:g}: no training clip within that share has actions")
    moves = torch.from_numpy(np.concatenate(moves))
    return moves.mean(0), moves.std(0).clamp(min=1e-6)


def seen(clip, share):
    """Whether the clip's actions belong to the share that training may see."""
    return episode_hash("labels", "/".join(identity(clip))) < share


def augment(batch):
    """frames of a training batch -> (B, 2, 3, S, S) float in [0, 1], both of a pair cropped and coloured alike.

    crop (B, 3): side, left, top of the window, of the image's side; jitter (B, 3): brightness, contrast, saturation.
    """
    x = batch["frames"].permute(0, 1, 4, 2, 3).float() / 255  # B 2 3 S S
    B, _, _, S, _ = x.shape
    if "crop" in batch:
        side, corner = batch["crop"][:, :1], batch["crop"][:, 1:]
        shift = 2 * corner + side - 1  # centre of the window in [-1, 1]
        theta = torch.zeros(B, 2, 3, device=x.device)
        theta[:, 0, 0] = theta[:, 1, 1] = side[:, 0]
        theta[:, :, 2] = shift
        grid = F.affine_grid(theta, (B, 6, S, S), align_corners=False)
        x = F.grid_sample(x.flatten(1, 2), grid, padding_mode="border", align_corners=False).view_as(x)
        brightness, contrast, saturation = (f.view(-1, 1, 1, 1, 1) for f in batch["jitter"].unbind(1))
        x = x * brightness
        x = x.mean((1, 2, 3, 4), keepdim=True).lerp(x, contrast)
        x = x.mean(2, keepdim=True).lerp(x, saturation).clamp(0, 1)
    return dict(frames=x, actions=batch["actions"], labelled=batch["labelled"])


# --- validation pairs


def validation_pairs(source, size, limit, codes, rank=0, world=1):
    """This rank's share of about `limit` pairs spread evenly over a source's held-out clips: [frames], [move], [draw].

    The gap is the middle of its range. draw: `codes` random numbers that depend on the clip and the pair alone. Broken
    clips are named and passed over.
    """
    each = max(1, limit // max(1, len(source.validation)))
    step = max(1, len(source.validation) // limit)
    pairs, moves, draws = [], [], []
    for number, clip in list(enumerate(source.validation[::step]))[rank::world]:
        gap = min(source.middle(clip), clip.meta["length"] - 1)
        try:
            frames = clip.frames(size)
            good = np.flatnonzero(pair_starts(frames, gap))
            starts = good[np.linspace(0, len(good) - 1, min(each, len(good))).astype(int)] if len(good) else good
            found = between(clip, starts, gap)
        except (OSError, ValueError) as error:
            print(f"passing over a clip: {error}", file=sys.stderr, flush=True)
            continue
        pairs += list(np.stack([frames[starts], frames[starts + gap]], 1))
        moves += [None] * len(starts) if found is None else list(found)
        draws += list(np.random.default_rng(number).random((len(starts), codes)))
    return pairs, moves, draws


class Validation:
    """The held-out pairs of one source, decoded once and kept; iterates over batches of 64, augmented by nothing.

    In a batch also draw (B, codes) in [0, 1), what random codes are made of.
    """

    def __init__(self, source, size, limit=256, rank=0, world=1, actions=0, codes=1):
        self.frames, moves, self.draws = validation_pairs(source, size, limit, codes, rank, world)
        fits = [move is not None and len(move) == actions for move in moves]
        none = np.zeros(actions, np.float32)
        self.moves = [move if fit else none for move, fit in zip(moves, fits, strict=True)]
        self.labelled = fits

    def __len__(self):
        return len(self.frames)

    def __iter__(self):
        for first in range(0, len(self.frames), 64):
            part = slice(first, first + 64)
            yield dict(
                frames=torch.from_numpy(np.stack(self.frames[part])),
                actions=torch.from_numpy(np.stack(self.moves[part])),
                labelled=torch.tensor(self.labelled[part]),
                draw=torch.from_numpy(np.stack(self.draws[part])),
            )


def gauges(table, N, K, started):
    """Health of the codes from a table of pairs: mean squared errors of the decoded frame, of the frame decoded from
    random codes and of "nothing moves"; N codes; A moves (NaN: unknown). All over held-out pairs, so call it once.

    Returns metrics and (moves (n, A), codes (n, N)), or () without moves. mse; psnr and its gain over "nothing moves",
    dB; once the codes have started also delta_psnr, true against random codes (Genie); usage, share of the codes that
    at least 1 pair in 10 K chooses; perplexity of each slot (at most K) and of whole words; commonest, the share of
    the commonest word; action_r2, what a linear map of the codes tells of the moves' variance, mean over dims, adjusted
    for the number of codes (evaluate.py probes across episodes).
    """
    psnr = -10 * table[:, :3].mean(0).clamp(min=1e-10).log10()
    metrics = dict(mse=table[:, 0].mean().item(), psnr=psnr[0].item(), gain=(psnr[0] - psnr[2]).item())
    if not started or not len(table):
        return metrics, ()
    codes, moves = table[:, 3 : 3 + N].long(), table[:, 3 + N :]
    share = F.one_hot(codes, K).float().mean(0)  # N K
    words = torch.unique(codes, dim=0, return_counts=True)[1] / len(codes)
    metrics |= dict(delta_psnr=(psnr[0] - psnr[1]).item(), usage=(share > 0.1 / K).float().mean().item())
    perplexity = torch.special.entr(share).sum(1).exp()
    metrics |= {f"perplexity_{slot}": value.item() for slot, value in enumerate(perplexity)}
    metrics |= dict(words=torch.special.entr(words).sum().exp().item(), commonest=words.max().item())
    known = moves.isfinite().all(1) & (moves.shape[1] > 0)
    codes, moves = codes[known], moves[known]
    if len(moves) < 2 or not (moves.std(0) > 0).any():
        return metrics, ()
    moves = moves[:, moves.std(0) > 0]
    x = F.pad(F.one_hot(codes, K).flatten(1), (0, 1), value=1).double()
    y = ((moves - moves.mean(0)) / moves.std(0, correction=0)).double()
    off = y - x @ torch.linalg.lstsq(x, y, driver="gelsd").solution  # the slots' columns each sum to 1: not full rank
    free = len(y) - 1 - (share > 0).sum().item() + N
    if free > 0:
        metrics["action_r2"] = 1 - off.square().mean().item() * (len(y) - 1) / free
    return metrics, (moves.numpy(), codes.numpy())


def prepare_dataloaders(
    sources,
    batch_size,
    size,
    seed=0,
    steps=1000,
    first=0,
    accum=1,
    rank=0,
    world=1,
    workers=0,
    val_pairs=256,
    codes=1,
    **pairs,
):
    """(iterator over this rank's micro-batches of the steps first to steps - 1, {source name: Validation}).

    With several loader processes each makes a part of every micro-batch, always of the same slots.
    """
    if batch_size % (accum * world):
        raise ValueError(f"--batch-size {batch_size} is not divisible by {accum} micro-steps x {world} processes")
    dataset = TrainPairs(sources, size, seed, **pairs)
    share, parts = batch_size // (accum * world), max(1, workers)
    if share < parts:
        raise ValueError(f"--workers {workers}: a micro-batch has only {share} pairs")
    edges = np.linspace(0, share, parts + 1).astype(int)
    items = [
        (step, int((micro * world + rank) * share + a), int((micro * world + rank) * share + b))
        for step in range(first, steps)
        for micro in range(accum)
        for a, b in zip(edges[:-1], edges[1:], strict=True)
    ]
    stream = iter(DataLoader(dataset, batch_size=None, sampler=items, num_workers=workers))  # here, for it draws a seed

    def batches():
        for part in stream:
            rest = [next(stream) for _ in range(parts - 1)]
            yield {key: torch.cat([piece[key] for piece in (part, *rest)]) for key in part} if rest else part

    held = [source for source in sources if source.validation]
    validation = {s.name: Validation(s, size, val_pairs, rank, world, action_width([s]), codes) for s in held}
    return batches(), validation
