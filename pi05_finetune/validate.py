"""Check recorded episodes against a spec before anything is trained on them.

Run:
  python pi05_finetune/validate.py --data runs/demo/pi05_finetune --report runs/report.json
  python pi05_finetune/validate.py --data PATH --spec pi05_finetune/specs/lekiwi.yaml --report report.json

Errors end with exit code 1, warnings alone with 0. The report is JSON: every problem with its episode, rule and text.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
from episodes import MissingFile, check_shapes, find_spec, list_episodes, named_paths
from norms import STILL
from tqdm import tqdm

import common

RULES = dict(
    missing="(warning) a file of the episode is not there: training leaves the episode out",
    readable="files are whole, with the keys, shapes and lengths of the spec; no NaN or infinity",
    boundaries="timestamps rise from step to step, with no gap of three periods",
    rate="the control rate is within the spec's tolerance",
    length="at most max_episode_steps, at least two steps",
    range="actions lie within action_min and action_max",
    task="the episode says what its task is",
    constant="(warning) a joint hardly moves in any episode",
    jump="(warning) an absolute action moves by more than half of its range in one step",
    frozen="a camera shows the same frame from beginning to end, or hardly any light",
    duplicate="two episodes hold the same actions",
)


def parse(argv=None):
    parser = common.Parser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add(
        "--data",
        required=True,
        nargs="+",
        metavar="PATH",
        help="folder of npz episodes or LeRobotDataset, or NAME=PATH",
    )
    add("--spec", metavar="FILE", help="YAML or JSON; without it DATA/spec.yaml, or what the first episode tells")
    add("--report", required=True, metavar="FILE", help="JSON to write")
    add("--max-episodes", help="look at the first N episodes only", **whole)
    add("--frames", default=8, help="frames per camera and episode that are decoded; 0: none", **whole)
    return parser.parse_args(argv)


def check_steps(episode, spec):
    """Problems of one episode's numbers: a list of (rule, text)."""
    found, times, T = [], episode.timestamps, len(episode)
    gaps = np.diff(times)
    if T < 2:
        found.append(("length", "one step only: nothing to learn a motion from"))
    if spec.max_episode_steps is not None and T > spec.max_episode_steps:
        found.append(("length", f"{T} steps, but the spec allows {spec.max_episode_steps}"))
    if not np.isfinite(times).all() or (gaps <= 0).any():
        at = int(np.argmax(~(gaps > 0)))
        found.append(
            ("boundaries", f"timestamps do not rise at step {at + 1}: two episodes in one, or a clock set back")
        )
    elif T > 1:
        rate = 1 / float(np.median(gaps))
        wrong = abs(rate / spec.control_freq_hz - 1) * 100
        if wrong > spec.control_freq_tolerance_pct:
            expected = f"{spec.control_freq_hz:g} Hz +- {spec.control_freq_tolerance_pct:g} %"
            found.append(("rate", f"{rate:.2f} Hz, but the spec says {expected}"))
        if gaps.max() > 3 * float(np.median(gaps)):
            at = int(gaps.argmax())
            found.append(("boundaries", f"{gaps.max():.3f} s pass between steps {at} and {at + 1}: frames were lost"))
    for limit, outside in ((spec.action_min, np.less), (spec.action_max, np.greater)):
        if limit is not None:
            beyond = outside(episode.actions, np.asarray(limit, np.float32))
            for dim in np.flatnonzero(beyond.any(0)):
                step = int(beyond[:, dim].argmax())
                value, count = episode.actions[step, dim], int(beyond[:, dim].sum())
                text = f"{spec.names[dim]} is {value:.4g} at step {step}, the limit is {limit[dim]:g} ({count} steps)"
                found.append(("range", text))
    if not episode.task.strip():
        found.append(("task", "no task text: Pi05 is told what to do in words"))
    return found


def check_camera(key, frames, count):
    """Problems of one camera, from `count` frames spread over the episode."""
    steps = np.unique(np.linspace(0, len(frames) - 1, count).astype(int))
    seen = [np.asarray(frames[int(i)]).astype(np.float32) for i in steps]
    if len(seen) > 1 and max(np.abs(a - seen[0]).mean() for a in seen[1:]) < 0.25:
        return [("frozen", f"{key}: {len(seen)} frames spread over {len(frames)} steps are the same picture")]
    if max(float(image.std()) for image in seen) < 2:
        return [("frozen", f"{key}: every frame is of one colour (a covered lens, a missing camera)")]
    return []


