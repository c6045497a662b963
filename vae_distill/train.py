"""Train a VAE student: learns a latent motor skill space from a frozen track-mjx teacher in MuJoCo MJX.

Run:
  python vae_distill/train.py
  python vae_distill/train.py --teacher RUN_DIR --data CLIPS.h5 --walker rodent.xml --out runs/rat
  torchrun --nproc_per_node 8 vae_distill/train.py --teacher RUN_DIR --data CLIPS.h5 --walker rodent.xml --out runs/rat

One process drives all devices it sees; torchrun, with a process per GPU, is for several machines.
"""

import contextlib
import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import demo
import devices
import distill
import figures
from data import read_clips
from env import Imitation
from model import Student, read_npz
from rollout import make_rollout, summary
from teacher import read_teacher
from walker import build_model

import common

HERE = Path(__file__).resolve().parent


def parse(argv=None):
    parser = common.flags(__doc__, omit={"accum", "amp", "compile", "workers"})
    parser.set_defaults(steps=100_000, batch_size=512, lr=3e-4, lr_end=3e-5, weight_decay=0.0, warmup=500)
    parser.set_defaults(log_every=200, eval_every=5000, save_every=5000)
    group = parser.add_argument_group("vae_distill")
    add, whole, real = group.add_argument, dict(type=int, metavar="N"), dict(type=float, metavar="X")
    add("--teacher", metavar="DIR", help="a track-mjx run, or one PPONetwork_<step> folder of it")
    add("--walker", metavar="FILE", help="MJCF of the walker that the teacher was trained on")
    add("--val-share", type=float, default=0.1, metavar="X", help="share of the clips held out, by hash of the name")
    add("--val-episodes", nargs="+", default=[], metavar="IDS", help="hold out just these clips: FILE/3 FILE/7")
    add("--clip-frames", default=0, help="frames per clip, where the file does not tell", **whole)
    add(
        "--body-shift",
        choices=["auto", "0", "1"],
        default="auto",
        help="1: track the next body, as teachers of 2025 learnt to; see Imitation in env.py",
    )
    add("--num-envs", default=1024, help="parallel environments, over all devices", **whole)
    add("--unroll", default=16, help="control steps of every environment between two rounds of learning", **whole)
    add("--latent-dim", default=32, help="dims of the latent", **whole)
    add("--encoder-hidden-sizes", type=int, nargs="+", default=[512, 512, 256], metavar="N", help="encoder widths")
    add("--decoder-hidden-sizes", type=int, nargs="+", default=[512, 512, 256], metavar="N", help="decoder widths")
    add("--prior-hidden-sizes", type=int, nargs="+", default=[512, 256], metavar="N", help="prior widths")
    add("--action-loss", choices=["mse", "norm"], default="mse", help="mean squared error, or PULSE's mean distance")
    add("--kl-weight", default=1e-3, help="weight of KL(q || p)", **real)
    add("--kl-start", help="weight before annealing; without it --kl-weight throughout", **real)
    add(
        "--kl-anneal",
        type=float,
        nargs=2,
        default=[0.5, 0.75],
        metavar="X",
        help="anneal between these shares of --steps",
    )
    add("--unit-kl-weight", default=0.0, help="weight of KL(q || N(0, I))", **real)
    add("--ar-weight", default=0.0, help="weight of the distance between consecutive latents (PULSE: 0.005)", **real)
    add("--prior-stop-gradient", action="store_true", help="fit the prior to the encoder, not the encoder to the prior")
    add("--devices", default=0, help="devices to divide the environments over; 0: all there are", **whole)
    add("--compile-cache", default="runs/compiled", metavar="DIR", help="where compiled programs are kept")
    return common.parse(parser, argv, demo=HERE / "demo.args")


