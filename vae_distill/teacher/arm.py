"""Make a teacher for an arm whose every joint has a motor: an expert controller, cloned into a track-mjx checkpoint.

Run:
  python vae_distill/teacher/arm.py --walker arm.xml --data CLIPS.h5 --mocap-hz 200 --out runs/arm

Writes OUT/walker.xml (motors scaled to [-1, 1]; Euler steps, no contacts and joint limits, for MJX's sake) and
OUT/teacher, a run in track-mjx's flat layout. The controller is computed torque: the acceleration of a quadratic
through the reference frames ahead, plus a critically damped spring to it, through the inverse dynamics.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import optax

if __name__ == "__main__":  # vae_distill/ and its parent take the place of vae_distill/teacher/
    sys.path[:1] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]
from data import read_clips
from distill import find_devices
from env import Imitation
from model import QUIET, Decoder, Encoder, gaussian_heads, intention

import common
from common import DataError
from teacher.checkpoint import write_teacher
from teacher.walker import body_names, build_model, positions

AHEAD = 5  # reference frames that the teacher sees
LATENT, WIDTHS = 16, (128, 128)
VISIT_STEPS = 40  # control steps of an episode from which the clone learns


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--walker", required=True, metavar="FILE", help="MJCF of an arm: fixed base, one motor per joint")
    add("--data", required=True, nargs="+", metavar="PATH", help="reference clips, as for train.py")
    add("--out", required=True, metavar="DIR", help="folder to write walker.xml and teacher/ into")
    add("--mocap-hz", type=float, required=True, metavar="X", help="frames per second of the clips")
    add("--substeps", default=5, help="physics steps per control step; one control step per frame", **whole)
    add("--clip-frames", default=0, help="frames per clip; 0: as the file says", **whole)
    add("--steps", default=4000, help="optimizer steps of the cloning", **whole)
    add("--seed", default=0, help="of the weights and the visited states", **whole)
    args = parser.parse_args(argv)
    for name in ("mocap_hz", "substeps", "steps"):
        if not 0 < getattr(args, name) < np.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if args.seed < 0:
        parser.error("--seed must not be negative")
    return args


# --- the walker and its task


def unit_motors(source):
    """MJCF text of the walker for MJX: motors take [-1, 1], Euler steps, no contacts, joint limits or idle bodies."""
    try:
        spec = mujoco.MjSpec.from_file(str(source))
        model = spec.compile()
    except ValueError as error:
        raise DataError(f"--walker {source}: {' '.join(str(error).split())[:200]}") from None
    if "" in body_names(model):
        raise DataError(f"--walker {source}: body {body_names(model).index('')} has no name")
    joints = model.actuator_trnid[:, 0] if model.nu else np.zeros(0)
    if model.nu != model.nv or model.nq != model.nv or sorted(joints) != list(range(model.nv)):
        raise DataError(f"--walker {source}: {model.nv} joints and {model.nu} motors; every joint needs one of its own")
    if (model.actuator_gaintype != mujoco.mjtGain.mjGAIN_FIXED).any() or model.actuator_biastype.any():
        raise DataError(f"--walker {source}: actuators other than motors")
    for i, motor in enumerate(spec.actuators):
        (low, high), force = model.actuator_ctrlrange[i], model.actuator_forcerange[i, 1]
        if model.actuator_ctrllimited[i]:
            if low != -high:
                raise DataError(f"--walker {source}: motor {motor.name!r} takes {low:g} to {high:g}: not symmetric")
            if model.actuator_forcelimited[i]:  # it holds before the gear
                high = min(high, force / model.actuator_gainprm[i, 0])
            motor.gear, motor.ctrlrange, motor.forcelimited = motor.gear * high, (-1, 1), False
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_EULER  # Runge-Kutta takes four times as long
    spec.option.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_CONTACT | mujoco.mjtDisableBit.mjDSBL_CONSTRAINT)
    # a body without a joint costs MJX as much as another: all are fused but the last, the hand; a sensor keeps it
    spec.compiler.fusestatic = True
    hand = model.body(model.nbody - 1).name
    kinds = dict(type=mujoco.mjtSensor.mjSENS_FRAMEPOS, objtype=mujoco.mjtObj.mjOBJ_XBODY)
    sensor = spec.add_sensor(name="hand", objname=hand, **kinds)
    spec.compile()
    spec.delete(sensor)
    spec.compiler.fusestatic = False
    return spec.to_xml()


def describe(model, clips, mocap_hz, substeps):
    """The configuration of a track-mjx run for this arm: rewards that fall to 1 / e at 0.2 rad a joint, or at a
    tenth of the hand's distance from the base; the pose may be 0.7 rad a joint off."""
    moving = [model.body(i).name for i in range(1, model.nbody) if model.body_weldid[i] == i]
    end = model.body(model.nbody - 1).name
    reach = np.linalg.norm(positions(model, clips.qpos.reshape(-1, model.nq))[:, -1], axis=-1).max()
    return dict(
        env_config=dict(
            env_name="arm",
            task_name="imitation",
            env_args=dict(
                solver="cg",
                iterations=4,
                ls_iterations=4,
                physics_steps_per_control_step=substeps,
                reset_noise_scale=1e-3,
                mj_model_timestep=1 / mocap_hz / substeps,
                mocap_hz=mocap_hz,
            ),
            reward_weights=dict(
                joint_reward_weight=1.0,
                joint_reward_exp_scale=25.0 / model.nq,
                endeff_reward_weight=1.0,
                endeff_reward_exp_scale=float(1 / (0.1 * reach) ** 2),
                ctrl_cost_weight=0.02,
                ctrl_diff_cost_weight=0.02,
                energy_cost_weight=0.01,
                bad_pose_dist=0.5 * model.nq,
                var_window_size=2,
                var_coeff=0.0,
                jerk_coeff=0.0,
            ),
        ),
        reference_config=dict(clip_length=int(clips.length.max()), random_init_range=0, traj_length=AHEAD),
        walker_config=dict(
            torque_actuators=False,
            rescale_factor=1.0,
            joint_names=[model.joint(i).name for i in range(model.njnt)],
            body_names=moving,
            end_eff_names=[end],
        ),
    )


