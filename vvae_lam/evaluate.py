"""Evaluate a trained model on held-out recordings: errors, use of the codes, rollouts, probes, figures.

Run:
  python vvae_lam/evaluate.py --checkpoint runs/x/checkpoints/best
  python vvae_lam/evaluate.py --checkpoint runs/x/checkpoints/best --data NEW --out report

Without --data the run's own data are used. Recordings that the model was trained on are known by their content and are
left out; of new data every recording is evaluated. Writes OUT/report.md, OUT/report.json, OUT/figures and, as latents
for video_vae/encode_videos.py --decode, OUT/rollouts.
"""

import json
import sys
from pathlib import Path

import h5py
import numpy as np
import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import figures
from data import Sequences, describe_recordings, restore_split
from label import label, open_model, open_recordings
from layers import optical_flow
from metrics import advice, assess, codebook_metrics, count_codes, probe, reconstruction_metrics
from torch.utils.data import DataLoader
from train import setup

import common


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--checkpoint", required=True, metavar="DIR", help="folder with config.json, such as RUN/checkpoints/best")
    add("--data", nargs="+", metavar="PATH", help="folders of latents; without it what the run was trained on")
    add("--split", choices=["test", "validation", "train"], help="of the run's own data; without it all but train")
    add("--out", metavar="DIR", help="folder of the report; without it RUN/report")
    add("--steps", default=5, help="latent frames of the short rollouts", **whole)
    add("--full-steps", default=200, help="most latent frames of the full rollouts", **whole)
    add("--batch-size", default=16, help="sequences at a time", **whole)
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    args = parser.parse_args(argv)
    for name in ("steps", "full_steps", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    run = Path(args.checkpoint).resolve().parent.parent
    if args.out is None and not (run / "args.json").exists():
        parser.error("--out is needed: --checkpoint does not lie in the folder of a run")
    args.out = args.out or str(run / "report")
    return args


def choose_recordings(args, model):
    """(name of the split, its recordings, the recordings that the model was trained on, as far as they are here)."""
    record = Path(args.checkpoint).resolve().parent.parent / "args.json"
    data = args.data or (common.read_json(record)["flags"]["data"] if record.exists() else None)
    if not data:
        raise common.DataError(f"{record} is not there to name the data: give --data DIR")
    recordings = open_recordings(data, model)
    split = Path(args.checkpoint) / "data.json"
    if not split.exists():
        print(f"{split} is not there: whether the model was trained on these recordings is not known", flush=True)
    restore_split(recordings, common.read_json(split) if split.exists() else {})
    for line in describe_recordings(recordings):
        print(line, flush=True)
    training = [r for r in recordings if r.split == "train"]
    held_out = [r for r in recordings if (r.split == args.split if args.split else r.split != "train")]
    if not held_out:
        why = f"none is of --split {args.split}" if args.split else "the model was trained on all (--split train)"
        raise common.DataError(f"no recording to evaluate: {why}")
    name = args.split or ("new data" if all(r.split == "new" for r in held_out) else "held out")
    return name, held_out, training if args.split != "train" else []


# --- measurements


def one_step(model, recordings, args):
    """Errors of teacher-forced predictions, and use of the codes."""
    c = model.config
    length = min(c.context, (max(map(len, recordings)) - 1) // c.gap + 1)
    if length < 2:
        raise common.DataError(f"no recording is longer than the gap of {c.gap} latent frames")
    sequences = Sequences(recordings, length, c.gap, stride=(length - 1) * c.gap)
    histogram, parts = torch.zeros(c.num_codes, c.num_embeddings, dtype=torch.int64), {}
    for latents in DataLoader(sequences, args.batch_size):
        found, codes = assess(model, latents.to(model.mean.device), torch.Generator().manual_seed(0))
        for name, value in found.items():
            parts.setdefault(name, []).append(value.cpu())
        histogram += count_codes(codes, c.num_embeddings)
    means = {name: torch.cat(values).mean().item() for name, values in parts.items()}
    report = dict(mse=means["true"], mae=means["mae"], copy_mse=means["copy"])
    report |= {**reconstruction_metrics(means), **codebook_metrics(histogram)}
    return report | dict(transitions=len(sequences) * (length - 1))


def rollouts(model, recordings, steps, generator, keep=None):
    """MSE after 1 .. steps frames from the first frame on, with true, shuffled and random codes, and of the copy.

    The mean over up to 50 recordings long enough; steps is lowered to the longest there is. Shuffled codes are those of
    the next recording (of the same, in another order, if there is one alone). keep: folder for true rollouts.
    """
    gap, K = model.config.gap, model.config.num_embeddings
    steps = min(steps, max((len(r) - 1) // gap for r in recordings))
    usable = [r for r in recordings if (len(r) - 1) // gap >= steps][:50]
    clips = [torch.from_numpy(r.read(np.arange(steps + 1) * gap)) for r in usable]
    actions, totals = [model.encode(x) for x in clips], {}
    for i, (recording, x) in enumerate(zip(usable, clips, strict=True)):
        shuffled = actions[i][torch.randperm(steps, generator=generator)]
        codes = dict(true=actions[i], shuffled=actions[(i + 1) % len(actions)] if len(actions) > 1 else shuffled)
        codes["random"] = torch.randint(K, actions[i].shape, generator=generator)
        followed = {name: model.rollout(x[0], code).cpu() for name, code in codes.items()}
        followed["copy"] = x[:1].expand(steps, -1, -1, -1)
        for name, frames in followed.items():
            error = ((frames - x[1:]) / model.std.cpu()).square().mean((1, 2, 3)).numpy()
            totals[name] = totals.get(name, 0.0) + error
        if keep is not None and i < 4:
            keep.mkdir(parents=True, exist_ok=True)
            name = f"{recording.source}-{recording.id}".replace("/", "-")
            with common.atomic(keep / f"{name}.h5") as path, h5py.File(path, "w") as file:
                file["embeddings"] = torch.cat([x[:1], followed["true"]]).numpy()[:, :, None]
                known = {k: v for k, v in recording.attributes.items() if k in ("vae", "scaling", "shift")}
                file.attrs.update(known | dict(fps=(recording.fps or 2.0) / gap, rollout=True))
    return dict(steps=steps, recordings=len(usable), mse={k: (v / len(usable)).tolist() for k, v in totals.items()})


def features_of(model, recording):
    """{name: (n, F)} of the transitions of a recording: its codes, and what needs no codes to hold them against."""
    gap = model.config.gap
    codes, vectors = map(torch.from_numpy, label(model, recording))
    frames = torch.from_numpy(recording.read(np.arange(len(recording))))
    frames = model.normalize(frames.to(model.mean.device))
    pooled = torch.nn.functional.adaptive_avg_pool2d(frames, 4).flatten(1).cpu()
    return dict(
        codes=torch.nn.functional.one_hot(codes, model.config.num_embeddings).flatten(1).float(),
        vectors=vectors.flatten(1),
        first_frame=pooled[:-gap],
        latent_difference=pooled[gap:] - pooled[:-gap],
        optical_flow=optical_flow(frames[None, :-gap], frames[None, gap:])[0].cpu(),
    )


def probes(model, held_out, training, most=8000):
    """({features: scores of metrics.probe} or None, {file: what of it is left out}): motion from each of features_of.

    None where the recordings hold neither states nor actions, or nothing moves. Training recordings, where there are
    any, only widen the fit, up to `most` transitions. Transitions whose motion holds NaN are left out, and recordings
    whose motion is of another kind than that of the first.
    """
    rows, motions, episodes, tested, numbers, left_out, kind = [], [], [], [], {}, {}, None
    for number, recording in enumerate([*held_out, *training]):
        is_held_out = number < len(held_out)
        if len(tested) > most and not is_held_out:
            break
        motion, name = recording.motion(model.config.gap)
        if motion is None:
            continue
        own = name, motion.dtype, *motion.shape[1:]
        kind = kind or own
        if own != kind:
            left_out[str(recording.path)] = f"its {name} are not like the {kind[0]} of the first"
            continue
        good = np.isfinite(motion).reshape(len(motion), -1).all(1)
        count = int(good.sum())
        if count < len(good):
            left_out[str(recording.path)] = f"{len(good) - count} of {len(good)} transitions have NaN {name}"
        rows.append({key: x[good] for key, x in features_of(model, recording).items()})
        motions.append(torch.from_numpy(motion[good]))
        episodes += [numbers.setdefault(recording.episode, len(numbers))] * count
        tested += [is_held_out] * count
    if not any(tested):
        return None, left_out
    motion = torch.cat(motions)
    if motion.is_floating_point() and not (motion[torch.tensor(tested)].std(0) > 1e-9).any():
        return None, left_out
    features = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    mix = torch.randperm(len(tested), generator=torch.Generator().manual_seed(0))
    features["shuffled_codes"] = features["codes"][mix]
    about = motion, torch.tensor(episodes), torch.tensor(tested)
    return {key: probe(x, *about) for key, x in features.items()}, left_out


# --- the report


def interval(row, column):
    """[low, high], or nothing."""
    return f" [{row[f'{column}_low']:.2f}, {row[f'{column}_high']:.2f}]" if f"{column}_low" in row else ""


def lines_of(report):
    """report.md."""
    one = report["one_step"]
    yield f"# Report of {report['checkpoint']}\n"
    yield f"{report['split']}: {report['recordings']} recordings, {one['transitions']} transitions."
    yield "Errors are in the checkpoint's normalised units. relative_mse: MSE over that of the copy baseline, the frame"
    yield "before: below 1 is good. relative_mse_shuffled: with codes of another transition; equal if ignored."
    yield "\n| one step | |\n| --- | ---: |"
    yield from (f"| {name} | {value:.4g} |" for name, value in one.items())
    yield f"\n| rollouts, mean MSE over the steps | {' | '.join(report['full_rollout']['mse'])} |"
    yield "| --- " + "| ---: " * len(report["full_rollout"]["mse"]) + "|"
    for name in ("short_rollout", "full_rollout"):
        means = " | ".join(f"{np.mean(values):.4g}" for values in report[name]["mse"].values())
        yield f"| {report[name]['steps']} steps, {report[name]['recordings']} recordings | {means} |"
    if report["probes"]:
        kind = "r2" if "r2" in report["probes"]["codes"] else "accuracy"
        columns = ["r2", "r2_weighted"] if kind == "r2" else ["accuracy", "chance"]
        yield f"\n| motion from ... | {' | '.join(columns)} |\n| --- " + "| ---: " * len(columns) + "|"
        for name, row in report["probes"].items():
            cells = [f"{row[column]:.2f}{interval(row, column)}" for column in columns]
            yield f"| {name} | {' | '.join(cells)} |"
        yield "\nRidge regression, each episode predicted from others; in brackets 95 % over episodes."
    yield f"\nAdvice: {report['advice']}."
    for path, why in report["left_out_of_probes"].items():
        yield f"\nLeft out of the probes: {path}: {why}."
    for figure in report["figures"]:
        yield f"\n![{figure}](figures/{figure}.png)"


def main(argv=None):
    args = parse(argv)
    model = open_model(args.checkpoint).to(setup(args)[2])
    common.make_folder(f"{args.out}/figures")
    split, held_out, training = choose_recordings(args, model)
    generator, out, gap = torch.Generator().manual_seed(0), Path(args.out), model.config.gap  # of random codes
    one = one_step(model, held_out, args)
    print(f"relative_mse {one['relative_mse']:.3f}, code_sensitivity {one['code_sensitivity']:.3f}", flush=True)
    found, left_out = probes(model, held_out, training)
    report = dict(checkpoint=str(args.checkpoint), split=split, recordings=len(held_out), one_step=one)
    report["short_rollout"] = rollouts(model, held_out, args.steps, generator)
    report["full_rollout"] = rollouts(model, held_out, args.full_steps, generator, keep=out / "rollouts")
    report |= dict(probes=found, left_out_of_probes=left_out)
    report["advice"] = advice(one, model.config.num_embeddings, found)
    longest = max(held_out, key=len)
    clip = torch.from_numpy(longest.read(np.arange(0, min(len(longest), 6 * gap + 1), gap)))
    some = [r for r in held_out if len(r) > gap][:16]
    wholes = [torch.from_numpy(r.read(np.arange(min(len(r), 512)))) for r in some]
    drawn = dict(prediction=figures.prediction(model, clip.to(model.mean.device)))
    drawn["code_motion"] = figures.code_motion(model, [whole.to(model.mean.device) for whole in wholes])
    for name, figure in drawn.items():
        with common.atomic(out / "figures" / f"{name}.png") as path:
            figure.savefig(path, format="png")
    report["figures"] = list(drawn)
    with common.atomic(out / "report.json") as path:
        path.write_text(json.dumps(dict(flags=vars(args), **report), indent=1))
    text = "\n".join(lines_of(report)) + "\n"
    with common.atomic(out / "report.md") as path:
        path.write_text(text)
    print(text.partition("\n![")[0])
    print(f"report: {out / 'report.md'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
