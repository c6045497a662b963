"""Pairs (frame t, frame t + gap) of whole clips in WebDataset shards.

A batch is a dict: frames (B 2 S S 3) uint8, the first and the second of each pair; actions (B A) float32, what the
robot did in between, and has_actions (B,) bool; when training also crop (B 3) and jitter (B 3) for `augment`, and if
any clip has one mask (B 2 S S) uint8, 255 where the robot is, and has_mask (B,) bool. The
global batch of a step depends on (seed, step) alone; a rank, a micro-step and a loader process take their part of it.
Each slot of the batch stays with one clip for a few steps, so that a clip is decoded once for several pairs.
"""

import itertools
import random
import sys

import numpy as np
import torch
import torch.nn.functional as F
from shards import episode_hash, to_rgb
from torch.utils.data import DataLoader, Dataset

from common import DataError, ignore_signals

WINDOW = 24  # a slot takes its pairs from so many neighbouring starts, so that long clips cost no more
THUMB = 16  # sides of the small pictures in which cuts and motion are seen
CUT, JUMP = 0.08, 6  # a scene cut: this mean change of thumbnails (of 1), and this many times the clip's usual one
LABELLED = 4  # with --label-share every fourth slot of a batch holds a labelled pair


# --- what lies between two frames


def same_scene(thumbs, starts, gap):
    """(n,) bool: which pairs (t, t + gap) cross no scene cut. thumbs (T THUMB THUMB 3) uint8, of all frames."""
    change = np.abs(np.diff(np.float32(thumbs), axis=0)).mean((1, 2, 3)) / 255  # T - 1
    usual = np.median(change) if len(change) else 0.0
    scene = np.cumsum(np.append(0, (change > CUT) & (change > JUMP * usual)))
    return scene[starts + gap] == scene[starts]


def between(clip, starts, gap):
    """What the robot did from `starts` to starts + gap, (n A): deltas summed, absolute actions subtracted, or None.

    None if the clip has no actions. The last dim of deltas (by custom the gripper) is summed like the others.
    """
    actions = clip.array("actions.npy")
    if actions is None:
        return None
    actions = actions.astype(np.float64)
    kind = clip.meta.get("actions", "delta")
    if kind not in ("delta", "absolute"):
        raise DataError(f"{clip}.json: actions {kind}, expected delta or absolute")
    if kind == "delta":
        actions = np.cumsum(actions, 0) - actions  # what was done before step t
    return (actions[starts + gap] - actions[starts]).astype(np.float32)


def read_window(clip, first, gap):
    """The pairs (t, t + gap) of WINDOW neighbouring starts that cross no cut: starts (n,), {row: frame} of them.

    The window goes round: after the clip's last start comes its first, so that every pair is drawn alike.
    """
    starts = np.unique((first + np.arange(WINDOW)) % (len(clip) - gap))
    rows = np.unique(starts[:, None] + np.arange(gap + 1))  # those in between show the cuts
    small = to_rgb(THUMB)
    thumbs, frames = zip(*clip.decode(rows, lambda frame: (small(frame), frame)), strict=True)
    whole = same_scene(np.stack(thumbs), np.searchsorted(rows, starts), gap)
    return starts[whole], dict(zip(rows.tolist(), frames, strict=True))


def read_pairs(clip, gap, limit, size):
    """Up to `limit` pairs of a clip, spread evenly, that cross no cut.

    Returns starts (n,), frames (n 2 S S 3) uint8, thumbnails (n 2 THUMB THUMB 3) uint8.
    """
    n = min(limit, len(clip) - gap)
    starts = ((np.arange(n) + 0.5) * (len(clip) - gap) / n).astype(int)  # the middles of n equal parts
    small, square, thumbs, kept = to_rgb(THUMB), to_rgb(size), [], {}
    wanted = {*starts.tolist(), *(starts + gap).tolist()}
    for row, frame in enumerate(clip.stream(lambda frame: frame)):
        thumbs.append(small(frame))
        if row in wanted:
            kept[row] = square(frame)
    thumbs = np.stack(thumbs)
    starts = starts[same_scene(thumbs, starts, gap)]
    frames = np.array([[kept[s], kept[s + gap]] for s in starts.tolist()], np.uint8)
    return starts, frames.reshape(-1, 2, size, size, 3), np.stack([thumbs[starts], thumbs[starts + gap]], 1)


def some(clips, most):
    """At most so many of the clips, by a hash of their keys: a stride would meet one camera of each episode only."""
    return clips if len(clips) <= most else sorted(clips, key=lambda clip: episode_hash(clip.key))[:most]


# --- training pairs


