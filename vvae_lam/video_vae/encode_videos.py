"""Encode videos with a video VAE -> H5 latents, one file per video; or decode latents to a video.

Run:
  python vvae_lam/video_vae/encode_videos.py --data VIDEOS --vae DIR --out LATENTS --fps 8 --size 512 512
  python vvae_lam/video_vae/encode_videos.py --data SHARDS --vae DIR --out LATENTS
  python vvae_lam/video_vae/encode_videos.py --data VIDEOS --vae w.ckpt --checkout VideoVAEPlus --out LATENTS
  python vvae_lam/video_vae/encode_videos.py --decode LATENTS/a.h5 --vae DIR --out a.mp4

--data: a video, a folder of videos, or shards of laq/ and vla/ (KEY.json with KEY.mp4 or KEY.frames.npy).
OUT/NAME.h5 holds `embeddings` [N_chunks, C, T_latent, H, W] float16 in the VAE's normalised units, `frame_index` (the
last frame of the video that each latent holds) and, as attributes, the VAE, the rate of the latents, what was done to
the video, and whether the VAE is causal inside a chunk (measured). Files that are there already are left as they are:
several jobs may share a folder, and a killed one goes on with the same command.
"""

import contextlib
import io
import json
import os
import random
import re
import socket
import sys
import tarfile
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import h5py
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from tqdm import tqdm

if __name__ == "__main__":  # as a script: the folder and common.py come first on the path
    sys.path[:1] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]
from data import find_files
from train import setup
from video_vae.vae import open_vae

import common

