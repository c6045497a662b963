"""Train VVAELatentActionVQVAE: learns discrete latent actions from the latents of a video VAE.

Run:
  python vvae_lam/train.py
  python vvae_lam/train.py @vvae_lam/seed.args --data DIR --out runs/latents
  torchrun --nproc_per_node 8 vvae_lam/train.py @vvae_lam/seed.args --data DIR --out runs/latents --amp bf16

--overfit is the sanity check: one batch, over and over; the exit code says whether the model could learn it by heart.
"""

import sys
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import demo
import figures
from data import Sequences, TrainBatches, train_loader, validation_loaders
from metrics import assess, codebook_use, summary
from model import VVAELatentActionVQVAE
from quantise import gather
from recordings import describe, leak_report, read_sources
from vae import open_vae

import common

HERE = Path(__file__).resolve().parent
GATE = dict(mse_loss=0.01, mae_loss=0.05)  # of --overfit, in normalised units


def parse(argv=None):
    parser = common.flags(__doc__)
    parser.set_defaults(steps=20000, batch_size=32, lr=1e-4, warmup=1000)
    group = parser.add_argument_group("vvae_lam")
    add, whole, real = group.add_argument, dict(type=int, metavar="N"), dict(type=float, metavar="X")
    add("--manifest", metavar="FILE", help="split of the recordings; without it DIR/manifest.json, if there is one")
    add("--val-share", default=0.1, help="without a manifest: share of recordings held out, by hash of name", **real)
    add("--val-episodes", nargs="+", default=[], metavar="ID", help="hold out just these recordings: ID or NAME=ID")
    add("--causal-only", action="store_true", help="keep only the last latent frame of each jointly encoded chunk")
    add("--sequence-length", default=8, help="latent frames per sequence", **whole)
    add("--stride", default=1, help="latent frames between the starts of two training sequences", **whole)
    add("--gap", default=1, help="latent frames between two frames of a sequence", **whole)
    add("--flip", action="store_true", help="mirror half of the training sequences left-right")
    add("--normalise", choices=["channel", "none"], default="channel", help="to zero mean, unit std per channel")
    add("--patch", default=4, help="latent pixels per side of a patch", **whole)
    add("--patch-dim", default=256, help="width of a patch in the adapters", **whole)
    add("--embed-dim", default=512, help="width of the transformers", **whole)
    add("--encoder-depth", default=3, help="encoder blocks", **whole)
    add("--decoder-depth", default=3, help="decoder blocks", **whole)
    add("--num-heads", default=8, help="attention heads", **whole)
    add("--num-codes", default=3, help="codes per transition", **whole)
    add("--num-embeddings", default=12, help="codes in the codebook", **whole)
    add("--codebook-dim", default=128, help="width of a code", **whole)
    add("--commitment-weight", default=0.25, help="pulls vectors to their codes", **real)
    add("--rollout-horizon", default=2, help="steps of the rollout in the loss; 1: none", **whole)
    add("--context", default=8, help="latent frames that the decoder looks back on", **whole)
    add("--margin", default=0.1, help="quantise once shuffled codes cost this share of the error of no motion", **real)
    add("--check-every", default=25, help="steps between two looks at that", **whole)
    add("--restart-every", default=20, help="steps without use after which a code moves", **whole)
    add("--overfit", action="store_true", help="learn one batch by heart; exit code 1 if MSE < 0.01, MAE < 0.05 fail")
    add("--vae", metavar="DIR", help="decode the figures' latents with this VAE (see encode_videos.py)")
    args = common.parse(parser, argv, demo=HERE / "demo.args")
    for name in ("stride", "gap", "check_every", "restart_every", "rollout_horizon", "context"):
        if getattr(args, name) < 1:
            parser.error(f"{common.flag(name)} must be above 0")
    if args.sequence_length <= args.rollout_horizon:
        parser.error(f"--sequence-length must be above --rollout-horizon {args.rollout_horizon}")
    return args


@torch.no_grad()
def uses_codes(model, batch, dist, amp):
    """How much worse the prediction is with the codes of another transition, in errors of "nothing moves"."""
    model.eval()
    with amp:
        found, _ = assess(model, gather(batch["latents"])[:32])  # foreign codes come from the same clips on any ranks
    model.train()
    means = common.mean(dist, found, dict.fromkeys(found, 1))
    return (means["shuffled_l2"] - means["true_l2"]) / max(means["still_l2"], 1e-12)


