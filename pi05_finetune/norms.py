"""Normalisation statistics: a frozen artefact, tied by a hash to the episodes that they were measured on.

A folder with norms.npz (`action.q01`, `proprio.KEY.mean` ...) and metadata.json (hash, episodes, spec, warnings).
"""

import fnmatch
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from episodes import data_hash

STATS = ("mean", "std", "min", "max", "q01", "q99")
RARE = 0.05  # of a dim's full range: where q01 to q99 covers less, the rest is a rare event such as a gripper's
STILL = 1e-3  # of the median dim's range: where a dim moves less than that, it stands still


@dataclass
class Norms:
    """action: {stat: (A,)}, proprio: {key: {stat: (D,)}}, about: metadata.json."""

    action: dict
    proprio: dict
    about: dict

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
            raise ValueError(
                f"the norms lack {missing[0]}: compute_norms.py with --proprio-keys {missing[0]}, or without"
            )
        parts = [self.proprio[key] for key in spec.required_proprio_keys]
        state = {name: np.concatenate([part[name] for part in parts]).tolist() for name in STATS}
        return {"observation.state": state, "action": {name: self.action[name].tolist() for name in STATS}}

    def check(self, episodes, chunk, absolute):
        """Refuse norms of other data, another split or another kind of action."""
        now = dict(data_hash=data_hash(episodes), **kind(chunk, absolute))
        for name, value in now.items():
            if self.about.get(name) != value:
                raise ValueError(
                    f"--norms: {name} is {self.about.get(name)}, but the training episodes of this run have {value}: "
                    "another data set, split or --relative; run compute_norms.py with this run's flags"
                )

    def save(self, folder):
        folder = Path(folder)
        arrays = {f"action.{name}": value for name, value in self.action.items()}
        arrays |= {f"proprio.{key}.{name}": v for key, stats in self.proprio.items() for name, v in stats.items()}
        np.savez(folder / "norms.npz", **arrays)
        (folder / "metadata.json").write_text(json.dumps(self.about, indent=1))


def load_norms(folder):
    """Norms of a folder that compute_norms.py wrote."""
    folder = Path(folder)
    try:
        about = json.loads((folder / "metadata.json").read_text())
        with np.load(folder / "norms.npz", allow_pickle=False) as arrays:
            action = {name: arrays[f"action.{name}"] for name in STATS}
            keys = about["proprio_keys"]
            proprio = {key: {name: arrays[f"proprio.{key}.{name}"] for name in STATS} for key in keys}
    except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{folder}: not norms.npz and metadata.json of compute_norms.py ({error})") from None
    return Norms(action, proprio, about)


def kind(chunk, absolute):
    """What of the flags changes the statistics of the actions."""
    return dict(relative=absolute is not None) | (dict(chunk=chunk, absolute=absolute) if absolute is not None else {})


def absolute_dims(args, spec):
    """None without --relative; else the dims whose actions stay absolute. * in a name stands for anything."""
    if not args.relative:
        return None
    words = ["*gripper*"] if args.absolute is None else args.absolute
    for word in args.absolute or []:
        if not fnmatch.filter(spec.names, word):
            raise ValueError(f"--absolute {word}: the action dims are {', '.join(spec.names)}")
    return [
        i for i, name in enumerate(spec.names) if any(fnmatch.fnmatch(name.lower(), word.lower()) for word in words)
    ]


def relative_actions(episode, spec, chunk, absolute):
    """What a model of relative actions predicts: action of step t + k less the state of step t; 10 values of k."""
    actions, state = episode.actions, episode.state(spec)[:, : spec.action_dim].copy()
    state[:, absolute] = 0
    gaps = [k for k in np.unique(np.linspace(0, chunk - 1, 10).astype(int)) if k < len(actions)]
    return np.concatenate([actions[k:] - state[: len(actions) - k] for k in gaps])


def measure(rows, names):
    """Statistics of rows (n, D), and a warning for each dim whose scale was raised to a floor.

    Policies map q01 to -1 and q99 to 1. A dim that hardly moves would turn its noise into values of hundreds, and the
    loss into thousands, so its scale is widened: to its full range, or to a small share of the other dims' range.
    """
    rows = rows[np.isfinite(rows).all(1)].astype(np.float64)
    if not len(rows):
        raise ValueError("no finite step to measure statistics on")
    low, high = np.quantile(rows, [0.01, 0.99], axis=0)
    stats = dict(mean=rows.mean(0), std=rows.std(0), min=rows.min(0), max=rows.max(0), q01=low, q99=high)
    span = stats["max"] - stats["min"]
    moving = span > 1e-6 * np.maximum(1, np.abs(stats["mean"]))
    floor = STILL * float(np.median(span[moving])) if moving.any() else 1.0
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


def compute(spec, episodes, keys=None, chunk=1, absolute=None, max_episodes=None):
    """Norms over training `episodes` (the first `max_episodes` of them are measured, all of them are hashed)."""
    used, warnings = episodes[:max_episodes], []
    if absolute is None:
        rows = np.concatenate([episode.actions for episode in used])
    else:
        rows = np.concatenate([relative_actions(episode, spec, chunk, absolute) for episode in used])
    action, notes = measure(rows, spec.names)
    warnings += [f"action: {note}" for note in notes]
    proprio = {}
    for key in spec.required_proprio_keys if keys is None else keys:
        if key not in spec.required_proprio_keys:
            raise ValueError(f"--proprio-keys {key}: the spec requires {', '.join(spec.required_proprio_keys)}")
        rows = np.concatenate([episode.vectors[key] for episode in used])
        proprio[key], notes = measure(rows, [f"dim {i}" for i in range(rows.shape[1])])
        warnings += [f"{key}: {note}" for note in notes]
    about = dict(
        data_hash=data_hash(episodes),
        **kind(chunk, absolute),
        spec=spec.name,
        proprio_keys=list(proprio),
        steps=sum(map(len, used)),
        episodes=[f"{episode.source}/{episode.id}" for episode in used],
        warnings=warnings,
    )
    return Norms(action, proprio, about)
