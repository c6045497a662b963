"""Which mistakes pi05_finetune finds before step 10, and by which message; and what it says of clean data.

Run:
  python tests/bench/pi05_mistakes.py

Each mistake is made in recordings of an arm that is written here (12 episodes, two cameras), then train.py runs for 10
steps. Found: it stops, or prints a warning. The real sets beside the checkout (../shared/data) count as clean too.
"""

import contextlib
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import yaml
from timing import ROOT, load

pi05 = load("pi05_finetune", "validate", "compute_norms", "readers.dataset", "demo")
main = pi05.train.main
dataset = vars(pi05)["readers.dataset"]
NAMES = ["x", "y", "z", "gripper"]
SPEC = dict(
    name="arm", action_dim=4, control_freq_hz=10, required_obs_keys=["top", "wrist"], required_proprio_keys=["joints"],
    action_names=NAMES, proprio_names=NAMES,
)  # fmt: skip


def episode(number):
    """An arm that goes from one random point to the next; its state follows the commands."""
    rng = np.random.default_rng(number)
    points, closed = rng.uniform(-1, 1, (5, 3)), rng.integers(0, 2, 5)
    goal = np.repeat(np.c_[points, closed], 12, axis=0)
    actions, state = [], [goal[0]]
    for t in range(len(goal)):
        actions.append(state[-1] + np.clip(goal[t] - state[-1], -0.25, 0.25))
        state.append(state[-1] + 0.7 * (actions[-1] - state[-1]) + rng.normal(0, 0.003, 4))
    state = np.array(state[:-1])
    y, x = np.mgrid[0:28, 0:28] / 13.5 - 1
    top = np.stack([np.where(np.hypot(x - s[0], y - s[1]) < 0.3, 20, 90 + 60 * y) for s in state])
    wrist = np.stack([120 + 90 * np.sin(5 * x + 9 * s[2]) for s in state])
    top, wrist = np.stack([top + 40, top, top - 30], -1), np.stack([wrist * 0.3, wrist * 0.5, wrist], -1)
    task = ["put the cup on the plate", "open the drawer"][number % 2]
    arrays = dict(actions=np.float32(actions), timestamps=np.arange(len(goal)) / 10, task=np.array(task))
    top, wrist = (np.uint8(images.clip(0, 255)) for images in (top, wrist))
    return arrays | {"obs.joints": np.float32(state), "obs.top": top, "obs.wrist": wrist}


def some(*numbers, **changes):
    """A mistake in the named episodes (all, if none is named): function(arrays) -> changes."""

    def apply(episodes, folder):
        for number, arrays in enumerate(episodes):
            if not numbers or number in numbers:
                for name, change in changes.items():
                    name = name.replace("obs_", "obs.")
                    arrays[name] = change(arrays, arrays[name])
        return []

    return apply


def columns(order, signs=(1, 1, 1, 1)):
    return lambda arrays, value: value[:, list(order)] * np.float32(signs)


def blackened(arrays, value):
    value = value.copy()
    value[::2] = 0
    return value


def swap_cameras(episodes, folder):
    for arrays in episodes[2:5]:
        arrays["obs.top"], arrays["obs.wrist"] = arrays["obs.wrist"], arrays["obs.top"]
    return []


def duplicate(episodes, folder):
    episodes[7] = dict(episodes[3])
    return []


def shuffle_tasks(episodes, folder):
    tasks = np.random.default_rng(1).permutation([str(arrays["task"]) for arrays in episodes])
    for arrays, task in zip(episodes, tasks, strict=True):
        arrays["task"] = np.array(task)
    return []


def norms(factor, stale):
    """Norms of the data as they were before an episode was recorded anew, or with another scale."""

    def apply(episodes, folder):
        write(folder / "before", episodes)
        words = ["--data", f"arm={folder / 'before'}", "--out", str(folder / "norms")]
        with contextlib.redirect_stdout(io.StringIO()):
            pi05.compute_norms.main(words)
        if stale:
            episodes[0] = episode(99)
        arrays = dict(np.load(folder / "norms" / "norms.npz"))
        arrays = {name: value * factor if name.startswith("action") else value for name, value in arrays.items()}
        np.savez(folder / "norms" / "norms.npz", **arrays)
        return ["--norms", str(folder / "norms")]

    return apply


def differences(arrays, value):
    return np.diff(arrays["obs.joints"], axis=0, append=arrays["obs.joints"][-1:])


