"""Train FSQVQVAE: learns discrete tokens of action chunks from recorded robot actions.

Run:
  python fsq_vqvae/train.py
  python fsq_vqvae/train.py --data g1=PATH droid=PATH --chunk 1s --out runs/robots
  torchrun --nproc_per_node 8 fsq_vqvae/train.py --data g1=PATH --out runs/g1 --amp bf16
"""

import os
import sys
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import demo
import figures
from data import TrainBatches, describe, prepare_dataloaders, read_sources
from model import FSQVQVAE
from user_data import prepare_user_data

import common

HERE = Path(__file__).resolve().parent


def parse(argv=None):
    parser = common.flags(__doc__)
    parser.set_defaults(steps=3000, batch_size=128, lr=1e-3, eval_every=500, save_every=500)
    group = parser.add_argument_group("fsq_vqvae")
    add = group.add_argument
    add("--chunk", nargs="+", default=["1s"], metavar="T", help="chunk length, 1s or 30 (steps) or g1=30 droid=15")
    add("--val-share", type=float, default=0.1, metavar="X", help="share of the episodes held out, by hash of the name")
    add(
        "--val-episodes", nargs="+", default=[], metavar="IDS", help="hold out just these: 56-69,80 or g1=56-69 droid=3"
    )
    add("--val-stride", type=int, default=5, metavar="N", help="steps between two validation chunks")
    add(
        "--normalise",
        choices=["quantile", "std"],
        default="quantile",
        help="q01/q99 to -1/1, or zero mean and unit std",
    )
    add(
        "--mix",
        type=float,
        default=0.5,
        metavar="X",
        help="mix half of the chunks with another, weights -X to 1+X; 0: off",
    )
    add(
        "--offset",
        type=float,
        default=0.2,
        metavar="X",
        help="shift half of the chunks by constants of about X scales; 0: off",
    )
    add("--tokens", type=int, default=8, metavar="N", help="tokens per chunk")
    add("--levels", type=int, nargs="+", default=[8, 5, 5, 5], metavar="L", help="FSQ levels; vocabulary = product")
    add("--fsq-bound", choices=["atanh", "paper"], default="atanh", help="see FSQ in model.py")
    add("--hidden-dim", type=int, default=128, metavar="N", help="width of the transformers")
    add("--latent-dim", type=int, default=64, metavar="N", help="width of the layer on each side of the quantiser")
    add("--num-heads", type=int, default=4, metavar="N", help="attention heads")
    add("--num-encoder-layers", type=int, default=2, metavar="N", help="encoder blocks")
    add("--num-decoder-layers", type=int, default=2, metavar="N", help="decoder blocks")
    add("--patch", type=int, default=5, metavar="N", help="steps per transformer input")
    add("--dropout", type=float, default=0.0, metavar="X", help="dropout")
    add(
        "--commitment-weight", type=float, default=0.0, metavar="X", help="pulls latents to their codes; FSQ needs none"
    )
    add("--spectral-weight", type=float, default=0.0, metavar="X", help="L1 on the DCT of the error")
    add("--ordered", type=float, default=0.0, metavar="X", help="share of chunks trained on a random prefix of tokens")
    add("--relative", action="store_true", help="code a chunk minus its first action; decode is then given that action")
    return common.parse(parser, argv, demo=HERE / "demo.args")


@torch.no_grad()
def validate(model, loaders, dist, amp):
    """Per source mse, mae (normalised), code usage and perplexity, over all ranks; a chunk, true and decoded."""
    model.eval()
    totals, counts, used, examples = {}, {}, {}, {}
    for name, loader in loaders.items():
        histogram = torch.zeros(model.fsq.size)
        for batch in loader:
            batch = {key: value.to(dist.device) for key, value in batch.items()}
            with amp:
                metrics = model.compute_loss(batch)[1]
            for key in ("mse", "mae"):
                key, value = f"val/{name}/{key}", metrics[key].item()
                totals[key] = totals.get(key, 0.0) + value * len(batch["mask"])
                counts[key] = counts.get(key, 0) + len(batch["mask"])
            about = model.sources[batch["source"][0]]
            actions = batch["actions"][:, : about["chunk"], : about["action_dim"]]
            indices = model.encode(actions, batch["mask"][:, : about["chunk"]], about["name"])
            histogram += torch.bincount(indices.flatten().cpu(), minlength=model.fsq.size)
            if name not in examples:
                moves = actions.std(1).mean(1).argmax()
                start = actions[moves, 0] if model.relative else None
                decoded = model.decode(indices[moves], about["name"], start=start)
                examples[name] = actions[moves].cpu().numpy(), decoded.cpu().numpy(), about["fps"]
        if dist.world > 1:
            histogram = histogram.to(dist.device)
            torch.distributed.all_reduce(histogram)
        p = histogram / histogram.sum()
        used[f"val/{name}/usage"] = (p > 0).float().mean().item()
        used[f"val/{name}/perplexity"] = torch.special.entr(p).sum().exp().item()
    model.train()
    metrics = {**common.mean(dist, totals, counts), **used}
    if loaders:
        metrics["val/mse"] = sum(metrics[f"val/{name}/mse"] for name in loaders) / len(loaders)
    return metrics, examples


