"""Report card of an action tokenizer on held-out episodes: how good, at what rate, how safe, how fast, against others.

Run:
  python fsq_vqvae/evaluate.py --checkpoint runs/x/checkpoints/best --out runs/x/report
  python fsq_vqvae/evaluate.py --checkpoint runs/x/checkpoints/best --data g1=PATH --val-episodes 56-69 --out report

Without --data the run's own data and split are used. Writes OUT/report.md, OUT/report.json and OUT/figures.
"""

import json
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import figures
from data import named_paths, read_sources
from metrics import measure
from model import FSQVQVAE

import common


def parse(argv=None):
    parser = common.Parser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--checkpoint", required=True, help="folder with config.json, such as RUN/checkpoints/best", metavar="DIR")
    add("--data", nargs="+", metavar="NAME=PATH", help="where the data is; without it what the run was trained on")
    add("--out", metavar="DIR", help="folder of the report; without it RUN/report")
    add("--chunk", nargs="+", metavar="T", help="chunk length as in train.py; without it the checkpoint's")
    add("--val-share", type=float, metavar="X", help="share of the episodes held out; without it the run's")
    add("--val-episodes", nargs="+", metavar="IDS", help="hold out just these; without it the run's")
    add("--val-stride", default=5, help="steps between two validation chunks", **whole)
    add("--random-tuples", default=100_000, help="random index tuples per source that must decode", **whole)
    add("--batch-size", default=256, help="chunks at a time", **whole)
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    add("--seed", default=0, help="of random tuples, masks and swaps", **whole)
    args = parser.parse_args(argv)
    for name in ("val_stride", "random_tuples", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"{common.flag(name)} must be above 0")
    args.out = common.report_folder(parser, args)
    return args


def open_sources(args, model):
    """The checkpoint's sources, split as in its run (RUN/args.json) unless the flags say otherwise."""
    record = Path(args.checkpoint).resolve().parent.parent / "args.json"
    try:
        flags = json.loads(record.read_text())["flags"] if record.exists() else {}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{record}: not the flags of a run ({error})") from None
    data = args.data or flags.get("data")
    if not data:
        raise ValueError(f"{record} is not there to tell the data: give --data NAME=PATH")
    if data[0].startswith("module:"):
        raise ValueError(f"--data {data[0]}: episodes are needed here: give --data {model.names[0]}=PATH")
    names = [name for name, _ in named_paths(data)]
    for name in names:
        if name not in model.names:
            raise ValueError(f"--data {name}: the checkpoint knows {', '.join(model.names)}; write NAME=PATH")
    chunk = args.chunk or [f"{about['name']}={about['chunk']}" for about in model.sources if about["name"] in names]
    if args.val_share is None and args.val_episodes is None:
        share = flags.get("val_share", 0.1)
        held = [word for word in flags.get("val_episodes", []) if "=" not in word or word.partition("=")[0] in names]
    else:
        share, held = 0.1 if args.val_share is None else args.val_share, args.val_episodes or []
    sources = read_sources(data, chunk, share, held)
    for source in sources:
        about = model.sources[model.names.index(source.name)]
        for what, here, there in (
            ("action dims", source.actions.shape[1], about["action_dim"]),
            ("steps per chunk", source.chunk, about["chunk"]),
        ):
            if here != there:
                raise ValueError(f"--data {source.name}: {here} {what}, but the checkpoint has {there}")
    return sources


# --- the report


def words(value):
    if isinstance(value, list):
        return " ".join(map(words, value)) or "none"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def table_of(card):
    yield "| method | tokens (p95) | bits | MSE | NMSE | MAE | p99 | jerk | undecodable |"
    yield "| --- " + "| ---: " * 8 + "|"
    for row in card["table"]:
        tokens = f"{row['tokens']:.4g} ({row['tokens_p95']:.4g})"
        bits = "-" if row["bits"] is None else f"{row['bits']:.0f}"
        rest = [words(row[key]) for key in ("mse", "nmse", "mae", "p99", "jerk", "undecodable")]
        yield "| " + " | ".join([row["method"], tokens, bits, *rest]) + " |"


SECTIONS = dict(
    reconstruction="Normalised units unless raw. vrr: share of chunks whose largest error is below sigma (max-abs, not "
    "L2). mse low, mid, high: the thirds of the DCT over time; they sum to the MSE. jerk: third differences, decoded / "
    "true; 1 is best, above 1 jitters. boundary: step between consecutive decoded chunks.",
    rate="Per chunk. entropy bits: tokens x entropy of the codes' histogram.",
    codebook="usage: distinct codes / vocabulary; read it against what so few samples allow. Entropy in bits.",
    structure="overlap: share of tokens that stay when the chunk moves on one step. Swapping two slots should hurt.",
    robustness="All counts of failures should be 0. farthest: largest decoded value, normalised. bf16: encoder under "
    "autocast against float32, which encode() always uses.",
    speed="Milliseconds per call on this machine.",
)


