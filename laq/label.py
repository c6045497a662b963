"""Label clips with a trained LAQ: the latent action of every pair (t, t + gap), as shards beside the video shards.

Run:
  python laq/label.py --checkpoint runs/laq/001/checkpoints/best --data runs/demo/laq --out runs/labels
  torchrun --nproc_per_node 8 laq/label.py --checkpoint CKPT --data shards/g1 --gap 0.6s --out labels/g1

A label shard has its video shard's name and keys, with KEY.latents.npz: codes (T', N) int64, vectors (T', N, D) float32
(before quantisation), gap (frames), valid (T',) bool, False where the pair crosses a scene cut; T' = max(0, T - gap).
labels.json tells what all of them share. Shards that are there already are left as they are.
"""

import io
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
from data import Source, parse_gap, scene_cuts, thumbnails
from model import LAQ
from shards import check_meta, open_shard, shards_of, write_shard
from torch.utils.data import DataLoader

import common


def parse(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="checkpoint folder of a trained LAQ")
    add("--data", required=True, metavar="PATH", help="folder of video shards, or one of them")
    add("--out", required=True, metavar="DIR", help="folder for the label shards")
    add("--gap", metavar="T", help="3 (frames) or 0.6s; without it the gap that the model was trained with")
    add("--amp", choices=["off", "bf16"], default="off", help="mixed precision")
    add("--batch-size", type=int, default=64, metavar="N", help="frames seen at once")
    add("--workers", type=int, default=0, metavar="N", help="decoding processes per rank; 0 decodes in this one")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    args = parser.parse_args(None if argv is None else [str(word) for word in argv])
    for name in ("batch_size", "workers"):
        if getattr(args, name) < (name == "batch_size"):
            parser.error(f"{common.flag(name)} is too small")
    args.seed = 0
    return args


def gap_of(args):
    """The gap's (low, high, in seconds): --gap, or what the checkpoint's run was given."""
    if args.gap:
        return parse_gap(args.gap)
    record = Path(args.checkpoint).resolve().parents[1] / "args.json"
    try:
        words = json.loads(record.read_text())["flags"]["gap"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{record} does not tell the gap ({common.brief(error)}): give --gap") from None
    gaps = {word.rpartition("=")[2] for word in words}
    if len(gaps) > 1:
        raise ValueError(f"the model was trained with the gaps {', '.join(sorted(gaps))}: choose one with --gap")
    return parse_gap(gaps.pop())


def describe(model, checkpoint, gap):
    """labels.json: what a reader of the labels needs to know, and which weights made them."""
    q = model.quantiser
    words = torch.arange(q.vocabulary, device=q.used.device)[:, None].expand(-1, q.codes)
    codebook = q.lookup(words).float().transpose(0, 1).tolist()  # N K D
    weights = zlib.crc32((Path(checkpoint) / "pytorch_model.bin").read_bytes())
    about = dict(model="laq", codes=q.codes, vocabulary=q.vocabulary, dim=q.dim, gap=gap)
    return about | dict(weights=weights, codebook=codebook)


def agree(out, about):
    """Write labels.json; refuse a folder with the labels of another model or gap."""
    path = out / "labels.json"
    if path.exists():
        try:
            before = json.loads(path.read_text())
            other = [name for name in about if before.get(name) != about[name]]
        except (ValueError, AttributeError):
            other = ["everything"]
        if other:
            raise ValueError(f"{out} holds labels of another model or gap ({other[0]} differs): choose another --out")
        return
    out.mkdir(parents=True, exist_ok=True)
    with common.atomic(path) as temporary:
        temporary.write_text(json.dumps(about))


class Frames(torch.utils.data.Dataset):
    """Frames of each clip, (T, S, S, 3) uint8, or the reason why there are none."""

    def __init__(self, clips, size):
        self.clips, self.size = clips, size

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        try:
            return torch.from_numpy(self.clips[index].frames(self.size))
        except (OSError, ValueError) as error:
            return str(error)


def label(model, clip, frames, gap, args, amp):
    """One sample of a label shard."""
    with amp:
        codes, vectors = model.encode_clip(frames, gap, args.batch_size)
    scene = np.cumsum(scene_cuts(thumbnails(frames.numpy())))
    file = io.BytesIO()
    valid = scene[gap:] == scene[: max(0, len(scene) - gap)]
    np.savez(file, codes=codes.cpu().numpy(), vectors=vectors.cpu().numpy(), gap=gap, valid=valid)
    return {"__key__": clip.key, "latents.npz": file.getvalue()}


def main(argv=None):
    args = parse(argv)
    dist = common.setup(args)
    model = LAQ.from_pretrained(args.checkpoint).to(dist.device)
    if not model.quantiser.started:
        raise ValueError(f"{args.checkpoint}: its codes never started, so they mean nothing: train it for longer")
    amp, _ = common.autocast(args, dist.device)
    shards, out = shards_of(args.data), Path(args.out)
    gap = Source("", [], [], *gap_of(args))
    say = tqdm.write if dist.main else lambda text: None
    if dist.main:
        first = next((clips[0] for clips in map(readable, shards) if clips), None)
        if first is None:
            raise ValueError(f"--data {args.data}: none of its {len(shards)} shards can be read")
        agree(out, describe(model, args.checkpoint, gap.middle(first)))
    common.share(dist, None)  # the other ranks wait for labels.json
    count, broken, short, pairs = 0, [], 0, 0
    mine = [shard for shard in shards[dist.rank :: dist.world] if not (out / shard.name).exists()]
    bar = tqdm(mine, "shards", disable=not (dist.main and sys.stderr.isatty()))
    for number, shard in enumerate(bar):
        clips = readable(shard, broken)
        frames = DataLoader(Frames(clips, model.image_size), batch_size=None, num_workers=args.workers)

        def samples(clips=clips, frames=frames):
            nonlocal count, short, pairs
            for clip, found in zip(clips, frames, strict=True):
                if isinstance(found, str):
                    broken.append(found)
                    tqdm.write(f"passing over a clip: {found}")
                    continue
                steps = gap.middle(clip)
                count, short, pairs = count + 1, short + (len(found) <= steps), pairs + max(0, len(found) - steps)
                yield label(model, clip, found, steps, args, amp)

        write_shard(out / shard.name, samples())
        if dist.main and not sys.stderr.isatty():
            say(f"shard {number + 1}/{len(mine)}  {shard.name}  {count} clips, {pairs} pairs")
    totals = dict(clips=count, pairs=pairs, short=short, broken=len(broken), left=len(shards[dist.rank :: dist.world]))
    totals["left"] -= len(mine)
    totals = {name: round(n * dist.world) for name, n in common.mean(dist, totals, dict.fromkeys(totals, 1)).items()}
    say(f"{out}: {totals['clips']} clips labelled, {totals['pairs']} pairs, {totals['left']} shards were there already")
    say(f"{totals['short']} clips shorter than the gap (no pairs), {totals['broken']} broken ones passed over")
    if dist.world > 1:
        torch.distributed.destroy_process_group()
    return 0


def readable(shard, broken=None):
    """The clips of a shard; a broken shard is named and counted, and has none."""
    try:
        clips = open_shard(shard)
        for clip in clips:
            check_meta(clip)
        return clips
    except (OSError, ValueError) as error:
        if broken is not None:
            broken.append(str(shard))
            tqdm.write(f"passing over a shard: {error}")
        return []


if __name__ == "__main__":
    common.run(main)
