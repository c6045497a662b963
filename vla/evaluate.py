"""Report card of a checkpoint: offline on held-out clips, and in closed loop in the tabletop world or an environment.

Run:
  python vla/evaluate.py --checkpoint runs/robot/checkpoints/best --data robot=PATH --episodes 100 --out report
  python vla/evaluate.py --checkpoint runs/latent/checkpoints/best --data web=PATH --labels PATH --out report
  python vla/evaluate.py --checkpoint CKPT --env gym_pusht/PushT-v0 --episodes 50 --instruction "push it" --out report

--data: action error in robot units per dim, smoothness of the predicted chunks, latent accuracy (with --labels),
beside what needs no model. --episodes: success rate with its 95 % interval, videos of rollouts. Writes report.json,
report.md, figures/.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import figures
from data import read_sources, references
from model import VLA
from policy import Policy
from sim import rollout, world

import common


def parse(argv=None):
    parser = common.Parser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--checkpoint", required=True, metavar="DIR", help="a checkpoint folder of train.py or finetune.py")
    add("--data", nargs="+", default=[], metavar="NAME=PATH", help="clips to measure on offline")
    add("--labels", nargs="+", metavar="DIR", help="their label shards: measure latents, not commands")
    add("--out", metavar="DIR", help="folder of the report; without it RUN/report")
    add("--val-share", type=float, default=0.1, metavar="X", help="share of the episodes held out, as in training")
    add("--val-episodes", nargs="+", default=[], metavar="NAME", help="the held-out episodes, as in training")
    add("--instruction", metavar="TEXT", help="for clips, or an environment, that have none")
    add("--stride", default=1, help="frames between two that are measured", **whole)
    add("--episodes", default=0, help="closed-loop episodes; 0: none", **whole)
    add("--env", metavar="ID", help="gymnasium environment for the episodes; without it the tabletop world")
    add("--image-key", metavar="KEY", help="of the observation in --env; without it env.render()")
    add("--state-key", metavar="KEY", help="of the observation in --env")
    add("--body", choices=world.BODIES, default="disc", help="how the robot looks in the tabletop world")
    add("--distractors", default=0, help="discs that drift about in the tabletop world", **whole)
    add("--limit", default=70, help="steps after which an episode has failed", **whole)
    add("--replan", default=1, help="steps between two forward passes", **whole)
    add("--ensemble", type=float, metavar="X", help="average overlapping chunks with weights exp(-X i); see policy.py")
    add("--films", default=6, help="episodes to show in rollouts.mp4", **whole)
    add("--batch-size", default=64, help="frames, or episodes, at a time", **whole)
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    add("--seed", default=0, help="of the episodes: the same seed is the same scenes and tasks", **whole)
    args = parser.parse_args(argv)
    for name in ("stride", "limit", "replan", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"{common.flag(name)} must be above 0")
    if not args.data and not args.episodes:
        parser.error("nothing to do: give --data, --episodes or both")
    if args.labels and not args.data:
        parser.error("--labels needs --data, the clips that were labelled")
    args.out = common.report_folder(parser, args)
    return args


def batches(model, source, args, device):
    """Held-out frames in batches: (clip, rows, the model's inputs)."""
    for clip in source.validation:
        state = clip.array("state.npy") if model.action and model.action["state"] else None
        for start in range(0, len(clip.rows), args.stride * args.batch_size):
            rows = clip.rows[start : start + args.stride * args.batch_size : args.stride]
            images = list(clip.frames(rows, model.config["image_size"]))
            batch = model.inputs(images, [clip.meta["instruction"]] * len(rows))
            if state is not None:
                batch["state"] = torch.from_numpy(state[rows])
            yield clip, rows, {name: value.to(device) for name, value in batch.items()}


def measure_actions(model, source, args, device):
    """Errors on held-out clips in robot units, beside holding the last command and the training clips' mean command.

    Errors are over a whole chunk (padding left out). smoothness: mean size of second differences within a chunk,
    predicted by true. Returns (numbers, an example: (true, predicted) chunks laid end to end, (T, A) each).
    """
    H, scale = model.action["chunk"], np.array(model.action["scale"])
    average = np.concatenate([clip.array("actions.npy") for clip in source.train]).mean(0)
    errors, bends, example = dict(model=[], hold=[], mean=[]), [], None
    for clip, rows, batch in batches(model, source, args, device):
        actions = clip.array("actions.npy")
        if actions.shape[1] != len(scale):
            raise ValueError(f"{clip}: {actions.shape[1]} action dims, the checkpoint predicts {len(scale)}")
        steps = rows[:, None] + np.arange(H)
        there, true = steps < len(actions), actions[np.minimum(steps, len(actions) - 1)]
        guess = model.predict_actions(batch).cpu().numpy()
        last = actions[np.maximum(rows - 1, 0)][:, None]
        for name, value in dict(model=guess, hold=last, mean=average).items():
            errors[name].append(np.abs(value - true)[there])
        if H > 2:
            whole = there.all(1)
            bends.append([np.abs(np.diff(x[whole], 2, axis=1) / scale).sum() for x in (guess, true)])
        if example is None:
            every = np.arange(0, len(rows), max(1, H // args.stride))
            example = true[every].reshape(-1, len(scale)), guess[every].reshape(-1, len(scale))
    errors = {name: np.concatenate(value) for name, value in errors.items()}  # n A
    numbers = {f"mae_{name}": float((value / scale).mean()) for name, value in errors.items()}
    numbers |= {f"mae_per_dim_{name}": value.mean(0).tolist() for name, value in errors.items()}
    if bends:
        predicted, true = np.sum(bends, 0)
        numbers["smoothness"] = float(predicted / max(true, 1e-12))
    return numbers | dict(clips=len(source.validation)), example


def measure_latents(model, source, args, device):
    """Accuracy per slot and of whole words, perplexity, beside what one gets without looking (data.references)."""
    if any(model.latent[name] != value for name, value in source.labels.items()):
        raise ValueError(f"--labels of {source.name}: another vocabulary than the checkpoint was trained on")
    right, entropy = [], []
    for clip, rows, batch in batches(model, source, args, device):
        probabilities = model.predict_latents(batch)[0].cpu().numpy()  # B N K
        codes = clip.latents()[0][rows]
        right.append(probabilities.argmax(2) == codes)
        entropy.append(-np.log(np.take_along_axis(probabilities, codes[..., None], 2) + 1e-12).mean((1, 2)))
    right = np.concatenate(right)
    numbers = dict(token_accuracy=right.mean(), word_accuracy=right.all(1).mean())
    numbers |= {f"token_accuracy_{n}": right[:, n].mean() for n in range(right.shape[1])}
    numbers |= dict(perplexity=np.exp(np.concatenate(entropy).mean())) | references(source)
    return {name: float(value) for name, value in numbers.items()} | dict(clips=len(source.validation))


def closed_loop(policy, args):
    """(numbers, films): success with its interval over the episodes' seeds, steps of the successes, time per act()."""
    seeds = [(args.seed, 1_000_000 + i) for i in range(args.episodes)]
    start = time.perf_counter()
    if args.env:
        import gymnasium

        try:
            env = gymnasium.make(args.env, **({} if args.image_key else dict(render_mode="rgb_array")))
        except gymnasium.error.Error as error:
            raise ValueError(f"--env {args.env}: {error}") from None
        keys = dict(image_key=args.image_key, state_key=args.state_key, instruction=args.instruction)
        seeds = [args.seed + i for i in range(args.episodes)]
        won, steps, films = rollout.in_gymnasium(policy, env, seeds, limit=args.limit, films=args.films, **keys)
        env.close()
    else:
        parts, films = [], []
        for first in range(0, len(seeds), args.batch_size):
            scene = dict(body=args.body, distractors=args.distractors, limit=args.limit)
            part = seeds[first : first + args.batch_size]
            more = min(len(part), max(0, args.films - len(films)))
            *numbers, film = rollout.on_tables(policy, part, films=more, pixels=args.pixels, **scene)
            parts.append(numbers)
            films += film
        won, steps = map(np.concatenate, zip(*parts, strict=True))
    low, high = rollout.wilson(int(won.sum()), len(won))
    numbers = dict(
        success=float(won.mean()), low=low, high=high, episodes=len(won), seconds=time.perf_counter() - start
    )
    return numbers | dict(steps_of_successes=float(steps[won].mean()) if won.any() else None), films


def report(args, offline, loop):
    """report.md, as text."""
    lines = [f"# Report card of {args.checkpoint}", ""]
    for name, numbers in offline.items():
        lines += [f"## {name}: {numbers['clips']} held-out clips", "", "| | |", "| --- | ---: |"]
        shown = {key: value for key, value in numbers.items() if not isinstance(value, list) and key != "clips"}
        lines += [f"| {key.replace('_', ' ')} | {value:.4g} |" for key, value in shown.items()]
        for key in ("mae_per_dim_model", "mae_per_dim_hold", "mae_per_dim_mean"):
            if key in numbers:
                lines += [f"| {key.replace('_', ' ')} (robot units) | {' '.join(f'{v:.3g}' for v in numbers[key])} |"]
        lines += [""]
    if loop:
        where = args.env or f"tabletop, body {args.body}, {args.distractors} distractors"
        rate = f"{100 * loop['success']:.1f} % [{100 * loop['low']:.1f}, {100 * loop['high']:.1f}]"
        lines += [f"## Closed loop: {where}", "", f"{rate} of {loop['episodes']} episodes succeed (95 % interval).", ""]
    lines += [f"![{file.stem}](figures/{file.name})" for file in sorted((Path(args.out) / "figures").glob("*.png"))]
    return "\n".join(lines) + "\n"


def main(argv=None):
    args = parse(argv)
    dist = common.setup(args)
    model = VLA.from_pretrained(args.checkpoint).to(dist.device).eval()
    args.pixels = model.config["image_size"]
    out, offline, examples, loop = Path(args.out), {}, {}, None
    (out / "figures").mkdir(parents=True, exist_ok=True)
    kind = "latents" if args.labels else "actions"
    if args.data and not (model.latent if args.labels else model.action):
        other = "give --labels" if model.latent else "give clips with actions, without --labels"
        raise ValueError(f"{args.checkpoint} has no head for {kind}: {other}")
    words = args.data, kind, args.labels, args.val_share, args.val_episodes, args.instruction
    for source in read_sources(*words) if args.data else []:
        if not source.validation:
            print(f"{source.name}: no clip is held out; give --val-share or --val-episodes", flush=True)
        elif args.labels:
            offline[source.name] = measure_latents(model, source, args, dist.device)
        else:
            offline[source.name], examples[source.name] = measure_actions(model, source, args, dist.device)
    if args.episodes:
        loop, films = closed_loop(Policy(model, args.replan, args.ensemble), args)
        if films:
            with common.atomic(out / "figures" / "rollouts.mp4") as path:
                rollout.write_film(path, films)
    figure = {}
    if examples:
        figure |= dict(commands=figures.commands(examples))
    if any("mae_per_dim_model" in numbers for numbers in offline.values()):
        figure |= dict(per_dim=figures.per_dim(offline))
    if loop and films:
        figure |= dict(rollouts=figures.strips(films))
    for name, picture in figure.items():
        with common.atomic(out / "figures" / f"{name}.png") as path:
            picture.savefig(path, format="png")
    with common.atomic(out / "report.json") as path:
        path.write_text(json.dumps(dict(checkpoint=args.checkpoint, offline=offline, closed_loop=loop), indent=1))
    text = report(args, offline, loop)
    with common.atomic(out / "report.md") as path:
        path.write_text(text)
    print(text)
    print(f"report: {out / 'report.md'}")
    return 0


if __name__ == "__main__":
    common.run(main)
