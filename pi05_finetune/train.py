# /// script
# dependencies = ["lerobot>=0.4.2,<0.5", "transformers>=4.57.1,<5", "h5py", "matplotlib"]
# ///
"""Train Pi05: fine-tunes LeRobot's pi0.5 policy on recorded episodes.

Run:
  python pi05_finetune/train.py
  python pi05_finetune/train.py --data so100=PATH --init PI05_BASE --tokenizer PALIGEMMA --out runs/so100
  torchrun --nproc_per_node 8 pi05_finetune/train.py @pi05_finetune/phase_b.args --data so100=PATH --init PI05_BASE
"""

import argparse
import contextlib
import datetime
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import demo
import figures
from checkpoint import load_run, read_config, save_run
from compute_norms import open_norms, relative_index
from data import AUGMENT, example, prepare_dataloaders
from model import Pi05, Pi05Config, check_first_step, plan
from processor import check_tokenizer, write_toy_tokenizer
from readers.dataset import data_hash, describe, open_data, restore_split, split, split_of
from validate import check

import common

HERE = Path(__file__).resolve().parent
BETAS = (0.9, 0.95)  # AdamW, as in openpi and LeRobot
DRY_STEPS = 4  # steps of --dry-run; the first one warms up


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    whole, real = dict(type=int, metavar="N"), dict(type=float, metavar="X")

    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", metavar="PATH", help="PATH or NAME=PATH; without it the demo, on data it writes itself")
    add("--spec", metavar="FILE", help="YAML or JSON; without it DATA/spec.yaml, or what the first episode tells")
    add("--tokenizer", metavar="DIR", help="local folder of PaliGemma's tokenizer; tiny has a toy one")
    add("--norms", metavar="DIR", help="folder of compute_norms.py, for the same data; without it measured")
    augment = "jitter: brightness and contrast by 5 %%; openpi: crop, rotation, colour"
    add("--augment", choices=list(AUGMENT), default="none", help=augment)
    add("--max-episodes", help="use the first N episodes only", **whole)
    add("--val-share", default=0.1, help="share of the episodes held out, by a hash of their names", **real)
    add("--val-episodes", nargs="+", default=[], metavar="IDS", help="hold out just these: 56-69,80 or g1=56-69 b=3")
    add("--val-stride", default=10, help="steps between two validation chunks", **whole)
    add("--workers", default=0, help="loader processes per rank; 0 loads in the training process", **whole)

    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--size", choices=["full", "tiny"], default="full", help="tiny: 408 thousand random weights, for trying things")
    add("--chunk", default=50, help="actions per prediction", **whole)
    add("--image-size", default=224, help="side of the images that the model sees, a multiple of 14", **whole)
    add("--prompt-tokens", default=200, help="room for the prompt; too little is an error", **whole)
    add("--train", choices=["all", "frozen-vision", "expert", "lora"], default="all", help="what learns: see README")
    add("--relative", nargs="*", metavar="NAME", help="predict actions minus the state, but for NAMES or '*gripper*'")

    optimisation = parser.add_argument_group("optimisation")
    add = optimisation.add_argument
    add("--batch-size", default=32, help="samples per optimizer step, over all processes and micro-steps", **whole)
    add("--lr", default=2.5e-5, help="peak learning rate", **real)
    add("--lr-end", default=2.5e-6, help="learning rate after the last step (cosine)", **real)
    add("--warmup", default=1000, help="steps of linear warm-up", **whole)
    add("--weight-decay", default=1e-10, help="AdamW weight decay of matrices", **real)
    add("--clip", default=1.0, help="largest norm of the gradient", **real)
    add("--ema", default=0.99, help="decay of the weights' average, which is validated and exported; 0: none", **real)
    add("--seed", default=0, help="of weights, batches, augmentation and noise", **whole)

    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="DIR", help=f"folder of this run; without it the next free runs/{HERE.name}/NNN")
    add("--resume", action="store_true", help="go on from OUT's newest checkpoint, or start if there is none")
    add("--init", metavar="CKPT", help="checkpoint whose weights to start from")
    add("--dry-run", action="store_true", help="print sizes, memory and time, take a few steps, keep nothing")
    add("--gradient-checkpointing", action="store_true", help="recompute activations in the backward pass: less memory")
    add("--fsdp", action="store_true", help="split weights, optimizer and average over the processes (fully_shard)")
    add("--steps", default=30_000, help="optimizer steps in all", **whole)
    add("--accum", default=1, help="micro-steps per optimizer step: less memory, same batch", **whole)
    add("--amp", choices=["off", "bf16", "fp16"], default="off", help="mixed precision")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    add("--log-every", default=50, help="steps between two log lines", **whole)
    add("--eval-every", default=1000, help="steps between two validations", **whole)
    add("--save-every", default=1000, help="steps between two checkpoints", **whole)
    add("--keep", default=2, help="newest checkpoints kept beside the best", **whole)
    add("--wandb", metavar="PROJECT", help="also log to this Weights & Biases project")

    args = parser.parse_args(argv)
    args.demo = args.data is None
    if args.demo:  # its preset first, so that the flags given here win
        given = sys.argv[1:] if argv is None else argv
        args = parser.parse_args([f"@{HERE / 'demo.args'}", *given], argparse.Namespace(demo=True))
    positive = "val_stride chunk image_size prompt_tokens batch_size lr clip steps accum"
    positive += " max_episodes" * (args.max_episodes is not None)
    for name in f"{positive} log_every eval_every save_every keep".split():
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    for name in "val_share workers lr_end warmup weight_decay ema seed".split():
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must not be negative")
    if args.image_size % 14 or args.ema >= 1 or args.val_share >= 1:
        parser.error("--image-size must be a multiple of 14 (a patch), --ema and --val-share below 1")
    micro_steps = args.accum * int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % micro_steps:
        parser.error(f"--batch-size {args.batch_size} is no multiple of {micro_steps} (micro-steps x processes)")
    if args.fsdp and (args.train == "lora" or args.amp == "fp16" or "RANK" not in os.environ):
        parser.error("--fsdp needs torchrun, and neither --train lora, which fits one GPU, nor --amp fp16")
    if args.resume and not args.out:
        parser.error("--resume needs --out, the folder of the run to go on with")
    args.folder = HERE.name
    args.fixed = [action.dest for group in (model, optimisation) for action in group._group_actions]
    return args


