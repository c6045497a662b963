# /// script
# dependencies = ["torch>=2.7,<2.11", "numpy", "einops", "h5py", "tqdm", "matplotlib"]
# ///
"""Train VVAELatentActionVQVAE: learns discrete latent actions from the latents of a video VAE.

Run:
  python vvae_lam/train.py
  python vvae_lam/train.py @vvae_lam/original.args --data DIR --out runs/latents
  torchrun --nproc_per_node 8 vvae_lam/train.py @vvae_lam/original.args --data DIR --out runs/latents --amp bf16

--overfit is the sanity check: to train and to validate on there is one batch; the exit code tells if it was learned.
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
import data
import demo
import figures
from metrics import advice, assess, code_use, codebook_metrics, count_codes, reconstruction_metrics
from model import Config, VVAELatentActionVQVAE, read_config

import common

HERE = Path(__file__).resolve().parent
BETAS = (0.9, 0.95)  # AdamW, as for most transformers of this size
CHECK_EVERY = 20  # steps between two measurements of the code sensitivity, until quantization begins
CODEBOOK_FROM = 2048  # transitions whose vectors make the first codes
MOST = 1e12  # of any flag
OVERFIT = dict(mse_loss=0.01, mae_loss=0.05)  # what --overfit has to reach, in normalised units


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    whole, real = dict(type=int, metavar="N"), dict(type=float, metavar="X")

    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", metavar="PATH", help="PATH or NAME=PATH; without it the demo, on data it writes itself")
    add("--manifest", metavar="FILE", help="split of the recordings; without it DIR/manifest.json, if there is one")
    add("--sequence-length", default=8, help="latent frames per sequence", **whole)
    add("--gap", default=1, help="latent frames from one frame of a sequence to the next", **whole)
    add("--val-share", default=0.1, help="share of the episodes held out, by a hash of their names", **real)
    add("--val-episodes", nargs="+", default=[], metavar="IDS", help="hold out just these: 56-69,80 or g1=56-69 b=3")
    add("--workers", default=0, help="loader processes per rank; 0 loads in the training process", **whole)

    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--patch", default=4, help="latent pixels per side of a patch", **whole)
    add("--patch-dim", default=256, help="width of a patch in the adapters", **whole)
    add("--embed-dim", default=512, help="width of the transformers", **whole)
    add("--encoder-depth", default=3, help="encoder blocks", **whole)
    add("--decoder-depth", default=3, help="decoder blocks", **whole)
    add("--num-heads", default=8, help="attention heads", **whole)
    add("--num-codes", default=3, help="codes per transition", **whole)
    add("--num-embeddings", default=12, help="codes in the codebook of each code position", **whole)
    add("--codebook-dim", default=128, help="width of a code", **whole)
    add("--flow", action="store_true", help="the encoder sees the optical flow of the latents; codes must predict it")

    optimisation = parser.add_argument_group("optimisation")
    add = optimisation.add_argument
    add("--batch-size", default=32, help="samples per optimizer step, over all processes and micro-steps", **whole)
    add("--lr", default=1e-4, help="peak learning rate", **real)
    add("--lr-end", default=0.0, help="learning rate after the last step (cosine)", **real)
    add("--warmup", default=1000, help="steps of linear warm-up", **whole)
    add("--weight-decay", default=0.1, help="AdamW weight decay of matrices", **real)
    add("--clip", default=1.0, help="largest norm of the gradient", **real)
    add("--quantize-after", default=0.1, help="quantize above this code_sensitivity, or (--flow) flow_r2", **real)
    add("--overfit", action="store_true", help="learn one batch by heart; exit code 1 if MSE < 0.01, MAE < 0.05 fail")
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
    add("--eval-every", default=500, help="steps between two validations", **whole)
    add("--save-every", default=500, help="steps between two checkpoints", **whole)
    add("--keep", default=2, help="newest checkpoints kept beside the best", **whole)
    add("--wandb", metavar="PROJECT", help="also log to this Weights & Biases project")

    args = parser.parse_args(argv)
    args.demo = args.data is None
    if args.demo:  # its preset first, so that the flags given here win
        given = sys.argv[1:] if argv is None else argv
        args = parser.parse_args([f"@{HERE / 'demo.args'}", *given], argparse.Namespace(demo=True))
    args.fixed = [action.dest for group in (model, optimisation) for action in group._group_actions] + ["gap"]
    sizes = [action.dest for action in model._group_actions if action.type is int]
    for name in [*sizes, *"gap batch_size lr clip steps accum log_every eval_every save_every keep".split()]:
        if not 0 < getattr(args, name) <= MOST:
            parser.error(f"--{name.replace('_', '-')} must be above 0 and at most {MOST:g}")
    for name, most in dict(val_share=1, workers=1e3, lr_end=1, warmup=MOST, weight_decay=MOST, seed=MOST).items():
        if not 0 <= getattr(args, name) <= most:
            parser.error(f"--{name.replace('_', '-')} must be at least 0 and at most {most:g}")
    if math.isnan(args.quantize_after):
        parser.error("--quantize-after must be a number")
    micro_steps = args.accum * int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % micro_steps:
        parser.error(f"--batch-size {args.batch_size} is no multiple of {micro_steps} (micro-steps x processes)")
    if args.resume and not args.out:
        parser.error("--resume needs --out, the folder of the run to go on with")
    if args.sequence_length < 3:
        parser.error("--sequence-length must be above 2: the loss holds a rollout of two steps")
    if args.embed_dim % (2 * args.num_heads):
        parser.error(f"--embed-dim {args.embed_dim} must be a multiple of twice the {args.num_heads} heads")
    args.folder = HERE.name
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
    """Per source and over all of them: losses, errors with other codes, use of the codebook; clips for the figures."""
    model.eval()
    metrics, example = {}, None
    for name, loader in loaders.items():
        totals, count, histogram = {}, 0, torch.zeros_like(model.quantizer.idle)
        for latents in loader:
            latents = latents.to(device)
            with amp:
                losses = model(dict(latents=latents))[1]
                errors, codes = assess(model, latents, torch.Generator().manual_seed(0))  # the same on any rank
            for key, value in {**losses, **errors}.items():
                totals[key] = totals.get(key, 0.0) + value.mean().item() * len(latents)
            count += len(latents)
            if codes is not None:
                histogram += count_codes(codes, histogram.shape[1]).to(device)
            example = latents if example is None else example
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(histogram)
        means = common.mean(totals, dict.fromkeys(totals, count))
        kept = {key: value for key, value in means.items() if key.endswith("loss")}
        kept |= {**codebook_metrics(histogram), **reconstruction_metrics(means)}
        metrics |= {f"val/{name}/{key}": value for key, value in kept.items()}
    for key in dict.fromkeys(name.rpartition("/")[2] for name in metrics):
        values = [metrics[f"val/{name}/{key}"] for name in loaders if f"val/{name}/{key}" in metrics]
        metrics[f"val/{key}"] = sum(values) / len(values)
    model.train()
    return metrics, example


def main(argv=None):
    # --- setup
    args = parse(argv)
    rank, world, device = setup(args)
    if args.demo and rank == 0:
        demo.write(args.data[0].partition("=")[2])
    common.broadcast()  # the other ranks wait for the demo's data
    common.seed_all(args.seed)
    recordings = data.read_sources(args.data, args.manifest, args.val_share, args.val_episodes)
    common.open_run(args)
    stop = common.Interrupt(args.out)

    # --- model
    checkpoint = common.newest(args.out) if args.resume else None
    split = common.read_json(checkpoint / "data.json") if checkpoint else data.split_of(recordings)
    changes = data.restore_split(recordings, split)  # which holds out the copies of a held-out recording, too
    training = [recording for recording in recordings if recording.split == "train"]
    if not training:
        raise common.DataError("--data: no recording to train on: copies of held-out ones, or none of the run's")
    if checkpoint:  # with its normalisation, whatever the data have become
        model = VVAELatentActionVQVAE.from_pretrained(checkpoint).train()
    else:
        shape, (mean, std) = training[0].shape, data.normalisation(training)
        if args.init:  # its weights expect its normalisation
            mean, std = read_config(args.init).mean, read_config(args.init).std
        flags = {name: value for name, value in vars(args).items() if name in vars(Config())}
        flags["vae"] = str(data.kind_of(training[0])["vae"])
        model = VVAELatentActionVQVAE(Config(*shape, mean=mean, std=std, **flags))
        if args.init:
            model.load_pretrained(args.init)
    model.to(device)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=args.weight_decay), dict(params=others, weight_decay=0.0)]
    opt = torch.optim.AdamW(groups, lr=args.lr, betas=BETAS, fused=device.type == "cuda")
    dtype = dict(off=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[args.amp]
    amp = torch.autocast(device.type, dtype, enabled=args.amp != "off")
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    # --- resume
    first, best, passed = 0, None, False
    if checkpoint:
        state = common.load(checkpoint / "resume.pt")
        opt.load_state_dict(state["opt"])
        scaler.load_state_dict(state["scaler"])
        first, best, passed = state["step"], state["best"], state.get("passed", False)
    log = common.Logger(args, first)
    log.say(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters, {device}, {world} process(es)")
    net = torch.compile(model) if args.compile else model
    if world > 1:
        net = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)

    # --- data
    for line in [*data.describe_recordings(recordings), *changes]:
        log.say(line)
    sequences = data.Sequences(training, args.sequence_length, args.gap, most=args.batch_size if args.overfit else None)
    batches = data.TrainBatches(sequences, args.batch_size, args.seed, args.accum, rank, world)
    train = data.train_loader(batches, first, args.steps, args.workers, device.type == "cuda")
    validation = data.validation_loaders(recordings, args.sequence_length, args.gap, args.batch_size, rank, world)
    if args.overfit:
        validation = {"overfit": torch.utils.data.DataLoader(sequences, args.batch_size)}
    log.say(f"{len(sequences):,} training sequences of {args.sequence_length} from {len(training)} recordings")
    if not validation:
        log.say("nothing to validate on: hold out episodes with a manifest, --val-share or --val-episodes")
    clips = -(-CODEBOOK_FROM // (args.sequence_length - 1))

    # --- loop
    stopped, line = False, {}
    for step in range(first, first if passed else args.steps):
        began, waited, lr = time.perf_counter(), 0.0, learning_rate(step, args)
        for group in opt.param_groups:
            group["lr"] = lr
        common.seed_all(args.seed, step, rank)
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
        log.add(dict(grad_norm=norm, **model.quantizer.ema_update(args.seed)))
        log.tick(time.perf_counter() - began, waited)

        done, line, is_best = step + 1, {}, False
        ended = done == args.steps
        if not model.quantizer.quantizing and done % CHECK_EVERY == 0:
            with amp:
                use = code_use(model, batches.head(done, min(args.batch_size, 32)).to(device))
            line.update(use)
            if max(use.values()) > args.quantize_after:  # with --flow either will do: both say that vectors are in use
                model.init_codebook(batches.head(done, clips), args.seed)
                log.say(f"step {done}: quantization begins")
        if done % args.log_every == 0 or ended:
            line.update(log.flush(lr=lr))
        if validation and (done % args.eval_every == 0 or ended):
            metrics, example = validate(model, validation, device, amp)
            line.update(metrics)
            # errors from before quantization are not comparable: nothing was rounded
            is_best = model.quantizer.quantizing and (best is None or metrics["val/mse_loss"] < best)
            best = metrics["val/mse_loss"] if is_best else best
            learned = all(metrics[f"val/{name}"] < limit for name, limit in OVERFIT.items())
            passed = args.overfit and learned and model.quantizer.quantizing
            ended = ended or passed
        stopped = stop() and not ended
        if line:
            log.write(done, line)
        if (done % args.save_every == 0 or is_best or ended or stopped) and rank == 0:
            with common.checkpoint(args.out, done, is_best, args.keep) as folder:
                model.save_pretrained(folder)
                (folder / "data.json").write_text(json.dumps(split, indent=1))
                state = dict(step=done, best=best, passed=passed, opt=opt.state_dict(), scaler=scaler.state_dict())
                torch.save(state, folder / "resume.pt")
        if "val/mse_loss" in line and rank == 0:
            for name, figure in figures.of_run(model, example, log.out / "log.jsonl"):
                log.figure(done, name, figure)
        if stopped or ended:
            break

    # --- end
    if stopped:
        log.say(f"stopped after step {done}; go on with --resume --out {args.out}")
    else:
        log.say(f"checkpoint: {log.out / 'checkpoints' / ('best' if best is not None else 'last')}")
        if not model.quantizer.quantizing:
            log.say(f"quantization never began: code_sensitivity stayed below --quantize-after {args.quantize_after}")
        elif "val/loss" in line and not args.overfit:
            log.say(f"figure:     {log.out / 'figures' / 'prediction.png'}")
            numbers = {name.removeprefix("val/"): value for name, value in line.items()}
            log.say(f"advice: {advice(numbers, args.num_embeddings)}")
        if args.overfit:
            log.say(f"overfit test {'passed' if passed else 'FAILED'}")
    log.close()
    if world > 1:
        torch.distributed.barrier()  # torchrun kills rank 0 in its last save if another rank ended 30 s before
        time.sleep(0.5)  # gloo's thread lets go of the barrier; joined before that, it waits for the GIL for ever
        torch.distributed.destroy_process_group()
    return stop.code if stopped else int(args.overfit and not passed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
