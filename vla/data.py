"""Single frames with their instruction and what belongs to them: latent actions, or a chunk of robot commands.

A batch is a dict. From here: images (list of B arrays (S, S, 3) uint8), instructions (B texts), state (B, S)
float32, codes (B, N) int64, vectors (B, N, D) float32, has_latents (B,) bool, actions (B, H, A) float32 in robot
units, mask (B, H) bool (False past the episode's end), has_actions (B,) bool. `prepare` (the model's processor)
turns images and instructions into the backbone's own tensors. What a run does not use is absent. The global batch
of a step depends on (seed, step) alone; a rank, a micro-step and a loader process take their share. Each of the
batch's slots stays with one clip for a few steps, so that a clip is read once for several samples.
"""

import hashlib
import sys
from dataclasses import dataclass

import numpy as np
import torch
from shards import read_clips, read_vocabulary
from torch.utils.data import DataLoader, Dataset


@dataclass
class Source:
    """The clips of one --data word, split by episode. kind: latents or actions, what they are there to teach."""

    name: str
    kind: str
    labels: dict | None  # labels.json of a source with latents
    train: list
    validation: list


def episode_hash(source, episode, salt=""):
    """A number in [0, 1) that depends on the names alone."""
    digest = hashlib.sha256(f"{salt}{source}/{episode}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def named_paths(words):
    """NAME=PATH or PATH -> (name, path); a path names itself by its last part."""
    for word in words:
        name, equals, path = word.partition("=")
        yield (name, path) if equals else (word.rstrip("/").rpartition("/")[2], word)


def split(clips, share, wanted, name):
    """(training clips, validation clips): the episodes `wanted`, or about `share` of them by hash."""
    if wanted:
        missing = set(wanted) - {clip.meta["episode"] for clip in clips}
        if missing:
            raise ValueError(f"--val-episodes: {name} has no episode {sorted(missing)[0]}")
        held = {clip.identity for clip in clips if clip.meta["episode"] in wanted}
    else:
        hashes = {clip.identity: episode_hash(*clip.identity) for clip in clips}
        held = {who for who, number in hashes.items() if number < share}
        if share > 0 and len(hashes) > 1 and len(held) in (0, len(hashes)):
            held = {min(hashes, key=hashes.get)}  # too few episodes for a share: the one with the smallest hash
    train = [clip for clip in clips if clip.identity not in held]
    if not train:
        raise ValueError(f"--val-episodes: all episodes of {name} are held out, none is left to train on")
    return train, [clip for clip in clips if clip.identity in held]


def few(clips, episodes, seed):
    """The clips of `episodes` episodes; a smaller number's are among a larger one's."""
    order = sorted({clip.identity for clip in clips}, key=lambda who: episode_hash(*who, salt=f"{seed}:"))
    if len(order) < episodes:
        raise ValueError(f"--episodes {episodes}: there are only {len(order)} training episodes")
    chosen = set(order[:episodes])
    return [clip for clip in clips if clip.identity in chosen]


def read_sources(data, kind, labels=None, val_share=0.1, val_episodes=(), instruction=None):
    """The sources of --data words whose clips have latents (kind "latents", `labels` their folders) or actions.

    instruction: the text for clips that have none; without it such a clip is an error.
    """
    pairs, sources = list(named_paths(data)), []
    labels = labels or [None] * len(pairs)
    if len(labels) != len(pairs):
        raise ValueError(f"--labels names {len(labels)} folders, --data {len(pairs)}: one each, in the same order")
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("--data: two sources have the same name: write NAME=PATH")
    member = "latents.npz" if kind == "latents" else "actions.npy"
    for (name, path), folder in zip(pairs, labels, strict=True):
        clips, about = read_clips(path, folder), read_vocabulary(folder) if kind == "latents" else None
        with_member = [clip for clip in clips if member in clip.members]
        if len(with_member) < len(clips) and (kind == "latents" or not with_member):
            clip = next(clip for clip in clips if member not in clip.members)
            where = (
                "label these shards with laq/label.py and give --labels"
                if kind == "latents"
                else "no commands to learn"
            )
            raise ValueError(f"{clip}: has no {member}: {where}")
        for clip in with_member:
            clip.meta["instruction"] = str(clip.meta.get("instruction") or "").strip() or instruction
            if not clip.meta["instruction"]:
                raise ValueError(f"{clip}.json: has no instruction; --instruction TEXT gives one to clips without")
            clip.labels = about
            clip.rows = np.flatnonzero(clip.latents()[2]) if about else np.arange(clip.meta["length"])
        whole = [clip for clip in with_member if len(clip.rows)]
        if not whole:
            raise ValueError(f"--data {path}: every clip is shorter than the gap of its labels")
        sources.append(Source(name, kind, about, *split(whole, val_share, val_episodes, name)))
    return sources


def describe_latents(sources):
    """What the model keeps of the labels: vocabulary, codes, dim, gap, codebook; each vector's mean, spread and weight.

    weight (N, C): each dim's share of its slot's variance. A tokenizer's vectors vary in few dims, and the noise of the
    others is not worth learning.
    """
    about = sources[0].labels
    for source in sources:
        if source.labels != about:
            raise ValueError(f"--labels: {source.name} and {sources[0].name} were labelled by different models")
    clips = [clip for source in sources for clip in source.train]
    chosen = np.random.default_rng(0).permutation(len(clips))[:1000]  # enough for two moments
    vectors = np.concatenate([clips[i].latents()[1] for i in chosen])
    center, scale = vectors.mean(0), np.maximum(vectors.std(0), 1e-6)
    weight = scale**2 / (scale**2).sum(1, keepdims=True)
    return about | dict(center=center.tolist(), scale=scale.tolist(), weight=weight.tolist())


def references(source):
    """What one gets without looking, on the held-out frames: {metric: value}.

    majority: each slot's most frequent code. bigram: the most frequent code after the one that the slot before it
    truly has (the first slot: its most frequent). Both counted on training clips; word: the most frequent word.
    """
    K, N = source.labels["vocabulary"], source.labels["codes"]
    known, held = (
        np.concatenate([clip.latents()[0][clip.rows] for clip in clips[:: max(1, len(clips) // 1000)]])
        for clips in (source.train, source.validation)
    )
    best = np.array([np.bincount(known[:, n], minlength=K).argmax() for n in range(N)])
    right = held == best
    pairs = right.copy()
    for n in range(1, N):
        counts = np.zeros((K, K), int)
        np.add.at(counts, (known[:, n - 1], known[:, n]), 1)
        pairs[:, n] = counts.argmax(1)[held[:, n - 1]] == held[:, n]
    words, counts = np.unique(known, axis=0, return_counts=True)
    word = (held == words[counts.argmax()]).all(1).mean()
    return dict(majority_accuracy=right.mean(), bigram_accuracy=pairs.mean(), majority_word_accuracy=word)


def describe_actions(sources, chunk, bins=0, use_state=False):
    """What the model keeps of the commands: dims, chunk, and the normalisation fitted on the training episodes.

    Each dim's 1 % and 99 % quantile goes to -1 and 1, nothing is clipped; bins: edges at quantiles, as in LAPA, and
    each bin's mean (A, bins).
    """

    def gather(extension):
        clips = [clip for source in sources for clip in source.train]
        arrays = [clip.array(extension) for clip in clips if extension in clip.members]
        if len(arrays) < len(clips):
            raise ValueError(f"--state: some clips of {sources[0].name} have no {extension}")
        if len({array.shape[1] for array in arrays}) > 1:
            raise ValueError(f"{extension}: clips with different dims: {sorted({array.shape[1] for array in arrays})}")
        return np.concatenate(arrays)

    def scaled(rows):
        low, high = np.quantile(rows.astype(np.float64), [0.01, 0.99], axis=0)
        span = np.where(high - low > 1e-6, high - low, np.maximum(rows.max(0) - rows.min(0), 0))  # a rare event's own
        return (low + high) / 2, np.where(span > 1e-6, span, 2.0) / 2

    rows = gather("actions.npy")
    center, scale = scaled(rows)
    about = dict(dims=rows.shape[1], chunk=chunk, center=center.tolist(), scale=scale.tolist(), bins=bins, state=0)
    if bins:
        edges = np.quantile(rows, np.linspace(0, 1, bins + 1)[1:-1], axis=0).T  # A bins-1
        which = np.stack([np.searchsorted(edge, rows[:, a], side="right") for a, edge in enumerate(edges)], 1)
        means = [
            [
                rows[which[:, a] == b, a].mean() if (which[:, a] == b).any() else edges[a][max(b - 1, 0)]
                for b in range(bins)
            ]
            for a in range(rows.shape[1])
        ]
        about |= dict(edges=edges.tolist(), values=np.array(means, float).tolist())
    if use_state:
        state = gather("state.npy")
        center, scale = scaled(state)
        about |= dict(state=state.shape[1], state_center=center.tolist(), state_scale=scale.tolist())
    return about


# --- samples


def shift_and_jitter(image, draw, shift, jitter):
    """A copy moved by up to `shift` of its side (edges repeated), recoloured by up to `jitter`; draw: 5 in [0, 1)."""
    size = len(image)
    reach = round(shift * size)
    top, left = (draw[:2] * (2 * reach + 1)).astype(int) - reach
    rows, cols = (np.clip(np.arange(size) + move, 0, size - 1) for move in (top, left))
    x = image[rows][:, cols].astype(np.float32)
    brightness, contrast, saturation = 1 + jitter * (2 * draw[2:] - 1)
    x = x * brightness
    x = x.mean() + contrast * (x - x.mean())
    grey = x.mean(2, keepdims=True)
    return (grey + saturation * (x - grey)).clip(0, 255).astype(np.uint8)


def take(clip, rows, kind, size, shape):
    """Samples of a clip: a dict per row. shape: (N, D, H, A, S), what an absent field is padded to."""
    N, D, H, A, S = shape
    images = clip.frames(rows, size)
    state = clip.array("state.npy")[rows] if S and "state.npy" in clip.members else np.zeros((len(rows), S), np.float32)
    codes, vectors = np.zeros((len(rows), N), np.int64), np.zeros((len(rows), N, D), np.float32)
    actions, mask = np.zeros((len(rows), H, A), np.float32), np.zeros((len(rows), H), bool)
    if kind == "latents":
        found, values, _ = clip.latents()
        codes, vectors = found[rows], values[rows]
    else:
        recorded = clip.array("actions.npy")
        steps = np.asarray(rows)[:, None] + np.arange(H)
        mask = steps < len(recorded)
        actions = recorded[np.minimum(steps, len(recorded) - 1)]
    if state.shape[1] != S or actions.shape[2] != A:
        raise ValueError(f"{clip}: {actions.shape[2]} action and {state.shape[1]} state dims, expected {A} and {S}")
    for i in range(len(rows)):
        yield dict(
            images=images[i],
            instructions=clip.meta["instruction"],
            state=state[i],
            codes=codes[i],
            vectors=vectors[i],
            has_latents=kind == "latents",
            actions=actions[i],
            mask=mask[i],
            has_actions=kind == "actions",
        )


def stack(samples):
    """A list of samples -> a batch without `prepare`'s tensors; fields that no sample has are left out."""
    batch = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        listed = name in ("images", "instructions")
        batch[name] = values if listed else torch.from_numpy(np.stack([np.asarray(value) for value in values]))
    unused = [
        name for name, value in batch.items() if torch.is_tensor(value) and value.ndim > 1 and value.shape[-1] == 0
    ]
    return {name: value for name, value in batch.items() if name not in unused}


class TrainSamples(Dataset):
    """Item (step, first slot, end): the samples of those slots of the step's global batch.

    Slot p keeps a clip for `reuse` steps; slots change clips at different steps. A share `latent_share` of the slots,
    evenly spread, draws from the sources with latents, the others from those with actions.
    """

    def __init__(self, sources, size, shape, seed, latent_share=1.0, shift=0.0, jitter=0.0, reuse=4):
        self.size, self.shape, self.seed, self.latent_share = size, shape, seed, latent_share
        self.shift, self.jitter, self.reuse = shift, jitter, reuse
        self.pools = {}
        for kind in ("latents", "actions"):
            clips = [clip for source in sources if source.kind == kind for clip in source.train]
            sizes = np.array([len(clip.rows) for clip in clips], float)
            self.pools[kind] = clips, sizes / max(sizes.sum(), 1)
        self.held, self.broken = {}, set()

    def prepare(self, slot, turn):
        """`reuse` samples of the clip that `slot` has in this turn. An unreadable clip is named and passed over."""
        latent = int((slot + 1) * self.latent_share) > int(slot * self.latent_share)
        kind = "latents" if latent else "actions"
        clips, chance = self.pools[kind]
        draw = np.random.default_rng([self.seed, 1, slot, turn])
        for _ in range(50):
            clip = clips[draw.choice(len(clips), p=chance)]
            rows = draw.choice(clip.rows, self.reuse, replace=len(clip.rows) < self.reuse)
            try:
                return list(take(clip, rows, kind, self.size, self.shape))
            except (OSError, ValueError) as error:
                if str(clip) not in self.broken:
                    print(f"passing over a clip: {error}", file=sys.stderr, flush=True)
                self.broken.add(str(clip))
        raise ValueError(f"50 clips in a row cannot be read, the last is {clip}")

    def __getitem__(self, item):
        step, first, end = item
        samples = []
        for slot in range(first, end):
            turn, number = divmod(step + slot % self.reuse, self.reuse)
            if self.held.get(slot, (None,))[0] != turn:
                self.held[slot] = turn, self.prepare(slot, turn)
            sample = dict(self.held[slot][1][number])
            draw = np.random.default_rng([self.seed, 2, step, slot]).random(5)
            sample["images"] = shift_and_jitter(sample["images"], draw, self.shift, self.jitter)
            samples.append(sample)
        return samples


def validation_batches(source, size, shape, limit, batch_size, prepare, rank=0, world=1):
    """This rank's share of about `limit` samples spread evenly over a source's held-out clips, read once, in batches.

    All ranks get equally many: under FSDP they must call the model equally often.
    """
    N, D, H, A, S = shape
    shape = (N, D, 0, 0, S) if source.kind == "latents" else (0, 0, H, A, S)
    clips = source.validation[:: max(1, len(source.validation) // limit)]
    each = max(1, limit // len(clips))
    wanted = [
        (clip, row)
        for clip in clips
        for row in clip.rows[np.linspace(0, len(clip.rows) - 1, min(each, len(clip.rows))).astype(int)]
    ]
    wanted = wanted * world if len(wanted) < world else wanted[: len(wanted) // world * world]
    rows = {}
    for clip, row in wanted[rank::world]:
        rows.setdefault(str(clip), (clip, []))[1].append(row)
    samples = [sample for clip, chosen in rows.values() for sample in take(clip, chosen, source.kind, size, shape)]
    groups = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    return [finish(stack(group), prepare) for group in groups]


def finish(batch, prepare):
    """Images and instructions become the backbone's tensors."""
    tensors = prepare(batch.pop("images"), batch.pop("instructions"))
    return batch | tensors


def prepare_dataloaders(
    sources,
    prepare,
    batch_size,
    size,
    shape,
    seed=0,
    steps=1000,
    first=0,
    accum=1,
    rank=0,
    world=1,
    workers=0,
    val_samples=512,
    latent_share=1.0,
    **more,
):
    """(iterator over this rank's micro-batches of the steps first to steps - 1, {source name: validation batches}).

    size: side of the frames given to `prepare(images, instructions)`; shape: (codes, dim, chunk, action dims, state
    dims).
    """
    if batch_size % (accum * world):
        raise ValueError(f"--batch-size {batch_size} is not divisible by {accum} micro-steps x {world} processes")
    dataset = TrainSamples(sources, size, shape, seed, latent_share, **more)
    share, parts = batch_size // (accum * world), max(1, workers)
    edges = np.linspace(0, share, parts + 1).astype(int)
    items = [
        (step, int((micro * world + rank) * share + a), int((micro * world + rank) * share + b))
        for step in range(first, steps)
        for micro in range(accum)
        for a, b in zip(edges[:-1], edges[1:], strict=True)
    ]
    own = torch.Generator()  # else the loader draws from the generator that dropout is drawn from
    loader = DataLoader(dataset, batch_size=None, sampler=items, num_workers=workers, collate_fn=list, generator=own)

    def batches():
        stream = iter(loader)
        for part in stream:  # each loader process makes a part of every micro-batch, always of the same slots
            for _ in range(parts - 1):
                part = part + next(stream)
            yield finish(stack(part), prepare)

    validation = {}
    for source in sources:
        if source.validation:
            ready = validation_batches(source, size, shape, val_samples, share, prepare, rank, world)
            validation[source.name] = ready
    return batches(), validation
