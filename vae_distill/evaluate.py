"""Report card of a student: how well it does the teacher's job, what its prior does alone, what its latent holds.

Run:
  python vae_distill/evaluate.py --checkpoint runs/x/checkpoints/best --out runs/x/report
  python vae_distill/evaluate.py --checkpoint runs/x/checkpoints/best --episodes 10 --video --out report

From the same starts: the teacher, the student with the mean or a sample of its encoder's latent, or of its
prior's, and zero action. Teacher, clips and walker are those of the run unless flags say otherwise. Writes
OUT/report.md, OUT/report.json, OUT/figures and with --video an animation of reference and student as stick figures.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import devices
import figures
from data import read_clips
from env import Imitation
from metrics import latents, measure
from model import ACTIVE, Student
from rollout import POLICIES, make_rollout
from teacher import read_teacher
from walker import build_model

import common

ERRORS = ("action_mse", "joint_error", "body_error")


def parse(argv=None):
    parser = common.Parser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--checkpoint", required=True, metavar="DIR", help="folder with config.json, such as RUN/checkpoints/best")
    add("--teacher", metavar="DIR", help="a track-mjx run; without it the run's")
    add("--walker", metavar="FILE", help="MJCF of the walker; without it the run's")
    add("--data", nargs="+", metavar="NAME=PATH", help="reference clips; without it what the run was trained on")
    add("--out", metavar="DIR", help="folder of the report; without it RUN/report")
    add("--val-share", type=float, metavar="X", help="share of the clips held out; without it the run's")
    add("--val-episodes", nargs="+", metavar="IDS", help="hold out just these clips; without it the run's")
    add(
        "--episodes",
        default=3,
        help="episodes per clip: the first starts at its first frame, the others at random",
        **whole,
    )
    add("--train-clips", default=20, help="at most so many training clips; 0: all", **whole)
    add("--batch-size", default=256, help="episodes at a time", **whole)
    add(
        "--video",
        action="store_true",
        help="also write figures/stick.gif: the reference and the student, a held-out clip",
    )
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1")
    add("--compile-cache", default="runs/compiled", metavar="DIR", help="where compiled programs are kept")
    add("--seed", default=0, help="of starts and of latent samples", **whole)
    args = parser.parse_args(argv)
    for name in ("episodes", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"{common.flag(name)} must be above 0")
    args.out = common.report_folder(parser, args)
    return args


def open_run(args):
    """(student, its parameters, env, clips, teacher): the run's own (RUN/args.json) unless the flags say otherwise."""
    record = Path(args.checkpoint).resolve().parent.parent / "args.json"
    try:
        flags = json.loads(record.read_text())["flags"] if record.exists() else {}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{record}: not the flags of a run ({error})") from None
    for name in ("teacher", "walker", "data", "val_share", "val_episodes"):
        if getattr(args, name) is None:
            if name not in flags:
                raise ValueError(f"{record} is not there to tell {common.flag(name)}: give it")
            setattr(args, name, flags[name])
    student, params = Student.from_pretrained(args.checkpoint)
    teacher = read_teacher(args.teacher)
    walker = build_model(args.walker, teacher.config)
    clips = read_clips(
        args.data, walker, teacher.mocap_hz, args.val_share, args.val_episodes, flags.get("clip_frames", 0)
    )
    env = Imitation(teacher.config, args.walker, clips, walker, flags.get("body_shift", "auto"))
    env.check(teacher)
    if len(student.mean) != env.obs_size:
        raise ValueError(
            f"{args.checkpoint}: takes {len(student.mean)} numbers, but the observation has {env.obs_size}"
        )
    return student, params, env, clips, teacher


# --- measuring


