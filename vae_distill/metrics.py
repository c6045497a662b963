"""Play whole episodes from given starts with one of six policies, and measure them.

Records of a rollout are arrays (steps E ...); `alive` (steps E) is 1 for the steps that an episode was played.
"""

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from env import TERMINATIONS, State
from model import ACTIVE, intention

POLICIES = ("teacher", "posterior mean", "posterior sample", "prior mean", "prior sample", "zero action")
ERRORS = ("action_mse", "joint_error", "body_error")


def make_rollout(env, student, steps):
    """A jitted function (params, task, policy, clip, start, key) -> records of `steps` control steps of E episodes.

    One compiled program serves all policies. policy: index into POLICIES; clip, start (E,). The same key gives the same
    starts and the same noise whatever the policy. An episode is played until it terminates or its clip is over.
    Records: reward, terms, alive, terminated, action_mse (to the teacher's action in that state), joint_error (rms,
    rad), body_error (mean distance), latent (mode of q), kl (per dim), qpos, frame.
    """

    def act(params, task, policy, obs, key):
        """The policy's action, the teacher's, the latent and the KL per dim, for obs (E N)."""
        label, _ = intention(task["teacher"], (obs - task["mean"]) / task["std"], env.reference_size)
        q, p = student.posterior(params, obs), student.prior(params, obs)
        latents = (q.mode, lambda: q.sample(key), p.mode, lambda: p.sample(key))
        decoders = [lambda latent=latent: student.decode(params, obs, latent()) for latent in latents]
        action = jax.lax.switch(policy, [lambda: label, *decoders, lambda: jnp.zeros_like(label)])
        return action, label, q.mode(), q.kl(p)

    @jax.jit
    def rollout(params, task, policy, clip, start, key):
        here = env.with_reference(task["reference"])
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(clip)))
        envs = jax.vmap(here.reset)(clip, start, keys)

        def control_step(carry, t):
            envs, alive = carry
            obs = jax.vmap(here.get_obs)(envs)
            action, label, latent, kl = act(params, task, policy, obs, jax.random.fold_in(key, t))
            envs, terms, terminated, truncated = jax.vmap(here.step)(envs, action)
            joint, body = jax.vmap(here.errors)(envs)
            out = dict(
                reward=env.total(terms), terms=terms, alive=alive, terminated=alive * terminated, joint_error=joint,
                body_error=body, action_mse=jnp.square(action - label).mean(-1), latent=latent, kl=kl, qpos=envs.qpos,
                frame=env.frame_index(envs),
            )  # fmt: skip
            return (envs, alive * (1 - (terminated | truncated))), out

        return jax.lax.scan(control_step, (envs, jnp.ones(len(clip))), jnp.arange(steps))[1]

    return rollout


def summary(out, chosen=slice(None)):
    """Means over the `chosen` episodes: reward per episode, share that never terminated, errors per step played."""
    alive = np.asarray(out["alive"])[:, chosen]
    played = max(alive.sum(), 1)
    means = dict(
        reward=float((np.asarray(out["reward"])[:, chosen] * alive).sum(0).mean()),
        survival=float(1 - np.asarray(out["terminated"])[:, chosen].sum(0).mean()),
    )
    for name in ERRORS:
        means[name] = float((np.nan_to_num(np.asarray(out[name])[:, chosen]) * alive).sum() / played)
    return means


# --- the report's


def interval(values, clip, rng, over=None, count=1000):
    """95 % bootstrap interval of sum(values) / sum(over), without `over` of the mean of `values` (E); clips are drawn,
    as episodes of one clip are alike. None for a single clip, which says nothing about others."""
    over = np.ones_like(values) if over is None else over
    groups = [clip == i for i in np.unique(clip)]
    if len(groups) == 1:
        return None
    drawn = rng.integers(len(groups), size=(count, len(groups)))
    above, below = (np.array([x[group].sum() for group in groups])[drawn].sum(1) for x in (values, over))
    return np.quantile(above / below, [0.025, 0.975]).tolist()


