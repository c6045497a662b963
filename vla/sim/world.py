"""A tabletop seen from above: an effector pushes coloured blocks as it is told, in plain numpy.

Like Language Table (Lynch et al. 2022, arXiv 2210.06407), small: lengths are in table widths, x to the right, y
downwards, an action is the effector's displacement (dx, dy) per step, cut to MAX_STEP. `Tables` runs n tables at
once; `Tabletop` is one of them behind gymnasium's reset and step. What differs between two bodies is how they look,
not what they do.
"""

import numpy as np

BLOCK, EFFECTOR, MAX_STEP, EDGE, TOUCH = 0.07, 0.055, 0.04, 0.08, 0.03
COLOURS = dict(red=(0.85, 0.2, 0.15), green=(0.2, 0.65, 0.25), blue=(0.2, 0.35, 0.9), yellow=(0.9, 0.8, 0.1))
SIDES = dict(left=(-1, 0), right=(1, 0), top=(0, -1), bottom=(0, 1))
# shape, colour, size, table: `square` is another robot on the same table; `light` also turns the contrast round
BODIES = dict(
    disc=("disc", (0.05, 0.05, 0.08), 0.055, (0.82, 0.82, 0.8)),
    square=("square", (0.45, 0.1, 0.5), 0.06, (0.75, 0.78, 0.84)),
    light=("square", (1.0, 1.0, 1.0), 0.06, (0.25, 0.25, 0.28)),
)
VERBS = ("push", "move", "slide")
# (block, side or other block): 16 pushes to a side, then 12 to another block
TASKS = [(b, side) for b in COLOURS for side in SIDES] + [
    (b, other) for b in COLOURS for other in COLOURS if b != other
]


def instruction(task, verb="push"):
    """The words for TASKS[task]: push the red block to the left; push the red block to the blue block."""
    block, goal = TASKS[task]
    return f"{verb} the {block} block to the {goal}" + ("" if goal in SIDES else " block")


