"""Learn a new task with a student's skills: PPO whose actions are latents, against the same PPO on raw actions.

Run:
  python vae_distill/reuse.py --checkpoint runs/x/checkpoints/best
  python vae_distill/reuse.py --checkpoint runs/x/checkpoints/best --task follow --env-steps 1000000

The decoder and the prior are frozen. With latent actions a policy's action a becomes z = prior mean + prior standard
deviation * a (with FSQ the level next to prior mode + a), so that an untrained policy moves as the prior does, as in
PULSE; raw actions are motor commands. Tasks for an arm: `reach` a random point, `follow` an ellipse through the space
that the recorded hand visited. All seeds of a kind are one compiled program. Writes OUT/TASK.json and OUT/TASK.png.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import figures
from distill import find_devices, keep_compiled, where
from evaluate import open_run
from teacher.walker import positions

import common

# PPO, as in purejaxrl
GAMMA, LAMBDA, CLIP, VALUE_WEIGHT, MAX_NORM = 0.97, 0.95, 0.2, 0.5, 0.5
NUM_ENVS, UNROLL, EPOCHS, MINIBATCHES, WIDTH, LR = 64, 32, 4, 4, 64, 1e-3
HORIZON = 2.0  # seconds of an episode
AHEAD = (0, 2, 5, 10)  # control steps ahead at which the policy sees the target


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--checkpoint", required=True, metavar="DIR", help="folder with config.json, such as RUN/checkpoints/best")
    add("--task", choices=["reach", "follow"], default="reach", help="the new task")
    add("--env-steps", default=500_000, help="control steps in all, per seed", **whole)
    add("--seeds", default=5, help="runs of each kind", **whole)
    both = dict(nargs=2, type=float, default=[1.0, 1.0], metavar=("LATENT", "RAW"))
    add("--std", help="standard deviation of an untrained policy's actions: try several, it decides much", **both)
    add("--out", metavar="DIR", help="folder to write into; without it RUN/reuse")
    add("--physics", choices=["mjx", "mujoco"], help="as in train.py; without it the run's")
    add("--compile-cache", default="runs/compiled", metavar="DIR", help="where compiled programs are kept")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error("--seeds must be above 0")
    if not all(0 < std < np.inf for std in args.std):
        parser.error("--std must be above 0")
    if args.env_steps < NUM_ENVS * UNROLL:
        parser.error(f"--env-steps must be at least {NUM_ENVS * UNROLL}, those of one update")
    args.out = args.out or str(Path(args.checkpoint).resolve().parent.parent / "reuse")
    return args


# --- the new task


class TaskState(NamedTuple):
    arm: Any  # env.State
    target: Any  # reach: the point (3,); follow: phase and direction (2,)


class Task:
    """Reach a point or follow an ellipse with the hand, the walker's first end effector.

    The reward is exp(-distance / scale), in (0, 1], with a tenth of the recorded hand's spread as its scale.
    """

    def __init__(self, kind, env, clips, student):
        rng, self.kind, self.env, self.student = np.random.default_rng(0), kind, env, student
        self.horizon = round(HORIZON * env.rate)
        postures = np.concatenate([clips.qpos[i, : clips.length[i]] for i in np.flatnonzero(~clips.held_out)])
        self.postures = jnp.array(postures[rng.permutation(len(postures))[:1000]])
        hand = positions(env.model, rng.uniform(postures.min(0), postures.max(0), (1000, env.model.nq)))
        self.points = jnp.array(hand[:, env.end[0]])
        recorded = positions(env.model, np.asarray(self.postures))[:, env.end[0]]
        self.center = recorded.mean(0)
        _, sizes, axes = np.linalg.svd(recorded - self.center, full_matrices=False)
        self.axes = axes[:2] * sizes[:2, None] / np.sqrt(len(recorded))
        self.scale = 0.1 * np.linalg.norm(np.ptp(recorded, axis=0))

    @property
    def obs_size(self):
        return 3 * len(AHEAD) + self.student.config.proprioception_size

    def reset(self, key):
        keys = jax.random.split(key, 3)
        qpos = self.postures[jax.random.randint(keys[0], (), 0, len(self.postures))]
        arm = self.env.state_at(qpos, jnp.zeros(self.env.model.nv), jnp.int32(0), jnp.int32(0))
        if self.kind == "reach":
            target = self.points[jax.random.randint(keys[1], (), 0, len(self.points))]
        else:
            phase, side = jax.random.uniform(keys[1], (), maxval=2 * jnp.pi), jax.random.bernoulli(keys[2])
            target = jnp.stack([phase, jnp.where(side, 1.0, -1.0)])
        return TaskState(arm, target)

    def target_at(self, state, ahead):
        """Where the hand should be `ahead` control steps from now: (3,). The ellipse takes two seconds."""
        if self.kind == "reach":
            return state.target
        angle = state.target[0] + state.target[1] * jnp.pi * (state.arm.age + ahead) / self.env.rate
        return self.center + jnp.cos(angle) * self.axes[0] + jnp.sin(angle) * self.axes[1]

    def get_obs(self, state):
        """The policy's observation: targets relative to the hand, proprioception as the student sees it."""
        hand = state.arm.xpos[self.env.end[0]]
        targets = [(self.target_at(state, ahead) - hand) / self.scale for ahead in AHEAD]
        return jnp.concatenate([*targets, self.student.proprioception(self.env.blind_obs(state.arm))])

    def step(self, state, command):
        """(TaskState, reward, done)."""
        arm = self.env.simulate(state.arm, command)
        state = state._replace(arm=arm)
        distance = jnp.linalg.norm(self.target_at(state, 0) - arm.xpos[self.env.end[0]])
        broken = ~jnp.isfinite(distance)
        reward = jnp.where(broken, 0.0, jnp.exp(-distance / self.scale))
        return state, reward, broken | (arm.age >= self.horizon)


