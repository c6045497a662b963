"""Turn recordings of any common kind into shards of whole clips that the other scripts read.

Run:
  python laq/videos_to_shards.py --data bridge=bridge_dataset/1.0.0 --fps bridge=5 --out shards/bridge
  python laq/videos_to_shards.py --data g1=LEROBOT_FOLDER --cameras cam_high --workers 16 --out shards/g1
  python laq/videos_to_shards.py --data human=FOLDER_OF_VIDEOS --height 256 --out shards/human

What a PATH holds is seen by itself: a LeRobotDataset (v2 or v3), RLDS tfrecords, or, at any depth, videos and folders
of pictures. Beside VIDEO.mp4 may lie VIDEO.txt (the instruction), VIDEO.npz (arrays actions and state, a row per frame)
and VIDEO.json (instruction, fps, episode, camera, actions, ...). Every clip has a constant frame rate. Killed or out of
disk: the same command goes on, and the shards are the same bytes as without the stop.
"""

import io
import itertools
import json
import multiprocessing
import os
import re
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import readers
from readers.recording import DAMAGED, KINDS, Entry, check_file, plain, short
from shards import key_of, npy, open_shard, to_rgb, write_shard
from sources import named, named_paths

import common

KEYFRAMES = 10  # frames between two keyframes: seeking decodes at most so many
BLACK = 20  # brightest grey value of a black frame: videos have 16 there, JPEGs a little noise


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    add, whole, named = parser.add_argument, dict(type=int, metavar="N"), dict(nargs="+", default=[], metavar="X")
    add("--data", required=True, nargs="+", metavar="NAME=PATH", help="what to read; its shards are called NAME")
    add("--out", required=True, metavar="DIR", help="folder of the shards, plan.json and summary.json")
    add("--cameras", nargs="+", default=[], metavar="CAM", help="only these, such as cam_high; without it all")
    add("--actions", help="delta or absolute, or NAME=...; without it absolute for LeRobot, else delta", **named)
    add("--fps", help="frames per second, or NAME=..., where the data does not tell or is wrong", **named)
    add("--group-cameras", help="names of sources where videos of one folder are an episode's cameras", **named)
    add("--height", default=256, help="higher videos are scaled down to this, keeping their shape", **whole)
    add("--crf", default=23, help="quality of h264: 0 is lossless, 18 looks so, 51 is worst", **whole)
    add("--recode", action="store_true", help="encode small h264 mp4s too: read faster, but a second loss of quality")
    add("--shard-clips", default=64, help="recordings per shard", **whole)
    add("--workers", default=4, help="processes, each making whole shards; 0 works in this one", **whole)
    args = parser.parse_args(argv)
    limits = dict(height=(16, 8192), crf=(0, 51), shard_clips=(1, 10**6), workers=(0, 1024))
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name.replace('_', '-')} must be between {low} and {high}")
    names = [name for name, _ in named_paths(args.data)]
    for name in args.group_cameras:
        if name not in names:
            parser.error(f"--group-cameras {name}: --data has no such NAME")
    return args


# --- the plan


def per_source(args, source):
    """(kind of actions, frames per second) that the flags give for a source; None where they give nothing."""
    names = [name for name, _ in named_paths(args.data)]
    kind = named(args.actions, names, "--actions").get(source)
    fps = named(args.fps, names, "--fps").get(source)
    if kind not in (None, *KINDS):
        raise common.DataError(f"--actions {kind}: expected {' or '.join(KINDS)}")
    if fps is not None and not (re.fullmatch(r"[0-9]*\.?[0-9]+", fps) and 0 < float(fps) < 1e6):
        raise common.DataError(f"--fps {fps}: expected a number above 0")
    return kind, float(fps) if fps else None


def choose(entries, args, source):
    """(entries to read, {key: why not} of those whose files are not there); only the cameras of the flags."""
    kind, fps = per_source(args, source)
    wanted, cameras, chosen, missing = set(map(short, args.cameras)), set(), {}, {}
    for entry in entries:
        try:
            readers.describe(entry)
            cameras.add(entry.camera)
            if wanted and entry.camera and entry.camera not in wanted:
                continue
            for path in filter(None, (entry.path, entry.table)):
                check_file(path)
        except DAMAGED as error:
            missing[entry.key] = explain(error, entry.path)
            continue
        entry.actions, entry.fps = kind or entry.actions, fps or entry.fps
        if entry.fps is None and entry.kind != "video":
            raise common.DataError(f"{entry.path}: does not tell its frame rate: give --fps {source}=X")
        twin = chosen.setdefault(entry.key, entry)
        if twin is not entry:
            both = f"{entry.path} and {twin.path}"
            raise common.DataError(f"{both}: both are episode {entry.episode}, camera {entry.camera}")
    if wanted and "" not in cameras and not wanted & cameras:
        there = ", ".join(sorted(cameras)) or "none"
        raise common.DataError(f"--cameras {' '.join(args.cameras)}: {source} has {there}")
    return list(chosen.values()), missing


