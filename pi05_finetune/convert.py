"""Convert episodes: LeRobotDataset v2.1 or v3.0 -> npz, npz -> LeRobotDataset v3.0, robosuite HDF5 -> either.

Run:
  python pi05_finetune/convert.py --data runs/demo/pi05_finetune --to lerobot --out runs/demo_lerobot
  python pi05_finetune/convert.py --data PATH --to npz --dims '*Shoulder*' '*Elbow*' '*Wrist*' --out data/arm
  python pi05_finetune/convert.py --data demo.hdf5 --rate 20 --task "lift the cube" --to npz --out data/lift

--dims keeps the named dims of the actions, and of every vector that has as many dims. Episodes whose files are not
there are named and left out.
"""

import fnmatch
import functools
import sys
from pathlib import Path

import h5py
import numpy as np
import yaml

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
from data import shrink
from episodes import Episode, MissingFile, Stored, ids_of, list_episodes, rows
from tqdm import tqdm

import common


def parse(argv=None):
    parser = common.Parser(__doc__)
    add, whole, real = parser.add_argument, dict(type=int, metavar="N"), dict(type=float, metavar="X")
    add("--data", required=True, metavar="PATH", help="folder of npz episodes or LeRobotDataset, or an .hdf5 file")
    add("--out", required=True, metavar="DIR", help="folder to make")
    add("--to", required=True, choices=["npz", "lerobot"], help="what to write")
    add("--dims", nargs="+", metavar="NAME", help="action dims to keep, by name; * stands for anything")
    add("--episodes", nargs="+", default=[], metavar="IDS", help="just these: 0-9,12")
    add("--task", metavar="TEXT", help="task of episodes that do not tell theirs")
    add("--rate", help="control rate in Hz; HDF5 does not tell it", **real)
    add("--image-size", help="shrink images so that their longer side is N", **whole)
    add("--images", action="store_true", help="LeRobotDataset: pictures in the parquet file instead of a video")
    return parser.parse_args(argv)


# --- reading


def list_hdf5(file, rate):
    """The demonstrations of a robosuite or robomimic file as Stored."""
    if rate is None:
        raise ValueError(f"{file}: HDF5 does not tell the control rate: give --rate (robosuite's default is 20)")
    try:
        with h5py.File(file) as h5:
            names = sorted(h5["data"], key=lambda name: int("0" + "".join(filter(str.isdigit, name))))
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a robosuite or robomimic file ({common.brief(error)})") from None
    return [Stored(file.stem, name, functools.partial(read_hdf5, file, name, rate)) for name in names]


def read_hdf5(file, name, rate, stored, wanted):
    """One demonstration: `actions`, `states` and what else has a row per step, and robomimic's `obs` group."""
    vectors, frames = {}, {}
    try:
        with h5py.File(file) as h5:
            demo = h5["data"][name]
            actions = rows(demo["actions"][:], "actions")
            arrays = {key: demo[key] for key in demo if key != "actions" and isinstance(demo[key], h5py.Dataset)}
            arrays |= {key: demo["obs"][key] for key in demo.get("obs", {})}
            for key, array in arrays.items():
                if array.ndim == 4:
                    frames[key] = array[:]
                elif array.ndim in (1, 2) and len(array) == len(actions) and array.dtype.kind in "fiub":
                    vectors[key] = rows(array[:], key)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{file}, {name}: {common.brief(error)}") from None
    return Episode(stored.source, name, actions, np.arange(len(actions)) / rate, vectors, frames, "")


def choose(dims, names, count):
    """Positions of the dims whose name fits one of `dims`, in the data's order, and their names."""
    names = names or [f"action {i}" for i in range(count)]
    if dims is None:
        return list(range(count)), names
    for word in dims:
        if not fnmatch.filter(names, word):
            raise ValueError(f"--dims {word}: no such dim among {', '.join(names)}")
    kept = [i for i, name in enumerate(names) if any(fnmatch.fnmatchcase(name, word) for word in dims)]
    return kept, [names[i] for i in kept]


def reduce(episode, kept, args):
    """(actions, timestamps, vectors, {camera: function that gives its frames}, task) with the flags applied."""
    count, size = episode.actions.shape[1], args.image_size
    vectors = {k: v[:, kept] if v.shape[1] == count else v for k, v in episode.vectors.items()}

    def images(frames):
        for i in range(len(episode)):
            frame = np.asarray(frames[i])
            yield np.uint8(np.round(shrink(frame, size) * 255)) if size else frame

    frames = {key: functools.partial(images, frames) for key, frames in episode.frames.items()}
    return episode.actions[:, kept], episode.timestamps, vectors, frames, episode.task or args.task or ""


