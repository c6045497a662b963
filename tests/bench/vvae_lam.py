"""Cost of vvae_lam's training step and loader, as ratios side by side.

Run:
  python tests/bench/vvae_lam.py --out bench
  python tests/bench/vvae_lam.py --parts scaling loader --out bench

Every row is a process of its own (peak memory is a process's), CPU time of a step, one thread. "dense" is the
construction of the original model, written here from its description: attention over all T x 256 encoder tokens and
(T - 1) x 515 decoder tokens [frame, 3 codes, queries], nn.MultiheadAttention with weights materialised and float masks,
BatchNorm, a second decoder for the rollout. "sdpa" is the same without materialised weights.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch
from matplotlib.figure import Figure
from timing import load
from torch import nn

HERE = Path(__file__).resolve()
FULL = dict(B=2, T=8)
STEPS = dict(ours=3, dense=2, sdpa=2)  # the first warms up; the fastest of the others counts


class DenseBlock(nn.Module):
    def __init__(self, dim, heads, weights):
        super().__init__()
        self.norm1, self.norm2, self.weights = nn.LayerNorm(dim), nn.LayerNorm(dim), weights
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, mask):
        h = self.norm1(x)
        x = x + self.attention(h, h, h, attn_mask=mask, need_weights=self.weights)[0]
        return x + self.mlp(self.norm2(x))


class DenseReference(nn.Module):
    """The original model: latents (B, T, 16, 64, 64) -> loss; 3 codes of a codebook of 12 per transition."""

    def __init__(self, weights, dim=512, depth=3, heads=8, patches=256, code=128, longest=20):
        super().__init__()
        self.patches = patches
        self.enter, self.norm = nn.Conv2d(16, patches, 4, 4), nn.BatchNorm2d(patches)
        self.leave = nn.ConvTranspose2d(patches, 16, 4, 4)
        self.encode_in, self.frame_in = nn.Linear(patches, dim), nn.Linear(patches, dim)
        self.space, self.time = (nn.Parameter(torch.randn(n, dim) * 0.02) for n in (patches, longest))
        self.query = nn.Parameter(torch.randn(patches, dim) * 0.02)
        self.place = nn.Parameter(torch.randn(longest * (2 * patches + 3), dim) * 0.02)
        self.encoder, self.decoder, self.rolling = (
            nn.ModuleList(DenseBlock(dim, heads, weights) for _ in range(depth)) for _ in range(3)
        )
        self.to_code, self.from_code = nn.Linear(dim, 3 * code), nn.Linear(code, dim)
        self.out = nn.Linear(dim, patches)
        self.codebook = nn.Parameter(torch.empty(12, code).uniform_(-1 / 12, 1 / 12))

    def decode(self, blocks, frames, z):
        """Patches (B, T, 256, 256) and codes (B, T, 3, 128) -> patches of the next frames."""
        T, N = frames.shape[1:3]
        queries = self.query.expand(*frames.shape[:2], -1, -1)
        h = torch.cat([self.frame_in(frames), self.from_code(z), queries], 2).flatten(1, 2)
        h = h + self.place[: h.shape[1]]
        group = torch.arange(T).repeat_interleave(2 * N + 3)
        mask = torch.zeros(len(group), len(group)).masked_fill(group[None] > group[:, None], float("-inf"))
        for block in blocks:
            h = block(h, mask)
        return self.out(h.unflatten(1, (T, -1))[:, :, -N:])

    def forward(self, x):
        B, T = x.shape[:2]
        patches = self.norm(self.enter(x.flatten(0, 1))).flatten(2).transpose(1, 2).unflatten(0, (B, T))
        h = (self.encode_in(patches) + self.space + self.time[:T, None]).flatten(1, 2)
        frame = torch.arange(T).repeat_interleave(self.patches)
        mask = torch.zeros(len(frame), len(frame)).masked_fill(frame[None] > frame[:, None] + 1, float("-inf"))
        for block in self.encoder:
            h = block(h, mask)
        z = self.to_code(h.unflatten(1, (T, -1)).mean(2)[:, :-1]).unflatten(-1, (3, -1))
        chosen = self.codebook[torch.cdist(z.flatten(0, 2), self.codebook).argmin(1)].view_as(z)
        loss = 1.25 * (chosen - z).square().mean()
        q = z + (chosen - z).detach()

        def frames(tokens):
            side = int(self.patches**0.5)
            return self.leave(tokens.flatten(0, 1).transpose(1, 2).unflatten(2, (side, side))).unflatten(0, (B, -1))

        predicted = self.decode(self.decoder, patches[:, :-1], q)
        loss = loss + (frames(predicted) - x[:, 1:]).square().mean()
        t = (T - 1) // 2  # the middle anchor: its mean cost
        context = patches[:, : t + 1]
        first = self.decode(self.rolling, context, q[:, : t + 1])[:, -1:].detach()
        second = self.decode(self.rolling, torch.cat([context, first], 1), q[:, : t + 2])[:, -1:]
        return loss + (frames(torch.cat([first, second], 1)) - x[:, t + 1 : t + 3]).square().mean()


def worker(kind, B, T):
    """Prints a JSON line: CPU seconds of a step (forward, backward, AdamW), peak MB and MB before it, parameters."""
    torch.manual_seed(0)
    if kind == "ours":
        this = load("vvae_lam").model
        model = this.VVAELatentActionVQVAE(this.Config())
        model.quantizer.quantizing = True
    else:
        model = DenseReference(weights=kind == "dense")
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4)
    latents = torch.randn(B, T, 16, 64, 64)
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, []
    for _ in range(STEPS[kind]):
        start = time.process_time()
        anchor = torch.full((B,), (T - 1) // 2)
        loss = model(dict(latents=latents, anchor=anchor))[0] if kind == "ours" else model(latents)
        loss.backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
        if kind == "ours":
            model.quantizer.ema_update()
        times.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size = sum(p.numel() for p in model.parameters())
    print(json.dumps(dict(s=min(times[1:]), mb=peak, before=before, parameters=size)))


def measure(kind, B, T):
    words = [sys.executable, str(HERE), "--worker", kind, str(B), str(T)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        return None  # out of memory, as a rule
    return json.loads(done.stdout.splitlines()[-1])


def bench_step():
    rows = {kind: measure(kind, **FULL) for kind in ("ours", "dense", "sdpa")}
    yield f"\nTraining step, B {FULL['B']}, T {FULL['T']}, 16x64x64, the original widths\n"
    yield "| | parameters | s / step | speed-up of ours | peak MB | ours / it | above start-up |"
    yield "| --- " + "| ---: " * 6 + "|"
    ours = rows["ours"]
    for kind, row in rows.items():
        if row is None:
            yield f"| {kind} | did not finish | | | | | |"
            continue
        above = (ours["mb"] - ours["before"]) / (row["mb"] - row["before"])
        ratios = f"{row['s'] / ours['s']:.2f}x | {row['mb']:.0f} | {ours['mb'] / row['mb']:.2f} | {above:.2f}"
        yield f"| {kind} | {row['parameters'] / 1e6:.1f} M | {row['s']:.2f} | {ratios} |"


def bench_scaling(out):
    lengths = [4, 8, 16, 32]
    rows = [measure("ours", 1, T) for T in lengths]
    yield "\nOurs against the number of latent frames, B 1, 16x64x64\n"
    yield "| T | s / step | per frame, against T 4 | peak MB |\n| ---: | ---: | ---: | ---: |"
    for T, row in zip(lengths, rows, strict=True):
        yield f"| {T} | {row['s']:.2f} | {row['s'] / T / (rows[0]['s'] / 4):.2f}x | {row['mb']:.0f} |"
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.plot(lengths, [row["s"] for row in rows], color="tab:blue", marker="o", label="measured")
    linear = [rows[0]["s"] * T / 4 for T in lengths]
    axis.plot(lengths, linear, color="0.55", ls="--", label="linear from T 4")
    axis.set(
        xlabel="latent frames per sequence", ylabel="CPU seconds per step", title="cost of a step (lower is better)"
    )
    axis.legend(frameon=False)
    figure.savefig(out / "scaling.png", dpi=120)


def bench_loader(sequences=200, length=8):
    """Sequences/s of our reader against opening the file and reading the whole data set for every sequence."""
    loaded = load("vvae_lam")
    yield "\nLoader, sequences of 8 latent frames 16x64x64, float16, recordings of 60 latents\n"
    yield "| storage | ours / s | naive / s | ratio |\n| --- | ---: | ---: | ---: |"
    for name, storage in (("plain", {}), ("gzip", dict(compression="gzip", compression_opts=4))):
        with tempfile.TemporaryDirectory() as folder:
            rng = np.random.default_rng(0)
            for n in range(4):
                with h5py.File(Path(folder, f"{n}.h5"), "w") as file:
                    data = rng.normal(size=(30, 16, 2, 64, 64)).astype(np.float16)
                    file.create_dataset("embeddings", data=data, chunks=(1, 16, 2, 64, 64), **storage)
                    file.attrs["causal"] = True  # both latents of a chunk are used
            found = loaded.data.Sequences(loaded.data.read_sources([folder], val_share=0.0), length)
            picks = rng.integers(0, len(found), sequences)

            def naive(i, found=found):
                with h5py.File(found.recordings[found.owner[i]].path, "r", locking=False) as file:
                    x = file["embeddings"][()].astype(np.float32)
                x = x.swapaxes(1, 2).reshape(-1, 16, 64, 64)
                return x[found.first[i] : found.first[i] + length]

            assert np.array_equal(naive(picks[0]), found[picks[0]])
            speed = []
            for read, few in ((found.__getitem__, 1), (naive, 20)):
                start = time.process_time()
                for i in picks[::few]:
                    read(i)
                speed.append(len(picks[::few]) / (time.process_time() - start))
        yield f"| {name} | {speed[0]:.0f} | {speed[1]:.1f} | {speed[0] / speed[1]:.1f}x |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench", help="folder of the table and the figure [bench]")
    parts = ["step", "scaling", "loader"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to measure [all]")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.worker:
        worker(args.worker[0], *map(int, args.worker[1:]))
        return
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "bench.md", "a") as file:
        makers = dict(step=bench_step, scaling=lambda: bench_scaling(out), loader=bench_loader)
        for part in args.parts:
            for line in makers[part]():
                print(line, flush=True)
                file.write(line + "\n")


if __name__ == "__main__":
    main()
