"""One recording of video-VAE latents in HDF5, read lazily.

One file per recording, data set `embeddings`: [N_chunks, C, T_latent, H, W], any float type, compressed or not; or
[N, C, H, W], one latent frame each. Chunks follow one another: N_chunks * T_latent latent frames. Optional data sets,
a row per latent frame: `actions` (what happens from that frame on; floats (A), or class numbers), `states` (A) and
`frame_index` (the last frame of the video that the latent holds). Attributes are listed in README.md.

A VAE that is not causal (VideoVAE+, CogVideoX) encodes the frames of a chunk together: all latents but the chunk's last
have seen later frames. Only the last one is used, unless the file's attribute `causal` is true.
"""

import contextlib
import functools
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from common import DataError

KEY = "embeddings"
AXES = "[N_chunks, C, T_latent, H, W] or [N, C, H, W]"
with contextlib.suppress(ImportError):
    import hdf5plugin  # noqa: F401  (filters such as blosc and zstd)


# --- recordings


@dataclass(eq=False)
class Recording:
    """One file. A frame is a latent frame that is used: every one, or the last of each chunk."""

    source: str
    id: str  # path below the source's folder, without suffix
    path: Path
    chunks: int
    chunk_frames: int  # T_latent
    shape: tuple  # C H W
    attributes: dict
    split: str = "train"

    def __post_init__(self):
        self.every = self.chunk_frames == 1 or str(self.attributes.get("causal")).lower() in ("true", "1")
        self.mark = None  # fingerprint(), once it has been read from the file

    def __len__(self):
        return self.chunks * self.chunk_frames if self.every else self.chunks

    @property
    def episode(self):
        """What the split goes by: all cameras of an episode are on one side."""
        return str(self.attributes.get("episode", self.id))

    @property
    def fps(self):
        """Frames per second, or None if the file does not say."""
        fps = self.attributes.get("fps")
        return None if fps is None else float(fps) / (1 if self.every else self.chunk_frames)

    def row(self, frames):
        """Number of a frame among all latents of the file."""
        frames = np.asarray(frames)
        return frames if self.every else frames * self.chunk_frames + self.chunk_frames - 1

    def stored(self, chunks):
        """The chunks of a slice as they are stored."""
        try:
            return opened(self.path, os.getpid())[KEY][chunks]
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise DataError(f"{self.path}: `{KEY}` cannot be read at chunk {chunks.start} ({reason(error)})") from None

    def read(self, frames):
        """Latents (n, C, H, W) float32 of increasing frame numbers; one strided read of the chunks that hold them."""
        chunk, place = np.divmod(self.row(frames), self.chunk_frames)
        step = int(np.gcd.reduce(np.diff(chunk), initial=0)) or 1
        block = self.stored(slice(chunk[0], chunk[-1] + 1, step)).astype(np.float32)
        block = block[:, :, None] if block.ndim == 4 else block
        latents = block[(chunk - chunk[0]) // step, :, place]
        for bad, what in ((~np.isfinite(latents), "NaN or infinity"), (~latents.any((1, 2, 3)), "nothing but zeros")):
            if bad.any():
                where = chunk[bad.reshape(len(bad), -1).any(1)][0]
                raise DataError(f"{self.path}: `{KEY}` holds {what} in chunk {where}: encode it again, or leave it out")
        return latents

    def fingerprint(self):
        """What tells the recording from others, whatever its file is called: number of latents, and some chunks."""
        if self.mark is None:
            step = max(1, (self.chunks - 1) // 2)
            some = self.stored(slice((self.chunks - 1) % step, None, step))  # with the last: episodes may begin alike
            self.mark = f"{self.chunks * self.chunk_frames}-{zlib.crc32(some.astype(np.float32).tobytes()):08x}"
        return self.mark

    def motion(self, gap):
        """(what happens from frame t to t + gap (T - gap, ...), its name), or (None, None) if the file does not say.

        states: their difference; a dim that jumps by more than pi within [-pi, pi] is an angle, and is unwrapped.
        actions: the sum of the rows from t on; class numbers (one integer a row) only where these are one row. Rows
        may hold NaN.
        """
        with h5py.File(self.path, "r", locking=False) as file:
            name = next((name for name in ("states", "actions") if name in file), None)
            values = None if name is None else rows_of(file, name)
        if name is None or len(self) <= gap:
            return None, None
        rows = self.chunks * self.chunk_frames
        if values.ndim not in (1, 2) or len(values) != rows or values.dtype.kind not in "biuf":
            found = f"`{name}` holds {values.dtype} of shape {values.shape}"
            raise DataError(f"{self.path}: {found}, expected numbers ({rows}, A): a row per latent frame")
        first = self.row(np.arange(len(self) - gap))
        last = self.row(np.arange(gap, len(self)))
        if name == "actions" and values.dtype.kind != "f" and values.size == rows:
            return (values[first].reshape(-1), name) if (last == first + 1).all() else (None, None)
        values = values.reshape(rows, -1).astype(np.float64)
        if name == "states":
            known = np.nan_to_num(values)
            jumps = np.abs(np.diff(known, axis=0)).max(0)
            angle = (np.abs(known).max(0) < 3.2) & (jumps > np.pi)
            change = values[last] - values[first]
            change[:, angle] = (change[:, angle] + np.pi) % (2 * np.pi) - np.pi
            return change, name
        return np.stack([values[a:b].sum(0) for a, b in zip(first, last, strict=True)]), name

    def frame_index(self):
        """The last video frame that each frame holds, (T,) int64; where the file does not say, its own number."""
        with h5py.File(self.path, "r", locking=False) as file:
            rows = rows_of(file, "frame_index") if "frame_index" in file else None
        number = np.arange(len(self))
        if rows is None:
            return number
        if rows.shape != (self.chunks * self.chunk_frames,) or not (np.diff(rows, prepend=0) >= 0).all():
            raise DataError(f"{self.path}: `frame_index` is not a growing frame number for each latent frame")
        return rows.astype(np.int64)[self.row(number)]


def reason(error):
    """The first line of a library's error, with the remedy where it is known."""
    text = (str(error) or type(error).__name__).splitlines()[0][:150]
    return f"{text}; pip install hdf5plugin" if "filter" in text.lower() else text


@functools.lru_cache(maxsize=64)
def opened(path, process):
    """One handle per file and process: HDF5 handles do not survive a fork."""
    return h5py.File(path, "r", locking=False)


def inspect(path, source="data", name=None):
    """The recording of a file, from its header alone; DataError says what is wrong with it."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(40)
        if not head or head.startswith(b"version https://git-lfs"):
            raise DataError(f"{path}: {'an empty file' if not head else 'a Git LFS pointer: run git lfs pull'}")
        with h5py.File(path, "r", locking=False) as file:
            data = file.get(KEY)
            if not isinstance(data, h5py.Dataset):
                names = ", ".join(map(str, file)) or "an empty file"
                raise DataError(f"{path}: no data set `{KEY}`, only {names}")
            shape, kind, attributes = data.shape, data.dtype.kind, {**file.attrs, **data.attrs}
            attributes = {k: v.decode() if isinstance(v, bytes) else v for k, v in attributes.items()}
            missing = never_written(data, path.parent)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise DataError(f"{path}: not a whole HDF5 file ({reason(error)})") from None
    if len(shape) not in (4, 5) or 0 in shape:
        raise DataError(f"{path}: `{KEY}` has shape {shape}, expected {AXES}")
    if kind != "f":
        raise DataError(f"{path}: `{KEY}` holds {kind!r} numbers, expected float16, float32 or float64")
    if missing:
        raise DataError(f"{path}: {missing} of `{KEY}`: they would read as zeros; encode it again, or leave it out")
    fps = np.asarray(attributes.get("fps", 1.0))
    if fps.size != 1 or fps.dtype.kind not in "iuf" or not 0 < fps.item() < 1e6:
        raise DataError(f"{path}: its attribute `fps` is {attributes['fps']}, expected a number above 0")
    if str(attributes.get("causal", False)).lower() not in ("true", "false", "1", "0"):
        raise DataError(f"{path}: its attribute `causal` is {attributes['causal']}, expected true or false")
    C, H, W = shape[1], *shape[-2:]
    other = None
    if "".join(map(str, np.ravel(attributes.get("axes", AXES)))) not in (AXES, "NCTHW", "NCHW"):
        other = f"its attribute `axes` is {attributes['axes']}"
    elif "axes" not in attributes and "vae" not in attributes:
        if len(shape) == 5 and shape[2] > C:
            other = "they look like [N, T, C, H, W]"
        elif W < H and W < C and W <= 32:
            other = "they look like channels last"
    if other:
        hint = "reorder the axes, or write the attribute axes='NCTHW' if they are right"
        raise DataError(f"{path}: `{KEY}` {shape} is read as {AXES}, but {other}: {hint}")
    chunk_frames = shape[2] if len(shape) == 5 else 1
    return Recording(source, name or path.stem, path, shape[0], chunk_frames, (C, H, W), attributes)


def rows_of(file, name):
    """All of a small data set; DataError where it is none, or was not written whole."""
    found = file[name]
    missing = never_written(found, Path(file.filename).parent) if isinstance(found, h5py.Dataset) else "is a group"
    if missing:
        raise DataError(f"{file.filename}: `{name}`: {missing}")
    return found[()]


def never_written(data, folder):
    """What of a data set was never written, in words, or None. Its writer died, or the files it points to are gone."""
    if data.is_virtual:
        files = {source.file_name for source in data.virtual_sources()} - {"."}
        gone = [name for name in sorted(files) if not (folder / name).exists()]
        return f"{len(gone)} source files are not there ({gone[0]})" if gone else None
    if data.chunks is None:
        return "no value was written" if data.id.get_storage_size() == 0 and data.size else None
    expected = int(np.prod([-(-size // chunk) for size, chunk in zip(data.shape, data.chunks, strict=True)]))
    written = data.id.get_num_chunks()
    return f"{expected - written} of {expected} chunks were never written" if written < expected else None
