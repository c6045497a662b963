"""Measure the normalisation statistics of a data set's training episodes, once, and freeze them.

Run:
  python pi05_finetune/compute_norms.py --data runs/demo/pi05_finetune --out runs/norms
  python pi05_finetune/compute_norms.py --data so100=PATH --spec spec.yaml --val-episodes 56-69 --out runs/norms_so100

OUT is a folder with norms.npz (`action.q01`, `proprio.KEY.mean` ...) and metadata.json (hash of the episodes, spec,
warnings). train.py --norms takes it, and refuses it where its own training episodes are others: give both the same
--data, --spec and split. Without --norms train.py measures the same numbers itself.
"""

import fnmatch
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
from readers.dataset import data_hash, open_data, split

import common
from common import DataError

STATS = ("mean", "std", "min", "max", "q01", "q99")
RARE = 0.05  # of a dim's full range: where q01 to q99 covers less, the rest is a rare event such as a gripper's
CONSTANT = 1e-3  # of the median dim's range: where a dim moves less than that, it stands still
ABSOLUTE = "*gripper*"  # relative actions: dims that stay absolute unless others are named


@dataclass
class Norms:
    """action: {stat: (A,)}, proprio: {key: {stat: (D,)}}, metadata: of metadata.json."""

    action: dict
    proprio: dict
    metadata: dict

    @property
    def action_mean(self):
        return self.action["mean"]

    @property
    def action_std(self):
        return self.action["std"]

    @property
    def proprio_mean(self):
        return {key: stats["mean"] for key, stats in self.proprio.items()}

    @property
    def proprio_std(self):
        return {key: stats["std"] for key, stats in self.proprio.items()}

    def stats(self, spec):
        """As LeRobot's processors take them: {"observation.state": {stat: S numbers}, "action": {stat: A numbers}}."""
        missing = [key for key in spec.required_proprio_keys if key not in self.proprio]
        if missing:
            raise DataError(f"the norms lack {missing[0]}: compute_norms.py with --proprio-keys {missing[0]}, or none")
        parts = [self.proprio[key] for key in spec.required_proprio_keys]
        state = {name: np.concatenate([part[name] for part in parts]).tolist() for name in STATS}
        return {"observation.state": state, "action": {name: self.action[name].tolist() for name in STATS}}

    def check(self, episodes, chunk, state_index):
        """Raise for norms of other data, another split or another kind of action."""
        for name, value in dict(data_hash=data_hash(episodes), **stats_type(chunk, state_index)).items():
            if self.metadata.get(name) != value:
                raise DataError(
                    f"--norms: {name} is {self.metadata.get(name)}, but the training episodes of this run have "
                    f"{value}: another data set, split or --relative; run compute_norms.py with this run's flags"
                )

    def save(self, folder):
        arrays = {f"action.{name}": value for name, value in self.action.items()}
        arrays |= {f"proprio.{key}.{name}": v for key, stats in self.proprio.items() for name, v in stats.items()}
        with common.atomic(folder, folder=True) as made:
            np.savez(made / "norms.npz", **arrays)
            (made / "metadata.json").write_text(json.dumps(self.metadata, indent=1))


def load_norms(folder):
    """Norms of a folder that compute_norms.py wrote."""
    folder = Path(folder)
    try:
        metadata = json.loads((folder / "metadata.json").read_text())
        with np.load(folder / "norms.npz", allow_pickle=False) as arrays:
            arrays = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
            action = {name: arrays[f"action.{name}"] for name in STATS}
            keys = metadata["proprio_keys"]
            proprio = {key: {name: arrays[f"proprio.{key}.{name}"] for name in STATS} for key in keys}
    except Exception as error:  # numpy and zipfile raise a dozen kinds for a broken file
        reason = f"{type(error).__name__}: {str(error)[:150]}"
        raise DataError(f"{folder}: not norms.npz and metadata.json of compute_norms.py ({reason})") from None
    for name, array in [*action.items(), *(pair for stats in proprio.values() for pair in stats.items())]:
        if not np.isfinite(array).all():
            raise DataError(f"{folder}: {name} holds NaN or infinity")
    return Norms(action, proprio, metadata)


# --- relative actions


