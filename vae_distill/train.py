# /// script
# dependencies = ["jax", "flax", "mujoco", "mujoco-mjx", "h5py", "tqdm", "matplotlib"]
# ///
"""Train a VAE student: learns a latent motor skill space from a frozen track-mjx teacher in MuJoCo MJX.

Run:
  python vae_distill/train.py
  python vae_distill/train.py --teacher RUN_DIR --data CLIPS.h5 --walker rodent.xml --out runs/rat
  torchrun --nproc_per_node 8 vae_distill/train.py --teacher RUN_DIR --data CLIPS.h5 --walker rodent.xml --out runs/rat

One process drives all devices it sees; torchrun, with a process per GPU, is for several machines.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import demo
import distill
import figures
from data import read_clips, restore_split, split_of
from env import Imitation
from metrics import make_rollout, summary
from model import Student, StudentConfig, pack, read_npz, unpack
from teacher.checkpoint import read_teacher
from teacher.walker import build_model

import common

HERE = Path(__file__).resolve().parent
EVERY = ("log_every", "eval_every", "save_every")
KL_ANNEAL = (0.5, 0.75)  # shares of --steps between which the KL weight goes from --kl-start to --kl-weight (track-mjx)


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    whole, real = dict(type=int, metavar="N"), dict(type=float, metavar="X")

    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", metavar="PATH", help="PATH or NAME=PATH; without it the demo, on data it writes itself")
    add("--teacher", metavar="DIR", help="a track-mjx run, or one PPONetwork_<step> folder of it")
    add("--walker", metavar="FILE", help="MJCF of the walker that the teacher was trained on")
    add("--val-share", default=0.1, help="share of the episodes held out, by a hash of their names", **real)
    add("--val-episodes", nargs="+", default=[], metavar="IDS", help="hold out just these: 56-69,80 or g1=56-69 b=3")
    add("--clip-frames", default=0, help="frames per clip; 0: as the file says", **whole)
    shift = "1: track the next body, as teachers of 2025 learnt to; see Imitation in env.py"
    add("--physics", choices=["mjx", "mujoco"], default="mjx", help="mujoco: in C on one core, nothing to compile")
    add("--body-shift", choices=["auto", "0", "1"], default="auto", help=shift)

    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--latent-dim", default=32, help="dims of the latent", **whole)
    add("--fsq-levels", default=0, help="round every latent dim to so many levels (FSQ); 0: a Gaussian latent", **whole)
    add("--encoder-hidden-sizes", type=int, nargs="+", default=[512, 512, 256], metavar="N", help="encoder widths")
    add("--decoder-hidden-sizes", type=int, nargs="+", default=[512, 512, 256], metavar="N", help="decoder widths")
    add("--prior-hidden-sizes", type=int, nargs="+", default=[512, 256], metavar="N", help="prior widths")

    optimisation = parser.add_argument_group("optimisation")
    add = optimisation.add_argument
    add("--batch-size", default=512, help="samples per optimizer step, over all processes and micro-steps", **whole)
    add("--num-envs", default=1024, help="parallel environments, over all devices", **whole)
    add("--unroll", default=16, help="control steps of every environment between two rounds of learning", **whole)
    add("--lr", default=3e-4, help="peak learning rate", **real)
    add("--lr-end", default=3e-5, help="learning rate after the last step (cosine)", **real)
    add("--warmup", default=500, help="steps of linear warm-up", **whole)
    add("--weight-decay", default=0.0, help="AdamW weight decay of matrices", **real)
    add("--clip", default=1.0, help="largest norm of the gradient", **real)
    add("--kl-weight", default=1e-3, help="weight of KL(q || p)", **real)
    add("--kl-start", help="KL weight of the first half, annealed to --kl-weight in the third quarter", **real)
    add("--seed", default=0, help="of weights, batches, augmentation and noise", **whole)

    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="DIR", help=f"folder of this run; without it the next free runs/{HERE.name}/NNN")
    add("--resume", action="store_true", help="go on from OUT's newest checkpoint, or start if there is none")
    add("--init", metavar="CKPT", help="checkpoint whose weights to start from")
    add("--steps", default=100_000, help="optimizer steps in all", **whole)
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1")
    add("--devices", default=0, help="devices to divide the environments over; 0: all there are", **whole)
    add("--compile-cache", default="runs/compiled", metavar="DIR", help="where compiled programs are kept")
    add("--log-every", default=200, help="steps between two log lines", **whole)
    add("--eval-every", default=5000, help="steps between two validations", **whole)
    add("--save-every", default=5000, help="steps between two checkpoints", **whole)
    add("--keep", default=2, help="newest checkpoints kept beside the best", **whole)
    add("--wandb", metavar="PROJECT", help="also log to this Weights & Biases project")

    args = parser.parse_args(argv)
    args.demo = args.data is None
    if args.demo:  # its preset first, so that the flags given here win
        given = sys.argv[1:] if argv is None else argv
        args = parser.parse_args([f"@{HERE / 'demo.args'}", *given], argparse.Namespace(demo=True))
    positive = "latent_dim batch_size num_envs unroll lr clip steps log_every eval_every save_every keep"
    for name in positive.split():
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    zero = "val_share clip_frames fsq_levels lr_end warmup weight_decay kl_weight kl_start devices seed"
    for name in zero.split():
        if not 0 <= (getattr(args, name) or 0) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must not be negative")
    if args.fsq_levels == 1 or args.val_share >= 1 or args.seed > 2**31 - 2:
        parser.error("--fsq-levels is 0 or at least 2, --val-share below 1, --seed below 2^31 - 1")
    for name in ("encoder", "decoder", "prior"):
        if min(getattr(args, f"{name}_hidden_sizes")) < 1:
            parser.error(f"--{name}-hidden-sizes must be above 0")
    if not distill.updates_per_iteration(args.num_envs, args.unroll, args.batch_size):
        parser.error("--batch-size must divide --num-envs, or be a multiple of it by a factor of --unroll")
    if args.resume and not args.out:
        parser.error("--resume needs --out, the folder of the run to go on with")
    if missing := [name for name in ("teacher", "walker") if getattr(args, name) is None]:
        parser.error(f"--{missing[0]} is missing: a teacher, its walker and its clips belong together")
    args.folder = HERE.name
    args.fixed = [action.dest for group in (model, optimisation) for action in group._group_actions]
    return args


def setup(args):
    """Join the processes that torchrun started, if any, and make a mesh of devices. Returns rank, world, mesh."""
    rank, world, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    distill.keep_compiled(args.compile_cache)
    name, _, index = args.device.partition(":")
    platform = dict(cuda="gpu", rocm="gpu").get(name, name)  # what JAX calls it
    if world > 1 and not jax.distributed.is_initialized():
        # torchrun's own store listens on MASTER_PORT
        address = f"{os.environ['MASTER_ADDR']}:{int(os.environ['MASTER_PORT']) + 1}"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")  # Slurm may show each task one GPU
        own = None if name == "cpu" else [local % len(visible) if visible != [""] else local]
        jax.distributed.initialize(address, world, rank, local_device_ids=own)
    try:
        devices = jax.devices() if name == "auto" else jax.devices(platform)
        devices = [devices[int(index)]] if index else devices
    except (RuntimeError, IndexError, ValueError, AssertionError) as error:
        platforms = f" (JAX_PLATFORMS is {os.environ['JAX_PLATFORMS']})" if os.environ.get("JAX_PLATFORMS") else ""
        text = f"{(str(error) or 'no backend').splitlines()[0][:100]}; for a GPU: pip install 'jax[cuda12]'"
        raise common.DataError(f"--device {args.device}: JAX has no such device here{platforms}: {text}") from None
    if args.devices > len(devices):
        raise common.DataError(f"--devices {args.devices}: there are {len(devices)} here")
    devices = devices[: args.devices or None]
    if len({device.process_index for device in devices}) < world:
        raise common.DataError(f"--device, --devices: each of the {world} processes needs one at least")
    if args.physics == "mujoco" and (len(devices) > 1 or world > 1):
        raise common.DataError("--physics mujoco: it runs on one core, so --devices is 1")
    if args.num_envs % len(devices):
        raise common.DataError(f"--num-envs {args.num_envs} must be a multiple of the {len(devices)} devices")
    mesh = jax.make_mesh((len(devices),), ("env",), axis_types=(AxisType.Auto,), devices=devices)
    return rank, max(world, 1), mesh


def learning_rate(step, args):
    """Linear warm-up to --lr, then half a cosine down to --lr-end at --steps."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = min(1.0, (step - args.warmup) / max(1, args.steps - args.warmup))
    return args.lr_end + (args.lr - args.lr_end) * 0.5 * (1 + math.cos(math.pi * done))


