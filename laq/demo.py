"""Write the demo data: clips of a table on which a dark disc moves in 8 directions and pushes coloured ones, as shards.

Run:
  python laq/demo.py --out runs/demo/laq
  python laq/demo.py --out runs/demo/laq_distractors --distractors
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
from shards import key_of, npy, write_shard

import common

ABOUT = dict(version=1, episodes=240, length=24, pixels=32, fps=5, seed=0)
STEP, RADIUS, REACH = 0.1, 0.1, 0.08  # of the image's side: one move, a block's radius, the effector's
COLOURS = np.array([[0.85, 0.25, 0.2], [0.2, 0.65, 0.3], [0.25, 0.4, 0.85]])
ANGLES = np.arange(8) * np.pi / 4
MOVES = STEP * np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)  # right, down-right, down ...: y grows downwards


def draw(image, centre, radius, colour):
    """A disc with a soft edge on `image` (H, W, 3), in place."""
    size = len(image)
    grid = (np.arange(size) + 0.5) / size
    distance = np.hypot(grid[None] - centre[0], grid[:, None] - centre[1])
    cover = np.clip((radius - distance) * size + 0.5, 0, 1)[..., None]
    image += cover * (colour - image)


def push(blocks, effector):
    """Blocks (n, 2) that the effector overlaps move out of its way and stay on the table."""
    away = blocks - effector
    distance = np.maximum(np.linalg.norm(away, axis=1, keepdims=True), 1e-6)
    deep = np.maximum(RADIUS + REACH - distance, 0)
    return np.clip(blocks + away / distance * deep, RADIUS, 1 - RADIUS)


def episode(rng, distractors):
    """Frames (T, H, W, 3) uint8, actions (T, 2): the effector's move from frame t to t + 1, state (T, 2): where it is.

    distractors: two pale discs drift about on their own and the camera shakes by up to a pixel.
    """
    T, size = ABOUT["length"], ABOUT["pixels"]
    corners = rng.uniform(0.6, 0.95, (2, 3))
    ramp = np.linspace(0, 1, size)[:, None, None]
    table = np.broadcast_to(corners[0] + ramp * (corners[1] - corners[0]), (size, size, 3))
    effector, blocks = rng.uniform(0.15, 0.85, 2), rng.uniform(RADIUS, 1 - RADIUS, (3, 2))
    others, drift = rng.uniform(0.1, 0.9, (2, 2)), rng.normal(0, STEP / 1.5, (2, 2))
    frames, actions, states, move = [], [], [], None
    for _ in range(T):
        image = table.copy()
        for block, colour in zip(blocks, COLOURS, strict=True):
            draw(image, block, RADIUS, colour)
        for other in others if distractors else ():
            draw(image, other, REACH, np.array([0.5, 0.45, 0.6]))
        draw(image, effector, REACH, np.array([0.05, 0.05, 0.08]))
        image = np.roll(image, rng.integers(-1, 2, 2), (0, 1)) if distractors else image
        inside = [m for m in MOVES if ((effector + m > 0.1) & (effector + m < 0.9)).all()]
        if move is None or rng.random() < 0.4 or not any((m == move).all() for m in inside):
            move = inside[rng.integers(len(inside))]
        frames.append((image * 255).round().astype(np.uint8))
        actions.append(move)
        states.append(effector)
        effector = effector + move
        blocks = push(blocks, effector)
        others = others + drift
        drift = np.where((others < 0.1) | (others > 0.9), -drift, drift)
    return np.stack(frames), np.float32(actions), np.float32(states)


def samples(numbers, distractors):
    for number in numbers:
        rng = np.random.default_rng([ABOUT["seed"], number])
        frames, actions, state = episode(rng, distractors)
        about = dict(instruction="push the blocks about", fps=ABOUT["fps"], source="demo", episode=f"{number:04d}")
        about |= dict(camera="top", length=len(frames), actions="delta")
        yield {
            "__key__": key_of("demo", about["episode"], "top"),
            "json": json.dumps(about).encode(),
            "frames.npy": npy(frames),
            "actions.npy": npy(actions),
            "state.npy": npy(state),
        }


def write(folder, distractors=False):
    """Write the data unless it is there already, all of it or nothing. Another version is replaced, folder and all."""
    folder, what = Path(folder).resolve(), ABOUT | dict(distractors=distractors)
    about = folder / "demo.json"
    if about.exists() and common.read_json(about) == what:
        return
    if folder.is_file() or (any(folder.glob("*")) and not about.exists()):
        raise common.DataError(f"{folder}: is there, and is no demo's data; give another folder")
    with common.atomic(folder, folder=True) as temporary:
        for shard, numbers in enumerate(np.array_split(range(ABOUT["episodes"]), 4)):
            write_shard(temporary / f"shard-{shard:06d}.tar", samples(numbers, distractors))
        (temporary / about.name).write_text(json.dumps(what))


def main(argv=None):
    parser = common.ArgumentParser(__doc__)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; another demo's data are replaced")
    parser.add_argument("--distractors", action="store_true", help="other things move too, and the camera shakes")
    args = parser.parse_args(argv)
    write(args.out, args.distractors)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
