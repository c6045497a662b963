"""The imitation task of track-mjx, rebuilt from a teacher's configuration, for any walker, in MJX or in C MuJoCo.

A walker with a free root (rodent) is observed and rewarded as in track-mjx's MultiClipTracking, one with a fixed
base (an arm) as in its reaching task. What differs on purpose: frames are counted in whole numbers (float32 time
drops one now and then), an episode that ends starts anew on another clip and frame, NaN physics is counted, and the
cost of a changed action is charged (track-mjx's step overwrites the previous action first, so that it is always 0).

All methods take one environment; callers vmap them. A compiled program takes the clips as an argument and begins with
`env = env.with_reference(reference)`, so that they live on the devices once and not inside the program.

Letters: E environments, T frames ahead, J joints, B tracked bodies, A actions.
"""

import contextlib
import copy
import io
import os
from fractions import Fraction
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from flax import struct
from teacher.walker import body_names, entry

from common import DataError

with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    from mujoco import mjx  # it prints that the optional warp is missing

# XLA's batched LAPACK waits, on a thread of XLA's pool, for others of that pool. With one thread for each of two cores
# the rodent's solver waited for itself for ever; eight are enough. Read when JAX starts its CPU backend.
os.environ.setdefault("PJRT_NPROC", str(max(8, os.cpu_count() or 1)))
mujoco.set_mju_user_warning(lambda text: None)  # of C MuJoCo; it would write a file here. We count NaN ourselves
ROOTS = ("torso", "thorax", "reference_base", "torso13_body")  # what track-mjx's walkers call their root body
LIMITS = ("bad_pose_dist", "too_far_dist", "bad_quat_dist", "healthy_z_range", "penalty_pos_distance_scale")
TERMINATIONS = ("bad_pose", "too_far", "bad_quat", "fall", "nan")  # terms that end an episode


@struct.dataclass
class State:
    """One environment: its physics, and where in which clip it is. MJX leaves xpos and xmat one physics step behind
    qpos (it integrates last), as track-mjx does."""

    qpos: Any = None
    qvel: Any = None
    qfrc_actuator: Any = None
    xpos: Any = None  # nbody 3
    xmat: Any = None  # nbody 3 3
    act: Any = None
    warmstart: Any = None
    clip: Any = None
    start: Any = None  # frame of the clip at which the episode began
    age: Any = None  # control steps since then
    actions: Any = None  # window A, the last actions, oldest first

    def with_physics(self, data):
        """The same environment with the physics of an MJX (or C MuJoCo) data."""
        return self.replace(
            qpos=data.qpos, qvel=data.qvel, qfrc_actuator=data.qfrc_actuator, xpos=data.xpos,
            xmat=data.xmat.reshape(-1, 3, 3), act=data.act, warmstart=data.qacc_warmstart,
        )  # fmt: skip


# --- rotations


def bounded_angle(a, b):
    """Half of the angle between two quaternions' axes, in [0, pi / 2]; dm_control's bounded distance."""
    a, b = (q / jnp.linalg.norm(q) for q in (a, b))
    return 0.5 * jnp.arccos(jnp.minimum(1.0, 2 * jnp.dot(a, b) ** 2 - 1))


def rotate(vectors, quat):
    """Vectors (... 3) rotated by a quaternion (w x y z)."""
    w, u = quat[0], quat[1:]
    return 2 * (vectors @ u)[..., None] * u + (w * w - u @ u) * vectors + 2 * w * jnp.cross(u, vectors)


def relative_quat(reference, quat):
    """quat * conjugate(reference), for reference (T 4)."""
    a, b = quat, reference * jnp.array([1.0, -1, -1, -1])
    w = a[0] * b[:, 0] - b[:, 1:] @ a[1:]
    return jnp.concatenate([w[:, None], a[0] * b[:, 1:] + b[:, :1] * a[1:] + jnp.cross(a[1:], b[:, 1:])], -1)