# --- the expert controller


def computed_torque(model, error, qvel, qpos, frame_time):
    """Motor commands (N A) in [-1, 1]. error (N AHEAD nq): the joints ahead minus qpos (N nq); qvel (N nv)."""
    t = frame_time * np.arange(1, AHEAD + 1)
    fit = np.linalg.pinv(
        np.stack([np.ones(AHEAD), t, t**2 / 2], 1)
    )  # least squares of position, velocity, acceleration
    position, velocity, acceleration = np.einsum("kt,ntj->knj", fit, error)
    stiff = 1 / (2 * frame_time)  # 1 / (4 * frame_time) earns 0.9 of this one's reward on the mouse
    wanted = acceleration + 2 * stiff * (velocity - qvel) + stiff**2 * position
    data, torque = mujoco.MjData(model), np.zeros_like(wanted)
    for i in range(len(qpos)):
        data.qpos[:], data.qvel[:], data.qacc[:] = qpos[i], qvel[i], wanted[i]
        mujoco.mj_inverse(model, data)
        torque[i] = data.qfrc_inverse
    joint = model.actuator_trnid[:, 0]
    return np.clip(torque[:, joint] / (model.actuator_gear[:, 0] * model.actuator_gainprm[:, 0]), -1, 1)


def visit(env, clips, count, rng):
    """Observations (count N) of states that the controller visits under noise, and its commands (count A) there.

    Episodes begin as the task's do, at rest on a frame of a clip, a quarter of them on the first. What the joints are
    driven with is the command plus noise of a scale of its own per episode, so that the clone learns to come back.
    """
    model, joint, episodes = env.model, env.model.actuator_trnid[:, 0], count // VISIT_STEPS
    clip = rng.integers(len(clips.ids), size=episodes)
    last = clips.length[clip] - AHEAD - 1
    start = (rng.uniform(size=episodes) * np.maximum(last - VISIT_STEPS, 1)).astype(int)
    start[::4] = 0
    noise, rows = 10 ** rng.uniform(-3, -0.3, (episodes, 1)), []
    datas = [mujoco.MjData(model) for _ in range(episodes)]
    for data, c, t in zip(datas, clip, start, strict=True):
        data.qpos = clips.qpos[c, t] + 1e-3 * rng.normal(size=model.nq)
    for t in range(VISIT_STEPS):
        frame = np.minimum(start + t, last)
        qpos, qvel = (np.stack([getattr(data, name) for data in datas]) for name in ("qpos", "qvel"))
        ahead = clips.qpos[clip[:, None], frame[:, None] + np.arange(1, AHEAD + 1)] - qpos[:, None]
        action = computed_torque(model, ahead, qvel, qpos, 1 / env.rate)
        rows.append((qpos, qvel, clip, frame, action))
        for data, ctrl in zip(datas, np.clip(action + noise * rng.normal(size=action.shape), -1, 1), strict=True):
            data.ctrl = ctrl
            mujoco.mj_step(model, data, env.substeps)
    qpos, qvel, clip, frame, action = (np.concatenate(column) for column in zip(*rows, strict=True))
    force = np.zeros_like(qvel)  # of another state: the clone must not copy the last command
    scale = model.actuator_gear[:, 0] * model.actuator_gainprm[:, 0]
    force[:, joint] = action[rng.permutation(len(action))] * scale

    @jax.jit
    def observe(reference, qpos, qvel, force, clip, frame):
        state = jax.vmap(env.state_at)(qpos, qvel, clip, frame).replace(qfrc_actuator=force)
        return jax.vmap(env.with_reference(reference).get_obs)(state)

    obs = observe(env.reference, *(x.astype(np.float32) for x in (qpos, qvel, force)), clip, frame)
    return np.asarray(obs), action.astype(np.float32)


