"""WebDataset shards of whole clips, written in one piece and read at random.

A sample is one camera of one episode: KEY.json (instruction, fps, source, episode, camera, length, and `actions`:
"delta" or "absolute" where KEY.actions.npy is there), KEY.mp4 or KEY.frames.npy (T H W 3, uint8), and where known
KEY.actions.npy (T A) and KEY.state.npy (T S). Beside shard-000000.tar lies shard-000000.index.json, which says where in
the tar every member begins; without it (or if the tar has another size) the tar is read once, header by header.
"""

import contextlib
import io
import itertools
import json
import os
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
import webdataset
from av.video.reformatter import VideoReformatter

REORDER = 16  # by so many frames at most does h264, h265 or AV1 change the order
TEXTS, NUMBERS = ("instruction", "source", "episode", "camera"), ("fps", "length")


@dataclass
class Clip:
    """One sample of a shard. `meta` is its KEY.json; `members` maps an extension to (offset, bytes) in the tar."""

    shard: Path
    key: str
    meta: dict
    members: dict

    def __str__(self):
        return f"{self.shard}:{self.key}"

    def read(self, extension):
        """The bytes of one member."""
        offset, size = self.members[extension]
        with open(self.shard, "rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise ValueError(f"{self}.{extension}: the shard ends {size - len(data)} bytes too early")
        return data

    def array(self, extension):
        """A .npy member, or None if the sample has none. Pickles are refused."""
        if extension not in self.members:
            return None
        try:
            return np.load(io.BytesIO(self.read(extension)), allow_pickle=False)
        except OSError:
            raise
        except Exception as error:  # for a damaged header numpy raises token and memory errors too
            raise ValueError(f"{self}.{extension}: {error}") from None

    def frames(self, size=None, start=0, stop=None):
        """Frames start to stop - 1, (T, H, W, 3) uint8, or (T, size, size, 3): squashed to a square, as LAPA does."""
        frames = self.decoded(start, stop, pictures(size))
        if len({frame.shape for frame in frames}) > 1:
            raise ValueError(f"{self}: its frames change size")
        return np.stack(frames)

    def decoded(self, start=0, stop=None, make=lambda frame: frame):
        """A list of `make` of the frames start to stop - 1: av.VideoFrames, or arrays (H, W, 3) from .frames.npy."""
        length = self.meta["length"]
        rows = range(start, length if stop is None else stop)
        if "mp4" in self.members:
            return decode(self.read("mp4"), str(self), rows, length, make)
        frames = self.array("frames.npy")
        if frames is None:
            raise ValueError(f"{self}: has neither .mp4 nor .frames.npy")
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
            raise ValueError(f"{self}.frames.npy: {frames.dtype} {frames.shape}, expected uint8 (T, H, W, 3)")
        if len(frames) != length:
            raise ValueError(f"{self}: {len(frames)} frames, its json says {length}")
        return [make(frames[row]) for row in rows]


def decode(data, name, rows, length, make):
    """[make(frame)] of the frames `rows` (ascending) of a video's bytes; length: how many frames it should hold.

    Only what lies between a row and the keyframe before it is decoded; if that does not give each row, everything is.
    """
    try:
        with av.open(io.BytesIO(data)) as video:
            found, number = sought(video, rows, length, make), length
        if len(found) < len(rows):
            with av.open(io.BytesIO(data)) as video:
                video.streams.video[0].thread_type, number = "NONE", 0
                for number, frame in enumerate(video.decode(video=0), 1):
                    if number - 1 in rows:
                        found[number - 1] = make(frame)
    except (av.FFmpegError, IndexError, ValueError, TypeError) as error:
        raise ValueError(f"{name}: not a readable video ({str(error) or 'no video stream'})") from None
    if number != length:
        raise ValueError(f"{name}: {number} frames, its json says {length}")
    return [found[row] for row in rows]


def sought(video, rows, length, make):
    """{row: make(frame)}; frames are told by the order of their packets' times. Nothing where that cannot be."""
    stream, found, needed = video.streams.video[0], {}, set()
    stream.thread_type = "NONE"  # a loader process per core is faster than threads of the decoder
    most = rows[-1] + 1 + REORDER
    packets = [packet for packet in itertools.islice(video.demux(stream), most) if packet.size]  # in decoding order
    times = [packet.pts for packet in packets]
    if len(times) != min(most, length) or len(set(times) - {None}) < len(times):
        return found
    shown = sorted(range(len(times)), key=times.__getitem__)
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


def pictures(size=None):
    """A function from an av.VideoFrame or array (H, W, 3) to (H, W, 3) uint8 RGB, or (size, size, 3); for one clip.

    It keeps swscale's tables, and with them the range of the colours: hence not for more than a clip.
    """
    scaler = VideoReformatter()

    def picture(frame):
        if isinstance(frame, np.ndarray):
            return resize(frame[None], size)[0] if size else frame
        return scaler.reformat(frame, size, size, "rgb24", interpolation="AREA").to_ndarray()

    return picture


def resize(frames, size):
    """Frames (T, H, W, 3) uint8 -> (T, size, size, 3) uint8, antialiased."""
    if frames.shape[1:3] == (size, size):
        return frames
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return x.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def npy(array):
    """The bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def key_of(*names):
    """A sample's key: WebDataset ends a key at the first dot, so anything unusual becomes _ and a checksum."""
    name = "-".join(str(part) for part in names)
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:80]
    return plain if plain == name else f"{plain}-{zlib.crc32(name.encode()):08x}"


