# /// script
# dependencies = ["torch>=2.7,<2.11", "numpy", "einops", "av", "webdataset", "tqdm", "matplotlib"]
# ///
"""Train LAQ: learns discrete latent actions from pairs of video frames, without action labels (LAPA stage 1).

Run:
  python laq/train.py
  python laq/train.py @laq/base.args --data g1=shards/g1 droid=shards/droid --gap 0.6s --out runs/robots
  torchrun --nproc_per_node 8 laq/train.py @laq/lapa.args --data web=shards/web --out runs/lapa --amp bf16
"""

import argparse
import datetime
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import demo
import figures
from data import action_moments, augment, prepare_dataloaders
from metrics import advice, assess, code_sensitivity, validation_metrics
from model import LAQ, LAQConfig
from sources import read_sources, restore_split

import common

HERE = Path(__file__).resolve().parent
BETAS = (0.9, 0.99)  # AdamW, as published
SENSITIVITY_EVERY = 20  # steps between two checks whether quantization can start
MOST = 1e12  # of any flag
QUANTIZE_BY = 0.5  # it starts after this share of the steps in any case


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    whole, real = dict(type=int, metavar="N"), dict(type=float, metavar="X")

    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", metavar="PATH", help="PATH or NAME=PATH; without it the demo, on data it writes itself")
    add("--gap", nargs="+", default=["0.6s"], metavar="T", help="between the frames: 3, 0.6s, 0.4s-1.2s, or g1=18 b=3")
    add("--reuse", default=8, help="pairs drawn from each decoded window of a clip, one per step", **whole)
    about = "smallest random crop, as a fraction of the side; the same for both frames; 1: off"
    add("--crop", default=0.9, help=about, **real)
    add("--jitter", default=0.1, help="random brightness, contrast and saturation, both frames alike; 0: off", **real)
    add("--val-share", default=0.1, help="share of the episodes held out, by a hash of their names", **real)
    add("--val-episodes", nargs="+", default=[], metavar="IDS", help="hold out just these: 56-69,80 or g1=56-69 b=3")
    add("--val-pairs", default=256, help="validation pairs per source", **whole)
    add("--workers", default=0, help="loader processes per rank; 0 loads in the training process", **whole)

    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--image-size", default=128, help="pixels; frames are squashed to a square, as in LAPA", **whole)
    add("--patch", default=16, help="pixels per token, a multiple of 4", **whole)
    add("--dim", default=384, help="width of the transformers", **whole)
    add("--depth", default=4, help="blocks each: spatial encoder, temporal encoder, decoder", **whole)
    add("--code-seq-len", default=4, help="codes per pair of frames", **whole)
    add("--codebook-size", default=8, help="codes to choose from, at each position", **whole)
    add("--code-dim", default=32, help="width of a position's vector before quantization", **whole)

    optimisation = parser.add_argument_group("optimisation")
    add = optimisation.add_argument
    add("--batch-size", default=64, help="samples per optimizer step, over all processes and micro-steps", **whole)
    add("--lr", default=3e-4, help="peak learning rate", **real)
    add("--lr-end", default=0.0, help="learning rate after the last step (cosine)", **real)
    add("--warmup", default=100, help="steps of linear warm-up", **whole)
    add("--weight-decay", default=0.01, help="AdamW weight decay of matrices", **real)
    add("--clip", default=1.0, help="largest norm of the gradient", **real)
    add("--motion-weight", default=0.0, help="extra weight of pixels that change, or that KEY.mask.npy marks", **real)
    add("--flow-weight", default=3.0, help="weight of the optical flow, which the codes must predict; 0: none", **real)
    add("--label-share", default=0.0, help="share of the episodes whose actions are seen (LAOM); 0: none", **real)
    about = "code sensitivity at which quantization starts, by half of --steps at the latest; -1: by step 20"
    add("--quantize-after", default=0.25, help=about, **real)
    add("--seed", default=0, help="of weights, batches, augmentation and noise", **whole)

    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="DIR", help=f"folder of this run; without it the next free runs/{HERE.name}/NNN")
    add("--resume", action="store_true", help="go on from OUT's newest checkpoint, or start if there is none")
    add("--init", metavar="CKPT", help="checkpoint whose weights to start from")
    add("--steps", default=20000, help="optimizer steps in all", **whole)
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
    positive = "reuse crop val_pairs image_size patch dim depth code_seq_len codebook_size code_dim"
    for name in f"{positive} batch_size lr clip steps accum log_every eval_every save_every keep".split():
        if not 0 < getattr(args, name) <= MOST:
            parser.error(f"--{name.replace('_', '-')} must be above 0 and at most {MOST:g}")
    zero = "jitter val_share workers lr_end warmup weight_decay motion_weight flow_weight label_share seed"
    for name in zero.split():
        if not 0 <= getattr(args, name) <= MOST:
            parser.error(f"--{name.replace('_', '-')} must be at least 0 and at most {MOST:g}")
    if math.isnan(args.quantize_after):
        parser.error("--quantize-after must be a number")
    if max(args.crop, args.jitter, args.val_share, args.label_share) > 1:
        parser.error("--crop, --jitter, --val-share and --label-share must be at most 1")
    if args.image_size % args.patch or args.patch % 4:
        parser.error(f"--image-size {args.image_size} must be a multiple of --patch {args.patch}, and that of 4")
    micro_steps = args.accum * int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % micro_steps:
        parser.error(f"--batch-size {args.batch_size} is no multiple of {micro_steps} (micro-steps x processes)")
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
    """Per source the metrics of metrics.py over all ranks' pairs; a pair with the effect of each code, and all pairs.

    A source of which no pair can be read has no metrics.
    """
    model.eval()
    metrics, examples = {}, {}
    for name, loader in loaders.items():
        rows = []
        for batch in loader:
            batch = augment({key: value.to(device) for key, value in batch.items()})
            first, second = batch["frames"].unbind(1)
            with amp:
                errors, decoded, codes = assess(model, first, second)
            actions = batch["actions"].where(batch["has_actions"][:, None], torch.nan)
            rows.append([x.cpu().numpy() for x in (errors, codes, actions)])
            if name not in examples:
                i = errors[:, 2].argsort()[int(0.9 * len(first))]  # among the largest motions
                examples[name] = figures.effects(model, first[i], second[i], decoded[i], codes[i])
        found, codes, actions = validation_metrics(rows, model.config.codebook_size, model.quantizer.quantizing)
        metrics |= {f"val/{name}/{key}": value for key, value in found.items()}
        examples.get(name, {}).update(all_codes=codes, actions=actions)
    model.train()
    errors = [value for name, value in metrics.items() if name.endswith("/mse")]
    return metrics | ({"val/mse": sum(errors) / len(errors)} if errors else {}), examples