class Tables:
    """n tables at once. `reset` draws a task and a scene per table from its seed; half of the tasks are of each kind.

    Attributes: effector (n, 2), blocks (n, 4, 2), task (n,) index into TASKS, words: n instructions, time (n,) steps.
    """

    def __init__(self, n, body="disc", pixels=32, distractors=0, limit=70):
        if body not in BODIES:
            raise ValueError(f"body {body!r}: expected one of {', '.join(BODIES)}")
        self.n, self.body, self.pixels, self.distractors, self.limit = n, body, pixels, distractors, limit
        # the area that a pixel covers of a shape with this distance to its edge is about linear in it
        self.moving = np.zeros((n, 0, 4))
        centre = (np.arange(pixels, dtype=np.float32) + 0.5) / pixels
        self.x, self.y = centre[None, :], centre[:, None]

    def reset(self, seeds):
        """seeds: n whole numbers or tuples of them."""
        self.rng = [np.random.default_rng(seed) for seed in seeds]
        assert len(self.rng) == self.n, "one seed per table"
        first = [int(rng.integers(2)) for rng in self.rng]
        self.task = np.array(
            [rng.integers(16) if kind else 16 + rng.integers(12) for kind, rng in zip(first, self.rng, strict=True)]
        )
        self.words = [instruction(task, VERBS[rng.integers(3)]) for task, rng in zip(self.task, self.rng, strict=True)]
        scenes = [scatter(rng, self.target(task)) for task, rng in zip(self.task, self.rng, strict=True)]
        self.effector = np.stack([scene[0] for scene in scenes])
        self.blocks = np.stack([scene[1:] for scene in scenes])
        self.block = np.array([list(COLOURS).index(TASKS[task][0]) for task in self.task])
        to_side = self.task < 16
        self.side = np.array([SIDES.get(TASKS[task][1], (0, 0)) for task in self.task], float)
        others = [TASKS[task][1] for task in self.task]
        self.other = np.array([0 if name in SIDES else list(COLOURS).index(name) for name in others])
        self.to_side = to_side
        self.time = np.zeros(self.n, int)
        self.moving = np.stack([rng.uniform(0, 1, (self.distractors, 4)) for rng in self.rng])  # position, velocity
        self.moving[..., 2:] = (self.moving[..., 2:] - 0.5) * 0.06
        return self.render()

    @staticmethod
    def target(task):
        """Colour indices of the block and, if there is one, of the block it goes to."""
        return [list(COLOURS).index(name) for name in TASKS[task] if name in COLOURS]

    def success(self):
        """(n,) bool: the block lies within EDGE of touching its side, or within TOUCH of touching the other block."""
        rows = np.arange(self.n)
        block = self.blocks[rows, self.block]
        wall = ((block - 0.5) * self.side).sum(1) > 0.5 - BLOCK - EDGE
        near = np.linalg.norm(block - self.blocks[rows, self.other], axis=1) < 2 * BLOCK + TOUCH
        return np.where(self.to_side, wall, near)

    def step(self, actions):
        """actions (n, 2) -> frames, success (n,), over (n,): out of time. A table that is over can go on."""
        actions = np.asarray(actions, float)
        assert actions.shape == (self.n, 2), f"actions {actions.shape}, expected {(self.n, 2)}"
        actions = np.nan_to_num(actions)
        length = np.linalg.norm(actions, axis=1, keepdims=True)
        self.effector = self.effector + actions * np.minimum(1, MAX_STEP / np.maximum(length, 1e-9))
        self.effector = np.clip(self.effector, EFFECTOR, 1 - EFFECTOR)
        for _ in range(3):  # quasi-static: what overlaps is moved apart, blocks out of the effector's way first
            self.blocks = self.blocks + apart(self.blocks - self.effector[:, None], BLOCK + EFFECTOR)
            between = self.blocks[:, :, None] - self.blocks[:, None]
            self.blocks = self.blocks + apart(between, 2 * BLOCK).sum(2) / 2
            self.blocks = np.clip(self.blocks, BLOCK, 1 - BLOCK)
        back = apart(self.effector[:, None] - self.blocks, BLOCK + EFFECTOR)  # a block at the wall stops the effector
        self.effector = np.clip(self.effector + back.sum(1), EFFECTOR, 1 - EFFECTOR)
        if self.distractors:
            self.moving[..., :2] += self.moving[..., 2:]
            out = (self.moving[..., :2] < 0) | (self.moving[..., :2] > 1)
            self.moving[..., 2:] *= np.where(out, -1, 1)
        self.time += 1
        return self.render(), self.success(), self.time >= self.limit

    def render(self):
        """(n, pixels, pixels, 3) uint8."""
        shape, colour, size, table = BODIES[self.body]
        image = np.empty((self.n, self.pixels, self.pixels, 3), np.float32)
        image[:] = table
        for k in range(self.distractors):
            self.draw(image, self.moving[:, k, :2], 0.05, (0.6, 0.45, 0.55), "disc")
        for k, name in enumerate(COLOURS):
            self.draw(image, self.blocks[:, k], BLOCK, COLOURS[name], "disc")
        self.draw(image, self.effector, size, colour, shape)
        return (image * 255 + 0.5).astype(np.uint8)

    def draw(self, image, centre, size, colour, shape):
        """Only the window of pixels that a shape can reach is touched."""
        reach = int(np.ceil((size + 1 / self.pixels) * self.pixels))
        corner = np.clip((centre * self.pixels).astype(int) - reach, 0, self.pixels - 2 * reach)  # n 2
        window = np.arange(2 * reach)
        cols, rows = corner[:, :1] + window, corner[:, 1:] + window
        dx = np.abs(self.x[0, cols] - centre[:, :1].astype(np.float32))[:, None]  # n 1 w
        dy = np.abs(self.y[rows, 0] - centre[:, 1:].astype(np.float32))[:, :, None]  # n w 1
        distance = np.sqrt(dx * dx + dy * dy) if shape == "disc" else np.maximum(dx, dy)
        cover = np.clip((size - distance) * self.pixels + 0.5, 0, 1)[..., None]
        where = np.arange(self.n)[:, None, None], rows[:, :, None], cols[:, None]
        patch = image[where]
        image[where] = patch + cover * (np.float32(colour) - patch)

    def expert(self):
        """(n, 2) the scripted expert's actions: go round the block to behind it, then push, correcting sideways."""
        rows = np.arange(self.n)
        block = self.blocks[rows, self.block]
        goal = np.where(self.to_side[:, None], block + self.side, self.blocks[rows, self.other])
        ahead = unit(goal - block)
        offset = self.effector - block
        along = (offset * ahead).sum(1, keepdims=True)
        sideways = offset - along * ahead
        reach = BLOCK + EFFECTOR
        push = MAX_STEP * unit(ahead - 12 * sideways)
        behind = block - ahead * (reach + 0.015) - self.effector
        walk = self.round(behind, block, reach + 0.02)
        for k in range(len(COLOURS)):  # the other blocks stay where they are, if there is room
            walk = np.where((self.block == k)[:, None], walk, self.round(walk, self.blocks[:, k], reach + 0.01))
        ready = (along < -0.6 * reach) & (np.linalg.norm(sideways, axis=1, keepdims=True) < 0.03)
        far = np.linalg.norm(walk, axis=1, keepdims=True)
        walk = walk * np.minimum(1, MAX_STEP / np.maximum(far, 1e-9))
        return np.where(ready, push, walk)

    def round(self, move, centre, reach):
        """`move` without what would lead into a disc: near it, its radial part becomes motion along the rim."""
        offset = self.effector - centre
        distance = np.linalg.norm(offset, axis=1, keepdims=True)
        out = offset / np.maximum(distance, 1e-9)
        inwards = (move * out).sum(1, keepdims=True)
        rim = move - inwards * out
        turn = np.stack([-out[:, 1], out[:, 0]], 1)
        turn = turn * np.where((turn * rim).sum(1, keepdims=True) < 0, -1, 1)
        around = turn * np.linalg.norm(move, axis=1, keepdims=True) + out * np.maximum(reach - distance, 0)
        blocked = (inwards < 0) & (distance < reach + 0.02)
        return np.where(blocked & (np.linalg.norm(move, axis=1, keepdims=True) > 1e-6), around, move)


