"""One iteration of distillation as one program: the student acts, the teacher labels, the student learns.

DAgger as in PULSE: the environments go where the student's actions lead, and each visited observation is labelled
with the action that the teacher would have taken. Environments may be sharded over devices: everything random is
drawn for the whole batch, so the trajectories do not depend on the number of devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from model import intention


def make_optimizer(betas, weight_decay, clip):
    """AdamW with clipping; the learning rate is multiplied in by the caller. Only matrices decay."""

    def matrices(params):
        return jax.tree.map(lambda x: x.ndim == 2, params)

    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.scale_by_adam(*betas, eps=1e-5),
        optax.add_decayed_weights(weight_decay, mask=matrices),
    )


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


def updates_of(envs, unroll, batch_size):
    """Optimizer steps per iteration; a ValueError if the samples do not fall into whole batches."""
    if (envs % batch_size and batch_size % envs) or unroll % max(1, batch_size // envs):
        raise ValueError(
            f"--batch-size {batch_size} must divide --num-envs {envs}, or be a multiple of it by a factor of "
            f"--unroll {unroll}"
        )
    return envs * unroll // batch_size


def start(env, student, opt, envs, world, seed):
    """The state before the first iteration: params, opt, envs (State of all), obs (E N)."""
    key = jax.random.key(seed)
    params = student.init(jax.random.fold_in(key, 1))
    keys = jax.random.split(jax.random.fold_in(key, 2), envs)

    @jax.jit
    def reset(world, keys):
        states, views = jax.vmap(env.reset, (None, None, 0))(world["reference"], world["train"], keys)
        return states, jax.vmap(env.look, (None, 0, 0))(world["reference"], states, views)

    states, obs = reset(world, keys)
    return dict(params=params, opt=opt.init(params), envs=states, obs=obs)


def make_iteration(env, student, opt, *, unroll, batch_size, seed, action_loss="mse", stop_prior=False, ar=False):
    """The function (state, world, step, schedule) -> (state, metrics), to be jitted.

    world: dict(reference, teacher, mean, std, train (indices of clips)); step: optimizer steps done; schedule: lr, kl,
    unit_kl, ar, (updates,) each; an update whose lr is 0 changes nothing.
    """

    def collect(state, world, key):
        """`unroll` control steps of all environments with the student's sampled actions."""
        reference, index = world["reference"], jnp.arange(len(state["obs"]))

        def control(carry, t):
            states, obs = carry
            k = jax.random.split(jax.random.fold_in(key, t), 2)
            mean, logvar = student.encode(state["params"], obs)
            z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(k[0], mean.shape)
            action = student.decode(state["params"], obs, z)
            played, views, terms, failed, over = jax.vmap(env.act, (None, 0, 0))(reference, states, action)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(k[1], index)
            fresh = jax.vmap(env.reset, (None, None, 0))(reference, world["train"], keys)
            done = failed | over

            def pick(new, old):
                return jnp.where(done.reshape(-1, *[1] * (new.ndim - 1)), new, old)

            states, views = jax.tree.map(pick, fresh, (played, views))
            # PULSE's AR term leaves out the first frames of an episode
            out = dict(obs=obs, follows=(played.age > 3).astype(jnp.float32))
            count = dict(reward=env.total(terms), failed=failed, nan=terms["nan"])
            return (states, jax.vmap(env.look, (None, 0, 0))(reference, states, views)), (out, count)

        (states, obs), (samples, counts) = jax.lax.scan(control, (state["envs"], state["obs"]), jnp.arange(unroll))
        return states, obs, samples, jax.tree.map(lambda x: x.astype(jnp.float32).mean(), counts)

    def iteration(state, world, step, schedule):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed + 1), step), 3)
        states, obs, samples, counts = collect(state, world, keys[0])
        x = (samples["obs"] - world["mean"]) / world["std"]
        batch = dict(obs=samples["obs"], action=intention(world["teacher"], x, env.reference_size)[0])
        if ar:
            batch["before"] = jnp.concatenate([samples["obs"][:1], samples["obs"][:-1]])
            batch["follows"] = samples["follows"].at[0].set(0.0)
        batches = minibatches(batch, batch_size, keys[1])
        noise = jax.random.split(keys[2], len(batches["obs"]))

        def update(carry, inputs):
            params, moments = carry
            batch, key, now = inputs
            grad = jax.value_and_grad(student.loss, has_aux=True)
            (_, metrics), grads = grad(params, batch, key, now, action_loss, stop_prior)
            norm = optax.global_norm(grads)
            step, new = opt.update(grads, moments, params)
            sound = jnp.isfinite(norm) & (now["lr"] > 0)  # a gradient that is not finite changes nothing
            moved = optax.apply_updates(params, jax.tree.map(lambda x: -now["lr"] * x, step))
            carry = jax.tree.map(lambda a, b: jnp.where(sound, a, b), (moved, new), carry)
            return carry, dict(metrics, norm=norm)

        (params, moments), metrics = jax.lax.scan(update, (state["params"], state["opt"]), (batches, noise, schedule))
        metrics = jax.tree.map(jnp.mean, metrics) | counts
        return dict(params=params, opt=moments, envs=states, obs=obs), metrics

    return iteration


# --- files


def pack(state):
    """A pytree as {"opt.1.mu.encoder.hidden_0.bias": array}."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(value) for path, value in leaves}


def unpack(like, arrays, where):
    """`arrays` in the structure of the pytree `like`; a ValueError if names or shapes differ."""
    wanted = {name: value.shape for name, value in pack(like).items()}
    found = {name: value.shape for name, value in arrays.items()}
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            raise ValueError(f"{where}: {name} has shape {found.get(name)}, but this run needs {wanted.get(name)}")
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[name]) for name in wanted])
