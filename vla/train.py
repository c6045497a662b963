# /// script
# dependencies = ["torch>=2.7,<2.11", "numpy", "tqdm", "av", "webdataset", "torchvision", "matplotlib",
#   "transformers>=4.57.1,<5"]
# ///
"""Train VLA, stage 2: a vision-language model learns latent actions from image and instruction of labelled videos.

Run:
  python vla/train.py
  python vla/train.py --data sthv2=PATH --labels PATH --backbone Qwen/Qwen2.5-VL-7B-Instruct --out runs/latent
  torchrun --nproc_per_node 8 vla/train.py @vla/7b.args --data sthv2=PATH --labels PATH --out runs/latent7b
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import demo
import figures
import scaling
from data import baselines, check_labels, describe_latents, prepare_dataloaders
from model import PROMPT, VLA, LatentConfig, VLAConfig, prompt_error
from sources import read_sources, restore_split, split_of

import common

HERE = Path(__file__).resolve().parent
BETAS = (0.9, 0.95)  # AdamW, as for most transformers


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    whole, real = dict(type=int, metavar="N"), dict(type=float, metavar="X")

    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", metavar="PATH", help="PATH or NAME=PATH; without it the demo, on data it writes itself")
    add("--labels", nargs="+", metavar="DIR", help="label shards (laq/label.py), one folder for each entry of --data")
    add("--instruction", metavar="TEXT", help="for clips that have none")
    add("--val-share", default=0.1, help="share of the episodes held out, by a hash of their names", **real)
    add("--val-episodes", nargs="+", default=[], metavar="IDS", help="hold out just these: 56-69,80 or g1=56-69 b=3")
    add("--val-samples", default=512, help="held-out frames per source that validation reads", **whole)
    add("--workers", default=0, help="loader processes per rank; 0 loads in the training process", **whole)

    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--backbone", default="Qwen/Qwen2.5-VL-7B-Instruct", metavar="NAME", help="a local folder or a name on the hub")
    add("--prompt", default=PROMPT, metavar="TEXT", help="what the model is asked; {instruction} is filled in")
    add("--image-size", default=224, help="side that frames are squashed to for the image processor", **whole)
    add("--target", choices=["codes", "vectors"], default="vectors", help="regress latent vectors, or classify codes")
    add("--freeze", choices=["none", "vision", "backbone"], default="none", help="what does not train")
    add("--lora-rank", default=0, help="rank of LoRA layers in the language model; 0: none", **whole)
    add("--dropout", default=0.1, help="dropout on what the heads read", **real)

    optimisation = parser.add_argument_group("optimisation")
    add = optimisation.add_argument
    add("--batch-size", default=128, help="samples per optimizer step, over all processes and micro-steps", **whole)
    add("--lr", default=2e-5, help="peak learning rate", **real)
    add("--lr-end", default=0.0, help="learning rate after the last step (cosine)", **real)
    add("--warmup", default=100, help="steps of linear warm-up", **whole)
    add("--weight-decay", default=0.0, help="AdamW weight decay of matrices", **real)
    add("--clip", default=1.0, help="largest norm of the gradient", **real)
    add("--augment", default=1.0, help="strength of random shifts (6 %%) and colours (10 %%); 0: off", **real)
    add("--seed", default=0, help="of weights, batches, augmentation and noise", **whole)

    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="DIR", help=f"folder of this run; without it the next free runs/{HERE.name}/NNN")
    add("--resume", action="store_true", help="go on from OUT's newest checkpoint, or start if there is none")
    add("--init", metavar="CKPT", help="checkpoint whose weights to start from")
    add("--steps", default=1000, help="optimizer steps in all", **whole)
    add("--accum", default=1, help="micro-steps per optimizer step: less memory, same batch", **whole)
    add("--amp", choices=["off", "bf16", "fp16"], default="off", help="mixed precision")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    add("--log-every", default=50, help="steps between two log lines", **whole)
    add("--eval-every", default=500, help="steps between two validations", **whole)
    add("--save-every", default=1000, help="steps between two checkpoints", **whole)
    add("--keep", default=2, help="newest checkpoints kept beside the best", **whole)
    add("--wandb", metavar="PROJECT", help="also log to this Weights & Biases project")
    add("--fsdp", action="store_true", help="split weights and optimizer state over the processes (fully_shard)")
    add("--checkpointing", action="store_true", help="recompute activations in the backward pass: less memory")
    add("--dry-run", action="store_true", help="print parameters, memory, checkpoint size, steps per epoch, and end")

    args = parser.parse_args(argv)
    args.demo = args.data is None
    if args.demo:  # its preset first, so that the flags given here win
        given = sys.argv[1:] if argv is None else argv
        args = parser.parse_args([f"@{HERE / 'demo.args'}", *given], argparse.Namespace(demo=True))
    positive = "val_samples image_size batch_size lr clip steps accum"
    for name in f"{positive} log_every eval_every save_every keep".split():
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    for name in "val_share workers lora_rank dropout lr_end warmup weight_decay augment seed".split():
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must not be negative")
    if args.val_share >= 1:
        parser.error("--val-share must be below 1")
    micro_steps = args.accum * int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % micro_steps:
        parser.error(f"--batch-size {args.batch_size} is no multiple of {micro_steps} (micro-steps x processes)")
    if args.resume and not args.out:
        parser.error("--resume needs --out, the folder of the run to go on with")
    if problem := prompt_error(args.prompt):
        parser.error(f"--prompt {problem}")
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
    """Per source the loss and all metrics of held-out frames, over all ranks; val/loss is their mean over sources."""
    model.eval()
    totals, counts = {}, {}
    for name, loader in loaders.items():
        for batch in loader:
            batch = {key: value.to(device) for key, value in batch.items()}
            with amp:
                metrics = {f"val/{name}/{key}": value.item() for key, value in model(batch)[1].items()}
            for key, value in metrics.items():
                totals[key] = totals.get(key, 0.0) + value * len(batch["input_ids"])
                counts[key] = counts.get(key, 0) + len(batch["input_ids"])
    model.train()
    metrics = common.mean(totals, counts)
    for name in loaders:
        metrics[f"val/{name}/perplexity"] = math.exp(metrics[f"val/{name}/cross_entropy"])
    if loaders:
        metrics["val/loss"] = sum(metrics[f"val/{name}/loss"] for name in loaders) / len(loaders)
    return metrics


def configure(args, sources, say):
    """The model's config: flags, and statistics of the labels, or those of --init if it has the same codebook."""
    latent = LatentConfig(**describe_latents(sources, say), target=args.target)
    config = VLAConfig(args.prompt, latent.code_seq_len, args.image_size, args.lora_rank, args.dropout, latent)
    if args.init:
        other = VLAConfig.from_pretrained(args.init)
        if other.latent and other.latent.codebook == latent.codebook:
            config.latent = replace(other.latent, target=args.target)
        for name in ("prompt", "num_queries", "image_size", "latent", "action"):
            if getattr(config, name) != getattr(other, name):
                raise common.DataError(f"--init {args.init}: its {name} is not that of this run")
    return config