def setup(args):
    """Join torchrun's process group, if there is one, and pick the device. Returns rank, world, device."""
    rank, world, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if "OMP_NUM_THREADS" not in os.environ:  # a core for others: threads that wait for a lost core stall all the rest
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    name = args.device
    if name == "auto":
        name = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:
        if name not in ("cpu", "mps") and ":" not in name:
            name = f"{name}:{local % max(1, torch.accelerator.device_count())}"  # Slurm may show each task one GPU
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise common.DataError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        timeout = datetime.timedelta(seconds=float(os.environ.get("DIST_TIMEOUT", 600)))
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    return rank, max(world, 1), device


def learning_rate(step, args):
    """Linear warm-up to --lr, then half a cosine down to --lr-end at --steps."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = min(1.0, (step - args.warmup) / max(1, args.steps - args.warmup))
    return args.lr_end + (args.lr - args.lr_end) * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def validate(model, loaders, device, amp):
    """Loss per data set over all ranks, with fixed noise and time, and a window of each, recorded and predicted.

    A held-out file that cannot be read costs the metrics; with --fsdp, where all ranks compute together, the run.
    """
    model.eval()
    totals, counts, examples = dict(broken=0), dict(broken=1), {}
    try:
        with model.use_ema(), amp:
            for name, loader in loaders.items():
                for batch in loader:
                    loss, _ = model({key: value.to(device) for key, value in batch.items()})
                    key, size = f"val/{name}/loss", len(batch["mask"])
                    totals[key], counts[key] = totals.get(key, 0.0) + loss.item() * size, counts.get(key, 0) + size
                if len(loader.sampler) and (common.is_main() or model.is_split):
                    examples[name] = example(model, loader)
    except common.DataError as error:
        if model.is_split:
            raise
        common.warn(f"held-out data cannot be read, no validation: {str(error).splitlines()[-1]}")
        totals["broken"] = 1
    model.train()
    metrics = common.mean(totals, counts)
    if metrics.pop("broken"):
        return {}, {}
    metrics["val/loss"] = sum(metrics[f"val/{name}/loss"] for name in loaders) / len(loaders)
    return metrics, examples


def main(argv=None):
    # --- setup
    args = parse(argv)
    os.environ.setdefault("DIST_TIMEOUT", "7200")  # a checkpoint of tens of gigabytes takes minutes, the others wait
    rank, world, device = setup(args)
    if args.demo and rank == 0:
        demo.write(args.data[0].partition("=")[2])
    common.broadcast()  # the other ranks wait for the demo's data
    common.seed_all(args.seed)
    check_tokenizer(args.tokenizer, args.size)
    spec, episodes = open_data(args.data, args.spec, args.max_episodes, print if rank == 0 else str)
    warnings, changes = check(episodes, spec), []
    train, held_out = split(episodes, args.val_share, args.val_episodes)
    state_index = relative_index(args.relative, spec, train)
    begun = args.resume and common.step_folders(args.out)  # its checkpoint has them
    norms = open_norms(None if begun else args.norms, spec, train, args.chunk, state_index)
    config = Pi05Config(
        cameras=list(spec.cameras), state_dim=train[0].state(spec).shape[1], action_dim=spec.action_dim,
        stats=norms.stats(spec), size=args.size, chunk=args.chunk, image_size=args.image_size,
        prompt_tokens=args.prompt_tokens, state_index=state_index, train=args.train, ema=args.ema,
    )  # fmt: skip
    if args.dry_run:
        scratch = tempfile.TemporaryDirectory()
        args.out, args.planned, args.steps = scratch.name, args.steps, DRY_STEPS
        print("\n".join(plan(config, args.amp, device, world if args.fsdp else 1)), flush=True)
    common.open_run(args)
    out, stop = Path(args.out), common.Interrupt(args.out)

    # --- model
    checkpoint = common.newest(out) if args.resume else None
    tokenizer = args.tokenizer or out / "tokenizer"
    if checkpoint:  # with its data, normalisation and tokenizer, whatever the data have become
        train, held_out, changes = restore_split(episodes, common.read_json(checkpoint / "data.json"), spec)
        before = read_config(checkpoint)
        config.stats, config.state_index, tokenizer = before["stats"], before["state_index"], checkpoint / "tokenizer"
    elif rank == 0:
        warnings += [f"warning: norms: {warning}" for warning in norms.metadata["warnings"]]
        norms.save(out / "norms")
        if not args.tokenizer:
            write_toy_tokenizer(tokenizer, [task for episode in train for task in episode.tasks])
    common.broadcast()
    model = Pi05(config, str(tokenizer), args.gradient_checkpointing, "cpu" if args.fsdp else device)
    model.processor.check_prompts([task for episode in episodes for task in episode.tasks], config.stats)
    if checkpoint or args.init:
        model.load_pretrained(checkpoint or args.init)
    if args.fsdp:
        model.split(device)
    elif args.amp == "bf16":
        model.hold_frozen_in_bf16()
    model.start_ema()
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in learned if p.ndim >= 2], weight_decay=args.weight_decay)]
    groups += [dict(params=[p for p in learned if p.ndim < 2], weight_decay=0.0)]
    opt = torch.optim.AdamW(groups, lr=args.lr, betas=BETAS, fused=device.type == "cuda")
    dtype = dict(off=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[args.amp]
    amp = torch.autocast(device.type, dtype, enabled=args.amp != "off")
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    # --- resume
    first, best = 0, None
    if checkpoint:
        state = load_run(checkpoint, model, opt)
        scaler.load_state_dict(state["scaler"])
        first, best = state["step"], state["best"]
    log = common.Logger(args, first)
    log.say(f"{args.out}: {sum(p.numel() for p in learned):,} parameters learn, {device}, {world} process(es)")
    net = torch.compile(model) if args.compile else model
    if world > 1 and not args.fsdp:
        net = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)

    # --- data
    loader, validation = prepare_dataloaders(spec, train, held_out, model.processor, args, first, rank, world)
    batches = iter(loader)
    log.say(f"{len(train)} episodes to train on, {len(held_out)} held out, data hash {data_hash(train)}")
    warnings += ["nothing to validate on: hold out episodes with --val-share or --val-episodes"] * (not validation)
    log.say("\n".join(describe(spec, config.state_index) + changes + warnings))

    # --- loop
    stopped = False
    for step in range(first, args.steps):
        began, waited, lr = time.perf_counter(), 0.0, learning_rate(step, args)
        for group in opt.param_groups:
            group["lr"] = lr
        common.seed_all(args.seed, step, rank)
        for micro in range(args.accum):
            start = time.perf_counter()
            batch = {key: value.to(device, non_blocking=True) for key, value in next(batches).items()}
            waited += time.perf_counter() - start
            net.require_backward_grad_sync = micro == args.accum - 1  # DDP: one all-reduce per optimizer step
            with amp:
                loss, metrics = net(batch)
            scaler.scale(loss / args.accum).backward()
            log.add(metrics, 1 / args.accum)
        if step == 0:
            log.say("\n".join(check_first_step(model, batch, loss)))
        scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(learned, args.clip)
        norm = norm.full_tensor() if args.fsdp else norm
        if scaler.is_enabled() or norm.isfinite():  # a gradient that is not finite changes nothing
            scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
        model.update_ema()
        log.add(dict(norm=norm))
        log.tick(time.perf_counter() - began, waited)
        if args.dry_run:
            if step == 0:  # compiles and warms up: it does not count
                log.flush()
            continue

        done, line, is_best = step + 1, {}, False
        ended, stopped = done == args.steps, stop() and done < args.steps
        if done % args.log_every == 0 or ended:
            line.update(log.flush(lr=lr))
        if validation and (done % args.eval_every == 0 or ended):
            metrics, examples = validate(model, validation, device, amp)
            line.update(metrics)
            is_best = metrics.get("val/loss", math.inf) < (math.inf if best is None else best)
            best = metrics["val/loss"] if is_best else best
        if line:
            log.write(done, line)
        if done % args.save_every == 0 or is_best or ended or stopped:
            saving = common.checkpoint(args.out, done, is_best, args.keep) if rank == 0 else contextlib.nullcontext()
            with saving as folder:
                state = dict(step=done, best=best, scaler=scaler.state_dict())
                save_run(folder, model, opt, state, split_of(args.data, spec, train, held_out))
        if "val/loss" in line and rank == 0:
            log.figure(done, "traces", figures.traces(examples))
            log.figure(done, "curves", figures.curves(log.out / "log.jsonl"))
        if stopped:
            log.say(f"stopped after step {done}; go on with --resume --out {args.out}")
            break

    # --- end
    if args.dry_run:
        speed = 1 / log.flush()["steps_per_s"]
        log.say(f"{speed:.2f} s per step, {args.planned * speed / 3600:.2f} hours for {args.planned:,} steps")
    elif not stopped:
        log.say(f"checkpoint: {log.out / 'checkpoints' / ('best' if validation else 'last')}")
        log.say(f"figure:     {log.out / 'figures' / 'traces.png'}")
    log.close()
    if world > 1:
        torch.distributed.barrier()  # torchrun kills rank 0 in its last save if another rank ended 30 s before
        time.sleep(0.5)  # gloo's thread lets go of the barrier; joined before that, it waits for the GIL for ever
        torch.distributed.destroy_process_group()
    return stop.code if stopped else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
