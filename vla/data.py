"""Statistics of the clips, and batches of single frames with their instruction and what they teach.

A batch is a dict: the backbone's own tensors (model.Preprocessor makes them from images and instructions, in loader
processes); state (B, S) float32; and either codes (B, N) int64, vectors (B, N, C) float32, or actions (B, H, A) float32
in robot units, mask (B, H) bool (False past the episode's end). The global batch of a step depends on (seed, step)
alone; a rank and a micro-step take their part.
"""

import os

import numpy as np
import torch
from sources import num_rows, read_latents
from torch.utils.data import DataLoader, Dataset

from common import DataError, ignore_signals

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader processes are forked

# --- statistics


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
    """A DataError unless all sources were labelled with the codebook of `known` (LatentConfig's fields).

    Gaps may differ, as rates do.
    """
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

    def valid_vectors(pair):
        _, vectors, valid = read_latents(*pair)
        return vectors[valid]

    vectors = np.concatenate(collect(valid_vectors, [*pairs], say=say))
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
    parts = source.train or source.validation, source.validation  # new data have nothing to train on
    known, held = (np.concatenate(collect(valid_codes, clips, say=say)) for clips in parts)
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


def describe_actions(sources, chunk_size, use_state=False, say=print):
    """model.ActionConfig's fields: dims, chunk size, and the normalisation fitted on the training episodes.

    Each dim's 1 % and 99 % quantile goes to -1 and 1, nothing is clipped.
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
    about = dict(action_dim=rows.shape[1], chunk_size=chunk_size, center=center, scale=scale)
    if use_state:
        rows = rows_of("state.npy")
        center, scale = normalisation(rows)
        about |= dict(state_dim=rows.shape[1], state_center=center, state_scale=scale)
    return about


# --- batches


def shift_and_jitter(image, draw, strength=1.0):
    """A copy moved by up to 6 % of its side (edges repeated) and recoloured by up to 10 %, times strength.

    image (S, S, 3) uint8; draw: 5 numbers in [0, 1): down, right, brightness, contrast, saturation.
    """
    size = len(image)
    reach = round(0.06 * strength * size)
    down, right = (draw[:2] * (2 * reach + 1)).astype(int) - reach
    rows, columns = (np.clip(np.arange(size) + move, 0, size - 1) for move in (down, right))
    x = image[rows][:, columns].astype(np.float32)
    brightness, contrast, saturation = 1 + 0.1 * strength * (2 * draw[2:] - 1)
    x = x * brightness
    x = x.mean() + contrast * (x - x.mean())
    grey = x.mean(2, keepdims=True)
    return (grey + saturation * (x - grey)).clip(0, 255).astype(np.uint8)


class Batches(Dataset):
    """What training and validation batches share. pool: (clip, its source); ends: rows up to and with each clip."""

    def __init__(self, pool, preprocess, config):
        self.pool, self.preprocess, self.config = pool, preprocess, config
        self.ends = np.cumsum([num_rows(clip, source.labels) for clip, source in pool])
        self.broken, self.latents = set(), {}

    def read(self, frame):
        """The sample of frame number `frame` of all, or None if its clip is broken, which is named once."""
        number = int(np.searchsorted(self.ends, frame, side="right"))
        clip, source = self.pool[number]
        try:
            return self.take(clip, source, int(frame - self.ends[number]) + num_rows(clip, source.labels))
        except (OSError, DataError) as error:
            if str(clip) not in self.broken:
                print(f"skipping a clip: {error}", flush=True)
            self.broken.add(str(clip))

    def take(self, clip, source, row):
        """The sample of one frame as a dict of arrays; source.kind says what it teaches."""
        sample, config = {}, self.config
        if source.kind == "latents":
            codes, vectors, valid = self.latents_of(clip, source.labels)
            rows = np.flatnonzero(valid)
            row = rows[row * len(rows) // num_rows(clip, source.labels)]  # all valid rows are drawn alike
            sample |= dict(codes=codes[row], vectors=vectors[row])
        else:
            recorded, A = clip.array("actions.npy"), config.action.action_dim
            if recorded.shape[1] != A:
                raise DataError(f"{clip}: {recorded.shape[1]} action dims, expected {A}")
            steps = row + np.arange(config.action.chunk_size)
            sample |= dict(actions=recorded[np.minimum(steps, len(recorded) - 1)], mask=steps < len(recorded))
            if S := config.action.state_dim:
                state = clip.array("state.npy")
                if state is None or state.shape[1] != S:
                    raise DataError(f"{clip}: {0 if state is None else state.shape[1]} state dims, expected {S}")
                sample["state"] = state[row]
        texts = clip.meta.get("instructions")  # paraphrases
        texts = texts if isinstance(texts, list) and texts else [clip.meta["instruction"]]
        return sample | dict(image=clip.frames(config.image_size, [row])[0], instruction=[*map(str, texts)])

    def latents_of(self, clip, labels):
        """read_latents; the last 300 clips' are kept, as opening an archive takes longer than decoding an image."""
        place = clip.members["latents.npz"]  # not the clip: it may be there twice, with the labels of two gaps
        if place not in self.latents:
            if len(self.latents) >= 300:
                self.latents.clear()
            self.latents[place] = read_latents(clip, labels)
        return self.latents[place]

    def collate(self, samples):
        """Samples -> a batch of tensors."""
        images, instructions = ([sample.pop(name) for sample in samples] for name in ("image", "instruction"))
        batch = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
        return batch | self.preprocess(images, instructions)


