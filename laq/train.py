"""Train LAQ: learns discrete latent actions from pairs of video frames, without action labels (LAPA stage 1).

Run:
  python laq/train.py
  python laq/train.py @laq/base.args --data g1=shards/g1 droid=shards/droid --gap 0.6s --out runs/robots
  torchrun --nproc_per_node 8 laq/train.py @laq/lapa.args --data shards/ --out runs/lapa --amp bf16
"""

import sys
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import demo
import figures
from data import action_moments, augment, gauges, prepare_dataloaders, read_sources
from model import LAQ

import common

HERE = Path(__file__).resolve().parent


def parse(argv=None):
    parser = common.flags(__doc__)
    parser.set_defaults(steps=20000, batch_size=64, lr=3e-4, eval_every=1000, save_every=1000, weight_decay=0.01)
    group = parser.add_argument_group("laq")
    add = group.add_argument
    whole, real = dict(type=int, metavar="N"), dict(type=float, metavar="X")
    add("--gap", nargs="+", default=["0.6s"], metavar="T", help="between the frames: 3, 0.6s, 0.4s-1.2s, or g1=18 b=3")
    add("--weights", nargs="+", default=[], metavar="X", help="how often a source is drawn, g1=2; without: every pair")
    add("--val-share", default=0.1, help="share of the episodes held out, by hash of the name", **real)
    add("--val-episodes", nargs="+", default=[], metavar="IDS", help="hold out just these: 56-69,80 or g1=56-69 b=3")
    add("--val-pairs", default=256, help="validation pairs per source", **whole)
    add("--reuse", default=8, help="pairs taken from a decoded clip, one per step", **whole)
    add("--min-motion", default=0.0, help="least mean change of a pair, of 1; pairs below are not trained on", **real)
    add("--crop", default=0.9, help="side of the smallest random crop, of 1; both frames alike; 1: off", **real)
    add("--jitter", default=0.1, help="random brightness, contrast and saturation, both frames alike; 0: off", **real)
    add(
        "--label-share", default=0.0, help="share of the episodes whose actions are seen (LAOM's head); 0: none", **real
    )
    add("--action-weight", default=1.0, help="weight of that head's loss", **real)
    add(
        "--target", choices=["pixels", "features"], default="pixels", help="what is predicted; features need --backbone"
    )
    add("--backbone", metavar="NAME", help="DINO-type vision transformer, a folder or a Hugging Face name")
    add("--image-size", default=128, help="pixels; frames are squashed to a square, as in LAPA", **whole)
    add("--patch", default=16, help="pixels per token", **whole)
    add("--dim", default=384, help="width of the transformers", **whole)
    add("--stem", default=48, help="width of the convolutions", **whole)
    add("--spatial-depth", default=4, help="spatial encoder blocks", **whole)
    add("--temporal-depth", default=4, help="temporal encoder blocks", **whole)
    add("--decoder-depth", default=4, help="decoder blocks", **whole)
    add("--codes", default=4, help="codes per pair of frames", **whole)
    add("--vocabulary", default=8, help="codes to choose from, in each slot", **whole)
    add("--code-dim", default=32, help="width of a slot's vector before quantisation", **whole)
    add("--quantiser", choices=["vq", "nsvq", "fsq"], default="nsvq", help="see quantise.py")
    add("--levels", type=int, nargs="+", default=[2, 2, 2], metavar="L", help="fsq: levels; product = vocabulary")
    add("--commitment", default=0.25, help="vq: pulls vectors to their codes", **real)
    add("--motion-weight", default=0.0, help="extra weight of pixels that change", **real)
    add("--start-margin", default=0.25, help="codes start when the decoder relies on its vectors by this much", **real)
    add("--start-by", default=0.5, help="start them anyway after this share of the steps", **real)
    add("--start-every", default=20, help="steps between two looks at that", **whole)
    add("--restart-every", default=20, help="steps in which a code must be chosen, or be put elsewhere", **whole)
    args = common.parse(parser, argv, demo=HERE / "demo.args")
    if (args.target == "features") != bool(args.backbone):
        parser.error("--target features and --backbone go together")
    return args


