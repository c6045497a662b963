"""Label recordings with a trained model: the latent action of every transition, as shards that vla/ reads.

Run:
  python vvae_lam/label.py --checkpoint runs/x/checkpoints/best --data DIR --out LABELS

LABELS/NAME.tar holds KEY.latents.npz: codes (T', S) int64, vectors (T', S, D) float32 before quantization, gap, valid
(T',) bool. Row t is the latent action from frame t to frame t + gap of the video. Where latents come from the shards of
videos that encode_videos.py read, NAME and KEY are the video's; valid is then True where frame t is the last one that a
latent holds, so that no label has seen anything later than t + gap. Other recordings are keyed by their names; their
frames are latent frames. labels.json tells what all labels share. Shards that are there already are left as they are.
"""

import io
import json
import re
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
from data import kind_of, read_sources
from model import VVAELatentActionVQVAE
from tqdm import tqdm
from train import setup

import common

SHARD = 256  # recordings in a shard, where they come from no shards


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--checkpoint", required=True, metavar="DIR", help="folder with config.json, such as RUN/checkpoints/best")
    add("--data", nargs="+", required=True, metavar="PATH", help="folders of H5 latents, NAME=DIR or DIR")
    add("--out", required=True, metavar="DIR", help="folder of the label shards")
    add("--batch-size", default=64, help="transitions at a time", **whole)
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error("--batch-size must be above 0")
    return args


def open_model(checkpoint):
    """The model of a checkpoint folder; DataError where it has no codes yet."""
    folder = Path(checkpoint)
    no_best = folder.name == "best" and not folder.exists() and (folder.parent / "last").exists()
    model = VVAELatentActionVQVAE.from_pretrained(folder.with_name("last") if no_best else folder)
    if not model.quantizer.quantizing:
        why = "is not there, as the best model is chosen among those with codes" if no_best else "has no codes"
        cure = "train longer, or with a smaller --quantize-after (log.jsonl has the code_sensitivity that it reached)"
        raise common.DataError(f"{folder} {why}: quantization had not begun: {cure}")
    if no_best:
        raise common.DataError(f"{folder} is not there: nothing was validated since quantization began: give .../last")
    return model


def open_recordings(data, model):
    """The recordings of the --data words, of the sizes that the model takes."""
    recordings = read_sources(data, val_share=0.0)
    if recordings[0].shape != model.shape:
        raise common.DataError(f"--data: C, H, W are {recordings[0].shape}, but the checkpoint has {model.shape}")
    vae = str(kind_of(recordings[0])["vae"])
    if vae != model.config.vae and "unknown" not in (vae, model.config.vae):
        raise common.DataError(f"--data: latents of {vae}, but the checkpoint was trained on {model.config.vae}")
    return recordings


def label(model, recording, batch_size=64):
    """codes (T - gap, S) and vectors (T - gap, S, D) of all transitions of a recording, arrays."""
    codes, vectors, gap = [], [], model.config.gap
    for first in range(0, len(recording) - gap, batch_size):
        last = min(first + batch_size + gap, len(recording))
        frames = torch.from_numpy(recording.read(np.arange(first, last)))
        found = model.encode(frames.to(model.mean.device), gap, vectors=True)
        codes.append(found[0].cpu().numpy())
        vectors.append(found[1].float().cpu().numpy())
    return np.concatenate(codes), np.concatenate(vectors)


def frame_gap(recordings, gap):
    """The gap in frames of the videos, between the ends of two latents, of most transitions."""
    gaps = Counter()
    for recording in recordings:
        ends = recording.frame_index()
        gaps.update((ends[gap:] - ends[:-gap]).tolist())
    gaps.pop(0, None)  # a frame that a resampled video repeats
    if not gaps:
        raise common.DataError(f"every recording is shorter than the gap of {gap} latent frames")
    usual, count = gaps.most_common(1)[0]
    if count < gaps.total():
        other = f"{gaps.total() - count} of {gaps.total()} transitions"
        print(f"{other} do not take {usual} frames of the video: they are not valid")
    return usual