class TrainBatches(Batches):
    """Item i: the local batch of micro-step i % accum of step i // accum. Every frame of all sources is drawn alike."""

    def __init__(self, pool, preprocess, config, batch_size, seed=0, accum=1, rank=0, world=1, augment=1.0):
        super().__init__(pool, preprocess, config)
        self.local_batch_size, self.seed, self.accum = batch_size // (accum * world), seed, accum
        self.rank, self.world, self.augment = rank, world, augment

    def __getitem__(self, index):
        step, micro = divmod(index, self.accum)
        first = (micro * self.world + self.rank) * self.local_batch_size
        return self.collate([self.sample(step, i) for i in range(first, first + self.local_batch_size)])

    def sample(self, step, number):
        """Sample `number` of a step's global batch."""
        draw = np.random.default_rng([self.seed, step, number])
        for _ in range(50):
            if sample := self.read(draw.integers(self.ends[-1])):
                *moves, which = draw.random(6)
                sample["image"] = shift_and_jitter(sample["image"], np.array(moves), self.augment)
                sample["instruction"] = sample["instruction"][int(which * len(sample["instruction"]))]
                return sample
        raise DataError(f"50 clips in a row cannot be read: {sorted(self.broken)[0]} is one of them")


class ValidationBatches(Batches):
    """About `limit` held-out frames of one source, spread evenly over its clips; this rank's, in batches.

    All ranks have equally many: under FSDP they must call the model equally often.
    """

    def __init__(self, pool, preprocess, config, limit, batch_size, rank=0, world=1):
        super().__init__(pool, preprocess, config)
        frames = np.linspace(0, self.ends[-1] - 1, max(world, min(limit, self.ends[-1]))).astype(int)
        frames = frames[: len(frames) // world * world][rank::world]
        self.batches = [frames[i : i + batch_size] for i in range(0, len(frames), batch_size)]

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.collate([self.sample(frame) for frame in self.batches[index]])

    def sample(self, frame):
        """That frame's sample; where its clip is broken, one of the next clip that is not."""
        for _ in range(50):
            if sample := self.read(frame):
                return sample | dict(instruction=sample["instruction"][0])
            frame = self.ends[np.searchsorted(self.ends, frame, side="right")] % self.ends[-1]  # the next clip's first
        raise DataError(f"50 held-out clips in a row cannot be read: {sorted(self.broken)[0]} is one of them")


def prepare_dataloaders(
    sources,
    preprocess,
    config,
    batch_size,
    seed=0,
    steps=1000,
    first=0,
    accum=1,
    rank=0,
    world=1,
    workers=0,
    val_samples=512,
    augment=1.0,
    pin_memory=False,
):
    """(loader of this rank's micro-batches of the steps first to steps - 1, {source name: validation loader}).

    preprocess(images, instructions): model.preprocess. config: model.config.
    """
    options = dict(batch_size=None, num_workers=workers, pin_memory=pin_memory, worker_init_fn=ignore_signals)
    pool = [(clip, source) for source in sources for clip in source.train]
    train = TrainBatches(pool, preprocess, config, batch_size, seed, accum, rank, world, augment)
    own = torch.Generator()  # else the loader draws from the generator that dropout is drawn from
    loader = DataLoader(train, sampler=range(first * accum, steps * accum), generator=own, **options)
    validation = {}
    for source in sources:
        if source.validation:
            pool = [(clip, source) for clip in source.validation]
            held = ValidationBatches(pool, preprocess, config, val_samples, train.local_batch_size, rank, world)
            validation[source.name] = DataLoader(held, generator=torch.Generator(), **options)
    return loader, validation