MISTAKES = {
    "cameras swapped in 3 of 12 episodes": swap_cameras,
    "red and blue exchanged in 3 episodes": some(2, 3, 4, obs_top=lambda a, v: v[..., ::-1].copy()),
    "a camera upside down in 3 episodes": some(2, 3, 4, obs_top=lambda a, v: v[:, ::-1].copy()),
    "a frozen camera in one episode": some(4, obs_wrist=lambda a, v: np.repeat(v[:1], len(v), 0)),
    "half of the frames black": some(4, obs_top=blackened),
    "two action dims swapped": some(actions=columns([1, 0, 2, 3])),
    "gripper inverted": some(actions=columns([0, 1, 2, 3], [1, 1, 1, -1])),
    "gripper inverted in one episode": some(5, actions=columns([0, 1, 2, 3], [1, 1, 1, -1])),
    "commands in degrees, state in radians": some(actions=lambda a, v: np.float32(v * 57.3)),
    "one episode in degrees": some(5, actions=lambda a, v: np.float32(v * 57.3), obs_joints=lambda a, v: v * 57.3),
    "actions one step late": some(actions=lambda a, v: np.concatenate([v[:1], v[:-1]])),
    "differences called absolute": some(actions=differences),
    "instructions shuffled": shuffle_tasks,
    "an empty instruction": some(3, task=lambda a, v: np.array("")),
    "an instruction too long for the prompt": some(3, task=lambda a, v: np.array("put 1 " * 30)),
    "recorded at 15 Hz, called 10": some(timestamps=lambda a, v: v / 1.5),
    "frames lost": some(3, timestamps=lambda a, v: v + (np.arange(len(v)) > 30)),
    "NaN in the state": some(3, obs_joints=lambda a, v: np.where(np.arange(len(v))[:, None] == 9, np.nan, v)),
    "an episode twice": duplicate,
    "stale norms": norms(1, True),
    "norms of another scale": norms(0.01, False),
    "a dead joint": some(actions=columns([0, 1, 2, 3], [1, 1, 0, 1])),
}


def write(folder, episodes):
    (folder / "episodes").mkdir(parents=True)
    (folder / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    for number, arrays in enumerate(episodes):
        np.savez(folder / "episodes" / f"ep{number:02d}.npz", **arrays)


def said(words):
    """What train.py says of the data in 10 steps: the line that stops it, or its warnings."""
    out = io.StringIO()
    sizes = "--size tiny --image-size 28 --chunk 5 --prompt-tokens 80 --batch-size 8 --device cpu"
    times = "--steps 10 --eval-every 10 --log-every 5 --lr 1e-3 --warmup 2"
    try:
        with contextlib.redirect_stdout(out):
            main([*words, *sizes.split(), *times.split()])
    except pi05.train.common.DataError as error:
        return [f"stops: {error}"]
    return [line for line in out.getvalue().splitlines() if line.startswith("warning: ") and "norms:" not in line]


def test(apply=None):
    with tempfile.TemporaryDirectory() as folder:
        folder, episodes = Path(folder), [episode(number) for number in range(12)]
        more = apply(episodes, folder) if apply else []
        write(folder / "arm", episodes)
        lines = said(["--data", f"arm={folder / 'arm'}", "--out", str(folder / "run"), *more])
        return [line.replace(f"{folder}/", "") for line in lines]


def clean(path):
    """Warnings and errors on a real set, of the rules that tell mistakes; jumps and dead joints are in the data."""
    spec, episodes = dataset.open_data([str(path)], say=str)
    rules = {"missing", "repaired", "constant", "jump"}
    rows = pi05.validate.examine(episodes, spec, 4, 24)
    return [f"{rule}: {text}" for _, rule, text in rows if rule not in rules]


def report():
    found = {name: test(apply) for name, apply in MISTAKES.items()}
    print("\n| mistake | message |\n| --- | --- |")
    for name, lines in found.items():
        print(f"| {name} | {(lines or ['not found'])[0][:150]} |")
    print(f"\n{sum(map(bool, found.values()))} of {len(found)} are found before step 10")
    alarms = {"the arm": test()}
    with tempfile.TemporaryDirectory() as folder:
        pi05.demo.write(Path(folder) / "demo")
        alarms["demo"] = clean(Path(folder) / "demo")
    real = ROOT.parent / "shared" / "data"
    for name in ("g1_lerobot_v21/original", "g1_lerobot_v21/converted/lerobot_v30", "reachy2_lerobot_v30/converted"):
        if (real / name).exists():
            alarms[name] = clean(real / name)
    print(f"false alarms on {len(alarms)} clean sets: {json.dumps({k: v for k, v in alarms.items() if v}) or 0}")


if __name__ == "__main__":
    report()
