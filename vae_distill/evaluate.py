"""Report on a student: how well it does the teacher's job, what its prior does alone, what its latent holds.

Run:
  python vae_distill/evaluate.py --checkpoint runs/x/checkpoints/best
  python vae_distill/evaluate.py --checkpoint runs/x/checkpoints/best --data OTHER.h5 --episodes 10 --out report

From the same starts: the teacher, the student with the mode or a sample of its posterior's latent, or of its
prior's, and zero action. Teacher, clips, split and walker are those of the run unless flags say otherwise; of other
clips all are held out. Then, without a reference, how long the prior's samples move on and how smoothly, and what lies
between two latents. Writes OUT/report.md, report.json and figures.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import figures
from data import read_clips, restore_split, split_of
from distill import find_devices, keep_compiled
from env import Imitation
from metrics import ERRORS, POLICIES, free_run, lasting, latent_metrics, make_rollout, measure, smoothness, summary
from model import ACTIVE, Student
from teacher.checkpoint import read_teacher
from teacher.walker import build_model

import common

FREE_EPISODES, PANELS = 32, 7  # episodes without a reference; latents of the film strip


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--checkpoint", required=True, metavar="DIR", help="folder with config.json, such as RUN/checkpoints/best")
    add("--teacher", metavar="DIR", help="a track-mjx run; without it the run's")
    add("--walker", metavar="FILE", help="MJCF of the walker; without it the run's")
    add("--data", nargs="+", metavar="PATH", help="reference clips; without it what the run was trained on")
    add("--clip-frames", help="frames per clip of --data", **whole)
    add("--out", metavar="DIR", help="folder of the report; without it RUN/report")
    add("--episodes", default=3, help="episodes per clip: one from its first frame, the others random", **whole)
    add("--train-clips", default=20, help="training clips to play, at most", **whole)
    add("--batch-size", default=256, help="episodes at a time", **whole)
    add("--seconds", default=10.0, type=float, metavar="S", help="length of an episode without a reference")
    add("--physics", choices=["mjx", "mujoco"], help="as in train.py; without it the run's")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1")
    add("--compile-cache", default="runs/compiled", metavar="DIR", help="where compiled programs are kept")
    add("--seed", default=0, help="of starts and of latent samples", **whole)
    args = parser.parse_args(argv)
    for name in ("episodes", "batch_size", "seconds"):
        if not 0 < getattr(args, name) < np.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if min(args.train_clips, args.clip_frames or 0, args.seed) < 0:
        parser.error("--train-clips, --clip-frames and --seed must not be negative")
    run = Path(args.checkpoint).resolve().parent.parent
    if not args.out and not (run / "args.json").exists():
        parser.error("give --out DIR: --checkpoint lies in no run's folder that could hold the report")
    args.out = args.out or str(run / "report")
    return args


def open_run(checkpoint, **given):
    """(student, its parameters, env, clips, teacher) of a checkpoint.

    given: teacher, walker, data, clip_frames, physics; what is absent or None is as in the run's own flags.
    """
    checkpoint = Path(checkpoint).resolve()
    student, params = Student.from_pretrained(checkpoint)
    record = checkpoint.parent.parent / "args.json"
    flags = dict(body_shift="auto", physics="mjx", clip_frames=0)
    flags |= common.read_json(record)["flags"] if record.exists() else {}
    own_data = given.get("data") is None
    flags |= {} if own_data else dict(clip_frames=0)
    flags |= {name: value for name, value in given.items() if value is not None}
    if missing := [name for name in ("teacher", "walker", "data") if name not in flags]:
        raise common.DataError(f"{record} is not there to tell --{missing[0]}: give it")
    teacher = read_teacher(flags["teacher"])
    walker = build_model(flags["walker"], teacher.config)
    clips = read_clips(flags["data"], walker, teacher.mocap_hz, val_share=0, clip_frames=flags["clip_frames"])
    for note in clips.notes:
        print(note)
    split = checkpoint / "data.json"
    split = common.read_json(split) if split.exists() else {}
    if own_data and split:
        print(restore_split(clips, split) or "the run's own split")
    else:
        known = zip(split.get("clips", ()), split.get("checksums", ()), strict=False)
        trained_on = {checksum for name, checksum in known if name not in split["held_out"]}
        clips.held_out[:] = [checksum not in trained_on for checksum in split_of(clips)["checksums"]]
    env = Imitation(teacher.config, walker, clips, flags["body_shift"], flags["physics"])
    env.check(teacher)
    if len(student.mean) != env.obs_size:
        raise common.DataError(f"{checkpoint}: takes {len(student.mean)} numbers, the observation has {env.obs_size}")
    return student, params, env, clips, teacher


# --- measuring


def starts(args, clips, ahead):
    """clip, start, held_out (all episodes): --episodes of each clip, held-out clips first."""
    rng = np.random.default_rng(args.seed)
    held_out, train = np.flatnonzero(clips.held_out), np.flatnonzero(~clips.held_out)
    train = np.sort(rng.permutation(train)[: args.train_clips])
    clip = np.repeat(np.concatenate([held_out, train]), args.episodes).astype(np.int32)
    last = clips.length[clip] - ahead - 1
    start = (rng.uniform(size=len(clip)) * np.maximum(last // 2, 1)).astype(np.int32)
    start[:: args.episodes] = 0
    return clip, start, clips.held_out[clip]


def play(args, env, student, params, teacher, clip, start):
    """{policy: records of all episodes, (steps E ...) numpy}; the policies share starts and noise."""
    rollout = make_rollout(env, student, env.longest)
    task = dict(reference=env.reference, teacher=teacher.params, mean=teacher.mean, std=teacher.std)
    size, parts = min(args.batch_size, len(clip)), {name: [] for name in POLICIES}
    for first in range(0, len(clip), size):
        some = np.arange(first, first + size) % len(clip)  # the last batch is filled up, so that it is compiled once
        key = jax.random.fold_in(jax.random.key(args.seed), first)
        for number, name in enumerate(POLICIES):
            print(f"episodes {first} to {first + size - 1}: {name}", flush=True)
            out = rollout(params, task, np.int32(number), clip[some], start[some], key)
            parts[name].append(jax.tree.map(np.asarray, out))
    return {name: jax.tree.map(lambda *x: np.concatenate(x, 1)[:, : len(clip)], *parts[name]) for name in POLICIES}


# --- without a reference


def without_reference(args, env, clips, student, params):
    """Rows of the report: does it last for --seconds, and how fast and how jerky is it, against the clips."""
    rng, steps, n = np.random.default_rng(args.seed), max(3, round(args.seconds * env.rate)), FREE_EPISODES
    start = clips.qpos[rng.integers(len(clips.ids), size=n), 0]
    key = jax.random.key(args.seed)

    @jax.jit
    def sample(obs, t):
        return student.decode(params, obs, student.prior(params, obs).sample(jax.random.fold_in(key, t)))

    @jax.jit
    def mode(obs, t):
        return student.decode(params, obs, student.prior(params, obs).mode())

    def noise(obs, t):
        return rng.uniform(-1, 1, (n, env.model.nu))

    recorded = np.arange(clips.qpos.shape[1])[:, None] < clips.length  # a shorter clip is filled up with its last frame
    recorded = np.where(recorded[..., None], np.moveaxis(clips.qpos, 1, 0), np.nan)
    speed, acceleration = smoothness(env, recorded, env.rate * float(env.frames_per_step))
    policies = {"prior sample": sample, "prior mean": mode, "random motor commands": noise}
    rows = {}
    for name, act in policies.items():
        qpos = free_run(env, act, start, steps)
        own, share = smoothness(env, qpos, env.rate), float(lasting(env, clips, qpos).mean())
        rows[name] = dict(lasting=share, speed=own[0] / speed, acceleration=own[1] / acceleration)
    return rows


def interpolation(env, student, params, out, shown):
    """Postures (T E nq) over a third of a second with the latent held, from one start; E latents on the line between
    two that lie far apart (tenth and ninetieth percentile) in the main direction of the `shown` episodes' latents."""
    played = out["alive"][:, shown] > 0
    latent, qpos = (out[name][:, shown][played] for name in ("latent", "qpos"))
    _, _, directions = np.linalg.svd(latent - latent.mean(0), full_matrices=False)
    along = latent @ directions[0]
    order = along.argsort()
    a, b = latent[order[len(order) // 10]], latent[order[-len(order) // 10]]
    between = a + np.linspace(0, 1, PANELS)[:, None] * (b - a)
    middle = qpos[order[len(order) // 2]]
    act = jax.jit(lambda obs, t: student.decode(params, obs, between))
    return free_run(env, act, np.repeat(middle[None], PANELS, 0), round(env.rate / 3))


# --- the report


def table(head, rows):
    """A markdown table: the first column left, the others right."""
    yield "| " + " | ".join(head) + " |"
    yield "| --- " + "| ---: " * (len(head) - 1) + "|"
    yield from ("| " + " | ".join(row) + " |" for row in rows)


def policy_table(rows):
    head = "policy | reward (95 %) | / teacher (95 %) | survival | action MSE | joint error | body error"
    body = []
    for name, row in rows.items():
        ends = (row["reward_interval"], row["reward_share_interval"])
        reward, share = ("({:.4g} to {:.4g})".format(*pair) if pair else "(one clip)" for pair in ends)
        words = [name, f"{row['reward']:.4g} {reward}", f"{row['reward_share']:.4g} {share}"]
        body.append([*words, f"{100 * row['survival']:.0f} %", *(f"{row[key]:.2g}" for key in ERRORS)])
    return table(head.split(" | "), body)


ABOUT = """Reward is the sum over an episode, which ends early if the pose is lost; intervals are bootstraps over clips.
Action MSE is to what the teacher would do in the state that the policy reached. Joint error: root mean square, rad.
Body error: mean distance of the tracked bodies, in the walker's unit of length. All policies have the same starts.
"""


def report(args, card, teacher):
    """report.md, as text."""
    lines = [f"# {args.checkpoint}", "", f"Teacher {teacher.path}.", ABOUT]
    for part in ("held out", "train"):
        if part not in card:
            continue
        rows = card[part]["rows"]
        lines += ["", f"## {card[part]['episodes']} episodes of {card[part]['clips']} clips, {part}", ""]
        lines += policy_table(rows)
        terms = [term for term in rows["teacher"]["terms"] if any(row["terms"][term] for row in rows.values())]
        values = [[term, *(f"{row['terms'][term]:.3g}" for row in rows.values())] for term in terms]
        lines += ["", *table(["reward per step", *rows], values)]
        for name, row in rows.items():
            ends = ", ".join(f"{key} ({count})" for key, count in row["ended_by"].items() if count)
            lines += ["", f"{name}: ended by {ends}"] if ends else []
    latent = card["latent"]
    active = f"{latent['active_dims']} of {len(latent['kl_per_dim'])} dims carry more than {ACTIVE} nats"
    two = 100 * sum(latent["pca_explained_variance"][:2])
    lines += ["", "## Latent", "", f"KL(q || p) {latent['kl']:.3g} nats; {active}; two PCs explain {two:.0f} %.", ""]
    head = ["motion", f"lasts {args.seconds:g} s", "speed / clips", "acceleration / clips"]
    body = [
        [name, f"{100 * row['lasting']:.0f} %", f"{row['speed']:.2f}", f"{row['acceleration']:.2f}"]
        for name, row in card["without a reference"].items()
    ]
    lines += ["## Without a reference", "", *table(head, body), "", "![interpolation](figures/interpolation.png)", ""]
    body = []
    for row in card["clips"]:
        numbers = f"{row['reward_share']:.3f}", f"{100 * row['survival']:.0f} %", f"{row['action_mse']:.2g}"
        body.append([row["clip"], row["part"], *numbers])
    lines += ["## Clips", "", *table(["clip", "part", "reward / teacher", "survival", "action MSE"], body), ""]
    return "\n".join([*lines, *(f"![{n}](figures/{n}.png)" for n in ("tracking", "latent"))]) + "\n"


def main(argv=None):
    args = parse(argv)
    keep_compiled(args.compile_cache)
    name, _, index = args.device.partition(":")
    if name != "auto":
        jax.config.update("jax_platforms", dict(gpu="cuda").get(name, name))
    find_devices()
    try:
        jax.config.update("jax_default_device", jax.devices()[int(index)] if index else None)
    except (IndexError, ValueError):
        raise common.DataError(f"--device {args.device}: JAX has {len(jax.devices())} such devices here") from None
    given = {name: getattr(args, name) for name in ("teacher", "walker", "data", "clip_frames", "physics")}
    student, params, env, clips, teacher = open_run(args.checkpoint, **given)
    common.make_folder(Path(args.out) / "figures")
    clip, start, held_out = starts(args, clips, env.ahead)
    if not len(clip):
        raise common.DataError("nothing to play: no clip is held out, and --train-clips is 0")
    outs = play(args, env, student, params, teacher, clip, start)
    card = {}
    for part, chosen in (("held out", held_out), ("train", ~held_out)):
        if chosen.any():
            own = np.flatnonzero(chosen)
            rows = measure(outs, clip, own, args.seed)
            card[part] = dict(episodes=len(own), clips=len(np.unique(clip[own])), rows=rows)
            print(f"{part}: {len(own)} episodes", *policy_table(rows), sep="\n", flush=True)
    shown = np.flatnonzero(held_out) if held_out.any() else np.arange(len(clip))
    mine = outs["posterior mean"]
    card["latent"], points = latent_metrics(mine, shown, clip, mine["frame"] / clips.length[clip])
    card["clips"] = []
    for i in dict.fromkeys(clip.tolist()):
        best, row = (summary(out, np.flatnonzero(clip == i)) for out in (outs["teacher"], mine))
        row |= dict(clip=clips.ids[i], part="held out" if clips.held_out[i] else "train")
        card["clips"].append({**row, "reward_share": row["reward"] / (best["reward"] or np.nan)})

    card["without a reference"] = without_reference(args, env, clips, student, params)
    for name, row in card["without a reference"].items():
        print(name, *(f"{key} {value:.3g}" for key, value in row.items()))
    between = interpolation(env, student, params, mine, shown)

    out, episode = Path(args.out), shown[0]
    played = int(mine["alive"][:, episode].sum())
    frame, qpos = (mine[key][:played, episode] for key in ("frame", "qpos"))
    reference = clips.qpos[clip[episode], frame]
    for name, figure in dict(
        tracking=figures.tracking({clips.source[clip[episode]]: (reference, qpos)}, env.rate),
        latent=figures.latent(points),
        interpolation=figures.strip(env.model, between[:: max(1, len(between) // 6)]),
    ).items():
        with common.atomic(out / "figures" / f"{name}.png") as path:
            figure.savefig(path, format="png")
    with common.atomic(out / "report.json") as path:
        path.write_text(json.dumps(dict(flags=vars(args), **card), indent=1))
    with common.atomic(out / "report.md") as path:
        path.write_text(report(args, card, teacher))
    print(f"report: {out / 'report.md'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
