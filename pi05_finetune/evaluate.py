"""Report on a Pi05 checkpoint: its actions against the recorded ones of held-out episodes.

Run:
  python pi05_finetune/evaluate.py --checkpoint runs/x/checkpoints/best --out runs/x/report
  python pi05_finetune/evaluate.py --mock-model --data g1=PATH --out report

Without --data the run's own data and split are used. Writes OUT/report.md, OUT/report.json and OUT/figures.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import figures
from data import ValidationSteps
from episodes import open_data
from metrics import references, score
from model import Pi05
from norms import compute
from tqdm import tqdm

import common


def parse(argv=None):
    parser = common.Parser(__doc__)
    add, whole, real = parser.add_argument, dict(type=int, metavar="N"), dict(type=float, metavar="X")
    add("--checkpoint", help="folder with pi05_finetune.json, such as RUN/checkpoints/best", metavar="DIR")
    add("--mock-model", action="store_true", help="no model: recorded actions with noise, to see data and report")
    add("--data", nargs="+", metavar="PATH", help="as in train.py; without it what the run was trained on")
    add("--spec", metavar="FILE", help="as in train.py; without it the run's")
    add("--out", metavar="DIR", help="folder of the report; without it RUN/report")
    add("--val-share", help="share of the episodes held out; without it the run's", **real)
    add("--val-episodes", nargs="+", metavar="IDS", help="hold out just these; without it the run's")
    add("--val-stride", default=10, help="steps between two predictions", **whole)
    add("--max-episodes", help="predict for the first N held-out episodes only", **whole)
    add("--chunk", default=50, help="actions per prediction of --mock-model", **whole)
    add(
        "--draws",
        default=1,
        help="also score the mean of N predictions from other noise, the model's expectation",
        **whole,
    )
    add("--batch-size", default=16, help="predictions at a time", **whole)
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    add("--seed", default=0, help="of the noise of --draws and --mock-model", **whole)
    args = parser.parse_args(argv)
    if bool(args.checkpoint) == args.mock_model:
        parser.error("give --checkpoint or --mock-model")
    for name in ("val_stride", "max_episodes", "chunk", "draws", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"{common.flag(name)} must be above 0")
    args.out = common.report_folder(parser, args)
    return args


class Mock:
    """Recorded actions plus noise of 0.1 of each dim's scale: the report must show a normalised MSE of 0.01."""

    def __init__(self, scale, seed):
        self.noise, self.random = torch.from_numpy(0.1 * scale), torch.Generator().manual_seed(seed)

    def predict(self, batch):
        return batch["action"] + self.noise * torch.randn(batch["action"].shape, generator=self.random)


def open_episodes(args):
    """(spec, training episodes, held-out episodes), as in the checkpoint's run (RUN/args.json) unless flags say so."""
    record = Path(args.checkpoint or ".").resolve().parent.parent / "args.json"
    try:
        flags = json.loads(record.read_text())["flags"] if args.checkpoint and record.exists() else {}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{record}: not the flags of a run ({error})") from None
    data = args.data or flags.get("data")
    if not data:
        raise ValueError("no run's args.json is there to tell the data: give --data")
    if args.val_share is None and args.val_episodes is None:
        share, held = flags.get("val_share", 0.1), flags.get("val_episodes", [])
    else:
        share, held = 0.1 if args.val_share is None else args.val_share, args.val_episodes or []
    spec = args.spec or (None if args.data else flags.get("spec"))
    return open_data(data, spec, share, held)


def check_fit(model, spec, episode):
    """Refuse data of another robot than the checkpoint's."""
    about, state = model.about, episode.state(spec).shape[1]
    for what, here, there in (
        ("cameras", list(spec.cameras), about["cameras"]),
        ("state dims", state, about["state_dim"]),
        ("action dims", spec.action_dim, about["action_dim"]),
    ):
        if here != there:
            raise ValueError(f"--data: its {what} are {here}, but the checkpoint has {there}")


def predictions(model, steps, batch_size, draws=1, seed=0):
    """(predicted, mean of all draws, recorded (N, T, A), mask (N, T)) of the items of `steps`, in robot units."""
    parts = []
    random = torch.Generator().manual_seed(seed)
    shown = dict(unit="batch", disable=not sys.stderr.isatty())
    for first in tqdm(range(0, len(steps), batch_size), **shown):
        batch = steps.collate([steps[i] for i in range(first, min(first + batch_size, len(steps)))])
        drawn = [model.predict(batch)]
        for _ in range(draws - 1):
            batch["noise"] = torch.randn(batch["noise"].shape, generator=random)
            drawn.append(model.predict(batch))
        parts.append((drawn[0], torch.stack(drawn).mean(0), batch["action"], batch["mask"]))
    return tuple(torch.cat(part).numpy() for part in zip(*parts, strict=True))


def one_episode(model, spec, episode, chunk, size, batch_size):
    """Predictions for an episode, chunk after chunk: recorded and predicted (T, A), and eight frames of a camera."""
    steps = ValidationSteps(spec, [episode], chunk, size, stride=chunk)
    predicted = predictions(model, steps, batch_size)[0]
    times = np.unique(np.linspace(0, len(episode) - 1, 8).astype(int))
    shown = [(i / spec.control_freq_hz, episode.frames[spec.required_obs_keys[0]][int(i)]) for i in times]
    return episode.actions, predicted.reshape(-1, predicted.shape[-1])[: len(episode)], shown


# --- the report

ROWS = dict(
    mse_normalised="MSE, normalised",
    mse="MSE, robot units",
    mae="MAE, robot units",
    delta="step to step, normalised",
    jerk="jerk, normalised",
    clipping="outside the limits",
)


