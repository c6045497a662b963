"""Inverse dynamics: from few demonstrations, learn which command lies between two frames; label videos with it (VPT).

Run:
  python vla/sim/idm.py --data robot=PATH --videos web=PATH --episodes 10 --out runs/vpt
  python vla/finetune.py --backbone NAME --data web=PATH --action-labels runs/vpt/web --out runs/vpt/policy

VPT (Baker et al. 2022, arXiv 2206.11795) is the strong rival of latent actions: it needs commands before it can use
videos. Writes label shards with KEY.actions.npy, named like the video shards, to OUT/NAME, and OUT/report.json: R2
on held-out clips.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

if __name__ == "__main__":  # vla/ and its parent take the place of vla/sim/
    sys.path[:1] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]
from data import few, named_paths, read_sources
from shards import npy, read_clips, write_shard

import common


def parse(argv=None):
    parser = common.Parser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--data", nargs="+", required=True, metavar="NAME=PATH", help="demonstrations with actions")
    add("--videos", nargs="+", required=True, metavar="NAME=PATH", help="clips to label")
    add("--out", required=True, metavar="DIR", help="folder for the label shards")
    add("--episodes", default=0, help="learn from N demonstrations, as finetune.py chooses them; 0: all", **whole)
    add("--val-share", type=float, default=0.1, metavar="X", help="share of the demonstrations held out")
    add("--image-size", default=32, help="side that frames are squashed to", **whole)
    add("--steps", default=400, help="optimizer steps", **whole)
    add("--batch-size", default=64, help="pairs of frames per step", **whole)
    add("--lr", type=float, default=1e-3, metavar="X", help="peak learning rate")
    add("--shift", type=float, default=0.12, metavar="X", help="random shift of both frames alike, of their side")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    add("--seed", default=0, help="of weights, batches and the choice of demonstrations", **whole)
    return parser.parse_args(argv)


class InverseDynamics(nn.Module):
    """Two frames (B, 6, S, S) in [0, 1], the second minus the first -> the command between them, normalised (B, A)."""

    def __init__(self, dims, size, width=32):
        super().__init__()
        parts, channels = [nn.PixelUnshuffle(2)], 24
        while size > 8:
            size //= 2
            parts += [nn.Conv2d(channels, width, 3, padding=1, stride=1 if channels == 24 else 2), nn.ReLU()]
            channels, width = width, min(2 * width, 128)
        self.look, self.tell = nn.Sequential(*parts, nn.Flatten(), nn.Dropout(0.2)), nn.LazyLinear(dims)

    def forward(self, pair):
        return self.tell(self.look(pair))


def pairs(frames):
    """Frames (T, S, S, 3) uint8 -> (T - 1, 6, S, S): each frame, and what changes to the next."""
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    return torch.cat([x[:-1], 2 * (x[1:] - x[:-1])], 1)


def gather(clips, size):
    """All pairs and their commands of some clips: (n, 6, S, S), (n, A)."""
    x = [pairs(clip.frames(np.arange(clip.meta["length"]), size)) for clip in clips if clip.meta["length"] > 1]
    y = [torch.from_numpy(clip.array("actions.npy")[:-1]) for clip in clips if clip.meta["length"] > 1]
    return torch.cat(x), torch.cat(y)


def learn(model, x, y, args, device):
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, args.lr, total_steps=args.steps)
    draw, reach = torch.Generator().manual_seed(args.seed), round(args.shift * args.image_size)
    for step in tqdm(range(args.steps), disable=not sys.stderr.isatty(), unit="step"):
        common.seed(args.seed, step)
        rows = torch.randint(len(x), (args.batch_size,), generator=draw)
        padded = F.pad(x[rows], (reach,) * 4, mode="replicate")
        top, left = torch.randint(2 * reach + 1, (2, args.batch_size), generator=draw)
        size = args.image_size
        moved = [p[:, t : t + size, u : u + size] for p, t, u in zip(padded, top, left, strict=True)]
        loss = F.smooth_l1_loss(model(torch.stack(moved).to(device)), y[rows].to(device))
        opt.zero_grad()
        loss.backward()
        opt.step()
        rate.step()
    return model.eval()


def main(argv=None):
    args = parse(argv)
    dist = common.setup(args)
    clips = [source for source in read_sources(args.data, "actions", None, args.val_share)]
    train = [clip for source in clips for clip in source.train]
    train = few(train, args.episodes, args.seed) if args.episodes else train
    x, y = gather(train, args.image_size)
    center, scale = y.mean(0), y.std(0).clamp(min=1e-6)
    model = InverseDynamics(y.shape[1], args.image_size).to(dist.device)
    model(x[:1].to(dist.device))  # sizes the last layer
    learn(model, x, (y - center) / scale, args, dist.device)

    @torch.no_grad()
    def commands(x):
        parts = [model(part.to(dist.device)).cpu() for part in x.split(512)]
        return torch.cat(parts) * scale + center

    report = dict(demonstrations=len(train), pairs=len(x))
    held = [clip for source in clips for clip in source.validation]
    if held:
        x, y = gather(held, args.image_size)
        report["r2"] = (1 - (commands(x) - y).square().sum(0) / (y - y.mean(0)).square().sum(0)).tolist()
    for name, path in named_paths(args.videos):
        folder = Path(args.out) / name
        folder.mkdir(parents=True, exist_ok=True)
        shards = {}
        for clip in read_clips(path):
            shards.setdefault(clip.shard, []).append(clip)
        for shard, members in tqdm(shards.items(), disable=not sys.stderr.isatty(), unit="shard"):
            samples = []
            for clip in members:
                frames = clip.frames(np.arange(clip.meta["length"]), args.image_size)
                actions = commands(pairs(frames)).numpy() if len(frames) > 1 else np.zeros((0, y.shape[1]), np.float32)
                actions = np.concatenate([actions, np.zeros_like(y[:1])])  # nothing follows the last frame
                samples.append({"__key__": clip.key, "actions.npy": npy(actions)})
            write_shard(folder / shard.name, samples)
        print(f"{name}: {sum(map(len, shards.values()))} clips labelled, in {folder}", flush=True)
    with common.atomic(Path(args.out) / "report.json") as path:
        path.write_text(json.dumps(report, indent=1))
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    common.run(main)