def verdict(name, card):
    """One line on what is good and what to look at."""
    ours, by_name = card["table"][0], {row["method"]: row for row in card["table"][1:]}
    equal = min(
        (row for row in card["table"][1:] if row["bits"] and row["bits"] <= 1.001 * ours["bits"]),
        key=lambda r: r["mse"],
    )
    gain, hold = equal["mse"] / max(ours["mse"], 1e-12), by_name["hold first (given it)"]["mse"]
    book, safe = card["codebook"], card["robustness"]
    broken = [key for key in ("random_tuples_failed", "codes_changed_in_round_trip", "tokens_changed_by_pad_content")]
    broken = [f"{safe[key]} {key.replace('_', ' ')}" for key in broken if safe[key]]
    against = f"{gain:.3g} times less MSE than" if gain > 1 else f"{1 / gain:.3g} times the MSE of"
    remarks = [
        (gain > 1, f"{against} {equal['method']}, at no more bits"),
        (ours["mse"] < hold, f"MSE {'below' if ours['mse'] < hold else 'above'} holding the first action"),
        (not broken, ", ".join(broken) or "every random tuple decodes, round trip and padding are exact"),
    ]
    if ours["jerk"] is not None:
        remarks.append((ours["jerk"] <= 2, f"jerk {ours['jerk']:.2g} of the true one"))
    seam = card["reconstruction"]["boundary_ratio"]
    if seam is not None and seam > 2:
        remarks.append((False, f"the step between two chunks is {seam:.2g} times the true one"))
    if book["token_samples"] >= 5 * len(book["code_counts"]):
        remarks.append((book["usage"] >= 0.9, f"{100 * book['usage']:.0f} % of the codes in use"))
    if book["dead_levels"]:
        remarks.append((False, f"{book['dead_levels']} dead levels"))
    if safe["values_outside_training_range"] > 0.01:
        remarks.append(
            (False, f"{100 * safe['values_outside_training_range']:.2g} % of the values outside the training range")
        )
    if card["chunks"] < 100:
        remarks.append((False, f"only {card['chunks']} chunks: indicative"))
    good, bad = ("; ".join(text for ok, text in remarks if ok is want) or "nothing" for want in (True, False))
    return f"{name}: good: {good}. To look at: {bad}."


def report(args, model, cards):
    """report.md, as text."""
    lines = [f"# Report card of {args.checkpoint}", ""]
    kind = [word for word in ("ordered", "relative") if getattr(model, word)]
    lines += [
        f"{model.num_tokens} tokens of {model.fsq.size} codes, {', '.join(kind) or 'neither ordered nor relative'}."
    ]
    if model.relative:
        lines += ["Model and baselines alike are given a chunk's first action and code the rest."]
    lines += ["Errors are in the checkpoint's normalised units, on held-out episodes. Lower is better, jerk nearest 1."]
    lines += ["256 bins clip to [-1, 1], FAST to the smallest coefficient that its training chunks had."]
    if args.val_share is not None or args.val_episodes is not None:
        lines += ["The split was given by hand: the model may have been trained on episodes that are held out here."]
    for name, card in cards.items():
        about = model.sources[model.names.index(name)]
        size = f"{card['chunks']} chunks of {about['chunk']} steps x {about['action_dim']} dims"
        lines += ["", f"## {name}", "", f"{size} from {card['episodes']} episodes.", "", *table_of(card)]
    for section, note in SECTIONS.items():
        lines += ["", f"## {section.capitalize()}", "", note, ""]
        lines += ["| | " + " | ".join(cards) + " |", "| --- " + "| ---: " * len(cards) + "|"]
        for key in next(iter(cards.values()))[section]:
            values = [card[section][key] for card in cards.values()]
            if not (key.endswith("_counts") or key.endswith("per_dim")):  # long ones: report.json and the figures
                lines += [f"| {key.replace('_', ' ')} | " + " | ".join(map(words, values)) + " |"]
    lines += ["", "## In short", "", *(f"- {verdict(name, card)}" for name, card in cards.items()), ""]
    for figure in ("rate_distortion", "per_dim", "codebook", "reconstruction"):
        lines += [f"![{figure}](figures/{figure}.png)"]
    return "\n".join(lines) + "\n"


def main(argv=None):
    args = parse(argv)
    dist = common.setup(args)
    model = FSQVQVAE.from_pretrained(args.checkpoint).to(dist.device)
    cards, examples = {}, {}
    for source in open_sources(args, model):
        done = measure(model, source, args)
        if done is None:
            print(f"{source.name} is left out: no held-out (or no training) episode is as long as a chunk", flush=True)
            continue
        cards[source.name], shown = done
        examples |= shown
        print(
            f"{source.name}: {cards[source.name]['chunks']} chunks", *table_of(cards[source.name]), sep="\n", flush=True
        )
    if not cards:
        raise ValueError("nothing to report on: hold out episodes with --val-share or --val-episodes")

    out = Path(args.out)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in dict(
        rate_distortion=figures.rate_distortion({name: card["table"] for name, card in cards.items()}),
        per_dim=figures.per_dim({name: card["reconstruction"]["mae_per_dim"] for name, card in cards.items()}),
        codebook=figures.codebook({name: card["codebook"]["code_counts"] for name, card in cards.items()}),
        reconstruction=figures.reconstruction(examples),
    ).items():
        with common.atomic(out / "figures" / f"{name}.png") as path:
            figure.savefig(path, format="png")
    with common.atomic(out / "report.json") as path:
        path.write_text(json.dumps(dict(flags=vars(args), device=str(dist.device), sources=cards), indent=1))
    with common.atomic(out / "report.md") as path:
        path.write_text(report(args, model, cards))
    for name, card in cards.items():
        print(verdict(name, card))
    print(f"report: {out / 'report.md'}")
    return 0


if __name__ == "__main__":
    common.run(main)
