"""Episodes -> windows -> batches, always the same for the same data and flags.

`EpisodeDataset` gives windows of an episode. For Pi05 a window is the chunk of actions from one step on, with the
images and the state of that step alone; `PolicyBatch` makes them a batch that the policy reads. The global batch of a
step depends on (seed, step) alone, everything random of a sample on the seed, its window and its draw; a rank and a
micro-step take their part.

Letters: T steps of a window, A action dims, D dims of a vector, B batch, H W pixels.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from compute_norms import load_norms  # noqa: F401, part of what this file offers
from readers.dataset import open_data
from readers.spec import DatasetSpec, load_spec  # noqa: F401, the same
from torch.utils.data import DataLoader, Dataset

from common import DataError, ignore_signals


@dataclass
class SequenceConfig:
    """Windows of `seq_len` steps that begin every `stride` steps. At an episode's end they are shorter."""

    seq_len: int = 32
    stride: int = 16

    def __post_init__(self):
        for name in ("seq_len", "stride"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} is {getattr(self, name)}, expected at least 1")


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


AUGMENT = dict(  # openpi: what pi0.5 was trained with
    none=None,
    jitter=AugmentConfig(),
    openpi=AugmentConfig(brightness=0.3, contrast=0.4, saturation=0.5, crop=0.95, rotate=5.0),
)


def build_augmentations(config):
    """function(images (T, H, W, 3) uint8 or float in [0, 1], rng, camera="") -> the same kind, or None for None.

    All frames of a window change alike. rng: numpy Generator or a seed.
    """
    if config is None:
        return None

    def augment(images, rng, camera=""):
        rng = np.random.default_rng(rng)
        x = torch.from_numpy(np.array(images)).movedim(-1, 1)  # T 3 H W
        is_uint8 = not x.is_floating_point()
        x = x / 255 if is_uint8 else x.float()
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
        x = (x * 255).round().byte() if is_uint8 else x
        return x.movedim(1, -1).numpy()

    return augment


