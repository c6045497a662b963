"""Report on a latent action model: does a code change the picture, and mean a motion, on episodes it did not see?

Run:
  python laq/evaluate.py --checkpoint runs/laq/000/checkpoints/best
  python laq/evaluate.py --checkpoint runs/laq/000/checkpoints/best --data new=shards/new --out runs/new_report

Of the run's own data the held-out episodes are evaluated; of any other data all. Probes hold out each evaluated episode
in turn and are fitted on all others. Writes OUT/report.md, OUT/report.json and OUT/figures.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import figures
import metrics
from data import between, read_pairs, some
from model import LAQ, block_flow
from shards import key_of, owner, read_clips
from sources import Source, named, named_paths, parse_gap
from train import setup

import common


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--checkpoint", required=True, help="folder with config.json, such as RUN/checkpoints/best", metavar="DIR")
    add("--data", nargs="+", metavar="NAME=PATH", help="shards to evaluate; without it what the run was trained on")
    add("--out", metavar="DIR", help="folder of the report; without it RUN/report")
    add("--gap", nargs="+", default=[], metavar="T", help="frames (3) or seconds (0.6s); without it the run's")
    add("--pairs", default=1024, help="evaluated pairs per source, spread evenly", **whole)
    add("--fit-pairs", default=4096, help="pairs of other episodes per source that the probes are fitted on", **whole)
    add("--batch-size", default=64, help="pairs at a time", **whole)
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    args = parser.parse_args(argv)
    for name, least in dict(pairs=1, fit_pairs=1, batch_size=2).items():  # codes are shuffled within a batch
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if args.out is None:
        folder = Path(args.checkpoint).absolute().parent
        if folder.name != "checkpoints":
            parser.error(f"--checkpoint {args.checkpoint} is in no run's folder: give --out")
        args.out = str(folder.parent / "report")
    return args


def open_sources(args):
    """[(source, its spec if it is the run's own)], with the checkpoint's gap and held-out episodes."""
    folder = Path(args.checkpoint)
    specs = common.read_json(folder / "data.json") if (folder / "data.json").exists() else {}
    data = args.data or [f"{name}={spec['path']}" for name, spec in specs.items()]
    if not data:
        raise common.DataError(f"{folder}/data.json is not there to tell the data: give --data NAME=PATH")
    pairs, sources = named_paths(data), []
    gaps, known = named(args.gap, [name for name, _ in pairs], "--gap"), {spec["gap"] for spec in specs.values()}
    usual = known.pop() if len(known) == 1 else "0.6s"
    for name, path in pairs:
        clips = read_clips(path)
        own = owner(name, clips, specs)
        gap = gaps.get(name) or (own or specs.get(name, {})).get("gap", usual)
        source = Source(name, path, clips, *parse_gap(gap))
        source.evaluated = set(own["held_out"]) if own else {clip.episode for clip in clips}
        sources.append((source, own))
    return sources


# --- pairs through the model


def to_input(frames, device):
    """Frames (B S S 3) uint8 -> (B 3 S S) in [0, 1]."""
    return torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def encode(model, frames, size, device):
    """Pairs (n 2 S S 3) uint8 -> codes (n N), vectors (n N D), optical flow (n 2 8 8), in batches of `size`."""
    found = []
    for i in range(0, len(frames), size):
        first, second = (to_input(frames[i : i + size, t], device) for t in (0, 1))
        found.append((*model.encode(first, second), block_flow(first, second, 8)))
    return (torch.cat(part).cpu().numpy() for part in zip(*found, strict=True))


def collect(model, source, args, device):
    """The pairs of a source as arrays with a row per pair, or None if no pair of an evaluated episode can be read.

    evaluated (n,) bool; episode (n,) number; camera (n,) name; codes, vectors; thumbs (n 2 192) of 8 x 8 pictures; flow
    (n 128) of 8 x 8 blocks; frames of the evaluated pairs; motion (n A), nan if unknown.
    """
    parts, motions, states, numbers = [], [], [], {}
    long = [clip for clip in source.clips if len(clip) > source.gap(clip)]
    sides = [[clip for clip in long if (clip.episode in source.evaluated) == side] for side in (True, False)]
    for side, clips, limit in zip((True, False), sides, (args.pairs, args.fit_pairs), strict=True):
        clips = some(clips, limit)
        title = f"{source.name}, {'evaluated' if side else 'other'} clips"
        for clip in tqdm(clips, title, disable=not sys.stderr.isatty()):
            gap = source.gap(clip)
            try:
                starts, frames, thumbs = read_pairs(clip, gap, max(1, limit // len(clips)), model.config.image_size)
                state, action = clip.array("state.npy"), between(clip, starts, gap)
            except (OSError, common.DataError) as error:
                print(f"skipping a clip: {error}", file=sys.stderr, flush=True)
                continue
            n = len(starts)
            if n == 0:
                continue
            codes, vectors, flow = encode(model, frames, args.batch_size, device)
            episode = numbers.setdefault(clip.episode, len(numbers))
            part = dict(evaluated=np.full(n, side), episode=np.full(n, episode), codes=codes)
            part |= dict(camera=np.full(n, clip.meta["camera"], object), frames=frames if side else frames[:0])
            part |= dict(vectors=vectors.reshape(n, -1).astype(float), flow=flow.reshape(n, -1).astype(float))
            part["thumbs"] = np.float64(thumbs).reshape(n, 2, 8, 2, 8, 2, 3).mean((3, 5)).reshape(n, 2, -1) / 255
            parts.append(part)
            moved = None if state is None else np.float64(state[starts + gap]) - state[starts]
            motions.append(dict(state=moved, actions=action, n=n))
            states.append(state)
    if not any(part["evaluated"][0] for part in parts):
        return None
    pairs = SimpleNamespace(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    pairs.kind, pairs.motion = motion_of(motions, states)
    return pairs


def motion_of(motions, states):
    """(what the probes predict, (n A) float64, nan where unknown): differences of the state, or else of the actions.

    Differences of angles that wrap are taken the short way round. Clips of another width count as unknown.
    """
    for kind in ("state", "actions"):
        widths = [m[kind].shape[1] for m in motions if m[kind] is not None]
        if not widths:
            continue
        A = max(widths, key=widths.count)
        fits = [m[kind] is not None and m[kind].shape[1] == A for m in motions]
        rows = [m[kind] if fit else np.full((m["n"], A), np.nan) for m, fit in zip(motions, fits, strict=True)]
        motion = np.concatenate(rows).astype(float)
        if kind == "state":
            motion = metrics.wrap(motion, metrics.turns([s for s in states if s is not None and s.shape[1] == A]))
        return kind, motion
    return None, np.zeros((sum(m["n"] for m in motions), 0))


@torch.no_grad()
def images(model, pairs, args, device):
    """Reconstruction and codebook on the evaluated pairs: sections of the report; and the share of each code (N K)."""
    codes, errors, K = pairs.codes[pairs.evaluated], [], model.config.codebook_size
    order = np.random.default_rng(0).permutation(len(codes))  # so that the next pair is any other one
    for i in range(0, len(codes), args.batch_size):
        first, second = (to_input(pairs.frames[order[i : i + args.batch_size], t], device) for t in (0, 1))
        errors.append(metrics.assess(model, first, second)[0].cpu())
    found, book = metrics.reconstruction_metrics(torch.cat(errors).double()), metrics.codebook_metrics(codes, K)
    return dict(reconstruction=found, codebook=book), metrics.histogram(codes, K)


def probe(model, pairs):
    """Sections of the report on what the latents tell of the robot's motion; empty without motion."""
    known = np.isfinite(pairs.motion).all(1)
    if pairs.motion.shape[1] == 0 or not known.any():
        return {}
    episode, camera, y, small = (x[known] for x in (pairs.episode, pairs.camera, pairs.motion, pairs.thumbs))
    one_hot = metrics.one_hot(pairs.codes[known], model.config.codebook_size)
    features = {
        "codes": one_hot,
        "vectors before quantization": pairs.vectors[known],
        "first frame": small[:, 0],
        "pixel difference": small[:, 1] - small[:, 0],
        "optical flow": pairs.flow[known],
        "shuffled codes": np.random.default_rng(0).permutation(one_hot),
    }
    tested = np.unique(episode[pairs.evaluated[known]])
    table, cameras, (fitted, scored) = metrics.probe_tables(features, y, episode, camera.astype(str), tested)
    if not table:
        return {}
    probed = dict(motion=pairs.kind, fitted=fitted, tested=scored, episodes=len(np.unique(episode)))
    return dict(probe=table, probed=probed) | (dict(cameras=cameras) if len(cameras) > 1 else {})


# --- the report


def summary(name, report, K):
    """One line: is it good enough, and do the codes tell more than the baselines?"""
    text = metrics.advice(report["reconstruction"] | report["codebook"], K)
    if "probe" in report:
        r2 = {method: scores["r2_weighted"] for method, scores in report["probe"].items()}
        if None not in r2.values():
            more = "more" if r2["codes"] > max(0, r2["first frame"], r2["pixel difference"]) else "LESS"
            text += f"; of the motion the codes tell {more} than pixels do: R2 {r2['codes']:.2f}"
            text += f", first frame {r2['first frame']:.2f}, pixel difference {r2['pixel difference']:.2f}"
    return f"{name}: {text}"


def shown(value):
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def table(head, rows):
    yield "| " + " | ".join(head) + " |"
    yield "| --- " + "| ---: " * (len(head) - 1) + "|"
    for row in rows:
        yield "| " + " | ".join(map(shown, row)) + " |"


def section(report):
    """The tables of one source, line by line."""
    yield f"{report['pairs']} pairs of {report['episodes']} episodes ({report['which']}), gap {report['gap']}."
    for title in ("reconstruction", "codebook"):
        yield from ("", *table([title, "value"], [(key.replace("_", " "), v) for key, v in report[title].items()]))
    if "probe" not in report:
        yield "\nNo probes: no actions or state are known, or of too few pairs."
        return
    probed, alone = report["probed"], "; there is one episode, so its parts are held out in turn"
    yield f"""
Ridge probes of the difference of the {probed["motion"]} over the gap: {probed["tested"]} pairs scored, each episode by
a probe fitted on the others ({probed["fitted"]} pairs at least){alone if probed["episodes"] == 1 else ""}; each
camera has probes of its own. In brackets 95 % intervals over episodes. Weighted: each dim counts by how much it moves.
Good: codes above the first frame (what the scene tells anyway), above pixel differences (of 8 x 8 thumbnails) and above
optical flow (of 8 x 8 blocks), in which nothing is learned.
"""
    yield from probe_rows(report["probe"])
    for camera, scores in report.get("cameras", {}).items():
        yield from ("", f"Camera {camera}:", "", *probe_rows(scores))


def probe_rows(scores):
    """The table of one set of probes, line by line."""
    rows = []
    for method, s in scores.items():
        ends = [s.get(f"{name}_interval") for name in ("r2", "r2_weighted")]
        brackets = [f" [{end[0]:.2f}, {end[1]:.2f}]" if end else "" for end in ends]
        values = ["-" if s[n] is None else f"{s[n]:.2f}" for n in ("r2", "r2_weighted")]
        each = ["-" if v is None else f"{v:.2f}" for v in s["r2_per_dim"]]
        rows.append((method, values[0] + brackets[0], values[1] + brackets[1], " ".join(each)))
    return table(["features", "R2", "R2 weighted", "R2 of each dim"], rows)


def main(argv=None):
    args = parse(argv)
    device = setup(args)[2]
    model = LAQ.from_pretrained(args.checkpoint).to(device)
    if not model.quantizer.quantizing:
        raise common.DataError(f"{args.checkpoint}: quantization has not started, so its codes mean nothing: train on")
    reports, sheets, K, sources = {}, {}, model.config.codebook_size, open_sources(args)
    common.make_folder(f"{args.out}/figures")
    for source, own in sources:
        pairs = collect(model, source, args, device)
        if pairs is None:
            print(f"{source.name} is left out: no pair of an evaluated episode can be read", flush=True)
            continue
        unit = "s" if source.seconds else ""
        gap = f"{source.low:g}{unit}" + (f" to {source.high:g}{unit}, its middle" if source.high > source.low else "")
        count = len(np.unique(pairs.episode[pairs.evaluated]))
        which = "held out of the run's own data" if own else "all: the run was not trained on this data"
        found, share = images(model, pairs, args, device)
        report = dict(pairs=int(pairs.evaluated.sum()), episodes=count, which=which, gap=gap)
        reports[source.name] = report | found | probe(model, pairs)
        sheets[source.name] = sheet(model, pairs, share, device)
        print(summary(source.name, reports[source.name], K), flush=True)
    if not reports:
        raise common.DataError("nothing to evaluate: hold out episodes with train.py --val-share, or give other --data")

    out, drawn = Path(args.out), {f"codes_{key_of(name)}": figures.codes({name: e}) for name, e in sheets.items()}
    for name, figure in drawn.items():
        with common.atomic(out / "figures" / f"{name}.png") as path:
            figure.savefig(path, format="png")
    with common.atomic(out / "report.json") as path:
        path.write_text(json.dumps(dict(flags=vars(args), sources=reports), indent=1))
    lines = [f"# Latent actions of {args.checkpoint}", ""]
    lines += [f"- {summary(name, report, K)}" for name, report in reports.items()]
    for name, report in reports.items():
        lines += ["", f"## {name}", "", *section(report)]
    with common.atomic(out / "report.md") as path:
        path.write_text("\n".join([*lines, "", *(f"![{name}](figures/{name}.png)" for name in drawn)]) + "\n")
    print(f"report: {out / 'report.md'}")
    return 0


def sheet(model, pairs, share, device):
    """The example of figures.codes: among the largest motions, with the most frequent codes."""
    moved = np.abs(np.diff(pairs.thumbs[pairs.evaluated], axis=1)).mean((1, 2)).argsort()
    i, codes = moved[int(0.9 * (len(moved) - 1))], pairs.codes[pairs.evaluated]
    first, second = (to_input(pairs.frames[i : i + 1, t], device)[0] for t in (0, 1))
    code = torch.from_numpy(codes[i]).to(device)
    frequent = np.sort(np.argsort(-share, 1, kind="stable")[:, : figures.COLUMNS], 1)
    example = figures.effects(model, first, second, model.decode(first[None], code[None])[0], code, frequent)
    return dict(example, all_codes=codes, actions=pairs.motion[pairs.evaluated])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
