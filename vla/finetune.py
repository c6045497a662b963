"""Finetune VLA, stage 3: a pretrained model learns continuous robot commands from clips with actions.

Run:
  python vla/finetune.py --init runs/latent/checkpoints/best --data robot=PATH --out runs/robot
  python vla/finetune.py --init CKPT --data robot=PATH --videos web=PATH --labels PATH --out runs/both
  torchrun --nproc_per_node 8 vla/finetune.py --fsdp --amp bf16 --init CKPT --data robot=PATH --out runs/robot7b

--init is a checkpoint of stage 2 (its latent head is dropped unless --videos keep it) or of stage 3 (a new command
head, or with --keep-head the old one). With --backbone instead of --init nothing is pretrained on actions: the
reference.
"""

import sys
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import figures
import sharded
from data import describe_actions, describe_latents, few, prepare_dataloaders, read_sources
from model import PROMPT, VLA, open_backbone, read_config
from train import build_optimizer, shared_flags, speed, validate

import common

HERE = Path(__file__).resolve().parent


def parse(argv=None):
    parser = common.flags(__doc__)
    add = shared_flags(parser).add_argument
    parser.set_defaults(steps=2000, lr=2e-4, batch_size=128, weight_decay=0.0, save_every=1000)
    parser.set_defaults(prompt=None, image_size=None)  # --init's, or train.py's
    add("--videos", nargs="+", default=[], metavar="PATH", help="clips that keep teaching latents (--labels)")
    add("--latent-share", type=float, default=0.5, metavar="X", help="share of a batch drawn from --videos")
    add(
        "--action-labels",
        nargs="+",
        metavar="DIR",
        help="label shards with actions (sim/idm.py), for --data without",
    )
    add("--episodes", type=int, default=0, metavar="N", help="train on N episodes, a subset of 2 N's; 0: all")
    add("--chunk", type=int, default=8, metavar="H", help="commands predicted at once")
    add("--bins", type=int, default=0, metavar="N", help="classify into quantile bins, as LAPA (256); 0: regression")
    add("--state", action="store_true", help="also read the robot's state (KEY.state.npy)")
    add("--queries", type=int, default=2, metavar="N", help="query positions of a model without --init")
    add("--backbone-lr", type=float, default=0.1, metavar="X", help="the backbone's learning rate, as a share of --lr")
    add("--keep-head", action="store_true", help="go on with --init's command head, chunk and normalisation")
    args = common.parse(parser, argv, demo=HERE / "finetune.flags")
    if not args.init and not args.backbone:
        parser.error("--init CKPT (a checkpoint of train.py) is needed, or --backbone NAME to start without stage 2")
    if args.videos and not 0 < args.latent_share < 1:
        parser.error("--latent-share must lie between 0 and 1")
    if args.keep_head and not args.init:
        parser.error("--keep-head needs --init, the checkpoint whose head it is")
    return args


def describe(args, robots, videos):
    """The model's config: the checkpoint's, with this run's command head, and a latent head if --videos keep it."""
    about = read_config(args.init) if args.init else dict(prompt=PROMPT, queries=args.queries, image_size=224)
    changes = dict(prompt=args.prompt, image_size=args.image_size)
    about |= {name: value for name, value in changes.items() if value is not None}
    latent = about.get("latent") if videos else None
    if videos:
        target = latent["target"] if latent else "vectors"
        new = describe_latents(videos) | dict(target=target)
        same = latent and all(latent[name] == new[name] for name in videos[0].labels)
        latent = latent if same else new
    if args.keep_head and not about.get("action"):
        raise ValueError(f"--keep-head: {args.init} has no command head")
    new = describe_actions(robots, args.chunk, args.bins, args.state)
    action = about["action"] if args.keep_head else new
    for name in ("dims", "state"):
        if action[name] != new[name]:
            raise ValueError(f"--keep-head: {args.init} has {action[name]} {name}, --data {new[name]}")
    return about | dict(latent=latent, action=action, rank=args.rank, dropout=args.dropout)


def main(argv=None):
    # --- setup
    args = parse(argv)
    dist = common.setup(args)
    split = dict(val_share=args.val_share, val_episodes=args.val_episodes, instruction=args.instruction)
    robots = read_sources(args.data, "actions", args.action_labels, **split)
    for robot in robots:
        robot.train = few(robot.train, args.episodes, args.seed) if args.episodes else robot.train
    videos = read_sources(args.videos, "latents", args.labels, **split) if args.videos else []
    about = describe(args, robots, videos)
    common.open_run(args, dist)
    stop = common.Interrupt(args, dist)

    # --- model
    model = VLA(*open_backbone(args.init or args.backbone), about)
    model.train().to(dist.device).freeze(args.freeze)
    if args.checkpointing:
        model.backbone.gradient_checkpointing_enable(dict(use_reentrant=False))
    size = sum(p.numel() for p in model.parameters())
    if args.fsdp:
        sharded.shard(model, args, dist)
    opt = build_optimizer(args, model, dist, slower=args.backbone_lr)
    amp, scaler = common.autocast(args, dist.device)

    # --- resume
    first, best = (sharded if args.fsdp else common).resume(args, dist, model, opt, scaler)
    log = common.Logger(args, dist, first)
    log.say(f"{args.out}: {size:,} parameters, {dist.device}, {dist.world} process(es)")
    net = torch.compile(model) if args.compile else model
    if dist.world > 1 and not args.fsdp:
        net = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)

    # --- data
    latent, action = about["latent"] or dict(codes=0, dim=0), about["action"]
    batches, validation = prepare_dataloaders(
        robots + videos,
        model.inputs,
        args.batch_size,
        about["image_size"],
        (latent["codes"], latent["dim"], action["chunk"], action["dims"], action["state"]),
        seed=args.seed,
        steps=args.steps,
        first=first,
        accum=args.accum,
        rank=dist.rank,
        world=dist.world,
        workers=args.workers,
        val_samples=args.val_samples,
        latent_share=args.latent_share if videos else 0.0,
        shift=args.shift,
        jitter=args.jitter,
        reuse=args.reuse,
    )
    for source in robots + videos:
        log.say(f"{source.name}: {len(source.train)} clips to train on, {len(source.validation)} held out")
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
            line.update(metrics)
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
    common.cleanup(dist, log)
    return 0


if __name__ == "__main__":
    common.run(main)
