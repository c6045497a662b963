# /// script
# dependencies = ["torch>=2.7,<2.11", "numpy", "einops", "h5py", "pyarrow", "tqdm", "matplotlib"]
# ///
"""Train FSQVQVAE: learns discrete tokens of action chunks from recorded robot actions.

Without --data it trains on a demo: 15 s on two cores, val/mse 0.0010.

Run:
  python fsq_vqvae/train.py
  python fsq_vqvae/train.py --data g1=PATH droid=PATH --chunk 1s --out runs/robots
  torchrun --nproc_per_node 8 fsq_vqvae/train.py --data g1=PATH --out runs/g1 --amp bf16
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
from data import TrainBatches, describe, read_sources, train_loader, validation_batches
from model import CONTEXT, FSQVQVAE
from split import in_order, restore_split, split_of

import common

HERE = Path(__file__).resolve().parent
BETAS = (0.9, 0.95)  # AdamW, as for most transformers of this size


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    whole, real = dict(type=int, metavar="N"), dict(type=float, metavar="X")

    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", metavar="PATH", help="PATH or NAME=PATH; without it the demo, on data it writes itself")
    add("--action-key", metavar="KEY", help="LeRobot feature that holds the actions; without it action or actions")
    add("--chunk", nargs="+", default=["1s"], metavar="T", help="chunk length: 1s, 30 (steps), or g1=30 droid=15")
    about = "half of the chunks become w a + (1 - w) b with another, w in [-X, 1 + X]; 0: off"
    add("--mix", default=0.5, help=about, **real)
    add("--val-share", default=0.1, help="share of the episodes held out, by a hash of their names", **real)
    add("--val-episodes", nargs="+", default=[], metavar="IDS", help="hold out just these: 56-69,80 or g1=56-69 b=3")
    add("--val-stride", default=5, help="steps between two validation chunks", **whole)
    add("--workers", default=0, help="loader processes per rank; 0 loads in the training process", **whole)

    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--tokens", default=8, help="tokens per chunk", **whole)
    add("--codebook-size", default=1024, help="largest number of codes of a token", **whole)
    about = "context given to encode and decode; none: absolute actions"
    add("--condition", choices=[*CONTEXT], default="action", help=about)
    add("--hidden-dim", default=512, help="width of the network that refines the decoding", **whole)
    add("--dropout", default=0.1, help="dropout", **real)

    optimisation = parser.add_argument_group("optimisation")
    add = optimisation.add_argument
    add("--batch-size", default=128, help="samples per optimizer step, over all processes and micro-steps", **whole)
    add("--lr", default=1e-3, help="peak learning rate", **real)
    add("--lr-end", default=0.0, help="learning rate after the last step (cosine)", **real)
    add("--warmup", default=100, help="steps of linear warm-up", **whole)
    add("--weight-decay", default=0.05, help="AdamW weight decay of matrices", **real)
    add("--clip", default=1.0, help="largest norm of the gradient", **real)
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
    add("--eval-every", default=100, help="steps between two validations", **whole)
    add("--save-every", default=100, help="steps between two checkpoints", **whole)
    add("--keep", default=2, help="newest checkpoints kept beside the best", **whole)
    add("--wandb", metavar="PROJECT", help="also log to this Weights & Biases project")

    args = parser.parse_args(argv)
    args.demo = args.data is None
    if args.demo:  # its preset first, so that the flags given here win
        given = sys.argv[1:] if argv is None else argv
        args = parser.parse_args([f"@{HERE / 'demo.args'}", *given], argparse.Namespace(demo=True))
    positive = "tokens codebook_size hidden_dim val_stride batch_size lr clip steps accum"
    for name in f"{positive} log_every eval_every save_every keep".split():
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    for name in "mix val_share workers dropout lr_end warmup weight_decay seed".split():
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must not be negative")
    if not 2 <= args.codebook_size < 2**63:
        parser.error(f"--codebook-size {args.codebook_size}: expected 2 to 2^63 - 1, what an int64 index can count")
    if not (args.dropout < 1 and args.val_share < 1):
        parser.error("--dropout and --val-share must be below 1")
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
def validate(model, loaders, device):
    """Per source mse (normalised) over all ranks, and a chunk, true and decoded.

    Turns the network on or off for each source: on where it decodes better than the closed form, whose error is beside.
    """
    model.eval()
    totals, counts, shown, examples = {}, {}, {}, {}
    for name, loader in loaders.items():
        for batch in loader:
            batch = {key: value.to(device) for key, value in batch.items()}
            metrics = model.compute_loss(batch)[1]  # in float32, as decode() runs
            for key in ("mse", "mse_closed_form"):
                key, value = f"val/{name}/{key}", metrics[key].item()
                totals[key] = totals.get(key, 0.0) + value * len(batch["mask"])
                counts[key] = counts.get(key, 0) + len(batch["mask"])
            if name not in shown:  # for the figure: the chunk of the first batch that moves most
                i = batch["actions"].std(1).mean(1).argmax()
                shown[name] = batch["actions"][i], batch["context"][i]
    metrics = common.mean(totals, counts)
    for own in model.coders:
        name = own.source["name"]
        if name in loaders:
            network, closed = metrics[f"val/{name}/mse"], metrics[f"val/{name}/mse_closed_form"]
            own.use_network.fill_(network < closed)
            metrics[f"val/{name}/mse"] = min(closed, network)  # not that of a network that has become NaN
        if name in shown:
            actions, context = shown[name][0][: own.steps, : own.dims], shown[name][1][None, :, : own.dims]
            decoded = model.decode(model.encode(actions, None, name, context), name, context)
            examples[name] = actions.cpu().numpy(), decoded.cpu().numpy(), own.source["fps"]
    model.train()
    if loaders:
        metrics["val/mse"] = sum(metrics[f"val/{name}/mse"] for name in loaders) / len(loaders)
    return metrics, examples


def main(argv=None):
    # --- setup
    args = parse(argv)
    rank, world, device = setup(args)
    if args.demo and rank == 0:
        demo.write(args.data[0].partition("=")[2])
    common.broadcast()  # the other ranks wait for the demo's data
    split = args.val_share, args.val_episodes
    sources = read_sources(args.data, args.chunk, *split, condition=args.condition, action_key=args.action_key)
    common.seed_all(args.seed)  # after a user's own loaders, which are read with a seed of theirs
    common.open_run(args)
    stop = common.Interrupt(args.out)

    # --- model
    context = CONTEXT[args.condition]
    checkpoint = common.newest(args.out) if args.resume else None
    if checkpoint:  # with its normalisation, whatever the data have become
        model = FSQVQVAE.from_pretrained(checkpoint)
    else:
        sizes = {name: getattr(args, name) for name in "codebook_size condition hidden_dim dropout".split()}
        if rank == 0:  # fitted once: other machines may round otherwise
            samples = [source.sample(context) for source in sources]
            held_out = [source.sample(context, validation=True) for source in sources]
            model = FSQVQVAE.fit([describe(source) for source in sources], samples, args.tokens, held_out, **sizes)
        model = common.broadcast(model if rank == 0 else None)
        if args.init:
            model.load_pretrained(args.init)
    model.to(device).train()  # from_pretrained gives it in eval mode
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
    if checkpoint:
        sources = in_order(sources, model.sources)
        for line in restore_split(sources, common.read_json(checkpoint / "data.json")):
            log.say(line)
    batches = TrainBatches(sources, args.batch_size, args.seed, args.accum, rank, world, args.mix, context)
    train = train_loader(batches, first, args.steps, args.workers, device.type == "cuda")
    validation = validation_batches(sources, args.val_stride, rank, world, context)
    for source in sources:
        held_out = source.validation.sum()
        split = f"{len(source.ids) - held_out} episodes to train on, {held_out} held out"
        log.say(f"{source.name}: {split}, chunks of {source.chunk} steps x {source.actions.shape[1]}")
        if args.condition == "state" and source.remark:
            log.say(f"{source.name}: {source.remark}")
    if not validation:
        log.say("nothing to validate on: hold out episodes with --val-share or --val-episodes")

    # --- loop
    stopped = False
    for step in range(first, args.steps):
        began, waited, lr = time.perf_counter(), 0.0, learning_rate(step, args)
        for group in opt.param_groups:
            group["lr"] = lr
        common.seed_all(args.seed, step, rank)  # dropout of a step is the same after a resume
        for micro in range(args.accum):
            start = time.perf_counter()
            batch = {key: value.to(device, non_blocking=True) for key, value in next(train).items()}
            waited += time.perf_counter() - start
            net.require_backward_grad_sync = micro == args.accum - 1  # DDP: one all-reduce per optimizer step
            with amp:
                loss, metrics = net(batch)
            scaler.scale(loss / args.accum).backward()
            log.add(metrics, 1 / args.accum)
        scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
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
        if validation and (done % args.eval_every == 0 or ended):
            metrics, examples = validate(model, validation, device)
            line.update(metrics)
            is_best = best is None or metrics["val/mse"] < best
            best = metrics["val/mse"] if is_best else best
        if line:
            log.write(done, line)
        if (done % args.save_every == 0 or is_best or ended or stopped) and rank == 0:
            with common.checkpoint(args.out, done, is_best, args.keep) as folder:
                model.save_pretrained(folder)
                (folder / "data.json").write_text(json.dumps(split_of(sources), indent=1))
                state = dict(step=done, best=best, opt=opt.state_dict(), scaler=scaler.state_dict())
                torch.save(state, folder / "resume.pt")
        if "val/mse" in line and rank == 0:
            log.figure(done, "reconstruction", figures.reconstruction(examples))
            log.figure(done, "curves", figures.curves(log.out / "log.jsonl"))
        if stopped:
            log.say(f"stopped after step {done}; go on with --resume --out {args.out}")
            break

    # --- end
    if not stopped:
        log.say(f"checkpoint: {log.out / 'checkpoints' / ('best' if validation else 'last')}")
        if validation:
            log.say(f"figure:     {log.out / 'figures' / 'reconstruction.png'}")
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
