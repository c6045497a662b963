"""Speed of laq at the published size, as ratios side by side in one process.

Run:
  python tests/bench/laq.py --threads 2
  python tests/bench/laq.py --device cuda --amp bf16 --repeats 10
  python tests/bench/laq.py --size small --repeats 5
  python tests/bench/laq.py --loader --threads 1 --repeats 15

The reference is written from the publication (arXiv 2410.11758): materialised attention with a relative position bias
that an MLP makes anew in every pass, both frames through the temporal transformer, fp32, pairs encoded one by one.
Medians of interleaved calls; CPU time of this process on the CPU, wall time on a GPU. Peak memory is each one's own
process's. At the published size a training step takes 20 to 40 seconds on two cores.
"""

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from timing import SHARED, interleaved, load
from torch import nn

laq = load("laq", "shards", "sources", "readers", "videos_to_shards")
SIZES = dict(
    published=dict(image_size=256, patch=32, dim=1024, depth=8), small=dict(image_size=64, patch=16, dim=256, depth=2)
)


class Bias(nn.Module):
    """Continuous relative position bias: an MLP of the log distance of two places, one number per head."""

    def __init__(self, dim, heads):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, dim), nn.LeakyReLU(0.1), nn.Linear(dim, dim), nn.LeakyReLU(0.1), nn.Linear(dim, heads)
        )

    def forward(self, side):
        place = torch.stack(
            torch.meshgrid(*[torch.arange(side, device=self.net[0].weight.device)] * 2, indexing="ij"), -1
        )
        place = place.flatten(0, 1).float()
        away = place[:, None] - place[None]
        return self.net(away.sign() * (away.abs() + 1).log()).permute(2, 0, 1)


class PlainAttention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.heads, self.norm = max(1, dim // 64), nn.LayerNorm(dim)
        self.q, self.kv = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x, context=None, bias=None):
        x = self.norm(x)
        q, k, v = self.q(x), *self.kv(x if context is None else context).chunk(2, -1)
        q, k, v = (rearrange(y, "b t (h d) -> b h t d", h=self.heads) for y in (q, k, v))
        score = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        score = score if bias is None else score + bias
        return self.out(rearrange(score.softmax(-1) @ v, "b h t d -> b t (h d)"))


class PlainBlock(nn.Module):
    def __init__(self, dim, cross=False):
        super().__init__()
        self.place = nn.Conv3d(dim, dim, 3, padding=1, groups=dim)
        self.attend, self.feed = PlainAttention(dim), laq.model.feed_forward(dim)
        self.cross = PlainAttention(dim) if cross else None

    def forward(self, x, shape, bias=None, codes=None):
        b, t, h, w = shape
        video = x.reshape(b, t, h, w, -1).permute(0, 4, 1, 2, 3)
        x = x + self.place(video).permute(0, 2, 3, 4, 1).reshape(x.shape)
        x = x + self.attend(x, bias=bias)
        x = x if self.cross is None else x + self.cross(x, codes)
        return x + self.feed(x)