# --- PPO


class ActorCritic(nn.Module):
    """obs (B N) -> mean (B A) and log standard deviation (A,) of the action, value (B)."""

    action_size: int
    std: float  # of an untrained policy's actions

    @nn.compact
    def __call__(self, x):
        def mlp(out, scale):  # not orthogonal: its QR, batched over seeds, deadlocks on XLA's CPU threads
            y = x
            for _ in range(2):
                y = nn.tanh(nn.Dense(WIDTH, kernel_init=nn.initializers.lecun_normal())(y))
            return nn.Dense(out, kernel_init=nn.initializers.normal(scale))(y)

        log_std = self.param("log_std", nn.initializers.constant(np.log(self.std)), (self.action_size,))
        return mlp(self.action_size, 0.001), log_std, mlp(1, 0.1)[..., 0]


def log_prob(action, mean, log_std):
    return (-0.5 * jnp.square((action - mean) / jnp.exp(log_std)) - log_std - 0.5 * jnp.log(2 * jnp.pi)).sum(-1)


class Transition(NamedTuple):
    obs: Any
    action: Any
    value: Any
    log_prob: Any
    reward: Any
    done: Any


class PPO:
    """One seed's run: `train` collects, estimates advantages and learns, over and over. kind: latent or raw."""

    def __init__(self, task, kind, updates, std):
        self.task, self.kind, self.updates, self.student = task, kind, updates, task.student
        self.net = ActorCritic(self.student.config.latent_dim if kind == "latent" else task.env.model.nu, std)
        lr = optax.linear_schedule(LR, 0.0, updates * EPOCHS * MINIBATCHES)
        self.opt = optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.adam(lr, eps=1e-5))

    def train(self, key, params):
        """Reward per control step, (updates,); params: the student's."""
        key, *keys = jax.random.split(key, 4)
        weights = self.net.init(keys[0], jnp.zeros(self.task.obs_size))
        states = self.reset(keys[1])
        ages = jax.random.randint(keys[2], (NUM_ENVS,), 0, self.task.horizon)  # they end at different times
        states = states._replace(arm=states.arm.replace(age=ages))

        def update(carry, key):
            weights, moments, states = carry
            keys = jax.random.split(key)
            states, batch = self.collect(params, weights, states, keys[0])
            advantage = self.advantages(weights, states, batch)
            weights, moments = self.learn(weights, moments, batch, advantage, keys[1])
            return (weights, moments, states), batch.reward.mean()

        carry = weights, self.opt.init(weights), states
        return jax.lax.scan(update, carry, jax.random.split(key, self.updates))[1]

    def reset(self, key):
        return jax.vmap(self.task.reset)(jax.random.split(key, NUM_ENVS))

    def command(self, params, state, action):
        """Motor commands in [-1, 1] from a policy's action."""
        if self.kind == "raw":
            return jnp.clip(action, -1, 1)
        obs, levels = self.task.env.blind_obs(state.arm), self.student.config.fsq_levels
        prior = self.student.prior(params, obs)
        if levels:
            half = levels // 2
            z = jnp.clip(jnp.round((prior.mode() + action) * half), -half, levels - 1 - half) / half
        else:
            z = prior.mean + jnp.exp(0.5 * prior.logvar) * action
        return self.student.decode(params, obs, z)

    def collect(self, params, weights, states, key):
        """UNROLL control steps of all environments; one that ends goes on from its place in `fresh`."""
        keys = jax.random.split(key)
        fresh = self.reset(keys[0])

        def control_step(states, key):
            obs = jax.vmap(self.task.get_obs)(states)
            mean, log_std, value = self.net.apply(weights, obs)
            action = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
            commands = jax.vmap(self.command, (None, 0, 0))(params, states, action)
            states, reward, done = jax.vmap(self.task.step)(states, commands)
            kept = Transition(obs, action, value, log_prob(action, mean, log_std), reward, done)
            return where(done, fresh, states), kept

        return jax.lax.scan(control_step, states, jax.random.split(keys[1], UNROLL))

    def advantages(self, weights, states, batch):
        """Generalised advantage estimates (unroll E); states: those after the last transition."""
        _, _, last = self.net.apply(weights, jax.vmap(self.task.get_obs)(states))

        def backwards(carry, step):
            gae, next_value = carry
            delta = step.reward + GAMMA * next_value * (1 - step.done) - step.value
            gae = delta + GAMMA * LAMBDA * (1 - step.done) * gae
            return (gae, step.value), gae

        return jax.lax.scan(backwards, (jnp.zeros_like(last), last), batch, reverse=True)[1]

    def loss(self, weights, batch, advantage):
        """Clipped policy and value losses of a minibatch."""
        mean, log_std, value = self.net.apply(weights, batch.obs)
        ratio, target = jnp.exp(log_prob(batch.action, mean, log_std) - batch.log_prob), advantage + batch.value
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        actor = -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage).mean()
        clipped = batch.value + jnp.clip(value - batch.value, -CLIP, CLIP)
        critic = 0.5 * jnp.maximum(jnp.square(value - target), jnp.square(clipped - target)).mean()
        return actor + VALUE_WEIGHT * critic

    def learn(self, weights, moments, batch, advantage, key):
        """EPOCHS passes over the batch in MINIBATCHES parts: new (weights, moments)."""
        count = NUM_ENVS * UNROLL
        flat = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), (batch, advantage))
        order = jnp.concatenate([jax.random.permutation(k, count) for k in jax.random.split(key, EPOCHS)])

        def minibatch(carry, index):
            weights, moments = carry
            part = jax.tree.map(lambda x: x[index], flat)
            direction, moments = self.opt.update(jax.grad(self.loss)(weights, *part), moments)
            return (optax.apply_updates(weights, direction), moments), None

        return jax.lax.scan(minibatch, (weights, moments), order.reshape(EPOCHS * MINIBATCHES, -1))[0]


