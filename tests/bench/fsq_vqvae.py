"""Speed of fsq_vqvae, as ratios side by side in one process.

Run:
  pip install vector-quantize-pytorch accelerate
  python tests/bench/fsq_vqvae.py --data g1=PATH --threads 1

Times are medians of interleaved windows of this process's CPU time, so a busy machine disturbs the ratios little.
"""

import argparse
import contextlib
import io
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from timing import interleaved, load
from torch import nn

fsq_vqvae = load("fsq_vqvae", "demo")


def bench_quantiser(rows):
    try:
        from vector_quantize_pytorch import FSQ
    except ImportError:
        rows.append(("FSQ", "vector-quantize-pytorch is not installed", ""))
        return
    levels = [8, 5, 5, 5]
    ours, theirs = fsq_vqvae.model.FSQ(levels), FSQ(levels)
    z = torch.randn(256, 16, 4)
    assert torch.equal(ours(z)[1], theirs(z)[1].long()), "codes differ"
    torch.testing.assert_close(ours(z)[0], theirs(z)[0])
    leaf = z.clone().requires_grad_()

    def both(quantiser):
        quantiser(leaf)[0].sum().backward()
        leaf.grad = None

    def forward(quantiser):
        with torch.no_grad():
            quantiser(z)

    for what, run in (("forward", forward), ("forward + backward", both)):
        got = interleaved({"ours": lambda run=run: run(ours), "theirs": lambda run=run: run(theirs)}, 40, 20)
        text = f"{got['ours'] * 1e6:.0f} us against {got['theirs'] * 1e6:.0f} us (vector-quantize-pytorch)"
        rows.append((f"FSQ (256, 16, 4), {what}", text, f"{got['theirs'] / got['ours']:.2f}x"))


def real_model(sources, **kwargs):
    torch.manual_seed(0)
    return fsq_vqvae.model.FSQVQVAE([fsq_vqvae.data.describe(source) for source in sources], **kwargs)


def bench_latency(rows, sources):
    model = real_model(sources).eval()
    chunk = sources[0].gather(*[x[:1] for x in sources[0].starts(False)])[0][0]
    got = interleaved({"both": lambda: model.decode(model.encode(chunk))}, 20, 20)
    rows.append(("encode + decode of one chunk, default size", f"{got['both'] * 1e3:.2f} ms", ""))


class PerStep(nn.Module):
    """A tokenizer of the seed's shape: one transformer input per time step, latent 256 per step cut into groups of
    len(levels), each group one token; MSE and 0.25 commitment. Written from the seed's description."""

    def __init__(self, dims, width, layers, heads, levels, latent=256):
        super().__init__()
        self.fsq, groups = fsq_vqvae.model.FSQ(levels), len(levels)
        self.latent = latent // groups * groups
        block = dict(nhead=heads, dim_feedforward=4 * width, activation="gelu", batch_first=True, norm_first=True)
        self.enter, self.leave = nn.Linear(dims, width), nn.Linear(width, dims)
        self.down, self.up = nn.Linear(width, self.latent), nn.Linear(self.latent, width)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, dropout=0.0, **block), layers)
        self.decoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, dropout=0.0, **block), layers)

    def forward(self, x):
        z = self.down(self.encoder(self.enter(x))).unflatten(-1, (-1, len(self.fsq.levels)))
        codes, _ = self.fsq(z)
        x_hat = self.leave(self.decoder(self.up(codes.flatten(2))))
        return (x_hat - x).square().mean() + 0.25 * (z - codes.detach()).square().mean()


def bench_step(rows, sources):
    batch = fsq_vqvae.data.TrainBatches(sources, 64, 0)[0]
    ours = real_model(sources)
    theirs = PerStep(ours.dim, 128, 2, 4, [8, 5, 5, 5])
    x = ours.normalise(batch["actions"], batch["mask"], batch["source"])[:, : sources[0].chunk]

    def step(model, loss):
        loss.backward()
        model.zero_grad(set_to_none=True)

    got = interleaved({"ours": lambda: step(ours, ours(batch)[0]), "theirs": lambda: step(theirs, theirs(x))}, 7, 2)
    tokens = sources[0].chunk * theirs.latent // 4
    text = f"{got['ours'] * 1e3:.0f} ms, 8 tokens against {got['theirs'] * 1e3:.0f} ms, {tokens} tokens (a step each)"
    rows.append(("training step, batch 64, width 128, depth 2 + 2", text, f"{got['theirs'] / got['ours']:.2f}x"))


def bench_loop(rows, sources, words):
    """The whole train.py loop (AMP, scaler, accumulation, log, stop flag) against a bare one and Accelerate's."""
    sizes = dict(hidden_dim=32, latent_dim=16, num_encoder_layers=1, num_decoder_layers=1)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    steps, batch_size = 60, 16

    def bare_like(prepare):
        model = real_model(sources, **sizes)
        opt = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
        train = fsq_vqvae.data.prepare_dataloaders(batch_size, sources, steps=steps)[1]
        one_step = prepare(model, opt)
        start = None
        for number, batch in enumerate(train):
            if number == 20:
                start = time.process_time()
            one_step(batch)
        return (time.process_time() - start) / (steps - 20)

    def bare(model, opt):
        def step(batch):
            loss, _ = model(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)

        return step

    def accelerated(model, opt):
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model, opt = accelerator.prepare(model, opt)

        def step(batch):
            with accelerator.accumulate(model):
                loss, _ = model(batch)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                opt.zero_grad(set_to_none=True)

        return step

    def full():
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            clock = time.monotonic
            time.monotonic = time.process_time  # the log's steps_per_s in CPU time, as the others
            try:
                late = ["--eval-every", "9999", "--save-every", "9999", "--val-share", "0", "--log-every", "20"]
                fsq_vqvae.train.main(
                    [*words, "--out", out + "/run", "--steps", steps, "--batch-size", batch_size, *late, *flags]
                )
            finally:
                time.monotonic = clock
            lines = [json.loads(line) for line in Path(out, "run", "log.jsonl").read_text().splitlines()]
            return 1 / statistics.mean(line["steps_per_s"] for line in lines[1:])

    variants = {"bare": lambda: bare_like(bare), "full": full}
    try:
        import accelerate  # noqa: F401

        variants["accelerate"] = lambda: bare_like(accelerated)
    except ImportError:
        pass
    times = {name: [] for name in variants}
    for _, (name, run) in itertools.product(range(7), variants.items()):
        times[name].append(run())
    pairs = {name: statistics.median(np.array(times[name]) / np.array(times["bare"])) for name in variants}
    bare_ms = statistics.median(times["bare"]) * 1e3
    rows.append(
        (f"full loop against a bare one ({bare_ms:.1f} ms a step)", "CPU time per step", f"{pairs['full']:.3f}x")
    )
    if "accelerate" in pairs:
        rows.append(("Accelerate's loop against a bare one", "CPU time per step", f"{pairs['accelerate']:.3f}x"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", help="as for fsq_vqvae/train.py [the demo's data]")
    parser.add_argument("--threads", type=int, default=1, help="torch threads [1]")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            fsq_vqvae.demo.write(Path(folder) / "demo")
            args.data = [f"demo={folder}/demo"]
        sources = fsq_vqvae.data.read_sources(args.data, ["1s"])
        rows = []
        bench_quantiser(rows)
        bench_latency(rows, sources)
        bench_step(rows, sources)
        bench_loop(rows, sources, ["--data", *args.data, "--device", "cpu"])
    print(f"torch {torch.__version__}, {args.threads} thread(s), {args.data}\n")
    print("| what | measured | ratio |\n| --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
