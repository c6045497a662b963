"""Check recorded episodes against a spec before anything is trained on them.

Run:
  python pi05_finetune/validate.py --data runs/demo/pi05_finetune --report runs/report.json
  python pi05_finetune/validate.py --data PATH --spec pi05_finetune/specs/lekiwi.yaml --report report.json

Errors end with exit code 1, warnings alone with 0. The report is JSON: every problem with its episode, rule and text.
train.py makes the same checks before its first step, on few pictures; it stops at errors and prints warnings.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
from compute_norms import CONSTANT
from readers.dataset import check_episode, find_spec, list_episodes, named_paths
from readers.episode import MissingFile
from tqdm import tqdm

import common
from common import DataError

RULES = dict(
    missing="(warning) a file of the episode is not there: training leaves the episode out",
    repaired="(warning) the reader left something out, or clipped it",
    readable="files are whole, with the keys, shapes and lengths of the spec; no NaN or infinity",
    boundaries="timestamps rise from step to step, with no gap of three periods",
    rate="the control rate is within the spec's tolerance",
    length="at most max_episode_steps, at least two steps",
    range="actions lie within action_min and action_max",
    task="the episode says what its task is",
    prompt="(warning) the task is so long that its prompt may not fit --prompt-tokens",
    constant="(warning) a joint hardly moves in any episode",
    jump="(warning) an absolute action moves by more than half of its range in one step",
    scale="actions span about as much as in the other episodes, and as the state (degrees for radians?)",
    pairing="(warning) each action dim leads the state dim of its name: same sign, same order, no delay",
    frozen="a camera shows the same frame from beginning to end, or frames of one colour",
    camera="a camera shows what it shows in the other episodes: no other view, colour order or turn",
    duplicate="two episodes hold the same actions",
)


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--data", required=True, nargs="+", metavar="PATH", help="npz episodes or a LeRobotDataset, or NAME=PATH")
    add("--spec", metavar="FILE", help="YAML or JSON; without it DATA/spec.yaml, or what the first episode tells")
    add("--report", required=True, metavar="FILE", help="JSON to write")
    add("--max-episodes", help="look at the first N episodes only", **whole)
    add("--frames", default=8, help="frames per camera and episode that are decoded; 0: none", **whole)
    add("--prompt-tokens", default=200, help="as in train.py; the length is estimated from the text", **whole)
    return parser.parse_args(argv)


# --- one episode: each function returns a list of (rule, text)


def check_steps(episode, spec):
    """Problems of one episode's numbers."""
    found, times, T = [], episode.timestamps, len(episode)
    gaps = np.diff(times)
    if T < 2:
        found.append(("length", "one step only: nothing to learn a motion from"))
    if spec.max_episode_steps is not None and T > spec.max_episode_steps:
        found.append(("length", f"{T} steps, but the spec allows {spec.max_episode_steps}"))
    if not np.isfinite(times).all() or (gaps <= 0).any():
        at = int(np.argmax(~(gaps > 0))) + 1
        found.append(("boundaries", f"timestamps do not rise at step {at}: two episodes in one, or a clock set back"))
    elif T > 1:
        rate = 1 / float(np.median(gaps))
        if abs(rate / spec.control_freq_hz - 1) * 100 > spec.control_freq_tolerance_pct:
            expected = f"{spec.control_freq_hz:g} Hz +- {spec.control_freq_tolerance_pct:g} %"
            found.append(
                ("rate", f"timestamps tell {rate:.4g} Hz, but the spec says {expected} (are they in seconds?)")
            )
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
    if not all(task.strip() for task in episode.tasks):
        found.append(("task", "no task text: Pi05 is told what to do in words"))
    return found


def check_prompt(episode, spec, tokens):
    state = sum(episode.vectors[key].shape[1] for key in spec.required_proprio_keys)
    longest = max(episode.tasks, key=len)
    estimate = len(longest) // 3 + 4 * state + 12
    return [("prompt", f"about {estimate} tokens, --prompt-tokens {tokens}: {longest[:50]!r}")] * (estimate > tokens)


