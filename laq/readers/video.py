"""Video files and folders of pictures, with what lies beside them: a.txt, a.npz, a.json."""

import io
import itertools
import re
from collections import Counter
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps

from common import DataError
from readers.recording import (
    KINDS,
    Entry,
    Recording,
    as_rows,
    check_file,
    common_part,
    natural,
    plain,
    read_json,
    read_text,
    relative,
)

VIDEOS = set(".mp4 .m4v .mov .avi .webm .mkv .gif .mpg .mpeg .mts .m2ts .wmv .flv .ogv".split())
PICTURES = set(".png .jpg .jpeg .bmp .webp .tif .tiff".split())
BESIDE = {".txt", ".npz", ".json"}
ARRAYS = dict(actions=("actions", "action"), state=("state", "states", "observation.state", "obs.state"))


def entries(source, root, files, grouped):
    """Every video and every series of pictures is a clip; in a grouped source a folder of them is an episode."""
    clips, series, found, alone = [file for file in files if file.suffix.lower() in VIDEOS], {}, [], 0
    for file in files:
        if file.suffix.lower() in PICTURES:
            series.setdefault(file.parent, {}).setdefault(group_of(file), []).append(file)
    beside_videos = {file.parent for file in clips}
    names = Counter(file.with_suffix("") for file in clips)
    for path in sorted([*clips, *(set(series) - beside_videos)], key=natural):
        folder = path in series
        stem = path if folder or names[path.with_suffix("")] > 1 else path.with_suffix("")
        episode, camera = relative(stem, root), ""
        if grouped:
            episode, _, camera = episode.rpartition("/")
        groups = [None]  # a video, or pictures whose names form no series: all are one
        several = [group for group, pictures in series.get(path, {}).items() if len(pictures) > 1]
        if folder and len(several) > len(series[path]) / 2:
            groups = several
            alone += len(series[path]) - len(several)
        for group in groups:
            name = "-".join(part for part in (camera, group if len(groups) > 1 else "") if part) or "video"
            more = dict(camera=name, column=group, actions="delta")
            found.append(Entry(source, episode or root.name, "pictures" if folder else "video", str(path), **more))
    endings = [file.suffix if file.suffix.lower() in BESIDE else file.suffix.lower() for file in files]  # no A.TXT
    other = Counter(end or "no ending" for end in endings if end not in VIDEOS | PICTURES | BESIDE)
    kinds = ", ".join(f"{count} {ending}" for ending, count in sorted(other.items()))
    notes = [f"ignored files of other kinds: {kinds}"] if other else []
    alone += sum(file.suffix.lower() in PICTURES and file.parent in beside_videos for file in files)
    return found, notes + ([f"ignored pictures beside videos or other series: {alone}"] if alone else [])


def group_of(file):
    """The series that a picture belongs to: its name without numbers. frame-000012.color.png -> frame-.color"""
    return re.sub(r"[0-9]+", "", file.stem) or "pictures"


def beside(entry, ending):
    """The sidecar of a video or of a folder of pictures: a.mp4 -> a.txt."""
    path = Path(entry.path)
    return path.with_name((path.name if entry.kind == "pictures" else path.stem) + ending)


def describe(entry):
    """Add what VIDEO.txt and VIDEO.json say. Only plain values of the latter: KEY.json is read by every script."""
    text, facts = beside(entry, ".txt"), beside(entry, ".json")
    if text.is_file():
        lines = [line.strip() for line in read_text(text).splitlines() if line.strip()]
        entry.instruction = lines[0] if lines else ""
        if len(lines) > 1:  # paraphrases
            entry.more["instructions"] = lines
    if not facts.is_file():
        return
    given = read_json(facts)
    if isinstance(given.get("instruction"), list):
        raise DataError(f"{facts}: `instruction` is a list: put paraphrases into {text.name}, one a line")
    given = {name: value for name, value in given.items() if isinstance(value, str | int | float)}
    for name in ("instruction", "episode", "camera", "actions"):
        setattr(entry, name, plain(str(given.pop(name, getattr(entry, name)))))
    entry.fps = given.pop("fps", None)
    entry.more |= given
    if entry.actions not in KINDS:
        raise DataError(f"{facts}: actions {entry.actions}, expected {' or '.join(KINDS)}")
    if entry.fps is not None and not (type(entry.fps) in (int, float) and 0 < entry.fps < 1e6):
        raise DataError(f"{facts}: fps {entry.fps}, expected a number above 0")


