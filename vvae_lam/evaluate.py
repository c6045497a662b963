"""Report card of a latent action model on held-out recordings: does the code say what happens, and does it transfer?

Run:
  python vvae_lam/evaluate.py --checkpoint runs/x/checkpoints/best --out runs/x/report
  python vvae_lam/evaluate.py --checkpoint runs/x/checkpoints/best --data DIR --split test --out report

Without --data the run's own data and split are used. Writes OUT/report.md, OUT/report.json, OUT/figures and, as
latents for encode_videos.py --decode, OUT/rollouts.
"""

import json
import sys
from pathlib import Path

import h5py
import numpy as np
import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import figures
from data import Sequences
from label import label
from metrics import assess, codebook_use, probe, summary
from model import VVAELatentActionVQVAE
from recordings import read_sources, same_chunk
from torch.utils.data import DataLoader

import common


def parse(argv=None):
    parser = common.Parser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--checkpoint", required=True, metavar="DIR", help="folder with config.json, such as RUN/checkpoints/best")
    add("--data", nargs="+", metavar="PATH", help="where the latents are; without it what the run was trained on")
    add("--manifest", metavar="FILE", help="split of the recordings; without it the run's, or DIR/manifest.json")
    add("--val-episodes", nargs="+", metavar="ID", help="hold out just these recordings; without it the run's")
    add("--split", choices=["test", "validation", "train"], help="without it test, or else validation")
    add("--out", metavar="DIR", help="folder of the report; without it RUN/report")
    add("--steps", default=5, help="latent frames of the short rollouts", **whole)
    add("--full-steps", default=200, help="most latent frames of the full rollouts", **whole)
    add("--batch-size", default=16, help="sequences at a time", **whole)
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    add("--seed", default=0, help="of random and shuffled codes", **whole)
    args = parser.parse_args(argv)
    for name in ("steps", "full_steps", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"{common.flag(name)} must be above 0")
    args.out = common.report_folder(parser, args)
    return args


def open_recordings(args, model):
    """(split, its recordings, training recordings), as in the run (RUN/args.json) unless the flags say otherwise."""
    record = Path(args.checkpoint).resolve().parent.parent / "args.json"
    try:
        flags = json.loads(record.read_text())["flags"] if record.exists() else {}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{record}: not the flags of a run ({error})") from None
    data = args.data or flags.get("data")
    if not data:
        raise ValueError(f"{record} is not there to tell the data: give --data DIR")
    own = args.data is None and args.manifest is None and args.val_episodes is None
    manifest = flags.get("manifest") if own else args.manifest
    held = flags.get("val_episodes", []) if own else args.val_episodes or []
    recordings = read_sources(data, manifest, flags.get("val_share", 0.1), held, model.causal_only)
    if recordings[0].shape != model.shape:
        raise ValueError(f"--data: C, H, W are {recordings[0].shape}, but the checkpoint has {model.shape}")
    by_split = {name: [r for r in recordings if r.split == name] for name in ("test", "validation", "train")}
    split = args.split or ("test" if by_split["test"] else "validation")
    if not by_split[split]:
        raise ValueError(f"the {split} split is empty: another --split, --manifest or --val-episodes")
    return split, by_split[split], by_split["train"]


# --- measurements


