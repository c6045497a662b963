"""Speed and memory of pi05_finetune beside LeRobot's own policy and training loop, side by side in one process.

Run:
  python tests/bench/pi05_finetune.py
  python tests/bench/pi05_finetune.py --device cuda --size full --batch-size 4

LeRobot's column is its PI05Policy with attention and checkpointing as upstream writes them, and update_policy of its
lerobot_train under Accelerate. Times are medians of steps that take turns, of CPU time on a CPU.
"""

import argparse
import contextlib
import statistics
import time

import torch
from timing import load
from transformers.models.gemma.modeling_gemma import eager_attention_forward

pi05 = load("pi05_finetune", "lerobot_patch", "processor")
# between the tiny size and the real one, so that arithmetic and not Python is measured
MEDIUM = {
    "gemma_2b": dict(width=256, depth=4, mlp_dim=1024, num_heads=8, num_kv_heads=1, head_dim=32),
    "gemma_300m": dict(width=128, depth=4, mlp_dim=512, num_heads=8, num_kv_heads=1, head_dim=32),
}
MEDIUM_VISION = dict(hidden_size=192, num_hidden_layers=4, num_attention_heads=4, intermediate_size=768)


def build(args, **more):
    row = {name: [value] * 7 for name, value in dict(mean=0, std=1, min=-1, max=1, q01=-1, q99=1).items()}
    stats = {"observation.state": row, "action": row}
    torch.manual_seed(0)
    kwargs = dict(gradient_checkpointing=more.pop("gradient_checkpointing", False), device=args.device)
    more = dict(size="full" if args.size == "full" else "tiny", chunk=50, image_size=224) | more
    return pi05.model.Pi05(pi05.model.Pi05Config(["top", "wrist"], 7, 7, stats, **more), **kwargs).train()


def a_batch(args):
    """A ready batch of two cameras, 7 dims, prompts of 120 of 200 tokens."""
    B, generator = args.batch_size, torch.Generator().manual_seed(0)
    batch = {f"observation.images.{n}": torch.rand(B, 3, 224, 224, generator=generator) for n in ("top", "wrist")}
    batch["observation.language.tokens"] = torch.randint(5, 500, (B, 200), generator=generator)
    batch["observation.language.attention_mask"] = torch.arange(200).expand(B, 200) < 120
    batch |= dict(action=torch.randn(B, 50, 7, generator=generator), mask=torch.ones(B, 50, dtype=torch.bool))
    batch |= dict(noise=torch.randn(B, 50, 32, generator=generator), time=torch.rand(B, generator=generator))
    return {key: value.to(args.device) for key, value in batch.items()}


class Ours:
    """The loop of pi05_finetune/train.py: clipping, log, running average."""

    attention = "sdpa"

    def __init__(self, args, checkpointing, ema=0.0):
        self.args, self.model = args, build(args, gradient_checkpointing=checkpointing, ema=ema)
        self.learned = [p for p in self.model.parameters() if p.requires_grad]
        self.opt = torch.optim.AdamW(self.learned, lr=2.5e-5, betas=(0.9, 0.95), fused=args.device != "cpu")
        self.amp = torch.autocast(args.device, torch.bfloat16, enabled=args.amp == "bf16")

    def step(self, batch):
        with self.amp:
            loss, _ = self.model(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learned, 1.0)
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        self.model.update_ema()


class LeRobots:
    """LeRobot's policy and its update_policy. Attention materialises its float32 softmax; checkpointing is nested."""

    attention = "eager"

    def __init__(self, args, checkpointing):
        from accelerate import Accelerator
        from lerobot.scripts.lerobot_train import update_policy
        from lerobot.utils.logging_utils import AverageMeter, MetricsTracker

        model = build(args)
        model.requires_grad_(True)  # upstream leaves what the loss does not reach to DDP's search
        self.policy, core = model.policy, model.policy.model
        if checkpointing:
            type(core).__mro__[1].gradient_checkpointing_enable(core)
        self.update, kinds = update_policy, {"off": "no", "bf16": "bf16"}
        self.accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=kinds[args.amp])
        opt = torch.optim.AdamW(self.policy.parameters(), lr=2.5e-5, betas=(0.9, 0.95), weight_decay=0.01)
        self.policy, self.opt = self.accelerator.prepare(self.policy, opt)
        names = ("loss", "grad_norm", "lr", "update_s")
        meters = {name: AverageMeter(name, ":.3f") for name in names}
        self.tracker = MetricsTracker(args.batch_size, 1, 1, meters, initial_step=0)

    def step(self, batch):
        self.update(self.tracker, self.policy, batch, self.opt, 1.0, self.accelerator)