class Imitation:
    """The task for one walker and its clips.

    body_shift: track-mjx of 2025 looks up a body's reference by its id in a model that has a floor body which the clips
    lack, so that it tracks the next body; a teacher trained so needs 1. "auto" is 1 where the root is free and the
    walker has just one body more than the clips.
    physics: "mjx" is compiled for the device, which takes minutes for a walker with contacts; "mujoco" calls C MuJoCo,
    environment by environment on one core, for a computer without a GPU.
    """

    def __init__(self, config, model, clips, body_shift="auto", physics="mjx"):
        timing, names = config["env_config"]["env_args"], config["walker_config"]
        self.model, self.physics = model, physics
        if physics == "mujoco":  # NaN stays NaN and is counted
            self.model = copy.copy(model)
            self.model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
        self.substeps = int(timing["physics_steps_per_control_step"])
        self.rate = 1 / (self.substeps * self.model.opt.timestep)  # control steps per second
        # mocap frames per control step, as a fraction
        self.frames_per_step = Fraction(float(timing["mocap_hz"]) / self.rate).limit_denominator(1000)
        self.ahead = int(config["reference_config"]["traj_length"])
        self.noise = float(timing["reset_noise_scale"])
        self.weights = config["env_config"]["reward_weights"]
        window = self.weights.get("var_window_size", 50) if "var_coeff" in self.weights else 2
        self.window = max(2, int(window))
        self.free = self.model.njnt > 0 and self.model.jnt_type[0] == mujoco.mjtJoint.mjJNT_FREE
        for key in LIMITS if self.free else LIMITS[:1]:
            entry(config, f"env_config.reward_weights.{key}")
        self.q0, self.v0 = (7, 6) if self.free else (0, 0)

        self.joints = self.ids("joint", names["joint_names"]) - int(self.free)
        self.root = self.root_body(names.get("torso_name"))
        of_body, of_end = self.match_bodies(names, clips, body_shift)
        self.reference = dict(
            qpos=clips.qpos, qvel=clips.qvel, body=clips.xpos[:, :, of_body], end=clips.xpos[:, :, of_end],
            length=clips.length.astype(np.int32),
        )  # fmt: skip
        short = [clips.ids[i] for i in np.flatnonzero(clips.length < self.ahead + 2)]
        if short:
            raise DataError(f"--data: clip {short[0]} is shorter than the {self.ahead + 2} frames that a step needs")
        last = int(clips.length.max()) - self.ahead - 1
        self.longest = -(-last * self.frames_per_step.denominator // self.frames_per_step.numerator)  # control steps

    def match_bodies(self, names, clips, body_shift):
        """Sets the tracked bodies (`body`, `end`, `appendages`); returns where these two are in clips.xpos."""
        body, ends = (self.ids("body", names[key]) for key in ("body_names", "end_eff_names"))
        known = len(clips.bodies) or clips.xpos.shape[2]
        extra = self.model.nbody - known
        self.appendages = ends
        floor = extra == 1 and self.free and (not clips.bodies or "world" in clips.bodies)  # else the world is left out
        self.shift = int(floor) if body_shift == "auto" else int(body_shift)
        if self.shift:
            # both sides one body further: the reference by the model's id, the model by the next one
            self.body, self.end = (np.minimum(i + 1, self.model.nbody - 1) for i in (body, ends))
            return [np.minimum(i, known - 1) for i in (body, ends)]
        self.body, self.end = body, ends
        order = clips.bodies or [self.model.body(i).name for i in range(extra, self.model.nbody)]
        unknown = [n for n in (*names["body_names"], *names["end_eff_names"]) if n not in order]
        if unknown:
            raise DataError(f"--data: the clips have no body {unknown[0]!r}, which the teacher tracks")
        return [[order.index(n) for n in names[key]] for key in ("body_names", "end_eff_names")]

    def with_reference(self, reference):
        """The same task with these arrays, traced or on a device, in place of its own `reference`."""
        env = copy.copy(self)
        env.reference = reference
        if self.physics == "mjx":
            env.mjx = self.mjx
        return env

    def lookup(self, key, *index):
        """reference[key][index] for a clip, or a clip and a frame; indices may be traced."""
        return jnp.asarray(self.reference[key])[index]

    def ids(self, kind, names):
        count = self.model.njnt if kind == "joint" else self.model.nbody
        own = [getattr(self.model, kind)(i).name for i in range(count)]
        if missing := [name for name in names if name not in own]:
            raise DataError(f"--walker has no {kind} {missing[0]!r}, which the teacher's walker_config names")
        return np.array([own.index(name) for name in names], int)

    def root_body(self, name=None):
        """The body in whose frame the end effectors are seen and whose height counts: the one that the configuration or
        track-mjx names, else the body of the free joint; for a fixed base `ground`, else the world."""
        names = body_names(self.model)
        known = [n for n in ((name, *ROOTS) if self.free else (name, "torso", "ground")) if n in names]
        return names.index(known[0]) if known else int(self.model.jnt_bodyid[0]) if self.free else 0

    def check(self, teacher):
        """Refuse a teacher of another walker: sizes of its observation and action."""
        for what, here, there in (
            ("actuators", self.model.nu, teacher.action_size),
            ("observation numbers that tell the reference", self.reference_size, teacher.reference_size),
            ("observation numbers", self.obs_size, len(teacher.mean)),
        ):
            if here != there:
                raise DataError(
                    f"--walker has {here} {what}, but {teacher.path} has {there}: another walker's teacher?"
                )

    @property
    def reference_size(self):
        """R, numbers of the observation that tell the reference."""
        per_frame = len(self.joints) + self.free * (7 + 3 * len(self.body))
        return self.ahead * int(per_frame)

    @property
    def obs_size(self):
        own = self.model.nq - self.q0 + self.model.nv - self.v0 + self.model.nv + 3 * len(self.appendages)
        return self.reference_size + own + (4 if self.free else 9)

    # --- what is seen and rewarded

    def frame_index(self, state):
        """The clip's frame that belongs to a state."""
        return state.start + state.age * self.frames_per_step.numerator // self.frames_per_step.denominator

    def get_obs(self, state):
        """(N,) observation: the next T reference frames relative to the walker, then proprioception. NaN physics: 0."""
        at = self.frame_index(state) + 1
        qpos, body = (
            jax.lax.dynamic_slice_in_dim(self.lookup(key, state.clip), at, self.ahead) for key in ("qpos", "body")
        )
        joints = (qpos - state.qpos)[:, self.q0 :][:, self.joints]
        seen = [joints]
        if self.free:
            # rotated by the root's quaternion, not its inverse: what the teachers were trained on
            quat = state.qpos[3:7]
            position, turn = rotate(qpos[:, :3] - state.qpos[:3], quat), relative_quat(qpos[:, 3:7], quat)
            seen = [position, turn, joints, rotate(body - state.xpos[self.body], quat)]
        obs = jnp.concatenate([x.ravel() for x in seen] + [self.proprioception(state)])
        return jnp.nan_to_num(obs, posinf=0.0, neginf=0.0)

    def proprioception(self, state):
        """(P,) the walker's own joints, velocities, forces, root and end effectors."""
        position, axes = state.xpos[self.root], state.xmat[self.root]
        ends = (state.xpos[self.appendages] - position) @ axes
        own = [state.qpos[self.q0 :], state.qvel[self.v0 :], state.qfrc_actuator]
        # track-mjx's reaching task ends with nine sensor values, all zero
        own += [position[2:3], axes[2], ends.ravel()] if self.free else [ends.ravel(), jnp.zeros(9)]
        return jnp.concatenate(own)

    def blind_obs(self, state):
        """(N,) observation without a reference, its part is 0: for prior and decoder, which do not see it."""
        own = jnp.nan_to_num(self.proprioception(state), posinf=0.0, neginf=0.0)
        return jnp.concatenate([jnp.zeros(self.reference_size), own])

    def reward(self, state):
        """{term: weighted value}, distances and end-of-episode flags; costs are negative, `total` sums the reward."""
        w, frame = self.weights, self.frame_index(state)
        now = {key: self.lookup(key, state.clip, frame) for key in ("qpos", "qvel", "body", "end")}
        before, action = state.actions[-2:]
        jerk = jnp.square(state.actions[2:] - 2 * state.actions[1:-1] + state.actions[:-2]).sum()

        def near(name, distance):
            return w.get(f"{name}_reward_weight", 0.0) * jnp.exp(-w.get(f"{name}_reward_exp_scale", 1.0) * distance)

        joint = jnp.square(state.qpos - now["qpos"])[self.q0 :].sum()
        body = jnp.square(state.xpos[self.body] - now["body"]).sum()
        end = jnp.square(state.xpos[self.end] - now["end"]).sum()
        power = jnp.abs(state.qvel[self.v0 :] * state.qfrc_actuator[self.v0 :]).sum()
        out = dict(
            joint_reward=near("joint", joint),
            bodypos_reward=near("bodypos", body),
            endeff_reward=near("endeff", end),
            ctrl_cost=-w.get("ctrl_cost_weight", 0.0) * jnp.square(action).sum(),
            ctrl_diff_cost=-w.get("ctrl_diff_cost_weight", 0.0) * jnp.square(action - before).sum(),
            energy_cost=-w.get("energy_cost_weight", 0.0) * jnp.minimum(power, 50.0),
            var_cost=-w.get("var_coeff", 0.0) * state.actions.var(0).sum(),
            jerk_cost=-w.get("jerk_coeff", 0.0) * jerk,
            joint_distance=joint,
            bad_pose=(joint > w["bad_pose_dist"]).astype(jnp.float32),
        )
        if self.free:
            d = state.qpos[:3] - now["qpos"][:3]
            far = jnp.square(d * jnp.array(w["penalty_pos_distance_scale"])).sum()
            turn = bounded_angle(state.qpos[3:7], now["qpos"][3:7]) ** 2
            spin = jnp.square(state.qvel[3:6] - now["qvel"][3:6]).sum()
            low, high = w["healthy_z_range"]
            height = state.xpos[self.root, 2]
            out |= dict(
                pos_reward=near("pos", jnp.square(d).sum()),
                quat_reward=near("quat", turn),
                angvel_reward=near("angvel", spin),
                summed_pos_distance=far,
                quat_distance=turn,
                too_far=(far > w["too_far_dist"]).astype(jnp.float32),
                bad_quat=(turn > w["bad_quat_dist"]).astype(jnp.float32),
                fall=((height < low) | (height > high)).astype(jnp.float32),
            )
        return out

    @staticmethod
    def total(terms):
        """The reward: sum of the terms named ..._reward and ..._cost."""
        return sum(value for name, value in terms.items() if name.endswith(("_reward", "_cost")))

    def errors(self, state):
        """Tracking errors: root mean square over the joints (rad), mean distance over tracked bodies and ends."""
        frame = self.frame_index(state)
        now = {key: self.lookup(key, state.clip, frame) for key in ("qpos", "body", "end")}
        here = jnp.concatenate([state.xpos[self.body], state.xpos[self.end]])
        apart = jnp.linalg.norm(here - jnp.concatenate([now["body"], now["end"]]), axis=-1)
        return jnp.sqrt(jnp.square(state.qpos - now["qpos"])[self.q0 :].mean()), apart.mean()

    # --- dynamics

    @cached_property
    def mjx(self):
        """The model and blank data as MJX has them."""
        with jax.ensure_compile_time_eval():  # the first to ask may be a function that is being traced
            try:
                place = dict(impl="jax", device=jax.local_devices()[0])  # its own default may be another process's
                return mjx.put_model(self.model, **place), mjx.make_data(self.model, **place)
            except NotImplementedError as error:
                raise DataError(f"--walker: MJX cannot simulate it ({error})") from None

    def sample_start(self, train, key):
        """A random clip of `train` (indices) and a random frame in its first half."""
        keys = jax.random.split(key)
        clip = train[jax.random.randint(keys[0], (), 0, len(train))]
        last = self.lookup("length", clip) - self.ahead - 1
        return clip, jax.random.randint(keys[1], (), 0, jnp.maximum(last // 2, 1))

    def reset(self, clip, start, key):
        """State at frame `start` of `clip`, as in track-mjx: uniform noise on qpos, and for qvel noise alone."""
        bounds = dict(minval=-self.noise, maxval=self.noise)
        qpos = self.lookup("qpos", clip, start) + jax.random.uniform(key, (self.model.nq,), **bounds)
        qvel = jax.random.uniform(key, (self.model.nv,), **bounds)
        return self.state_at(qpos, qvel, clip, start)

    def state_at(self, qpos, qvel, clip, start):
        """State of a given posture, no action taken yet."""
        actions, zero = jnp.zeros((self.window, self.model.nu)), jnp.zeros(self.model.nv)
        state = State(
            qpos, qvel, None, None, None, jnp.zeros(self.model.na), zero, clip, start, jnp.zeros_like(start), actions
        )
        if self.physics == "mujoco":
            return self.on_host(state, actions[-1], 0)
        model, blank = self.mjx
        return state.with_physics(mjx.kinematics(model, blank.replace(qpos=qpos, qvel=qvel)))

    def simulate(self, state, action):
        """The state one control step later; `age` and `actions` follow."""
        actions = jnp.concatenate([state.actions[1:], action[None]])
        state = state.replace(age=state.age + 1, actions=actions)
        if self.physics == "mujoco":
            return self.on_host(state, action, self.substeps)
        model, blank = self.mjx
        data = blank.replace(
            qpos=state.qpos, qvel=state.qvel, act=state.act, qacc_warmstart=state.warmstart, ctrl=action
        )
        return state.with_physics(jax.lax.fori_loop(0, self.substeps, lambda _, d: mjx.step(model, d), data))

    def on_host(self, state, ctrl, steps):
        """The state after `steps` physics steps of C MuJoCo, with 0 after its kinematics alone."""
        m = self.model
        sizes = dict(qpos=(m.nq,), qvel=(m.nv,), qfrc_actuator=(m.nv,), xpos=(m.nbody, 3), xmat=(m.nbody, 3, 3))
        sizes |= dict(act=(m.na,), warmstart=(m.nv,))
        shapes = {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}
        inputs = state.qpos, state.qvel, state.act, state.warmstart, ctrl

        def run(*inputs):
            inputs = [np.asarray(x, np.float64) for x in inputs]
            out = {name: np.empty((*inputs[0].shape[:-1], *size), np.float32) for name, size in sizes.items()}
            data = mujoco.MjData(m)
            for i in np.ndindex(inputs[0].shape[:-1]):
                data.qpos, data.qvel, data.act, data.qacc_warmstart, data.ctrl = (x[i] for x in inputs)
                mujoco.mj_step(m, data, steps) if steps else mujoco.mj_kinematics(m, data)
                after = State().with_physics(data)
                with np.errstate(over="ignore"):  # physics that diverged: infinity is counted as NaN is
                    for name, array in out.items():
                        array[i] = getattr(after, name)
            return out

        return state.replace(**jax.pure_callback(run, shapes, *inputs, vmap_method="broadcast_all"))

    def step(self, state, action):
        """One control step: (State, terms, terminated, truncated). terminated: the pose is lost or physics is NaN
        (terms["nan"] is 1 then, the others 0); truncated: the clip has no further frames."""
        state = self.simulate(state, action)
        terms = self.reward(state)
        physics = (state.qpos, state.qvel, state.qfrc_actuator, state.xpos, state.xmat, *terms.values())
        finite = jnp.all(jnp.array([jnp.isfinite(x).all() for x in physics]))
        terms = {name: jnp.where(finite, value, 0.0) for name, value in terms.items()}
        terms["nan"] = 1.0 - finite
        terminated = sum(terms.get(name, 0.0) for name in TERMINATIONS) > 0
        truncated = self.frame_index(state) + self.ahead + 1 >= self.lookup("length", state.clip)
        return state, terms, terminated, truncated