def schedules(args, step, updates):
    """Learning rate and loss weights of `updates` optimizer steps from `step` on, (updates,) each.

    The learning rate is 0 after --steps: the last iteration may hold more updates than are left.
    """
    steps = np.arange(step, step + updates)
    begin, end = args.kl_anneal
    share = np.clip((steps / args.steps - begin) / max(end - begin, 1e-9), 0, 1)
    start = args.kl_weight if args.kl_start is None else args.kl_start
    now = dict(
        lr=np.array([common.cosine(i, args) if i < args.steps else 0.0 for i in steps]),
        kl=start + share * (args.kl_weight - start),
        unit_kl=np.full(updates, args.unit_kl_weight),
        ar=np.full(updates, args.ar_weight),
    )
    return {name: value.astype(np.float32) for name, value in now.items()}


def validate(params, rollout, world, clips, seed):
    """Per source, over one episode of each held-out clip: the student's mean (reward, errors), the teacher's reward
    from the same starts and their ratio; a clip and the student's motion, (T nq) each."""
    clip = np.flatnonzero(clips.validation).astype(np.int32)
    start, key = np.zeros_like(clip), jax.random.key(seed)
    teacher, student = (rollout(params, world, np.int32(policy), clip, start, key) for policy in (0, 1))
    metrics, examples = {}, {}
    for name in dict.fromkeys(clips.source[clip]):
        own = np.flatnonzero(clips.source[clip] == name)
        metrics |= {f"val/{name}/{key}": value for key, value in summary(student, own).items()}
        metrics[f"val/{name}/teacher_reward"] = summary(teacher, own)["reward"]
        share = metrics[f"val/{name}/reward"] / metrics[f"val/{name}/teacher_reward"]
        metrics[f"val/{name}/reward_share"] = share
        played = int(student["alive"][:, own[0]].sum())
        frame, qpos = (np.asarray(student[key])[:played, own[0]] for key in ("frame", "qpos"))
        examples[name] = clips.qpos[clip[own[0]], frame], qpos
    for key in ("action_mse", "reward_share"):
        metrics[f"val/{key}"] = float(np.mean([metrics[f"val/{name}/{key}"] for name in examples]))
    return metrics, examples


def save(args, dist, step, model, state, best, is_best):
    """The student and the training state into a checkpoint."""
    state = devices.collect(dist, state)
    if not dist.main:
        return
    with common.checkpoint(args, step, is_best) as folder:
        model.save_pretrained(folder, state["params"])
        np.savez(folder / "resume.npz", **distill.pack(state))
        (folder / "resume.json").write_text(json.dumps(dict(step=step, best=best)))


def resume(args, dist, model, state):
    """(state, first step, best metric) of the newest checkpoint if --resume; --init: weights alone."""
    folder = devices.share(dist, str(common.newest(args, dist) or "")) if args.resume else ""
    if not folder:
        params = model.load_pretrained(args.init) if args.init else state["params"]
        return {**state, "params": params}, 0, None
    about = json.loads((Path(folder) / "resume.json").read_text())
    return distill.unpack(state, read_npz(Path(folder) / "resume.npz"), folder), about["step"], about["best"]