@contextlib.contextmanager
def attention(kind):
    """eager: transformers' own attention, which materialises its float32 softmax, as LeRobot calls it."""
    patch = pi05.lerobot_patch
    ours = patch.attention
    patch.attention = patch.modeling_gemma.eager_attention_forward = (
        eager_attention_forward if kind == "eager" else ours
    )
    yield
    patch.attention = patch.modeling_gemma.eager_attention_forward = ours


def peak(runner, batch):
    """MiB by which the allocations of one step exceed what was there before it, at their highest, on a CPU."""
    with torch.profiler.profile(profile_memory=True) as profile, attention(runner.attention):
        runner.step(batch)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / 2**20


def timed(runner, batch, device):
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    with attention(runner.attention):
        runner.step(batch)
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def compare(args, rows, checkpointing):
    """Both columns taking turns; on CUDA also the peak of a step of each, alone on the device."""
    batch, makers = a_batch(args), dict(ours=Ours, lerobot=LeRobots)
    what = f"{args.size} size, batch {args.batch_size}" + (", checkpointing" if checkpointing else "")
    if args.device == "cpu":
        runners = {name: make(args, checkpointing) for name, make in makers.items()}
        times = {name: [] for name in runners}
        for repeat in range(args.repeats + 1):
            for name, runner in runners.items():
                seconds = timed(runner, batch, args.device)
                times[name] += [seconds] * (repeat > 0)  # the first warms up
        memory = {name: peak(runner, batch) for name, runner in runners.items()}
        kind = "peak of a step beyond weights and optimizer"
    else:  # one after the other: two full models do not fit
        times, memory, kind = {}, {}, "peak on the device"
        for name, make in makers.items():
            torch.cuda.reset_peak_memory_stats()
            runner = make(args, checkpointing)
            times[name] = [timed(runner, batch, args.device) for _ in range(args.repeats + 1)][1:]
            memory[name] = torch.cuda.max_memory_allocated() / 2**20
            del runner
            torch.cuda.empty_cache()
    middle = {name: statistics.median(values) for name, values in times.items()}
    ratio = middle["ours"] / middle["lerobot"]
    rows.append((f"step, {what}", f"{middle['ours']:.3f} s", f"{middle['lerobot']:.3f} s", f"{ratio:.2f}"))
    ratio = memory["ours"] / memory["lerobot"]
    rows.append((f"{kind}, {what}", f"{memory['ours']:.0f} MiB", f"{memory['lerobot']:.0f} MiB", f"{ratio:.2f}"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--size", choices=["medium", "full"], default="medium", help="full: random weights [medium]")
    parser.add_argument("--batch-size", type=int, default=2, help="samples per step [2]")
    parser.add_argument("--amp", choices=["off", "bf16"], default="off", help="mixed precision of both [off]")
    parser.add_argument("--repeats", type=int, default=7, help="steps of each [7]")
    parser.add_argument("--threads", type=int, default=1, help="torch threads [1]")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    if args.size == "medium":
        lerobot = pi05.lerobot_patch.modeling_pi05
        lerobot.get_gemma_config = lambda variant: lerobot.GemmaConfig(**MEDIUM[variant])
        pi05.lerobot_patch.TINY_VISION = MEDIUM_VISION
    for checkpointing in (False, True):
        compare(args, rows, checkpointing)
    print(f"\ntorch {torch.__version__}, {args.device}, {args.threads} thread(s), amp {args.amp}\n")
    print("| what | ours | LeRobot's | ratio |\n| --- | ---: | ---: | ---: |")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
