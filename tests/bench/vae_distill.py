"""Benchmarks of vae_distill on the demo's arm: what labelling and learning cost, sizes, devices, a loop in Python.

Run:
  python tests/bench/vae_distill.py
  python tests/bench/vae_distill.py --envs 1024 --device cuda --devices 1

Control steps per second, medians of interleaved repeats in one process; on a busy machine trust the ratios alone.
"physics": MJX alone under constant torques, the same scan. "iteration": the student acts, the teacher labels, the
student learns from every state once. "python loop": the same work with a call per control step and per update, as in
the published distillation script, each part jitted.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

# read before JAX starts
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from timing import load  # noqa: E402

vae = load("vae_distill", "env", "walker", "teacher", "distill", "devices", "demo")
UNROLL, BATCH = 8, 512


def interleaved(runs, repeats):
    """{name: median seconds} of functions called in turn; the first call of each compiles and is not counted."""
    times = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


class Setting:
    """The demo's task, a student of its sizes, and the training state of `envs` environments on `devices` devices."""

    def __init__(self, folder, envs, dist):
        self.dist, self.envs = dist, envs
        teacher = vae.teacher.read_teacher(folder / "teacher")
        walker = vae.walker.build_model(folder / "walker.xml", teacher.config)
        clips = vae.data.read_clips([str(folder / "clips.h5")], walker, teacher.mocap_hz)
        self.env = vae.env.Imitation(teacher.config, folder / "walker.xml", clips, walker)
        sizes = dict(latent=8, encoder=[128, 128], decoder=[128, 128], prior=[64, 64])
        config = dict(reference_size=self.env.reference_size, action_size=walker.nu, teacher=teacher.config, **sizes)
        self.student = vae.model.Student(config, teacher.mean, teacher.std)
        self.opt = vae.distill.make_optimizer((0.9, 0.95), 0.0, 1.0)
        world = dict(reference=self.env.reference, teacher=teacher.params, mean=teacher.mean, std=teacher.std)
        self.world = world | dict(train=np.flatnonzero(~clips.validation).astype(np.int32))
        state = vae.distill.start(self.env, self.student, self.opt, envs, self.world, 0)
        self.state, self.world = vae.devices.place(dist, state), vae.devices.spread(dist, self.world)
        self.updates = vae.distill.updates_of(envs, UNROLL, BATCH)
        self.schedule = {name: np.full(self.updates, 1e-3, np.float32) for name in ("lr", "kl", "unit_kl", "ar")}

    def iteration(self):
        make = vae.distill.make_iteration(self.env, self.student, self.opt, unroll=UNROLL, batch_size=BATCH, seed=0)
        program, box = vae.devices.program(self.dist, make, self.state), [jax.tree.map(jnp.copy, self.state)]

        def run():
            box[0], metrics = program(box[0], self.world, np.int32(0), self.schedule)
            jax.block_until_ready((box[0], metrics))

        return run

    def physics(self):
        model, blank = self.env.put

        @jax.jit
        def roll(qpos, qvel):
            def control(carry, _):
                data = jax.vmap(lambda q, v: blank.replace(qpos=q, qvel=v, ctrl=jnp.full(model.nu, 0.1)))(*carry)
                step = jax.vmap(lambda d: vae.env.mjx.step(model, d))
                data = jax.lax.fori_loop(0, self.env.substeps, lambda _, d: step(d), data)
                return (data.qpos, data.qvel), None

            return jax.lax.scan(control, (qpos, qvel), length=UNROLL)[0]

        return lambda: jax.block_until_ready(roll(self.state["envs"].qpos, self.state["envs"].qvel))

    def python_loop(self):
        """One jitted call per control step (act, label, step, reset) and one per update."""
        env, student, opt, world = self.env, self.student, self.opt, self.world

        @jax.jit
        def control(params, states, obs, key):
            mean, logvar = student.encode(params, obs)
            z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
            label = vae.model.intention(world["teacher"], (obs - world["mean"]) / world["std"], env.reference_size)[0]
            out = jax.vmap(env.act, (None, 0, 0))(world["reference"], states, student.decode(params, obs, z))
            played, views, _, failed, over = out
            keys = jax.random.split(key, len(obs))
            fresh = jax.vmap(env.reset, (None, None, 0))(world["reference"], world["train"], keys)
            done = failed | over
            states, views = jax.tree.map(
                lambda a, b: jnp.where(done.reshape(-1, *[1] * (a.ndim - 1)), a, b), fresh, (played, views)
            )
            return states, jax.vmap(env.look, (None, 0, 0))(world["reference"], states, views), label

        @jax.jit
        def update(params, moments, batch, key):
            weights = dict(kl=1e-3, unit_kl=0.0, ar=0.0)
            grads = jax.grad(lambda p: student.loss(p, batch, key, weights)[0])(params)
            step, moments = opt.update(grads, moments, params)
            return jax.tree.map(lambda p, s: p - 1e-3 * s, params, step), moments

        box, key = [jax.tree.map(jnp.copy, self.state)], jax.random.key(0)

        def run():
            state = box[0]
            params, moments, states, obs = (state[name] for name in ("params", "opt", "envs", "obs"))
            kept = []
            for t in range(UNROLL):
                before = obs
                states, obs, label = control(params, states, obs, jax.random.fold_in(key, t))
                kept.append((before, label))
            seen, labels = (jnp.concatenate(x) for x in zip(*kept, strict=True))
            order = np.random.default_rng(0).permutation(len(seen)).reshape(-1, BATCH)
            for i, rows in enumerate(order):
                batch = dict(obs=seen[rows], action=labels[rows])
                params, moments = update(params, moments, batch, jax.random.fold_in(key, i))
            box[0] = jax.block_until_ready(dict(params=params, opt=moments, envs=states, obs=obs))

        return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", help="folder of the demo's data [written anew]")
    parser.add_argument("--envs", type=int, nargs="+", default=[64, 256, 1024], help="environments [64 256 1024]")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--devices", type=int, default=4, help="devices of the last row, at the largest size [4]")
    parser.add_argument("--repeats", type=int, default=15, help="repeats [15]")
    parser.add_argument("--compile-cache", default="runs/compiled", help="where compiled programs are kept")
    args = parser.parse_args()
    vae.devices.cache(args.compile_cache)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.demo or Path(temporary) / "demo")
        vae.demo.write(folder)
        rows = []
        for envs in args.envs:
            setting, steps = Setting(folder, envs, vae.devices.setup(args.device, 1)), envs * UNROLL
            runs = {name: getattr(setting, name)() for name in ("physics", "iteration", "python_loop")}
            if envs == max(args.envs) and args.devices > 1:
                runs["divided"] = Setting(folder, envs, vae.devices.setup(args.device, args.devices)).iteration()
            got = interleaved(runs, args.repeats)
            speed = {name: f"{steps / seconds:,.0f}" for name, seconds in got.items()}
            overhead, python = got["iteration"] / got["physics"], got["python_loop"] / got["iteration"]
            rows.append(
                (envs, speed["physics"], speed["iteration"], f"{overhead:.2f}", speed["python_loop"], f"{python:.2f}")
            )
            if "divided" in got:
                gain = got["iteration"] / got["divided"]
                last = f"{envs} environments on {args.devices} devices: {speed['divided']} control steps/s, {gain:.2f}x"
            print("measured", envs, flush=True)
    print(f"jax {jax.__version__}, {args.device}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| environments | physics | iteration | time / physics | python loop | time / iteration |")
    print("| ---: " * 6 + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    if args.devices > 1:
        print(f"\n{last}")


if __name__ == "__main__":
    main()
