"""Train VLA, stage 2: a vision-language model learns latent actions from image and instruction of labelled videos.

Run:
  python vla/train.py
  python vla/train.py --data sthv2=PATH --labels PATH --backbone Qwen/Qwen2.5-VL-7B-Instruct --out runs/latent
  torchrun --nproc_per_node 8 vla/train.py @vla/7b.args --data sthv2=PATH --labels PATH --out runs/latent7b
"""

import sys
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import demo
import figures
import sharded
from data import describe_latents, prepare_dataloaders, read_sources, references
from model import PROMPT, VLA, open_backbone

import common

HERE = Path(__file__).resolve().parent


def shared_flags(parser):
    """The flags that train.py and finetune.py have in common; returns their group."""
    group = parser.add_argument_group("vla")
    add = group.add_argument
    add("--labels", nargs="+", metavar="DIR", help="label shards (laq/label.py), one folder for each word of --data")
    add("--backbone", metavar="NAME", help="vision-language model: a local folder, or a name on the hub")
    add("--prompt", default=PROMPT, metavar="TEXT", help="what the model is asked; {instruction} is filled in")
    add("--instruction", metavar="TEXT", help="for clips that have none")
    add("--image-size", type=int, default=224, metavar="N", help="side that frames are squashed to for the processor")
    add("--freeze", choices=["none", "vision", "backbone"], default="none", help="what does not train")
    add("--rank", type=int, default=0, metavar="N", help="of low-rank layers (LoRA) in the language model; 0: none")
    add("--shift", type=float, default=0.06, metavar="X", help="random shift of the image, of its side")
    add("--jitter", type=float, default=0.1, metavar="X", help="random brightness, contrast and saturation")
    add("--dropout", type=float, default=0.1, metavar="X", help="on what the heads read")
    add("--reuse", type=int, default=4, metavar="N", help="samples drawn from a clip each time it is decoded")
    add("--fsdp", action="store_true", help="split weights and optimizer state over the ranks (fully_shard)")
    add("--checkpointing", action="store_true", help="recompute activations in the backward pass: less memory")
    add("--peak-tflops", type=float, default=0.0, metavar="X", help="a device's peak in 1e12/s, to log MFU; 0: no MFU")
    add("--val-share", type=float, default=0.1, metavar="X", help="share of the episodes held out, by hash of the name")
    add("--val-episodes", nargs="+", default=[], metavar="NAME", help="hold out just these episodes")
    add("--val-samples", type=int, default=512, metavar="N", help="held-out frames per source that validation reads")
    return group


def parse(argv=None):
    parser = common.flags(__doc__)
    add = shared_flags(parser).add_argument
    parser.set_defaults(lr=2e-5, batch_size=128, weight_decay=0.0, save_every=1000)
    parser.set_defaults(backbone="Qwen/Qwen2.5-VL-7B-Instruct")
    add(
        "--target",
        choices=["codes", "codebook", "vectors"],
        default="vectors",
        help="cross-entropy on the codes as LAPA, regression of their codebook vectors, or of the vectors before them",
    )
    return common.parse(parser, argv, demo=HERE / "demo.args")


@torch.no_grad()
def validate(net, loaders, dist, amp):
    """Per source the loss and all metrics of held-out frames, over all ranks; val/loss is their mean over sources."""
    net.eval()
    totals, counts = {}, {}
    for name, loader in loaders.items():
        for batch in loader:
            batch = {key: value.to(dist.device) for key, value in batch.items()}
            with amp:
                metrics = net(batch)[1]
            for key, value in metrics.items():
                key = f"val/{name}/{key}"
                totals[key] = totals.get(key, 0.0) + float(value) * len(batch["input_ids"])
                counts[key] = counts.get(key, 0) + len(batch["input_ids"])
    net.train()
    metrics = common.mean(dist, totals, counts)
    for name in loaders:
        if f"val/{name}/cross_entropy" in metrics:
            metrics[f"val/{name}/perplexity"] = 2.718281828 ** metrics[f"val/{name}/cross_entropy"]
    if loaders:
        metrics["val/loss"] = sum(metrics[f"val/{name}/loss"] for name in loaders) / len(loaders)
    return metrics


def build_optimizer(args, model, dist, slower=1.0):
    """AdamW; weight decay on matrices alone; the backbone's learning rate is `slower` times --lr."""
    groups = []
    for backbone in (True, False):
        for decayed in (True, False):
            chosen = [
                p
                for name, p in model.named_parameters()
                if p.requires_grad
                and (name.startswith("backbone.") and "low_rank_" not in name) == backbone
                and (p.ndim > 1) == decayed
            ]
            decay = args.weight_decay if decayed else 0.0
            groups += [dict(params=chosen, weight_decay=decay, scale=slower if backbone else 1.0)] if chosen else []
    return torch.optim.AdamW(groups, lr=args.lr, betas=args.betas, fused=dist.device.type == "cuda")


