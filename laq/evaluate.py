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
import matplotlib
import numpy as np
import probes
import torch
import torch.nn.functional as F
from data import between, identity, named_paths, pair_starts, read_sources, thumbnails
from matplotlib.figure import Figure
from model import LAQ
from shards import key_of
from tqdm import tqdm

import common

TRUE, DECODED, REFERENCES = "0.55", "tab:blue", ("mean", "first frame", "shuffled vectors", "pixel difference")
matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 120})


def parse(argv=None):
    parser = common.Parser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--checkpoint", required=True, help="folder with config.json, such as RUN/checkpoints/best", metavar="DIR")
    add("--data", nargs="+", metavar="NAME=PATH", help="where the data is; without it what the run was trained on")
    add("--out", metavar="DIR", help="folder of the report; without it RUN/report")
    add("--gap", nargs="+", metavar="GAP", help="frames (3) or seconds (0.6s), as in train.py; without it the run's")
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
    if not (args.out or flags):
        raise ValueError(f"{record} is not there to tell the run's folder: give --out DIR")
    args.out = args.out or str(record.parent / "report")
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


def as_input(frames, device):
    """Frames (B, S, S, 3) uint8 -> (B, 3, S, S) in [0, 1]."""
    return torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float() / 255


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
            gap = min(sum(source.gaps(clip)) // 2, clip.meta["length"] - 1)
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


# --- figures: blue is the model, grey the truth or a reference


def panels(cards, title):
    """A figure with one panel per source of cards {source: card} -> figure, pairs (axis, card)."""
    figure = Figure(figsize=(1 + 5 * len(cards), 3.6), layout="constrained")
    axes = figure.subplots(1, len(cards), squeeze=False)[0]
    for axis, name in zip(axes, cards, strict=True):
        axis.set_title(name)
    figure.suptitle(title)
    return figure, zip(axes, cards.values(), strict=True)


def bars(cards):
    """R2 of every probe."""
    figure, parts = panels(cards, "probe of the true action, held-out episodes\nlonger is better; grey: without codes")
    for axis, card in parts:
        rows = card["probe"][::-1]
        values = [max(0, row["r2"] or 0) for row in rows]
        colours = [TRUE if row["method"] in REFERENCES else DECODED for row in rows]
        drawn = axis.barh([row["method"] for row in rows], values, color=colours)
        axis.bar_label(drawn, [shown(row["r2"]) for row in rows], padding=3)
        axis.set(xlabel="R2 of the action, mean over dims", xlim=(0, 1.15))
    return figure


def usage(cards):
    """How often each code is used in each slot, the most used first."""
    figure, parts = panels(cards, "use of the codes, held-out pairs (flat is better)")
    for axis, card in parts:
        share = 100 * np.sort(card["codebook"]["histogram"], 1)[:, ::-1]
        slots, K = share.shape
        for slot, height in enumerate(share):
            label = f"slot {slot}: perplexity {card['codebook']['slots'][slot]['perplexity']:.1f}"
            style = dict(color=DECODED, alpha=1 - 0.7 * slot / slots, label=label)
            axis.bar(np.arange(K) + 0.8 * ((slot + 0.5) / slots - 0.5), height, 0.75 / slots, **style)
        axis.axhline(100 / K, color=TRUE, ls="--", lw=1, label="all codes alike")
        axis.set(xlabel="code, most used first", ylabel="share of the pairs (%)")
        axis.legend(frameon=False)
    return figure


def curves(cards):
    """R2 against the number of labelled episodes."""
    figure, parts = panels(cards, "ridge on few labels (higher is better)\nblue: latents; grey: thumbnails of frames")
    styles = [dict(color=DECODED), dict(color=DECODED, ls="--"), dict(color=TRUE), dict(color=TRUE, ls="--")]
    for axis, card in parts:
        rows = card["few_shot"]
        for method, style in zip(list(rows[0])[1:], styles, strict=True):
            values = [np.nan if row[method] is None else row[method] for row in rows]
            axis.plot([row["episodes"] for row in rows], values, marker="o", ms=3, label=method, **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks([row["episodes"] for row in rows], [row["episodes"] for row in rows])
        axis.set(xlabel="labelled training episodes", ylabel="R2 of the action (shown from -0.5)", ylim=(-0.5, 1))
        axis.legend(frameon=False)
    return figure


@torch.no_grad()
def sheet(model, pairs, histogram, device):
    """Four held-out pairs and their reconstruction; then one frame and where each code of each slot leads it."""
    first, second, codes = pairs.first, pairs.second, torch.from_numpy(pairs.codes[pairs.held]).to(device)
    moved = np.abs(np.diff(pairs.small[pairs.held], axis=1)).mean((1, 2)).argsort()
    picks = moved[(np.linspace(0.5, 0.95, 4) * (len(moved) - 1)).astype(int)]  # from the usual to the liveliest
    histogram = np.asarray(histogram)
    (slots, K), base = histogram.shape, picks[2]
    columns = min(K, 12)  # of a large vocabulary the commonest
    words = codes[base].repeat(slots * columns, 1)
    best = np.sort(np.argsort(-histogram, 1, kind="stable")[:, :columns], 1)
    for slot in range(slots):
        words[slot * columns : (slot + 1) * columns, slot] = torch.from_numpy(best[slot]).to(device)

    def decode(frames, words):
        return model.decode(as_input(frames, device), words).permute(0, 2, 3, 1).cpu().numpy()

    made, led = decode(first[picks], codes[picks]), decode(np.repeat(first[base][None], len(words), 0), words)
    width = max(columns + 1, 4)
    figure = Figure(figsize=(1.15 * width, 1.3 * (4 + slots) + 0.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[4, slots + 0.4])
    names = ("frame", "next, true", "next, decoded", "|decoded - true| x 3")
    for row, (i, image) in zip(upper.subplots(4, 4), zip(picks, made, strict=True), strict=True):
        error = (3 * np.abs(image - second[i] / 255)).clip(0, 1)
        for axis, picture, title in zip(row, (first[i], second[i], image, error), names, strict=True):
            axis.imshow(picture)
            axis.set_title(title if i == picks[0] else "", fontsize=7)
            axis.axis("off")
    for slot, row in enumerate(lower.subplots(slots, columns + 1, squeeze=False)):
        pictures = [first[base], *led[slot * columns : (slot + 1) * columns]]
        titles = ["frame"] + [f"{c}: {100 * histogram[slot, c]:.0f} %" for c in best[slot]]
        for axis, picture, title in zip(row, pictures, titles, strict=True):
            axis.imshow(picture)
            axis.set_title(title, fontsize=7)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(f"slot {slot}", fontsize=7)
    upper.suptitle("held-out pairs (decoded near true is better)", fontsize=9)
    lower.suptitle(
        "one frame, each code (and its share) in place of its own: each should move something else", fontsize=9
    )
    return figure


# --- the report


def shown(value):
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def table(head, rows):
    yield "| " + " | ".join(head) + " |"
    yield "| --- " + "| ---: " * (len(head) - 1) + "|"
    for name, *values in rows:
        yield "| " + " | ".join([str(name), *(v if isinstance(v, str) else shown(v) for v in values)]) + " |"


def right(row, what):
    return f"{row['accuracy'][what]:.3f} ({row['balanced_accuracy'][what]:.3f})"


def verdict(name, card):
    """One line on what is good and what to look at."""
    image, book, like = card["reconstruction"], card["codebook"], card["consistency"]
    used, common = np.mean([slot["usage"] for slot in book["slots"]]), book["joint"]["commonest"]
    gain, delta = image["gain"] or 0, image["delta_psnr_shuffled"] or 0
    remarks = [
        (gain > 0, f"{gain:.2f} dB over nothing moves"),
        (delta > 0.1, f"another pair's codes cost {delta:.2f} dB"),
        (used >= 0.9, f"{100 * used:.0f} % of the codes in use"),
        (common <= 0.5, f"the commonest word holds {100 * common:.0f} % of the pairs"),
    ]
    for what, where in dict(cycle="on their own frame", transfer="on other scenes").items():
        mean, chance = np.mean(like[what]), np.mean(like["chance"])
        text = f"{100 * mean:.0f} % of the codes come back {where} (chance {100 * chance:.0f})"
        remarks.append((mean > chance, text))
    if "probe" in card:
        r2 = {row["method"]: row["r2"] or 0 for row in card["probe"]}
        for what in ("first frame", "pixel difference"):
            better = r2["one-hot codes"] > max(0, r2[what])
            remarks.append((better, f"R2 of codes {r2['one-hot codes']:.2f}, of the {what} {r2[what]:.2f}"))
    if not card["started"]:
        remarks.append((False, "the codes have not started yet, so they mean nothing: train on"))
    if card["pairs"] < 100:
        remarks.append((False, f"only {card['pairs']} pairs: indicative"))
    good, bad = ("; ".join(text for ok, text in remarks if bool(ok) == want) or "nothing" for want in (True, False))
    return f"{name}: good: {good}. To look at: {bad}."


def section(card):
    """The tables of one source, line by line."""
    book, like, K = card["codebook"], card["consistency"], len(card["codebook"]["histogram"][0])
    yield f"""{card["pairs"]} held-out pairs of {card["episodes"]} episodes, gap {card["gap"]}.

### Reconstruction

Good: a gain above 0, a delta-PSNR well above 0, most pairs nearer to the future than to now.
"""
    yield from table(["", "value"], [(key.replace("_", " "), v) for key, v in card["reconstruction"].items()])
    yield f"""
### Codes

Good: perplexity near {K}, usage (share of the codes with p > 1 / 10 K) near 1, none that takes most; codes that come
back more often than by chance when the decoded frame is encoded again (cycle), on other scenes too (transfer).
"""
    rows = [
        (f"slot {i}", *slot.values(), like["cycle"][i], like["transfer"][i], like["chance"][i])
        for i, slot in enumerate(book["slots"])
    ]
    joint = book["joint"]
    words = f"{joint['words']} words of {joint['possible']}"
    rows += [("joint", joint["perplexity"], words, joint["commonest"], *"---")]
    yield from table(["", "perplexity", "usage", "commonest", "cycle", "transfer", "chance of both"], rows)
    if "probe" not in card:
        yield f"\nNo probes: {card['no_probe']}."
        return
    probe, eta, labelled = card["probe"], card["eta_squared"], card["labelled"]
    yield f"""
### Probe of the action

Ridge fitted on {labelled["fitted"]} labelled pairs, scored on {labelled["tested"]} of other episodes. Good: codes above
first frame (what the scene tells anyway) and shuffled vectors, and not far below pixel difference (of 8 x 8 thumbnails:
nothing learned). Weighted: dims count by how much they move. A dim of at most 10 values, and the direction of a 2-D
move, are classified too: accuracy (balanced accuracy).
"""
    kinds = list(probe[0]["accuracy"])
    rows = [(r["method"], r["r2"], r["r2_weighted"], r["nmse"], *(right(r, kind) for kind in kinds)) for r in probe]
    yield from table(["features", "R2", "R2 weighted", "NMSE", *kinds], rows)
    yield f"""
eta^2, the share of the actions' variance between words, is {shown(eta["mean"])}; good: well above the
{shown(eta["chance"])} of words dealt at random. R2 per dim, and over each test episode's own variance:
"""
    some = [row for row in probe if row["method"] not in ("mean", "shuffled vectors", "code vectors")]
    rows = [(f"dim {dim}", *(row["r2_per_dim"][dim] for row in some)) for dim in range(len(some[0]["r2_per_dim"]))]
    for episode in list(some[0]["r2_per_episode"])[:20]:
        rows += [(card["names"][episode], *(row["r2_per_episode"][episode] for row in some))]
    yield from table(["", *(row["method"] for row in some)], rows)
    yield """
### Few labels

R2 of a ridge with so many labelled training episodes. Good: codes and vectors above both frames and pixel difference
(inverse dynamics from thumbnails, learned from these labels alone), most of all in the first rows.
"""
    yield from table(list(card["few_shot"][0]), [row.values() for row in card["few_shot"]])


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
        unit, low, high = "s" if source.seconds else " frames", f"{source.low:g}", f"{source.high:g}"
        gap = f"{low if low == high else f'{low}-{high}, its middle'}{unit}"
        held = len(np.unique(pairs.episode[pairs.held]))
        card = dict(pairs=int(pairs.held.sum()), episodes=held, gap=gap, names=pairs.names)
        card |= dict(started=getattr(model.quantiser, "started", True))
        card |= images(model, pairs, args, dist.device)
        known, folds, remark = actions_of(pairs, args.leave_one_out)
        card |= measure_probes(model, known, folds, args.seed) if known else dict(no_probe=remark)
        cards[source.name] = card
        sheets[f"sheet_{key_of(source.name)}"] = sheet(model, pairs, card["codebook"]["histogram"], dist.device)
        print(verdict(source.name, card), flush=True)
        if remark:
            print(f"{source.name}: {remark}: {'left out of' if known else 'everything but'} the probes", flush=True)
    if not cards:
        raise ValueError("nothing to report on: hold out episodes with --val-share or --val-episodes")

    out = Path(args.out)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    probed = {name: card for name, card in cards.items() if "probe" in card}
    figures = dict(probe=bars(probed), few_shot=curves(probed)) if probed else {}
    figures |= dict(usage=usage(cards), **sheets)
    for name, figure in figures.items():
        with common.atomic(out / "figures" / f"{name}.png") as path:
            figure.savefig(path, format="png")
    with common.atomic(out / "report.json") as path:
        path.write_text(json.dumps(dict(flags=vars(args), device=str(dist.device), sources=cards), indent=1))
    lines = [f"# Report card of {args.checkpoint}", ""]
    lines += [
        f"Codes per pair of frames: {model.codes}, each one of {model.quantiser.vocabulary}. Actions: what the robot"
    ]
    lines += ["did in the gap, deltas summed, absolute actions subtracted."]
    if args.leave_one_out:
        lines += [
            "Probes hold out each episode in turn, but the model was trained on the frames of most (on no actions)."
        ]
    if args.data or args.val_share is not None or args.val_episodes is not None:
        lines += ["Data or split were given by hand: the model may have been trained on what is held out here."]
    lines += [""]
    lines += [f"- {verdict(name, card)}" for name, card in cards.items()]
    for name, card in cards.items():
        lines += ["", f"## {name}", "", *section(card)]
    lines += ["", *(f"![{name}](figures/{name}.png)" for name in figures)]
    with common.atomic(out / "report.md") as path:
        path.write_text("\n".join(lines) + "\n")
    print(f"report: {out / 'report.md'}")
    return 0


if __name__ == "__main__":
    common.run(main)
