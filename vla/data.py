"""Single frames with their instruction and what they teach: a latent action, or a chunk of robot commands.

A batch is a dict: the backbone's own tensors (model.Preprocessor makes them from images and instructions, in loader
processes); state (B, S) float32; codes (B, N) int64, vectors (B, N, C) float32, has_latents (B,) bool; actions
(B, H, A) float32 in robot units, mask (B, H) bool (False past the episode's end), has_actions (B,) bool. What no source
teaches is absent. The global batch of a step depends on (seed, step) alone; a rank and a micro-step take their part.
"""

import os

import numpy as np
import torch
from sources import MEMBERS, num_rows, read_latents
from torch.utils.data import DataLoader, Dataset

from common import DataError, ignore_signals

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader processes are forked


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


def take(clip, source, row, config, kinds, latents_of=read_latents):
    """One sample as a dict of arrays. kinds: what the batch teaches; what this clip does not teach is zero there."""
    sample = {}
    if "latents" in kinds:
        N, C, has = config.latent.code_seq_len, config.latent.code_dim, source.kind == "latents"
        codes, vectors = np.zeros(N, np.int64), np.zeros((N, C), np.float32)
        if has:
            every_code, every_vector, valid = latents_of(clip, source.labels)
            rows = np.flatnonzero(valid)
            row = rows[row * len(rows) // num_rows(clip, source.labels)]  # all valid rows are drawn alike
            codes, vectors = every_code[row], every_vector[row]
        sample |= dict(codes=codes, vectors=vectors, has_latents=has)
    if "actions" in kinds:
        H, A, has = config.action.chunk_size, config.action.action_dim, source.kind == "actions"
        actions, mask = np.zeros((H, A), np.float32), np.zeros(H, bool)
        if has:
            recorded = clip.array("actions.npy")
            if recorded.shape[1] != A:
                raise DataError(f"{clip}: {recorded.shape[1]} action dims, expected {A}")
            steps = row + np.arange(H)
            actions, mask = recorded[np.minimum(steps, len(recorded) - 1)], steps < len(recorded)
        sample |= dict(actions=actions, mask=mask, has_actions=has)
    if config.action and config.action.state_dim:
        state, S = clip.array("state.npy"), config.action.state_dim
        if source.kind == "latents" and (state is None or state.shape[1] != S):  # another robot's, or nobody's
            state = np.tile(np.float32(config.action.state_center), (len(clip), 1))
        if state is None or state.shape[1] != S:
            raise DataError(f"{clip}: {0 if state is None else state.shape[1]} state dims, expected {S}")
        sample["state"] = state[row]
    texts = clip.meta.get("instructions")  # paraphrases
    texts = texts if isinstance(texts, list) and texts else [clip.meta["instruction"]]
    return sample | dict(image=clip.frames(config.image_size, [row])[0], instruction=[*map(str, texts)])


class Batches(Dataset):
    """What training and validation batches share: clips with their number of rows, and samples put together."""

    def __init__(self, sources, preprocess, config):
        self.preprocess, self.config, self.pools = preprocess, config, {}
        self.broken, self.latents = set(), {}
        for kind in MEMBERS:
            pool = [(clip, source) for source in sources if source.kind == kind for clip in self.clips_of(source)]
            if pool:
                self.pools[kind] = pool, np.cumsum([num_rows(clip, source.labels) for clip, source in pool])

    def read(self, kind, frame):
        """The sample of frame number `frame` of all of a kind, or None if its clip is broken, which is named once."""
        pool, ends = self.pools[kind]
        number = int(np.searchsorted(ends, frame, side="right"))
        clip, source = pool[number]
        try:
            row = int(frame - ends[number]) + num_rows(clip, source.labels)
            return take(clip, source, row, self.config, self.pools.keys(), self.latents_of)
        except (OSError, DataError) as error:
            if str(clip) not in self.broken:
                print(f"skipping a clip: {error}", flush=True)
            self.broken.add(str(clip))

    def latents_of(self, clip, labels):
        """read_latents; the last 300 clips' are kept, as opening an archive takes longer than decoding an image."""
        if str(clip) not in self.latents:
            if len(self.latents) >= 300:
                self.latents.clear()
            self.latents[str(clip)] = read_latents(clip, labels)
        return self.latents[str(clip)]

    def collate(self, samples):
        """Samples -> a batch of tensors."""
        images, instructions = ([sample.pop(name) for sample in samples] for name in ("image", "instruction"))
        batch = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
        return batch | self.preprocess(images, instructions)


class TrainBatches(Batches):
    """Item i: the local batch of micro-step i % accum of step i // accum.

    A fraction `latent_fraction` of the global batch's slots, evenly spread, is drawn from the sources with latents, the
    others from those with actions. Every frame is drawn alike.
    """

    def __init__(
        self,
        sources,
        preprocess,
        config,
        batch_size,
        seed=0,
        accum=1,
        rank=0,
        world=1,
        latent_fraction=1.0,
        augment=1.0,
    ):
        super().__init__(sources, preprocess, config)
        self.local_batch_size, self.seed, self.accum = batch_size // (accum * world), seed, accum
        self.rank, self.world, self.latent_fraction, self.augment = rank, world, latent_fraction, augment

    @staticmethod
    def clips_of(source):
        return source.train

    def __getitem__(self, index):
        step, micro = divmod(index, self.accum)
        first = (micro * self.world + self.rank) * self.local_batch_size
        return self.collate([self.sample(step, slot) for slot in range(first, first + self.local_batch_size)])

    def sample(self, step, slot):
        latent = int((slot + 1) * self.latent_fraction) > int(slot * self.latent_fraction)
        kind = "latents" if latent else "actions"
        draw = np.random.default_rng([self.seed, step, slot])
        for _ in range(50):
            sample = self.read(kind, draw.integers(self.pools[kind][1][-1]))
            if sample:
                *moves, which = draw.random(6)
                sample["image"] = shift_and_jitter(sample["image"], np.array(moves), self.augment)
                sample["instruction"] = sample["instruction"][int(which * len(sample["instruction"]))]
                return sample
        raise DataError(f"50 clips in a row cannot be read: {sorted(self.broken)[0]} is one of them")


class ValidationBatches(Batches):
    """About `limit` held-out frames of one source, spread evenly over its clips; this rank's, in batches.

    All ranks have equally many: under FSDP they must call the model equally often.
    """

    def __init__(self, source, preprocess, config, limit, batch_size, rank=0, world=1):
        super().__init__([source], preprocess, config)
        self.kind, total = source.kind, self.pools[source.kind][1][-1]
        frames = np.linspace(0, total - 1, max(world, min(limit, total))).astype(int)
        frames = frames[: len(frames) // world * world][rank::world]
        self.batches = [frames[i : i + batch_size] for i in range(0, len(frames), batch_size)]

    @staticmethod
    def clips_of(source):
        return source.validation

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.collate([self.sample(frame) for frame in self.batches[index]])

    def sample(self, frame):
        """That frame's sample; where its clip is broken, one of the next clip that is not."""
        ends = self.pools[self.kind][1]
        for _ in range(50):
            if sample := self.read(self.kind, frame):
                return sample | dict(instruction=sample["instruction"][0])
            frame = ends[np.searchsorted(ends, frame, side="right")] % ends[-1]  # the next clip's first
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
    latent_fraction=1.0,
    augment=1.0,
    pin_memory=False,
):
    """(loader of this rank's micro-batches of the steps first to steps - 1, {source name: validation loader}).

    preprocess(images, instructions): model.preprocess. config: model.config.
    """
    options = dict(batch_size=None, num_workers=workers, pin_memory=pin_memory, worker_init_fn=ignore_signals)
    train = TrainBatches(sources, preprocess, config, batch_size, seed, accum, rank, world, latent_fraction, augment)
    own = torch.Generator()  # else the loader draws from the generator that dropout is drawn from
    loader = DataLoader(train, sampler=range(first * accum, steps * accum), generator=own, **options)
    validation = {}
    for source in sources:
        if source.validation:
            held = ValidationBatches(source, preprocess, config, val_samples, train.local_batch_size, rank, world)
            validation[source.name] = DataLoader(held, generator=torch.Generator(), **options)
    return loader, validation