def speed(line, args, dist):
    """Put tokens per second and, with --peak-tflops, the model's share of the devices' peak (MFU) into a log line."""
    line["tokens_per_s"] = line.pop("train/tokens") * dist.world * line["steps_per_s"]
    tflops = line.pop("train/tflop") * line["steps_per_s"]  # of one rank
    if args.peak_tflops:
        line["mfu"] = tflops / args.peak_tflops


def main(argv=None):
    # --- setup
    args = parse(argv)
    dist = common.setup(args)
    if args.demo and dist.main:
        demo.write(args.data[0].partition("=")[2])
    common.share(dist, None)  # the other ranks wait for the demo's data
    if not args.labels:
        raise ValueError("--labels is needed: the folders that laq/label.py wrote, one for each word of --data")
    sources = read_sources(args.data, "latents", args.labels, args.val_share, args.val_episodes, args.instruction)
    latent = describe_latents(sources) | dict(target=args.target)
    common.open_run(args, dist)
    stop = common.Interrupt(args, dist)

    # --- model
    about = dict(prompt=args.prompt, queries=latent["codes"], latent=latent, image_size=args.image_size)
    model = VLA(*open_backbone(args.backbone), about | dict(rank=args.rank, dropout=args.dropout))
    model.train().to(dist.device).freeze(args.freeze)
    if args.checkpointing:
        model.backbone.gradient_checkpointing_enable(dict(use_reentrant=False))
    size = sum(p.numel() for p in model.parameters())
    if args.fsdp:
        sharded.shard(model, args, dist)
    opt = build_optimizer(args, model, dist)
    amp, scaler = common.autocast(args, dist.device)

    # --- resume
    first, best = (sharded if args.fsdp else common).resume(args, dist, model, opt, scaler)
    log = common.Logger(args, dist, first)
    log.say(f"{args.out}: {size:,} parameters, {dist.device}, {dist.world} process(es)")
    net = torch.compile(model) if args.compile else model
    if dist.world > 1 and not args.fsdp:
        net = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)

    # --- data
    batches, validation = prepare_dataloaders(
        sources,
        model.inputs,
        args.batch_size,
        args.image_size,
        (latent["codes"], latent["dim"], 0, 0, 0),
        seed=args.seed,
        steps=args.steps,
        first=first,
        accum=args.accum,
        rank=dist.rank,
        world=dist.world,
        workers=args.workers,
        val_samples=args.val_samples,
        shift=args.shift,
        jitter=args.jitter,
        reuse=args.reuse,
    )
    chance = {}
    for source in sources:
        log.say(f"{source.name}: {len(source.train)} clips to train on, {len(source.validation)} held out")
        if source.validation:
            chance |= {f"val/{source.name}/{key}": value for key, value in references(source).items()}
    if not validation:
        log.say("nothing to validate on: hold out episodes with --val-share or --val-episodes")

    # --- loop
    for step in range(first, args.steps):
        waited, lr = 0.0, common.cosine(step, args)
        for group in opt.param_groups:
            group["lr"] = lr * group["scale"]
        common.seed(args.seed, step, dist.rank)
        for micro in range(args.accum):
            start = time.perf_counter()
            batch = {key: value.to(dist.device, non_blocking=True) for key, value in next(batches).items()}
            waited += time.perf_counter() - start
            net.require_backward_grad_sync = micro == args.accum - 1  # DDP: one all-reduce per optimizer step
            with amp:
                loss, metrics = net(batch)
            scaler.scale(loss / args.accum).backward()
            log.add(metrics, 1 / args.accum)
            log.add(dict(tokens=batch["attention_mask"].sum(), tflop=model.flops(batch) / 1e12))
        scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
        log.add(dict(norm=norm.full_tensor() if args.fsdp and dist.world > 1 else norm))
        log.tick(waited)

        done, line, is_best = step + 1, {}, False
        ended, stopped = done == args.steps, stop()
        if done % args.log_every == 0 or ended:
            line.update(log.flush(lr=lr))
            speed(line, args, dist)
        if validation and (done % args.eval_every == 0 or ended):
            metrics = validate(net, validation, dist, amp)
            line.update(metrics | chance)
            is_best = best is None or metrics["val/loss"] < best
            best = metrics["val/loss"] if is_best else best
        if line:
            log.write(done, line)
        if done % args.save_every == 0 or is_best or ended or stopped:
            (sharded if args.fsdp else common).save(args, dist, done, model, opt, scaler, best, is_best)
        if "val/loss" in line and dist.main:
            log.figure(done, "curves", figures.curves(log.out / "log.jsonl"))
        if line or stopped:
            log.pause()
        if stopped and not ended:
            log.say(f"stopped after step {done}; go on with --resume --out {args.out}")
            common.cleanup(dist, log)
            return stop.code

    # --- end
    log.say(f"checkpoint: {log.out / 'checkpoints' / ('best' if validation else 'last')}")
    log.say(f"figure:     {log.out / 'figures' / 'curves.png'}")
    common.cleanup(dist, log)
    return 0


if __name__ == "__main__":
    common.run(main)
