"""Episodes -> windows and batches, always the same for the same data and flags.

`EpisodeDataset` gives windows of an episode; `TrainBatches` picks one step of each window for Pi05: the images and the
state of that step, the chunk of actions from it on, with a mask that is False past the episode's end, and the noise
and time of the flow-matching loss. The global batch of a step depends on (seed, step) alone, everything random of a
sample on (seed, step, its place in the global batch); a rank and a micro-step take their slice.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from episodes import open_data
from norms import load_norms  # noqa: F401, part of what this file offers, as in the seed's example
from spec import DatasetSpec, load_spec  # noqa: F401, the same
from torch.utils.data import DataLoader, Dataset


@dataclass
class SequenceConfig:
    """Windows of `seq_len` steps, `stride` apart. chunk: also the next so many actions of every step; 0: none."""

    seq_len: int = 32
    stride: int = 16
    chunk: int = 0

    def __post_init__(self):
        for name, least in (("seq_len", 1), ("stride", 1), ("chunk", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")

    def starts(self, length):
        """First steps of an episode's windows: every step is in one, and no window lies inside the one before."""
        return [s for s in range(0, length, self.stride) if s == 0 or s + self.seq_len - self.stride < length]


class Normalizer:
    """(x - mean) / std of `actions` and of each `obs.KEY` in proprio_mean, with frozen statistics."""

    def __init__(self, action_mean, action_std, proprio_mean=None, proprio_std=None):
        self.mean = {"actions": action_mean} | {f"obs.{key}": value for key, value in (proprio_mean or {}).items()}
        self.std = {"actions": action_std} | {f"obs.{key}": value for key, value in (proprio_std or {}).items()}
        self.mean = {key: np.asarray(value, np.float32) for key, value in self.mean.items()}
        self.std = {key: np.asarray(value, np.float32) for key, value in self.std.items()}

    def __call__(self, window):
        known = {key: value for key, value in window.items() if key in self.mean}
        return {**window, **{key: (value - self.mean[key]) / self.std[key] for key, value in known.items()}}

    def undo(self, actions):
        """Normalised actions (..., A) -> robot units."""
        return actions * self.std["actions"] + self.mean["actions"]


# --- augmentation


@dataclass
class AugmentConfig:
    """How far each image is changed at most. brightness, contrast, saturation: a factor of 1 - x to 1 + x.

    crop: side of a random crop, as a share, then resized back. rotate: degrees to either side. fixed: cameras whose
    name holds one of these words move with the gripper and are neither cropped nor rotated (as in openpi).
    """

    brightness: float = 0.05
    contrast: float = 0.05
    saturation: float = 0.0
    crop: float = 1.0
    rotate: float = 0.0
    fixed: tuple = ("wrist",)

    @classmethod
    def openpi(cls):
        """What openpi trains pi0.5 with: crop of 95 %, 5 degrees, colour jitter of 0.3, 0.4, 0.5."""
        return cls(brightness=0.3, contrast=0.4, saturation=0.5, crop=0.95, rotate=5.0)


