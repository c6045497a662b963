"""Meta-World's ten tasks of MT10 (Yu et al. 2019, arXiv 1910.10897) as camera pictures, instructions and experts.

Run:
  python vla/sim/metaworld.py --out runs/metaworld/videos --episodes 50                  # of each task
  python vla/sim/metaworld.py --out runs/metaworld/other --appearance other --seed 1     # another robot's videos
  python vla/sim/metaworld.py --out runs/metaworld/hard --distractors                    # other things move, too

Writes shards of whole clips (KEY.json, KEY.frames.npy, KEY.actions.npy, KEY.state.npy; with distractors KEY.mask.npy,
where the robot is) of a scripted expert with noise, so that mistakes and their corrections are seen. Every episode has
a new goal. Only successful episodes are kept.

Needs: pip install --no-deps metaworld; pip install gymnasium mujoco imageio; a GL library for headless rendering
(Debian: apt install libegl1 libgl1-mesa-dri).
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # vla/ and its parent take the place of vla/sim/
    sys.path[:1] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]
from shards import npy, write_shard
from tqdm import tqdm

import common
from sim.distractors import Distractors

TASKS = {
    "reach": "move the gripper to the red ball",
    "push": "push the puck to the green ball",
    "pick-place": "pick up the puck and bring it to the blue ball",
    "door-open": "open the door",
    "drawer-open": "open the drawer",
    "drawer-close": "close the drawer",
    "button-press-topdown": "press the button from above",
    "window-open": "open the window",
    "window-close": "close the window",
    "peg-insert-side": "put the peg into the hole",
}
FRAME_SKIP = 2  # simulator steps of 12.5 ms per action: 40 actions and pictures a second
LIMIT = 100  # actions; the experts need 23 to 57
# The expert is pushed off its way for 8 of every 24 actions, by noise of this standard deviation and this correlation
# from one action to the next. In between it corrects. Noise all the time would keep it from grasping and inserting.
NOISE, MEMORY, PERIOD, DISTURBED = 0.5, 0.7, 24, 8
FPS = 40
HIDDEN = ["controller_box", "pedestal_feet", "torso", "pedestal", "head", "screen", "RetainingWall"]
HIDDEN += ["right_arm_base_link", "right_l0", "right_l1", "right_l1_2", "right_l2"]  # outside the view: half the time
FINGERS = ("rightpad", "leftpad", "rightclaw", "leftclaw")
# camera: azimuth, elevation, distance; rgba of arm, fingers and table, None leaves Meta-World's own
APPEARANCES = {
    "robot": dict(camera=(130, -35, 0.95), arm=None, fingers=None, table=None),
    "other": dict(
        camera=(75, -45, 1.05), arm=(0.15, 0.2, 0.6, 1), fingers=(0.1, 0.1, 0.1, 1), table=(0.75, 0.8, 0.75, 1)
    ),
}


def open_package():
    """(environments, expert policies, mujoco), ready to render without a display; DataError names what is missing."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        import metaworld
        import mujoco
        from metaworld import policies, sawyer_xyz_env
    except ImportError as error:
        raise common.DataError(
            f"Meta-World cannot be imported ({error}): pip install --no-deps metaworld; "
            "pip install gymnasium mujoco imageio"
        ) from None
    except (AttributeError, OSError) as error:
        raise common.DataError(f"no EGL to render with ({error}): apt install libegl1 libgl1-mesa-dri") from None

    def reset_mocap_welds(self):
        """Meta-World 3.1 writes rows of 11 numbers, which MuJoCo 3.3 has; newer ones have 12."""
        self.model.eq_data[self.model.eq_type == mujoco.mjtEq.mjEQ_WELD] = 0
        self.model.eq_data[self.model.eq_type == mujoco.mjtEq.mjEQ_WELD, 6] = -1.0
        self.model.eq_data[self.model.eq_type == mujoco.mjtEq.mjEQ_WELD, 10] = 5.0
        mujoco.mj_forward(self.model, self.data)

    for holder in vars(sawyer_xyz_env).values():
        if isinstance(holder, type) and "reset_mocap_welds" in vars(holder):
            holder.reset_mocap_welds = reset_mocap_welds
    return metaworld.env_dict.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE, policies.ENV_POLICY_MAP, mujoco


