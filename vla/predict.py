"""Ask a stage-2 checkpoint: image and instruction in, latent action out, with probabilities.

Run:
  python vla/predict.py --checkpoint runs/latent/checkpoints/best --image a.png --instruction "push it" --out codes
  python vla/predict.py --checkpoint runs/latent/checkpoints/best --data web=PATH --frames 4 --out codes

Writes OUT/latents.json (per frame the codes, their probabilities (N, K), the predicted vectors (N, C)) and
OUT/latents.png.
"""

import json
import sys
from pathlib import Path

import av
import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import figures
from model import VLA
from shards import read_clips, to_rgb
from sources import named_paths
from train import setup

import common


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a checkpoint folder of train.py")
    add("--image", nargs="+", default=[], metavar="FILE", help="pictures, each asked with --instruction")
    add("--data", nargs=1, metavar="PATH", help="or a folder of shards: frames of its clips, with their instructions")
    add("--frames", type=int, default=4, metavar="N", help="clips of --data to take a frame from, evenly spread")
    add("--instruction", metavar="TEXT", help="for pictures, and for clips that have none")
    add("--out", required=True, metavar="DIR", help="folder to write")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    add("--seed", type=int, default=0, metavar="N", help="of the frames chosen from --data")
    args = parser.parse_args(argv)
    if bool(args.image) == bool(args.data):
        parser.error("give either --image FILES or --data PATH")
    if args.image and not args.instruction:
        parser.error("--image needs --instruction")
    if args.frames < 1:
        parser.error("--frames must be above 0")
    return args


def questions(args, size):
    """(name, picture (size, size, 3), instruction) of each frame to ask about."""
    for path in args.image:
        try:
            with av.open(path) as file:
                picture = to_rgb(size)(next(file.decode(video=0)))
        except (OSError, av.FFmpegError, IndexError, StopIteration) as error:
            raise common.DataError(f"{path}: not a readable picture ({error})") from None
        yield path, picture, args.instruction
    if args.data:
        ((_, path),) = named_paths(args.data)
        clips, rng = read_clips(path), np.random.default_rng(args.seed)
        for i in np.unique(np.linspace(0, len(clips) - 1, args.frames).astype(int)):
            instruction = clips[i].meta["instruction"].strip() or args.instruction
            if not instruction:
                raise common.DataError(f"{clips[i]}: has no instruction; --instruction TEXT gives one")
            row = int(rng.integers(len(clips[i])))
            yield f"{clips[i].key}, frame {row}", clips[i].frames(size, [row])[0], instruction


def main(argv=None):
    args = parse(argv)
    _, _, device = setup(args)
    model = VLA.from_pretrained(args.checkpoint).to(device).eval()
    if not model.config.latent:
        raise common.DataError(f"{args.checkpoint} has no latent head: give a checkpoint of train.py")
    names, frames, texts = zip(*questions(args, model.config.image_size), strict=True)
    batch = {name: value.to(device) for name, value in model.preprocess(list(frames), list(texts)).items()}
    probabilities, vectors = (part.cpu().numpy() for part in model.predict_latents(batch))
    rows = []
    for name, text, p, v in zip(names, texts, probabilities, vectors, strict=True):
        codes = p.argmax(1).tolist()
        numbers = dict(codes=codes, probabilities=p.round(4).tolist(), vectors=v.round(5).tolist())
        rows.append(dict(frame=name, instruction=text, **numbers))
        print(f"{name}: {text!r} -> codes {codes}, probabilities {p.max(1).round(3).tolist()}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with common.atomic(out / "latents.json") as path:
        path.write_text(json.dumps(dict(checkpoint=args.checkpoint, frames=rows), indent=1))
    with common.atomic(out / "latents.png") as path:
        figures.latents(frames, texts, probabilities).savefig(path, format="png")
    print(f"written: {out / 'latents.json'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