class TrainPairs(Dataset):
    """Item (step, first slot, end): those slots of the step's global batch.

    A slot keeps a window of a clip for `reuse` steps and takes another pair of it in each; slots change at different
    steps.
    """

    def __init__(self, sources, size, seed, reuse=8, crop=0.9, jitter=0.1, label_share=0.0):
        self.size, self.seed, self.reuse, self.crop, self.jitter = size, seed, reuse, crop, jitter
        self.cache, self.broken = {}, set()
        clips = [(source, clip) for source in sources for clip in source.train]
        self.pool, self.labelled, self.action_dim = self.with_ends(clips), None, 0
        self.masks = any("mask.npy" in clip.members for _, clip in clips)
        if label_share:
            has = [(source, clip) for source, clip in clips if is_labelled(clip, label_share)]
            has = [(source, clip) for source, clip in has if "actions.npy" in clip.members]
            if not has:
                raise DataError(f"--label-share {label_share:g}: no training episode within that share has actions")
            self.labelled, self.action_dim = self.with_ends(has), action_dim(sources)

    @staticmethod
    def with_ends(clips):
        """(clips, where the pairs of each end among all pairs): to draw a clip by its number of pairs."""
        return clips, np.cumsum([len(clip) - source.gap(clip) for source, clip in clips])

    def read(self, slot, turn):
        """`reuse` pairs of the clip that a slot has in this turn, as in a batch: frames (reuse 2 S S 3), actions ...

        A clip is drawn by its number of pairs, then one of its pairs and a window of starts around it. If that pair
        crosses a cut, or the clip is broken, another clip is drawn.
        """
        draw = np.random.default_rng([self.seed, 1, slot, turn])
        labelled = self.labelled is not None and slot % LABELLED == 0
        clips, ends = self.labelled if labelled else self.pool
        for _ in range(50):
            source, clip = clips[np.searchsorted(ends, draw.integers(ends[-1]), "right")]
            low, high = source.gaps(clip)
            gap = int(draw.integers(low, min(high, len(clip) - 1) + 1))
            start = draw.integers(len(clip) - gap)
            first = start - draw.integers(WINDOW)
            try:
                starts, frames = read_window(clip, first, gap)
                if start not in starts:
                    continue
                chosen = draw.choice(starts, self.reuse, replace=len(starts) < self.reuse)
                actions = between(clip, chosen, gap) if labelled else None
                rows = np.stack([chosen, chosen + gap], 1)  # reuse 2
                mask = read_mask(clip, rows, self.size) if self.masks else None
            except (OSError, DataError) as error:
                if str(clip) not in self.broken:
                    print(f"skipping a clip: {error}", file=sys.stderr, flush=True)
                self.broken.add(str(clip))
                continue
            known = actions is not None and actions.shape[1] == self.action_dim
            actions = actions if known else np.zeros((self.reuse, self.action_dim), np.float32)
            square = to_rgb(self.size)
            pairs = np.stack([[square(frames[row]) for row in pair] for pair in rows.tolist()])
            pairs = dict(frames=pairs, actions=actions, has_actions=np.full(self.reuse, known))
            return pairs | (dict(mask=mask[0], has_mask=np.full(self.reuse, mask[1])) if self.masks else {})
        raise DataError("50 clips in a row hold no pair to train on: they are broken, or every pair crosses a cut")

    def __getitem__(self, item):
        step, first, end = item
        samples = []
        for slot in range(first, end):
            turn, number = divmod(step + slot % self.reuse, self.reuse)
            if self.cache.get(slot, (None,))[0] != turn:
                self.cache[slot] = turn, self.read(slot, turn)
            draw = np.random.default_rng([self.seed, 2, step, slot]).random(6)
            samples.append({name: rows[number] for name, rows in self.cache[slot][1].items()} | dict(draw=draw))
        batch = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
        draw = batch.pop("draw").float()
        side = 1 - (1 - self.crop) * draw[:, :1]
        crop = torch.cat([side, draw[:, 1:3] * (1 - side)], 1)
        return batch | dict(crop=crop, jitter=1 + self.jitter * (2 * draw[:, 3:] - 1))


def read_mask(clip, rows, size):
    """Where the robot is in the frames `rows` (n 2), by KEY.mask.npy: (n 2 S S) uint8 up to 255, and whether known."""
    if "mask.npy" not in clip.members:
        return np.zeros((*rows.shape, size, size), np.uint8), False
    square = to_rgb(size)
    return np.array([[square(picture)[..., 0] for picture in pair] for pair in clip.mask(rows)]), True


def action_dim(sources):
    """A of the first training clip that has actions; clips with another one count as unlabelled."""
    for source in sources:
        for clip in source.train:
            if "actions.npy" in clip.members:
                return clip.array("actions.npy").shape[1]
    return 0


def is_labelled(clip, share):
    """Whether the clip's actions belong to the share that training may see."""
    return episode_hash(clip.episode, "labels") < share