def shrink(frame, size):
    """frame (H, W, 3) uint8 -> (h, w, 3) float32 in [0, 1] whose longer side is `size`; the policy adds the border."""
    height, width = frame.shape[:2]
    new = max(1, height * size // max(height, width)), max(1, width * size // max(height, width))
    x = torch.from_numpy(np.array(frame)).movedim(-1, 0)[None].float() / 255
    if new != (height, width):
        x = F.interpolate(x, new, mode="bilinear", align_corners=False)  # as the policy does
    return x[0].movedim(0, -1).numpy()


# --- windows


class EpisodeDataset(Dataset):
    """Windows of all episodes under `data_root`, or of the given `episodes`.

    An item: actions (T, A), timestamps (T,), `obs.KEY` (T, D) or (T, H, W, 3), task, episode, start, noise_seed. With
    for_policy the observations are those of the window's first step alone, (1, ...), and images are floats whose longer
    side is image_size. An index is a number, or (number, *draw) where one window is drawn more than once.
    """

    def __init__(
        self, spec, data_root=None, sequence=None, normalizer=None, augment_fn=None, seed=0, episodes=None,
        for_policy=False, image_size=224,
    ):  # fmt: skip
        self.spec, self.sequence = spec, sequence or SequenceConfig()
        self.normalizer, self.augment_fn, self.seed = normalizer, augment_fn, seed
        self.for_policy, self.image_size = for_policy, image_size
        self.episodes = open_data([str(data_root)], spec)[1] if episodes is None else episodes
        counts = [-(-len(episode) // self.sequence.stride) for episode in self.episodes]
        self.ends = np.cumsum(counts)  # the windows of episode e are numbered ends[e - 1] to ends[e] - 1

    def __len__(self):
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, number):
        """Number of a window -> its episode and first step."""
        at = int(np.searchsorted(self.ends, number, side="right"))
        return self.episodes[at], int(number - (self.ends[at - 1] if at else 0)) * self.sequence.stride

    def __getitem__(self, index):
        number, *draw = index if isinstance(index, tuple) else (index,)
        episode, start = self.locate(number)
        name = hashlib.sha256(f"{episode.id}/{start}".encode(errors="surrogateescape")).digest()
        rng = np.random.default_rng([int.from_bytes(name[:8], "big"), self.seed, *draw])
        end = min(start + self.sequence.seq_len, len(episode))
        seen = slice(start, start + 1 if self.for_policy else end)
        item = dict(actions=episode.actions[start:end], timestamps=episode.timestamps[start:end])
        item |= {f"obs.{key}": episode.vectors[key][seen] for key in self.spec.required_proprio_keys}
        for key in self.spec.required_obs_keys:
            images = [episode.frames[key][i] for i in range(seen.start, seen.stop)]
            images = np.stack([shrink(image, self.image_size) if self.for_policy else image for image in images])
            item[f"obs.{key}"] = self.augment_fn(images, rng, key) if self.augment_fn else images
        item = self.normalizer(item) if self.normalizer else item
        item = {key: torch.from_numpy(np.array(value)) for key, value in item.items()}
        item |= dict(task=episode.task_at(start), episode=f"{episode.source}/{episode.id}", start=start)
        return item | dict(noise_seed=int(rng.integers(2**62)))


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
    return DataLoader(
        dataset,
        batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        collate_fn=pad_and_collate,
        generator=torch.Generator().manual_seed(seed),
        worker_init_fn=ignore_signals,
    )


# --- batches for Pi05


class PolicyBatch:
    """Windows for the policy -> a batch in robot units, processed if there is a processor.

    Past an episode's end the last action is repeated and `mask` (B, chunk) is False. Noise and time are drawn from each
    item's own seed, by openpi's distributions.
    """

    def __init__(self, spec, chunk, processor=None):
        self.spec, self.chunk, self.processor = spec, chunk, processor

    def __call__(self, items):
        batch = dict(task=[item["task"] for item in items])
        actions, masks, noise, time = [], [], [], []
        for item in items:
            rows = item["actions"]
            rows = rows[torch.arange(self.chunk).clamp(max=len(rows) - 1)]
            seen = all(item[f"obs.{key}"].isfinite().all() for key in self.spec.required_proprio_keys)
            masks.append((torch.arange(self.chunk) < len(item["actions"])) & rows.isfinite().all(1) & seen)
            actions.append(rows.nan_to_num(posinf=0.0, neginf=0.0))  # NaN is there only where the spec allows it
            rng = np.random.default_rng(item["noise_seed"])
            noise.append(torch.from_numpy(rng.standard_normal((self.chunk, 32), np.float32)))
            time.append(0.001 + 0.999 * rng.beta(1.5, 1.0))
        batch |= dict(action=torch.stack(actions), mask=torch.stack(masks), noise=torch.stack(noise))
        batch["time"] = torch.tensor(time, dtype=torch.float32)
        states = [torch.cat([item[f"obs.{key}"][0] for key in self.spec.required_proprio_keys]) for item in items]
        batch["observation.state"] = torch.stack(states).nan_to_num()
        for name, key in self.spec.cameras.items():
            images = [item[f"obs.{key}"][0].movedim(-1, 0).contiguous() for item in items]
            side = max(max(image.shape) for image in images)
            if len({image.shape for image in images}) > 1:  # black borders, as the policy adds them to each alone
                gaps = [(side - image.shape[2], side - image.shape[1]) for image in images]
                borders = [[w // 2, w - w // 2, h // 2, h - h // 2] for w, h in gaps]
                images = [F.pad(image, border) for image, border in zip(images, borders, strict=True)]
            batch[f"observation.images.{name}"] = torch.stack(images)
        return self.processor(batch) if self.processor else batch


def example(model, loader):
    """The middle window of a loader: recorded and predicted actions (T, A), names of the dims, rate."""
    windows, middle = loader.dataset, loader.sampler[len(loader.sampler) // 2]
    batch = PolicyBatch(windows.spec, model.config.chunk)([windows[middle]])
    true, predicted = (x[0][batch["mask"][0]].numpy() for x in (batch["action"], model.predict(batch)))
    return true, predicted, windows.spec.names, windows.spec.control_freq_hz


class GlobalBatches:
    """Batch sampler: for each step and micro-step this rank's part of the step's global batch.

    Every window of the data set is drawn alike.
    """

    def __init__(self, count, batch_size, seed, first, steps, accum=1, rank=0, world=1):
        self.count, self.batch_size, self.seed, self.first, self.steps = count, batch_size, seed, first, steps
        self.accum, self.rank, self.world = accum, rank, world

    def __len__(self):
        return (self.steps - self.first) * self.accum

    def __iter__(self):
        size = self.batch_size // (self.accum * self.world)
        for step in range(self.first, self.steps):
            windows = np.random.default_rng([self.seed, step]).integers(self.count, size=self.batch_size)
            for micro in range(self.accum):
                begin = (micro * self.world + self.rank) * size
                yield [(int(windows[i]), step, i) for i in range(begin, begin + size)]


def prepare_dataloaders(spec, train, held_out, processor, args, first=0, rank=0, world=1):
    """(training loader, {source: validation loader}) of two lists of episodes; args: the flags of train.py."""
    seen = dict(for_policy=True, image_size=args.image_size)
    more = dict(collate_fn=PolicyBatch(spec, args.chunk, processor), worker_init_fn=ignore_signals)
    more |= dict(num_workers=args.workers, pin_memory=torch.cuda.is_available())
    augment, chunks = build_augmentations(AUGMENT[args.augment]), SequenceConfig(args.chunk, 1)
    windows = EpisodeDataset(spec, sequence=chunks, augment_fn=augment, seed=args.seed, episodes=train, **seen)
    sampler = GlobalBatches(len(windows), args.batch_size, args.seed, first, args.steps, args.accum, rank, world)
    loader, validation = DataLoader(windows, batch_sampler=sampler, **more), {}
    chunks, size = SequenceConfig(args.chunk, args.val_stride), max(1, args.batch_size // (args.accum * world))
    for name in dict.fromkeys(episode.source for episode in held_out):
        episodes = [episode for episode in held_out if episode.source == name]
        windows = EpisodeDataset(spec, sequence=chunks, episodes=episodes, **seen)
        mine, every = range(rank, len(windows), world), range(len(windows))
        if args.fsdp:  # all processes work together, so each has equally many; the last ones are left out
            mine = (mine or every)[: max(1, len(every) // world)]
        validation[name] = DataLoader(windows, size, sampler=mine, **more)
    return loader, validation