def check_all(episodes, spec):
    """Problems that show only over all episodes: {source/id: list of (rule, text)}, and those of the whole."""
    found, seen = {}, {}
    for episode in episodes:
        name, key = f"{episode.source}/{episode.id}", episode.actions.tobytes()
        if key in seen:
            found.setdefault(name, []).append(("duplicate", f"the same actions as episode {seen[key]}"))
        seen.setdefault(key, name)
    rows = np.concatenate([episode.actions for episode in episodes])
    low, high = np.nanquantile(rows, [0.01, 0.99], axis=0)
    span = np.nanmax(rows, 0) - np.nanmin(rows, 0)
    still = span <= STILL * np.median(span)
    text = "hardly moves: a range of {:.3g} over all episodes (others have {:.3g})"
    whole = [("constant", f"{spec.names[i]} {text.format(span[i], np.median(span))}") for i in np.flatnonzero(still)]
    for episode in episodes if spec.action_type == "absolute" else []:
        step = np.abs(np.diff(episode.actions, axis=0)) / np.maximum(high - low, 1e-9)
        far = (step > 0.5) & (high - low > 0.05 * span)  # a gripper that only opens and closes is no jump
        ends = (episode.actions < low + 0.02 * span) | (episode.actions > high - 0.02 * span)
        far &= ~(ends[1:] & ends[:-1])
        if far.any():
            at, dim = np.argwhere(far)[0]
            text = f"{spec.names[dim]} jumps from {episode.actions[at, dim]:.4g} to {episode.actions[at + 1, dim]:.4g}"
            name = f"{episode.source}/{episode.id}"
            found.setdefault(name, []).append(("jump", f"{text} at step {at + 1} ({int(far.sum())} such)"))
    return found, whole


def is_warning(rule):
    return RULES[rule].startswith("(warning)")


def refuse(episodes, spec):
    """For training: raise the first error that the numbers of the episodes show."""
    problems = [(e, rule, text) for e in episodes for rule, text in check_steps(e, spec) if not is_warning(rule)]
    if problems:
        episode, rule, text = problems[0]
        more = f"{len(problems)} such problems; validate.py lists them" if len(problems) > 1 else "see validate.py"
        raise ValueError(f"{episode.source}, episode {episode.id}: {rule}: {text} ({more})")


def validate(stored, spec, frames=8, progress=iter):
    """The report of a list of Stored episodes, as a dict."""
    problems, whole, steps = {}, [], 0
    for item in progress(stored):
        name = f"{item.source}/{item.id}"
        try:
            episode = check_shapes(item.load(spec), spec)
            problems[name] = check_steps(episode, spec)
            for key in spec.required_obs_keys if frames else []:
                problems[name] += check_camera(key, episode.frames[key], frames)
            whole.append(episode)
            steps += len(episode)
        except MissingFile as error:
            problems[name] = [("missing", str(error))]
        except ValueError as error:
            problems[name] = [*problems.get(name, []), ("readable", str(error))]
    everywhere = []
    if whole:
        more, everywhere = check_all(whole, spec)
        for name, found in more.items():
            problems[name] += found
    rows = [dict(episode=name, rule=rule, text=text) for name, found in problems.items() for rule, text in found]
    rows += [dict(episode="all", rule=rule, text=text) for rule, text in everywhere]
    for row in rows:
        row["level"] = "warning" if is_warning(row["rule"]) else "error"
    errors = sum(row["level"] == "error" for row in rows)
    return dict(
        spec=vars(spec), episodes=len(stored), readable=len(whole), steps=steps, seconds=steps / spec.control_freq_hz,
        tasks=sorted({episode.task for episode in whole}), errors=errors, warnings=len(rows) - errors, rules=RULES,
        problems=rows,
    )  # fmt: skip


def main(argv=None):
    args = parse(argv)
    pairs = named_paths(args.data)
    spec = find_spec(pairs[0][1], args.spec)
    stored = [item for name, path in pairs for item in list_episodes(name, path)][: args.max_episodes]
    shown = dict(unit="episode", disable=not sys.stderr.isatty())
    report = validate(stored, spec, args.frames, lambda items: tqdm(items, **shown))
    Path(args.report).parent.mkdir(parents=True, exist_ok=True)
    with common.atomic(args.report) as path:
        path.write_text(json.dumps(report, indent=1, default=str))
    for rule in RULES:
        rows = [row for row in report["problems"] if row["rule"] == rule]
        for row in rows[:5]:
            print(f"{row['level']}: {row['episode']}: {rule}: {row['text']}")
        if len(rows) > 5:
            print(f"... {len(rows)} such problems in all: see {args.report}")
    size = f"{report['readable']} of {report['episodes']} episodes readable, {report['steps']:,} steps"
    print(f"{spec.name}: {size}, {report['errors']} errors, {report['warnings']} warnings -> {args.report}")
    return 1 if report["errors"] or not report["readable"] else 0


if __name__ == "__main__":
    common.run(main)