def main(argv=None):
    # --- setup
    args = parse(argv)
    os.environ.setdefault("DIST_TIMEOUT", "7200")  # a checkpoint of tens of gigabytes takes minutes, the others wait
    if args.dry_run:  # WORLD_SIZE=8 python ... --dry-run: as if for eight processes, of which this is the only one
        rank, world, device = 0, int(os.environ.get("WORLD_SIZE", 1)), None
    else:
        rank, world, device = setup(args)
    say = print if rank == 0 else lambda text: None
    if args.demo and rank == 0:
        demo.write(args.data[0].partition("=")[2])
    common.broadcast()  # the other ranks wait for the demo's data
    common.seed_all(args.seed)
    split = args.val_share, args.val_episodes, args.instruction, say
    sources = read_sources(args.data, "latents", args.labels, *split)
    config = None if args.resume else configure(args, sources, say)
    if args.dry_run:
        say(scaling.plan(args, config or configure(args, sources, say), sources, world))
        return 0
    common.open_run(args)

    # --- model
    checkpoint = common.newest(args.out) if args.resume else None
    if checkpoint:  # with its statistics, whatever the data have become
        config = VLAConfig.from_pretrained(checkpoint)
        check_labels(sources, vars(config.latent))
    config = config or configure(args, sources, say)
    start = checkpoint or args.init or args.backbone
    stop = common.Interrupt(args.out)
    if args.fsdp and world > 1:
        model = scaling.build(start, config, device, args.amp, args.freeze)
    else:
        model = VLA.from_pretrained(start, config).freeze(args.freeze).to(device)
    model.train()
    if args.checkpointing:
        model.checkpoint_activations()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in trained if p.ndim >= 2], weight_decay=args.weight_decay)]
    groups += [dict(params=[p for p in trained if p.ndim < 2], weight_decay=0.0)]
    opt = torch.optim.AdamW(groups, lr=args.lr, betas=BETAS, fused=device.type == "cuda")
    dtype = dict(off=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[args.amp]
    amp = torch.autocast(device.type, dtype, enabled=args.amp != "off")
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    # --- resume
    first, best = 0, None
    if checkpoint:
        state = common.load(checkpoint / "resume.pt")
        scaling.load_optimizer(checkpoint, model, opt, state)
        scaler.load_state_dict(state["scaler"])
        first, best = state["step"], state["best"]
    log = common.Logger(args, first)
    size = sum(p.numel() for p in model.parameters())
    log.say(f"{args.out}: {size:,} parameters, {device}, {world} process(es)")
    net = torch.compile(model) if args.compile else model
    if world > 1 and not args.fsdp:
        net = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)

    # --- data
    if checkpoint:
        for line in restore_split(sources, common.read_json(checkpoint / "data.json")):
            log.say(line)
    options = {name: getattr(args, name) for name in "batch_size seed steps accum workers val_samples augment".split()}
    options |= dict(first=first, rank=rank, world=world, pin_memory=device.type == "cuda")
    train, validation = prepare_dataloaders(sources, model.preprocess, config, **options)
    batches, references = iter(train), {}
    for source in sources:
        log.say(f"{source.name}: {len(source.train)} clips to train on, {len(source.validation)} held out")
        if source.validation:
            references |= {f"val/{source.name}/{key}": value for key, value in baselines(source, say).items()}
    if not validation:
        log.say("nothing to validate on: hold out episodes with --val-share or --val-episodes")

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
            log.add(dict(tokens=batch["attention_mask"].sum() * world))
        scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # under FSDP each rank has a part
        if scaler.is_enabled() or norm.isfinite():  # a gradient that is not finite changes nothing
            scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
        log.add(dict(norm=norm))
        log.tick(time.perf_counter() - began, waited)

        done, line, is_best = step + 1, {}, False
        ended = done == args.steps
        stopped = stop() and not ended
        if done % args.log_every == 0 or ended:
            line.update(log.flush(lr=lr))
            line["tokens_per_s"] = line["train/tokens"] * line["steps_per_s"]
        if validation and (done % args.eval_every == 0 or ended):
            metrics = validate(model, validation, device, amp)
            line.update(metrics | references)
            is_best = metrics["val/loss"] < (math.inf if best is None else best)
            best = metrics["val/loss"] if is_best else best
        if line:
            log.write(done, line)
        if done % args.save_every == 0 or is_best or ended or stopped:
            folder = common.checkpoint(args.out, done, is_best, args.keep) if rank == 0 else contextlib.nullcontext()
            with folder as path:
                if rank == 0:
                    (path / "data.json").write_text(json.dumps(split_of(sources), indent=1))
                state = dict(step=done, best=best, scaler=scaler.state_dict())
                scaling.save(path, model, opt, state, args.fsdp)
        if "val/loss" in line and rank == 0:
            log.figure(done, "curves", figures.curves(log.out / "log.jsonl"))
        if stopped:
            log.say(f"stopped after step {done}; go on with --resume --out {args.out}")
            break

    # --- end
    if not stopped:
        log.say(f"checkpoint: {log.out / 'checkpoints' / ('best' if validation else 'last')}")
        if validation:
            log.say(f"figure:     {log.out / 'figures' / 'curves.png'}")
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