@torch.no_grad()
def validate(model, loaders, dist, amp):
    """Per source: gauges of data.gauges over all ranks' pairs; one pair with what each code does to it."""
    model.eval()
    metrics, examples = {}, {}
    for name, loader in loaders.items():
        rows = []
        for batch in loader:
            random = (batch.pop("draw") * model.quantiser.vocabulary).long().to(dist.device)
            batch = augment({key: value.to(dist.device) for key, value in batch.items()})
            first, second = batch["frames"].unbind(1)
            with amp:
                decoded, codes = model.reconstruct(first, second)
                other = model.decode(first, random)
            errors = [(x - second).square().mean((1, 2, 3)) for x in (decoded, other, first)]
            moves = batch["actions"].where(batch["labelled"][:, None], torch.nan)
            rows.append(torch.cat([torch.stack(errors, 1), codes.float(), moves], 1).cpu())
            if name not in examples:
                moved = errors[2].argsort()[int(0.9 * len(first))]
                examples[name] = effects(model, first[moved], second[moved], decoded[moved], codes[moved])
        table = torch.cat(rows) if rows else torch.zeros(0, 3 + model.codes)
        if dist.world > 1:
            parts = [None] * dist.world
            torch.distributed.all_gather_object(parts, table)
            table = torch.cat([part for part in parts if part.numel()])
        found, moves = gauges(table, model.codes, model.quantiser.vocabulary, model.quantiser.started)
        metrics |= {f"val/{name}/{key}": value for key, value in found.items()}
        if name in examples:
            examples[name] = (*examples[name], *moves)
    model.train()
    if loaders:
        metrics["val/mse"] = sum(metrics[f"val/{name}/mse"] for name in loaders) / len(loaders)
    return metrics, examples


def effects(model, first, second, decoded, codes):
    """One pair (3, S, S) -> frame, next, decoded, and (N, K, S, S, 3): decoded with slot n's code replaced by k."""
    N, K = model.codes, model.quantiser.vocabulary
    words = codes.repeat(N, K, 1)
    for slot in range(N):
        words[slot, :, slot] = torch.arange(K)
    images = model.decode(first.expand(N * K, -1, -1, -1), words.flatten(0, 1)).unflatten(0, (N, K))
    return [image.float().movedim(-3, -1).cpu().numpy() for image in (first, second, decoded, images)]


