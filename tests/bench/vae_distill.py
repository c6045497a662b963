"""Benchmarks of vae_distill: acting, labelling and learning beside bare MJX; sizes, devices, a loop in Python.

Run:
  python tests/bench/vae_distill.py
  python tests/bench/vae_distill.py --envs 1024 --device cuda
  python tests/bench/vae_distill.py --teacher RUN_DIR --data CLIPS.h5 --walker rodent.xml --only physics iteration

Control steps per CPU second (on a GPU per second), medians of interleaved repeats in one process.
"physics": MJX alone under constant torques, the same scan. "iteration": the student acts, the teacher labels, the
student learns from every state once. "python": the same work with a call per control step and per update, each part
jitted, as published distillation scripts have it. "devices": the iteration on --devices devices.
"""

import argparse
import os
import tempfile
from pathlib import Path

# read before JAX starts
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from timing import interleaved, load  # noqa: E402

TEACHER = ["teacher.checkpoint", "teacher.walker"]
vae = load("vae_distill", "env", "distill", "demo", *TEACHER)
checkpoint, walkers = (getattr(vae, name) for name in TEACHER)
UNROLL = 8


class Setting:
    """A task, a student, and the training state of `envs` environments on `count` devices."""

    def __init__(self, args, envs, count):
        devices = jax.devices(dict(cuda="gpu").get(args.device, args.device))[:count]
        auto = (jax.sharding.AxisType.Auto,)
        self.mesh = jax.make_mesh((count,), ("env",), axis_types=auto, devices=devices)
        teacher = checkpoint.read_teacher(args.teacher)
        walker = walkers.build_model(args.walker, teacher.config)
        clips = vae.data.read_clips([str(args.data)], walker, teacher.mocap_hz)
        self.env = vae.env.Imitation(teacher.config, walker, clips)
        hidden = {f"{part}_hidden_sizes": tuple(args.hidden) for part in ("encoder", "decoder", "prior")}
        own = self.env.obs_size - self.env.reference_size
        config = vae.model.StudentConfig(self.env.reference_size, own, walker.nu, latent_dim=8, **hidden)
        self.student = vae.model.Student(config, teacher.mean, teacher.std)
        self.opt, self.batch_size = vae.distill.make_optimizer(0.0, 1.0), min(512, envs * UNROLL)
        task = dict(reference=self.env.reference, teacher=teacher.params, mean=teacher.mean, std=teacher.std)
        task |= dict(train=np.flatnonzero(~clips.held_out).astype(np.int32), seed=np.int32(0))
        state = vae.distill.init_state(self.env, self.student, self.opt, envs, task, 0)
        self.state, self.task = vae.distill.shard(self.mesh, state), vae.distill.replicate(self.mesh, task)
        updates = vae.distill.updates_per_iteration(envs, UNROLL, self.batch_size)
        self.schedule = {name: np.full(updates, 1e-3, np.float32) for name in ("lr", "kl")}

    def iteration(self):
        make = vae.distill.make_iteration(self.env, self.student, self.opt, UNROLL, self.batch_size)
        program, box = vae.distill.jit(self.mesh, make, self.state), [jax.tree.map(jnp.copy, self.state)]

        def run():
            box[0], metrics = program(box[0], self.task, np.int32(0), self.schedule)
            jax.block_until_ready((box[0], metrics))

        return run

    def physics(self):
        action = jnp.full(self.env.model.nu, 0.1)

        @jax.jit
        def roll(envs):
            simulate = jax.vmap(self.env.simulate, (0, None))
            return jax.lax.scan(lambda envs, _: (simulate(envs, action), None), envs, length=UNROLL)[0]

        return lambda: jax.block_until_ready(roll(self.state["envs"]))

    def python(self):
        """One jitted call per control step (act, label, step, reset) and one per update."""
        student, opt, task, distill = self.student, self.opt, self.task, vae.distill
        env = self.env.with_reference(task["reference"])

        @jax.jit
        def control_step(params, envs, key):
            obs = jax.vmap(env.get_obs)(envs)
            action = student.decode(params, obs, student.posterior(params, obs).sample(key))
            label, _ = vae.model.intention(task["teacher"], (obs - task["mean"]) / task["std"], env.reference_size)
            played, _, terminated, truncated = jax.vmap(env.step)(envs, action)
            fresh = distill.reset_all(env, task["train"], len(obs), key)
            return distill.where(terminated | truncated, fresh, played), obs, label

        @jax.jit
        def update(params, moments, batch, key):
            grads = jax.grad(lambda p: student.loss(p, batch, key, 1e-3)[0])(params)
            direction, moments = opt.update(grads, moments, params)
            return jax.tree.map(lambda p, s: p - 1e-3 * s, params, direction), moments

        box, key = [jax.tree.map(jnp.copy, self.state)], jax.random.key(0)

        def run():
            params, moments, envs = (box[0][name] for name in ("params", "opt", "envs"))
            kept = []
            for t in range(UNROLL):
                envs, obs, label = control_step(params, envs, jax.random.fold_in(key, t))
                kept.append((obs, label))
            seen, labels = (jnp.concatenate(x) for x in zip(*kept, strict=True))
            order = np.random.default_rng(0).permutation(len(seen)).reshape(-1, self.batch_size)
            for i, rows in enumerate(order):
                batch = dict(obs=seen[rows], action=labels[rows])
                params, moments = update(params, moments, batch, jax.random.fold_in(key, i))
            box[0] = jax.block_until_ready(dict(params=params, opt=moments, envs=envs))

        return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="a track-mjx run [the demo's]")
    parser.add_argument("--data", help="clips [the demo's]")
    parser.add_argument("--walker", help="MJCF file [the demo's]")
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 128], help="widths of the student [128 128]")
    parser.add_argument("--envs", type=int, nargs="+", default=[64, 256, 1024], help="environments [64 256 1024]")
    parser.add_argument(
        "--only", nargs="+", default=["physics", "iteration", "python"], help="which of the three [all]"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--devices", type=int, default=1, help="also the iteration on so many devices [1: no]")
    parser.add_argument("--repeats", type=int, default=15, help="repeats [15]")
    parser.add_argument("--compile-cache", default="runs/compiled", help="where compiled programs are kept")
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(Path(args.compile_cache).resolve()))
    with tempfile.TemporaryDirectory() as temporary:
        if args.teacher is None:
            folder = Path(temporary) / "demo"
            vae.demo.write(folder)
            args.teacher, args.data, args.walker = (folder / name for name in ("teacher", "clips.h5", "walker.xml"))
        print(f"jax {jax.__version__}, {args.device}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        print("control steps per second, and the time of each over that of the iteration")
        for envs in args.envs:
            setting = Setting(args, envs, 1)
            runs = {name: getattr(setting, name)() for name in args.only}
            if args.devices > 1:
                runs["devices"] = Setting(args, envs, args.devices).iteration()
            seconds = interleaved(runs, args.repeats, device=args.device)
            base = seconds.get("iteration", next(iter(seconds.values())))
            told = [f"{name} {envs * UNROLL / s:,.0f} ({s / base:.2f})" for name, s in seconds.items()]
            print(f"{envs} environments: " + ", ".join(told), flush=True)


if __name__ == "__main__":
    main()
