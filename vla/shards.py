"""WebDataset shards of whole clips, read at random. laq/shards.py and vla/shards.py are the same file.

A sample is one camera of one episode:
    KEY.json                        texts instruction, source, episode, camera; numbers fps, length (frames);
                                    actions: "delta" or "absolute", if there are any
    KEY.mp4 or KEY.frames.npy       the frames; the array is (T, H, W, 3) uint8
    KEY.actions.npy, KEY.state.npy  (T, A) and (T, S), a row per frame, where known
    KEY.mask.npy                    (T, H, W) bool, where the robot is, where known
A label shard has its video shard's name and keys, such as KEY.latents.npz.
"""

import contextlib
import hashlib
import io
import itertools
import json
import re
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import webdataset
from av.video.reformatter import VideoReformatter

from common import DataError, atomic

REORDER = 16  # h264, h265 and AV1 change the order of frames by at most so many
TEXTS, NUMBERS = ("instruction", "source", "episode", "camera"), ("fps", "length")
MATRICES = {1: 1, 9: 9, 10: 9}  # a video's tag of its colour matrix -> swscale's number; else BT.601 (5)


@dataclass
class Clip:
    """One sample. meta: its KEY.json; members: extension -> (tar, offset, bytes), those of a label shard included."""

    shard: Path
    key: str
    meta: dict
    members: dict = field(repr=False)

    def __str__(self):
        return f"{self.shard}:{self.key}"

    @property
    def episode(self):
        """The recording's own name, by which it is held out: all its cameras go to the same side."""
        return self.meta["episode"]

    def __len__(self):
        return int(self.meta["length"])

    def read(self, extension):
        """The bytes of one member."""
        shard, offset, size = self.members[extension]
        with open(shard, "rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise DataError(f"{shard}:{self.key}.{extension}: the shard ends {size - len(data)} bytes too early")
        return data

    def array(self, extension):
        """A .npy member as (T, A) float32, or None if the sample has none."""
        if extension not in self.members:
            return None
        with self.reading(extension):
            array = np.load(io.BytesIO(self.read(extension)), allow_pickle=False)
            if array.ndim == 0 or array.size == 0 or len(array) != len(self) or array.dtype.kind not in "fiu":
                raise ValueError(f"{array.dtype} {array.shape}, expected {len(self)} rows of numbers")
            with np.errstate(over="ignore"):
                array = array.reshape(len(self), -1).astype(np.float32)
            if not np.isfinite(array).all():
                raise ValueError(f"row {np.argwhere(~np.isfinite(array))[0, 0]} holds NaN or infinity")
        return array

    def mask(self, rows):
        """KEY.mask.npy of `rows` (...) as pictures (..., H, W, 3) uint8, 255 where the robot is."""
        with self.reading("mask.npy"):
            mask = np.load(io.BytesIO(self.read("mask.npy")), allow_pickle=False)
            if mask.ndim != 3 or len(mask) != len(self) or mask.dtype != bool:
                raise ValueError(f"{mask.dtype} {mask.shape}, expected bool ({len(self)}, H, W)")
        return np.repeat(np.uint8(255) * mask[rows][..., None], 3, -1)

    def archive(self, extension):
        """A .npz member as {name: array}."""
        with self.reading(extension), np.load(io.BytesIO(self.read(extension)), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    @contextlib.contextmanager
    def reading(self, extension):
        """A member that cannot be read becomes a DataError that names it."""
        try:
            yield
        except (OSError, DataError):
            raise
        except Exception as error:  # for a corrupt header numpy raises zip, zlib, token and memory errors too
            raise DataError(f"{self.members[extension][0]}:{self.key}.{extension}: {error}") from None

    def decode(self, rows, make):
        """[make(frame) of each of `rows`, in their order]; a frame is an av.VideoFrame or an array (H, W, 3) uint8."""
        wanted = sorted(set(map(int, rows)))
        if "mp4" in self.members:
            found = decode(self.read("mp4"), str(self), wanted, make)
        else:
            found = {row: make(frame) for row, frame in zip(wanted, self.stored(wanted), strict=True)}
        return [found[int(row)] for row in rows]

    def frames(self, size=None, rows=None):
        """Those frames, or all, (n, H, W, 3) uint8 RGB; with a size squashed to a square, as LAPA does."""
        return np.stack(self.decode(range(len(self)) if rows is None else rows, to_rgb(size)))

    def stream(self, make):
        """make(frame) of every frame, one after another. Only one frame is in memory at a time."""
        if "mp4" not in self.members:
            yield from map(make, self.stored(range(len(self))))
            return
        number = 0
        with opened(self.read("mp4"), str(self)) as video:
            for number, frame in enumerate(video.decode(video=0), 1):  # noqa: B007
                yield make(frame)
        if number != len(self):
            raise DataError(f"{self}: {number} frames, its json says {len(self)}")

    def stored(self, rows):
        """The frames `rows` of .frames.npy, read one by one."""
        if "frames.npy" not in self.members:
            raise DataError(f"{self}: has neither .mp4 nor .frames.npy")
        shard, offset, size = self.members["frames.npy"]
        with open(shard, "rb") as file:
            file.seek(offset)
            with self.reading("frames.npy"):
                np.lib.format.read_magic(file)
                shape, columns, dtype = np.lib.format.read_array_header_1_0(file)
                if len(shape) != 4 or shape[0] != len(self) or shape[3] != 3 or dtype != np.uint8 or columns:
                    raise ValueError(f"{dtype} {shape}, expected uint8 ({len(self)}, H, W, 3)")
            first, bytes_each = file.tell(), int(np.prod(shape[1:]))
            if first + shape[0] * bytes_each > offset + size:
                raise DataError(f"{self}.frames.npy: {size} bytes are too few for {shape}")
            for row in rows:
                file.seek(first + row * bytes_each)
                data = file.read(bytes_each)
                if len(data) < bytes_each:
                    raise DataError(f"{self}.frames.npy: the shard ends too early")
                yield np.frombuffer(data, np.uint8).reshape(shape[1:])


# --- frames


@contextlib.contextmanager
def opened(data, name):
    """A video's bytes as an av container; what is wrong with them becomes a DataError."""
    try:
        with av.open(io.BytesIO(data)) as video:
            video.streams.video[0].thread_type = "NONE"  # a loader process per core is faster than decoder threads
            yield video
    except (av.FFmpegError, IndexError, ValueError, TypeError) as error:
        raise DataError(f"{name}: not a readable video ({str(error) or 'no video stream'})") from None


def decode(data, name, rows, make):
    """{row: make(frame)} of the frames `rows` (ascending) of a video's bytes, counted as a player shows them.

    Only what lies between a row and the keyframe before it is decoded; where that is not safe, all up to the last row.
    """
    with opened(data, name) as video:
        found = seek(video, rows, make)
    if len(found) < len(rows):
        with opened(data, name) as video:
            frames, wanted = itertools.islice(video.decode(video=0), rows[-1] + 1), set(rows)
            found = {number: make(frame) for number, frame in enumerate(frames) if number in wanted}
    if len(found) < len(rows):
        raise DataError(f"{name}: frame {max(set(rows) - set(found))} is beyond the end of the video")
    return found


def seek(video, rows, make):
    """{row: make(frame)}; a row is the place of a packet's time among all. Empty where packets are not frames.

    They are not where an edit list discards some, or where the video begins between two keyframes.
    """
    stream, found, needed = video.streams.video[0], {}, set()
    packets = [p for p in itertools.islice(video.demux(stream), rows[-1] + 1 + REORDER) if p.size]  # decoding order
    times = [packet.pts for packet in packets]
    unsafe = len(packets) <= rows[-1] or None in times or len(set(times)) < len(times)
    if unsafe or not packets[0].is_keyframe or any(packet.is_discard for packet in packets):
        return {}
    shown = sorted(range(len(times)), key=times.__getitem__)  # presentation order
    for row in rows:
        number = shown[row]
        while number >= 0 and number not in needed:
            needed.add(number)
            begins = packets[number].is_keyframe and times[number] <= times[shown[row]]
            number = -1 if begins else number - 1
    wanted = {times[shown[row]]: row for row in rows}
    for number in sorted(needed):
        frames = packets[number].decode()
        if number + 1 not in needed:  # the decoder holds some back
            frames += stream.codec_context.decode(None)
            stream.codec_context.flush_buffers()
        found |= {wanted[frame.pts]: make(frame) for frame in frames if frame.pts in wanted}
    return found


def to_rgb(width=None, height=None):
    """A function from an av.VideoFrame, or array (H, W, 3), to uint8 RGB (H, W, 3), or of this width and height.

    One number: a square. Scaled by area, with the colours that the video's tags tell, upright. It keeps swscale's
    tables: one per clip.
    """
    scaler, height = VideoReformatter(), height or width

    def convert(frame):
        if isinstance(frame, np.ndarray):
            if width is None or frame.shape[:2] == (height, width):
                return frame
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
        colours = {}
        if not frame.format.is_rgb:
            full = int(frame.color_range) == 2 or frame.format.name.startswith("yuvj")
            colours = dict(src_colorspace=MATRICES.get(int(frame.colorspace), 5), src_color_range=2 if full else 1)
            # PyAV 15 ignores the source's matrix if the target's is the same; RGB has none, so 7 changes nothing else
            colours |= dict(dst_colorspace=7, dst_color_range=2)
        image = scaler.reformat(frame, width, height, "rgb24", interpolation="AREA", **colours).to_ndarray()
        return upright(image, frame)

    return convert


def upright(image, frame):
    """An image (H, W, 3) turned and mirrored as the display matrix of its frame says, by quarter turns."""
    for entry in frame.side_data:
        if entry.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(entry), np.int32)[:5]  # x' = a x + c y, y' = b x + d y
            if abs(b) > abs(a):
                image, a, d = image.swapaxes(0, 1), c, b
            image = image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(image)


# --- episodes held out


def episode_hash(name, salt=""):
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(f"{salt}{name}".encode()).digest()[:8], "big") / 2**64


