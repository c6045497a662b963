"""The imitation task of track-mjx in pure MJX, rebuilt from a teacher's configuration, for any walker.

A walker with a free root (rodent) is observed and rewarded as in track-mjx's MultiClipTracking, one with a fixed
base (an arm) as in its reaching task. What differs on purpose: frames are counted in whole numbers (float32 time
drops one now and then), an episode that ends starts anew on another clip and frame, NaN physics is counted, and the
cost of a changed action is charged (track-mjx's step overwrites the previous action first, so that it is always 0).

Letters: E environments, T frames ahead, J joints, B tracked bodies, A actions.
"""

import contextlib
import io
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from flax import struct
from walker import build_model, entry, has

with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    from mujoco import mjx  # it prints that the optional warp is missing

BASES = ("torso", "ground", "world")  # the body whose frame the end effectors are seen in
LIMITS = ("bad_pose_dist", "too_far_dist", "bad_quat_dist", "healthy_z_range", "penalty_pos_distance_scale")
ENDS = ("bad_pose", "too_far", "bad_quat", "fall", "nan")  # terms that end an episode


class View(NamedTuple):
    """What observation and reward read of the physics; from MJX or from C MuJoCo."""

    qpos: Any
    qvel: Any
    force: Any  # qfrc_actuator
    xpos: Any
    xmat: Any  # nbody 3 3

    @classmethod
    def of(cls, data):
        return cls(data.qpos, data.qvel, data.qfrc_actuator, data.xpos, data.xmat.reshape(-1, 3, 3))