def starts(args, clips, ahead):
    """clip, start, test (all episodes): --episodes of each clip, test clips first."""
    rng = np.random.default_rng(args.seed)
    held, known = np.flatnonzero(clips.validation), np.flatnonzero(~clips.validation)
    if args.train_clips:
        known = np.sort(rng.permutation(known)[: args.train_clips])
    clip = np.repeat(np.concatenate([held, known]), args.episodes).astype(np.int32)
    last = clips.length[clip] - ahead - 1
    start = (rng.uniform(size=len(clip)) * np.maximum(last // 2, 1)).astype(np.int32)
    start[:: args.episodes] = 0
    return clip, start, clips.validation[clip]


def play(args, env, student, params, teacher, clip, start):
    """{policy: records of all episodes, (steps E ...) numpy}; the policies share starts and noise."""
    rollout = make_rollout(env, student, env.longest)
    world = dict(reference=env.reference, teacher=teacher.params, mean=teacher.mean, std=teacher.std)
    size, parts = min(args.batch_size, len(clip)), {name: [] for name in POLICIES}
    for first in range(0, len(clip), size):
        some = np.arange(first, first + size) % len(clip)  # the last batch is filled up, so that it is compiled once
        key = jax.random.fold_in(jax.random.key(args.seed), first)
        for number, name in enumerate(POLICIES):
            with devices.waiting(print, f"episodes {first} to {first + size - 1}, {name}"):
                out = rollout(params, world, np.int32(number), clip[some], start[some], key)
                out = jax.tree.map(np.asarray, out)
            parts[name].append(out)
    whole = {name: jax.tree.map(lambda *x: np.concatenate(x, 1), *rows) for name, rows in parts.items()}
    return jax.tree.map(lambda x: x[:, : len(clip)], whole)


# --- the report


def table_of(rows):
    yield "| policy | reward (95 %) | / teacher | per step | survived | action MSE | joint error | body error |"
    yield "| --- " + "| ---: " * 7 + "|"
    for name, row in rows.items():
        low, high = row["reward_interval"]
        words = [f"{row['reward']:.4g} ({low:.4g} to {high:.4g})", f"{row['reward_share']:.3f}"]
        words += [f"{row['reward_per_step']:.3f}", f"{100 * row['survived']:.0f} %"]
        words += [f"{row[key]:.2g}" for key in ERRORS]
        yield "| " + " | ".join([name, *words]) + " |"


def report(args, card):
    """report.md, as text."""
    lines = [f"# Report card of {args.checkpoint}", ""]
    lines += [
        f"Teacher {args.teacher}, walker {args.walker}. Reward is the sum over an episode, which ends early if the"
    ]
    lines += [
        "pose is lost; the interval is a bootstrap over clips. Action MSE is to what the teacher would do in the state"
    ]
    lines += [
        "that the policy reached. Joint error: root mean square, rad. Body error: mean distance of the tracked bodies,"
    ]
    lines += ["in the walker's unit of length. All policies start from the same states."]
    for part in ("test", "train"):
        if part in card:
            about = card[part]
            lines += [
                "",
                f"## {about['episodes']} episodes of {about['clips']} {part} clips",
                "",
                *table_of(about["rows"]),
            ]
            paid = {name for row in about["rows"].values() for name, value in row["terms"].items() if value}
            terms = [name for name in about["rows"]["teacher"]["terms"] if name in paid]
            lines += ["", "| reward per step | " + " | ".join(about["rows"]) + " |"]
            lines += ["| --- " + "| ---: " * len(about["rows"]) + "|"]
            for term in terms:
                values = [f"{row['terms'][term]:.3g}" for row in about["rows"].values()]
                lines += [f"| {term.replace('_', ' ')} | " + " | ".join(values) + " |"]
            ended = {name: row["ended_by"] for name, row in about["rows"].items() if any(row["ended_by"].values())}
            for name, why in ended.items():
                lines += ["", f"{name}: ended by " + ", ".join(f"{key} ({n})" for key, n in why.items() if n) + "."]
    latent = card["latent"]
    dims = f"{latent['active_dims']} of {len(latent['kl_per_dim'])} dims carry more than {ACTIVE} nats"
    share = 100 * sum(latent["pca_share"][:2])
    lines += [
        "",
        "## Latent",
        "",
        f"KL(q || p) {latent['kl']:.3g} nats; {dims}; two directions hold {share:.0f} % of the spread.",
    ]
    lines += [
        "",
        "## Clips",
        "",
        "| clip | | reward / teacher | survived | action MSE |",
        "| --- | --- " + "| ---: " * 3 + "|",
    ]
    for row in card["clips"]:
        values = f"{row['reward_share']:.3f} | {100 * row['survived']:.0f} % | {row['action_mse']:.2g}"
        lines += [f"| {row['clip']} | {row['part']} | {values} |"]
    lines += [""] + [f"![{name}](figures/{name}.png)" for name in ("survival", "tracking", "latent", "dims")]
    return "\n".join(lines) + "\n"


def main(argv=None):
    args = parse(argv)
    devices.cache(args.compile_cache)
    jax.config.update("jax_default_device", devices.setup(args.device, 1).device)
    student, params, env, clips, teacher = open_run(args)
    clip, start, test = starts(args, clips, env.ahead)
    outs = play(args, env, student, params, teacher, clip, start)
    card = {}
    for part, chosen in (("test", test), ("train", ~test)):
        if chosen.any():
            own = np.flatnonzero(chosen)
            rows = measure(outs, clip, own, args.seed)
            card[part] = dict(episodes=len(own), clips=len(np.unique(clip[own])), rows=rows)
            print(f"{part}: {len(own)} episodes", *table_of(rows), sep="\n", flush=True)
    shown = np.flatnonzero(test) if test.any() else np.arange(len(clip))
    card["latent"], points = latents(outs["student mean"], shown)
    points["clip"] = clip[shown][points["episode"]]
    points["phase"] = (
        outs["student mean"]["frame"][:, shown][points["step"], points["episode"]] / clips.length[points["clip"]]
    )
    card["clips"] = []
    for i in dict.fromkeys(clip.tolist()):
        own = np.flatnonzero(clip == i)
        row = measure({name: outs[name] for name in ("teacher", "student mean")}, clip, own, args.seed)["student mean"]
        about = dict(clip=clips.ids[i], part="test" if clips.validation[i] else "train")
        card["clips"].append({**about, **{key: row[key] for key in ("reward_share", "survived", *ERRORS)}})

    out, episode = Path(args.out), shown[0]
    (out / "figures").mkdir(parents=True, exist_ok=True)
    played = int(outs["student mean"]["alive"][:, episode].sum())
    frame, qpos = (outs["student mean"][key][:played, episode] for key in ("frame", "qpos"))
    reference = clips.qpos[clip[episode], frame]
    for name, figure in dict(
        survival=figures.survival({name: o["alive"][:, shown].mean(1) for name, o in outs.items()}, env.rate),
        tracking=figures.tracking({clips.source[clip[episode]]: (reference, qpos)}, env.rate),
        latent=figures.latent(points),
        dims=figures.dims(card["latent"]["kl_per_dim"], ACTIVE),
    ).items():
        with common.atomic(out / "figures" / f"{name}.png") as path:
            figure.savefig(path, format="png")
    if args.video:
        with common.atomic(out / "figures" / "stick.gif") as path:
            figures.stick(path, env.model, reference, qpos, env.rate)
    with common.atomic(out / "report.json") as path:
        path.write_text(json.dumps(dict(flags=vars(args), **card), indent=1))
    with common.atomic(out / "report.md") as path:
        path.write_text(report(args, card))
    print(f"report: {out / 'report.md'}")
    return 0


if __name__ == "__main__":
    common.run(main)