def held_out(clips, share=0.1, wanted=""):
    """The names of the episodes that validation keeps, sorted: those of `wanted`, or about `share` of all by hash.

    wanted: "56-69,80" or names; numbers match names with leading zeros too. Decided on all clips, before any is left
    out, so that every stage holds out the same. One episode alone is trained on.
    """
    names = sorted({clip.episode for clip in clips})
    if not wanted:
        held = [name for name in names if episode_hash(name) < share]
        if share > 0 and len(names) > 1 and len(held) in (0, len(names)):
            held = [min(names, key=episode_hash)]  # too few episodes for a share
        return held if len(names) > 1 else []
    held = set()
    for word in wanted.split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        numbers = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else ()
        found = {name for name in names if name == word or (name.isdecimal() and int(name) in numbers)}
        if not found:
            raise DataError(f"--val-episodes: no episode is called {word}; there are {', '.join(names[:5])} ...")
        held |= found
    if len(held) == len(names):
        raise DataError("--val-episodes: every episode is held out, none is left to train on")
    return sorted(held)


def clip_marks(clips):
    """A number for each clip, by which it is known again, wherever it lies and whatever lies beside it."""
    return sorted(zlib.crc32(f"{clip.key} {len(clip)}".encode()) for clip in clips)


def owner(name, clips, split):
    """What data.json of a checkpoint keeps of the source that has one of these clips, or None.

    Checkpoints of earlier versions do not list their clips: there the name decides.
    """
    marks = set(clip_marks(clips))
    for key, known in split.items():
        if marks.intersection(known["clips"]) if "clips" in known else key == name:
            return known
    return None


