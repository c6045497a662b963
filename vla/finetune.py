"""Finetune VLA, stage 3: a pretrained model learns continuous robot commands from clips with actions.

Run:
  python vla/finetune.py
  python vla/finetune.py --init runs/latent/checkpoints/best --data robot=PATH --out runs/robot
  python vla/finetune.py --backbone NAME --data robot=PATH --out runs/scratch     # without stage 2
  torchrun --nproc_per_node 8 vla/finetune.py @vla/finetune7b.args --init CKPT --data robot=PATH --out runs/robot7b

--init is a checkpoint of stage 2 (its latent head is dropped) or of stage 3 (a new command head, or with --keep-head
the old one).
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
import figures
import scaling
from data import describe_actions, prepare_dataloaders
from model import VLA, ActionConfig, VLAConfig, prompt_error
from policy import Policy
from sim import environments, rollout
from sources import read_sources, restore_split, split_of

import common

HERE = Path(__file__).resolve().parent
BETAS = (0.9, 0.95)  # AdamW, as for most transformers
EVAL_EPISODES, EVAL_SEED = 10, 10**9  # of each task of --eval-env, at each validation; not evaluate.py's episodes


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    whole, real = dict(type=int, metavar="N"), dict(type=float, metavar="X")

    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", metavar="PATH", help="PATH or NAME=PATH; without it the demo, on data that train.py wrote")
    add("--action-labels", nargs="+", metavar="DIR", help="label shards with actions (sim/idm.py), for --data without")
    add("--instruction", metavar="TEXT", help="for clips that have none")
    add("--val-share", default=0.1, help="share of the episodes held out, by a hash of their names", **real)
    add("--val-episodes", nargs="+", default=[], metavar="IDS", help="hold out just these: 56-69,80 or g1=56-69 b=3")
    add("--val-samples", default=512, help="held-out frames per source that validation reads", **whole)
    add("--workers", default=0, help="loader processes per rank; 0 loads in the training process", **whole)

    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--backbone", metavar="NAME", help="instead of --init: a local folder or a name on the hub")
    add("--prompt", metavar="TEXT", help="what the model is asked; without it that of --init, or of train.py")
    add("--image-size", type=int, metavar="N", help="side of the frames; without it that of --init, or 224")
    add("--chunk", default=8, help="commands predicted at once", **whole)
    add("--state", action="store_true", help="also read the robot's state (KEY.state.npy)")
    add("--keep-head", action="store_true", help="go on with --init's command head, chunk and normalisation")
    add("--freeze", choices=["none", "vision", "backbone"], default="none", help="what does not train")
    add("--lora-rank", default=0, help="rank of LoRA layers in the language model; 0: none", **whole)

    optimisation = parser.add_argument_group("optimisation")
    add = optimisation.add_argument
    add("--batch-size", default=128, help="samples per optimizer step, over all processes and micro-steps", **whole)
    add("--lr", default=2e-4, help="peak learning rate", **real)
    add("--backbone-lr", default=0.1, help="the backbone's learning rate, as a multiple of --lr", **real)
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
    add("--steps", default=2000, help="optimizer steps in all", **whole)
    add("--accum", default=1, help="micro-steps per optimizer step: less memory, same batch", **whole)
    add("--amp", choices=["off", "bf16", "fp16"], default="off", help="mixed precision")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    add("--log-every", default=50, help="steps between two log lines", **whole)
    add("--eval-every", default=500, help="steps between two validations", **whole)
    add("--save-every", default=1000, help="steps between two checkpoints", **whole)
    add("--keep", default=2, help="newest checkpoints kept beside the best", **whole)
    add("--wandb", metavar="PROJECT", help="also log to this Weights & Biases project")
    add("--fsdp", action="store_true", help="split weights and optimizer state over the processes (fully_shard)")
    add("--checkpointing", action="store_true", help="recompute activations in the backward pass: less memory")
    add("--eval-env", metavar="NAME", help="act in this environment at each validation; best is then by success")
    add("--dry-run", action="store_true", help="print parameters, memory, checkpoint size, steps per epoch, and end")

    args = parser.parse_args(argv)
    args.demo = args.data is None
    if args.demo:  # its preset first, so that the flags given here win
        given = sys.argv[1:] if argv is None else argv
        args = parser.parse_args([f"@{HERE / 'finetune.args'}", *given], argparse.Namespace(demo=True))
        if args.backbone and "--init" not in given:  # the preset's gives way
            args.init = None
    positive = "val_samples chunk batch_size lr clip steps accum log_every eval_every save_every keep"
    positive += " image_size" * (args.image_size is not None)
    for name in positive.split():
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    for name in "val_share workers lora_rank backbone_lr lr_end warmup weight_decay augment seed".split():
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must not be negative")
    if args.val_share >= 1:
        parser.error("--val-share must be below 1")
    micro_steps = args.accum * int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % micro_steps:
        parser.error(f"--batch-size {args.batch_size} is no multiple of {micro_steps} (micro-steps x processes)")
    if args.resume and not args.out:
        parser.error("--resume needs --out, the folder of the run to go on with")
    if bool(args.init) == bool(args.backbone):
        parser.error("give --init CKPT (a checkpoint of train.py), or else --backbone NAME to start without stage 2")
    if args.keep_head and not args.init:
        parser.error("--keep-head needs --init, the checkpoint whose head it is")
    if args.eval_env and args.fsdp:
        parser.error("--eval-env does not work under --fsdp: use evaluate.py --env on the checkpoints")
    if args.prompt and (problem := prompt_error(args.prompt)):
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
    if loaders:
        metrics["val/loss"] = sum(metrics[f"val/{name}/loss"] for name in loaders) / len(loaders)
    return metrics


def act(model, envs):
    """Success in --eval-env, from the same initial states each time. Rank 0 measures it for all ranks."""
    wins, policy = [], Policy(model)
    for number in range(EVAL_EPISODES):
        if envs:
            wins += [one["success"] for one in rollout.run(policy, envs, [EVAL_SEED + number] * len(envs))]
        wins = common.broadcast(wins)  # after each episode: the other ranks wait for no longer than DIST_TIMEOUT
    model.train()
    return {"val/success": sum(wins) / len(wins)}


def configure(args, sources, say):
    """The config of --init, or a new one, with a command head and without a latent one."""
    config = VLAConfig.from_pretrained(args.init) if args.init else VLAConfig()
    action = ActionConfig(**describe_actions(sources, args.chunk, args.state, say))
    if args.keep_head:
        if config.action is None:
            raise common.DataError(f"--keep-head: {args.init} has no command head")
        for name in ("action_dim", "state_dim"):
            old, new = getattr(config.action, name), getattr(action, name)
            if old != new:
                raise common.DataError(f"--keep-head: {args.init} has {name} {old}, --data {new}")
        action = config.action
    changes = dict(prompt=args.prompt or config.prompt, image_size=args.image_size or config.image_size)
    return replace(config, latent=None, action=action, lora_rank=args.lora_rank, **changes)


def main(argv=None):
    # --- setup
    args = parse(argv)
    os.environ.setdefault("DIST_TIMEOUT", "7200")  # a checkpoint of tens of gigabytes takes minutes, the others wait
    if args.dry_run:  # WORLD_SIZE=8 python ... --dry-run: as if for eight processes, of which this is the only one
        rank, world, device = 0, int(os.environ.get("WORLD_SIZE", 1)), None
    else:
        rank, world, device = setup(args)
    say = print if rank == 0 else lambda text: None
    common.seed_all(args.seed)
    split = args.val_share, args.val_episodes, args.instruction, say
    sources = read_sources(args.data, "actions", args.action_labels, *split)
    envs = environments.make(args.eval_env, instruction=args.instruction) if args.eval_env and rank == 0 else []
    config = None if args.resume else configure(args, sources, say)
    if args.dry_run:
        say(scaling.plan(args, config or configure(args, sources, say), sources, world))
        return 0
    common.open_run(args)

    # --- model
    checkpoint = common.newest(args.out) if args.resume else None
    if checkpoint:  # with its statistics, whatever the data have become
        config = VLAConfig.from_pretrained(checkpoint)
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
    groups = {}
    for name, p in model.named_parameters():
        scale = args.backbone_lr if name.startswith("backbone.") and "lora_" not in name else 1.0
        if p.requires_grad:
            groups.setdefault((scale, args.weight_decay * (p.ndim >= 2)), []).append(p)
    groups = [dict(params=params, scale=scale, weight_decay=decay) for (scale, decay), params in groups.items()]
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
    net = model
    if world > 1 and not args.fsdp:
        net = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)

    # --- data
    if checkpoint:
        for line in restore_split(sources, common.read_json(checkpoint / "data.json")):
            log.say(line)
    options = {name: getattr(args, name) for name in "batch_size seed steps accum workers val_samples augment".split()}
    options |= dict(first=first, rank=rank, world=world, pin_memory=device.type == "cuda")
    train, validation = prepare_dataloaders(sources, model.preprocess, config, **options)
    batches = iter(train)
    for source in sources:
        log.say(f"{source.name}: {len(source.train)} clips to train on, {len(source.validation)} held out")
    if not validation:
        log.say("nothing to validate on: hold out episodes with --val-share or --val-episodes")

    # --- loop
    stopped = False
    for step in range(first, args.steps):
        began, waited, lr = time.perf_counter(), 0.0, learning_rate(step, args)
        for group in opt.param_groups:
            group["lr"] = lr * group["scale"]
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
        if (validation or args.eval_env) and (done % args.eval_every == 0 or ended):
            metrics = validate(model, validation, device, amp)
            if args.eval_env:
                metrics |= act(model, envs)
            line.update(metrics)
            score = -metrics.get("val/success", 0.0), metrics.get("val/loss", 0.0)  # success first, if it is measured
            is_best = all(map(math.isfinite, score)) and (best is None or score < best)
            best = score if is_best else best
        if line:
            log.write(done, line)
        if done % args.save_every == 0 or is_best or ended or stopped:
            folder = common.checkpoint(args.out, done, is_best, args.keep) if rank == 0 else contextlib.nullcontext()
            with folder as path:
                if rank == 0:
                    (path / "data.json").write_text(json.dumps(split_of(sources), indent=1))
                state = dict(step=done, best=best, scaler=scaler.state_dict())
                scaling.save(path, model, opt, state, args.fsdp)
        if any("val/" in name for name in line) and rank == 0:
            log.figure(done, "curves", figures.curves(log.out / "log.jsonl"))
        if stopped:
            log.say(f"stopped after step {done}; go on with --resume --out {args.out}")
            break

    # --- end
    if not stopped:
        log.say(f"checkpoint: {log.out / 'checkpoints' / ('best' if validation else 'last')}")
        if validation or args.eval_env:
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
