"""One iteration of distillation as one program: the student acts, the teacher labels, the student learns.

DAgger as in PULSE: the environments go where the student's actions lead, and each visited observation is labelled
with the action that the teacher would have taken. Environments may be sharded over devices: everything random is
drawn for the whole batch, so the trajectories do not depend on the number of devices.

state: dict(params, opt, envs)
task: dict(reference, teacher, mean, std, train, seed), arrays that no iteration changes
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from model import intention

from common import DataError, make_folder

BETAS = (0.9, 0.95)


def make_optimizer(weight_decay, clip):
    """AdamW with clipping; the learning rate is multiplied in by the caller. Only matrices decay."""

    def matrices(params):
        return jax.tree.map(lambda x: x.ndim == 2, params)

    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.scale_by_adam(*BETAS, eps=1e-5),
        optax.add_decayed_weights(weight_decay, mask=matrices),
    )


def init_state(env, student, opt, num_envs, task, seed):
    """The state before the first iteration."""

    @jax.jit
    def start(task, key):
        params = student.init(jax.random.fold_in(key, 1))
        here = env.with_reference(task["reference"])
        envs = reset_all(here, task["train"], num_envs, jax.random.fold_in(key, 2))
        return dict(params=params, opt=opt.init(params), envs=envs)

    return start(task, jax.random.key(seed))


def reset_all(env, train, num_envs, key):
    """States of `num_envs` environments at random starts in the clips `train`."""

    def reset(key):
        clip, start = env.sample_start(train, key)
        return env.reset(clip, start, key)

    return jax.vmap(reset)(jax.random.split(key, num_envs))


def where(done, new, old):
    """Per environment: the pytree `new` where done (E), else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(done.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def make_iteration(env, student, opt, unroll, batch_size):
    """The function (state, task, step, schedule) -> (state, metrics), to be jitted.

    step: optimizer steps done; schedule: lr and kl, (updates,) each; an update whose lr is 0 changes nothing.
    """

    def rollout(env, params, envs, train, key):
        """`unroll` control steps of all environments with the student's sampled actions. An environment that ends goes
        on from its place in `fresh`, drawn once per iteration: resetting costs as much as a physics step."""
        keys = jax.random.split(key)
        fresh = reset_all(env, train, len(envs.age), keys[0])

        def control_step(envs, t):
            obs = jax.vmap(env.get_obs)(envs)
            z = student.posterior(params, obs).sample(jax.random.fold_in(keys[1], t))
            action = student.decode(params, obs, z)
            envs, terms, terminated, truncated = jax.vmap(env.step)(envs, action)
            metrics = dict(reward=env.total(terms), terminated=terminated, nan=terms["nan"])
            return where(terminated | truncated, fresh, envs), (obs, metrics)

        envs, (obs, metrics) = jax.lax.scan(control_step, envs, jnp.arange(unroll))
        return envs, obs, jax.tree.map(lambda x: x.astype(jnp.float32).mean(), metrics)

    def label(task, obs):
        """Batch of observations with the teacher's actions."""
        action, _ = intention(task["teacher"], (obs - task["mean"]) / task["std"], env.reference_size)
        return dict(obs=obs, action=action)

    def update(carry, inputs):
        """One optimizer step; a gradient that is not finite changes nothing."""
        (params, moments), (batch, key, now) = carry, inputs
        (_, metrics), grads = jax.value_and_grad(student.loss, has_aux=True)(params, batch, key, now["kl"])
        norm = optax.global_norm(grads)
        direction, new = opt.update(grads, moments, params)
        moved = optax.apply_updates(params, jax.tree.map(lambda x: -now["lr"] * x, direction))
        sound = jnp.isfinite(norm) & (now["lr"] > 0)
        carry = jax.tree.map(lambda a, b: jnp.where(sound, a, b), (moved, new), carry)
        return carry, dict(metrics, norm=norm)

    def iteration(state, task, step, schedule):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(task["seed"] + 1), step), 3)
        here = env.with_reference(task["reference"])
        envs, obs, counts = rollout(here, state["params"], state["envs"], task["train"], keys[0])
        batches = minibatches(label(task, obs), batch_size, keys[1])
        noise = jax.random.split(keys[2], len(batches["obs"]))
        (params, opt), metrics = jax.lax.scan(update, (state["params"], state["opt"]), (batches, noise, schedule))
        return dict(params=params, opt=opt, envs=envs), jax.tree.map(jnp.mean, metrics) | counts

    return iteration


def minibatches(tree, batch_size, key):
    """(unroll, envs, ...) -> (updates, rows, envs of a batch, ...) with rows * envs of a batch = batch_size.

    Time is shuffled within each environment and environments stay where they are, so that nothing moves between
    devices; a batch holds all environments, or every second, third ... of them if it is smaller.
    """
    unroll, envs = jax.tree.leaves(tree)[0].shape[:2]
    rows, parts = max(1, batch_size // envs), max(1, envs // batch_size)
    order = jnp.argsort(jax.random.uniform(key, (unroll, envs)), 0)

    def cut(x):
        x = jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), 0)
        x = x.reshape(unroll // rows, rows, envs // parts, parts, *x.shape[2:])
        return jnp.moveaxis(x, 3, 1).reshape(-1, rows, envs // parts, *x.shape[4:])

    return jax.tree.map(cut, tree)


def updates_per_iteration(envs, unroll, batch_size):
    """Optimizer steps per iteration, or None if the samples do not fall into whole batches."""
    if (envs % batch_size and batch_size % envs) or unroll % max(1, batch_size // envs):
        return None
    return envs * unroll // batch_size


# --- devices


def keep_compiled(folder):
    """Keep compiled programs in a folder, for the next start."""
    make_folder(folder, "--compile-cache")
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).resolve()))


def find_devices():
    """DataError where JAX has no device, as with JAX_PLATFORMS=cuda and a JAX for CPUs."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        text = (str(error) or "no backend").splitlines()[0][:150]
        raise DataError(f"JAX has no device here (JAX_PLATFORMS is {jax.config.jax_platforms}): {text}") from None


def replicate(mesh, tree):
    """A pytree of arrays, whole on every device of the mesh."""
    return put(tree, NamedSharding(mesh, PartitionSpec()))


def shard(mesh, state):
    """The training state on the mesh: environments divided, the rest whole on every device."""
    envs = put(state["envs"], NamedSharding(mesh, PartitionSpec("env")))
    return {**replicate(mesh, {name: value for name, value in state.items() if name != "envs"}), "envs": envs}


def put(tree, sharding):
    """Every process holds the same arrays and gives its devices their parts (device_put would compare them first)."""

    def place(x):
        host = np.asarray(jnp.asarray(x))
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree)


def jit(mesh, iteration, state):
    """`iteration` jitted: it uses up the state that it is given and leaves the new one where the old one was."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(iteration, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())))


def gather(tree):
    """A pytree of arrays as numpy arrays on every process."""
    if jax.process_count() > 1:
        tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, tree)


def broadcast(text):
    """Rank 0's text on all processes. Also a barrier."""
    if jax.process_count() == 1:
        return text
    letters = np.zeros(4096, np.uint8)
    letters[: len(text.encode())] = np.frombuffer(text.encode(), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(letters))).rstrip(b"\0").decode()


def any_process(asked):
    """True on all processes if it is on one."""
    return bool(asked) if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(asked)).any())
