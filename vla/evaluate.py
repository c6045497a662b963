"""Report of a checkpoint: offline on held-out clips, and in closed loop in a simulated environment.

Run:
  python vla/evaluate.py --checkpoint runs/robot/checkpoints/best --data robot=PATH --env tabletop --episodes 100
  python vla/evaluate.py --checkpoint runs/latent/checkpoints/best --data web=PATH --labels PATH --out report
  python vla/evaluate.py --checkpoint CKPT --env metaworld --episodes 50 --n-action-steps 4 --out report
  python vla/evaluate.py --checkpoint CKPT --env libero_spatial --episodes 50 --out report
  python vla/evaluate.py --checkpoint CKPT --env gym_pusht/PushT-v0 --instruction "push it" --out report

--data: action error in robot units per dim, or latent accuracy (with --labels), beside baselines that need no model.
--env: success rate with its 95 % interval, per task too; an episode ends with its first success, or fails after --limit
steps. Writes report.json, report.md, figures/ (with videos of the first episodes), and with --wandb a table of the
episodes.
"""

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import figures
from data import ValidationBatches, baselines, check_labels, collect
from model import VLA
from policy import Policy
from sim import environments, rollout
from sources import num_rows, read_sources, split_for_report
from torch.utils.data import DataLoader
from train import setup, validate

