"""Report on an action tokenizer: how good, at what rate, how safe, beside others, on unseen episodes.

Run:
  python fsq_vqvae/evaluate.py --checkpoint runs/x/checkpoints/best --out runs/x/report
  python fsq_vqvae/evaluate.py --checkpoint runs/x/checkpoints/best --data g1=PATH --out report

Without --data, the run's own held-out episodes. With --data, all episodes that the run was not trained on, known by
their content. The others are fitted on the run's own training episodes. Writes OUT/report.md, report.json and figures.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import figures
from data import read_source
from metrics import measure
from model import CONTEXT, FSQVQVAE
from split import fingerprints, named_paths, restore_split
from train import setup

import common


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--checkpoint", required=True, help="folder with config.json, such as RUN/checkpoints/best", metavar="DIR")
    add("--data", nargs="+", metavar="NAME=PATH", help="data to evaluate on; without it the run's held-out episodes")
    add("--action-key", metavar="KEY", help="LeRobot feature that holds the actions; without it the run's")
    add("--out", metavar="DIR", help="folder of the report; without it RUN/report")
    add("--val-stride", default=5, help="steps between two chunks", **whole)
    add("--random-tuples", default=100_000, help="random index tuples per source that must decode", **whole)
    add("--register-steps", default=0, help="also train a plain transformer tokenizer for N steps, to compare", **whole)
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    args = parser.parse_args(argv)
    for name in ("val_stride", "random_tuples"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if args.register_steps < 0:
        parser.error("--register-steps must not be negative")
    folder = Path(args.checkpoint).resolve()
    if args.out is None and folder.parent.name != "checkpoints":
        parser.error("--out is needed: the checkpoint does not lie in RUN/checkpoints")
    args.out = args.out or folder.parent.parent / "report"
    return args


def open_sources(args, model):
    """[(name in the model, Source whose validation episodes are evaluated, training sample or None)]."""
    folder = Path(args.checkpoint).resolve()
    record, split = folder.parent.parent / "args.json", folder / "data.json"
    flags = common.read_json(record)["flags"] if record.exists() else {}
    split = common.read_json(split) if split.exists() else {}
    key, context, own = args.action_key or flags.get("action_key"), CONTEXT[model.config.condition], {}
    for name, path in named_paths(flags.get("data") or []):
        if name in model.names:
            try:
                own[name] = read_source(name, path, str(model.coder_of(name).steps), key)
                restore_split([own[name]], split)
            except common.DataError as error:
                print(f"the run's own data are out of reach, so nothing to compare with: {error}", flush=True)
    if not args.data and not own:
        raise common.DataError(f"{record} does not lead to the data: give --data NAME=PATH")
    sources = []
    for name, path in named_paths(args.data) if args.data else [(name, None) for name in own]:
        known = model.names[0] if len(model.names) == 1 else name
        if known not in model.names:
            raise common.DataError(f"--data {name}: the checkpoint knows {', '.join(model.names)}; write NAME=PATH")
        coder = model.coder_of(known)
        source = own[known] if path is None else read_source(name, path, str(coder.steps), key)
        if source.actions.shape[1] != coder.dims:
            raise common.DataError(
                f"--data {name}: {source.actions.shape[1]} action dims, the checkpoint has {coder.dims}"
            )
        then = coder.source["fps"] or source.fps
        if source.fps and abs(source.fps / then - 1) > 0.1:
            raise common.DataError(f"--data {name}: {source.fps:.3g} Hz, but {known} was trained at {then:.3g} Hz")
        if model.config.condition == "state" and source.state is None:
            raise common.DataError(f"--data {name}: the tokenizer needs the state; {source.remark}")
        if path is not None:
            trained_on = set(split.get(known, {}).get("trained_on", []))
            source.validation = np.array([mark not in trained_on for mark in fingerprints(source)])
            if not source.validation.all():
                print(f"{name}: {(~source.validation).sum()} episodes are left out: the run was trained on them")
        if not len(source.starts(validation=True, whole=True)[0]):
            print(f"{name} is left out: no episode that it was not trained on is as long as a chunk", flush=True)
            continue
        sources.append((known, source, own[known].sample(context) if known in own else None))
    if not sources:
        raise common.DataError("nothing to report on: hold out episodes when training, or give other --data")
    return sources


# --- the report


def words(value):
    if isinstance(value, list):
        return " ".join(map(words, value)) or "none"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def table_of(results):
    yield "| method | tokens | bits | MSE | NMSE | MAE | p99 | worst 1 % | undecodable |"
    yield "| --- " + "| ---: " * 8 + "|"
    for row in results["table"]:
        rest = [words(row[key]) for key in ("mse", "nmse", "mae", "p99", "worst_1_percent", "undecodable")]
        yield "| " + " | ".join([row["method"], f"{row['tokens']:.4g}", f"{row['bits']:.0f}", *rest]) + " |"


SECTIONS = dict(
    reconstruction="Normalised units. seam: the step between two chunks.",
    rate="Per chunk. entropy: of each token's histogram.",
    structure="overlap: share of the tokens that stay when the chunk moves on by a step.",
    robustness="All counts of failures should be 0. farthest: largest decoded value, normalised.",
)


def report(args, model, everything):
    """report.md, as text."""
    known = model.wanted() or "nothing"
    intro = f"""# Report on {args.checkpoint}

{model.num_tokens} tokens of at most {model.config.codebook_size} codes. Encoder and decoder know: {known}.
Errors are in the checkpoint's normalised units; lower is better. The other methods code the same chunks relative to the
same first row. 256 bins clip to [-1, 1], FAST to its training range."""
    lines = [intro]
    for name, results in everything.items():
        size = f"{results['chunks']} chunks from {results['episodes']} episodes."
        lines += ["", f"## {name}", "", size, "", *table_of(results), "", "In robot units, per dim:", ""]
        lines += [f"- {key.replace('_', ' ')}: {words(value)}" for key, value in results["robot_units"].items()]
    for section, note in SECTIONS.items():
        lines += ["", f"## {section.capitalize()}", "", note, ""]
        lines += ["| | " + " | ".join(everything) + " |", "| --- " + "| ---: " * len(everything) + "|"]
        for key in next(iter(everything.values()))[section]:
            values = [words(results[section][key]) for results in everything.values()]
            lines += [f"| {key.replace('_', ' ')} | " + " | ".join(values) + " |"]
    lines += ["", *(f"![{name}](figures/{name}.png)" for name in ("rate_distortion", "reconstruction"))]
    return "\n".join(lines) + "\n"


def main(argv=None):
    args = parse(argv)
    model = FSQVQVAE.from_pretrained(args.checkpoint).to(setup(args)[2])
    sources, out, everything, examples = open_sources(args, model), Path(args.out), {}, {}
    common.make_folder(out / "figures")
    for known, source, sample in sources:
        results, shown = measure(model, known, source, sample, args)
        everything[source.name] = results
        examples |= shown
        print(f"{source.name}: {results['chunks']} chunks", *table_of(results), sep="\n", flush=True)

    for name, figure in dict(
        rate_distortion=figures.rate_distortion({name: results["table"] for name, results in everything.items()}),
        reconstruction=figures.reconstruction(examples),
    ).items():
        with common.atomic(out / "figures" / f"{name}.png") as path:
            figure.savefig(path, format="png")
    with common.atomic(out / "report.json") as path:
        flags = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        path.write_text(json.dumps(dict(flags=flags, sources=everything), indent=1))
    with common.atomic(out / "report.md") as path:
        path.write_text(report(args, model, everything))
    print(f"report: {out / 'report.md'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
