"""Encode videos with a video VAE -> H5 latents, one file per video; or decode latents to a video.

Run:
  python vvae_lam/encode_videos.py --data VIDEOS --vae DIR --out LATENTS --fps 8 --size 512 512
  python vvae_lam/encode_videos.py --data VIDEOS --vae sota-4-16z.ckpt --checkout VideoVAEPlus --out LATENTS
  python vvae_lam/encode_videos.py --decode LATENTS/a.h5 --vae DIR --out a.mp4

OUT/NAME.h5 holds `embeddings` [N_chunks, C, T_latent, H, W] float16 in the VAE's normalised units and, as attributes,
the VAE, the rate of the latent frames, what was done to the video, and whether the VAE is causal inside a chunk
(measured). Files that are there already are passed over; a killed run goes on with the same command.
"""

import sys
from fractions import Fraction
from pathlib import Path

import av
import h5py
import numpy as np
import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
from tqdm import tqdm
from vae import open_vae

import common

VIDEOS = {".mp4", ".mkv", ".webm", ".avi", ".mov"}


def parse(argv=None):
    parser = common.Parser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--data", metavar="PATH", help="a video or a folder of videos, searched with its sub-folders")
    add("--decode", metavar="FILE", help="H5 latents to decode to the video --out, instead of encoding")
    add("--vae", required=True, metavar="PATH", help="folder of a diffusers VAE, or the .ckpt of VideoVAE+")
    add("--checkout", metavar="DIR", help="checkout of the VideoVAE+ repository, if --vae is its .ckpt")
    add("--out", required=True, metavar="PATH", help="folder of the H5 files, or the video to write")
    add("--fps", type=float, metavar="X", help="take so many frames a second; without it all of them")
    add("--size", type=int, nargs=2, metavar="N", help="crop the centre and resize to height and width")
    add("--chunk-frames", default=8, help="frames encoded together and kept as one chunk", **whole)
    add(
        "--tail",
        choices=["refuse", "drop", "repeat"],
        default="refuse",
        help="what to do with frames beyond the last chunk",
    )
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    args = parser.parse_args(argv)
    args.seed = 0  # common.setup wants one; nothing here is random
    if (args.data is None) == (args.decode is None):
        parser.error("give either --data, to encode, or --decode")
    if args.chunk_frames < 1 or (args.fps is not None and not args.fps > 0) or min(args.size or [1]) < 1:
        parser.error("--chunk-frames, --fps and --size must be above 0")
    return args


# --- video files


def read_video(path, fps=None, size=None):
    """(rate, number, iterator) of a video's frames (H, W, 3) uint8; with fps, those shown every 1 / fps seconds."""
    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        stream.thread_type = "AUTO"
        times = [float(frame.pts * stream.time_base) for frame in video.decode(stream)]
        rate = float(stream.average_rate)
    if fps is None:
        picked = np.arange(len(times))
    else:
        wanted = times[0] + np.arange(int((times[-1] - times[0] + 1 / rate) * fps + 1e-6)) / fps
        picked = np.searchsorted(times, wanted + 1e-6, side="right") - 1

    def frames():
        copies = np.bincount(picked, minlength=len(times))
        with av.open(str(path)) as video:
            for frame, count in zip(video.decode(video=0), copies, strict=True):
                if count:
                    image = frame.to_ndarray(format="rgb24")
                    image = image if size is None else resize(image, *size)
                    yield from [image] * count

    return fps or rate, len(picked), frames()


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