class Reference(nn.Module):
    def __init__(self, image_size, patch, dim, depth, codes=4, codebook_size=8):
        super().__init__()
        self.patch, self.side, self.codes = patch, image_size // patch, codes
        pixels, heads = 3 * patch**2, max(1, dim // 64)
        self.embed = nn.Sequential(nn.LayerNorm(pixels), nn.Linear(pixels, dim), nn.LayerNorm(dim))
        self.bias, self.bias_decoder = Bias(dim, heads), Bias(dim, heads)
        self.spatial = nn.ModuleList(PlainBlock(dim) for _ in range(depth))
        self.temporal = nn.ModuleList(PlainBlock(dim) for _ in range(depth))
        self.squeeze, self.read = nn.Linear(dim, 32), nn.Linear(32 * self.side**2, codes * 32)
        self.codebook = nn.Parameter(torch.randn(codebook_size, 32))
        self.expand = nn.Linear(32, dim)
        self.decoder = nn.ModuleList(PlainBlock(dim, cross=True) for _ in range(depth))
        self.out = nn.Linear(dim, pixels)

    def encode(self, frames):
        """(B, 2, 3, S, S) -> vectors (B, N, 32), the first frame's patches."""
        B, n = len(frames), self.side
        patches = rearrange(frames, "b t c (i p) (j q) -> b t (i j) (p q c)", p=self.patch, q=self.patch)
        x, bias = self.embed(patches).flatten(0, 1), self.bias(n)
        for block in self.spatial:
            x = block(x, (2 * B, 1, n, n), bias)
        x = rearrange(x, "(b t) s d -> (b s) t d", t=2)
        for block in self.temporal:
            x = block(x, (B * n * n, 2, 1, 1))
        x = rearrange(self.squeeze(x), "(b s) t d -> b t (s d)", b=B)
        return self.read(x[:, 1] - x[:, 0]).unflatten(1, (self.codes, 32)), patches[:, 0]

    def forward(self, batch):
        frames = batch["frames"]
        d, patches = self.encode(frames)
        z = self.codebook[torch.cdist(d.flatten(0, 1), self.codebook).argmin(1)].view_as(d)
        noise = torch.randn_like(d)
        z = d + (d - z).norm(dim=-1, keepdim=True) * noise / noise.norm(dim=-1, keepdim=True)
        x, codes, bias = self.embed(patches).detach(), self.expand(z), self.bias_decoder(self.side)
        for block in self.decoder:
            x = block(x, (len(x), 1, self.side, self.side), bias, codes)
        shape = dict(i=self.side, p=self.patch, q=self.patch)
        made = rearrange(self.out(x), "b (i j) (p q c) -> b c (i p) (j q)", **shape)
        return F.mse_loss(made, frames[:, 1]), {}


def build(which, size, device, codebook_size=8):
    torch.manual_seed(0)
    if which == "theirs":
        return Reference(**SIZES[size]).to(device)
    model = laq.model.LAQ(laq.model.LAQConfig(**SIZES[size], codebook_size=codebook_size))
    model.quantizer.quantizing = True
    return model.to(device)


def stepper(model, frames, amp):
    opt = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step():
        with amp:
            loss = model(dict(frames=frames))[0]
        loss.backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
        if hasattr(model, "quantizer"):
            model.quantizer.update(0)

    return step


def bench_step(rows, args):
    side = SIZES[args.size]["image_size"]
    frames = torch.rand(args.batch_size, 2, 3, side, side, device=args.device)
    off = torch.autocast(args.device, torch.bfloat16, enabled=False)
    amp = torch.autocast(args.device, torch.bfloat16, enabled=args.amp == "bf16")
    ours, theirs = (build(name, args.size, args.device) for name in ("ours", "theirs"))
    count = " and ".join(f"{sum(p.numel() for p in m.parameters()) / 1e6:.0f} M" for m in (ours, theirs))
    variants = dict(ours=stepper(ours, frames, amp), theirs=stepper(theirs, frames, off))
    got = interleaved(variants, args.repeats, device=args.device)
    text = f"{got['ours']:.3f} s against {got['theirs']:.3f} s ({count} parameters)"
    rows.append((f"training step, batch {args.batch_size}, {args.amp}", text, f"{got['theirs'] / got['ours']:.2f}x"))
    label(rows, args, ours.eval(), theirs.eval(), side)


@torch.no_grad()
def label(rows, args, ours, theirs, side):
    clip, gap = torch.randint(0, 256, (args.clip, side, side, 3), dtype=torch.uint8), 3
    frames = clip.to(args.device).movedim(-1, 1) / 255
    pairs = torch.stack([frames[:-gap], frames[gap:]], 1)

    def dense():
        ours.encode_clip([clip], gap)

    def one_by_one():
        for pair in pairs:
            theirs.encode(pair[None])

    got = interleaved(dict(ours=dense, theirs=one_by_one), args.repeats, device=args.device)
    rate = {name: len(pairs) / seconds for name, seconds in got.items()}
    text = f"{rate['ours']:.1f} pairs/s against {rate['theirs']:.1f}, one by one"
    rows.append((f"dense labels of {args.clip} frames", text, f"{rate['ours'] / rate['theirs']:.2f}x"))
    few = pairs[:8]
    got = interleaved(
        dict(ours=lambda: ours.encode(*few.unbind(1)), theirs=lambda: theirs.encode(few)),
        args.repeats,
        device=args.device,
    )
    text = f"{8 / got['ours']:.1f} pairs/s against {8 / got['theirs']:.1f}, batches of 8"
    rows.append(("unrelated pairs", text, f"{got['theirs'] / got['ours']:.2f}x"))


def bench_memory(rows, args):
    """Peak memory of three training steps, each model in a process of its own."""
    peak = {}
    for name in ("ours", "theirs"):
        words = [sys.executable, __file__, "--size", args.size, "--batch-size", args.batch_size, "--peak-of", name]
        words += ["--device", args.device, "--amp", args.amp, "--threads", args.threads]
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True)
        peak[name] = float(done.stdout.split()[-1])
    text = f"{peak['ours']:.2f} GiB against {peak['theirs']:.2f} GiB"
    rows.append((f"peak memory of training, batch {args.batch_size}", text, f"{peak['theirs'] / peak['ours']:.2f}x"))