# --- reading


def shards_of(path, flag="--data"):
    """The .tar files of a folder, or the one file."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"{flag} {path}: no such file or folder")
    found = [path] if path.is_file() else sorted(file for file in path.glob("*.tar") if file.name[0] != ".")
    if not found:
        raise DataError(f"{flag} {path}: no shards (*.tar) in it; laq/videos_to_shards.py writes them")
    return found


def open_shard(shard):
    """The clips of one shard, by the headers of its tar, their meta not yet checked.

    A folder in the tar is part of the key. Hidden files (macOS puts ._NAME beside NAME) are no members.
    """
    clips = {}
    try:
        with tarfile.open(shard, "r:") as tar:  # not compressed: members are read at their place in the file
            for member in tar:
                folder, slash, name = member.name.removeprefix("./").rpartition("/")
                if not member.isfile() or name.startswith("."):
                    continue
                key, _, extension = name.partition(".")
                clip = clips.setdefault(folder + slash + key, Clip(shard, folder + slash + key, {}, {}))
                if extension in clip.members:
                    raise ValueError(f"{member.name} is there twice")
                clip.members[extension] = shard, member.offset_data, member.size
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise DataError(f"{shard}: not a complete WebDataset shard ({error})") from None
    for clip in clips.values():
        if "json" in clip.members:
            try:
                clip.meta = json.loads(clip.read("json"))
            except ValueError:
                clip.meta = None
    return list(clips.values())


def problem(meta):
    """What is wrong with a KEY.json, or None: it needs the fields that everything later relies on."""
    if not isinstance(meta, dict):
        return "not a JSON table"
    for name in TEXTS + NUMBERS:
        if not isinstance(meta.get(name), str if name in TEXTS else int | float):
            return f"has no {'text' if name in TEXTS else 'number'} `{name}`"
    if not (0 < meta["fps"] < 1e6 and 1 <= meta["length"] < 1e9):
        return f"fps {meta['fps']} and length {meta['length']}, expected above 0"
    return None


def read_shard(shard, say=print):
    """The clips of one shard that can be used. What cannot is named with the reason."""
    try:
        found = open_shard(shard)
    except (OSError, DataError) as error:
        say(f"skipping a shard: {error}")
        return []
    reasons = [problem(clip.meta) for clip in found]
    for clip, reason in zip(found, reasons, strict=True):
        if reason:
            say(f"skipping a clip: {clip}.json: {reason}")
    return [clip for clip, reason in zip(found, reasons, strict=True) if not reason]


def read_clips(path, labels=None, say=print):
    """All clips of a folder of shards (or one .tar) that can be used, joined with the members of their label shards.

    labels: folder of label shards. A clip that they do not hold keeps its own members alone.
    """
    clips = []
    for shard in shards_of(path):
        found = read_shard(shard, say)
        if labels:
            join(found, Path(labels) / shard.name, say)
        clips += found
    if not clips:
        raise DataError(f"--data {path}: no clip of its shards can be used")
    return clips


def join(clips, labels, say=print):
    """Add the members of a label shard to its clips; label members win."""
    try:
        members = {clip.key: clip.members for clip in open_shard(labels)}
    except (OSError, DataError) as error:
        say(f"skipping a label shard: {error}")
        return
    for clip in clips:
        clip.members |= members.get(clip.key, {})


# --- writing


def npy(array):
    """The bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def npz(**arrays):
    """The bytes of a .npz file."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def key_of(*names):
    """A sample's key. WebDataset ends a key at its first dot, so anything unusual becomes _ and a checksum is added."""
    name = "-".join(str(part) for part in names)
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:80]
    return plain if plain == name else f"{plain}-{zlib.crc32(name.encode()):08x}"


def write_shard(path, samples):
    """Write samples (dicts of __key__ and extension: bytes) to the tar `path`; a tar that is there is complete."""
    with atomic(path) as temporary, open(temporary, "wb") as file:
        with webdataset.TarWriter(file, mtime=0, user="0", group="0") as tar:
            for sample in samples:
                tar.write(sample)