def action_moments(sources, share):
    """Mean and standard deviation (A,) each of the actions that training may see; (0,) if the share is 0."""
    A, found = action_dim(sources), []
    if share == 0:
        return torch.zeros(0), torch.ones(0)
    for source in sources:
        for clip in [clip for clip in source.train if is_labelled(clip, share)][:256]:
            actions = between(clip, np.arange(len(clip) - source.gap(clip)), source.gap(clip))
            found += [actions] if actions is not None and actions.shape[1] == A else []
    if not found:
        raise DataError(f"--label-share {share:g}: no training episode within that share has actions")
    actions = torch.from_numpy(np.concatenate(found))
    return actions.mean(0), actions.std(0).clamp(min=1e-6)


def augment(batch):
    """A batch with frames (B 2 3 S S) float in [0, 1], both of a pair cropped and coloured alike, and mask (B 2 1 S S).

    crop (B 3): side, left, top of the window, of the image's side; jitter (B 3): brightness, contrast, saturation.
    """
    x = batch["frames"].permute(0, 1, 4, 2, 3).float() / 255  # B 2 3 S S
    if "mask" in batch:
        x = torch.cat([x, batch["mask"][:, :, None].float() / 255], 2)
    B, _, C, S, _ = x.shape
    if "crop" in batch:
        side, corner = batch["crop"][:, :1], batch["crop"][:, 1:]
        theta = torch.zeros(B, 2, 3, device=x.device)
        theta[:, 0, 0] = theta[:, 1, 1] = side[:, 0]
        theta[:, :, 2] = 2 * corner + side - 1  # centre of the window in [-1, 1]
        grid = F.affine_grid(theta, (B, 2 * C, S, S), align_corners=False)
        x = F.grid_sample(x.flatten(1, 2), grid, padding_mode="border", align_corners=False).view_as(x)
    x, mask = x[:, :, :3], x[:, :, 3:]
    if "jitter" in batch:
        brightness, contrast, saturation = (f.view(-1, 1, 1, 1, 1) for f in batch["jitter"].unbind(1))
        x = x * brightness
        x = x.mean((1, 2, 3, 4), keepdim=True).lerp(x, contrast)
        x = x.mean(2, keepdim=True).lerp(x, saturation).clamp(0, 1)
    kept = {name: batch[name] for name in ("actions", "has_actions", "has_mask") if name in batch}
    return dict(frames=x, **kept) | (dict(mask=mask) if "mask" in batch else {})


# --- validation pairs


class Validation:
    """About `limit` held-out pairs of a source (this rank's part), read once and kept; iterates over batches of 64.

    Pairs come in a random order, so that the next one is mostly of another clip. Clips that cannot be read are named
    and skipped.
    """

    def __init__(self, source, size, limit, rank=0, world=1):
        clips = some(source.validation, limit)
        each, self.rows, A = max(1, limit // len(clips)), [], action_dim([source])
        for clip in clips[rank::world]:
            try:
                starts, frames, _ = read_pairs(clip, source.gap(clip), each, size)
                actions = between(clip, starts, source.gap(clip))
            except (OSError, DataError) as error:
                print(f"skipping a held-out clip: {error}", file=sys.stderr, flush=True)
                continue
            known = actions is not None and actions.shape[1] == A
            actions = actions if known else np.zeros((len(starts), A), np.float32)
            self.rows += zip(frames, actions, [known] * len(starts), strict=True)
        random.Random(0).shuffle(self.rows)

    def __iter__(self):
        for first in range(0, len(self.rows), 64):
            columns = [np.stack(column) for column in zip(*self.rows[first : first + 64], strict=True)]
            yield dict(zip(("frames", "actions", "has_actions"), map(torch.from_numpy, columns), strict=True))


def prepare_dataloaders(
    sources, batch_size, size, seed=0, steps=1000, first=0, accum=1, rank=0, world=1, workers=0, val_pairs=256,
    pin_memory=False, **pairs,
):  # fmt: skip
    """(iterator over this rank's micro-batches of the steps first to steps - 1, {source name: Validation})."""
    local, parts = batch_size // (accum * world), max(1, workers)
    if local < parts:
        raise DataError(f"--workers {workers}: a micro-batch has only {local} pairs")
    edges = np.linspace(0, local, parts + 1).astype(int).tolist()

    def items():  # a micro-batch in parts, one per loader process
        for step in range(first, steps):
            for micro in range(accum):
                start = (micro * world + rank) * local
                yield from ((step, start + a, start + b) for a, b in itertools.pairwise(edges))

    dataset = TrainPairs(sources, size, seed, **pairs)
    # a generator of its own: else the loader draws from the one that noise is drawn from
    more = dict(generator=torch.Generator(), worker_init_fn=ignore_signals, pin_memory=pin_memory)
    stream = iter(DataLoader(dataset, batch_size=None, sampler=items(), num_workers=workers, **more))

    def batches():
        for part in stream:
            rest = [next(stream) for _ in range(parts - 1)]  # always the same slots from the same process
            yield {key: torch.cat([piece[key] for piece in (part, *rest)]) for key in part} if rest else part

    held = [source for source in sources if source.validation]
    return batches(), {s.name: Validation(s, size, val_pairs, rank, world) for s in held}