def sample(recording, codes, vectors, gap):
    """KEY.latents.npz of a recording: rows of the video's frames, of which those that end a latent are valid.

    But not where the next one ends more or fewer than `gap` frames later: resampled videos, repeated frames.
    """
    ends = recording.frame_index()
    frames = int(recording.attributes.get("frames", ends[-1] + 1))
    if frames <= ends[-1]:
        raise common.DataError(f"{recording.path}: its attribute `frames` is {frames}, but a latent ends at {ends[-1]}")
    good = ends[len(ends) - len(codes) :] - ends[: len(codes)] == gap
    if not good.any():
        raise common.DataError(f"{recording.path}: no transition takes {gap} frames of the video: label it apart")
    rows, at = frames - gap, ends[: len(codes)][good]
    valid, all_codes = np.zeros(rows, bool), np.zeros((rows, *codes.shape[1:]), np.int64)
    all_vectors = np.zeros((rows, *vectors.shape[1:]), np.float32)
    valid[at], all_codes[at], all_vectors[at] = True, codes[good], vectors[good]
    file = io.BytesIO()
    np.savez(file, codes=all_codes, vectors=all_vectors, gap=gap, valid=valid)
    return file.getvalue()


def shards_of(recordings):
    """{shard name: [(key, recording)]}: the video's shard and key, or the recording's own name."""
    shards, plain = {}, []
    for recording in recordings:
        about = recording.attributes
        if "shard" in about and "key" in about:
            shards.setdefault(str(about["shard"]), []).append((str(about["key"]), recording))
        else:
            plain.append(recording)
    several = len({recording.source for recording in plain}) > 1
    for number, recording in enumerate(plain):
        name = f"{recording.source}-{recording.id}" if several else recording.id
        key = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:80]  # WebDataset ends a key at its first dot
        key = key if key == name else f"{key}-{zlib.crc32(name.encode()):08x}"
        shards.setdefault(f"shard-{number // SHARD:06d}.tar", []).append((key, recording))
    for name, members in shards.items():
        keys = [key for key, _ in members]
        if len(set(keys)) < len(keys):
            raise common.DataError(f"--data: two recordings are of the clip {max(keys, key=keys.count)} of {name}")
    return shards


def is_there(path, members):
    """Whether the label shard is there already, with all of them; DataError if it holds labels of other recordings."""
    if not path.exists():
        return False
    keys = {f"{key}.latents.npz" for key, _ in members}
    try:
        with tarfile.open(path) as tar:
            there = set(tar.getnames())
    except tarfile.TarError as error:
        raise common.DataError(f"{path}: not a whole shard ({str(error).splitlines()[0]}): remove it") from None
    if other := sorted(there - keys):
        raise common.DataError(f"{path} is there and holds labels of other data ({other[0]}): choose another --out")
    return there == keys


def write_labels_json(model, args, gap, out):
    """labels.json: what a reader of the labels needs to know; refuses a folder with the labels of another model."""
    c, weights = model.config, zlib.crc32((Path(args.checkpoint) / "pytorch_model.bin").read_bytes())
    about = dict(model="vvae_lam", code_seq_len=c.num_codes, codebook_size=c.num_embeddings, code_dim=c.codebook_dim)
    about |= dict(gap=gap, weights=weights, codebook=model.quantizer.codebook.tolist())
    path = out / "labels.json"
    if path.exists():
        before = common.read_json(path)
        other = [name for name in about if before.get(name) != about[name]]
        if other:
            raise common.DataError(f"{out} holds labels of another model ({other[0]} differs): choose another --out")
        return
    common.make_folder(out)
    with common.atomic(path) as temporary:
        temporary.write_text(json.dumps(about))


def main(argv=None):
    args = parse(argv)
    model = open_model(args.checkpoint).to(setup(args)[2])
    recordings, out = open_recordings(args.data, model), Path(args.out)
    gap = frame_gap(recordings, model.config.gap)
    write_labels_json(model, args, gap, out)
    shards, count, left_out, present = shards_of(recordings), 0, 0, 0
    for name, members in tqdm(shards.items(), unit="shard", disable=not sys.stderr.isatty()):
        if is_there(out / name, members):
            present += len(members)
            continue
        with common.atomic(out / name) as path, tarfile.open(path, "w") as tar:
            for key, recording in members:
                try:
                    if len(recording) <= model.config.gap:
                        raise common.DataError(f"{recording.path}: {len(recording)} latent frames: too few for the gap")
                    data = sample(recording, *label(model, recording, args.batch_size), gap)
                except common.DataError as error:
                    print(f"left out: {error}", flush=True)
                    left_out += 1
                    continue
                member = tarfile.TarInfo(f"{key}.latents.npz")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                count += 1
    print(f"{out}: {count} recordings labelled, {left_out} left out, {present} were there already")
    return 1 if left_out else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
