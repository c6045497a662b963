"""The spec: what every episode of a data set must hold."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from common import DataError


@dataclass
class DatasetSpec:
    """What every episode must hold. Units and the order of dims are the robot's."""

    name: str
    action_dim: int
    control_freq_hz: float
    required_obs_keys: list  # cameras
    required_proprio_keys: list  # vectors; concatenated in this order they are the policy's state
    version: str = "1"
    control_freq_tolerance_pct: float = 10.0
    action_names: list | None = None
    proprio_names: list | None = None  # names of the state's dims, all keys in a row; --relative pairs dims by name
    action_type: str = "absolute"  # or delta: actions are increments already
    action_min: list | None = None  # per dim, or one number for all
    action_max: list | None = None
    max_episode_steps: int | None = None
    allow_nan: bool = False
    clip_actions: bool = False  # clip recorded actions to action_min, action_max instead of refusing them

    def __post_init__(self):
        def need(good, name, expected):
            if not good:
                raise DataError(f"{name} is {getattr(self, name)!r}, expected {expected}")

        need(type(self.action_dim) is int and self.action_dim > 0, "action_dim", "a whole number above 0")
        need(is_number(self.control_freq_hz) and self.control_freq_hz > 0, "control_freq_hz", "a rate above 0")
        tolerance = self.control_freq_tolerance_pct
        need(is_number(tolerance) and tolerance >= 0, "control_freq_tolerance_pct", "a percentage")
        need(self.action_type in ("absolute", "delta"), "action_type", "absolute or delta")
        for name in ("required_obs_keys", "required_proprio_keys", "action_names", "proprio_names"):
            keys = [] if getattr(self, name) is None and name.endswith("names") else getattr(self, name)
            need(isinstance(keys, list) and all(isinstance(key, str) for key in keys), name, "a list of names")
        names = self.action_names
        need(names is None or len(names) == self.action_dim, "action_names", f"{self.action_dim} names")
        for name in ("allow_nan", "clip_actions"):
            need(isinstance(getattr(self, name), bool), name, "true or false")
        for name in ("action_min", "action_max"):
            value = getattr(self, name)
            value = [value] * self.action_dim if is_number(value) else value
            setattr(self, name, value)
            good = isinstance(value, list) and len(value) == self.action_dim and all(map(is_number, value))
            good = good or value is None
            need(good, name, f"{self.action_dim} numbers, or one for all")
        steps = self.max_episode_steps
        need(steps is None or (type(steps) is int and steps > 0), "max_episode_steps", "a whole number above 0")
        limits = self.action_min is not None and self.action_max is not None
        need(not self.clip_actions or limits, "clip_actions", "false without action_min and action_max")
        if len(self.cameras) < len(self.required_obs_keys):
            keys = ", ".join(self.required_obs_keys)
            raise DataError(f"two cameras of {keys} have one name in the policy: rename or leave out one of them")

    @property
    def names(self):
        """Names of the action dims."""
        return self.action_names or [f"action {i}" for i in range(self.action_dim)]

    @property
    def cameras(self):
        """{the policy's name of a camera, as in LeRobot's `observation.images.NAME`: key of the recording}."""
        return {key.removeprefix("images."): key for key in self.required_obs_keys}

    def clip(self, actions):
        """actions (..., A) within the limits, where clip_actions says so."""
        return np.clip(actions, self.action_min, self.action_max) if self.clip_actions else actions


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def load_spec(path):
    """DatasetSpec of a YAML or JSON file; a field that is unknown, missing or wrong is named."""
    path = Path(path)
    try:
        fields = yaml.safe_load(path.read_text())  # JSON is YAML
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not YAML or JSON ({' '.join(str(error).split())[:150]})") from None
    if not isinstance(fields, dict):
        raise DataError(f"{path}: expected fields such as `action_dim: 6`")
    known = {part.name: part for part in dataclasses.fields(DatasetSpec)}
    for name in fields:
        if name not in known:
            raise DataError(f"{path}: unknown field {name!r}; there are {', '.join(known)}")
    required = [name for name, part in known.items() if part.default is dataclasses.MISSING]
    missing = [name for name in required if name not in fields]
    if missing:
        raise DataError(f"{path}: lacks {', '.join(missing)}")
    try:
        return DatasetSpec(**fields)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