# --- cloning


def clone(obs, action, size, steps, seed, batch_size=512):
    """Fit an intention network to (obs, action); size: numbers of the reference. Returns params, mean, std, its MSE."""
    mean, std = obs.mean(0), obs.std(0)
    std = np.where(std < 1e-6, 1, std).astype(np.float32)
    encoder = Encoder(WIDTHS, gaussian_heads(LATENT))
    decoder = Decoder(WIDTHS, 2 * action.shape[1])
    keys = jax.random.split(jax.random.key(seed), 3)
    params = dict(
        encoder=encoder.init(keys[0], jnp.zeros(size))["params"],
        decoder=decoder.init(keys[1], jnp.zeros(LATENT + obs.shape[1] - size))["params"],
    )
    opt = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    x, y = jnp.asarray((obs - mean) / std), jnp.asarray(action)

    def loss(params, index):
        return jnp.square(intention(params, x[index], size)[0] - y[index]).mean()

    @jax.jit
    def train(params):
        def step(carry, key):
            params, moments = carry
            value, grads = jax.value_and_grad(loss)(params, jax.random.randint(key, (batch_size,), 0, len(x)))
            change, moments = opt.update(grads, moments, params)
            return (optax.apply_updates(params, change), moments), value

        return jax.lax.scan(step, (params, opt.init(params)), jax.random.split(keys[2], steps))

    (params, _), losses = train(params)
    params = jax.tree.map(np.array, params)
    last = params["decoder"][f"hidden_{len(WIDTHS)}"]
    # the scale half of the output: nearly deterministic
    last["kernel"][:, action.shape[1] :], last["bias"][action.shape[1] :] = 0.0, QUIET
    return params, mean, std, float(losses[-200:].mean())


def make(walker, data, out, mocap_hz, substeps, clip_frames=0, steps=4000, seed=0):
    """Write OUT/walker.xml and OUT/teacher; returns the cloning's mean squared error."""
    find_devices()
    text, out = unit_motors(walker), Path(out)
    if (out / "walker.xml").resolve() == Path(walker).resolve():
        raise DataError(f"--out {out}: its walker.xml is --walker itself; give another folder")
    there = out / "walker.xml"
    if there.exists() and there.read_text() != text and not (out / "teacher").exists():
        raise DataError(f"--out {out}: holds a walker.xml of another origin; give another folder")
    model = mujoco.MjModel.from_xml_string(text)
    clips = read_clips(data, model, mocap_hz, 0.0, clip_frames=clip_frames)
    common.make_folder(out)
    with common.atomic(out / "walker.xml") as path:
        path.write_text(text)
    config = describe(model, clips, mocap_hz, substeps)
    env = Imitation(config, build_model(out / "walker.xml", config), clips)
    obs, action = visit(env, clips, 40_000, np.random.default_rng(seed))
    params, mean, std, error = clone(obs, action, env.reference_size, steps, seed)
    config["network_config"] = dict(
        arch_name="intention",
        encoder_layer_sizes=list(WIDTHS),
        decoder_layer_sizes=list(WIDTHS),
        intention_size=LATENT,
        observation_size=env.obs_size,
        reference_obs_size=env.reference_size,
        proprioceptive_obs_size=env.obs_size - env.reference_size,
        action_size=model.nu,
        normalize_observations=True,
    )
    write_teacher(out / "teacher", 0, config, mean, std, params)
    return error


def main(argv=None):
    args = parse(argv)
    error = make(
        args.walker, args.data, args.out, args.mocap_hz, args.substeps, args.clip_frames, args.steps, args.seed
    )
    print(f"{args.out}/teacher: the clone's mean squared error to the expert controller is {error:.2g}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
