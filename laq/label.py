"""Label clips with a trained LAQ: the latent action of every pair (t, t + gap), as shards beside the video shards.

Run:
  python laq/label.py --checkpoint runs/laq/000/checkpoints/best --data runs/demo/laq --out runs/labels
  torchrun --nproc_per_node 8 laq/label.py --checkpoint CKPT --data shards/g1 --gap 0.6s --out labels/g1

A label shard has its video shard's name and keys, with KEY.latents.npz: codes (T', N) int64, vectors (T', N, D) float32
(before quantization), gap (frames), valid (T',) bool, False where the pair crosses a scene cut; T' = max(0, T - gap).
labels.json tells what all of them share. Shards that are there already are left as they are. A clip or shard that
cannot be read is named and has no labels.
"""

import collections
import itertools
import json
import os
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
from data import THUMB, same_scene
from model import LAQ
from shards import npz, open_shard, read_shard, shards_of, to_rgb, write_shard
from sources import Source, parse_gap
from train import setup

import common


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
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
    if args.batch_size < 1 or args.workers < 0:
        parser.error("--batch-size must be above 0 and --workers must not be negative")
    return args


def gap_of(args):
    """The gap's (low, high, in seconds): --gap, or what the checkpoint was trained with."""
    if args.gap:
        return parse_gap(args.gap)
    gaps = {spec["gap"] for spec in common.read_json(Path(args.checkpoint) / "data.json").values()}
    if len(gaps) > 1:
        raise common.DataError(f"the model was trained with the gaps {', '.join(sorted(gaps))}: choose one with --gap")
    return parse_gap(gaps.pop())


def describe(model, checkpoint, gap):
    """labels.json: what a reader of the labels needs to know, and which weights made them. gap: frames, at most."""
    N, K, D = model.quantizer.shape
    codebook = model.quantizer.codebook.tolist()  # N K D, as the vectors are: rotated
    weights = zlib.crc32((Path(checkpoint) / "pytorch_model.bin").read_bytes())
    sizes = dict(model="laq", code_seq_len=N, codebook_size=K, code_dim=D, gap=gap)
    return sizes | dict(weights=weights, codebook=codebook)


def agree(out, spec):
    """Write labels.json; refuse a folder with the labels of another model or gap."""
    path = out / "labels.json"
    if path.exists():
        before = common.read_json(path)
        other = [name for name in spec if not isinstance(before, dict) or before.get(name) != spec[name]]
        if other:
            raise common.DataError(f"{out} holds labels of another model or gap ({other[0]}): choose another --out")
        return
    common.make_folder(out)
    with common.atomic(path) as temporary:
        temporary.write_text(json.dumps(spec))


def is_there(labels, shard):
    """Whether the label shard is there already; DataError if it is not one of this shard's clips."""
    if not labels.exists():
        return False
    keys = {clip.key for clip in read_shard(shard, say=lambda text: None)}
    if any(clip.key not in keys or "latents.npz" not in clip.members for clip in open_shard(labels)):
        raise common.DataError(f"{labels} is there and holds no labels of {shard}: choose another --out")
    return True


class Pieces(Dataset):
    """Clips in pieces of `size` frames, one after another: (frames (n S S 3), thumbnails (n THUMB THUMB 3)) uint8.

    A piece that cannot be read is the reason why, a text.
    """

    def __init__(self, clips, image_size, size):
        self.image_size = image_size
        self.items = [(clip, i, min(i + size, len(clip))) for clip in clips for i in range(0, len(clip), size)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        clip, start, stop = self.items[index]
        small, square = to_rgb(THUMB), to_rgb(self.image_size)
        try:
            found = clip.decode(range(start, stop), lambda frame: (square(frame), small(frame)))
            return tuple(torch.from_numpy(np.stack(part)) for part in zip(*found, strict=True))
        except (OSError, common.DataError) as error:
            return str(error)


def label(model, clip, pieces, gap, amp):
    """One sample of a label shard; DataError if a piece cannot be read."""
    thumbs = []

    def frames():
        for piece in pieces:
            if isinstance(piece, str):
                raise common.DataError(piece)
            thumbs.append(piece[1].numpy())
            yield piece[0]

    with amp:
        codes, vectors = model.encode_clip(frames(), gap)
    valid = same_scene(np.concatenate(thumbs), np.arange(len(codes)), gap)
    return {"__key__": clip.key, "latents.npz": npz(codes=codes.numpy(), vectors=vectors.numpy(), gap=gap, valid=valid)}


def samples(model, clips, source, args, amp, count):
    """The samples of a label shard; what becomes of the clips is added to `count`."""
    pieces = Pieces(clips, model.config.image_size, args.batch_size)
    stream = iter(DataLoader(pieces, None, num_workers=args.workers, worker_init_fn=common.ignore_signals))
    for clip in clips:
        own, gap = itertools.islice(stream, -(-len(clip) // args.batch_size)), source.gap(clip)
        try:
            yield label(model, clip, own, gap, amp)
        except common.DataError as error:
            count["broken"] += 1
            tqdm.write(f"skipping a clip: {error}")
            collections.deque(own, 0)  # the rest of its pieces
            continue
        count["clips"] += 1
        count["short"] += len(clip) <= gap
        count["pairs"] += max(0, len(clip) - gap)


def main(argv=None):
    args = parse(argv)
    os.environ.setdefault("DIST_TIMEOUT", str(7 * 86400))  # ranks may end hours apart
    rank, world, device = setup(args)
    model = LAQ.from_pretrained(args.checkpoint).to(device)
    if not model.quantizer.quantizing:
        raise common.DataError(f"{args.checkpoint}: quantization has not started, so its codes mean nothing: train on")
    amp = torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16")
    shards, out = shards_of(args.data), Path(args.out)
    source = Source("", args.data, [], *gap_of(args))
    mine = [shard for shard in shards[rank::world] if not is_there(out / shard.name, shard)]
    if rank == 0:
        gaps = [source.gap(clip) for shard in shards for clip in read_shard(shard, say=lambda text: None)]
        if not gaps:
            raise common.DataError(f"--data {args.data}: no clip of its {len(shards)} shards can be used")
        agree(out, describe(model, args.checkpoint, max(gaps)))
    common.broadcast()  # the other ranks wait for labels.json
    count = dict(clips=0, pairs=0, short=0, broken=0, there=len(shards[rank::world]) - len(mine))
    for number, shard in enumerate(tqdm(mine, "shards", disable=not (rank == 0 and sys.stderr.isatty())), 1):
        clips = read_shard(shard, tqdm.write)
        write_shard(out / shard.name, samples(model, clips, source, args, amp, count))
        if rank == 0 and not sys.stderr.isatty():
            print(f"shard {number}/{len(mine)}  {shard.name}  {count['clips']} clips", flush=True)
    totals = common.mean(count, dict.fromkeys(count, 1))
    totals = {name: round(value * world) for name, value in totals.items()}
    if rank == 0:
        print(f"{out}: {totals['clips']} clips labelled, {totals['pairs']} pairs; {totals['there']} shards were there")
        print(f"{totals['short']} clips shorter than the gap (no pairs), {totals['broken']} broken ones skipped")
    if world > 1:
        torch.distributed.barrier()
        time.sleep(0.5)  # as at the end of train.py
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