def schedules(args, step, updates):
    """Learning rate and KL weight of `updates` optimizer steps from `step` on, (updates,) each.

    The learning rate is 0 after --steps: the last iteration may hold more updates than are left.
    """
    steps = np.arange(step, step + updates)
    begin, end = KL_ANNEAL
    done = np.clip((steps / args.steps - begin) / (end - begin), 0, 1)
    start = args.kl_weight if args.kl_start is None else args.kl_start
    values = dict(
        lr=np.array([learning_rate(i, args) if i < args.steps else 0.0 for i in steps]),
        kl=start + done * (args.kl_weight - start),
    )
    return {name: value.astype(np.float32) for name, value in values.items()}


def validate(params, rollout, task, clips, seed):
    """Per source, over one episode of each held-out clip: the student's means (reward, errors), the teacher's reward
    from the same starts and their ratio; a clip and the student's motion, (T nq) each."""
    clip = np.flatnonzero(clips.held_out).astype(np.int32)
    start, key = np.zeros_like(clip), jax.random.key(seed)
    teacher, student = (rollout(params, task, np.int32(policy), clip, start, key) for policy in (0, 1))
    metrics, examples = {}, {}
    for name in dict.fromkeys(clips.source[clip]):
        chosen = np.flatnonzero(clips.source[clip] == name)
        metrics |= {f"val/{name}/{key}": value for key, value in summary(student, chosen).items()}
        metrics[f"val/{name}/teacher_reward"] = summary(teacher, chosen)["reward"]
        metrics[f"val/{name}/reward_share"] = metrics[f"val/{name}/reward"] / (
            metrics[f"val/{name}/teacher_reward"] or math.nan
        )
        played = int(student["alive"][:, chosen[0]].sum())
        frame, qpos = (np.asarray(student[key])[:played, chosen[0]] for key in ("frame", "qpos"))
        examples[name] = clips.qpos[clip[chosen[0]], frame], qpos
    for key in ("action_mse", "reward_share"):
        metrics[f"val/{key}"] = float(np.mean([metrics[f"val/{name}/{key}"] for name in examples]))
    return metrics, examples


