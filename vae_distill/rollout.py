"""Play whole episodes from given starts with one of six policies; one compiled program serves them all."""

import jax
import jax.numpy as jnp
import numpy as np
from model import intention, kl

POLICIES = ("teacher", "student mean", "student sample", "prior mean", "prior sample", "zero action")


def make_rollout(env, student, steps):
    """A jitted function (params, world, policy, clip, start, key) -> records of `steps` control steps of E episodes.

    policy: index into POLICIES; clip, start (E,); world: dict(reference, teacher, mean, std). The same key gives
    the same starts and the same noise whatever the policy. An episode is played until it fails or its clip is over;
    `alive` (steps E) is 1 for its steps. Records, (steps E ...): reward, terms, alive, failed, action_mse (to the
    teacher's action in that state), joint_error (rms, rad), body_error (mean distance), latent (mean of q), kl (per
    dim), qpos, frame.
    """

    def policies(params, world, obs, key):
        x = (obs - world["mean"]) / world["std"]
        label, _ = intention(world["teacher"], x, env.reference_size)
        q, p = student.encode(params, obs), student.predict(params, obs)
        noise = jax.random.normal(key, q[0].shape)
        latents = [q[0], q[0] + jnp.exp(0.5 * q[1]) * noise, p[0], p[0] + jnp.exp(0.5 * p[1]) * noise]
        actions = [label, *(student.decode(params, obs, z) for z in latents), jnp.zeros_like(label)]
        return jnp.stack(actions), q[0], kl(*q, *p)

    @jax.jit
    def rollout(params, world, policy, clip, start, key):
        reference = world["reference"]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(clip)))
        states, views = jax.vmap(env.begin, (None, 0, 0, 0))(reference, clip, start, keys)

        def control(carry, t):
            states, views, alive = carry
            obs = jax.vmap(env.look, (None, 0, 0))(reference, states, views)
            actions, latent, each = policies(params, world, obs, jax.random.fold_in(key, t))
            action = actions[policy]
            states, views, terms, failed, over = jax.vmap(env.act, (None, 0, 0))(reference, states, action)
            frame = env.frame(states.start, states.age)
            joint, body = jax.vmap(env.errors, (None, 0, 0, 0))(reference, views, states.clip, frame)
            out = dict(
                reward=env.total(terms), terms=terms, alive=alive, failed=alive * failed, joint_error=joint,
                body_error=body, action_mse=jnp.square(action - actions[0]).mean(-1), latent=latent, kl=each,
                qpos=states.qpos, frame=frame,
            )  # fmt: skip
            return (states, views, alive * (1 - (failed | over))), out

        return jax.lax.scan(control, (states, views, jnp.ones(len(clip))), jnp.arange(steps))[1]

    return rollout


def summary(out, own=slice(None)):
    """Means over the episodes `own`: reward per episode, share that never failed, errors per step played."""
    alive = np.asarray(out["alive"])[:, own]
    played = max(alive.sum(), 1)
    means = dict(
        reward=float((np.asarray(out["reward"])[:, own] * alive).sum(0).mean()),
        survived=float(1 - np.asarray(out["failed"])[:, own].sum(0).mean()),
    )
    for name in ("action_mse", "joint_error", "body_error"):
        means[name] = float((np.nan_to_num(np.asarray(out[name])[:, own]) * alive).sum() / played)
    return means