VIDEOS = tuple(".avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split())
MATRICES = {1: 1, 9: 9, 10: 9}  # a video's tag of its colour matrix -> swscale's number; others are BT.601 (5)


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--data", metavar="PATH", help="a video, a folder of videos, at any depth, or a folder of shards (*.tar)")
    add("--decode", metavar="FILE", help="H5 latents to decode to the video --out, instead of encoding")
    add("--vae", required=True, metavar="PATH", help="folder of a diffusers VAE, or the .ckpt of VideoVAE+")
    add("--checkout", metavar="DIR", help="checkout of the VideoVAE+ repository, if --vae is its .ckpt")
    add("--out", required=True, metavar="PATH", help="folder of the H5 files, or the video to write")
    add("--fps", type=float, metavar="X", help="take the frames shown every 1/X seconds; without it all of them")
    add("--size", type=int, nargs=2, metavar="N", help="crop the centre and resize to height and width")
    add("--chunk-frames", default=8, help="frames encoded together and kept as one chunk", **whole)
    tails = ["refuse", "drop", "repeat"]
    add("--tail", choices=tails, default="refuse", help="what to do with frames beyond the last chunk")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    args = parser.parse_args(argv)
    if (args.data is None) == (args.decode is None):
        parser.error("give either --data, to encode, or --decode")
    if args.chunk_frames < 1 or (args.fps is not None and not 0 < args.fps < 1e6) or min(args.size or [1]) < 1:
        parser.error("--chunk-frames, --fps (below 1e6) and --size must be above 0")
    return args


# --- video files


@dataclass
class Video:
    """A video in a file or in a tar (offset, bytes). meta: KEY.json of a shard, with its key and shard name.

    array: it is an array (T, H, W, 3) uint8 in .npy format.
    """

    path: Path
    name: str  # of the H5 file, without suffix
    place: tuple | None = None
    meta: dict = field(default_factory=dict)
    array: bool = False

    def __str__(self):
        return str(self.path) if self.place is None else f"{self.path}:{self.meta['key']}"

    def open(self):
        if self.place is None:
            return av.open(str(self.path))
        with open(self.path, "rb") as file:
            file.seek(self.place[0])
            data = io.BytesIO(file.read(self.place[1]))
        return np.load(data, allow_pickle=False) if self.array else av.open(data)


def find_videos(root):
    """The videos below a folder (links followed, hidden files left out), in a folder's shards, or the one file."""
    if root.is_file() and root.suffix != ".tar":
        return [Video(root, root.stem)]
    if (root / "meta/info.json").exists():  # v3 puts many episodes into one video, and cameras are files of their own
        raise common.DataError(f"--data {root}: a LeRobotDataset: make shards of it (laq/videos_to_shards.py)")
    shards = [root] if root.is_file() else sorted(p for p in root.glob("*.tar") if p.name[0] != ".")
    found = [video for shard in shards for video in videos_of(shard)]
    if not found:
        found = [Video(file, str(file.relative_to(root).with_suffix(""))) for file in find_files(root, VIDEOS)]
    if not found:
        raise common.DataError(f"--data {root}: no videos ({', '.join(VIDEOS)}) and no shards (*.tar)")
    found.sort(key=lambda video: video.name)
    for one, two in zip(found, found[1:], strict=False):
        if one.name == two.name:
            raise common.DataError(f"{one.path} and {two.path} would both become {one.name}.h5")
    return found


def videos_of(shard):
    """The clips of a WebDataset shard: KEY.mp4 or KEY.frames.npy with its KEY.json."""
    members = {}
    try:
        with tarfile.open(shard, "r:") as tar:  # not compressed: members are read at their place in the file
            for member in tar:
                folder, slash, name = member.name.removeprefix("./").rpartition("/")
                if member.isfile() and not name.startswith("."):
                    key, _, extension = name.partition(".")
                    place = member.offset_data, member.size
                    what = dict(json.load(tar.extractfile(member))) if extension == "json" else place
                    members.setdefault(folder + slash + key, {})[extension] = what
    except (tarfile.TarError, EOFError, OSError, TypeError, ValueError) as error:
        raise common.DataError(f"{shard}: not a complete WebDataset shard ({error})") from None
    for key, found in members.items():
        for name in {"mp4", "frames.npy"} & set(found):
            meta = dict(found.get("json", {}), shard=shard.name, key=key)
            yield Video(shard, f"{shard.stem}/{re.sub('/', '-', key)}", found[name], meta, name == "frames.npy")


def frame_times(video, fps):
    """(rate, number of frames, those to take, in order, a warning or None), from the timestamps of all frames."""
    if video.array:
        frames, average = video.open(), float(video.meta["fps"])
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not average > 0:
            raise ValueError(f"{frames.dtype} {frames.shape} at {average:g} fps, expected uint8 (T, H, W, 3)")
        times = np.arange(len(frames)) / average
    else:
        with video.open() as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            # sorted: frames come as they are shown, but AVI gives them the times of their packets
            times = np.array(sorted(frame.pts * stream.time_base for frame in container.decode(stream)), float)
            average = float(stream.average_rate or 0)
    steps = np.diff(times)
    rate = 1 / np.median(steps) if len(steps) and np.median(steps) > 0 else average
    if fps is not None:
        wanted = times[0] + np.arange(int((times[-1] - times[0] + 1 / rate) * fps + 1e-6)) / fps
        return fps, len(times), np.searchsorted(times, wanted + 1e-6, side="right") - 1, None
    uneven = len(steps) > 0 and (steps.max() > 1.5 / rate or steps.min() < 0.5 / rate)
    text = f"its frames are {steps.min():.3g} to {steps.max():.3g} s apart: --fps X resamples it" if uneven else None
    return rate, len(times), np.arange(len(times)), text


def pictures(video, picked, size):
    """The frames of those numbers (increasing, repeats allowed), (H, W, 3) uint8, one after another."""
    copies, convert = np.bincount(picked), to_rgb(video)
    with contextlib.nullcontext(video.open()) if video.array else video.open() as source:
        for frame, count in zip(source if video.array else source.decode(video=0), copies, strict=False):
            if count:
                image = frame if video.array else convert(frame)
                yield from [image if size is None else resize(image, *size)] * count


def to_rgb(video):
    """A function from an av.VideoFrame to (H, W, 3) uint8 RGB: colours as the tags tell, turned upright."""
    scaler = VideoReformatter()

    def convert(frame):
        if frame.format.components[0].bits > 12:
            raise common.DataError(f"{video}: frames of {frame.format.name}: depth, not colour")
        colours = {}
        if not frame.format.is_rgb:
            full = int(frame.color_range) == 2 or frame.format.name.startswith("yuvj")
            colours = dict(src_colorspace=MATRICES.get(int(frame.colorspace), 5), src_color_range=2 if full else 1)
            # PyAV 15 ignores the source's matrix if the target's is the same; RGB has none, so 7 changes nothing else
            colours |= dict(dst_colorspace=7, dst_color_range=2)
        image = scaler.reformat(frame, format="rgb24", **colours).to_ndarray()
        for entry in frame.side_data:
            if entry.type.name == "DISPLAYMATRIX":
                a, b, _, c, d = np.frombuffer(bytes(entry), np.int32)[:5]  # x' = a x + c y, y' = b x + d y
                if abs(b) > abs(a):
                    image, a, d = image.swapaxes(0, 1), c, b
                image = image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
        return np.ascontiguousarray(image)

    return convert


def resize(image, height, width):
    """Crop the centre to the wanted proportions, then resize; uint8 (H, W, 3)."""
    H, W = image.shape[:2]
    h, w = min(H, round(W * height / width)), min(W, round(H * width / height))
    top, left = (H - h) // 2, (W - w) // 2
    x = torch.from_numpy(image[top : top + h, left : left + w]).permute(2, 0, 1)[None].float()
    x = torch.nn.functional.interpolate(x, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return x[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def write_video(path, frames, fps):
    """(T, H, W, 3) uint8 as h264."""
    with av.open(str(path), "w", format="mp4") as video:
        stream = video.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        height, width = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2  # h264 wants even sizes
        stream.height, stream.width, stream.pix_fmt, stream.options = height, width, "yuv420p", {"crf": "16"}
        for image in frames:
            video.mux(stream.encode(av.VideoFrame.from_ndarray(image[:height, :width], format="rgb24")))
        video.mux(stream.encode())


# --- encode


def encode(video, target, vae, args, settings):
    """One video into one file; returns the number of chunks."""
    try:
        rate, length, picked, warning = frame_times(video, args.fps)
    except (av.FFmpegError, OSError, EOFError, KeyError, IndexError, TypeError, ValueError) as error:
        text = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
        raise common.DataError(f"{video}: not a readable video ({text})") from None
    if warning:
        print(f"warning: {video}: {warning}", flush=True)
    count = len(picked)
    whole, over = divmod(count - vae.lead, args.chunk_frames)
    if count <= vae.lead or (whole == 0 and args.tail != "repeat"):
        raise common.DataError(f"{video}: {count} frames are less than one chunk of {args.chunk_frames + vae.lead}")
    if over and args.tail == "refuse":
        rule = f"{args.chunk_frames} k" + f" + {vae.lead}" * (vae.lead > 0)
        cures = f"--tail drop leaves out the last {over}, repeat repeats it {args.chunk_frames - over} times"
        raise common.DataError(f"{video}: {count} frames, but {vae.name} takes {rule}: {cures}")
    chunks = whole + (over > 0 and args.tail == "repeat")
    kept, latents = vae.lead + chunks * args.chunk_frames, args.chunk_frames // vae.ratio
    picked = picked[np.minimum(np.arange(kept), count - 1)]
    ends = vae.lead + vae.ratio * np.arange(1, chunks * latents + 1) - 1  # the last of the picked frames in each latent
    about = {name: str(video.meta[name]) for name in ("shard", "key", "episode", "camera") if name in video.meta}
    about |= dict(frames=length, frames_dropped=max(0, count - kept), frames_repeated=max(0, kept - count))
    with common.atomic(target) as temporary, h5py.File(temporary, "w") as file:
        source = pictures(video, picked, args.size)
        parts = 1 if vae.lead else chunks  # a Wan-type VAE's first latent differs: the video in one go
        for part in range(parts):
            images = np.stack([next(source) for _ in range(kept // parts)])
            z = vae.encode(images).cpu().numpy().astype(np.float16)  # T' C H W
            if not np.isfinite(z).all():
                raise common.DataError(f"{video}: {vae.name} gave NaN or infinity for chunk {part}")
            z = z.reshape(-1, latents, *z.shape[1:]).swapaxes(1, 2)
            if part == 0:
                data = file.create_dataset("embeddings", (chunks, *z.shape[1:]), np.float16, chunks=(1, *z.shape[1:]))
                if vae.causal is None:
                    vae.causal = vae.is_causal(images[: vae.lead + args.chunk_frames])
            data[part * len(z) : (part + 1) * len(z)] = z
        file["frame_index"] = picked[ends]
        file.attrs.update(settings | about | dict(fps=rate / vae.ratio, causal=vae.causal, video=video.path.name))
    return chunks


def check_settings(target, settings):
    """A file that is there already must have been made with the same settings."""
    try:
        with h5py.File(target, "r", locking=False) as file:
            there = {name: file.attrs.get(name) for name in settings}
    except OSError as error:
        raise common.DataError(f"{target}: not a whole HDF5 file ({error}): remove it") from None
    for name, value in settings.items():
        if not np.array_equal(there[name], value):
            was = f"{name} {there[name]}"
            raise common.DataError(f"{target}: there already, with {was}, not {value}: give another --out")


def remove_leftovers(out):
    """Remove half-written files of processes of this machine that are no more."""
    for file in out.rglob(f".*.{socket.gethostname()}-*.tmp"):
        try:
            os.kill(int(file.stem.rpartition("-")[2]), 0)
        except ProcessLookupError:
            common.remove(file)
        except (ValueError, PermissionError):  # not ours to judge
            continue


def encode_all(args):
    """Every video of --data; broken ones are named, and the exit code is then 1."""
    out, videos = Path(args.out), find_videos(Path(args.data))
    vae = open_vae(args.vae, setup(args)[2], args.checkout)
    if args.chunk_frames % vae.unit:
        raise common.DataError(f"--chunk-frames {args.chunk_frames}: {vae.name} takes multiples of {vae.unit}")
    settings = dict(vae=vae.name, scaling=(1 / vae.std).flatten().tolist(), shift=vae.mean.flatten().tolist())
    settings |= dict(chunk_frames=args.chunk_frames, tail=args.tail)
    settings |= dict(wanted_fps=args.fps or 0.0, size=args.size or [0, 0])  # 0: as in the video
    failed, done = 0, 0
    remove_leftovers(out)
    random.shuffle(videos)  # jobs that share the folder rarely meet at one video
    for video in tqdm(videos, unit="video", disable=not sys.stderr.isatty()):
        target = out / f"{video.name}.h5"
        common.make_folder(target.parent)
        if target.exists():
            check_settings(target, settings)
            continue
        try:
            chunks = encode(video, target, vae, args, settings)
        except common.DataError as error:
            print(f"left out: {error}", flush=True)
            failed += 1
            continue
        done += 1
        print(f"{target}: {chunks} chunks", flush=True)
    print(f"{done} videos encoded, {failed} left out, {len(videos) - done - failed} were there already")
    return 1 if failed else 0


# --- decode


def decode(args):
    """The latents of one file as a video, at the rate of the video that they were made from."""
    try:
        with h5py.File(args.decode, "r", locking=False) as file:
            latents, fps = file["embeddings"][()].astype(np.float32), float(file.attrs.get("fps", 2.0))
            together, made_by = "rollout" in file.attrs, file.attrs.get("vae")
    except (OSError, KeyError, ValueError) as error:
        raise common.DataError(f"--decode {args.decode}: no data set `embeddings` to read ({error})") from None
    latents = latents if latents.ndim == 5 else latents[:, :, None]
    vae = open_vae(args.vae, setup(args)[2], args.checkout)
    if made_by not in (None, vae.name):
        raise common.DataError(f"--decode {args.decode}: latents of {made_by}, not of {vae.name}")
    if vae.lead or together:  # one video
        frames = vae.decode(latents.swapaxes(1, 2).reshape(-1, latents.shape[1], *latents.shape[3:]))
    else:  # chunk by chunk, as they were encoded
        frames = np.concatenate([vae.decode(chunk.swapaxes(0, 1)) for chunk in latents])
    with common.atomic(args.out) as path:
        write_video(path, frames, fps * vae.ratio)
    print(f"{args.out}: {len(frames)} frames")
    return 0


def main(argv=None):
    args = parse(argv)
    return decode(args) if args.decode else encode_all(args)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