def one_step(model, recordings, args):
    """Errors of teacher-forced predictions, in all and inside and across chunks; use of the codes, (S, K) counts."""
    length = min(model.config["context"], (max(map(len, recordings)) - 1) // model.gap + 1)
    sequences = Sequences(recordings, length, model.gap, stride=(length - 1) * model.gap)
    totals, counts, parts = {}, 0, {"within chunk": [], "across chunks": []}
    K, S = len(model.quantizer.codebook), model.num_codes
    histogram, row = torch.zeros(S, K, dtype=torch.int64), 0
    for latents in DataLoader(sequences, args.batch_size):
        latents = latents.to(model.mean.device)
        found, codes = assess(model, latents)
        for name, value in found.items():
            totals[name] = totals.get(name, 0.0) + value * len(latents)
        histogram += torch.stack([torch.bincount(slot.flatten().cpu(), minlength=K) for slot in codes.unbind(2)])
        x_hat = model.predict(latents, codes)
        error = ((x_hat - latents[:, 1:]) / model.std).square().mean((2, 3, 4)).cpu().numpy()
        still = ((latents[:, :-1] - latents[:, 1:]) / model.std).square().mean((2, 3, 4)).cpu().numpy()
        for i in range(len(latents)):
            inside = same_chunk(recordings[sequences.owner[row + i]], sequences.frames(row + i))
            for name, chosen in (("within chunk", inside), ("across chunks", ~inside)):
                parts[name] += list(zip(error[i][chosen], still[i][chosen], strict=True))
        counts, row = counts + len(latents), row + len(latents)
    means = {name: total / counts for name, total in totals.items()}
    card = dict(mse=means["true_l2"], mae=means["true_l1"], still_mse=means["still_l2"], **summary(means))
    card |= {name: value for name, value in codebook_use(histogram).items()}
    for name, pairs in parts.items():
        if pairs:
            mse, still = np.mean(pairs, 0)
            card[name] = dict(transitions=len(pairs), mse=float(mse), relative=float(mse / max(still, 1e-12)))
    card["transitions"] = sum(map(len, parts.values()))
    return card, histogram


def rollouts(model, recordings, steps, generator, keep=None):
    """MSE after 1 .. steps frames from the first frame on, with true, foreign and random codes, and with no motion.

    The mean over up to 50 recordings long enough; steps is lowered to the longest there is. Foreign codes are those of
    the next recording (of the same, in another order, if there is one alone). keep: folder for true rollouts.
    """
    steps = min(steps, max((len(r) - 1) // model.gap for r in recordings))
    usable = [r for r in recordings if (len(r) - 1) // model.gap >= steps][:50]
    clips = [torch.from_numpy(r.read(np.arange(steps + 1) * model.gap)) for r in usable]
    words = [model.encode(x) for x in clips]
    totals, K = {}, len(model.quantizer.codebook)
    for i, (recording, x) in enumerate(zip(usable, clips, strict=True)):
        shuffled = words[i][torch.randperm(steps, generator=generator)]
        codes = dict(true=words[i], shuffled=words[(i + 1) % len(words)] if len(words) > 1 else shuffled)
        codes["random"] = torch.randint(K, words[i].shape, generator=generator)
        followed = {name: model.rollout(x[0], word).cpu() for name, word in codes.items()}
        followed["still"] = x[:1].expand(steps, -1, -1, -1)
        for name, frames in followed.items():
            error = ((frames - x[1:]) / model.std.cpu()).square().mean((1, 2, 3)).numpy()
            totals[name] = totals.get(name, 0.0) + error
        if keep is not None and i < 4:
            keep.mkdir(parents=True, exist_ok=True)
            with common.atomic(keep / f"{Path(recording.id).name}.h5") as path, h5py.File(path, "w") as file:
                file["embeddings"] = followed["true"].numpy()[:, :, None]
                file.attrs.update(recording.attributes | dict(made_by="rollout of true codes from the first frame"))
    mse = {name: (total / len(usable)).tolist() for name, total in totals.items()}
    return dict(steps=steps, recordings=len(usable), mse=mse)


def transfer(model, recordings, generator, pairs=256):
    """Codes of one recording's transitions applied to frames of others and read back: share of slots that agree.

    chance: agreement of two independent words, the sum of squared shares per slot.
    """
    usable = [(r, label(model, r, 64)[0]) for r in recordings if len(r) > model.gap]
    if len(usable) < 2:
        return None
    words, frames = [], []
    for _ in range(pairs):
        (_, codes), (other, _) = (usable[i] for i in torch.randperm(len(usable), generator=generator)[:2])
        words.append(codes[int(torch.randint(len(codes), (1,), generator=generator))])
        frames.append(other.read([int(torch.randint(len(other), (1,), generator=generator))])[0])
    agree = []
    for word, frame in zip(np.array_split(words, pairs // 16), np.array_split(frames, pairs // 16), strict=True):
        after = model.rollout(frame, word[:, None])
        agree.append(model.encode(np.concatenate([frame[:, None], after], 1))[:, 0] == word)
    everything = np.concatenate([codes for _, codes in usable])
    shares = [np.bincount(slot, minlength=len(model.quantizer.codebook)) / len(everything) for slot in everything.T]
    chance = float(np.mean([(p**2).sum() for p in shares]))
    return dict(agreement=float(np.concatenate(agree).mean()), chance=chance, pairs=pairs)


def probes(model, held, training, most=4000):
    """How well actions follow, linearly, from words, vectors, the frame alone, shuffled words; None without actions.

    A transition's action is the sum of the rows from t to t + gap; of classes (whole numbers) row t, and gap must be 1.
    """

    def gather(recordings):
        words, vectors, frames, actions = [], [], [], []
        for recording in recordings:
            rows = recording.actions()
            if rows is None or len(recording) <= model.gap:
                continue
            n = len(recording) - model.gap
            if rows.dtype.kind == "f":
                rows = np.cumsum(np.concatenate([np.zeros_like(rows[:1]), rows]).reshape(len(rows) + 1, -1), 0)
                rows = rows[model.gap :][:n] - rows[:n]
            code, vector = label(model, recording, 64)
            now = torch.from_numpy(recording.read(np.arange(n)))
            words.append(torch.nn.functional.one_hot(torch.from_numpy(code), len(model.quantizer.codebook)).flatten(1))
            vectors.append(torch.from_numpy(vector).flatten(1))
            frames.append(torch.nn.functional.adaptive_avg_pool2d(now, 4).flatten(1))
            actions.append(torch.from_numpy(rows[:n]))
            if sum(map(len, actions)) >= most:
                break
        return [torch.cat(part) for part in (words, vectors, frames, actions)] if actions else None

    one, two = gather(training), gather(held)
    if one is None or two is None or (not one[3].is_floating_point() and model.gap > 1):
        return None
    mix = torch.randperm(len(one[0]), generator=torch.Generator().manual_seed(0))
    kinds = dict(word=(one[0], two[0]), vector=(one[1], two[1]), frame_only=(one[2], two[2]))
    kinds["frame_and_word"] = torch.cat([one[2], one[0]], 1), torch.cat([two[2], two[0]], 1)
    kinds["shuffled_word"] = one[0][mix], two[0]
    return {name: probe(x, one[3], test_x, two[3], ridge=10.0) for name, (x, test_x) in kinds.items()}


# --- the report


def lines_of(card):
    """report.md."""
    one = card["one_step"]
    yield f"# Report card of {card['checkpoint']}\n"
    yield f"{card['split']} split: {card['recordings']} recordings, {one['transitions']} transitions."
    yield "Errors are in the checkpoint's normalised units. relative: MSE over that of no motion, below 1 is good."
    yield "shuffled: the same with another transition's codes, equal to relative if codes are ignored."
    yield "Probes are fitted on the training split.\n"
    yield "| one step | |\n| --- | ---: |"
    for name, value in one.items():
        shown = ", ".join(f"{k} {v:.4g}" for k, v in value.items()) if isinstance(value, dict) else f"{value:.4g}"
        yield f"| {name} | {shown} |"
    yield f"\n| rollouts, mean MSE over the steps | {' | '.join(card['full_rollout']['mse'])} |"
    yield "| --- " + "| ---: " * len(card["full_rollout"]["mse"]) + "|"
    for name in ("short_rollout", "full_rollout"):
        means = " | ".join(f"{np.mean(values):.4g}" for values in card[name]["mse"].values())
        yield f"| {card[name]['steps']} steps, {card[name]['recordings']} recordings | {means} |"
    if card["transfer"]:
        shares = "{agreement:.1%} of slots agree, chance {chance:.1%}, {pairs} pairs".format(**card["transfer"])
        yield f"\nTransfer (a code applied to another recording's frame, and read back): {shares}."
    if card["probes"]:
        yield "\n| probe of actions from | " + " | ".join(next(iter(card["probes"].values()))) + " |"
        yield "| --- " + "| ---: " * len(next(iter(card["probes"].values()))) + "|"
        for name, row in card["probes"].items():
            values = [" ".join(f"{v:.2f}" for v in np.atleast_1d(value)) for value in row.values()]
            yield f"| {name} | " + " | ".join(values) + " |"
    for figure in ("rollouts", "codes", "prediction", "code_scene_grid"):
        yield f"\n![{figure}](figures/{figure}.png)"


def main(argv=None):
    args = parse(argv)
    device = common.setup(args).device
    model = VVAELatentActionVQVAE.from_pretrained(args.checkpoint).to(device)
    split, held, training = open_recordings(args, model)
    generator, out = torch.Generator().manual_seed(args.seed), Path(args.out)
    one, histogram = one_step(model, held, args)
    print(f"one step: relative {one['relative']:.3f}, shuffled {one['shuffled']:.3f}", flush=True)
    card = dict(
        checkpoint=str(args.checkpoint),
        split=split,
        recordings=len(held),
        one_step=one,
        short_rollout=rollouts(model, held, args.steps, generator),
        full_rollout=rollouts(model, held, args.full_steps, generator, keep=out / "rollouts"),
        transfer=transfer(model, held, generator),
        probes=probes(model, held, training),
    )
    (out / "figures").mkdir(parents=True, exist_ok=True)
    clip = torch.from_numpy(held[0].read(np.arange(0, min(len(held[0]), 6 * model.gap + 1), model.gap))).to(device)
    clips = [torch.from_numpy(r.read([0, model.gap])).to(device) for r in held[:16] if len(r) > model.gap]
    drawn = dict(
        rollouts=figures.rollouts(card["full_rollout"]["mse"]),
        codes=figures.codes({split: histogram.numpy()}),
        prediction=figures.prediction(model, clip),
        code_scene_grid=figures.code_scene_grid(model, torch.stack(clips)),
    )
    for name, figure in drawn.items():
        with common.atomic(out / "figures" / f"{name}.png") as path:
            figure.savefig(path, format="png")
    plain = json.loads(json.dumps(card), parse_constant=lambda word: None)  # NaN is not JSON
    with common.atomic(out / "report.json") as path:
        path.write_text(json.dumps(dict(flags=vars(args), **plain), indent=1))
    text = "\n".join(lines_of(card)) + "\n"
    with common.atomic(out / "report.md") as path:
        path.write_text(text)
    print(text.partition("\n![")[0])
    print(f"report: {out / 'report.md'}")
    return 0


if __name__ == "__main__":
    common.run(main)