def sample_frames(episode, key, count):
    steps = np.unique(np.linspace(0, len(episode) - 1, count).astype(int))
    return [np.asarray(episode.frames[key][int(i)]).astype(np.float32) for i in steps]


def check_camera(key, seen):
    """Problems of one camera, from frames spread over the episode."""
    if len(seen) > 1 and max(np.abs(a - seen[0]).mean() for a in seen[1:]) < 0.25:
        return [("frozen", f"{key}: {len(seen)} frames spread over the episode are the same picture")]
    plain = sum(float(image.std()) < 2 for image in seen)
    if plain > 0.2 * len(seen):
        return [("frozen", f"{key}: {plain} of {len(seen)} frames are of one colour (covered lens, lost frames)")]
    return []


# --- all episodes: each function returns {episode or "all": list of (rule, text)}


def check_duplicates(episodes):
    found, seen = {}, {}
    for episode in episodes:
        key = episode.actions.tobytes()
        if key in seen:
            found[episode.name] = [("duplicate", f"the same actions as {seen[key]}")]
        seen.setdefault(key, episode.name)
    return found


def check_motion(episodes, spec):
    """Joints that stand still, jumps, and episodes in another unit."""
    found, rows = {}, np.concatenate([episode.actions for episode in episodes])
    low, high = np.nanquantile(rows, [0.01, 0.99], axis=0)
    span = np.nanmax(rows, 0) - np.nanmin(rows, 0)
    for i in np.flatnonzero(span <= CONSTANT * np.median(span)):
        text = f"hardly moves: a range of {span[i]:.3g} over all episodes (others have {np.median(span):.3g})"
        found.setdefault("all", []).append(("constant", f"{spec.names[i]} {text}"))
    reach = np.stack([np.nanmax(np.abs(episode.actions), 0) for episode in episodes])
    usual = np.median(reach, 0) + 1e-9
    for episode, ratio in zip(episodes, np.median(reach / usual, 1), strict=True):
        if len(episodes) > 2 and not 1 / 20 < ratio < 20:
            text = f"actions are {ratio:.3g} times as large as in the other episodes: another unit?"
            found.setdefault(episode.name, []).append(("scale", text))
    for episode in episodes if spec.action_type == "absolute" else []:
        step = np.abs(np.diff(episode.actions, axis=0)) / np.maximum(high - low, 1e-9)
        far = (step > 0.5) & (high - low > 0.05 * span)  # a gripper that only opens and closes is no jump
        ends = (episode.actions < low + 0.02 * span) | (episode.actions > high - 0.02 * span)
        far &= ~(ends[1:] & ends[:-1])
        if far.any():
            at, dim = np.argwhere(far)[0]
            before, after = episode.actions[at, dim], episode.actions[at + 1, dim]
            text = f"{spec.names[dim]} jumps by {after - before:.4g}, from {before:.6g} to {after:.6g}"
            found.setdefault(episode.name, []).append(("jump", f"{text} at step {at + 1} ({int(far.sum())} such)"))
    return found


def pair_dims(episodes, spec):
    """[(action dim, state dim)] of dims with one name, or of all dims where the two have as many and no names."""
    if spec.action_names and spec.proprio_names:
        both = [name for name in spec.action_names if name in spec.proprio_names]
        return [(spec.action_names.index(name), spec.proprio_names.index(name)) for name in both]
    same = episodes[0].state(spec).shape[1] == spec.action_dim
    return [(i, i) for i in range(spec.action_dim)] if same else []


