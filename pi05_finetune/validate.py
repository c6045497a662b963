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
    args = parser.parse_args(argv)
    if args.frames < 0 or (args.max_episodes is not None and args.max_episodes < 1):
        parser.error("--frames must not be negative, --max-episodes must be above 0")
    return args


# --- one episode: each function yields (rule, text)


def check_steps(episode, spec):
    """Its numbers and its task."""
    times, T = episode.timestamps, len(episode)
    gaps = np.diff(times)
    if T < 2:
        yield "length", "one step only: nothing to learn a motion from"
    if spec.max_episode_steps is not None and T > spec.max_episode_steps:
        yield "length", f"{T} steps, but the spec allows {spec.max_episode_steps}"
    if not np.isfinite(times).all() or (gaps <= 0).any():
        at = int(np.argmax(~(gaps > 0))) + 1
        yield "boundaries", f"timestamps do not rise at step {at}: two episodes in one, or a clock set back"
    elif T > 1:
        rate = 1 / float(np.median(gaps))
        if abs(rate / spec.control_freq_hz - 1) * 100 > spec.control_freq_tolerance_pct:
            expected = f"{spec.control_freq_hz:g} Hz +- {spec.control_freq_tolerance_pct:g} %"
            yield "rate", f"timestamps tell {rate:.4g} Hz, but the spec says {expected} (are they in seconds?)"
        if gaps.max() > 3 * float(np.median(gaps)):
            at = int(gaps.argmax())
            yield "boundaries", f"{gaps.max():.3f} s pass between steps {at} and {at + 1}: frames were lost"
    for limit, outside in ((spec.action_min, np.less), (spec.action_max, np.greater)):
        if limit is not None:
            beyond = outside(episode.actions, np.asarray(limit, np.float32))
            for dim in np.flatnonzero(beyond.any(0)):
                step = int(beyond[:, dim].argmax())
                value, count = episode.actions[step, dim], int(beyond[:, dim].sum())
                text = f"{spec.names[dim]} is {value:.4g} at step {step}, the limit is {limit[dim]:g} ({count} steps)"
                yield "range", text
    if not all(task.strip() for task in episode.tasks):
        yield "task", "no task text: Pi05 is told what to do in words"


def sample_frames(episode, key, count):
    steps = np.unique(np.linspace(0, len(episode) - 1, count).astype(int))
    return [np.asarray(episode.frames[key][int(i)]).astype(np.float32) for i in steps]


def check_camera(key, seen):
    """One camera, by frames spread over the episode."""
    plain = sum(float(image.std()) < 2 for image in seen)
    if len(seen) > 1 and max(np.abs(a - seen[0]).mean() for a in seen[1:]) < 0.25:
        yield "frozen", f"{key}: {len(seen)} frames spread over the episode are the same picture"
    elif plain > max(0.2 * len(seen), min(1, len(seen) - 1)):  # one frame, such as the first, may be dark
        yield "frozen", f"{key}: {plain} of {len(seen)} frames are of one colour (covered lens, lost frames)"


# --- all episodes: each function yields (episode or "all", rule, text)


def check_duplicates(episodes):
    seen = {}
    for episode in episodes:
        first = seen.setdefault(episode.actions.tobytes(), episode.name)
        if first != episode.name:
            yield episode.name, "duplicate", f"the same actions as {first}"