def build_augmentations(config):
    """function(images (T, H, W, 3) uint8 or float in [0, 1], rng, camera="") -> the same kind, or None for None.

    All frames of a window change alike. rng: numpy Generator or a seed.
    """
    if config is None:
        return None

    def augment(images, rng, camera=""):
        rng = np.random.default_rng(rng)
        x = torch.from_numpy(np.array(images)).movedim(-1, 1)  # T 3 H W
        whole = not x.is_floating_point()
        x = x / 255 if whole else x.float()
        dx, dy, turn, *colour = rng.uniform(-1, 1, 6)
        if (config.crop < 1 or config.rotate) and not any(word in camera for word in config.fixed):
            angle, room = math.radians(config.rotate * turn), 1 - config.crop
            c, s = config.crop * math.cos(angle), config.crop * math.sin(angle)
            aspect = x.shape[3] / x.shape[2]  # the grid goes from -1 to 1 along either side
            theta = torch.tensor([[c, -s / aspect, room * dx], [s * aspect, c, room * dy]], dtype=x.dtype)
            grid = F.affine_grid(theta.expand(len(x), 2, 3), x.shape, align_corners=False)
            x = F.grid_sample(x, grid, align_corners=False)
        grey = (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
        for pivot, reach, draw in (
            (torch.zeros(()), config.brightness, colour[0]),
            (grey.mean((1, 2, 3), keepdim=True), config.contrast, colour[1]),
            (grey, config.saturation, colour[2]),
        ):
            x = (pivot + (x - pivot) * (1 + reach * draw)).clamp(0, 1)
        x = (x * 255).round().byte() if whole else x
        return x.movedim(1, -1).numpy()

    return augment


def shrink(frame, size):
    """frame (H, W, 3) uint8 -> (h, w, 3) float32 in [0, 1] whose longer side is `size`; the policy adds the border."""
    height, width = frame.shape[:2]
    new = max(1, height * size // max(height, width)), max(1, width * size // max(height, width))
    x = torch.from_numpy(np.array(frame)).movedim(-1, 0)[None].float() / 255
    return F.interpolate(x, new, mode="bilinear", align_corners=False)[0].movedim(0, -1).numpy()


# --- windows


def future(actions, step, chunk):
    """The `chunk` actions from `step` on, (chunk, A), and which of them exist; past the end the last is repeated."""
    steps = step + np.arange(chunk)
    rows = actions[np.minimum(steps, len(actions) - 1)]
    mask = (steps < len(actions)) & np.isfinite(rows).all(1)  # NaN is there only where the spec allows it
    return np.nan_to_num(rows, posinf=0.0, neginf=0.0), mask


class EpisodeDataset(Dataset):
    """Windows of all episodes under `data_root`, or of the given `episodes`.

    An item: actions (T, A), timestamps (T,), `obs.KEY` (T, D) or (T, H, W, 3), task, episode, start; with
    sequence.chunk also chunk (T, chunk, A) and chunk_mask (T, chunk). Windows at an episode's end are shorter.
    """

    def __init__(self, spec, data_root=None, sequence=None, normalizer=None, augment_fn=None, seed=0, episodes=None):
        self.spec, self.sequence = spec, sequence or SequenceConfig()
        self.normalizer, self.augment_fn, self.seed = normalizer, augment_fn, seed
        self.episodes = open_data([str(data_root)], spec, val_share=0)[1] if episodes is None else episodes
        self.windows = [(e, s) for e in range(len(self.episodes)) for s in self.sequence.starts(len(self.episodes[e]))]

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, index):
        number, start = self.windows[index]
        episode = self.episodes[number]
        here = slice(start, min(start + self.sequence.seq_len, len(episode)))
        item = dict(actions=episode.actions[here], timestamps=episode.timestamps[here])
        item |= {f"obs.{key}": episode.vectors[key][here] for key in self.spec.required_proprio_keys}
        for key in self.spec.required_obs_keys:
            images = np.stack([episode.frames[key][i] for i in range(here.start, here.stop)])
            if self.augment_fn is not None:
                images = self.augment_fn(images, np.random.default_rng([self.seed, index]), key)
            item[f"obs.{key}"] = images
        if self.sequence.chunk:
            ahead = [future(episode.actions, i, self.sequence.chunk) for i in range(here.start, here.stop)]
            item["chunk"], item["chunk_mask"] = (np.stack(part) for part in zip(*ahead, strict=True))
        item = self.normalizer(item) if self.normalizer else item
        item = {key: torch.from_numpy(np.array(value)) for key, value in item.items()}
        return item | dict(task=episode.task, episode=f"{episode.source}/{episode.id}", start=start)


def pad_and_collate(items):
    """Windows -> a batch padded with zeros to the longest; attention_mask (B, T) True at real steps, lengths (B,)."""
    lengths = torch.tensor([len(item["actions"]) for item in items])
    batch = dict(lengths=lengths, attention_mask=torch.arange(int(lengths.max())) < lengths[:, None])
    for key, value in items[0].items():
        column = [item[key] for item in items]
        padded = torch.is_tensor(value)
        batch[key] = torch.nn.utils.rnn.pad_sequence(column, batch_first=True) if padded else column
    return batch


def build_dataloader(dataset, batch_size, shuffle=True, num_workers=0, seed=0):
    """Padded batches of windows; the order depends on the seed and the number of epochs read before."""
    order = torch.Generator().manual_seed(seed)
    return DataLoader(
        dataset, batch_size, shuffle=shuffle, num_workers=num_workers, collate_fn=pad_and_collate, generator=order
    )


# --- batches for Pi05


class Steps(Dataset):
    """What training and validation share: one step of an episode as a sample of Pi05."""

    def __init__(self, spec, episodes, chunk, image_size, prepare=None, augment=None):
        self.spec, self.episodes, self.chunk, self.image_size = spec, episodes, chunk, image_size
        self.prepare, self.augment = prepare, augment

    def sample(self, episode, step, rng):
        """Images in [0, 1], state, chunk of actions, mask, task; noise and time from `rng` (openpi's distributions)."""
        action, mask = future(episode.actions, step, self.chunk)
        state = np.concatenate([episode.vectors[key][step] for key in self.spec.required_proprio_keys])
        sample = {"observation.state": np.nan_to_num(state), "action": action, "mask": mask, "task": episode.task}
        sample["noise"] = rng.standard_normal((self.chunk, 32), np.float32)
        sample["time"] = np.float32(0.001 + 0.999 * rng.beta(1.5, 1.0))
        for name, key in self.spec.cameras.items():
            image = shrink(episode.frames[key][step], self.image_size)
            image = self.augment(image[None], rng, name)[0] if self.augment else image
            sample[f"observation.images.{name}"] = np.ascontiguousarray(image.transpose(2, 0, 1))
        return sample

    def collate(self, samples):
        """Samples -> a batch in robot units."""
        batch = {key: [sample[key] for sample in samples] for key in samples[0]}
        for key, value in batch.items():
            if len({np.shape(part) for part in value}) > 1:
                raise ValueError(f"{key} has other shapes in other episodes: data sets of one run need the same camera")
        return {key: value if key == "task" else torch.from_numpy(np.stack(value)) for key, value in batch.items()}

    def finish(self, samples):
        """Samples -> what the model reads."""
        batch = self.collate(samples)
        return self.prepare(batch) if self.prepare else batch


class TrainBatches(Steps):
    """Item (step * accum + micro) is this rank's slice of the step's global batch.

    Each sample is one random step of a random window, so that `seq_len` 32 and `stride` 16 read as in the seed, and
    1 and 1 (the default) draw from all steps alike.
    """

    def __init__(self, *args, batch_size, sequence=None, seed=0, accum=1, rank=0, world=1, **kwargs):
        super().__init__(*args, **kwargs)
        if batch_size % (accum * world):
            raise ValueError(f"--batch-size {batch_size} is not divisible by {accum} micro-steps x {world} processes")
        self.batch_size, self.seed, self.accum, self.rank, self.world = batch_size, seed, accum, rank, world
        self.sequence = sequence or SequenceConfig(1, 1)
        self.windows = [(e, s) for e in self.episodes for s in self.sequence.starts(len(e))]

    def __getitem__(self, item):
        step, micro = divmod(item, self.accum)
        draw = np.random.default_rng([self.seed, step])
        windows, places = draw.integers(len(self.windows), size=self.batch_size), draw.random(self.batch_size)
        size = self.batch_size // (self.accum * self.world)
        first, samples = (micro * self.world + self.rank) * size, []
        for i in range(first, first + size):
            episode, start = self.windows[windows[i]]
            length = min(self.sequence.seq_len, len(episode) - start)
            rng = np.random.default_rng([self.seed, step, i])
            samples.append(self.sample(episode, start + int(places[i] * length), rng))
        return self.finish(samples)


class ValidationSteps(Steps):
    """Every `stride`-th step of the episodes, with noise and time that depend on source, episode and step alone."""

    def __init__(self, *args, stride, rank=0, world=1, **kwargs):
        super().__init__(*args, **kwargs)
        self.places = [(e, t) for e in self.episodes for t in range(0, len(e), stride)][rank::world]

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        episode, step = self.places[i]
        name = hashlib.sha256(f"{episode.source}/{episode.id}/{step}".encode()).digest()
        return self.sample(episode, step, np.random.default_rng(int.from_bytes(name[:8], "big")))

    def liveliest(self):
        """The sample whose recorded chunk moves most, each dim measured by its spread: for figures."""
        chunks = [future(episode.actions, step, self.chunk)[0] for episode, step in self.places]
        spread = np.concatenate(chunks).std(0) + 1e-9
        return self[int(np.argmax([(chunk.std(0) / spread).mean() for chunk in chunks]))]


def prepare_dataloaders(
    batch_size,
    spec,
    train,
    held,
    chunk,
    image_size,
    prepare=None,
    augment=None,
    sequence=None,
    seed=0,
    steps=1000,
    first=0,
    accum=1,
    rank=0,
    world=1,
    workers=0,
    val_stride=10,
):
    """(train loader, {source: validation loader}): this rank's micro-batches of the steps first to steps - 1."""
    shape = (chunk, image_size, prepare)
    batches = TrainBatches(
        spec, train, *shape, augment, batch_size=batch_size, sequence=sequence, seed=seed, accum=accum, rank=rank,
        world=world,
    )  # fmt: skip
    items = range(first * accum, steps * accum)
    loader = DataLoader(batches, batch_size=None, sampler=items, num_workers=workers)
    validation = {}
    for name in dict.fromkeys(episode.source for episode in held):
        mine = [episode for episode in held if episode.source == name]
        part = ValidationSteps(spec, mine, *shape, stride=val_stride, rank=rank, world=world)
        validation[name] = DataLoader(part, batch_size=max(1, batch_size // (accum * world)), collate_fn=part.finish)
    return loader, validation