def main(argv=None):
    # --- setup
    args = parse(argv)
    dist = common.setup(args)
    if args.demo and dist.main:
        demo.write(args.data[0].partition("=")[2])
    common.share(dist, None)  # the other ranks wait for the demo's data
    say = print if dist.main else lambda text: None
    sources = read_sources(args.data, args.gap, args.val_share, args.val_episodes, args.weights, say)
    common.open_run(args, dist)
    stop = common.Interrupt(args, dist)

    # --- model
    backbone = None
    if args.target == "features":
        from features import Backbone

        backbone = Backbone(args.backbone, args.image_size // args.patch).to(dist.device)
    moments = action_moments(sources, args.label_share) if args.label_share else None
    model = LAQ(
        image_size=args.image_size,
        patch=args.patch,
        dim=args.dim,
        stem=args.stem,
        spatial_depth=args.spatial_depth,
        temporal_depth=args.temporal_depth,
        decoder_depth=args.decoder_depth,
        codes=args.codes,
        vocabulary=args.vocabulary,
        code_dim=args.code_dim,
        quantiser=args.quantiser,
        levels=args.levels,
        commitment=args.commitment,
        motion_weight=args.motion_weight,
        action_dim=len(moments[0]) if moments else 0,
        action_weight=args.action_weight,
        feature_dim=backbone.dim if backbone else 0,
    )
    if moments:
        model.action_mean.copy_(moments[0])
        model.action_std.copy_(moments[1])
    model.to(dist.device)
    matrices = [p for name, p in model.named_parameters() if p.ndim >= 2 and "codebook" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "codebook" in name]
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
    batches, validation = prepare_dataloaders(
        sources,
        args.batch_size,
        args.image_size,
        seed=args.seed,
        steps=args.steps,
        first=first,
        accum=args.accum,
        rank=dist.rank,
        world=dist.world,
        workers=args.workers,
        val_pairs=args.val_pairs,
        codes=args.codes,
        reuse=args.reuse,
        min_motion=args.min_motion,
        crop=args.crop,
        jitter=args.jitter,
        label_share=args.label_share,
    )
    for source in sources:
        split = f"{len(source.train)} clips to train on, {len(source.validation)} held out"
        log.say(f"{source.name}: {split}, {source.short} shorter than the gap")
    if not validation:
        log.say("nothing to validate on: hold out episodes with --val-share or --val-episodes")

    # --- loop
    for step in range(first, args.steps):
        waited, lr = 0.0, common.cosine(step, args)
        for group in opt.param_groups:
            group["lr"] = lr
        common.seed(args.seed, step, 0)  # not the rank: each draws the noise of the whole batch and keeps its part
        for micro in range(args.accum):
            start = time.perf_counter()
            batch = {key: value.to(dist.device, non_blocking=True) for key, value in next(batches).items()}
            waited += time.perf_counter() - start
            batch = augment(batch)
            net.require_backward_grad_sync = micro == args.accum - 1  # DDP: one all-reduce per optimizer step
            with amp:
                if backbone is not None:
                    batch["features"] = backbone(batch["frames"])
                loss, metrics = net(batch)
            scaler.scale(loss / args.accum).backward()
            log.add(metrics, 1 / args.accum)
        scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
        model.quantiser.update(opt, args.seed + step, args.restart_every)
        log.add(dict(norm=norm))
        log.tick(waited)

        done, line, is_best = step + 1, {}, False
        ended, stopped = done == args.steps, stop()
        late = done >= args.start_by * args.steps
        if not model.quantiser.started and (late or done % args.start_every == 0):
            use = model.use_of_codes(batch["frames"]).item()
            if late or use > args.start_margin:
                model.quantiser.start(args.seed)
                best = None  # a continuous model's error is not what codes have to beat
                log.say(f"step {done}: the codes start, the decoder's use of its vectors is {use:.2f}")
            if late and use <= args.start_margin:
                log.say(f"warning: that is below --start-margin {args.start_margin:g}: more --steps or a larger --gap?")
        if done % args.log_every == 0 or ended:
            line.update(log.flush(lr=lr, restarts=model.quantiser.restarts))
        if validation and (done % args.eval_every == 0 or ended):
            metrics, examples = validate(model, validation, dist, amp)
            line.update(metrics)
            is_best = model.quantiser.started and (best is None or metrics["val/mse"] < best)
            best = metrics["val/mse"] if is_best else best
        if line:
            log.write(done, line)
        if done % args.save_every == 0 or is_best or ended or stopped:
            common.save(args, dist, done, model, opt, scaler, best, is_best)
        if "val/mse" in line and dist.main:
            log.figure(done, "curves", figures.curves(log.out / "log.jsonl"))
            log.figure(done, "codes", figures.codes({name: example[:4] for name, example in examples.items()}))
            acted = {name: example[4:] for name, example in examples.items() if len(example) > 4}
            if acted:
                log.figure(done, "moves", figures.moves(acted))
        if line or stopped:
            log.pause()
        if stopped and not ended:
            log.say(f"stopped after step {done}; go on with --resume --out {args.out}")
            common.cleanup(dist, log)
            return stop.code

    # --- end
    log.say(f"checkpoint: {log.out / 'checkpoints' / ('last' if best is None else 'best')}")
    log.say(f"figures:    {log.out / 'figures' / 'codes.png'}, curves.png")
    common.cleanup(dist, log)
    return 0


if __name__ == "__main__":
    common.run(main)