@torch.no_grad()
def start_codes(model, batches, done, args, dist, amp, wanted=2048):
    """Make the codes of the vectors of the coming steps' global batches, about `wanted` transitions."""
    steps = -(-wanted // (args.batch_size * (args.sequence_length - 1)))
    items = range(args.accum) if args.overfit else range(done * args.accum, (done + steps) * args.accum)
    vectors = []
    for item in items:
        latents = batches[item]["latents"].to(dist.device)
        with amp:
            z = model.infer(model.patches((latents - model.mean) / model.std))
        vectors.append(gather(z.float().flatten(0, 1)))  # item by item: the same order on any number of ranks
    model.quantizer.start(torch.cat(vectors), args.seed)


@torch.no_grad()
def validate(model, loaders, dist, amp):
    """Per source and over all of them: losses, errors with wrong codes, use of the codebook; a clip for the figures."""
    model.eval()
    metrics, counts_of, example = {}, {}, None
    K, S = len(model.quantizer.codebook), model.num_codes
    for name, loader in loaders.items():
        totals, counts = {}, {}
        histogram = torch.zeros(S, K, dtype=torch.int64)
        for batch in loader:
            latents = batch["latents"].to(dist.device)
            with amp:
                losses = model(dict(latents=latents))[1]
                found, codes = assess(model, latents, torch.Generator().manual_seed(0))  # the same on any rank
            for key, value in {**losses, **found}.items():
                totals[key] = totals.get(key, 0.0) + float(value) * len(latents)
                counts[key] = counts.get(key, 0) + len(latents)
            histogram += torch.stack([torch.bincount(slot.flatten().cpu(), minlength=K) for slot in codes.unbind(2)])
            example = latents if example is None else example
        means = common.mean(dist, totals, counts)
        if dist.world > 1:
            histogram = histogram.to(dist.device)
            torch.distributed.all_reduce(histogram)
        used = {**codebook_use(histogram), **summary(means)}
        kept = {key: value for key, value in means.items() if key.endswith("loss")}
        metrics |= {f"val/{name}/{key}": value for key, value in {**kept, **used}.items()}
        counts_of[name] = histogram.cpu()
    for key in dict.fromkeys(name.rpartition("/")[2] for name in metrics):
        metrics[f"val/{key}"] = sum(metrics[f"val/{name}/{key}"] for name in loaders) / len(loaders)
    model.train()
    return metrics, counts_of, example


def main(argv=None):
    # --- setup
    args = parse(argv)
    dist = common.setup(args)
    if args.demo and dist.main:
        demo.write(args.data[0].partition("=")[2])
    common.share(dist, None)  # the other ranks wait for the demo's data
    recordings = read_sources(args.data, args.manifest, args.val_share, args.val_episodes, args.causal_only)
    training = [recording for recording in recordings if recording.split == "train"]
    sequences = Sequences(training, args.sequence_length, args.gap, args.stride)
    batches = TrainBatches(
        sequences, args.batch_size, args.seed, args.accum, dist.rank, dist.world, args.rollout_horizon, args.flip
    )
    vae = open_vae(args.vae, dist.device) if args.vae else None
    common.open_run(args, dist)
    stop = common.Interrupt(args, dist)

    # --- model
    channels, height, width = training[0].shape
    mean, std = describe(training) if args.normalise == "channel" else ([0.0] * channels, [1.0] * channels)
    model = VVAELatentActionVQVAE(
        channels=channels,
        height=height,
        width=width,
        patch=args.patch,
        patch_dim=args.patch_dim,
        embed_dim=args.embed_dim,
        encoder_depth=args.encoder_depth,
        decoder_depth=args.decoder_depth,
        num_heads=args.num_heads,
        num_codes=args.num_codes,
        num_embeddings=args.num_embeddings,
        codebook_dim=args.codebook_dim,
        commitment_weight=args.commitment_weight,
        rollout_horizon=args.rollout_horizon,
        context=args.context,
        restart_every=args.restart_every,
        mean=mean,
        std=std,
        gap=args.gap,
        causal_only=args.causal_only,
    ).to(dist.device)
    codebook = model.quantizer.codebook  # decay would pull its codes away from their vectors
    matrices = [p for p in model.parameters() if p.ndim >= 2 and p is not codebook]
    others = [p for p in model.parameters() if p.ndim < 2 or p is codebook]
    opt = torch.optim.AdamW(
        [dict(params=matrices, weight_decay=args.weight_decay), dict(params=others, weight_decay=0.0)],
        lr=args.lr,
        betas=args.betas,
        fused=dist.device.type == "cuda",
    )
    amp, scaler = common.autocast(args, dist.device)

    # --- resume
    first, best = common.resume(args, dist, model, opt, scaler)
    log = common.Logger(args, dist, first)
    size = sum(p.numel() for p in model.parameters())
    log.say(f"{args.out}: {size:,} parameters, {dist.device}, {dist.world} process(es)")
    net = torch.compile(model) if args.compile else model
    if dist.world > 1:
        net = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)

    # --- data
    train = train_loader(batches, first, args.steps, args.workers, repeat=args.overfit)
    if args.overfit:
        validation = {"overfit": [batches[micro] for micro in range(args.accum)]}
    else:
        share = dist.rank, dist.world
        validation = validation_loaders(recordings, args.sequence_length, args.gap, args.batch_size, *share)
    log.say(f"{len(sequences):,} training sequences of {args.sequence_length} from {len(training)} recordings")
    if not validation:
        log.say("nothing to validate on: hold out recordings with a manifest, --val-share or --val-episodes")
    if leak_report(training):
        log.say(leak_report(training))
    flops = args.batch_size * model.training_flops(args.sequence_length)

    # --- loop
    passed = False
    for step in range(first, args.steps):
        waited, lr = 0.0, common.cosine(step, args)
        for group in opt.param_groups:
            group["lr"] = lr
        common.seed(args.seed, step, dist.rank)
        for micro in range(args.accum):
            start = time.perf_counter()
            batch = {key: value.to(dist.device, non_blocking=True) for key, value in next(train).items()}
            waited += time.perf_counter() - start
            net.require_backward_grad_sync = micro == args.accum - 1  # DDP: one all-reduce per optimizer step
            with amp:
                loss, metrics = net(batch)
            scaler.scale(loss / args.accum).backward()
            log.add(metrics, 1 / args.accum)
        scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
        log.add(dict(grad_norm=norm, restarts=model.quantizer.update(opt, args.seed)))
        log.tick(waited)

        done, line, is_best = step + 1, {}, False
        ended, stopped = done == args.steps, stop()
        if not model.quantizer.started and done % args.check_every == 0:
            gain = uses_codes(model, batch, dist, amp)
            line["code_gain"] = gain
            if gain > args.margin:
                start_codes(model, batches, done, args, dist, amp)
                log.say(f"step {done}: the decoder uses the code (gain {gain:.2f}): quantised from here on")
        if done % args.log_every == 0 or ended:
            line.update(log.flush(lr=lr, tflops=flops * done / 1e12))
        if validation and (done % args.eval_every == 0 or ended):
            metrics, counts, example = validate(model, validation, dist, amp)
            line.update(metrics)
            # errors from before the codes began are not comparable: nothing was rounded
            is_best = model.quantizer.started and (best is None or metrics["val/mse_loss"] < best)
            best = metrics["val/mse_loss"] if is_best else best
            passed = args.overfit and all(metrics[f"val/{name}"] < limit for name, limit in GATE.items())
            if passed and not model.quantizer.started:  # learned without codes: once more with them
                start_codes(model, batches, done, args, dist, amp)
                passed = False
            ended = ended or passed
        if line:
            log.write(done, line)
        if done % args.save_every == 0 or is_best or ended or stopped:
            common.save(args, dist, done, model, opt, scaler, best, is_best)
        if "val/mse_loss" in line and dist.main and (ended or not args.overfit):
            for name, figure in figures.of_run(model, example, counts, log.out / "log.jsonl", vae):
                log.figure(done, name, figure)
        if line or stopped:
            log.pause()
        if ended:
            break
        if stopped:
            log.say(f"stopped after step {done}; go on with --resume --out {args.out}")
            common.cleanup(dist, log)
            return stop.code

    # --- end
    log.say(f"checkpoint: {log.out / 'checkpoints' / ('best' if best is not None else 'last')}")
    log.say(f"figure:     {log.out / 'figures' / 'prediction.png'}")
    if not model.quantizer.started:
        log.say(f"the codes never began: shuffled ones cost less than --margin {args.margin}; train longer")
    if args.overfit:
        log.say(f"overfit test {'passed' if passed else 'FAILED'} at step {done}")
    common.cleanup(dist, log)
    return 1 if args.overfit and not passed else 0


if __name__ == "__main__":
    common.run(main)