import common


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--checkpoint", required=True, metavar="DIR", help="checkpoint of train.py or finetune.py")
    add("--data", nargs="+", default=[], metavar="NAME=PATH", help="clips to measure on offline")
    add("--labels", nargs="+", metavar="DIR", help="their label shards: measure latents, not commands")
    add("--out", metavar="DIR", help="folder of the report; without it RUN/report")
    add("--instruction", metavar="TEXT", help="for clips, or an environment, that have none")
    add("--stride", default=1, help="measure every N-th frame", **whole)
    add("--env", metavar="NAME", help=f"closed loop: {environments.NAMES}")
    add("--tasks", nargs="+", default=[], metavar="NAME", help="only these tasks of --env")
    add("--episodes", default=20, help="closed-loop episodes of each task", **whole)
    add("--limit", default=0, help="steps after which an episode has failed; 0: the environment's own", **whole)
    add("--pixels", default=0, help="side of the environment's images; 0: its own", **whole)
    add("--image-key", metavar="KEY", help="the image in a gymnasium observation; without it env.render()")
    add("--state-key", metavar="KEY", help="the state in a gymnasium observation")
    add("--n-action-steps", default=1, help="actions of a chunk that are executed before the next prediction", **whole)
    add("--temporal-ensemble-coeff", type=float, metavar="X", help="average chunks by exp(-X i), oldest first")
    add("--videos", default=6, help="episodes to show in rollouts.mp4", **whole)
    add("--batch-size", default=64, help="frames at a time", **whole)
    add("--wandb", metavar="PROJECT", help="also log the closed loop to this Weights & Biases project")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    seed = "of the episodes: policies with one seed meet the same episodes; 0 repeats some of the demo's"
    add("--seed", default=1, help=seed, **whole)
    args = parser.parse_args(argv)
    for name in ("stride", "episodes", "n_action_steps", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    for name in ("seed", "videos", "limit", "pixels"):
        if (getattr(args, name) or 0) < 0:
            parser.error(f"--{name} must not be negative")
    if not args.data and not args.env:
        parser.error("nothing to do: give --data, --env or both")
    if args.labels and not args.data:
        parser.error("--labels needs --data, the clips that were labelled")
    run = Path(args.checkpoint).resolve().parent.parent
    if not args.out and not (run / "args.json").exists():
        parser.error("give --out DIR: --checkpoint lies in no run to write the report to")
    args.out = args.out or str(run / "report")
    return args


def batches(model, source, args, device):
    """Held-out frames in batches: (actions, rows, inputs of the model). What cannot be read is named and left out."""
    step, size, S = args.stride * args.batch_size, model.config.image_size, model.config.action.state_dim
    for clip in source.validation:
        try:
            actions, state = clip.array("actions.npy"), clip.array("state.npy") if S else None
            if S and (state is None or state.shape[1] != S):
                raise common.DataError(f"{clip}: {0 if state is None else state.shape[1]} state dims, expected {S}")
            for first in range(0, len(clip), step):
                rows = np.arange(first, min(first + step, len(clip)), args.stride)
                batch = model.preprocess([*clip.frames(size, rows)], [clip.meta["instruction"]] * len(rows))
                batch |= dict(state=torch.from_numpy(state[rows])) if S else {}
                yield actions, rows, {name: value.to(device) for name, value in batch.items()}
        except (OSError, common.DataError) as error:
            print(f"skipping a clip: {error}", flush=True)


def measure_actions(model, source, args, device):
    """Errors on held-out clips in robot units, beside repeating the last command and the training clips' mean command.

    Errors are over a whole chunk, padding left out. Returns (numbers, an example: (true, predicted) chunks laid end to
    end, (T, A) each).
    """
    H, A, scale = model.config.action.chunk_size, model.config.action.action_dim, np.array(model.config.action.scale)
    known = source.train or source.validation
    average = np.concatenate(collect(lambda clip: clip.array("actions.npy"), known)).mean(0)
    if len(average) != A:
        raise common.DataError(f"{source.name}: {len(average)} action dims, the checkpoint predicts {A}")
    errors, example = dict(model=[], last_action=[], mean_action=[]), None
    for actions, rows, batch in batches(model, source, args, device):
        steps = rows[:, None] + np.arange(H)
        present, true = steps < len(actions), actions[np.minimum(steps, len(actions) - 1)]
        predicted = model.predict_actions(batch).cpu().numpy()
        last = actions[np.maximum(rows - 1, 0)][:, None]
        for name, value in dict(model=predicted, last_action=last, mean_action=average).items():
            errors[name].append(np.abs(value - true)[present])
        if example is None:
            every = np.arange(0, len(rows), max(1, H // args.stride))
            example = true[every].reshape(-1, A), predicted[every].reshape(-1, A)
    if example is None:
        raise common.DataError(f"{source.name}: no held-out clip can be read")
    errors = {name: np.concatenate(value) for name, value in errors.items()}  # n A
    numbers = {f"mae_{name}": float((value / scale).mean()) for name, value in errors.items()}
    numbers |= {f"mae_per_dim_{name}": value.mean(0).tolist() for name, value in errors.items()}
    return numbers | dict(clips=len(source.validation)), example


def measure_latents(model, source, args, device):
    """Accuracy per code position and of whole latent actions, perplexity: train.validate's; beside data.baselines."""
    check_labels([source], vars(model.config.latent))
    pool = [(clip, source) for clip in source.validation]
    frames = sum(num_rows(clip, source.labels) for clip in source.validation) // args.stride
    held = ValidationBatches(pool, model.preprocess, model.config, frames, args.batch_size)
    found = validate(model, {"held": DataLoader(held, batch_size=None)}, device, contextlib.nullcontext())
    numbers = {name.removeprefix("val/held/"): value for name, value in found.items() if name != "val/loss"}
    return numbers | baselines(source) | dict(clips=len(source.validation))


def log_to_wandb(project, checkpoint, loop):
    """Success, and a table with a row for each episode."""
    try:
        import wandb
    except ImportError:
        raise common.DataError("--wandb needs a package: pip install wandb") from None
    columns = ["task", "instruction", "seed", "success", "steps"]
    table = wandb.Table(columns, [[row[column] for column in columns] for row in loop["rows"]])
    run = wandb.init(project=project, config=dict(checkpoint=checkpoint, rule=loop["rule"]))
    run.log(dict(success=loop["success"], low=loop["low"], high=loop["high"], episodes=table))
    run.finish()


def report(args, offline, loop, names):
    """report.md, as text."""
    lines = [f"# {args.checkpoint}", ""]
    for name, numbers in offline.items():
        lines += [f"## {name}: {numbers['clips']} held-out clips", "", "| | |", "| --- | ---: |"]
        shown = {key: value for key, value in numbers.items() if not isinstance(value, list) and key != "clips"}
        lines += [f"| {key.replace('_', ' ')} | {value:.4g} |" for key, value in shown.items()]
        for key in ("mae_per_dim_model", "mae_per_dim_last_action", "mae_per_dim_mean_action"):
            if key in numbers:
                lines += [f"| {key.replace('_', ' ')} (robot units) | {' '.join(f'{v:.3g}' for v in numbers[key])} |"]
        lines += [""]
    if loop:
        lines += [f"## Closed loop: {args.env}", "", loop["rule"], ""]
        lines += ["| task | success, 95 % interval | steps of successes |", "| --- | ---: | ---: |"]
        for task, row in [*loop["tasks"].items(), ("all", loop)]:
            rate = f"{100 * row['success']:.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
            lines += [f"| {task} | {rate} of {row['episodes']} | {row['steps_of_successes'] or 0:.0f} |"]
        lines += [""]
    lines += [f"![{name}](figures/{name}.png)" for name in names]
    return "\n".join(lines) + "\n"


def main(argv=None):
    args = parse(argv)
    _, _, device = setup(args)
    model = VLA.from_pretrained(args.checkpoint).to(device).eval()
    out, offline, examples, loop = Path(args.out), {}, {}, None
    kind, head = ("latents", model.config.latent) if args.labels else ("actions", model.config.action)
    if args.data and not head:
        cure = "give --labels" if model.config.latent else "give clips with actions, without --labels"
        raise common.DataError(f"{args.checkpoint} has no head for {kind}: {cure}")
    sources = read_sources(args.data, kind, args.labels, 0, instruction=args.instruction) if args.data else []
    split = Path(args.checkpoint) / "data.json"
    split = common.read_json(split) if split.exists() else {}
    for source in sources:
        print(split_for_report(source, split), flush=True)
        if not source.validation:
            raise common.DataError(f"{source.name}: training held out none of these episodes: measure other data")
        if args.labels:
            offline[source.name] = measure_latents(model, source, args, device)
        else:
            offline[source.name], examples[source.name] = measure_actions(model, source, args, device)
    common.make_folder(out / "figures")
    if args.env:
        names = dict(instruction=args.instruction, image_key=args.image_key, state_key=args.state_key)
        envs = environments.make(args.env, args.tasks, args.pixels, args.limit, **names)
        policy = Policy(model, args.n_action_steps, args.temporal_ensemble_coeff)
        loop, videos = rollout.evaluate(policy, envs, args.episodes, args.seed, args.videos)
        if videos:
            with common.atomic(out / "figures" / "rollouts.mp4") as path:
                rollout.write_video(path, [frames for _, frames in videos], envs[0].fps)
        for env in envs:
            env.close()
    figure = {}
    if examples:
        figure |= dict(commands=figures.commands(examples))
    if loop and videos:
        figure |= dict(rollouts=figures.strips(videos))
    for name, picture in figure.items():
        with common.atomic(out / "figures" / f"{name}.png") as path:
            picture.savefig(path, format="png")
    with common.atomic(out / "report.json") as path:
        path.write_text(json.dumps(dict(checkpoint=args.checkpoint, offline=offline, closed_loop=loop), indent=1))
    text = report(args, offline, loop, figure)
    with common.atomic(out / "report.md") as path:
        path.write_text(text)
    print(text)
    print(f"report: {out / 'report.md'}")
    if args.wandb and loop:
        log_to_wandb(args.wandb, args.checkpoint, loop)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
