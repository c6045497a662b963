"""The walker: an MJCF file with the edits that a teacher's configuration asks for, and its kinematics."""

from pathlib import Path

import mujoco
import numpy as np

from common import DataError

SOLVERS = dict(cg=mujoco.mjtSolver.mjSOL_CG, newton=mujoco.mjtSolver.mjSOL_NEWTON)

TIMING = ("mj_model_timestep", "iterations", "ls_iterations", "mocap_hz", "physics_steps_per_control_step")
NUMBERS = (*(f"env_config.env_args.{key}" for key in TIMING), "reference_config.traj_length")  # above 0
TABLES = {"env_config.env_args.reset_noise_scale": (int, float), "env_config.reward_weights": dict}
TABLES |= {f"walker_config.{key}": (list, tuple) for key in ("joint_names", "body_names", "end_eff_names")}
TOLERANCE = 5e-3  # of the walker's size: kinematics of a right file reproduce its xpos to 1e-6


def entry(config, path):
    """config["a"]["b"] for "a.b"; a DataError names what a checkpoint's configuration lacks."""
    node = config
    for key in path.split("."):
        if not isinstance(node, dict) or key not in node:
            vnl = "reward_terms" in str(config.get("env_config"))
            hint = ": its task is one of vnl-playground's, which are not rebuilt here" if vnl else ""
            raise DataError(f"the teacher's configuration has no `{path}`{hint}")
        node = node[key]
    return node


def build_model(walker, config):
    """MjModel of an MJCF file with the edits of the checkpoint's configuration: actuators, scale, time step, solver."""
    for path, kinds in (dict.fromkeys(NUMBERS, (int, float)) | TABLES).items():
        value = entry(config, path)
        if not isinstance(value, kinds) or (path in NUMBERS and not 0 < value < np.inf):
            raise DataError(f"the teacher's configuration has `{path}` {value!r}")
    edit, timing = config["walker_config"], config["env_config"]["env_args"]
    if not Path(walker).is_file():
        raise DataError(f"--walker {walker}: no such file")
    try:
        spec = mujoco.MjSpec.from_file(str(walker))
        if edit.get("torque_actuators"):
            for actuator in spec.actuators:
                if actuator.forcerange[1] > actuator.forcerange[0]:
                    actuator.gainprm[0] = actuator.forcerange[1]
                actuator.biastype = mujoco.mjtBias.mjBIAS_NONE
                actuator.biasprm[:] = 0
        scale = edit.get("rescale_factor", 1.0)
        if scale != 1.0:
            rescale(spec, scale)
        model = spec.compile()
    except (ValueError, TypeError) as error:
        raise DataError(f"--walker {walker}: {' '.join(str(error).split())[:200]}") from None
    model.opt.timestep = float(timing["mj_model_timestep"])
    solver = str(timing.get("solver", "cg")).lower()
    if solver not in SOLVERS:
        raise DataError(f"the teacher's configuration has solver {solver!r}; known are {', '.join(SOLVERS)}")
    model.opt.solver = SOLVERS[solver]
    model.opt.iterations, model.opt.ls_iterations = int(timing["iterations"]), int(timing["ls_iterations"])
    model.opt.jacobian = mujoco.mjtJacobian.mjJAC_DENSE
    return model


def rescale(spec, scale):
    """Bodies and geoms by `scale`, actuator gears by its square (cross-section); joint anchors and sites stay."""
    for actuator in spec.actuators:
        actuator.gear = actuator.gear * scale**2
    top = spec.body("walker")
    if top is None:
        raise DataError("rescale_factor needs a body called `walker`")
    bodies = [body for body in top.find_all("body")]
    for body in bodies:
        body.pos = body.pos * scale
        for geom in body.geoms:
            geom.fromto, geom.size, geom.pos = geom.fromto * scale, geom.size * scale, geom.pos * scale


# --- kinematics


def name_of_qpos(model, index):
    joint = np.searchsorted(model.jnt_qposadr, index, side="right") - 1
    return model.joint(joint).name


def body_names(model):
    return [model.body(i).name for i in range(model.nbody)]


