"""Train Pi05: fine-tunes LeRobot's pi0.5 policy on recorded episodes.

Run:
  python pi05_finetune/train.py
  python pi05_finetune/train.py --data so100=PATH --init PI05_BASE --tokenizer PALIGEMMA --out runs/so100
  torchrun --nproc_per_node 8 pi05_finetune/train.py @pi05_finetune/phase_b.args --data so100=PATH --init PI05_BASE
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import demo
import figures
from data import AugmentConfig, SequenceConfig, build_augmentations, prepare_dataloaders
from episodes import open_data
from inputs import check_dims, check_tokenizer, write_toy_tokenizer
from model import Pi05
from norms import absolute_dims, compute, load_norms
from validate import refuse

import common

HERE = Path(__file__).resolve().parent
AUGMENT = dict(none=None, jitter=AugmentConfig(), openpi=AugmentConfig.openpi())


def parse(argv=None):
    parser = common.flags(__doc__, omit={"compile"})  # never tried with LeRobot's policy
    parser.set_defaults(steps=30_000, batch_size=32, lr=2.5e-5, lr_end=2.5e-6, warmup=1000, weight_decay=1e-10)
    parser.set_defaults(eval_every=1000, save_every=1000)
    group = parser.add_argument_group("pi05_finetune")
    add, whole, real = group.add_argument, dict(type=int, metavar="N"), dict(type=float, metavar="X")
    add("--spec", metavar="FILE", help="YAML or JSON; without it DATA/spec.yaml, or what the first episode tells")
    add("--norms", metavar="DIR", help="of compute_norms.py, refused if of other data; without it they are measured")
    add("--data-hash", metavar="HASH", help="stop unless the training episodes have this hash (run.args pins it)")
    add("--val-share", help="share of the episodes held out, by hash of the name", default=0.1, **real)
    add("--val-episodes", nargs="+", default=[], metavar="IDS", help="hold out just these: 56-69,80 or g1=56-69")
    add("--val-stride", help="steps between two validation samples", default=10, **whole)
    add("--size", choices=["full", "tiny"], default="full", help="tiny: 408 thousand random weights, for trying things")
    add("--tokenizer", metavar="DIR", help="local folder of PaliGemma's tokenizer; tiny has a toy one")
    add("--chunk", help="actions per prediction", default=50, **whole)
    add("--image-size", help="side of the images that the model sees, a multiple of 14", default=224, **whole)
    add("--prompt-tokens", help="room for the prompt; too little is an error", default=200, **whole)
    add("--denoise-steps", help="steps from noise to actions at prediction", default=10, **whole)
    add("--seq-len", help="window that a sample is one random step of", default=1, **whole)
    add("--stride", help="steps between two windows", default=1, **whole)
    add("--augment", choices=list(AUGMENT), default="none", help="jitter: light by 5 %%; openpi: crop, turn, colour")
    add("--train", choices=["all", "expert", "lora"], default="all", help="what learns: see README")
    add("--freeze-vision", action="store_true", help="leave SigLIP, the image encoder, as it is")
    add("--relative", action="store_true", help="predict actions minus the state, except --absolute")
    add("--absolute", nargs="+", metavar="NAME", help="dims that stay absolute, * is anything; else *gripper*")
    add("--ema", help="decay of the weights' average, which is validated and exported; 0: none", default=0.99, **real)
    add("--gradient-checkpointing", action="store_true", help="compute layers twice: much less memory")
    add("--old-inputs", action="store_true", help="images and prompt as LeRobot 0.4 makes them: see README")
    args = common.parse(parser, argv, demo=HERE / "demo.args")
    for name in ("chunk", "prompt_tokens", "denoise_steps", "val_stride"):
        if getattr(args, name) < 1:
            parser.error(f"{common.flag(name)} must be above 0")
    if args.image_size < 14 or args.image_size % 14:
        parser.error("--image-size must be a multiple of 14, the side of a patch")
    if not 0 <= args.ema < 1:
        parser.error("--ema must be in [0, 1)")
    return args


@torch.no_grad()
def validate(model, loaders, dist, amp):
    """Loss per data set over all ranks, with fixed noise and time; a chunk of each, recorded and predicted."""
    model.eval()
    totals, counts, examples = {}, {}, {}
    with model.averaged(), amp:
        for name, loader in loaders.items():
            for batch in loader:
                batch = {key: value.to(dist.device) for key, value in batch.items()}
                key, size = f"val/{name}/loss", len(batch["mask"])
                totals[key] = totals.get(key, 0.0) + model(batch)[0].item() * size
                counts[key] = counts.get(key, 0) + size
            steps = loader.dataset
            if dist.main and len(steps):
                batch = steps.collate([steps.liveliest()])
                true, predicted = (x[0][batch["mask"][0]].numpy() for x in (batch["action"], model.predict(batch)))
                examples[name] = true, predicted, steps.spec.names, steps.spec.control_freq_hz
    model.train()
    metrics = common.mean(dist, totals, counts)
    if loaders:
        metrics["val/loss"] = sum(metrics[f"val/{name}/loss"] for name in loaders) / len(loaders)
    return metrics, examples


def artifact(log, kind, folder):
    """Keep a folder with the wandb run, if there is one."""
    if log.wandb:
        import wandb

        kept = wandb.Artifact(f"{kind}-{log.wandb.id}", kind)
        kept.add_dir(str(folder))
        log.wandb.log_artifact(kept)


def main(argv=None):
    # --- setup
    args = parse(argv)
    dist = common.setup(args)
    if args.demo and dist.main:
        demo.write(args.data[0].partition("=")[2])
    common.share(dist, None)  # the other ranks wait for the demo's data
    say = print if dist.main else lambda text: None
    spec, train, held = open_data(args.data, args.spec, args.val_share, args.val_episodes, say=say)
    refuse(train + held, spec)
    absolute = absolute_dims(args, spec)
    norms = load_norms(args.norms) if args.norms else compute(spec, train, chunk=args.chunk, absolute=absolute)
    norms.check(train, args.chunk, absolute)
    found = norms.about["data_hash"]
    if args.data_hash not in (None, found):
        raise ValueError(f"--data-hash {args.data_hash}: the training episodes have {found}: the data changed")
    args.data_hash = found
    state_dim = sum(train[0].vectors[key].shape[1] for key in spec.required_proprio_keys)
    check_dims(spec.cameras, state_dim, spec.action_dim)
    if args.size != "tiny" or args.tokenizer:
        check_tokenizer(args.tokenizer, args.size)
    common.open_run(args, dist)
    out = Path(args.out)
    if dist.main:
        with common.atomic(out / "norms", folder=True) as folder:
            norms.save(folder)
        if not args.tokenizer:
            with common.atomic(out / "tokenizer", folder=True) as folder:
                write_toy_tokenizer(folder)
    common.share(dist, None)
    stop = common.Interrupt(args, dist)

    # --- model
    model = Pi05(
        spec.cameras,
        state_dim,
        spec.action_dim,
        norms.stats(spec),
        tokenizer=args.tokenizer or str(out / "tokenizer"),
        size=args.size,
        chunk=args.chunk,
        image_size=args.image_size,
        prompt_tokens=args.prompt_tokens,
        denoise_steps=args.denoise_steps,
        train=args.train,
        freeze_vision=args.freeze_vision,
        absolute=absolute,
        old_inputs=args.old_inputs,
        gradient_checkpointing=args.gradient_checkpointing,
        ema=args.ema,
        device=dist.device,
    )
    if args.amp == "bf16":
        model.shrink_frozen()
    learned = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(
        [
            dict(params=[p for p in learned if p.ndim >= 2], weight_decay=args.weight_decay),
            dict(params=[p for p in learned if p.ndim < 2], weight_decay=0.0),
        ],
        lr=args.lr,
        betas=args.betas,
        fused=dist.device.type == "cuda",
    )
    amp, scaler = common.autocast(args, dist.device)

    # --- resume
    first, best = common.resume(args, dist, model, opt, scaler)
    log = common.Logger(args, dist, first)
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters, {sum(p.numel() for p in learned):,} learn"
    log.say(f"{args.out}: {size}, {dist.device}, {dist.world} process(es)")
    if log.wandb:
        record = json.loads((out / "args.json").read_text())
        log.wandb.config.update(dict(versions=record["versions"], commit=record["commit"]), allow_val_change=True)
        artifact(log, "norms", out / "norms")
    net = model
    if dist.world > 1:
        net = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)

    # --- data
    loader, validation = prepare_dataloaders(
        args.batch_size,
        spec,
        train,
        held,
        args.chunk,
        args.image_size,
        model.prepare,
        build_augmentations(AUGMENT[args.augment]),
        SequenceConfig(args.seq_len, args.stride),
        seed=args.seed,
        steps=args.steps,
        first=first,
        accum=args.accum,
        rank=dist.rank,
        world=dist.world,
        workers=args.workers,
        val_stride=args.val_stride,
    )
    batches = iter(loader)
    log.say(f"{len(train)} episodes to train on, {len(held)} held out, data hash {found}")
    for warning in norms.about["warnings"]:
        log.say(f"norms: {warning}")
    if not validation:
        log.say("nothing to validate on: hold out episodes with --val-share or --val-episodes")

    # --- loop
    for step in range(first, args.steps):
        waited, lr = 0.0, common.cosine(step, args)
        for group in opt.param_groups:
            group["lr"] = lr
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
        scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(learned, args.clip)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
        model.update_average()
        log.add(dict(norm=norm))
        log.tick(waited)

        done, line, is_best = step + 1, {}, False
        ended, stopped = done == args.steps, stop()
        if done % args.log_every == 0 or ended:
            line.update(log.flush(lr=lr))
        if validation and (done % args.eval_every == 0 or ended):
            metrics, examples = validate(model, validation, dist, amp)
            line.update(metrics)
            is_best = best is None or metrics["val/loss"] < best
            best = metrics["val/loss"] if is_best else best
        if line:
            log.write(done, line)
        if done % args.save_every == 0 or is_best or ended or stopped:
            common.save(args, dist, done, model, opt, scaler, best, is_best)
        if "val/loss" in line and dist.main:
            log.figure(done, "traces", figures.traces(examples))
            log.figure(done, "curves", figures.curves(log.out / "log.jsonl"))
        if line or stopped:
            log.pause()
        if stopped and not ended:
            log.say(f"stopped after step {done}; go on with --resume --out {args.out}")
            common.cleanup(dist, log)
            return stop.code

    # --- end
    kept = log.out / "checkpoints" / ("best" if validation else "last")
    artifact(log, "checkpoint", kept.resolve())
    log.say(f"checkpoint: {kept}")
    log.say(f"figure:     {log.out / 'figures' / 'traces.png'}")
    common.cleanup(dist, log)
    return 0


if __name__ == "__main__":
    common.run(main)