def make_plan(args):
    """{flags, shards: {name: entries}, missing: {source: {key: why}}, notes}, the same for the same data."""
    shards, missing, notes = {}, {}, {}
    for source, path in named_paths(args.data):
        found, notes[source] = readers.entries(source, path, source in args.group_cameras)
        entries, missing[source] = choose(found, args, source)
        if not entries:
            why = list(missing[source].values())[:1] or ["no videos, pictures, LeRobotDataset or tfrecords"]
            raise common.DataError(f"--data {source}={path}: nothing to read: {'; '.join(why + notes[source])}")
        for first in range(0, len(entries), args.shard_clips):
            name = f"{key_of(source)}-{first // args.shard_clips:06d}"
            shards[name] = [asdict(entry) for entry in entries[first : first + args.shard_clips]]
    return dict(flags=fixed_flags(args), shards=shards, missing=missing, notes=notes)


def fixed_flags(args):
    """What a rerun must not change, as it decides what is in the shards."""
    flags = {name: value for name, value in vars(args).items() if name not in ("out", "workers")}
    return flags | dict(data=[f"{name}={Path(path).resolve()}" for name, path in named_paths(args.data)])


def open_plan(args, out):
    """The plan in OUT/plan.json, made now if there is none. A run that was cut off goes on with the same flags only."""
    file, known = out / "plan.json", (out / "plan.json").exists()
    if not known and any(out.glob("*.tar")):
        raise common.DataError(f"--out {out}: holds shards but no plan.json: choose another folder")
    plan = common.read_json(file) if known else make_plan(args)
    for name, new in sorted(fixed_flags(args).items()):
        was = plan["flags"].get(name)
        if was != new:
            flag = f"--{name.replace('_', '-')}"
            raise common.DataError(f"{flag} was {was} and is now {new}: for other shards choose another --out")
    common.make_folder(out)
    (out / "done").mkdir(exist_ok=True)
    common.lock(out)
    if not known:
        write_json(file, plan)
    return plan


def write_json(file, what):
    with common.atomic(file) as path:
        path.write_text(json.dumps(what, indent=1))


# --- the work


def finished(name, out):
    """done/NAME.json of a shard that is there, else None."""
    file = out / "done" / f"{name}.json"
    return common.read_json(file) if file.exists() and (out / f"{name}.tar").exists() else None