class MetaWorld:
    """One task, with the interface of environments.py: images (P, P, 3), actions (4,) in [-1, 1], state (4,).

    The action moves the gripper by up to 2 cm along x, y, z and closes it (4th entry above 0). The state is the
    gripper's position in metres and its opening. A seed is an object's and a goal's position. With `distracting` other
    things move in the pictures, and `mask` (P, P) bool is where the robot is in the last one.
    """

    def __init__(self, task, pixels=64, appearance="robot", distracting=False):
        environments, experts, mujoco = open_package()
        if task not in TASKS:
            raise common.DataError(f"Meta-World task {task!r}: choose from {', '.join(TASKS)}")
        self.task, self.instruction, self.limit, self.fps = task, TASKS[task], LIMIT, FPS
        name = f"{task}-v3"
        self.env = environments[f"{name}-goal-observable"](seed=0)
        self.env._freeze_rand_vec, self.env.seeded_rand_vec = False, True  # a new goal at each reset, from the seed
        self.env.max_path_length = 10**6  # the limit is the caller's
        self.expert_policy = experts[name]()
        self.camera = self.dress(mujoco, APPEARANCES[appearance])
        self.pixels, self.distracting, self.mask = pixels, distracting, None
        try:
            self.renderer = mujoco.Renderer(self.env.model, pixels, pixels)
        except Exception as error:  # what a missing driver raises depends on the library
            raise common.DataError(f"cannot render ({error}): apt install libegl1 libgl1-mesa-dri") from error
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self.renderer.scene.flags[flag] = 0  # four times as fast on a CPU

    def dress(self, mujoco, appearance):
        """Give the model its colours; returns the camera."""
        model = self.env.model
        bodies = [mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_BODY, body) or "" for body in model.geom_bodyid]
        # of each geom, and at the end of a pixel without one
        self.robot = np.array([body.startswith("right_") or body in ("hand", *FINGERS) for body in bodies] + [False])
        self.background = np.array([body in ("tablelink", "world") for body in bodies] + [True])
        for geom, body in enumerate(bodies):
            arm, fingers = body.startswith("right_") or body == "hand", body in FINGERS
            table = body == "tablelink"
            part = "arm" if arm else "fingers" if fingers else "table" if table else None
            colour = appearance[part] if part else None
            if body in HIDDEN:
                colour = (0, 0, 0, 0)
            if colour and (model.geom_rgba[geom, 3] > 0):
                model.geom_rgba[geom], model.geom_matid[geom] = colour, -1
        camera = mujoco.MjvCamera()
        camera.lookat[:] = 0, 0.68, 0.12  # the middle of the workspace
        camera.azimuth, camera.elevation, camera.distance = appearance["camera"]
        return camera

    def reset(self, seed):
        self.env.seed(int(np.random.SeedSequence(seed).generate_state(1)[0] % 2**31))
        self.obs, _ = self.env.reset()
        self.distractors = Distractors(seed, self.pixels) if self.distracting else None
        return self.instruction

    def image(self):
        self.renderer.update_scene(self.env.data, camera=self.camera)
        image = self.renderer.render()
        if self.distractors:
            self.renderer.enable_segmentation_rendering()
            geoms = self.renderer.render()[..., 0]  # -1: none
            self.renderer.disable_segmentation_rendering()
            image, self.mask = self.distractors(image, self.robot[geoms], self.background[geoms])
        return image

    def state(self):
        return np.float32(self.obs[:4])

    def step(self, action):
        success = False
        for _ in range(FRAME_SKIP):
            self.obs, _, _, _, info = self.env.step(np.clip(np.float32(action), -1, 1))
            success |= bool(info["success"])
        return success, False

    def expert(self):
        """(4,) the scripted expert's action, in [-1, 1]."""
        return np.clip(self.expert_policy.get_action(self.obs), -1, 1)

    def close(self):
        self.renderer.close()


def record(env, seed, noise=NOISE):
    """An episode of the noisy expert: dict of frames (T, P, P, 3), actions (T, 4), state (T, 4), instruction, success.

    With distractors also mask (T, P, P). It ends with the first picture that shows success; the action there is 0, with
    the gripper as it was.
    """
    env.reset(seed)
    rng, drift = np.random.default_rng([*np.atleast_1d(seed), 1]), np.zeros(3)
    phase = rng.integers(PERIOD)
    frames, masks, actions, states, success = [env.image()], [env.mask], [], [env.state()], False
    while not success and len(actions) < env.limit:
        drift = MEMORY * drift + noise * np.sqrt(1 - MEMORY**2) * rng.normal(size=3)
        drift *= (len(actions) + phase) % PERIOD < DISTURBED
        action = env.expert()
        action[:3] = np.clip(action[:3] + drift, -1, 1)
        success, _ = env.step(action)
        frames.append(env.image())
        masks.append(env.mask)
        actions.append(action)
        states.append(env.state())
    actions.append([0, 0, 0, actions[-1][3]])
    arrays = dict(frames=np.stack(frames), actions=np.float32(actions), state=np.stack(states))
    arrays |= dict(mask=np.stack(masks)) if env.distracting else {}
    return arrays | dict(instruction=env.instruction, success=success)


def write(folder, tasks, episodes, seed=0, pixels=64, appearance="robot", distracting=False):
    """One shard per task with `episodes` successful episodes. A shard that is there already is kept."""
    folder = Path(folder)
    common.make_folder(folder)
    missing = [task for task in tasks if not (folder / f"{task}.tar").exists()]
    with tqdm(total=episodes * len(missing), unit="episode", desc=folder.name, mininterval=5) as bar:
        for task in missing:
            env, index = MetaWorld(task, pixels, appearance, distracting), list(TASKS).index(task)
            samples, number = [], 0
            while len(samples) < episodes:
                episode = record(env, (seed, index, number))
                number += 1
                if not episode["success"]:
                    if number > 10 * episodes + 20:
                        raise RuntimeError(f"{task}: the expert fails in nine of ten episodes")
                    continue
                about = dict(instruction=episode["instruction"], fps=FPS)
                about |= dict(source=f"metaworld-{appearance}", camera=appearance)
                about |= dict(episode=f"{1000 * index + len(samples):04d}", length=len(episode["frames"]))
                arrays = {f"{name}.npy": npy(array) for name, array in episode.items() if np.ndim(array)}
                samples.append({"__key__": f"{task}-{number:04d}", "json": json.dumps(about).encode(), **arrays})
                bar.update()
            env.close()
            write_shard(folder / f"{task}.tar", samples)


def main(argv=None):
    parser = common.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="folder to write; shards that are there are kept")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME", help=", ".join(TASKS))
    add("--episodes", type=int, default=50, metavar="N", help="episodes of each task")
    add("--appearance", choices=APPEARANCES, default="robot", help="colours and camera")
    add("--distractors", action="store_true", help="a moving table, three discs and a shaking camera")
    add("--pixels", type=int, default=64, metavar="N", help="side of a picture")
    add("--seed", type=int, default=0, metavar="N", help="of goals and noise")
    args = parser.parse_args(argv)
    write(args.out, args.tasks, args.episodes, args.seed, args.pixels, args.appearance, args.distractors)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