def check_motion(episodes, spec):
    """Joints that stand still, jumps, and episodes in another unit."""
    rows = np.concatenate([episode.actions for episode in episodes])
    low, high = np.nanquantile(rows, [0.01, 0.99], axis=0)
    span = np.nanmax(rows, 0) - np.nanmin(rows, 0)
    for i in np.flatnonzero(span <= CONSTANT * np.median(span)):
        text = f"hardly moves: a range of {span[i]:.3g} over all episodes (others have {np.median(span):.3g})"
        yield "all", "constant", f"{spec.names[i]} {text}"
    reach = np.stack([np.nanmax(np.abs(episode.actions), 0) for episode in episodes])
    usual = np.median(reach, 0) + 1e-9
    for episode, ratio in zip(episodes, np.median(reach / usual, 1), strict=True):
        if len(episodes) > 2 and not 1 / 20 < ratio < 20:
            text = f"actions are {ratio:.3g} times as large as in the other episodes: another unit?"
            yield episode.name, "scale", text
    for episode in episodes if spec.action_type == "absolute" else []:
        step = np.abs(np.diff(episode.actions, axis=0)) / np.maximum(high - low, 1e-9)
        far = (step > 0.5) & (high - low > 0.05 * span)  # a gripper that only opens and closes is no jump
        ends = (episode.actions < low + 0.02 * span) | (episode.actions > high - 0.02 * span)
        far &= ~(ends[1:] & ends[:-1])
        if far.any():
            at, dim = np.argwhere(far)[0]
            before, after = episode.actions[at, dim], episode.actions[at + 1, dim]
            text = f"{spec.names[dim]} jumps by {after - before:.4g}, from {before:.6g} to {after:.6g}"
            yield episode.name, "jump", f"{text} at step {at + 1} ({int(far.sum())} such)"


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
    long = [(e.name, e.actions, e.state(spec)) for e in episodes if len(e) > 10]
    if not pairs or not long:
        return
    a, s = np.array(pairs).T
    fits = np.nan_to_num(np.stack([correlate(actions[:-1], state[1:]) for _, actions, state in long]))
    usual = np.median(fits, 0)  # A S, correlation of each action dim with each state dim one step later
    paired = usual[a, s]
    for (i, j), fit in zip(pairs, paired, strict=True):
        name, best = spec.names[i], int(usual[i].argmax())
        if fit < -0.8:
            yield "all", "pairing", f"{name} moves against the state: inverted?"
        if usual[i, best] > 0.9 > fit + 0.3 and usual[:, best].argmax() == i:
            yield "all", "pairing", f"{name} goes with state dim {best}, not {j}: swapped?"
        for (episode, _, _), own in zip(long, fits, strict=True):
            if fit > 0.8 and own[i, j] < -0.5:
                yield episode, "pairing", f"{name} moves against the state, in the other episodes with it: inverted?"
    moves = [correlate(actions[:-1], np.diff(state, axis=0)) for _, actions, state in long]
    moves = np.median(np.nan_to_num(np.stack(moves)), 0)[a, s]
    if ((moves > 0.8) & (paired < 0.5)).mean() > 0.5:
        yield "all", "pairing", "actions go with the state's differences, not with the state: action_type delta?"

    def away(lag):
        """Mean distance of each action dim from the state `lag` steps later."""
        parts = [np.abs(x[1:-2][:, a] - state[1 + lag : len(x) - 2 + lag][:, s]) for _, x, state in long]
        return np.concatenate(parts).mean(0)

    spread, of_state = (np.concatenate([row[k] for row in long]).std(0)[d] + 1e-9 for k, d in ((1, a), (2, s)))
    later = away(1)
    if ((np.minimum(away(-1), away(0)) < 0.8 * later) & (later > 1e-6 * spread)).mean() > 0.5:
        text = "actions repeat the state of the same or an earlier step, and do not lead it: shifted in time?"
        yield "all", "pairing", text
    ratio = np.median(spread / of_state)
    if (paired > 0.8).mean() > 0.5 and not 1 / 20 < ratio < 20:
        yield "all", "scale", f"actions span {ratio:.3g} times what the state spans: degrees?"


