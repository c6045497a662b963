"""Report card of a latent action model on held-out episodes: does a code change the picture, and mean an action?

Run:
  python laq/evaluate.py --checkpoint runs/laq/000/checkpoints/best
  python laq/evaluate.py --checkpoint runs/laq/000/checkpoints/best --data g1=shards/g1 --gap 0.6s --leave-one-out

Without --data the run's own data, gap and split are used. Writes OUT/report.md, OUT/report.json and OUT/figures.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import card
import numpy as np
import probes
import torch
import torch.nn.functional as F
from card import as_input
from data import between, identity, named_paths, pair_starts, read_sources, thumbnails
from model import LAQ
from shards import key_of
from tqdm import tqdm

import common


def parse(argv=None):
    parser = common.Parser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--checkpoint", required=True, help="folder with config.json, such as RUN/checkpoints/best", metavar="DIR")
    add("--data", nargs="+", metavar="NAME=PATH", help="where the data is; without it what the run was trained on")
    add("--out", metavar="DIR", help="folder of the report; without it RUN/report")
    add("--gap", nargs="+", metavar="T", help="frames (3) or seconds (0.6s), as in train.py; without it the run's")
    add("--val-share", type=float, metavar="X", help="share of the episodes held out; without it the run's")
    add("--val-episodes", nargs="+", metavar="IDS", help="hold out just these; without it the run's")
    add("--leave-one-out", action="store_true", help="probe with each episode held out in turn; for few episodes")
    add("--pairs", default=1024, help="held-out pairs per source, spread evenly", **whole)
    add("--train-pairs", default=4096, help="training pairs per source that the probes are fitted on", **whole)
    add("--batch-size", default=64, help="pairs at a time", **whole)
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    add("--seed", default=0, help="of random codes, shuffles, scenes and draws of episodes", **whole)
    args = parser.parse_args(argv)
    for name in ("pairs", "train_pairs", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"{common.flag(name)} must be above 0")
    args.out = common.report_folder(parser, args)
    return args


def open_sources(args):
    """The checkpoint's sources, with its run's gap and split (RUN/args.json) unless the flags say otherwise."""
    record = Path(args.checkpoint).resolve().parent.parent / "args.json"
    try:
        flags = json.loads(record.read_text())["flags"] if record.exists() else {}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{record}: not the flags of a run ({error})") from None
    data = args.data or flags.get("data")
    if not data:
        raise ValueError(f"{record} is not there to tell the data: give --data NAME=PATH")
    names = [name for name, _ in named_paths(data)]

    def of_the_run(name, default):
        words = flags.get(name) or default
        words = [words] if isinstance(words, str) else words
        return [word for word in words if "=" not in word or word.partition("=")[0] in names]

    share, held = args.val_share, args.val_episodes or []
    if share is None and args.val_episodes is None:
        share, held = flags.get("val_share"), of_the_run("val_episodes", [])
    return read_sources(data, args.gap or of_the_run("gap", ["0.6s"]), 0.1 if share is None else share, held)


# --- pairs through the model


def batches(rows, size):
    """An array of rows in parts of at most `size`."""
    return np.array_split(rows, -(-len(rows) // size))


def gather(model, source, args, device):
    """The pairs of both sides of a source as arrays with a row per pair; None if one side has none.

    held, episode: side and number of the episode; small: 8 x 8 thumbnails of both frames; actions: nan where unknown;
    first, second: frames of the held-out pairs; scenes, scene_episode: a frame of each held-out and of 64 other clips.
    """
    parts, moves, numbers = [], [], {}
    for held, clips, limit in ((False, source.train, args.train_pairs), (True, source.validation, args.pairs)):
        clips = clips[:: max(1, len(clips) // limit)]
        title = f"{source.name}, {'held out' if held else 'training'}"
        for number, clip in enumerate(tqdm(clips, title, disable=not sys.stderr.isatty())):
            gap = min(source.middle(clip), clip.meta["length"] - 1)
            try:
                frames = clip.frames(model.image_size)
                good = np.flatnonzero(pair_starts(frames, gap))
                count = min(max(1, limit // len(clips)), len(good))
                starts = good[np.linspace(0, len(good) - 1, count).astype(int)]
                actions = between(clip, starts, gap)
            except (OSError, ValueError) as error:
                print(f"passing over a clip: {error}", file=sys.stderr, flush=True)
                continue
            if count == 0:
                continue
            encoded = [
                model.encode(as_input(frames[some], device), as_input(frames[some + gap], device))
                for some in batches(starts, args.batch_size)
            ]
            codes, vectors = (torch.cat(part).cpu().numpy() for part in zip(*encoded, strict=True))
            small = F.avg_pool2d(thumbnails(frames), 2).flatten(1).double().numpy()
            scene = starts[: int(held or number < 64)]
            episode = np.full(count, numbers.setdefault(identity(clip), len(numbers)))
            moves.append(actions)
            parts.append(
                dict(
                    held=np.full(count, held),
                    episode=episode,
                    codes=codes,
                    vectors=vectors.reshape(count, -1).astype(float),
                    small=np.stack([small[starts], small[starts + gap]], 1),
                    first=frames[starts] if held else frames[:0],
                    second=frames[starts + gap] if held else frames[:0],
                    scenes=frames[scene],
                    scene_episode=episode[: len(scene)],
                )
            )
    if len({part["held"][0] for part in parts}) < 2:
        return None
    pairs = SimpleNamespace(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    widths = [part.shape[1] for part in moves if part is not None]
    width = max(widths, key=widths.count, default=0)  # clips with another width count as unlabelled
    fits = [part is not None and part.shape[1] == width for part in moves]
    unknown = [np.full((len(part["held"]), width), np.nan) for part in parts]
    known = [m if fit else u for m, fit, u in zip(moves, fits, unknown, strict=True)]
    pairs.actions = np.concatenate(known).astype(float)
    pairs.names = ["/".join(key) for key in numbers]
    return pairs


@torch.no_grad()
def images(model, pairs, args, device):
    """Reconstruction, effect of the codes, cycle and transfer on the held-out pairs; sections of the card."""
    rng, K = np.random.default_rng(args.seed), model.quantiser.vocabulary
    codes, episode = pairs.codes[pairs.held], pairs.episode[pairs.held]
    order = rng.permutation(len(codes))
    shuffled = np.empty_like(codes)
    shuffled[order] = codes[np.roll(order, 1)]  # every pair gets another one's word
    sent = dict(own=codes, random=(codes + rng.integers(1, max(K, 2), codes.shape)) % K, shuffled=shuffled)
    pool = np.arange(len(pairs.scenes))
    if len(set(episode)) > 1:
        pool = pool[np.isin(pairs.scene_episode, episode)]  # only scenes that the model was not trained on
    elsewhere = np.array([rng.choice(pool[pairs.scene_episode[pool] != e]) for e in episode])
    found = {}

    def add(name, values):
        found.setdefault(name, []).append(values.float().cpu().numpy())

    for part in batches(np.arange(len(codes)), args.batch_size):
        frames = pairs.first[part], pairs.second[part], pairs.scenes[elsewhere[part]]
        first, second, scene = (as_input(x, device) for x in frames)
        words = {how: torch.from_numpy(word[part]).to(device) for how, word in sent.items()}
        made = {how: model.decode(first, word) for how, word in words.items()} | dict(still=first)
        for how, image in made.items():
            add(f"mse {how}", (image - second).square().mean((1, 2, 3)))
        add("mse to first", (made["own"] - first).square().mean((1, 2, 3)))
        add("ssim", probes.ssim(made["own"], second))
        add("ssim still", probes.ssim(first, second))
        add("cycle", model.encode(first, made["own"])[0] == words["own"])
        add("transfer", model.encode(scene, model.decode(scene, words["own"]))[0] == words["own"])
    found = {name: np.concatenate(parts) for name, parts in found.items()}
    decibel = {how: probes.psnr(found[f"mse {how}"].mean()) for how in ("own", "still", "random", "shuffled")}
    reconstruction = dict(
        psnr=decibel["own"],
        psnr_nothing_moves=decibel["still"],
        gain=probes.minus(decibel["own"], decibel["still"]),
        ssim=float(found["ssim"].mean()),
        ssim_nothing_moves=float(found["ssim still"].mean()),
        nearer_to_the_future=float((found["mse own"] < found["mse to first"]).mean()),
        delta_psnr_random=probes.minus(decibel["own"], decibel["random"]),
        delta_psnr_shuffled=probes.minus(decibel["own"], decibel["shuffled"]),
    )
    histogram, joint = probes.histograms(codes, K), np.bincount(probes.words_of(codes))
    N = codes.shape[1]
    codebook = dict(
        slots=[probes.health(p, K) for p in histogram],
        histogram=histogram.tolist(),
        joint=probes.health(joint, K**N) | dict(words=len(joint), possible=min(K**N, len(codes))),
    )
    consistency = dict(
        cycle=found["cycle"].mean(0).tolist(),
        transfer=found["transfer"].mean(0).tolist(),
        chance=np.square(histogram).sum(1).tolist(),
    )
    return dict(reconstruction=reconstruction, codebook=codebook, consistency=consistency)


# --- probes


def actions_of(pairs, leave_one_out):
    """(pairs whose action is known, folds of them, remark); no pairs if there are too few, the remark says why.

    folds: [(training rows, test rows)], one if not leave_one_out.
    """
    if not pairs.actions.shape[1]:
        return None, None, "no actions"
    known = np.isfinite(pairs.actions).all(1)
    pairs = SimpleNamespace(**{k: getattr(pairs, k)[known] for k in "held episode codes vectors small actions".split()})
    sides = [pairs.episode == e for e in np.unique(pairs.episode)] if leave_one_out else [pairs.held]
    folds = [(np.flatnonzero(~side), np.flatnonzero(side)) for side in sides]
    if not folds or min(len(rows) for fold in folds for rows in fold) < 2:
        return None, None, f"no finite actions on one side ({(~known).sum()} of {len(known)} pairs have none)"
    return pairs, folds, None if known.all() else f"{(~known).sum()} of {len(known)} pairs have no finite action"


def measure_probes(model, pairs, folds, seed):
    """Probe table, few-shot curve and eta^2: sections of the card."""
    rng, K, y, small = np.random.default_rng(seed), model.quantiser.vocabulary, pairs.actions, pairs.small
    lookup = model.quantiser.lookup(torch.from_numpy(pairs.codes).to(next(model.parameters()).device))
    features = {
        "one-hot codes": probes.one_hot(pairs.codes, K),
        "code vectors": lookup.detach().flatten(1).cpu().double().numpy(),
        "vectors before quantisation": pairs.vectors,
        "mean": np.zeros((len(y), 1)),  # without features a ridge predicts the mean, or the commonest class
        "first frame": small[:, 0],
        "shuffled vectors": rng.permutation(pairs.vectors),
        "pixel difference": small[:, 1] - small[:, 0],
    }
    methods = {
        "codes": features["one-hot codes"],
        "vectors": features["vectors before quantisation"],
        "both frames": np.concatenate([small[:, 0], features["pixel difference"]], 1),
        "pixel difference": features["pixel difference"],
    }
    test = np.concatenate([out for _, out in folds])
    eta, chance = probes.eta_squared(y[test], probes.words_of(pairs.codes[test]))
    return dict(
        probe=list(probes.table(features, y, pairs.episode, folds)),
        few_shot=list(probes.few_shot(methods, y, pairs.episode, folds, seed)),
        eta_squared=dict(mean=probes.average(eta), per_dim=probes.plain(eta), chance=chance),
        labelled=dict(fitted=min(len(fit) for fit, _ in folds), tested=len(test)),
    )


def main(argv=None):
    args = parse(argv)
    dist = common.setup(args)
    model = LAQ.from_pretrained(args.checkpoint).to(dist.device)
    cards, sheets = {}, {}
    for source in open_sources(args):
        pairs = gather(model, source, args, dist.device)
        if pairs is None:
            why = "one side of the split is empty: it needs two episodes with pairs; see --val-share and --val-episodes"
            print(f"{source.name} is left out: {why}", flush=True)
            continue
        unit = "s" if source.seconds else " frame" if source.high == 1 else " frames"
        gap = f"{source.low:g}{unit}" + (f" to {source.high:g}{unit}, its middle" if source.high > source.low else "")
        held = len(np.unique(pairs.episode[pairs.held]))
        row = dict(pairs=int(pairs.held.sum()), episodes=held, gap=gap, names=pairs.names)
        row |= dict(started=getattr(model.quantiser, "started", True))
        row |= images(model, pairs, args, dist.device)
        known, folds, remark = actions_of(pairs, args.leave_one_out)
        row |= measure_probes(model, known, folds, args.seed) if known else dict(no_probe=remark)
        cards[source.name] = row
        sheets[f"sheet_{key_of(source.name)}"] = card.sheet(model, pairs, row["codebook"]["histogram"], dist.device)
        print(card.verdict(source.name, row), flush=True)
        if remark:
            print(f"{source.name}: {remark}: {'left out of' if known else 'everything but'} the probes", flush=True)
    if not cards:
        raise ValueError("nothing to report on: hold out episodes with --val-share or --val-episodes")

    out = Path(args.out)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    probed = {name: row for name, row in cards.items() if "probe" in row}
    figures = dict(probe=card.bars(probed), few_shot=card.curves(probed)) if probed else {}
    figures |= dict(usage=card.usage(cards), **sheets)
    for name, figure in figures.items():
        with common.atomic(out / "figures" / f"{name}.png") as path:
            figure.savefig(path, format="png")
    with common.atomic(out / "report.json") as path:
        path.write_text(json.dumps(dict(flags=vars(args), device=str(dist.device), sources=cards), indent=1))
    remarks = []
    if args.leave_one_out:
        remarks += [
            "Probes hold out each episode in turn; the model was trained on the frames of most (on no actions)."
        ]
    if args.data or args.val_share is not None or args.val_episodes is not None:
        remarks += ["Data or split were given by hand: the model may have been trained on what is held out here."]
    lines = card.report(args.checkpoint, model, cards, remarks, figures)
    with common.atomic(out / "report.md") as path:
        path.write_text("\n".join(lines) + "\n")
    print(f"report: {out / 'report.md'}")
    return 0


if __name__ == "__main__":
    common.run(main)