def relative_index(relative, spec, episodes):
    """None where `relative` is None. Else for each action dim the state dim that it is relative to, -1: absolute.

    relative: names of the dims that stay absolute, * is anything; [] stands for ABSOLUTE. Dims are paired by name. If
    the state's dims have no names, their order must be the actions', and the numbers must agree with it.
    """
    if relative is None:
        return None
    if spec.action_type == "delta":
        raise DataError("--relative: the spec says action_type delta, so the actions are differences already")
    if spec.action_names is None and not relative:
        raise DataError(
            "--relative: the spec has no action_names, so nothing tells which dim is a gripper and stays absolute; "
            "name the dims there, or write --relative NONE, --relative 'action 6' ..."
        )
    for word in relative:
        if word != "NONE" and not fnmatch.filter(spec.names, word):
            raise DataError(f"--relative {word}: the action dims are {', '.join(spec.names)}")
    words = [word.lower() for word in relative or [ABSOLUTE]]
    absolute = [any(fnmatch.fnmatch(name.lower(), word) for word in words) for name in spec.names]
    if spec.proprio_names and spec.action_names:
        there = spec.proprio_names
        for n in [n for n, stays in zip(spec.names, absolute, strict=True) if not stays and there.count(n) != 1]:
            found = f"{there.count(n)} dims" if n in there else "no dim"
            raise DataError(f"--relative: the state has {found} {n}, only {', '.join(there)}; name it after --relative")
        return [-1 if stays else there.index(n) for n, stays in zip(spec.names, absolute, strict=True)]
    states = np.concatenate([episode.state(spec) for episode in episodes])
    actions = np.concatenate([episode.actions for episode in episodes])
    if states.shape[1] != actions.shape[1]:
        raise DataError(
            f"--relative: {actions.shape[1]} action dims and {states.shape[1]} state dims without names cannot be "
            "paired; name the state's in the spec (proprio_names)"
        )
    for i in np.flatnonzero(~np.array(absolute)):
        away = np.nanmean(np.abs(actions[:, i : i + 1] - states), axis=0)  # of each state dim from this action dim
        if away.argmin() != i and away.min() < 0.5 * away[i]:
            raise DataError(
                f"--relative: {spec.names[i]} follows state dim {away.argmin()}, not {i}: the state's order does not "
                "fit the actions'; name its dims in the spec (proprio_names)"
            )
    return [-1 if stays else i for i, stays in enumerate(absolute)]


def stats_type(chunk, state_index):
    """What of the flags changes the statistics of the actions."""
    return dict(relative=False) if state_index is None else dict(relative=True, chunk=chunk, state_index=state_index)


def relative_actions(episode, spec, chunk, state_index):
    """What a model of relative actions predicts: action of step t + k less the state of step t; 10 values of k."""
    actions, index = episode.actions, np.array(state_index)
    offset = np.where(index < 0, 0, episode.state(spec)[:, index])
    gaps = [k for k in np.unique(np.linspace(0, chunk - 1, 10).astype(int)) if k < len(actions)]
    return np.concatenate([actions[k:] - offset[: len(actions) - k] for k in gaps])


# --- statistics


def measure(rows, names):
    """Statistics of rows (n, D), and a warning for each dim whose scale was raised to a floor.

    Policies map q01 to -1 and q99 to 1. A dim that hardly moves would turn its noise into values of hundreds, and the
    loss into thousands, so its scale is widened: to its full range, or to a small share of the other dims' range.
    """
    rows = rows[np.isfinite(rows).all(1)].astype(np.float64)
    if not len(rows):
        raise DataError("no finite step to measure statistics on")
    low, high = np.quantile(rows, [0.01, 0.99], axis=0)
    stats = dict(mean=rows.mean(0), std=rows.std(0), min=rows.min(0), max=rows.max(0), q01=low, q99=high)
    span = stats["max"] - stats["min"]
    moving = span > 1e-6 * np.maximum(1, np.abs(stats["mean"]))
    floor = CONSTANT * float(np.median(span[moving])) if moving.any() else 1.0
    warnings = []
    for i, name in enumerate(names):
        if high[i] - low[i] < RARE * span[i]:
            stats["q01"][i], stats["q99"][i] = stats["min"][i], stats["max"][i]
            warnings.append(f"{name} rarely moves: normalised by its full range {span[i]:.3g}, not by q01 to q99")
        if stats["q99"][i] - stats["q01"][i] < floor or not moving[i]:
            width = floor if moving[i] else 1.0
            stats["q01"][i], stats["q99"][i] = stats["mean"][i] - width / 2, stats["mean"][i] + width / 2
            warnings.append(f"{name} stands still (range {span[i]:.3g}): normalised by a range of {width:.3g}")
        stats["std"][i] = max(stats["std"][i], (stats["q99"][i] - stats["q01"][i]) / 100)
    return {name: value.astype(np.float32) for name, value in stats.items()}, warnings