def main(argv=None):
    # --- setup
    args = parse(argv)
    rank, world, mesh = setup(args)
    if args.demo:
        (demo.write if rank == 0 else demo.wait)(args.data[0].partition("=")[2])
    if args.resume and (record := Path(args.out) / "args.json").exists():  # --teacher may hold newer ones by now
        kept = Path(common.read_json(record)["flags"]["teacher"])
        same = kept.exists() and kept.parent.resolve() == Path(args.teacher).resolve()
        args.teacher = str(kept) if same else args.teacher
    teacher = read_teacher(args.teacher)
    args.teacher = str(teacher.path)  # what evaluate.py, reuse.py and a resumed run go by
    walker = build_model(args.walker, teacher.config)
    clips = read_clips(args.data, walker, teacher.mocap_hz, args.val_share, args.val_episodes, args.clip_frames)
    env = Imitation(teacher.config, walker, clips, args.body_shift, args.physics)
    env.check(teacher)
    if clips.held_out.all():
        raise common.DataError("no clip is left to train on: hold out fewer with --val-share or --val-episodes")
    common.open_run(args)
    args.out = distill.broadcast(args.out or "")
    stop = common.Interrupt(args.out)

    # --- model
    checkpoint = distill.broadcast(str(common.newest(args.out) or "")) if args.resume else ""
    sizes = "latent_dim fsq_levels encoder_hidden_sizes decoder_hidden_sizes prior_hidden_sizes"
    config = StudentConfig(
        reference_size=env.reference_size,
        proprioception_size=env.obs_size - env.reference_size,
        action_size=env.model.nu,
        **{name: getattr(args, name) for name in sizes.split()},
        teacher=teacher.config,
    )
    model = Student(config, teacher.mean, teacher.std)
    opt = distill.make_optimizer(args.weight_decay, args.clip)
    task = dict(reference=env.reference, teacher=teacher.params, mean=teacher.mean, std=teacher.std)
    task |= dict(train=np.flatnonzero(~clips.held_out).astype(np.int32), seed=np.int32(args.seed))
    state = distill.init_state(env, model, opt, args.num_envs, task, args.seed)
    if checkpoint or args.init:  # with its normaliser, whatever the teacher has become
        state["params"] = model.load_pretrained(checkpoint or args.init)

    # --- resume
    first, best, changed = 0, None, ""
    if checkpoint:
        checkpoint = Path(checkpoint)
        first, best = (common.read_json(checkpoint / "resume.json")[name] for name in ("step", "best"))
        changed = restore_split(clips, common.read_json(checkpoint / "data.json"))
        task["train"] = np.flatnonzero(~clips.held_out).astype(np.int32)
        if not len(task["train"]):
            raise common.DataError("--resume: none of the clips that the run was trained on is in --data")
        saved = unpack(state, read_npz(checkpoint / "resume.npz"), checkpoint)
        if changed:  # clips have other numbers now: environments start anew
            saved["envs"] = distill.init_state(env, model, opt, args.num_envs, task, args.seed)["envs"]
        state = saved
    log = common.Logger(args, first)
    size = sum(x.size for x in jax.tree.leaves(state["params"]))
    log.say(f"{args.out}: {size:,} parameters, {mesh.size} x {mesh.devices[0].device_kind}, {world} process(es)")

    # --- data
    for note in [*clips.notes, *[changed] * bool(changed)]:
        log.say(note)
    if not (np.array_equal(model.mean, teacher.mean) and np.array_equal(model.std, teacher.std)):
        log.say("the teacher's normaliser is not the checkpoint's: the student keeps its own")
    held_out = int(clips.held_out.sum())
    log.say(f"{len(clips.ids) - held_out} clips to train on, {held_out} held out")
    if not held_out:
        log.say("nothing to validate on: hold out clips with --val-share or --val-episodes")
    log.say(f"teacher: {teacher.path}, layout {teacher.layout}, {env.rate:.0f} Hz, body shift {env.shift}")
    state, task = distill.shard(mesh, state), distill.replicate(mesh, task)
    iteration = distill.make_iteration(env, model, opt, args.unroll, args.batch_size)
    iteration = distill.jit(mesh, iteration, state)
    rollout = make_rollout(env, model, env.longest)
    updates = distill.updates_per_iteration(args.num_envs, args.unroll, args.batch_size)
    log.say("compiling: half a minute for an arm, many minutes for a rodent; kept in --compile-cache")
    began = time.perf_counter()
    iteration = iteration.lower(state, task, np.int32(0), schedules(args, 0, updates)).compile()
    log.say(f"compiled in {time.perf_counter() - began:.0f} s")

    # --- loop
    stopped = False
    for step in range(first, args.steps, updates):
        began, schedule = time.perf_counter(), schedules(args, step, updates)
        state, metrics = jax.block_until_ready(iteration(state, task, np.int32(step), schedule))
        done, line, is_best = min(step + updates, args.steps), {}, False
        log.add(metrics, done - step)
        for _ in range(step, done):
            log.tick((time.perf_counter() - began) / (done - step))

        ended = done == args.steps
        stopped = distill.any_process(stop()) and not ended
        due = {name: ended or done // getattr(args, name) > step // getattr(args, name) for name in EVERY}
        if due["log_every"]:
            line.update(log.flush(lr=float(schedule["lr"][0])))
            line["env_steps_per_s"] = line["steps_per_s"] * args.batch_size  # each state is learnt from once
        if held_out and due["eval_every"]:
            metrics, examples = validate(state["params"], rollout, task, clips, args.seed)
            line.update(metrics)
            is_best = best is None or metrics["val/action_mse"] < best
            best = metrics["val/action_mse"] if is_best else best
        if line:
            log.write(done, line)
        if due["save_every"] or is_best or stopped:
            saved = distill.gather(state)
            if rank == 0:
                with common.checkpoint(args.out, done, is_best, args.keep) as folder:
                    model.save_pretrained(folder, saved["params"])
                    (folder / "data.json").write_text(json.dumps(split_of(clips), indent=1))
                    np.savez(folder / "resume.npz", **pack(saved))
                    (folder / "resume.json").write_text(json.dumps(dict(step=done, best=best)))
        if "val/action_mse" in line and rank == 0:
            log.figure(done, "tracking", figures.tracking(examples, env.rate))
            log.figure(done, "curves", figures.curves(log.out / "log.jsonl"))
        if stopped:
            log.say(f"stopped after step {done}; go on with --resume --out {args.out}")
            break

    # --- end
    if not stopped:
        log.say(f"checkpoint: {log.out / 'checkpoints' / ('best' if held_out else 'last')}")
        if held_out:
            log.say(f"figure:     {log.out / 'figures' / 'tracking.png'}")
    log.close()
    return stop.code or 75 if stopped else 0  # 75: another process was told to stop


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