def main(argv=None):
    # --- setup
    args = parse(argv)
    dist = common.setup(args)
    if args.demo and dist.main:
        demo.write(args.data[0].partition("=")[2])
    common.share(dist, None)  # the other ranks wait for the demo's data
    if args.data[0].startswith("module:"):
        micro_batch = args.batch_size // (args.accum * dist.world)
        about, sample, stream, validation = prepare_user_data(args.data[0][7:], micro_batch, args.normalise)
        abouts, samples = [about], [sample]
    else:
        sources = read_sources(args.data, args.chunk, args.val_share, args.val_episodes)
        augment = dict(mix=args.mix, offset=args.offset)
        abouts = [describe(source, args.normalise) for source in sources]
        samples = [TrainBatches([source], 8192, args.seed, **augment)[0] for source in sources]
    common.open_run(args, dist)
    stop = common.Interrupt(args, dist)

    # --- model
    model = FSQVQVAE(
        abouts,
        num_tokens=args.tokens,
        levels=args.levels,
        hidden_dim=args.hidden_dim,
        latent_dim=args.latent_dim,
        num_heads=args.num_heads,
        num_encoder_layers=args.num_encoder_layers,
        num_decoder_layers=args.num_decoder_layers,
        patch=args.patch,
        dropout=args.dropout,
        commitment_weight=args.commitment_weight,
        spectral_weight=args.spectral_weight,
        ordered=args.ordered,
        relative=args.relative,
        fsq_bound=args.fsq_bound,
    )
    if not args.init:
        for about, sample in zip(abouts, samples, strict=True):
            model.fit_skeleton(about["name"], sample["actions"], sample["mask"])
    model.to(dist.device)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
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
    if args.data[0].startswith("module:"):
        batches = stream.endless(skip=first * args.accum)
    else:
        _, train, validation = prepare_dataloaders(
            args.batch_size,
            sources,
            seed=args.seed,
            steps=args.steps,
            first=first,
            accum=args.accum,
            rank=dist.rank,
            world=dist.world,
            workers=args.workers,
            val_stride=args.val_stride,
            **augment,
        )
        batches = iter(train)
        for source in sources:
            held = source.validation.sum()
            split = f"{len(source.ids) - held} episodes to train on, {held} held out"
            log.say(f"{source.name}: {split}, chunks of {source.chunk} steps x {source.actions.shape[1]}")
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
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
        log.add(dict(norm=norm))
        log.tick(waited)

        done, line, is_best = step + 1, {}, False
        ended, stopped = done == args.steps, stop()
        if done % args.log_every == 0 or ended:
            line.update(log.flush(lr=lr))
        if validation and (done % args.eval_every == 0 or ended):
            metrics, examples = validate(model, validation, dist, amp)
            line.update(metrics)
            is_best = best is None or metrics["val/mse"] < best
            best = metrics["val/mse"] if is_best else best
        if line:
            log.write(done, line)
        if done % args.save_every == 0 or is_best or ended or stopped:
            common.save(args, dist, done, model, opt, scaler, best, is_best)
        if "val/mse" in line and dist.main:
            log.figure(done, "reconstruction", figures.reconstruction(examples))
            os.environ["LAST_VAL_FIG"] = str(log.figure(done, "curves", figures.curves(log.out / "log.jsonl")))
        if line or stopped:
            log.pause()
        if stopped and not ended:
            log.say(f"stopped after step {done}; go on with --resume --out {args.out}")
            common.cleanup(dist, log)
            return stop.code

    # --- end
    log.say(f"checkpoint: {log.out / 'checkpoints' / ('best' if validation else 'last')}")
    log.say(f"figure:     {log.out / 'figures' / 'reconstruction.png'}")
    common.cleanup(dist, log)
    return 0


if __name__ == "__main__":
    common.run(main)