def positions(model, qpos):
    """World positions of all bodies for qpos (T nq): (T nb 3)."""
    data, out = mujoco.MjData(model), np.zeros((len(qpos), model.nbody, 3), np.float32)
    for t, row in enumerate(qpos):
        data.qpos[:] = row
        mujoco.mj_kinematics(model, data)
        out[t] = data.xpos
    return out


def velocities(model, qpos, rate):
    """Forward differences of qpos (T nq) at `rate` Hz in MuJoCo's qvel convention, (T nv); the last repeats."""
    qvel, rows = np.zeros((len(qpos), model.nv)), qpos.astype(np.float64)
    for t in range(len(qpos) - 1):
        mujoco.mj_differentiatePos(model, qvel[t], 1 / rate, rows[t], rows[t + 1])
    qvel[-1] = qvel[-2] if len(qpos) > 1 else 0
    return qvel


def check_clip(model, clip, bodies, joints, where):
    """DataError unless the walker's kinematics put its bodies where the clip has them."""
    qpos, own = clip["qpos"], [name_of_qpos(model, i) for i in range(model.nq)]
    if qpos.ndim != 2 or qpos.shape[1] != model.nq or qpos.dtype.kind not in "fiu":
        shape = f"{qpos.dtype} {qpos.shape}, the walker (frames, {model.nq})"
        raise DataError(f"{where}: qpos has shape {shape}: another walker?")
    if "xpos" in clip and (clip["xpos"].shape[2:] != (3,) or len(bodies) not in (0, clip["xpos"].shape[1])):
        raise DataError(f"{where}: xpos has shape {clip['xpos'].shape}, and names_xpos names {len(bodies)} bodies")
    for key in ("qpos", "xpos"):
        if key in clip and not np.isfinite(clip[key]).all():
            frame = np.argwhere(~np.isfinite(clip[key]))[0][0]
            raise DataError(f"{where}: {key} holds NaN or infinity at frame {frame}")
    other = [i for i in range(model.nq) if joints[i] != own[i]] if len(joints) == model.nq else []
    named = f"names_qpos has {joints[other[0]]!r} at {other[0]}, the walker {own[other[0]]!r}" if other else ""
    for joint in range(model.njnt):
        at = model.jnt_qposadr[joint] + 3 * (model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_FREE)
        if model.jnt_type[joint] in (mujoco.mjtJoint.mjJNT_FREE, mujoco.mjtJoint.mjJNT_BALL):
            if np.abs(np.linalg.norm(qpos[:, at : at + 4], axis=-1) - 1).max() > 0.01:
                raise DataError(f"{where}: qpos {at} to {at + 3} is no unit quaternion; {named or 'another walker?'}")
    if "xpos" not in clip:
        if named:
            raise DataError(f"{where}: {named}, and there is no xpos to check the order with")
        return
    frames = np.unique(np.linspace(0, len(qpos) - 1, 20).astype(int))
    count, known = clip["xpos"].shape[1], {name: i for i, name in enumerate(body_names(model))}
    order = [known.get(name) for name in bodies] if bodies else range(model.nbody - count, model.nbody)
    pairs = [(at, body) for at, body in enumerate(order) if body is not None and body > 0]
    if not pairs or (count > model.nbody and not bodies):
        raise DataError(f"{where}: its {count} bodies are not the walker's {model.nbody}: another walker?")
    at, body = np.array(pairs).T
    here = positions(model, qpos[frames])
    apart = np.linalg.norm(here[:, body] - clip["xpos"][frames][:, at], axis=-1).max(0)
    size = np.linalg.norm(here[:, 1:] - here[:, 1:].mean(1, keepdims=True), axis=-1).max()
    if apart.max() > TOLERANCE * size:
        name, far = body_names(model)[body[apart.argmax()]], apart.max()
        kinds = "another walker, scale or unit, degrees, another order of joints, or quaternions with w last"
        raise DataError(
            f"{where}: the walker's kinematics put body {name!r} {far:.2g} away from its xpos (the walker measures "
            f"{2 * size:.2g}): {named or kinds}?"
        )