def check_pairing(episodes, spec):
    """Absolute actions against the state that follows them, where the two clearly go together."""
    pairs = pair_dims(episodes, spec) if spec.action_type == "absolute" else []
    long = [episode for episode in episodes if len(episode) > 10]
    if not pairs or not long:
        return {}
    found, states = {}, [episode.state(spec) for episode in long]
    a, s = (np.array([pair[k] for pair in pairs]) for k in (0, 1))
    fits = [correlate(e.actions[:-1], state[1:]) for e, state in zip(long, states, strict=True)]
    fits = np.nan_to_num(np.stack(fits))
    usual = np.median(fits, 0)  # A S, correlation of each action dim with each state dim one step later
    scale = np.concatenate([episode.actions for episode in long]).std(0)[a] + 1e-9

    def away(lag):  # of the state `lag` steps later
        parts = [
            np.abs(e.actions[1 : len(e) - 2][:, a] - state[1 + lag : len(e) - 2 + lag][:, s])
            for e, state in zip(long, states, strict=True)
        ]
        return np.concatenate(parts).mean(0) / scale

    earlier, same, later = away(-1), away(0), away(1)
    for i, j in pairs:
        name = spec.names[i]
        if usual[i, j] < -0.8:
            found.setdefault("all", []).append(("pairing", f"{name} moves against the state: inverted?"))
        best = int(usual[i].argmax())
        if usual[i, best] > 0.9 > usual[i, j] + 0.3 and usual[:, best].argmax() == i:
            found.setdefault("all", []).append(("pairing", f"{name} goes with state dim {best}, not {j}: swapped?"))
        for episode, fit in zip(long, fits, strict=True):
            if usual[i, j] > 0.8 and fit[i, j] < -0.5:
                text = f"{name} moves against the state, in the other episodes with it: inverted?"
                found.setdefault(episode.name, []).append(("pairing", text))
    moves = [correlate(e.actions[:-1], np.diff(state, axis=0)) for e, state in zip(long, states, strict=True)]
    moves = np.median(np.nan_to_num(np.stack(moves)), 0)[a, s]
    if ((moves > 0.8) & (np.diag(usual[np.ix_(a, s)]) < 0.5)).mean() > 0.5:
        text = "actions go with the state's differences, not with the state: action_type delta?"
        found.setdefault("all", []).append(("pairing", text))
    delayed = (np.minimum(earlier, same) < 0.8 * later) & (later > 1e-6)
    if delayed.mean() > 0.5:
        text = "actions repeat the state of the same or an earlier step, and do not lead it: shifted in time?"
        found.setdefault("all", []).append(("pairing", text))
    span = [np.concatenate(parts).std(0)[k] for parts, k in (([e.actions for e in long], a), (states, s))]
    ratio = np.median(span[0] / (span[1] + 1e-9))
    if (np.diag(usual[np.ix_(a, s)]) > 0.8).mean() > 0.5 and not 1 / 20 < ratio < 20:
        found.setdefault("all", []).append(("scale", f"actions span {ratio:.3g} times what the state spans: degrees?"))
    return found