class Tabletop:
    """One table with gymnasium's interface: obs is dict(image (H, W, 3) uint8, state (2,) float32, instruction str)."""

    def __init__(self, body="disc", pixels=32, distractors=0, limit=70):
        self.tables = Tables(1, body, pixels, distractors, limit)

    def observe(self, frames):
        return dict(image=frames[0], state=self.tables.effector[0].astype(np.float32), instruction=self.tables.words[0])

    def reset(self, *, seed=None, options=None):
        seed = np.random.SeedSequence().entropy if seed is None else seed
        return self.observe(self.tables.reset([seed])), {}

    def step(self, action):
        """-> obs, reward (1 on success, else 0), terminated, truncated, info (is_success)."""
        frames, success, over = self.tables.step(np.asarray(action)[None])
        done = bool(success[0])
        return self.observe(frames), float(done), done, bool(over[0]) and not done, dict(is_success=done)

    def render(self):
        return self.tables.render()[0]


def unit(vectors):
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def apart(offset, reach):
    """How far each of `offset` (..., 2) is short of length `reach`, along it; 0 for what is far enough, or itself."""
    distance = np.linalg.norm(offset, axis=-1, keepdims=True)
    return np.where((distance < reach) & (distance > 0), offset / np.maximum(distance, 1e-9) * (reach - distance), 0)


def scatter(rng, target):
    """Effector and four blocks, (5, 2), none touching another; the task's blocks away from the walls."""
    places = []
    while len(places) < 5:
        inner = len(places) == 0 or len(places) - 1 in target
        place = rng.uniform(0.22, 0.78, 2) if inner and places else rng.uniform(0.1, 0.9, 2)
        room = [np.linalg.norm(place - other) for other in places]
        if all(distance > 2 * BLOCK + (0.06 if inner else 0.01) for distance in room):
            places.append(place)
        elif rng.random() < 0.01:
            places = []  # a scene that leaves no room: start again
    return np.array(places)


def noise(rng, before, sd=0.35, keep=0.7):
    """One step of Ornstein-Uhlenbeck noise of `sd` MAX_STEPs on actions; before: the step before's, (n, 2)."""
    fresh = np.stack([r.normal(size=2) for r in rng])
    return keep * before + np.sqrt(1 - keep**2) * sd * MAX_STEP * fresh


def record(seeds, body="disc", pixels=32, distractors=0, sd=0.35, limit=70):
    """Expert episodes, one per seed: dicts of frames (T, H, W, 3), actions (T, 2), state (T, 2), instruction, success.

    The last frame shows success; the action there is 0.
    """
    tables = Tables(len(seeds), body, pixels, distractors, limit)
    frames, disturbance = tables.reset(seeds), np.zeros((len(seeds), 2))
    rng = [np.random.default_rng([*np.atleast_1d(seed), 1]) for seed in seeds]
    episodes = [dict(frames=[], actions=[], state=[], instruction=words, success=False) for words in tables.words]
    for time in range(limit + 1):
        disturbance = noise(rng, disturbance, sd)
        actions, won = tables.expert() + disturbance, tables.success()
        for i, episode in enumerate(episodes):
            if not episode["success"]:
                episode["frames"].append(frames[i])
                episode["state"].append(tables.effector[i].copy())
                episode["actions"].append(np.zeros(2) if won[i] or time == limit else actions[i])
                episode["success"] = bool(won[i])
        if all(episode["success"] for episode in episodes) or time == limit:
            break
        frames = tables.step(actions)[0]
    for episode in episodes:
        length = np.linalg.norm(episode["actions"], axis=1, keepdims=True)
        episode["actions"] = np.float32(episode["actions"] * np.minimum(1, MAX_STEP / np.maximum(length, 1e-9)))
        episode["frames"], episode["state"] = np.stack(episode["frames"]), np.float32(episode["state"])
    return episodes