def main(argv=None):
    # --- setup
    args = parse(argv)
    rank, world, device = setup(args)
    if args.demo and rank == 0:
        demo.write(args.data[0].partition("=")[2])
    common.broadcast()  # the other ranks wait for the demo's data
    common.seed_all(args.seed)
    say = print if rank == 0 else lambda text: None
    sources = read_sources(args.data, args.gap, args.val_share, args.val_episodes, say)
    common.open_run(args)
    stop = common.Interrupt(args.out)

    # --- model
    checkpoint = common.newest(args.out) if args.resume else None
    if checkpoint:
        model = LAQ.from_pretrained(checkpoint).train()
        lines = restore_split(sources, common.read_json(checkpoint / "data.json"))
    else:
        mean, std = action_moments(sources, args.label_share)
        sizes = "image_size patch dim depth code_seq_len codebook_size code_dim motion_weight flow_weight".split()
        config = LAQConfig(**{name: getattr(args, name) for name in sizes}, action_dim=len(mean))
        model, lines = LAQ(config), []
        if args.init:
            model.load_pretrained(args.init)
        model.action_mean.copy_(mean)  # of this data, not of --init's
        model.action_std.copy_(std)
    model.to(device)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=args.weight_decay), dict(params=others, weight_decay=0.0)]
    opt = torch.optim.AdamW(groups, lr=args.lr, betas=BETAS, fused=device.type == "cuda")
    dtype = dict(off=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[args.amp]
    amp = torch.autocast(device.type, dtype, enabled=args.amp != "off")
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    # --- resume
    first, best = 0, None
    if checkpoint:
        state = common.load(checkpoint / "resume.pt")
        opt.load_state_dict(state["opt"])
        scaler.load_state_dict(state["scaler"])
        first, best = state["step"], state["best"]
    log = common.Logger(args, first)
    size = sum(p.numel() for p in model.parameters())
    log.say(f"{args.out}: {size:,} parameters, {device}, {world} process(es)")
    net = torch.compile(model) if args.compile else model
    if world > 1:
        net = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)

    # --- data
    names = "seed steps accum workers val_pairs reuse crop jitter label_share".split()
    options = {name: getattr(args, name) for name in names}
    options |= dict(first=first, rank=rank, world=world, pin_memory=device.type == "cuda")
    batches, validation = prepare_dataloaders(sources, args.batch_size, args.image_size, **options)
    for source in sources:
        split = f"{len(source.train)} clips to train on, {len(source.validation)} held out"
        lines.append(f"{source.name}: {split}, {source.short} shorter than the gap")
    if not validation:
        lines.append("nothing to validate on: hold out episodes with --val-share or --val-episodes")
    log.say("\n".join(lines))

    # --- loop
    stopped, metrics = False, {}
    for step in range(first, args.steps):
        began, waited, lr, seen = time.perf_counter(), 0.0, learning_rate(step, args), []
        for group in opt.param_groups:
            group["lr"] = lr
        common.seed_all(args.seed, step)  # not the rank: each draws the noise of the whole batch and keeps its rows
        for micro in range(args.accum):
            start = time.perf_counter()
            batch = {key: value.to(device, non_blocking=True) for key, value in next(batches).items()}
            waited += time.perf_counter() - start
            batch = augment(batch)
            if not model.quantizer.quantizing:  # kept for the step's code sensitivity
                seen.append(batch["frames"])
            net.require_backward_grad_sync = micro == args.accum - 1  # DDP: one all-reduce per optimizer step
            with amp:
                loss, found = net(batch)
            scaler.scale(loss / args.accum).backward()
            log.add(found, 1 / args.accum)
        scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
        if scaler.is_enabled() or norm.isfinite():  # a gradient that is not finite changes nothing
            scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
        model.quantizer.update(args.seed + step, args.accum)
        log.add(dict(norm=norm))
        log.tick(time.perf_counter() - began, waited)

        done, line, is_best = step + 1, {}, False
        ended = done == args.steps
        stopped = stop() and not ended
        late = done >= QUANTIZE_BY * args.steps
        if not model.quantizer.quantizing and (late or done % SENSITIVITY_EVERY == 0):
            with amp:
                sensitivity = code_sensitivity(model, torch.cat(seen))
            if late or sensitivity >= args.quantize_after:
                model.quantizer.start(args.seed)
                best = None  # a continuous model's error is not what codes have to beat
                log.say(f"step {done}: quantization starts at code sensitivity {sensitivity:.2f}")
        if done % args.log_every == 0 or ended:
            line.update(log.flush(lr=lr, restarts=model.quantizer.restarts))
        if validation and (done % args.eval_every == 0 or ended):
            metrics, examples = validate(model, validation, device, amp)
            line.update(metrics)
            quantizing = model.quantizer.quantizing and "val/mse" in metrics
            is_best = quantizing and (best is None or metrics["val/mse"] < best)
            best = metrics["val/mse"] if is_best else best
        if line:
            log.write(done, line)
        if (done % args.save_every == 0 or is_best or ended or stopped) and rank == 0:
            with common.checkpoint(args.out, done, is_best, args.keep) as folder:
                model.save_pretrained(folder)
                specs = {source.name: source.spec() for source in sources}
                (folder / "data.json").write_text(json.dumps(specs, indent=1))
                state = dict(step=done, best=best, opt=opt.state_dict(), scaler=scaler.state_dict())
                torch.save(state, folder / "resume.pt")
        if "val/mse" in line and rank == 0:
            if examples:  # rank 0 has pairs of its own
                log.figure(done, "codes", figures.codes(examples))
            log.figure(done, "curves", figures.curves(log.out / "log.jsonl"))
        if stopped:
            log.say(f"stopped after step {done}; go on with --resume --out {args.out}")
            break

    # --- end
    if not stopped:
        for source in validation if metrics else ():
            found = {name.removeprefix(f"val/{source}/"): value for name, value in metrics.items()}
            log.say(f"{source}: {advice(found, args.codebook_size)}")
        log.say(f"checkpoint: {log.out / 'checkpoints' / ('last' if best is None else 'best')}")
        if "val/mse" in metrics:
            log.say(f"figures:    {log.out / 'figures' / 'codes.png'}, curves.png")
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