@struct.dataclass
class State:
    """One environment: what the physics goes on from, and where in which clip it is.

    age counts control steps since `start`, history (window A) holds the last actions, oldest first.
    """

    qpos: Any
    qvel: Any
    act: Any
    warmstart: Any
    clip: Any
    start: Any
    age: Any
    history: Any


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
    """The task for one walker and its clips. `reference` (a pytree of arrays, C T ...) is passed to every function, so
    that it lives on the devices once and not inside the compiled programs.

    body_shift: track-mjx of 2025 looks up a body's reference by its id in a model that has a floor body which the clips
    lack, so that it tracks the next body; a teacher trained so needs 1. "auto" is 1 where the root is free and the
    walker has just one body more than the clips.
    """

    def __init__(self, config, walker, clips, model=None, body_shift="auto"):
        timing, names = config["env_config"]["env_args"], config["walker_config"]
        self.model = build_model(walker, config) if model is None else model
        self.substeps = int(timing["physics_steps_per_control_step"])
        self.rate = 1 / (self.substeps * self.model.opt.timestep)  # control steps per second
        ratio = Fraction(float(timing["mocap_hz"]) / self.rate).limit_denominator(1000)
        self.frames, self.per = ratio.numerator, ratio.denominator  # `frames` mocap frames in `per` control steps
        self.ahead = int(config["reference_config"]["traj_length"])
        self.noise = float(timing["reset_noise_scale"])
        self.weights = config["env_config"]["reward_weights"]
        self.window = int(self.weights.get("var_window_size", 50)) if "var_coeff" in self.weights else 1
        self.free = self.model.njnt > 0 and self.model.jnt_type[0] == mujoco.mjtJoint.mjJNT_FREE
        for key in LIMITS if self.free else LIMITS[:1]:
            entry(config, f"env_config.reward_weights.{key}")
        self.q0, self.v0 = (7, 6) if self.free else (0, 0)

        def ids(kind, wanted):
            try:
                return np.array([getattr(self.model, kind)(name).id for name in wanted], int)
            except KeyError:
                missing = next(name for name in wanted if not has(self.model, kind, name))
                raise ValueError(
                    f"--walker {walker}: has no {kind} {missing!r} of the checkpoint's walker_config"
                ) from None

        self.joints = ids("joint", names["joint_names"]) - int(self.free)
        body, ends = ids("body", names["body_names"]), ids("body", names["end_eff_names"])
        self.base = next(self.model.body(name).id for name in BASES if has(self.model, "body", name))
        known = len(clips.bodies) or clips.xpos.shape[2]
        short = self.model.nbody - known
        shift = int(short == 1 and self.free) if body_shift == "auto" else int(body_shift)
        if shift:
            # both sides one body further: the reference by the model's id, the model by the next one
            self.body, self.end = (np.minimum(i + 1, self.model.nbody - 1) for i in (body, ends))
            of_body, of_end = (np.minimum(i, known - 1) for i in (body, ends))
        else:
            self.body, self.end = body, ends
            order = clips.bodies or [self.model.body(i).name for i in range(short, self.model.nbody)]
            unknown = [n for n in (*names["body_names"], *names["end_eff_names"]) if n not in order]
            if unknown:
                raise ValueError(f"--data: the clips have no body {unknown[0]!r}, which the teacher tracks")
            of_body, of_end = ([order.index(n) for n in names[key]] for key in ("body_names", "end_eff_names"))
        self.shift, self.appendages = shift, ends
        self.reference = dict(
            qpos=clips.qpos, qvel=clips.qvel, body=clips.xpos[:, :, of_body], end=clips.xpos[:, :, of_end],
            length=clips.length.astype(np.int32),
        )  # fmt: skip
        short = [clips.ids[i] for i in np.flatnonzero(clips.length < self.ahead + 2)]
        if short:
            raise ValueError(f"--data: clip {short[0]} is shorter than the {self.ahead + 2} frames that a step needs")

        ages = -(-(clips.length.max() - self.ahead - 1) * self.per // self.frames)
        self.longest = int(ages)  # control steps of the longest episode

    def check(self, teacher):
        """Refuse a teacher of another walker: sizes of its observation and action."""
        for what, here, there in (
            ("actuators", self.model.nu, teacher.action_size),
            ("observation numbers that tell the reference", self.reference_size, teacher.reference_size),
            ("observation numbers", self.obs_size, len(teacher.mean)),
        ):
            if here != there:
                raise ValueError(
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

    def frame(self, start, age):
        """The reference frame after `age` control steps."""
        return start + age * self.frames // self.per

    def observe(self, reference, view, clip, frame):
        """(N,) observation: reference frames frame + 1 ... relative to the walker, then proprioception."""
        ahead = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x[clip], frame + 1, self.ahead),
            {key: reference[key] for key in ("qpos", "body")},
        )
        joints = (ahead["qpos"] - view.qpos)[:, self.q0 :][:, self.joints]
        seen = [joints]
        if self.free:
            # rotated by the root's quaternion, not its inverse: what the teachers were trained on
            quat = view.qpos[3:7]
            root, turn = rotate(ahead["qpos"][:, :3] - view.qpos[:3], quat), relative_quat(ahead["qpos"][:, 3:7], quat)
            seen = [root, turn, joints, rotate(ahead["body"] - view.xpos[self.body], quat)]
        place, frame_of_base = view.xpos[self.base], view.xmat[self.base]
        ends = (view.xpos[self.appendages] - place) @ frame_of_base
        own = [view.qpos[self.q0 :], view.qvel[self.v0 :], view.force]
        # track-mjx's reaching task ends with nine sensor values, all zero
        own += [place[2:3], frame_of_base[2], ends] if self.free else [ends, jnp.zeros(9)]
        return jnp.concatenate([x.ravel() for x in [*seen, *own]])

    def reward(self, reference, view, clip, frame, history):
        """{term: weighted value}, distances and end-of-episode flags; history (window, A) of actions, the last is now.

        Costs are negative; the reward is the `total` of these terms.
        """
        w, now = self.weights, {key: reference[key][clip, frame] for key in ("qpos", "qvel", "body", "end")}
        action, before = history[-1], history[-2] if self.window > 1 else history[-1]

        def near(name, distance):
            return w.get(f"{name}_reward_weight", 0.0) * jnp.exp(-w.get(f"{name}_reward_exp_scale", 1.0) * distance)

        joint = jnp.square(view.qpos - now["qpos"])[self.q0 :].sum()
        body = jnp.square(view.xpos[self.body] - now["body"]).sum()
        end = jnp.square(view.xpos[self.end] - now["end"]).sum()
        speed, force = view.qvel[self.v0 :], view.force[self.v0 :]
        energy = jnp.minimum(jnp.abs(speed * force).sum(), 50.0)
        out = dict(
            joint_reward=near("joint", joint),
            bodypos_reward=near("bodypos", body),
            endeff_reward=near("endeff", end),
            ctrl_cost=-w.get("ctrl_cost_weight", 0.0) * jnp.square(action).sum(),
            ctrl_diff_cost=-w.get("ctrl_diff_cost_weight", 0.0) * jnp.square(action - before).sum(),
            energy_cost=-w.get("energy_cost_weight", 0.0) * energy,
            joint_distance=joint,
            bad_pose=(joint > w["bad_pose_dist"]).astype(jnp.float32),
        )
        if self.window > 1:
            jerk = jnp.square(history[2:] - 2 * history[1:-1] + history[:-2]).sum()
            out |= dict(var_cost=-w["var_coeff"] * history.var(0).sum(), jerk_cost=-w["jerk_coeff"] * jerk)
        if self.free:
            d = view.qpos[:3] - now["qpos"][:3]
            far = jnp.square(d * jnp.array(w["penalty_pos_distance_scale"])).sum()
            turn = bounded_angle(view.qpos[3:7], now["qpos"][3:7]) ** 2
            spin = jnp.square(view.qvel[3:6] - now["qvel"][3:6]).sum()
            low, high = w["healthy_z_range"]
            height = view.xpos[self.base, 2]
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

    def errors(self, reference, view, clip, frame):
        """Tracking errors: root mean square over the joints (rad), mean distance over tracked bodies and ends."""
        now = {key: reference[key][clip, frame] for key in ("qpos", "body", "end")}
        here = jnp.concatenate([view.xpos[self.body], view.xpos[self.end]])
        apart = jnp.linalg.norm(here - jnp.concatenate([now["body"], now["end"]]), axis=-1)
        return jnp.sqrt(jnp.square(view.qpos - now["qpos"])[self.q0 :].mean()), apart.mean()

    @staticmethod
    def total(terms):
        """The reward: sum of the terms named ..._reward and ..._cost."""
        return sum(value for name, value in terms.items() if name.endswith(("_reward", "_cost")))

    # --- dynamics

    @cached_property
    def put(self):
        """The model and blank data as MJX has them."""
        with jax.ensure_compile_time_eval():  # the first to ask may be a function that is being traced
            try:
                place = dict(impl="jax", device=jax.local_devices()[0])  # its own default may be another process's
                return mjx.put_model(self.model, **place), mjx.make_data(self.model, **place)
            except NotImplementedError as error:
                raise ValueError(f"--walker: MJX cannot simulate it ({error})") from None

    def begin(self, reference, clip, start, key):
        """(State, View) at frame `start` of `clip`, as in track-mjx: uniform noise on qpos, and for qvel alone."""
        model, blank = self.put
        spread = dict(minval=-self.noise, maxval=self.noise)
        qpos = reference["qpos"][clip, start] + jax.random.uniform(key, (self.model.nq,), **spread)
        qvel = jax.random.uniform(key, (self.model.nv,), **spread)
        data = mjx.kinematics(model, blank.replace(qpos=qpos, qvel=qvel))
        history = jnp.zeros((self.window, self.model.nu))
        state = State(qpos, qvel, blank.act, blank.qacc_warmstart, clip, start, jnp.zeros_like(start), history)
        return state, View.of(data)

    def spot(self, reference, train, key):
        """A random clip of `train` (indices) and a random frame in its first half."""
        one, two = jax.random.split(key)
        clip = train[jax.random.randint(one, (), 0, len(train))]
        last = reference["length"][clip] - self.ahead - 1
        return clip, jax.random.randint(two, (), 0, jnp.maximum(last // 2, 1))

    def reset(self, reference, train, key):
        """`begin` at a random spot."""
        return self.begin(reference, *self.spot(reference, train, key), key)

    def act(self, reference, state, action):
        """One control step: (State, View, terms, failed, over). failed: terminated or NaN (terms["nan"] is 1 then, the
        others 0); over: the clip has no further frames."""
        model, blank = self.put
        data = blank.replace(
            qpos=state.qpos, qvel=state.qvel, act=state.act, qacc_warmstart=state.warmstart, ctrl=action
        )
        data = jax.lax.fori_loop(0, self.substeps, lambda _, d: mjx.step(model, d), data)
        history, age = jnp.concatenate([state.history[1:], action[None]]), state.age + 1
        state = state.replace(
            qpos=data.qpos, qvel=data.qvel, act=data.act, warmstart=data.qacc_warmstart, age=age, history=history
        )
        view, frame = View.of(data), self.frame(state.start, age)
        terms = self.reward(reference, view, state.clip, frame, history)
        sound = jnp.all(jnp.array([jnp.isfinite(x).all() for x in view]))
        terms = {name: jnp.where(sound, value, 0.0) for name, value in terms.items()}
        terms["nan"] = 1.0 - sound
        failed = sum(terms.get(name, 0.0) for name in ENDS) > 0
        over = frame + self.ahead + 1 >= reference["length"][state.clip]
        return state, view, terms, failed, over

    def look(self, reference, state, view):
        """The observation (N,) of a State; NaN physics gives zeros."""
        obs = self.observe(reference, view, state.clip, self.frame(state.start, state.age))
        return jnp.nan_to_num(obs, posinf=0.0, neginf=0.0)