def verdict(name, card):
    """One line on what is good and what to look at."""
    ours, hold = card["methods"]["model"], card["methods"]["hold last"]
    gain = hold["mse_normalised"] / max(ours["mse_normalised"], 1e-12)
    better, worse = f"{gain:.2f} times less error than", f"{1 / gain:.2f} times the error of"
    text = [f"{better if gain > 1 else worse} holding the last action"]
    if "mean of draws" in card["methods"]:
        gain = hold["mse_normalised"] / max(card["methods"]["mean of draws"]["mse_normalised"], 1e-12)
        text.append(f"the mean of {card['draws']} draws has {1 / gain:.2f} of it")
    if ours["jerk"] is not None and ours["jerk"] > 3 * max(ours["jerk_recorded"], 1e-6):
        text.append(f"jerk is {ours['jerk'] / max(ours['jerk_recorded'], 1e-6):.1f} times the recorded one")
    if ours["clipping"] > 0.01:
        text.append(f"{100 * ours['clipping']:.1f} % of the values leave the limits")
    return f"{name}: {'; '.join(text)}."


def report(args, cards):
    """report.md, as text."""
    lines = [f"# Report on {args.checkpoint or 'the mock model'}", ""]
    lines += ["Normalised: divided by half of the q01-to-q99 range of the training episodes' actions, per dim."]
    lines += ["Lower is better, except for step to step and jerk, which should be as recorded."]
    lines += ["Limits: the spec's, or what the training episodes reach."]
    for name, card in cards.items():
        methods = card["methods"]
        lines += ["", f"## {name}", ""]
        size = f"{card['predictions']} predictions of {card['chunk']} steps from {card['episodes']} episodes"
        lines += [f"{size}, {card['seconds_per_prediction']:.2g} s each with reading."]
        lines += ["", "| | " + " | ".join(methods) + " | recorded |", "| --- " + "| ---: " * (len(methods) + 1) + "|"]
        for key, title in ROWS.items():
            values = [method[key] for method in methods.values()] + [methods["model"].get(f"{key}_recorded")]
            lines += [f"| {title} | " + " | ".join("-" if v is None else f"{v:.4g}" for v in values) + " |"]
        lines += ["", "| dim | MSE, normalised | hold last | MSE, robot units |", "| --- | ---: | ---: | ---: |"]
        ours, hold = methods["model"], methods["hold last"]["mse_normalised_per_dim"]
        rows = zip(card["dims"], ours["mse_normalised_per_dim"], hold, ours["mse_per_dim"], strict=True)
        lines += [f"| {dim} | {a:.4g} | {b:.4g} | {c:.4g} |" for dim, a, b, c in rows]
    lines += ["", "## In short", "", *(f"- {verdict(name, card)}" for name, card in cards.items()), ""]
    lines += [f"![{figure}](figures/{figure}.png)" for figure in ("episode", "horizon", "per_dim")]
    return "\n".join(lines) + "\n"


def main(argv=None):
    args = parse(argv)
    dist = common.setup(args)
    spec, train, held = open_episodes(args)
    if not held:
        raise ValueError("nothing to report on: hold out episodes with --val-share or --val-episodes")
    held = held[: args.max_episodes]
    norms = compute(spec, train).action
    scale = (norms["q99"] - norms["q01"]) / 2
    low = norms["min"] if spec.action_min is None else np.asarray(spec.action_min)
    high = norms["max"] if spec.action_max is None else np.asarray(spec.action_max)
    if args.mock_model:
        model, chunk, size = Mock(scale, args.seed), args.chunk, 224
    else:
        model = Pi05.from_pretrained(args.checkpoint, dist.device)
        chunk, size = model.about["chunk"], model.about["image_size"]
        check_fit(model, spec, train[0])

    cards, examples = {}, {}
    for name in dict.fromkeys(episode.source for episode in held):
        mine = [episode for episode in held if episode.source == name]
        steps = ValidationSteps(spec, mine, chunk, size, stride=args.val_stride)
        start = time.perf_counter()
        predicted, middle, true, mask = predictions(model, steps, args.batch_size, args.draws, args.seed)
        seconds = (time.perf_counter() - start) / (len(steps) * args.draws)
        methods = {"model": predicted} | ({"mean of draws": middle} if args.draws > 1 else {})
        methods |= references(mine, steps.places, chunk, norms["mean"])
        methods = {key: score(value, true, mask, scale, low, high) for key, value in methods.items()}
        cards[name] = dict(
            predictions=len(steps), episodes=len(mine), chunk=chunk, dims=spec.names, draws=args.draws, methods=methods,
            seconds_per_prediction=seconds,
        )  # fmt: skip
        true, predicted, shown = one_episode(model, spec, mine[0], chunk, size, args.batch_size)
        examples[f"{name}, episode {mine[0].id}"] = true, predicted, spec.names, spec.control_freq_hz, shown
        print(verdict(name, cards[name]), flush=True)

    out = Path(args.out)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in dict(
        episode=figures.episodes(examples, chunk),
        horizon=figures.horizon({name: card["methods"] for name, card in cards.items()}, spec.control_freq_hz),
        per_dim=figures.per_dim({name: card["methods"] for name, card in cards.items()}, spec.names),
    ).items():
        with common.atomic(out / "figures" / f"{name}.png") as path:
            figure.savefig(path, format="png")
    with common.atomic(out / "report.json") as path:
        path.write_text(json.dumps(dict(flags=vars(args), device=str(dist.device), sources=cards), indent=1))
    with common.atomic(out / "report.md") as path:
        path.write_text(report(args, cards))
    print(f"report: {out / 'report.md'}")
    return 0


if __name__ == "__main__":
    common.run(main)