def converted(stored, args):
    """(id, rate, names of the dims, parts) of each episode, one at a time; what is left out is told at the end."""
    left = []
    for item in tqdm(stored, unit="episode", disable=not sys.stderr.isatty()):
        try:
            episode = item.load(None)
        except MissingFile as error:
            left.append(f"{item.id} ({error})")
            continue
        kept, names = choose(args.dims, item.action_names, episode.actions.shape[1])
        times = episode.timestamps
        rate = args.rate or (1 / float(np.median(np.diff(times))) if len(times) > 1 else None)
        if rate is None or not 0 < rate < np.inf:
            raise ValueError(f"episode {item.id}: its timestamps do not tell a control rate: give --rate")
        yield item.id, rate, names, reduce(episode, kept, args)
    if left:
        print(f"{len(left)} episodes lack a file and were left out, such as {left[0]}")


# --- writing


def write_npz(out, episodes):
    """OUT/episodes/*.npz and OUT/spec.yaml."""
    (out / "episodes").mkdir(parents=True, exist_ok=True)
    count = 0
    for name, rate, names, (actions, times, vectors, frames, task) in episodes:
        arrays = {f"obs.{key}": value for key, value in vectors.items()}
        arrays |= {f"obs.{key}": np.stack(list(images())) for key, images in frames.items()}
        name = f"{int(name):06d}" if name.isdigit() else name
        np.savez(out / "episodes" / f"{name}.npz", actions=actions, timestamps=times, task=np.array(task), **arrays)
        count += 1
        if count == 1:
            state = ["state"] if "state" in vectors else list(vectors)
            about = dict(name="converted", action_dim=len(names), control_freq_hz=round(rate, 3), action_names=names)
            about |= dict(required_obs_keys=list(frames), required_proprio_keys=state)
            (out / "spec.yaml").write_text(yaml.safe_dump(about, sort_keys=False))
    return count


def write_lerobot(root, episodes, pictures):
    """A LeRobotDataset v3.0, by LeRobot itself. pictures: in the parquet file instead of a video."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root.rmdir()  # LeRobot wants to make it
    data, count = None, 0
    for _, rate, names, (actions, _, vectors, frames, task) in episodes:
        if not task:
            raise ValueError("a LeRobotDataset needs a task for each episode: give --task")
        if abs(rate - round(rate)) > 0.01 * rate:
            raise ValueError(f"the control rate is {rate:.3f} Hz, but a LeRobotDataset wants whole ones: give --rate")
        cameras = {f"observation.images.{key.removeprefix('images.')}": images for key, images in frames.items()}
        if data is None:
            features = dict(action=dict(dtype="float32", shape=(len(names),), names=names))
            for key, value in vectors.items():
                own = names if value.shape[1] == len(names) else [f"{key} {i}" for i in range(value.shape[1])]
                features[f"observation.{key}"] = dict(dtype="float32", shape=(value.shape[1],), names=own)
            for key, images in cameras.items():
                axes, kind = ["height", "width", "channels"], "image" if pictures else "video"
                features[key] = dict(dtype=kind, shape=next(images()).shape, names=axes)
            data = LeRobotDataset.create("local/data", round(rate), features, root=root, use_videos=not pictures)
        cameras = {key: images() for key, images in cameras.items()}
        for i, action in enumerate(actions):
            frame = {f"observation.{key}": value[i] for key, value in vectors.items()}
            frame |= {key: next(images) for key, images in cameras.items()}
            data.add_frame(dict(action=action, task=task, **frame))
        data.save_episode(parallel_encoding=False)
        count += 1
    if data is not None:
        data.finalize()
    return count


def main(argv=None):
    args = parse(argv)
    source, out = Path(args.data), Path(args.out)
    if out.exists():
        raise ValueError(f"--out {out}: is there already; give another folder")
    stored = list_hdf5(source, args.rate) if source.suffix in (".hdf5", ".h5") else list_episodes(source.name, source)
    wanted = ids_of(args.episodes, source.name)
    episodes = converted([item for item in stored if wanted is None or item.id in wanted], args)
    with common.atomic(out, folder=True) as folder:
        count = write_npz(folder, episodes) if args.to == "npz" else write_lerobot(folder, episodes, args.images)
        if count == 0:
            raise ValueError(f"--data {source}: no whole episode")
    print(f"{count} episodes -> {out}")
    return 0


if __name__ == "__main__":
    common.run(main)