# --- the comparison


def compare(curves, steps_per_update):
    """Per kind: final reward (mean of the last tenth, each seed) and control steps until 80 % of the better kind's."""
    final = {kind: curve[:, -max(1, curve.shape[1] // 10) :].mean(1) for kind, curve in curves.items()}
    goal = 0.8 * max(values.mean() for values in final.values())
    rows = {}
    for kind, curve in curves.items():
        smooth = np.stack([np.convolve(row, np.ones(5) / 5, "valid") for row in curve])
        reached = [
            (int(np.argmax(row >= goal)) + 5) * steps_per_update if (row >= goal).any() else None for row in smooth
        ]
        rows[kind] = dict(final=final[kind].tolist(), steps_to_goal=reached)
    return dict(goal=float(goal), kinds=rows)


def main(argv=None):
    args = parse(argv)
    keep_compiled(args.compile_cache)
    find_devices()
    student, params, env, clips, _ = open_run(args.checkpoint, physics=args.physics)
    if env.free:
        raise common.DataError("the student's walker has a free root: these tasks are for an arm with a fixed base")
    common.make_folder(args.out)
    task = Task(args.task, env, clips, student)
    keys, curves, per_update = jax.random.split(jax.random.key(0), args.seeds), {}, NUM_ENVS * UNROLL
    for kind, std in zip(("latent", "raw"), args.std, strict=True):
        run = PPO(task, kind, args.env_steps // per_update, std)
        curves[kind] = np.asarray(jax.jit(jax.vmap(run.train, (0, None)))(keys, params))
        print(f"{args.task}, {kind} actions: reward {curves[kind][:, -10:].mean():.3f}", flush=True)
    result = compare(curves, per_update)
    for kind, row in result["kinds"].items():
        text = f"80 % of the better final reward ({result['goal']:.3f}) after {row['steps_to_goal']} control steps"
        print(f"{kind}: {text}")
    out = Path(args.out)
    figure = figures.learning(curves, per_update, result["goal"], args.task)
    with common.atomic(out / f"{args.task}.png") as path:
        figure.savefig(path, format="png")
    with common.atomic(out / f"{args.task}.json") as path:
        curves = {kind: curve.tolist() for kind, curve in curves.items()}
        path.write_text(json.dumps(dict(flags=vars(args), **result, curves=curves), indent=1))
    print(f"report: {out / args.task}.json, {args.task}.png")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
