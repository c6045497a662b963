"""Write the demo data: 40 episodes of a gripper that goes to the block that the task names, with a camera, as npz.

Run:
  python pi05_finetune/demo.py --out runs/demo/pi05_finetune
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import numpy as np

ABOUT = dict(version=1, episodes=40, rate=10, pixels=56, seed=0)
COLOURS = dict(red=(220, 60, 50), blue=(60, 90, 220))
SPEC = Path(__file__).resolve().parent / "specs" / "demo.yaml"


def draw(hand, grip, blocks):
    """The table from above, (pixels, pixels, 3) uint8: two blocks, and a ring that gets small as the gripper closes."""
    size = ABOUT["pixels"]
    y, x = np.mgrid[0:size, 0:size] / (size - 1) * 2.4 - 1.2
    image = np.full((size, size, 3), 200, np.uint8)
    for colour, (bx, by) in blocks.items():
        image[(abs(x - bx) < 0.16) & (abs(y - by) < 0.16)] = COLOURS[colour]
    distance = np.hypot(x - hand[0], y - hand[1])
    image[(distance < 0.3 - 0.12 * grip) & (distance > 0.18 - 0.12 * grip)] = 20
    return image


def episode(rng):
    """Rest, go to the named block, close, come back: arrays of one npz. The state follows the action by one step."""
    blocks = dict(zip(COLOURS, rng.uniform(-1, 1, (2, 2)), strict=True))
    colour = rng.choice(list(COLOURS))
    rest = rng.uniform(-0.3, 0.3, 2)
    points, grips = [rest, blocks[colour], blocks[colour], rest], [0, 0, 1, 1]
    actions = []
    for a, b, before, after in zip(points[:-1], points[1:], grips[:-1], grips[1:], strict=True):
        s = np.arange(1, 1 + rng.integers(10, 15))[:, None]
        s = s / len(s)
        s = 10 * s**3 - 15 * s**4 + 6 * s**5  # minimum jerk
        actions.append(np.c_[a + (b - a) * s, before + (after - before) * s])
    actions = np.concatenate(actions)
    actions = actions + rng.normal(0, 0.005, actions.shape)
    state = np.concatenate([[[*rest, 0]], actions[:-1]])
    frames = np.stack([draw(row[:2], row[2], blocks) for row in state])
    return {
        "actions": actions.astype(np.float32),
        "timestamps": np.arange(len(actions)) / ABOUT["rate"],
        "obs.joint_pos": state.astype(np.float32),
        "obs.camera_top": frames,
        "task": np.array(f"pick up the {colour} block"),
    }


def write(folder):
    """Write the data unless it is there already. A half-written folder is never left behind."""
    folder = Path(folder)
    about = folder / "demo.json"
    if about.exists() and json.loads(about.read_text()) == ABOUT:
        return
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")  # two first starts at once
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "episodes").mkdir(parents=True)
    rng = np.random.default_rng(ABOUT["seed"])
    for number in range(ABOUT["episodes"]):
        np.savez(temporary / "episodes" / f"episode_{number:03d}.npz", **episode(rng))
    shutil.copy(SPEC, temporary / "spec.yaml")
    (temporary / about.name).write_text(json.dumps(ABOUT))
    shutil.rmtree(folder, ignore_errors=True)
    try:
        temporary.rename(folder)
    except OSError:  # the other start was faster, its data is the same
        shutil.rmtree(temporary)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder to write; replaced if it holds another demo's data"
    )
    write(parser.parse_args().out)