def sidecar_rows(entry, notes):
    """actions and state of VIDEO.npz, if there is one."""
    path, rows = beside(entry, ".npz"), {}
    if not path.is_file():
        return {}
    check_file(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name, spellings in ARRAYS.items():
                found = [spelling for spelling in spellings if spelling in arrays]
                if found:
                    rows[name] = arrays[found[0]]
            if not rows:
                notes.append(f"no actions or state in {path.name}, which holds {', '.join(arrays)}")
    except Exception as error:  # numpy and zipfile raise a dozen kinds for a broken file
        raise DataError(f"{path}: expected the arrays actions and state ({str(error)[:150]})") from None
    return {name: as_rows(f"{path}: {name}", values) for name, values in rows.items()}


def opened(entry):
    yield open_video(entry) if entry.kind == "video" else open_pictures(entry)


# --- videos


class Timeline:
    """When a video's frames are shown, from its packets alone: nothing is decoded.

    times (T,) in seconds, ascending, or None where packets carry no times; fps; constant: whether frames come at that
    rate, to half a frame; clean: each packet is a frame that is shown.
    """

    def __init__(self, path, fps=None):
        with av.open(str(path)) as video:
            if not video.streams.video:
                raise DataError("no video stream in what there is of it")
            stream = video.streams.video[0]
            if stream.codec_context is None:
                raise DataError("its codec is not known")
            packets = [packet for packet in video.demux(stream) if packet.size]
            while packets and not packets[0].is_keyframe:  # from before the recording's first keyframe
                packets.pop(0)
            shown = [packet for packet in packets if not packet.is_discard]
            self.clean = len(shown) == stream.frames if stream.frames else len(shown) == len(packets)
            stamps = [packet.pts for packet in shown]
            self.start = float((stream.start_time or 0) * stream.time_base)
            self.times = None if None in stamps or not stamps else np.sort(np.array(stamps) * float(stream.time_base))
            self.fps, self.constant = fps or float(stream.average_rate or stream.guessed_rate or 0), True
            self.codec = stream.codec_context.name, stream.codec_context.pix_fmt
            if re.match("gray(9|1|f)", self.codec[1] or ""):
                raise DataError(f"{self.codec[1]}: more than 8 bits of grey, a depth map, no colours")
            self.alone = len(video.streams) == 1
        if self.times is not None and len(self.times) > 1 and not fps:
            steps, mean = np.diff(self.times), (len(self.times) - 1) / max(np.ptp(self.times), 1e-9)
            rate = self.fps if abs(self.fps / mean - 1) < 0.01 else mean
            even = self.times[0] + np.arange(len(self.times)) / rate
            self.constant = bool(np.abs(self.times - even).max() < 0.5 / rate)
            self.fps = rate if self.constant else round(1 / max(np.median(steps), 1e-3), 3)


def open_video(entry):
    check_file(entry.path)
    timeline, notes = Timeline(entry.path, entry.fps), []
    if not timeline.fps:
        raise DataError(f"does not tell its frame rate: give --fps {entry.source}=X")
    rows, frames, turned = sidecar_rows(entry, notes), decoded(entry.path), False
    if not timeline.constant:
        steps = np.diff(timeline.times)
        spacing = f"frames {steps.min():.3f} to {steps.max():.3f} s apart"
        if rows:
            notes.append(f"{spacing}, but rows go with frames: taken as {timeline.fps:g} a second")
        else:
            frames = resample(frames, timeline)
            notes.append(f"{spacing}: shown at {timeline.fps:g} a second, as a player does")
    length = len(timeline.times) if timeline.times is not None and timeline.constant else None
    if rows:
        total = len(timeline.times) if timeline.times is not None else sum(1 for _ in decoded(entry.path))
        length = common_part(total, rows, notes)
        rows, frames = {name: table[:length] for name, table in rows.items()}, itertools.islice(frames, length)
    copy = timeline.clean and timeline.times is not None and length in (None, len(timeline.times))
    copy = copy and timeline.constant and timeline.alone and Path(entry.path).suffix.lower() == ".mp4"
    copy = copy and timeline.codec == ("h264", "yuv420p")
    if copy:
        with av.open(entry.path) as video:
            first = next(video.decode(video=0), None)
            turned = first is not None and any(side.type.name == "DISPLAYMATRIX" for side in first.side_data)
    more = dict(length=length, camera=entry.camera, copy=copy and not turned, more=dict(entry.more), notes=notes)
    return Recording(frames, timeline.fps, entry.instruction, rows, **more)


def decoded(path, start=None):
    """The frames of a video, one after another, from `start` seconds (its keyframe before) on."""
    with av.open(str(path)) as video:
        stream, end = video.streams.video[0], None
        stream.codec_context.thread_count = 1  # the processes already use the cores
        if start:
            video.seek(int(start / stream.time_base), stream=stream)
        for frame in video.decode(stream):
            if frame.is_corrupt:
                raise DataError(f"damaged at {frame.time or 0:.2f} s")
            if frame.pts is not None:
                end = float((frame.pts + (frame.duration or 0)) * frame.time_base)
            yield frame
        length = duration(video, stream)
        if end is not None and length - end > 2.5 / float(stream.average_rate or 25):
            raise DataError(f"truncated: its frames end at {end:.2f} s of {length:.2f} s")


def duration(video, stream):
    """When a video should end by its header, in seconds; 0 if that does not say."""
    if stream.duration:
        return float((stream.duration + (stream.start_time or 0)) * stream.time_base)
    return (video.duration or 0) / av.time_base if len(video.streams) == 1 else 0.0


def resample(frames, timeline):
    """Frames at uneven times -> frames at timeline.fps: at each moment the last one shown, to half a frame."""
    times, last, number = timeline.times, None, 0
    for frame, time in zip(frames, times, strict=False):
        while last is not None and number / timeline.fps + 0.5 / timeline.fps < time - times[0]:
            yield last
            number += 1
        last = frame
    if last is not None:
        yield last


# --- pictures


def open_pictures(entry):
    folder = Path(entry.path)
    files = [file for file in folder.iterdir() if file.suffix.lower() in PICTURES and file.name[0] != "."]
    files = sorted((file for file in files if entry.column in (None, group_of(file))), key=natural)
    notes, numbers = [], [int(found[-1]) for file in files if (found := re.findall(r"\d+", file.stem))]
    if len(numbers) == len(files) > 2 and len(set(np.diff(numbers))) > 1:
        notes.append("the numbers of its pictures have holes: they are taken as evenly spaced in time")
    rows = sidecar_rows(entry, notes)
    length = common_part(len(files), rows, notes)
    rows = {name: table[:length] for name, table in rows.items()}
    frames = (picture(file.read_bytes(), file.name) for file in files[:length])
    more = dict(length=length, camera=entry.camera, more=dict(entry.more), notes=notes)
    return Recording(frames, entry.fps, entry.instruction, rows, **more)


def picture(data, name):
    """The bytes of a PNG, JPEG ... -> (H W 3) uint8, turned as its EXIF orientation says."""
    if not data:
        raise DataError(f"{name}: no picture in the file")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise DataError(f"{name} holds {image.n_frames} pictures: make a video, or a file of each")
            if image.mode.startswith("I") or image.mode == "F":
                raise DataError(f"{name} has 16 bits or more a pixel: a depth map, no colours")
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{name}: not a complete picture ({error})") from None