def encode(path, target, vae, args, settings):
    """One video into one file; returns the number of chunks, or None if it was there."""
    settings = settings | dict(video=path.name)
    if target.exists():
        with h5py.File(target, "r", locking=False) as file:
            for name, value in settings.items():
                if not np.array_equal(file.attrs.get(name), value):
                    was = file.attrs.get(name)
                    raise ValueError(f"{target}: there already, with {name} {was}, not {value}: give another --out")
        return None
    try:
        rate, count, frames = read_video(path, args.fps, args.size)
    except (av.FFmpegError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: not a readable video ({common.brief(error)})") from None
    whole, over = divmod(count - vae.lead, args.chunk_frames)
    if count <= vae.lead or (whole == 0 and args.tail != "repeat"):
        raise ValueError(f"{path}: {count} frames are less than one chunk of {args.chunk_frames + vae.lead}")
    if over and args.tail == "refuse":
        rule = f"{args.chunk_frames} k" + f" + {vae.lead}" * (vae.lead > 0)
        raise ValueError(
            f"{path}: {count} frames, but {vae.name} takes {rule}: --tail drop leaves out the last {over}, "
            f"--tail repeat repeats the last one {args.chunk_frames - over} times"
        )
    chunks = whole + (over > 0 and args.tail == "repeat")
    kept, latents = vae.lead + chunks * args.chunk_frames, args.chunk_frames // vae.ratio
    about = dict(frames=count, frames_dropped=max(0, count - kept), frames_repeated=max(0, kept - count))

    def filled():
        image = None
        for _, image in zip(range(kept), frames, strict=False):
            yield image
        for _ in range(about["frames_repeated"]):
            yield image

    with common.atomic(target) as temporary, h5py.File(temporary, "w") as file:
        source = filled()
        parts = 1 if vae.lead else chunks  # a Wan-type VAE's first latent differs: the video in one go
        for part in range(parts):
            images = np.stack([next(source) for _ in range(kept // parts)])
            z = vae.encode(images).cpu().numpy().astype(np.float16)  # T' C H W
            if not np.isfinite(z).all():
                raise ValueError(f"{path}: {vae.name} gave NaN or infinity for chunk {part}")
            z = z.reshape(-1, latents, *z.shape[1:]).swapaxes(1, 2)
            if part == 0:
                data = file.create_dataset("embeddings", (chunks, *z.shape[1:]), np.float16, chunks=(1, *z.shape[1:]))
                causal = vae.is_causal(images[: vae.lead + args.chunk_frames])
            data[part * len(z) : (part + 1) * len(z)] = z
        file.attrs.update(settings | about | dict(fps=rate / vae.ratio, causal=causal))
    return chunks


def encode_all(args):
    """Every video of --data; broken ones are named, and the exit code is then 1."""
    root, out = Path(args.data), Path(args.out)
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix.lower() in VIDEOS)
    if not files:
        raise ValueError(f"--data {root}: no videos ({', '.join(sorted(VIDEOS))})")
    device = common.setup(args).device
    vae = open_vae(args.vae, device, args.checkout)
    if args.chunk_frames % vae.unit:
        raise ValueError(f"--chunk-frames {args.chunk_frames}: {vae.name} takes multiples of {vae.unit}")
    settings = dict(vae=vae.name, scaling=(1 / vae.std).flatten().tolist(), shift=vae.mean.flatten().tolist())
    settings |= dict(chunk_frames=args.chunk_frames, tail=args.tail)
    settings |= dict(wanted_fps=args.fps or 0.0, size=args.size or [0, 0])  # 0: as in the video
    failed, done = 0, 0
    for path in tqdm(files, unit="video", disable=not sys.stderr.isatty()):
        relative = path.relative_to(root) if root.is_dir() else Path(path.name)
        target = (out / relative).with_suffix(".h5")
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(f".{target.name}.*.tmp"):  # of a killed run
            common.discard(stale)
        try:
            chunks = encode(path, target, vae, args, settings)
        except ValueError as error:
            print(f"left out: {error}", flush=True)
            failed += 1
            continue
        done += chunks is not None
        print(f"{target}: {'there already' if chunks is None else f'{chunks} chunks'}", flush=True)
    print(f"{done} videos encoded, {failed} left out, {len(files) - done - failed} were there already")
    return 1 if failed else 0


# --- decode


def decode(args):
    """The latents of one file as a video."""
    with h5py.File(args.decode, "r", locking=False) as file:
        if "embeddings" not in file:
            raise ValueError(f"--decode {args.decode}: no data set `embeddings`")
        latents, fps = file["embeddings"][()].astype(np.float32), float(file.attrs.get("fps", 2.0))
    latents = latents if latents.ndim == 5 else latents[:, :, None]
    vae = open_vae(args.vae, common.setup(args).device, args.checkout)
    parts = [latents.swapaxes(1, 2).reshape(-1, *latents.shape[1:2], *latents.shape[3:])] if vae.lead else None
    parts = parts or [chunk.swapaxes(0, 1) for chunk in latents]  # as they were encoded
    frames = np.concatenate([vae.decode(part) for part in parts])
    with common.atomic(args.out) as path:
        write_video(path, frames, fps * vae.ratio)
    print(f"{args.out}: {len(frames)} frames")
    return 0


def main(argv=None):
    args = parse(argv)
    return decode(args) if args.decode else encode_all(args)


if __name__ == "__main__":
    common.run(main)