# --- writing


def write_shard(path, samples):
    """Write samples (dicts of __key__ and extension: bytes) to the tar `path` and its index; returns how many.

    Both are written to neighbours and renamed, the tar last: a tar that is there is whole. A sample that cannot be
    made must be left out by the caller. With no samples at all nothing is written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    index = temporary.with_suffix(".index")
    try:
        with open(temporary, "wb") as file:
            with webdataset.TarWriter(file, mtime=0, user="0", group="0") as tar:
                number = 0
                for sample in samples:
                    tar.write(sample)
                    number += 1
            file.flush()
            os.fsync(file.fileno())
        if number:
            index.write_text(json.dumps(scan(temporary)))
            os.replace(index, index_of(path))
            os.replace(temporary, path)
        return number
    finally:
        for left in (temporary, index):
            left.unlink(missing_ok=True)


def index_of(shard):
    return shard.with_suffix(".index.json")


def scan(shard):
    """The index of a tar, by reading its headers and every KEY.json."""
    samples = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            if member.isfile():
                key, _, extension = Path(member.name).name.partition(".")
                samples.setdefault(key, {})[extension] = [member.offset_data, member.size]
    clips = []
    for key, members in samples.items():
        data = Clip(shard, key, {}, members).read("json") if "json" in members else b"{}"
        clips.append(dict(key=key, meta=json.loads(data), members=members))
    return dict(size=shard.stat().st_size, clips=clips)


# --- reading


def open_shard(shard):
    """The clips of one shard."""
    index = None
    with contextlib.suppress(OSError, ValueError):
        index = json.loads(index_of(shard).read_text())
    try:
        if index is None or index["size"] != shard.stat().st_size:
            index = scan(shard)
        return [
            Clip(
                shard, str(clip["key"]), dict(clip["meta"]), {name: (int(a), int(b)) for name, (a, b) in places.items()}
            )
            for clip in index["clips"]
            for places in [clip["members"]]
        ]
    except (tarfile.TarError, EOFError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{shard}: not a whole WebDataset shard ({error})") from None


def check_meta(clip):
    """The fields of KEY.json that everything later relies on."""
    for name in TEXTS + NUMBERS:
        if not isinstance(clip.meta.get(name), str if name in TEXTS else int | float):
            raise ValueError(f"{clip}.json: has no {'text' if name in TEXTS else 'number'} `{name}`")
    if not clip.meta["fps"] > 0:
        raise ValueError(f"{clip}.json: fps {clip.meta['fps']}, expected above 0")


def shards_of(path):
    """The .tar files of a folder, or the one file; an error if there is none."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"--data {path}: no such file or folder")
    found = [path] if path.is_file() else sorted(path.glob("*.tar"))
    if not found:
        raise ValueError(f"--data {path}: no shards (*.tar); videos_to_shards.py writes them")
    return found


def read_clips(path, say=print):
    """All clips of a folder of shards (or one .tar). A broken shard is named, counted and passed over."""
    clips, broken = [], 0
    shards = shards_of(path)
    for shard in shards:
        try:
            found = open_shard(shard)
            for clip in found:
                check_meta(clip)
            clips += found
        except (OSError, ValueError) as error:
            broken += 1
            say(f"passing over a shard: {error}")
    if not clips:
        raise ValueError(f"--data {path}: none of its {len(shards)} shards holds a clip ({broken} are broken)")
    return clips
