"""The demo's world, and its data: a gripper that reaches for the block that the task names and closes on it, as npz.

Run:
  python pi05_finetune/demo.py --out runs/demo/pi05_finetune
"""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import common

METADATA = dict(version=4, episodes=240, rate=10, pixels=28, seed=0)
COLOURS = dict(red=(220, 60, 50), blue=(60, 90, 220))
SPEC = Path(__file__).resolve().parent / "specs" / "demo.yaml"
BLOCK, REACH = 0.25, 0.3  # half the side of a block; a gripper that closes within REACH of a block's middle holds it
LIMIT = 40  # steps of an episode


class World:
    """A table [-1, 1] x [-1, 1] with a gripper in the middle, a red block on the left and a blue one on the right.

    Each block lies within 0.2 of the middle of its side. So the words decide where to go, and the picture how exactly.
    With `swap` the same blocks lie there, and the instruction names the other one.

    The action (x, y, closed) is the gripper's next position and how far it closes.
    The state (x, y, closed) is the last action. `grasped` is the colour of the block that the gripper first closed on,
    "nothing" if it closed beside both, None as long as it is open.
    """

    def __init__(self, rng, swap=False):
        middle = np.array([(-0.55, 0.0), (0.55, 0.0)]) + rng.uniform(-0.2, 0.2, (2, 2))
        self.blocks = dict(zip(COLOURS, middle, strict=True))
        drawn = str(rng.choice(list(COLOURS)))
        self.target = next(colour for colour in COLOURS if (colour == drawn) != swap)
        self.task = f"pick up the {self.target} block"
        self.state, self.steps, self.grasped = np.zeros(3, np.float32), 0, None
        self.path = [self.state]

    @property
    def ended(self):
        return self.grasped is not None or self.steps >= LIMIT

    @property
    def success(self):
        return self.grasped == self.target

    def observe(self):
        """({camera: (H, W, 3) uint8}, state (3,))."""
        return dict(camera_top=self.image()), self.state

    def image(self):
        """The table from above, (pixels, pixels, 3) uint8: blocks, and a cross that shrinks as the gripper closes."""
        size, (x0, y0, closed) = METADATA["pixels"], self.state
        y, x = np.mgrid[0 : 3 * size, 0 : 3 * size] / (3 * size - 1) * 2.2 - 1.1  # three times as fine, then averaged
        image = np.full((3 * size, 3 * size, 3), 200.0)
        for colour, (bx, by) in self.blocks.items():
            image[(abs(x - bx) < BLOCK) & (abs(y - by) < BLOCK)] = COLOURS[colour]
        arm = 0.25 - 0.12 * closed
        dx, dy = abs(x - x0), abs(y - y0)
        image[((dx < 0.04) & (dy < arm)) | ((dy < 0.04) & (dx < arm))] = 20
        return np.uint8(image.reshape(size, 3, size, 3, 3).mean((1, 3)))

    def step(self, action):
        self.steps += 1
        before, self.state = self.state, np.clip(np.asarray(action, np.float32), [-1.2, -1.2, -0.2], [1.2, 1.2, 1.2])
        self.path.append(self.state)
        if self.grasped is None and before[2] < 0.5 <= self.state[2]:
            away = {c: np.abs(self.state[:2] - middle).max() for c, middle in self.blocks.items()}
            nearest = min(away, key=away.get)
            self.grasped = nearest if away[nearest] < REACH else "nothing"

    def expert(self, rng):
        """The actions (T, 3) of a demonstration: go to the named block, close, rest."""
        goal, steps = self.blocks[self.target], rng.integers(10, 15)
        s = np.arange(1, steps + 1)[:, None] / steps
        s = 10 * s**3 - 15 * s**4 + 6 * s**5  # minimum jerk
        reach = np.c_[goal * s, 0 * s]
        close = np.c_[np.tile(goal, (8, 1)), np.minimum(1, np.arange(1, 9) / 4)]
        return np.concatenate([reach, close]) + rng.normal(0, 0.005, (steps + 8, 3))


def episode(rng):
    """Arrays of one npz."""
    world = World(rng)
    actions, states, frames = world.expert(rng).astype(np.float32), [], []
    for action in actions:
        states.append(world.state)
        frames.append(world.image())
        world.step(action)
    return {
        "actions": actions,
        "timestamps": np.arange(len(actions)) / METADATA["rate"],
        "obs.joint_pos": np.stack(states),
        "obs.camera_top": np.stack(frames),
        "task": np.array(world.task),
    }


def write(folder):
    """Write the data unless it is there already, all of it or nothing. Another version is replaced, folder and all."""
    folder = Path(folder).resolve()
    metadata = folder / "demo.json"
    if metadata.exists() and common.read_json(metadata) == METADATA:
        return
    if folder.is_file() or (any(folder.glob("*")) and not metadata.exists()):
        raise common.DataError(f"{folder}: is there, and is no demo's data; give another folder")
    rng = np.random.default_rng(METADATA["seed"])
    with common.atomic(folder, folder=True) as made:
        (made / "episodes").mkdir()
        for number in range(METADATA["episodes"]):
            np.savez(made / "episodes" / f"episode_{number:03d}.npz", **episode(rng))
        shutil.copy(SPEC, made / "spec.yaml")
        (made / metadata.name).write_text(json.dumps(METADATA))


# --- how well a policy does in this world


def closed_loop(policy, rollouts, seed):
    """How often the named block is grasped, and in the same scenes the other one once it is named: {name: numbers}.

    Also six examples for a figure: (image, colour first named, {name: path (T, 3) of the gripper}).
    """
    report, worlds = dict(rollouts=rollouts, n_action_steps=policy.n_action_steps), {}
    for name, swap in (("one block named", False), ("the other named", True)):
        worlds[name] = [World(np.random.default_rng([seed, 1, i]), swap) for i in range(rollouts)]
        policy.run(worlds[name], seed)
        won = sum(world.success for world in worlds[name])
        report[name] = dict(success=won / rollouts, interval=wilson(won, rollouts))
    examples = []
    for i in range(min(6, rollouts)):
        fresh = World(np.random.default_rng([seed, 1, i]))
        examples.append((fresh.image(), fresh.target, {name: np.stack(worlds[name][i].path) for name in worlds}))
    return report, examples


def wilson(successes, count, z=1.96):
    """95 % interval of a rate."""
    rate, n = successes / count, count
    middle, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]


def summary(report):
    """One line on a closed_loop."""
    one, other = report["one block named"], report["the other named"]
    low, high = one["interval"]
    return (
        f"closed loop, {report['rollouts']} rollouts: grasps the named block in {100 * one['success']:.0f} % "
        f"({100 * low:.0f} to {100 * high:.0f}), and in the same scenes the other block, once that is named, in "
        f"{100 * other['success']:.0f} % (a policy that ignores the instruction: 50 % on average)"
    )


def main(argv=None):
    parser = common.ArgumentParser(__doc__)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; another demo's data are replaced")
    write(parser.parse_args(argv).out)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
