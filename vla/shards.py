"""WebDataset shards of whole clips, with label shards of the same names and keys beside them, read at random.

A sample is one camera of one episode: KEY.json (instruction, fps, source, episode, camera, length), KEY.mp4 or
KEY.frames.npy (T H W 3, uint8), where known KEY.actions.npy (T A) and KEY.state.npy (T S); in a label shard
KEY.latents.npz (codes (T' N), vectors (T' N D), gap) or KEY.actions.npy. Beside label shards with latents lies
labels.json.
"""

import io
import itertools
import json
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import webdataset
from av.video.reformatter import VideoReformatter

REORDER = 16  # by so many frames at most does h264, h265 or AV1 change the order


@dataclass
class Clip:
    """One sample. `meta` is its KEY.json; `members` maps an extension to (shard, offset, bytes)."""

    shard: Path
    key: str
    meta: dict
    members: dict
    rows: np.ndarray | None = field(default=None, repr=False)  # frames that a source draws from
    labels: dict | None = field(default=None, repr=False)  # labels.json, if it has latents

    def __str__(self):
        return f"{self.shard}:{self.key}"

    @property
    def identity(self):
        """What the split knows a clip by: all cameras of an episode go to the same side."""
        return self.meta["source"], self.meta["episode"]

    def read(self, extension):
        """The bytes of one member."""
        shard, offset, size = self.members[extension]
        with open(shard, "rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise ValueError(f"{shard}:{self.key}.{extension}: the shard ends {size - len(data)} bytes too early")
        return data

    def array(self, extension, dims=2):
        """A numeric .npy member with `dims` axes, one row per frame. Pickles are refused."""
        try:
            array = np.load(io.BytesIO(self.read(extension)), allow_pickle=False)
        except OSError:
            raise
        except Exception as error:  # for a damaged header numpy raises token and memory errors too
            raise ValueError(f"{self}.{extension}: {error}") from None
        if array.ndim != dims or len(array) != self.meta["length"] or array.dtype.kind not in "fiu":
            raise ValueError(
                f"{self}.{extension}: {array.dtype} {array.shape}, "
                f"expected {self.meta['length']} rows of numbers, {dims} axes"
            )
        if dims == 2 and not np.isfinite(array).all():
            raise ValueError(f"{self}.{extension}: holds NaN or infinity")
        return array.astype(np.float32) if dims == 2 else array

    def latents(self):
        """codes (T', N) int64, vectors (T', N, D) float32, valid (T',) bool, False across a cut; T' = T - gap."""
        name, about = f"{self.members['latents.npz'][0]}:{self.key}.latents.npz", self.labels
        try:
            with np.load(io.BytesIO(self.read("latents.npz")), allow_pickle=False) as file:
                codes, vectors, gap = (
                    file["codes"].astype(np.int64),
                    file["vectors"].astype(np.float32),
                    int(file["gap"]),
                )
                valid = file["valid"].astype(bool) if "valid" in file else np.ones(len(codes), bool)
        except Exception as error:  # for a damaged archive numpy raises zip, zlib, token and memory errors too
            raise ValueError(f"{name}: not codes, vectors and gap ({error})") from None
        want = max(0, self.meta["length"] - gap), about["codes"], about["dim"]
        if codes.shape != want[:2] or vectors.shape != want or valid.shape != want[:1]:
            found = f"codes {codes.shape}, vectors {vectors.shape}"
            raise ValueError(f"{name}: {found}; expected vectors {want} for a gap of {gap}: label these shards again")
        if codes.size and not 0 <= codes.min() <= codes.max() < about["vocabulary"]:
            raise ValueError(f"{name}: code {codes.max()}, but labels.json has a vocabulary of {about['vocabulary']}")
        if not np.isfinite(vectors).all():
            raise ValueError(f"{name}: vectors hold NaN or infinity")
        return codes, vectors, valid

    def frames(self, rows, size):
        """Those frames, (n, size, size, 3) uint8, squashed to a square as LAPA does."""
        if "mp4" in self.members:
            frames = decode(self.read("mp4"), str(self), rows, size)
        elif "frames.npy" in self.members:
            frames = self.array("frames.npy", dims=4)[rows]
            if frames.shape[3] != 3 or frames.dtype != np.uint8:
                raise ValueError(f"{self}.frames.npy: {frames.dtype} {frames.shape}, expected uint8 (T, H, W, 3)")
        else:
            raise ValueError(f"{self}: has neither .mp4 nor .frames.npy")
        return resize(frames, size)


def decode(data, name, rows, size):
    """Frames `rows` of a video's bytes, (n, size, size, 3) uint8.

    Only what lies between a row and the keyframe before it is decoded; if that does not give each row, everything is.
    """
    wanted, scaler, found = sorted(set(map(int, rows))), VideoReformatter(), {}

    def square(frame):
        return scaler.reformat(frame, size, size, "rgb24", interpolation="AREA").to_ndarray()

    try:
        with av.open(io.BytesIO(data)) as video:
            found = sought(video, wanted, square)
        if len(found) < len(wanted):
            with av.open(io.BytesIO(data)) as video:
                video.streams.video[0].thread_type = "NONE"
                frames = enumerate(itertools.islice(video.decode(video=0), wanted[-1] + 1))
                found = {number: square(frame) for number, frame in frames if number in wanted}
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise ValueError(f"{name}: not a readable video ({str(error) or 'no video stream'})") from None
    if len(found) < len(wanted):
        raise ValueError(f"{name}: frame {max(set(wanted) - found.keys())} is beyond the end of the video")
    return np.stack([found[int(row)] for row in rows])


def sought(video, rows, make):
    """{row: make(frame)}; frames are told by the order of their packets' times. Nothing where that cannot be."""
    stream, found, needed = video.streams.video[0], {}, set()
    stream.thread_type = "NONE"  # a loader process per core is faster than threads of the decoder
    most = rows[-1] + 1 + REORDER
    packets = [packet for packet in itertools.islice(video.demux(stream), most) if packet.size]  # in decoding order
    times = [packet.pts for packet in packets]
    if len(times) <= rows[-1] or len(set(times) - {None}) < len(times):
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


def resize(frames, size):
    """Frames (n, H, W, 3) uint8 -> (n, size, size, 3) uint8, averaged over areas as `decode` does."""
    if frames.shape[1:3] == (size, size):
        return frames
    scaler, frames = VideoReformatter(), (av.VideoFrame.from_ndarray(np.ascontiguousarray(f), "rgb24") for f in frames)
    return np.stack([scaler.reformat(f, size, size, "rgb24", interpolation="AREA").to_ndarray() for f in frames])


# --- reading


def shards_of(path, what="--data"):
    """The .tar files of a folder, or the one file; an error if there is none."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{what} {path}: no such file or folder")
    found = [path] if path.is_file() else sorted(path.glob("*.tar"))
    if not found:
        raise ValueError(f"{what} {path}: no shards (*.tar) in it")
    return found


def scan(shard):
    """{key: {extension: (shard, offset, bytes)}} of a tar, from its headers."""
    samples = {}
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.isfile():
                    key, _, extension = Path(member.name).name.partition(".")
                    samples.setdefault(key, {})[extension] = (shard, member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{shard}: not a whole tar ({error})") from None
    return samples


def read_clips(path, labels=None):
    """All clips of a folder of shards (or one .tar), joined with their label shards, whose members win."""
    clips = []
    for shard in shards_of(path):
        samples = scan(shard)
        for key, members in (scan(Path(labels) / shard.name) if labels else {}).items():
            if key not in samples:
                raise ValueError(
                    f"{Path(labels) / shard.name}:{key}: {shard} has no such clip; label these shards again"
                )
            samples[key] = {**samples[key], **members}
        for key, members in samples.items():
            clip = Clip(shard, key, {}, members)
            try:
                clip.meta = json.loads(clip.read("json"))
                known = [isinstance(clip.meta[name], str) for name in ("source", "episode")]
                assert all(known) and int(clip.meta["length"]) >= 1 and clip.meta["fps"] > 0
            except (KeyError, TypeError, ValueError, AssertionError) as error:
                why = f"{type(error).__name__} {error}".strip()
                raise ValueError(f"{clip}.json: needs texts source, episode and numbers length, fps ({why})") from None
            clips.append(clip)
    if not clips:
        raise ValueError(f"--data {path}: its shards hold no clip")
    return clips


def read_vocabulary(labels):
    """labels.json beside label shards: vocabulary K, codes N, dim D, gap in frames, and the codebook (N, K, D).

    A codebook (K, D) in the file is every slot's.
    """
    path = Path(labels) / "labels.json"
    try:
        about = json.loads(path.read_text())
        N, K, D = (int(about[name]) for name in ("codes", "vocabulary", "dim"))
        codebook = np.array(about["codebook"], float)
        codebook = np.stack([codebook] * N) if codebook.ndim == 2 else codebook
        if codebook.shape != (N, K, D):
            raise ValueError(f"the codebook has shape {codebook.shape}, expected {(N, K, D)}")
        return dict(vocabulary=K, codes=N, dim=D, gap=int(about["gap"]), codebook=codebook.tolist())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: not there: --labels wants the folder that laq/label.py writes") from None
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: needs vocabulary, codes, dim, gap and codebook ({error})") from None


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


def write_shard(path, samples):
    """Write samples (dicts of __key__ and extension: bytes) to the tar `path`, which appears whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            with webdataset.TarWriter(file, mtime=0, user="0", group="0") as tar:
                for sample in samples:
                    tar.write(sample)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