def measure(outs, clip, chosen, seed):
    """One row per policy over the `chosen` episodes: summary, reward per term, intervals, what ended episodes."""
    rows, rewards = {}, {}
    for name, out in outs.items():
        alive, rng = out["alive"][:, chosen], np.random.default_rng(seed)
        row, played = summary(out, chosen), alive.sum()
        rewards[name] = (out["reward"][:, chosen] * alive).sum(0)
        terms = {key: float((value[:, chosen] * alive).sum() / played) for key, value in out["terms"].items()}
        row |= dict(
            reward_interval=interval(rewards[name], clip[chosen], rng),
            terms={key: value for key, value in terms.items() if key.endswith(("_reward", "_cost"))},
            ended_by={key: int(round(terms[key] * played)) for key in TERMINATIONS if key in terms},
            steps=int(played),
        )
        rows[name] = row
    for name, row in rows.items():
        row["reward_share"] = row["reward"] / (rows["teacher"]["reward"] or np.nan)
        rng = np.random.default_rng(seed)
        row["reward_share_interval"] = interval(rewards[name], clip[chosen], rng, over=rewards["teacher"])
    return rows


def latent_metrics(out, chosen, clip, phase):
    """KL of every latent dim over the played steps, and points for a figure: the latents in their two main directions.

    clip (E), phase (steps E): of what a point shows.
    """
    alive = out["alive"][:, chosen] > 0
    mean, kl = out["latent"][:, chosen][alive], out["kl"][:, chosen][alive]
    centred = mean - mean.mean(0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    variance = np.square(sizes) / max(np.square(sizes).sum(), 1e-12)
    shown = np.linspace(0, len(mean) - 1, min(len(mean), 3000)).astype(int)
    of_clip, of_phase = np.broadcast_to(clip[chosen], alive.shape)[alive], phase[:, chosen][alive]
    xy = np.pad(centred @ directions[:2].T, ((0, 0), (0, 1)))[shown, :2]  # --latent-dim 1 has one direction
    points = dict(xy=xy, clip=of_clip[shown], phase=of_phase[shown])
    metrics = dict(
        kl_per_dim=kl.mean(0).tolist(),
        kl=float(kl.sum(-1).mean()),
        active_dims=int((kl.mean(0) > ACTIVE).sum()),
        pca_explained_variance=variance[:8].tolist(),
    )
    return metrics, points


# --- without a reference


def free_run(env, act, qpos, steps):
    """Postures (steps E nq) of E episodes that begin at rest in `qpos` (E nq), under act(observations (E N), step) ->
    commands (E A). In C MuJoCo, so that nothing is compiled but the observation."""
    datas = [mujoco.MjData(env.model) for _ in qpos]
    for data, posture in zip(datas, qpos, strict=True):
        data.qpos = posture
        mujoco.mj_kinematics(env.model, data)
    observe, out = jax.jit(jax.vmap(env.blind_obs)), []
    for t in range(steps):
        states = jax.tree.map(lambda *x: np.stack(x, dtype=np.float32), *map(State().with_physics, datas))
        for data, ctrl in zip(datas, np.asarray(act(observe(states), t)), strict=True):
            data.ctrl = ctrl
            mujoco.mj_step(env.model, data, env.substeps)
        out.append([np.full(env.model.nq, np.nan) if diverged(data) else data.qpos.copy() for data in datas])
    return np.array(out)


def diverged(data):
    """C MuJoCo starts anew when its numbers explode; it counts the times."""
    kinds = mujoco.mjtWarning
    return any(data.warning[kind].number for kind in (kinds.mjWARN_BADQPOS, kinds.mjWARN_BADQVEL, kinds.mjWARN_BADQACC))


def lasting(env, clips, qpos):
    """(E,) bool: never did a joint of `qpos` (T E nq) leave the recorded range by more than half its width, nor did the
    root of a free walker leave the heights that the task allows."""
    joints, recorded = qpos[..., env.q0 :], clips.qpos[..., env.q0 :].reshape(-1, qpos.shape[-1] - env.q0)
    low, high = recorded.min(0), recorded.max(0)
    inside = (np.abs(joints - (low + high) / 2) < high - low).all(-1)
    if env.free:
        bottom, top = env.weights["healthy_z_range"]
        inside &= (qpos[..., 2] > bottom) & (qpos[..., 2] < top)
    return inside.all(0)


def smoothness(env, qpos, rate):
    """Root mean square of speed and acceleration of the joints of `qpos` (T ... nq) at `rate` per second."""
    speed = np.diff(qpos[..., env.q0 :], axis=0) * rate
    return [float(np.sqrt(np.nanmean(np.square(x)))) for x in (speed, np.diff(speed, axis=0) * rate)]
