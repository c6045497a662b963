"""Ask a stage-2 checkpoint: image and instruction in, latent action out, with probabilities.

Run:
  python vla/predict.py --checkpoint runs/latent/checkpoints/best --image a.png --instruction "push it" --out codes
  python vla/predict.py --checkpoint runs/latent/checkpoints/best --data web=PATH --frames 4 --out codes

Writes OUT/latents.json (per frame the codes, their probabilities (N K), the expected vectors (N D)) and
OUT/latents.png. With --decoder FILE.pt2, the tokenizer's decoder as a torch.export program (frame (B, 3, S, S) in
[0, 1], codes (B, N) -> the frame after the gap), the picture also shows what it makes of them.
"""

import json
import sys
from pathlib import Path

import av
import numpy as np
import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import figures
from model import VLA
from shards import read_clips, resize

import common


def parse(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a checkpoint folder of train.py")
    add("--image", nargs="+", default=[], metavar="FILE", help="pictures, each asked with --instruction")
    add("--data", metavar="PATH", help="or a folder of shards (one .tar): frames of its clips, with their instructions")
    add("--frames", type=int, default=4, metavar="N", help="clips of --data to take a frame from, evenly spread")
    add("--instruction", metavar="TEXT", help="for pictures, and for clips that have none")
    add("--decoder", metavar="FILE", help="exported decoder (.pt2): frame and codes to the frame after the gap")
    add("--out", required=True, metavar="DIR", help="folder to write")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    add("--seed", type=int, default=0, metavar="N", help="of the frames chosen from --data")
    args = parser.parse_args(argv)
    if bool(args.image) == bool(args.data):
        parser.error("give either --image FILES or --data PATH")
    if args.image and not args.instruction:
        parser.error("--image needs --instruction")
    return args


def read_picture(path):
    """(H, W, 3) uint8 of a picture file."""
    try:
        with av.open(str(path)) as file:
            return next(file.decode(video=0)).to_ndarray(format="rgb24")
    except (av.FFmpegError, IndexError, StopIteration) as error:
        raise ValueError(f"{path}: not a readable picture ({error})") from None


def questions(args, size):
    """(name, picture (size, size, 3), instruction) of each frame to ask about."""
    for file in args.image:
        yield file, resize(read_picture(file)[None], size)[0], args.instruction
    clips = read_clips(args.data.partition("=")[2] or args.data) if args.data else []
    rng = np.random.default_rng(args.seed)
    for i in np.unique(np.linspace(0, len(clips) - 1, args.frames).astype(int)) if clips else []:
        clip = clips[i]
        text = str(clip.meta.get("instruction") or "").strip() or args.instruction
        if not text:
            raise ValueError(f"{clip}.json: has no instruction; --instruction TEXT gives one to clips without")
        row = int(rng.integers(clip.meta["length"]))
        yield f"{clip.key}, frame {row}", clip.frames([row], size)[0], text


def decode(path, frames, codes, device):
    """What the exported decoder makes of frames (B, S, S, 3) uint8 and codes (B, N): (B, S, S, 3) uint8."""
    try:
        program = torch.export.load(path).module().to(device)
    except Exception as error:  # a file from elsewhere: torch raises a dozen kinds
        raise ValueError(f"{path}: not an exported decoder ({common.brief(error)})") from None
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    out = program(x.to(device), torch.from_numpy(codes).to(device)).clamp(0, 1) * 255
    return out.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def main(argv=None):
    args = parse(argv)
    dist = common.setup(args)
    model = VLA.from_pretrained(args.checkpoint).to(dist.device).eval()
    if not model.latent:
        raise ValueError(f"{args.checkpoint} has no latent head: it is a checkpoint of finetune.py")
    names, frames, texts = zip(*questions(args, model.config["image_size"]), strict=True)
    batch = {name: value.to(dist.device) for name, value in model.inputs(list(frames), list(texts)).items()}
    probabilities, vectors = (part.cpu().numpy() for part in model.predict_latents(batch))
    codes = probabilities.argmax(2)
    after = decode(args.decoder, np.stack(frames), codes, dist.device) if args.decoder else None
    rows = [
        dict(
            frame=name,
            instruction=text,
            codes=c.tolist(),
            probabilities=p.round(4).tolist(),
            vectors=v.round(5).tolist(),
        )
        for name, text, c, p, v in zip(names, texts, codes, probabilities, vectors, strict=True)
    ]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with common.atomic(out / "latents.json") as path:
        path.write_text(json.dumps(dict(checkpoint=args.checkpoint, gap=model.latent["gap"], frames=rows), indent=1))
    with common.atomic(out / "latents.png") as path:
        figures.latents(frames, texts, probabilities, after).savefig(path, format="png")
    for row in rows:
        best = [max(slot) for slot in row["probabilities"]]
        print(f"{row['frame']}: {row['instruction']!r} -> codes {row['codes']}, probabilities {best}")
    print(f"written: {out / 'latents.json'}")
    return 0


if __name__ == "__main__":
    common.run(main)