def correlate(a, b):
    """Columns of a (T, A) with columns of b (T, D) -> (A, D); NaN for a constant column."""
    a, b = (x - x.mean(0) for x in (a.astype(np.float64), b.astype(np.float64)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a.T @ b) / np.sqrt(np.outer(np.square(a).sum(0), np.square(b).sum(0)))


def check_camera_names(thumbnails):
    """thumbnails: {episode: {camera: mean frame (8, 8, 3)}}. Episodes whose camera shows something else.

    Scenes differ, so a view is compared with those of the quarter of the other episodes that it is most like.
    """
    found, cameras = {}, sorted({camera for views in thumbnails.values() for camera in views})
    if len(thumbnails) < 3:
        return found

    def away(name, view, camera):
        sizes = sorted(np.abs(view - views[camera]).mean() for other, views in thumbnails.items() if other != name)
        return sizes[min(len(thumbnails) // 4, len(sizes) - 1)]

    for name, views in thumbnails.items():
        for camera, seen in views.items():
            others = {f"looks like {other} does there": away(name, seen, other) for other in cameras if other != camera}
            others["has red and blue exchanged"] = away(name, seen[..., ::-1], camera)
            others["is upside down"] = away(name, seen[::-1], camera)
            best, mine = min(others, key=others.get), away(name, seen, camera)
            if others[best] < 0.5 * mine and mine > 4:
                found.setdefault(name, []).append(("camera", f"{camera} {best}, against the other episodes"))
    return found


def thumbnail(frames):
    """Mean of frames (H, W, 3) by 8 x 8 blocks."""
    mean = np.mean(frames, 0)
    rows, columns = (np.linspace(0, side, 9).astype(int)[:-1] for side in mean.shape[:2])
    blocks = np.add.reduceat(np.add.reduceat(mean, rows, 0), columns, 1)
    return blocks / (mean.shape[0] * mean.shape[1] / 64)


# --- the whole


def examine(episodes, spec, frames=8, look_at=None, prompt_tokens=200):
    """{episode or "all": list of (rule, text)}. Cameras are read in `look_at` episodes, spread over the set."""
    problems, thumbnails = {}, {}
    looked = np.unique(np.linspace(0, len(episodes) - 1, min(look_at or len(episodes), len(episodes))).astype(int))
    for number, episode in enumerate(episodes):
        found = check_steps(episode, spec) + check_prompt(episode, spec, prompt_tokens)
        found += [("repaired", note) for note in episode.notes]
        for key in spec.required_obs_keys if frames and number in looked else []:
            seen = sample_frames(episode, key, frames)
            found += check_camera(key, seen)
            thumbnails.setdefault(episode.name, {})[key] = thumbnail(seen)
        problems[episode.name] = found
    whole = [check_duplicates(episodes), check_motion(episodes, spec), check_camera_names(thumbnails)]
    for part in [*whole, check_pairing(episodes, spec)] if episodes else []:
        for name, found in part.items():
            problems.setdefault(name, []).extend(found)
    return problems


def is_warning(rule):
    return RULES[rule].startswith("(warning)")


def check(episodes, spec, look_at=24):
    """For training: raise the first error, and return the warnings as lines."""
    problems = examine(episodes, spec, 4, look_at)
    problems = {"all": problems.pop("all", []), **problems}  # what holds for every episode comes first
    rows = [(name, *row) for name, found in problems.items() for row in found]
    errors = [row for row in rows if not is_warning(row[1])]
    if errors:
        name, rule, text = errors[0]
        more = f"{len(errors)} such problems; validate.py lists them" if len(errors) > 1 else "see validate.py"
        raise DataError(f"{name}: {rule}: {text} ({more})")
    warnings = [f"warning: {name}: {rule}: {text}" for name, rule, text in rows if rule != "repaired"]
    return warnings[:5] + [f"... {len(warnings)} warnings; validate.py lists them"] * (len(warnings) > 5)


def validate(refs, spec, frames=8, prompt_tokens=200, progress=iter):
    """The report of a list of EpisodeRef, as a dict."""
    broken, episodes = [], []
    for ref in progress(refs):
        name = f"{ref.source}, episode {ref.id}"
        try:
            episodes.append(check_episode(ref.load(spec), spec))
        except MissingFile as error:
            broken.append((name, "missing", str(error)))
        except DataError as error:
            broken.append((name, "readable", str(error)))
    readable = []
    for episode in episodes:  # a video that ends early shows only when it is read
        try:
            [sample_frames(episode, key, 2) for key in spec.required_obs_keys if frames]
            readable.append(episode)
        except DataError as error:
            broken.append((episode.name, "readable", str(error)))
    problems = examine(readable, spec, frames, prompt_tokens=prompt_tokens)
    rows = broken + [(name, *row) for name, found in problems.items() for row in found]
    rows = [
        dict(episode=name, rule=rule, text=text, level="warning" if is_warning(rule) else "error")
        for name, rule, text in rows
    ]
    errors, steps = sum(row["level"] == "error" for row in rows), sum(map(len, readable))
    return dict(
        spec=vars(spec), episodes=len(refs), readable=len(readable), steps=steps, seconds=steps / spec.control_freq_hz,
        tasks=sorted({task for episode in readable for task in episode.tasks}), errors=errors,
        warnings=len(rows) - errors, rules=RULES, problems=rows,
    )  # fmt: skip


def main(argv=None):
    args = parse(argv)
    pairs = named_paths(args.data)
    spec = find_spec(pairs[0][1], args.spec)
    refs = [ref for name, path in pairs for ref in list_episodes(name, path)][: args.max_episodes]
    shown = dict(unit="episode", disable=not sys.stderr.isatty())
    report = validate(refs, spec, args.frames, args.prompt_tokens, lambda items: tqdm(items, **shown))
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
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
