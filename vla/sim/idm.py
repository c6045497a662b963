"""Inverse dynamics for VPT: from few demonstrations learn the action between two frames, then label videos with it.

Run:
  python vla/sim/idm.py --data robot=PATH --videos web=PATH --out runs/vpt
  python vla/finetune.py --backbone NAME --data web=PATH --action-labels runs/vpt/web --out runs/vpt/policy

VPT (Baker et al. 2022, arXiv 2206.11795) is the strong baseline for latent actions: it needs actions before it can use
videos. Writes label shards with KEY.actions.npy, named like the video shards, to OUT/NAME, and OUT/report.json: R2 per
action dim on held-out demonstrations.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

if __name__ == "__main__":  # vla/ and its parent take the place of vla/sim/
    sys.path[:1] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]
from shards import npy, read_clips, write_shard
from sources import named_paths, read_sources

import common

SHIFT = 0.12  # random shift of both frames alike, of their side; without it the demonstrations are memorised


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    add, whole, real = parser.add_argument, dict(type=int, metavar="N"), dict(type=float, metavar="X")
    add("--data", nargs="+", required=True, metavar="PATH", help="demonstrations with actions, NAME=PATH or PATH")
    add("--videos", nargs="+", required=True, metavar="PATH", help="clips to label, NAME=PATH or PATH")
    add("--out", required=True, metavar="DIR", help="folder for the label shards")
    add("--val-share", default=0.1, help="share of the demonstrations held out", **real)
    add("--val-episodes", nargs="+", default=[], metavar="IDS", help="hold out just these: 56-69,80 or g1=56-69 b=3")
    add("--image-size", default=32, help="side that frames are squashed to, a power of two", **whole)
    add("--steps", default=400, help="optimizer steps", **whole)
    add("--batch-size", default=64, help="pairs of frames per step", **whole)
    add("--lr", default=1e-3, help="peak learning rate", **real)
    add("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    add("--seed", default=0, help="of weights and batches", **whole)
    args = parser.parse_args(argv)
    for name in ("image_size", "steps", "batch_size", "lr"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    return args


class InverseDynamics(nn.Module):
    """A frame and its change to the next (B, 6, S, S) -> the normalised action between them (B, A)."""

    def __init__(self, action_dim, size, width=32):
        super().__init__()
        parts, side = [nn.PixelUnshuffle(2), nn.Conv2d(24, width, 3, padding=1), nn.ReLU()], size // 2
        while side > 8:
            wider = min(2 * width, 128)
            parts += [nn.Conv2d(width, wider, 3, padding=1, stride=2), nn.ReLU()]
            side, width = side // 2, wider
        self.encoder = nn.Sequential(*parts, nn.Flatten(), nn.Dropout(0.2))
        self.head = nn.Linear(width * side**2, action_dim)

    def forward(self, pairs):
        return self.head(self.encoder(pairs))


def frame_pairs(frames):
    """Frames (T, S, S, 3) uint8 -> (T - 1, 6, S, S) float: each frame in [0, 1], and twice its change to the next."""
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    return torch.cat([x[:-1], 2 * (x[1:] - x[:-1])], 1)


def read_pairs(clips, size):
    """All pairs of the clips and the actions between them: (n, 6, S, S), (n, A)."""
    clips = [clip for clip in clips if len(clip) > 1]
    x = torch.cat([frame_pairs(clip.frames(size)) for clip in clips])
    return x, torch.cat([torch.from_numpy(clip.array("actions.npy")[:-1]) for clip in clips])


def fit(model, x, y, args):
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, args.lr, total_steps=args.steps)
    size, most = args.image_size, round(SHIFT * args.image_size)
    for step in tqdm(range(args.steps), disable=not sys.stderr.isatty(), unit="step"):
        common.seed_all(args.seed, step)
        rows = torch.randint(len(x), (args.batch_size,))
        padded = F.pad(x[rows], (most,) * 4, mode="replicate")
        shifts = torch.randint(2 * most + 1, (args.batch_size, 2)).tolist()
        pairs = [pair[:, i : i + size, j : j + size] for pair, (i, j) in zip(padded, shifts, strict=True)]
        loss = F.smooth_l1_loss(model(torch.stack(pairs).to(args.device)), y[rows].to(args.device))
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
    model.eval()


def main(argv=None):
    args = parse(argv)
    sources = read_sources(args.data, "actions", None, args.val_share, args.val_episodes)
    train = [clip for source in sources for clip in source.train]
    x, y = read_pairs(train, args.image_size)
    center, scale = y.mean(0), y.std(0).clamp(min=1e-6)
    common.seed_all(args.seed)
    model = InverseDynamics(y.shape[1], args.image_size).to(args.device)
    fit(model, x, (y - center) / scale, args)

    @torch.no_grad()
    def predict(pairs):
        parts = [model(part.to(args.device)).cpu() for part in pairs.split(512)]
        return torch.cat(parts) * scale + center

    report = dict(demonstrations=len(train), pairs=len(x))
    held_out = [clip for source in sources for clip in source.validation]
    if held_out:
        x, y = read_pairs(held_out, args.image_size)
        report["r2"] = (1 - (predict(x) - y).square().sum(0) / (y - y.mean(0)).square().sum(0)).tolist()
    for name, path in named_paths(args.videos):
        folder, shards = Path(args.out) / name, {}
        common.make_folder(folder)
        for clip in read_clips(path):
            shards.setdefault(clip.shard, []).append(clip)
        for shard, clips in tqdm(shards.items(), disable=not sys.stderr.isatty(), unit="shard"):
            samples = []
            for clip in clips:
                actions = np.zeros((len(clip), len(center)), np.float32)  # nothing follows the last frame
                if len(clip) > 1:
                    actions[:-1] = predict(frame_pairs(clip.frames(args.image_size))).numpy()
                samples.append({"__key__": clip.key, "actions.npy": npy(actions)})
            write_shard(folder / shard.name, samples)
        print(f"{name}: {sum(map(len, shards.values()))} clips labelled, in {folder}", flush=True)
    with common.atomic(Path(args.out) / "report.json") as path:
        path.write_text(json.dumps(report, indent=1))
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
