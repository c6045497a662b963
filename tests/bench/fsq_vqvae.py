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

fsq_vqvae = load("fsq_vqvae", "demo", "fsq", "baselines")


def bench_quantizer(rows):
    try:
        from vector_quantize_pytorch import FSQ
    except ImportError:
        rows.append(("FSQ", "vector-quantize-pytorch is not installed", ""))
        return
    levels = [8, 5, 5, 5]
    ours, theirs = fsq_vqvae.fsq.FSQ(levels), FSQ(levels)
    z = torch.randn(256, 16, 4)
    assert torch.equal(ours(z)[1], theirs(z)[1].long()), "codes differ"
    torch.testing.assert_close(ours(z)[0], theirs(z)[0])
    leaf = z.clone().requires_grad_()

    def both(quantizer):
        quantizer(leaf)[0].sum().backward()
        leaf.grad = None

    def forward(quantizer):
        with torch.no_grad():
            quantizer(z)

    for what, run in (("forward", forward), ("forward + backward", both)):
        got = interleaved({"ours": lambda run=run: run(ours), "theirs": lambda run=run: run(theirs)}, 40, 20)
        text = f"{got['ours'] * 1e6:.0f} us against {got['theirs'] * 1e6:.0f} us (vector-quantize-pytorch)"
        rows.append((f"FSQ (256, 16, 4), {what}", text, f"{got['theirs'] / got['ours']:.2f}x"))


def fitted(sources, **sizes):
    torch.manual_seed(0)
    described = [fsq_vqvae.data.describe(source) for source in sources]
    samples = [source.sample(fsq_vqvae.model.CONTEXT["action"]) for source in sources]
    return fsq_vqvae.model.FSQVQVAE.fit(described, samples, **sizes)


def bench_fit(rows, sources):
    start = time.process_time()
    fitted(sources)
    chunks = len(sources[0].sample(())["mask"])
    rows.append((f"fit of the closed form to {chunks} chunks", f"{time.process_time() - start:.1f} s", ""))


def bench_latency(rows, sources):
    model = fitted(sources).eval()
    chunk = sources[0].gather(*[x[:1] for x in sources[0].starts(False)])[0][0]
    for what, used in (("closed form", False), ("with the network", True)):
        model.coders[0].use_network.fill_(used)
        got = interleaved({"both": lambda: model.decode(model.encode(chunk), context=chunk[0])}, 20, 20)
        rows.append((f"encode + decode of one chunk, {what}", f"{got['both'] * 1e3:.2f} ms", ""))


def bench_step(rows, sources):
    batch = fsq_vqvae.data.TrainBatches(sources, 128, 0, context=fsq_vqvae.model.CONTEXT["action"])[0]
    ours = fitted(sources)
    theirs = fsq_vqvae.baselines.RegisterTokenizer(sources[0].chunk, sources[0].actions.shape[1], 8)
    x = batch["actions"] - batch["context"]

    def step(model, loss):
        loss.backward()
        model.zero_grad(set_to_none=True)

    def plain():
        step(theirs, (theirs(x) - x).square().mean())

    got = interleaved({"ours": lambda: step(ours, ours(batch)[0]), "theirs": plain}, 7, 2)
    text = f"{got['ours'] * 1e3:.0f} ms against {got['theirs'] * 1e3:.0f} ms (register transformer + FSQ, width 128)"
    rows.append(("training step, batch 128", text, f"{got['theirs'] / got['ours']:.2f}x"))


def bench_loop(rows, sources, words):
    """The whole train.py loop (AMP, scaler, accumulation, log, stop flag) against a bare one and Accelerate's."""
    steps, batch_size = 60, 128

    def bare_like(prepare):
        model = fitted(sources)
        opt = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
        known = fsq_vqvae.model.CONTEXT["action"]
        batches = fsq_vqvae.data.TrainBatches(sources, batch_size, 0, context=known)
        train = fsq_vqvae.data.train_loader(batches, 0, steps)
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
            clock = time.perf_counter
            time.perf_counter = time.process_time  # the log's steps_per_s in CPU time, as the others
            try:
                late = "--eval-every 9999 --save-every 9999 --val-share 0 --log-every 20".split()
                sizes = f"--steps {steps} --batch-size {batch_size}".split()
                fsq_vqvae.train.main([*words, "--out", out + "/run", *sizes, *late])
            finally:
                time.perf_counter = clock
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
        bench_quantizer(rows)
        bench_fit(rows, sources)
        bench_latency(rows, sources)
        bench_step(rows, sources)
        bench_loop(rows, sources, ["--data", *args.data, "--device", "cpu"])
    print(f"torch {torch.__version__}, {args.threads} thread(s), {args.data}\n")
    print("| what | measured | ratio |\n| --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