def work(names, plan, args, out):
    """Make these shards; yields (name, done) as they come."""
    jobs = {name: (out, name, plan["shards"][name], args) for name in names}
    if args.workers == 0 or not jobs:
        yield from ((name, make_shard(*job)) for name, job in jobs.items())
        return
    # forked workers start at once, and no thread of this process can hold a lock yet
    method = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(min(args.workers, len(jobs)), mp_context=method, initializer=end_with_parent)
    try:
        futures = {pool.submit(make_shard, *job): name for name, job in jobs.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()
        pool.shutdown()
    except BrokenProcessPool:
        why = "a worker was killed (out of memory?): the same command goes on, try fewer --workers"
        raise common.DataError(why) from None
    except BaseException as error:
        # what is being made may become whole, unless somebody waits at the keyboard
        pool.shutdown(wait=not isinstance(error, KeyboardInterrupt), cancel_futures=True)
        raise


def end_with_parent():
    """A worker whose parent was killed would otherwise wait for work for ever; signals are the parent's affair."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    common.ignore_signals()
    threading.Thread(target=watch, daemon=True).start()


# --- a recording becomes samples


def make_shard(out, name, entries, args):
    """Write a shard, then done/NAME.json: its clips and frames, what was left out and why, and what to know."""
    done = dict(clips=0, frames=0, broken={}, notes=Counter())
    write_shard(out / f"{name}.tar", samples([Entry(**entry) for entry in entries], args, done))
    write_json(out / "done" / f"{name}.json", done)
    return done


def samples(entries, args, done):
    """{__key__, mp4, json, actions.npy, state.npy} for each entry, camera and task; `done` counts them."""
    cameras = set(map(short, args.cameras))
    for entry in entries:
        try:
            recordings = list(readers.opened(entry))
        except DAMAGED as error:
            done["broken"][entry.key] = explain(error, entry.path)
            continue
        for recording in recordings:
            if cameras and recording.camera not in cameras:
                continue
            key = key_of(entry.source, entry.episode, recording.camera)
            try:
                made = clips_of(entry, recording, key, args)
            except DAMAGED as error:
                done["broken"][key] = explain(error, entry.path)
                continue
            done["notes"].update(recording.notes)
            for sample, length in made:
                done["clips"], done["frames"] = done["clips"] + 1, done["frames"] + length
                yield sample


def clips_of(entry, recording, key, args):
    """[(sample, frames)] of one camera: one, or one for each stretch of rows with the same instruction."""
    stretches, frames, start, made = [(recording.instruction, recording.length)], checked(recording.frames), 0, []
    if isinstance(recording.instruction, list):  # a text per row
        stretches = [(text, len(list(rows))) for text, rows in itertools.groupby(recording.instruction)]
    whole = len(stretches) == 1
    for text, length in stretches:
        video, count = video_of(entry, recording, itertools.islice(frames, length), whole, args)
        if count == 0 and length is None:
            raise common.DataError("no frames")
        if length not in (None, count):
            raise common.DataError(f"{start + count} frames, but {start + length} rows: they disagree")
        meta = entry.more | recording.more | dict(instruction=text, fps=recording.fps, source=entry.source)
        meta |= dict(episode=entry.episode, camera=recording.camera, length=count)
        meta |= dict(actions=entry.actions) if "actions" in recording.rows else {}
        sample = {"__key__": key if whole else f"{key}-{start}", "mp4": video, "json": json.dumps(meta).encode()}
        rows = {f"{name}.npy": npy(table[start : start + count]) for name, table in recording.rows.items()}
        made.append((sample | rows, count))
        start += count
    for _ in frames:  # all of them black, or damaged after the last row?
        pass
    if not whole:
        recording.notes.append("the task changes within an episode: a clip of each task")
    return made


def video_of(entry, recording, frames, whole, args):
    """(an mp4 of these frames, how many they are): the file itself if it can stay as it is, else encoded."""
    first = next(frames, None)
    if first is None:
        return b"", 0
    frames, scale = itertools.chain([first], frames), min(1, args.height / first.height)
    size = tuple(max(2, 2 * round(side * scale / 2)) for side in (first.width, first.height))  # h264 wants even sides
    if recording.copy and whole and size == (first.width, first.height) and not args.recode:
        return Path(entry.path).read_bytes(), sum(1 for _ in frames)
    return encode(frames, size, recording.fps, args.crf)


def checked(frames):
    """av.VideoFrames, upright, as long as they are of one size; at the end an error if all of them were black."""
    size, black, convert = None, True, to_rgb()
    for number, frame in enumerate(frames):
        turned = isinstance(frame, np.ndarray) or any(side.type.name == "DISPLAYMATRIX" for side in frame.side_data)
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(convert(frame)), "rgb24") if turned else frame
        size = size or (frame.width, frame.height)
        if (frame.width, frame.height) != size:
            raise common.DataError(f"frame {number} is {frame.width}x{frame.height}, those before {size[0]}x{size[1]}")
        black = black and frame.reformat(32, 32, "gray", interpolation="AREA").to_ndarray().max() <= BLACK
        yield frame
    if black:
        raise common.DataError("every frame is black")


def encode(frames, size, fps, crf):
    """av.VideoFrames -> (an h264 mp4, how many they were). One thread, no B-frames: the same bytes every time.

    tune=fastdecode (no CABAC, no deblocking): read in half the time, for 4 to 8 % more bytes and 0.1 to 0.2 dB.
    mbtree=0: with it x264 165 with AVX-512 now and then makes other bytes of the same frames.
    """
    file, rate, number, to_size = io.BytesIO(), Fraction(fps).limit_denominator(1001), 0, to_rgb(*size)
    with av.open(file, "w", format="mp4") as video:
        options = dict(preset="veryfast", tune="fastdecode", bf="0", mbtree="0", threads="1")
        options |= dict(crf=str(crf), g=str(KEYFRAMES))
        stream = video.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = 6, 1  # BT.601, limited: what swscale makes
        for number, frame in enumerate(frames, 1):
            frame = av.VideoFrame.from_ndarray(to_size(frame), "rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base, frame.pict_type = number - 1, 1 / rate, 0  # 0: not the source's keyframes
            video.mux(stream.encode(frame))
        video.mux(stream.encode())
    return file.getvalue(), number


def explain(error, path):
    """Why a clip was left out, in one line that names the file."""
    text = " ".join(str(error).split())
    if isinstance(error, av.FFmpegError):
        text = f"not a readable video ({error.strerror})"
    elif not isinstance(error, OSError | ValueError | common.DataError) or not text:
        text = f"{type(error).__name__} {text}"
    return plain(text if text.startswith(Path(path).anchor) else f"{path}: {text}")


# --- the summary


def summarise(plan, out):
    """What is in the shards, per source."""
    summary = {}
    for source, missing in plan["missing"].items():
        names = [name for name, entries in plan["shards"].items() if entries[0]["source"] == source]
        tars = [out / f"{name}.tar" for name in names]
        clips = [clip for tar in tars for clip in open_shard(tar)]
        about = dict(clips=len(clips), frames=sum(clip.meta["length"] for clip in clips))
        about["hours"] = sum(clip.meta["length"] / clip.meta["fps"] for clip in clips) / 3600
        about["bytes"] = sum(tar.stat().st_size for tar in tars)
        about["cameras"] = dict(sorted(Counter(clip.meta["camera"] for clip in clips).items()))
        about["with_actions"] = sum("actions.npy" in clip.members for clip in clips)
        about["with_instruction"] = sum(bool(clip.meta["instruction"]) for clip in clips)
        about |= dict(broken=dict(missing), notes=Counter(plan["notes"].get(source, [])))
        for done in [finished(name, out) for name in names]:
            about["broken"] |= done["broken"]
            about["notes"].update(done["notes"])
        summary[source] = about
    write_json(out / "summary.json", summary)
    return summary


def tell(source, about):
    """One source of the summary in a few lines."""
    cameras = ", ".join(f"{name} {count}" for name, count in about["cameras"].items())
    yield (
        f"{source}: {about['clips']:,} clips ({cameras}), {about['frames']:,} frames, {about['hours']:.3g} h, "
        f"{about['bytes'] / 1e6:,.1f} MB; {about['with_actions']:,} with actions, "
        f"{about['with_instruction']:,} with an instruction, {len(about['broken']):,} broken and left out"
    )
    for note, count in about["notes"].items():
        yield f"{source}: {count} x {note}" if count > 1 else f"{source}: {note}"


def progress(name, done, speed):
    """The lines of a shard that is made."""
    yield f"{name}.tar: {done['clips']} clips, {done['frames']} frames; {speed:.0f} frames/s so far"
    yield from (f"left out {key}: {why}" for key, why in done["broken"].items())


def main(argv=None):
    args = parse(argv)
    out, began, frames = Path(args.out), time.monotonic(), 0
    plan = open_plan(args, out)
    for file in out.glob(".*.tmp"):
        file.unlink(missing_ok=True)  # of a run that was killed: this one holds the lock
    for source, missing in plan["missing"].items():
        if missing:
            first = next(iter(missing.values()))
            print(f"{source}: {len(missing)} clips are left out, the first because {first}", flush=True)
    clips = {name: len(entries) for name, entries in plan["shards"].items()}
    left = [name for name in clips if not finished(name, out)]
    total, before = sum(clips.values()), sum(clips.values()) - sum(clips[name] for name in left)
    print(f"{len(clips)} shards of {total} recordings, {len(clips) - len(left)} of them there already", flush=True)
    shown = dict(unit="recording", disable=not sys.stderr.isatty(), dynamic_ncols=True)
    with tqdm(total=total, initial=before, **shown) as bar:
        for name, done in work(left, plan, args, out):
            bar.update(clips[name])
            frames += done["frames"]
            tqdm.write("\n".join(progress(name, done, frames / (time.monotonic() - began))), file=sys.stdout)
            sys.stdout.flush()
    summary = summarise(plan, out)
    for source, about in summary.items():
        print(*tell(source, about), sep="\n", flush=True)
    if not any(about["clips"] for about in summary.values()):
        raise common.DataError(f"--data: none of the {total} recordings could be read; {out}/summary.json says why")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