def correlate(a, b):
    """Columns of a (T, A) with columns of b (T, D) -> (A, D); NaN for a constant column."""
    a, b = (x - x.mean(0) for x in (a.astype(np.float64), b.astype(np.float64)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a.T @ b) / np.sqrt(np.outer(np.square(a).sum(0), np.square(b).sum(0)))


def check_camera_names(thumbnails):
    """Episodes whose camera shows something else. thumbnails: {episode: {camera: mean frame (8, 8, 3)}}.

    Scenes differ, so a view is compared with those of the quarter of the other episodes that it is most like.
    """
    if len(thumbnails) < 3:
        return

    def away(name, view, camera):
        sizes = sorted(np.abs(view - views[camera]).mean() for other, views in thumbnails.items() if other != name)
        return sizes[min(len(thumbnails) // 4, len(sizes) - 1)]

    for name, views in thumbnails.items():
        for camera, seen in views.items():
            others = {f"looks like {other} does there": away(name, seen, other) for other in views if other != camera}
            others["has red and blue exchanged"] = away(name, seen[..., ::-1], camera)
            others["is upside down"] = away(name, seen[::-1], camera)
            best, mine = min(others, key=others.get), away(name, seen, camera)
            if others[best] < 0.5 * mine and mine > 4:
                yield name, "camera", f"{camera} {best}, against the other episodes"


def thumbnail(frames):
    """Mean of frames (H, W, 3) by 8 x 8 blocks."""
    mean = np.mean(frames, 0)
    rows, columns = (np.linspace(0, side, 9).astype(int)[:-1] for side in mean.shape[:2])
    blocks = np.add.reduceat(np.add.reduceat(mean, rows, 0), columns, 1)
    return blocks / (mean.shape[0] * mean.shape[1] / 64)


# --- the whole


def examine(episodes, spec, frames, look_at=None):
    """[(episode or "all", rule, text)]. `frames` of each camera are read in `look_at` episodes, spread over the set."""
    found, thumbnails = [], {}
    looked = np.unique(np.linspace(0, len(episodes) - 1, min(look_at or len(episodes), len(episodes))).astype(int))
    for number, episode in enumerate(episodes):
        own = [*check_steps(episode, spec), *(("repaired", note) for note in episode.notes)]
        for key in spec.required_obs_keys if frames and number in looked else []:
            seen = sample_frames(episode, key, frames)
            own += check_camera(key, seen)
            thumbnails.setdefault(episode.name, {})[key] = thumbnail(seen)
        found += [(episode.name, *row) for row in own]
    if episodes:
        found += [*check_duplicates(episodes), *check_motion(episodes, spec), *check_camera_names(thumbnails)]
        found += check_pairing(episodes, spec)
    return found


def is_warning(rule):
    return RULES[rule].startswith("(warning)")


def check(episodes, spec):
    """For training: raise the first error, and return the warnings as lines."""
    rows = examine(episodes, spec, frames=4, look_at=24)
    rows.sort(key=lambda row: row[0] != "all")  # what holds for every episode comes first
    errors = [row for row in rows if not is_warning(row[1])]
    if errors:
        name, rule, text = errors[0]
        more = f"{len(errors)} such problems; validate.py lists them" if len(errors) > 1 else "see validate.py"
        raise DataError(f"{name}: {rule}: {text} ({more})")
    warnings = [f"warning: {name}: {rule}: {text}" for name, rule, text in rows if rule != "repaired"]
    return warnings[:5] + [f"... {len(warnings)} warnings; validate.py lists them"] * (len(warnings) > 5)


def read(refs, spec, frames):
    """(episodes that can be read, [(episode, rule, text)] of the others)."""
    episodes, broken = [], []
    for ref in tqdm(refs, unit="episode", disable=not sys.stderr.isatty()):
        try:
            episode = check_episode(ref.load(spec), spec, *episodes[:1])
            for key in spec.required_obs_keys if frames else []:
                sample_frames(episode, key, 2)  # a video that ends early shows only when it is read
            episodes.append(episode)
        except DataError as error:
            rule = "missing" if isinstance(error, MissingFile) else "readable"
            broken.append((f"{ref.source}, episode {ref.id}", rule, str(error)))
    return episodes, broken


def main(argv=None):
    args = parse(argv)
    pairs = named_paths(args.data)
    spec = find_spec(pairs[0][1], args.spec)
    refs = [ref for name, path in pairs for ref in list_episodes(name, path)][: args.max_episodes]
    episodes, rows = read(refs, spec, args.frames)
    rows += examine(episodes, spec, args.frames)
    levels = {rule: "warning" if is_warning(rule) else "error" for rule in RULES}
    problems = [dict(episode=name, rule=rule, text=text, level=levels[rule]) for name, rule, text in rows]
    errors, steps = sum(row["level"] == "error" for row in problems), sum(map(len, episodes))
    report = dict(
        spec=vars(spec), episodes=len(refs), readable=len(episodes), steps=steps, seconds=steps / spec.control_freq_hz,
        tasks=sorted({task for episode in episodes for task in episode.tasks}), errors=errors,
        warnings=len(problems) - errors, rules=RULES, problems=problems,
    )  # fmt: skip
    common.make_folder(Path(args.report).parent, "--report")
    with common.atomic(args.report) as path:
        path.write_text(json.dumps(report, indent=1, default=str))
    for rule in RULES:
        some = [row for row in problems if row["rule"] == rule]
        for row in some[:5]:
            print(f"{row['level']}: {row['episode']}: {rule}: {row['text']}")
        if len(some) > 5:
            print(f"... {len(some)} such problems in all: see {args.report}")
    size = f"{len(episodes)} of {len(refs)} episodes readable, {steps:,} steps"
    print(f"{spec.name}: {size}, {errors} errors, {report['warnings']} warnings -> {args.report}")
    return 1 if errors or not episodes else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
