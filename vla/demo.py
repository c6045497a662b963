"""Write the demo data: videos of one robot on a tabletop, labelled demonstrations of another, a tiny model.

Run:
  python vla/demo.py --out runs/demo/vla
  python vla/demo.py --out runs/big --videos 1500 --body light

OUT: shards of videos (body A; their actions are left out unless --with-actions), labels/ (latent actions), robot/
(shards of labelled demonstrations, body B), backbone/ (sim/tiny.py). The labels are a stand-in for those of a trained
tokenizer: the effector's true motion plus noise, quantised by k-means. They show the interface and the effect, and
prove nothing about pixels.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
from shards import npy, npz, write_shard
from sim import tabletop
from sim.tiny import build

import common

DEFAULT = dict(videos=300, demonstrations=100, body="disc", pixels=32, fps=5, seed=0)
VERSION, GAP, NOISE = 4, 4, 0.3  # frames between a pair; the labels' noise, of their spread: R2 about 0.92


def successes(count, seed, body, pixels):
    """`count` successful episodes of the noisy expert (tabletop.record), the same for the same seed."""
    found, first = [], 0
    while len(found) < count:
        seeds = [(seed, first + i) for i in range(100)]
        found += [episode for episode in tabletop.record(seeds, body, pixels) if episode["success"]]
        first += 100
    return found[:count]


def kmeans(points, count, rng, rounds=20):
    """`count` centres (count, D) of points (n, D), from a k-means++ start."""
    centres = points[rng.integers(len(points))][None]
    while len(centres) < count:
        distance = np.square(points[:, None] - centres).sum(2).min(1)
        centres = np.r_[centres, points[rng.choice(len(points), p=distance / distance.sum())][None]]
    for _ in range(rounds):
        nearest = np.square(points[:, None] - centres).sum(2).argmin(1)
        centres = np.stack([points[nearest == k].mean(0) if (nearest == k).any() else centres[k] for k in range(count)])
    return centres.astype(np.float32)


def label(episodes, rng, vocabulary=8):
    """[(codes (T', 2), vectors (T', 2, 2))], codebook (vocabulary, 2): noisy motion in each half of the gap."""
    half, vectors = GAP // 2, []
    for episode in episodes:
        moved = episode["state"][half:] - episode["state"][:-half]
        vectors.append(np.stack([moved[: -half or None], moved[half:]], 1))
    spread = np.concatenate(vectors).reshape(-1, 2).std(0)
    vectors = [np.float32(v + rng.normal(size=v.shape) * NOISE * spread) for v in vectors]
    flat = np.concatenate(vectors).reshape(-1, 2)
    centres = kmeans(flat[rng.permutation(len(flat))[:2000]], vocabulary, rng)
    return [(np.square(v[:, :, None] - centres).sum(3).argmin(2), v) for v in vectors], centres


def samples(episodes, source, fps, actions):
    for number, episode in enumerate(episodes):
        about = dict(instruction=episode["instruction"], fps=fps, source=source, episode=f"{number:04d}", camera="top")
        sample = {
            "__key__": f"{source}-{number:04d}",
            "json": json.dumps(about | dict(length=len(episode["frames"]))).encode(),
            "frames.npy": npy(episode["frames"]),
        }
        robot = {"actions.npy": npy(episode["actions"]), "state.npy": npy(episode["state"])}
        yield sample | robot if actions else sample


def write_shards(folder, items):
    """Four shards of `items`, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    items = list(items)
    for number, part in enumerate(np.array_split(np.arange(len(items)), min(4, len(items)))):
        write_shard(folder / f"shard-{number:06d}.tar", [items[i] for i in part])


def write(folder, with_actions=False, **changes):
    """Write the data unless it is there already, all of it or nothing. Another version is replaced, folder and all."""
    about, folder = dict(DEFAULT, version=VERSION, with_actions=with_actions, **changes), Path(folder).resolve()
    there = folder / "demo.json"
    if there.exists() and common.read_json(there) == about:
        return
    if folder.is_file() or (any(folder.glob("*")) and not there.exists()):
        raise common.DataError(f"{folder}: is there, and is no demo's data; give another folder")
    videos = successes(about["videos"], 2 * about["seed"], about["body"], about["pixels"])
    robot = successes(about["demonstrations"], 2 * about["seed"] + 1, "disc", about["pixels"])
    labels, codebook = label(videos, np.random.default_rng([about["seed"], 2]))
    packed = [npz(codes=codes, vectors=vectors, gap=np.int64(GAP)) for codes, vectors in labels]
    keys = [f"videos-{number:04d}" for number in range(len(videos))]
    head = dict(codebook_size=len(codebook), code_seq_len=2, code_dim=2, gap=GAP, codebook=codebook.tolist())
    texts = [tabletop.instruction(task, verb) for task in range(len(tabletop.TASKS)) for verb in tabletop.VERBS]
    with common.atomic(folder, folder=True) as new:
        write_shards(new, samples(videos, "videos", about["fps"], with_actions))
        write_shards(new / "robot", samples(robot, "robot", about["fps"], True))
        write_shards(new / "labels", [{"__key__": k, "latents.npz": p} for k, p in zip(keys, packed, strict=True)])
        (new / "labels" / "labels.json").write_text(json.dumps(head))
        build(new / "backbone", [f"robot, {text}" for text in texts], "film", pixels=about["pixels"])
        (new / "demo.json").write_text(json.dumps(about))


def main(argv=None):
    parser = common.ArgumentParser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--out", required=True, metavar="DIR", help="folder to write; another demo's data are replaced")
    add("--videos", default=DEFAULT["videos"], help="videos", **whole)
    add("--demonstrations", default=DEFAULT["demonstrations"], help="labelled demonstrations", **whole)
    add("--body", choices=tabletop.BODIES, default="disc", help="how the videos' robot looks")
    add("--seed", default=0, help="of initial states, tasks and noise", **whole)
    add("--with-actions", action="store_true", help="keep the videos' true actions, for the upper bound")
    args = vars(parser.parse_args(argv))
    if min(args["videos"], args["demonstrations"]) < 1 or args["seed"] < 0:
        parser.error("--videos and --demonstrations must be above 0, --seed not negative")
    write(args.pop("out"), **args)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