def compute(spec, episodes, keys=None, chunk=1, state_index=None, max_episodes=None):
    """Norms over training `episodes` (the first `max_episodes` of them are measured, all of them are hashed)."""
    used = episodes[:max_episodes]
    if state_index is None:
        rows = np.concatenate([episode.actions for episode in used])
    else:
        rows = np.concatenate([relative_actions(episode, spec, chunk, state_index) for episode in used])
    action, notes = measure(rows, spec.names)
    proprio, warnings = {}, [f"action: {note}" for note in notes]
    for key in spec.required_proprio_keys if keys is None else keys:
        if key not in spec.required_proprio_keys:
            raise DataError(f"--proprio-keys {key}: the spec requires {', '.join(spec.required_proprio_keys)}")
        rows = np.concatenate([episode.vectors[key] for episode in used])
        proprio[key], notes = measure(rows, [f"dim {i}" for i in range(rows.shape[1])])
        warnings += [f"{key}: {note}" for note in notes]
    metadata = dict(
        data_hash=data_hash(episodes),
        **stats_type(chunk, state_index),
        spec=spec.name,
        proprio_keys=list(proprio),
        steps=sum(map(len, used)),
        episodes=[f"{episode.source}/{episode.id}" for episode in used],
        warnings=warnings,
    )
    return Norms(action, proprio, metadata)


def open_norms(folder, spec, train, chunk, state_index):
    """Norms of a folder, if it is of these episodes; without a folder they are measured."""
    if folder is None:
        return compute(spec, train, chunk=chunk, state_index=state_index)
    norms = load_norms(folder)
    norms.check(train, chunk, state_index)
    return norms


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--data", required=True, nargs="+", metavar="PATH", help="as in train.py")
    add("--spec", metavar="FILE", help="as in train.py")
    add("--out", required=True, metavar="DIR", help="folder to write; replaced if it holds norms")
    add("--proprio-keys", nargs="+", metavar="KEY", help="just these of the spec's required_proprio_keys")
    add("--max-episodes", help="measure the first N training episodes only", **whole)
    add("--val-share", default=0.1, type=float, metavar="X", help="as in train.py: held-out episodes are not measured")
    add("--val-episodes", nargs="+", default=[], metavar="IDS", help="as in train.py")
    add("--relative", nargs="*", metavar="NAME", help="as in train.py")
    add("--chunk", default=50, help="as in train.py; relative actions depend on it", **whole)
    args = parser.parse_args(argv)
    if not 0 <= args.val_share < 1 or min(args.chunk, 1 if args.max_episodes is None else args.max_episodes) < 1:
        parser.error("--val-share must be 0 to below 1, --chunk and --max-episodes must be above 0")
    return args


def main(argv=None):
    args = parse(argv)
    spec, episodes = open_data(args.data, args.spec)
    train, held = split(episodes, args.val_share, args.val_episodes)
    state_index = relative_index(args.relative, spec, train)
    norms = compute(spec, train, args.proprio_keys, args.chunk, state_index, args.max_episodes)
    out = Path(args.out)
    if out.is_file() or {path.name for path in out.glob("*")} - {"norms.npz", "metadata.json"}:
        raise DataError(f"--out {out}: is or holds other files; give the norms a folder of their own")
    common.make_folder(out.parent)
    norms.save(out)
    for warning in norms.metadata["warnings"]:
        print(f"warning: {warning}")
    size = f"{len(norms.metadata['episodes'])} of {len(train)} training episodes, {norms.metadata['steps']:,} steps"
    print(f"{size} ({len(held)} held out), data hash {norms.metadata['data_hash']} -> {out}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