def peak_of(args):
    import resource

    side = SIZES[args.size]["image_size"]
    amp = torch.autocast(args.device, torch.bfloat16, enabled=args.amp == "bf16" and args.peak_of == "ours")
    step = stepper(
        build(args.peak_of, args.size, args.device),
        torch.rand(args.batch_size, 2, 3, side, side, device=args.device),
        amp,
    )
    for _ in range(2):
        step()
    if args.device == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**30)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def bench_loader(rows, args):
    """Pairs per second of one core at 256 px, 0.6 s apart, of clips drawn here and of those in ../shared/data."""
    real = dict(
        G1="g1_lerobot_v21/converted/lerobot_v30",
        DROID="droid_ctrlworld/original/droid_subset/videos/train",
        Bridge="bridge_octo/converted",
    )
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        draw(root / "drawn")
        for name, path in dict(drawn=root / "drawn", **{name: SHARED / path for name, path in real.items()}).items():
            if path.exists():
                loader_row(rows, args, root / name, name, path)


def loader_row(rows, args, home, name, data):
    """Three ways to the same pairs: ours; ours as it was (every frame of the window at full size, a window of 48);
    a folder of the same frames as JPEGs of quality 90, as the released code reads it. The shards are made here."""
    from PIL import Image

    with contextlib.redirect_stdout(io.StringIO()):
        words = ["--data", f"{name}={data}", "--recode", "--workers", "0", "--out", str(home / "shards")]
        laq.videos_to_shards.main(words)
    source = laq.sources.read_sources([f"{name}={home / 'shards'}"], ["0.6s"], 0.0)[0]
    clips, side, rng = source.train[:4], 256, np.random.default_rng(0)
    source.train = clips
    for number, clip in enumerate(clips):
        (home / str(number)).mkdir(parents=True)
        for t, frame in enumerate(clip.frames()):
            Image.fromarray(frame).save(home / f"{number}/img_{t:05d}.jpg", quality=90)
    dataset, step, gap = laq.data.TrainPairs([source], side, 0), iter(range(10**6)), source.gaps(clips[0])[0]

    def ours():
        for _ in range(8):
            dataset[next(step), 0, 8]

    def before():
        for _ in range(8):  # 8 pairs from each window
            clip = clips[rng.integers(len(clips))]
            length = clip.meta["length"]
            begin = int(rng.integers(max(1, length - gap - 47)))
            frames = clip.frames(side, range(begin, min(begin + 48 + gap, length)))
            starts = rng.integers(len(frames) - gap, size=8)
            np.stack([frames[starts], frames[starts + gap]], 1)

    def jpegs():
        for _ in range(64):
            number = rng.integers(len(clips))
            t = rng.integers(clips[number].meta["length"] - gap)
            for frame in (t, t + gap):
                with Image.open(home / f"{number}/img_{frame:05d}.jpg") as image:
                    np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))

    got = interleaved(dict(ours=ours, before=before, jpegs=jpegs), max(7, args.repeats))
    rate = {name: 64 / seconds for name, seconds in got.items()}
    frames = sum(clip.meta["length"] for clip in clips)
    sizes = sum(clip.members["mp4"][2] for clip in clips), sum(file.stat().st_size for file in home.glob("*/*.jpg"))
    shape = "x".join(map(str, clips[0].frames(None, [0]).shape[2:0:-1]))
    text = f"{rate['ours']:.0f} pairs/s against {rate['jpegs']:.0f} from JPEGs, {rate['before']:.0f} as before; "
    text += "{:.1f} against {:.1f} kB a frame".format(*(size / frames / 1000 for size in sizes))
    rows.append((f"loader, {name} {shape}, per core", text, f"{rate['ours'] / rate['jpegs']:.2f}x"))


def draw(folder):
    """Four mp4s of 64 frames, 320 x 240, 10 per second: a smooth picture that moves to the right."""
    import av

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(4):
        low = torch.from_numpy(rng.integers(0, 255, (1, 3, 12, 16)).astype(np.float32))
        image = F.interpolate(low, (240, 320), mode="bicubic").clamp(0, 255).byte()[0].permute(1, 2, 0).numpy()
        with av.open(str(folder / f"{number}.mp4"), "w") as out:
            stream = out.add_stream("libx264", rate=10, options=dict(crf="10"))
            stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
            for t in range(64):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(image, 2 * t, 1), format="rgb24")))
            out.mux(stream.encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="published", help="of both models")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs of a training step")
    parser.add_argument("--clip", type=int, default=24, help="frames of the clip that is labelled")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where")
    parser.add_argument("--amp", choices=["off", "bf16"], default="off", help="of ours; the reference is fp32")
    parser.add_argument("--loader", action="store_true", help="only the loader")
    parser.add_argument("--peak-of", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        return peak_of(args)
    rows = []
    bench_loader(rows, args)
    if not args.loader:
        bench_memory(rows, args)
        bench_step(rows, args)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    print(f"laq, {args.size} size, torch {torch.__version__}, {where}")
    for what, text, ratio in rows:
        print(f"{what:38} {text:90} {ratio:>7}", flush=True)


if __name__ == "__main__":
    main()