def main(argv=None):
    # --- setup
    args = parse(argv)
    for name in ("teacher", "walker"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is missing: a teacher, its walker and its clips belong together")
    devices.cache(args.compile_cache)
    dist = devices.setup(args.device, args.devices)
    if args.num_envs % dist.mesh.size:
        raise ValueError(f"--num-envs {args.num_envs} must be a multiple of the {dist.mesh.size} devices")
    updates = distill.updates_of(args.num_envs, args.unroll, args.batch_size)
    if args.demo:
        (demo.write if dist.main else demo.wait)(args.data[0].partition("=")[2])
    teacher = read_teacher(args.teacher)
    walker = build_model(args.walker, teacher.config)
    clips = read_clips(
        args.data, walker, teacher.mocap_hz, args.val_share, args.val_episodes, clip_frames=args.clip_frames
    )
    env = Imitation(teacher.config, args.walker, clips, walker, args.body_shift)
    env.check(teacher)
    common.open_run(args, dist)
    args.out = devices.share(dist, args.out)
    stop = common.Interrupt(args, dist)

    # --- model
    config = dict(
        reference_size=env.reference_size,
        action_size=env.model.nu,
        latent=args.latent_dim,
        encoder=args.encoder_hidden_sizes,
        decoder=args.decoder_hidden_sizes,
        prior=args.prior_hidden_sizes,
        teacher=teacher.config,
    )
    model = Student(config, teacher.mean, teacher.std)
    opt = distill.make_optimizer(args.betas, args.weight_decay, args.clip)
    train = np.flatnonzero(~clips.validation).astype(np.int32)
    if not len(train):
        raise ValueError("no clip is left to train on: hold out fewer with --val-share or --val-episodes")
    world = dict(reference=env.reference, teacher=teacher.params, mean=teacher.mean, std=teacher.std, train=train)
    state = distill.start(env, model, opt, args.num_envs, world, args.seed)

    # --- resume
    state, first, best = resume(args, dist, model, state)
    log = common.Logger(args, dist, first)
    size = sum(x.size for x in jax.tree.leaves(state["params"]))
    log.say(f"{args.out}: {size:,} parameters, {dist.mesh.size} x {dist.device.device_kind}")

    # --- data
    held = clips.validation.sum()
    log.say(f"{len(train)} clips to train on, {held} held out; {clips.recomputed} file(s) whose qvel was recomputed")
    if not held:
        log.say("nothing to validate on: hold out clips with --val-share or --val-episodes")
    log.say(f"teacher: {teacher.path}, layout {teacher.layout}, {env.rate:.0f} Hz, body shift {env.shift}")
    state, world = devices.place(dist, state), devices.spread(dist, world)
    iteration = distill.make_iteration(
        env,
        model,
        opt,
        unroll=args.unroll,
        batch_size=args.batch_size,
        seed=args.seed,
        action_loss=args.action_loss,
        stop_prior=args.prior_stop_gradient,
        ar=args.ar_weight > 0,
    )
    iteration = devices.program(dist, iteration, state)
    rollout = make_rollout(env, model, env.longest)
    intervals = dict(log=args.log_every, eval=args.eval_every, save=args.save_every)

    # --- loop
    for step in range(first, args.steps, updates):
        schedule = schedules(args, step, updates)
        with devices.waiting(log.say, "compiling the iteration") if step == first else contextlib.nullcontext():
            state, metrics = iteration(state, world, np.int32(step), schedule)
        if step == first:
            log.pause()
        done, line, is_best = min(step + updates, args.steps), {}, False
        log.add(metrics, done - step)
        for _ in range(step, done):
            log.tick()

        ended, stopped = done == args.steps, devices.any_of(dist, stop())
        due = {name: done // every > step // every for name, every in intervals.items()}
        if due["log"] or ended:
            line.update(log.flush(lr=float(schedule["lr"][0])))
            line["env_steps_per_s"] = line["steps_per_s"] * args.batch_size  # each state is learnt from once
        if held and (due["eval"] or ended):
            with devices.waiting(log.say, "validation"):
                metrics, examples = validate(state["params"], rollout, world, clips, args.seed)
            line.update(metrics)
            is_best = best is None or metrics["val/action_mse"] < best
            best = metrics["val/action_mse"] if is_best else best
        if line:
            log.write(done, line)
        if due["save"] or is_best or ended or stopped:
            save(args, dist, done, model, state, best, is_best)
        if "val/action_mse" in line and dist.main:
            log.figure(done, "tracking", figures.tracking(examples, env.rate))
            log.figure(done, "curves", figures.curves(log.out / "log.jsonl"))
        if line or stopped:
            log.pause()
        if stopped and not ended:
            log.say(f"stopped after step {done}; go on with --resume --out {args.out}")
            common.cleanup(dist, log)
            return stop.code

    # --- end
    log.say(f"checkpoint: {log.out / 'checkpoints' / ('best' if held else 'last')}")
    log.say(f"figure:     {log.out / 'figures' / 'tracking.png'}")
    common.cleanup(dist, log)
    return 0


if __name__ == "__main__":
    common.run(main)
