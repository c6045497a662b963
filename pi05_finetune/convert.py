"""Convert episodes: LeRobotDataset v2.1 or v3.0 -> npz, npz -> LeRobotDataset v3.0, HDF5 -> either.

Run:
  python pi05_finetune/convert.py --data runs/demo/pi05_finetune --to lerobot --out runs/demo_lerobot
  python pi05_finetune/convert.py --data PATH --to npz --dims '*Shoulder*' '*Elbow*' '*Wrist*' --out data/arm
  python pi05_finetune/convert.py --data demo.hdf5 --rate 20 --task "lift the cube" --to npz --out data/lift

HDF5 is a file of robosuite or robomimic, or a folder of ALOHA's files. --dims keeps the named dims of the actions, and
of every vector whose dims have the same names. Episodes whose files are not there are named and left out.
"""

import fnmatch
import functools
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import yaml

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
from data import shrink
from readers.dataset import list_episodes, select_ids, spec_of
from readers.episode import MissingFile, control_rate, known_paths, visible
from readers.hdf5 import list_hdf5
from tqdm import tqdm

import common
from common import DataError

HDF5 = (".hdf5", ".h5")


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--data", required=True, metavar="PATH", help="npz episodes, a LeRobotDataset, or HDF5 (a file or a folder)")
    add("--out", required=True, metavar="DIR", help="folder to make")
    add("--to", required=True, choices=["npz", "lerobot"], help="what to write")
    add("--dims", nargs="+", metavar="NAME", help="action dims to keep, by name; * stands for anything")
    add("--episodes", nargs="+", default=[], metavar="IDS", help="just these: 0-9,12")
    add("--task", metavar="TEXT", help="task of episodes that do not tell theirs")
    add("--rate", type=float, metavar="X", help="control rate in Hz, where the data do not tell it")
    add("--image-size", help="shrink images so that their longer side is N", **whole)
    add("--images", action="store_true", help="LeRobotDataset: pictures in the parquet file instead of a video")
    args = parser.parse_args(argv)
    for name in ("rate", "image_size"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    return args


def list_any(path, rate):
    """The episodes of a folder or an HDF5 file as a list of EpisodeRef."""
    if path.suffix.lower() in HDF5 and path.is_file():
        return list_hdf5(path.stem, [path], rate)
    files = visible(file for file in path.glob("*") if file.suffix.lower() in HDF5) if path.is_dir() else []
    if files and not (path / "meta").exists() and not known_paths(path, "*.npz"):
        return list_hdf5(path.name, files, rate)
    return list_episodes(path.name, path)


def select_dims(words, names):
    """Positions of the dims whose name fits one of `words`, in the data's order."""
    for word in words:
        if not fnmatch.filter(names, word):
            raise DataError(f"--dims {word}: no such dim among {', '.join(names)}")
    return [i for i, name in enumerate(names) if any(fnmatch.fnmatchcase(name, word) for word in words)]


def reduce(episode, ref, args):
    """The episode and its reference with --dims, --task, --rate and --image-size applied."""
    if args.dims:
        count = episode.actions.shape[1]
        names = ref.action_names or [f"action {i}" for i in range(count)]
        kept = select_dims(args.dims, names)
        for key, vector in episode.vectors.items():
            own = ref.proprio_names.get(key) or []
            mine = [own.index(names[i]) for i in kept if names[i] in own]
            if len(mine) == len(kept):
                episode.vectors[key] = vector[:, mine]
                ref.proprio_names = {**ref.proprio_names, key: [own[i] for i in mine]}  # the refs share one dict
            else:
                episode.notes.append(f"--dims leaves {key} as it is: its dims do not have the actions' names")
        episode.actions, ref.action_names = episode.actions[:, kept], [names[i] for i in kept]
    if args.task and not any(episode.tasks):
        episode.tasks = [args.task]

    def images(frames):
        for i in range(len(episode)):
            frame = np.asarray(frames[i])
            yield np.uint8(np.round(shrink(frame, args.image_size) * 255)) if args.image_size else frame

    episode.frames = {key: functools.partial(images, frames) for key, frames in episode.frames.items()}
    return episode, ref


def converted(refs, args):
    """(ref, rate, episode) of each, one at a time; what was left out is told at the end."""
    missing, notes = [], Counter()
    for ref in tqdm(refs, unit="episode", disable=not sys.stderr.isatty()):
        try:
            episode = ref.load(None)
        except MissingFile as error:
            missing.append(f"{ref.id} ({error})")
            continue
        episode.check_lengths()
        rate = control_rate(episode.timestamps, episode.name)
        if args.rate and abs(args.rate / rate - 1) > 0.1:
            raise DataError(f"--rate {args.rate:g}: the timestamps of {episode.name} tell {rate:.3g} steps a second")
        episode, ref = reduce(episode, ref, args)
        notes.update(episode.notes)
        yield ref, rate, episode
    if missing:
        print(f"{len(missing)} episodes lack a file and were left out, such as {missing[0]}")
    for note, count in notes.items():
        print(f"{note} ({count} episodes)")


def write_npz(out, episodes):
    """OUT/episodes/*.npz and OUT/spec.yaml."""
    (out / "episodes").mkdir(parents=True, exist_ok=True)
    count = 0
    for ref, rate, episode in episodes:
        arrays = {f"obs.{key}": value for key, value in episode.vectors.items()}
        arrays |= {f"obs.{key}": np.stack(list(images())) for key, images in episode.frames.items()}
        name = f"{int(ref.id):06d}" if ref.id.isdigit() else ref.id
        tasks = np.array(episode.tasks[0] if len(episode.tasks) == 1 else episode.tasks)
        file = out / "episodes" / f"{name}.npz"
        if file.exists():
            raise DataError(f"two episodes are called {name}: convert them into two folders")
        np.savez(file, actions=episode.actions, timestamps=episode.timestamps, task=tasks, **arrays)
        if count == 0:
            spec = {k: v for k, v in vars(spec_of(episode, ref, "converted", rate)).items() if v is not None}
            (out / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
            print(f"spec.yaml: state {', '.join(spec['required_proprio_keys']) or '-'}; check it")
        count += 1
    return count


def write_lerobot(root, episodes, pictures):
    """A LeRobotDataset v3.0, by LeRobot itself. pictures: in the parquet file instead of a video."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root.rmdir()  # LeRobot wants to make it
    data, count = None, 0
    for ref, rate, episode in episodes:
        if not all(episode.tasks):
            raise DataError(f"episode {ref.id}: a LeRobotDataset needs a task for each episode: give --task")
        if abs(rate - round(rate)) > 0.01 * rate:
            raise DataError(f"the control rate is {rate:.3f} Hz, but a LeRobotDataset wants whole ones: give --rate")
        cameras = {f"observation.images.{key.removeprefix('images.')}": f for key, f in episode.frames.items()}
        if len(cameras) < len(episode.frames):
            raise DataError(f"two cameras of {', '.join(episode.frames)} have one name in a LeRobotDataset: rename one")
        if data is None:
            names = ref.action_names or [f"action {i}" for i in range(episode.actions.shape[1])]
            features = dict(action=dict(dtype="float32", shape=(len(names),), names=names))
            for key, value in episode.vectors.items():
                own = ref.proprio_names.get(key) or [f"{key} {i}" for i in range(value.shape[1])]
                features[f"observation.{key}"] = dict(dtype="float32", shape=(value.shape[1],), names=own)
            for key, images in cameras.items():
                axes, kind = ["height", "width", "channels"], "image" if pictures else "video"
                features[key] = dict(dtype=kind, shape=next(images()).shape, names=axes)
            if any("/" in key for key in features):
                raise DataError(f"LeRobot's names hold no /: rename one of {', '.join(features)}")
            data = LeRobotDataset.create("local/data", round(rate), features, root=root, use_videos=not pictures)
        if abs(rate / data.fps - 1) > 0.1 or np.diff(episode.timestamps).max() > 3 / rate:
            raise DataError(f"{episode.name}: {rate:.3g} Hz or a pause; a LeRobotDataset has steps of {data.fps} Hz")
        cameras = {key: images() for key, images in cameras.items()}
        for i, action in enumerate(episode.actions):
            frame = {f"observation.{key}": value[i] for key, value in episode.vectors.items()}
            frame |= {key: next(images) for key, images in cameras.items()}
            try:
                data.add_frame(dict(action=action, task=episode.task_at(i), **frame))
            except ValueError as error:  # LeRobot's: keys or shapes other than the first episode's
                raise DataError(f"{episode.name}: {' '.join(str(error).split())}") from None
        data.save_episode(parallel_encoding=False)
        count += 1
    if data is not None:
        data.finalize()
    return count


def main(argv=None):
    args = parse(argv)
    source, out = Path(args.data), Path(args.out)
    if out.exists():
        raise DataError(f"--out {out}: is there already; give another folder")
    refs = list_any(source, args.rate)
    wanted, unknown = select_ids(args.episodes, source.name, [ref.id for ref in refs])
    if unknown:
        raise DataError(f"--episodes: no episode is called {unknown[0]}; the first one is {refs[0].id}")
    episodes = converted([ref for ref in refs if wanted is None or ref.id in wanted], args)
    common.make_folder(out.parent)
    with common.atomic(out, folder=True) as folder:
        if (source / "spec.yaml").exists():
            print(f"{source}/spec.yaml is not carried over: names, limits and action_type are lost")
        count = write_npz(folder, episodes) if args.to == "npz" else write_lerobot(folder, episodes, args.images)
        if count == 0:
            raise DataError(f"--data {source}: no whole episode")
    print(f"{count} episodes -> {out}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
