"""A tabletop seen from above: an effector pushes coloured blocks as an instruction says. Plain numpy.

Like Language Table (Lynch et al. 2022, arXiv 2210.06407), small. Lengths are in table widths, x to the right, y
downwards. An action is the effector's displacement (dx, dy) per step, cut to MAX_STEP. `Tables` runs n environments
at once.
"""

import numpy as np

BLOCK, EFFECTOR, MAX_STEP, EDGE = 0.07, 0.055, 0.04, 0.08
COLOURS = dict(red=(0.85, 0.2, 0.15), green=(0.2, 0.65, 0.25), blue=(0.2, 0.35, 0.9), yellow=(0.9, 0.8, 0.1))
SIDES = dict(left=(-1, 0), right=(1, 0))
# shape, colour and size of the effector, colour of the table: `light` is another robot
BODIES = dict(
    disc=("disc", (0.05, 0.05, 0.08), 0.055, (0.82, 0.82, 0.8)),
    light=("square", (1.0, 1.0, 1.0), 0.06, (0.25, 0.25, 0.28)),
)
VERBS = ("push", "move", "slide")
TASKS = [(block, side) for block in COLOURS for side in SIDES]


def instruction(task, verb="push"):
    """TASKS[task] as text: push the red block to the left."""
    block, side = TASKS[task]
    return f"{verb} the {block} block to the {side}"


class Tables:
    """n environments at once. `reset` draws a task and an initial state for each from its seed.

    Attributes: effector (n, 2), blocks (n, 4, 2), task (n,) index into TASKS, instructions (n texts), time (n,) steps.
    """

    def __init__(self, n, body="disc", pixels=32, limit=70):
        self.n, self.body, self.pixels, self.limit = n, body, pixels, limit
        centre = (np.arange(pixels, dtype=np.float32) + 0.5) / pixels
        self.x, self.y = centre[None, :], centre[:, None]

    def reset(self, seeds):
        """seeds: n whole numbers or tuples of them. Returns frames (n, P, P, 3)."""
        self.rng = [np.random.default_rng(seed) for seed in seeds]
        self.task = np.array([rng.integers(len(TASKS)) for rng in self.rng])
        verbs = [VERBS[rng.integers(3)] for rng in self.rng]
        self.instructions = [instruction(task, verb) for task, verb in zip(self.task, verbs, strict=True)]
        self.block = self.task // len(SIDES)
        scenes = [scatter(rng, block) for block, rng in zip(self.block, self.rng, strict=True)]
        self.effector = np.stack([scene[0] for scene in scenes])
        self.blocks = np.stack([scene[1:] for scene in scenes])
        self.side = np.array([SIDES[TASKS[task][1]] for task in self.task], float)
        self.time = np.zeros(self.n, int)
        return self.render()

    def success(self):
        """(n,) bool: the block lies within EDGE of touching its side."""
        block = self.blocks[np.arange(self.n), self.block]
        return ((block - 0.5) * self.side).sum(1) > 0.5 - BLOCK - EDGE

    def step(self, actions):
        """actions (n, 2) -> frames, success (n,), over (n,): out of time. An episode that is over can go on."""
        actions = np.nan_to_num(np.asarray(actions, float))
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
        self.time += 1
        return self.render(), self.success(), self.time >= self.limit

    def render(self):
        """(n, P, P, 3) uint8."""
        shape, colour, size, table = BODIES[self.body]
        image = np.empty((self.n, self.pixels, self.pixels, 3), np.float32)
        image[:] = table
        for k, name in enumerate(COLOURS):
            self.draw(image, self.blocks[:, k], BLOCK, COLOURS[name], "disc")
        self.draw(image, self.effector, size, colour, shape)
        return (image * 255 + 0.5).astype(np.uint8)

    def draw(self, image, centre, size, colour, shape):
        """Paint a shape at `centre` (n, 2), anti-aliased; only the window of pixels that it can cover is touched."""
        half = int(np.ceil((size + 1 / self.pixels) * self.pixels))
        corner = np.clip((centre * self.pixels).astype(int) - half, 0, self.pixels - 2 * half)  # n 2
        window = np.arange(2 * half)
        cols, rows = corner[:, :1] + window, corner[:, 1:] + window
        dx = np.abs(self.x[0, cols] - centre[:, :1].astype(np.float32))[:, None]  # n 1 w
        dy = np.abs(self.y[rows, 0] - centre[:, 1:].astype(np.float32))[:, :, None]  # n w 1
        distance = np.sqrt(dx * dx + dy * dy) if shape == "disc" else np.maximum(dx, dy)
        # the area that a pixel covers of a shape is about linear in its distance to the edge
        cover = np.clip((size - distance) * self.pixels + 0.5, 0, 1)[..., None]
        where = np.arange(self.n)[:, None, None], rows[:, :, None], cols[:, None]
        image[where] += cover * (np.float32(colour) - image[where])

    def expert(self):
        """(n, 2) the scripted expert's actions: go round the block to behind it, then push, correcting sideways."""
        block, ahead = self.blocks[np.arange(self.n), self.block], self.side
        offset = self.effector - block
        along = (offset * ahead).sum(1, keepdims=True)
        sideways = offset - along * ahead
        contact = BLOCK + EFFECTOR
        push = MAX_STEP * unit(ahead - 12 * sideways)
        walk = self.avoid(block - ahead * (contact + 0.015) - self.effector, block, contact + 0.02)
        for k in range(len(COLOURS)):  # the other blocks stay where they are, if there is room
            around = self.avoid(walk, self.blocks[:, k], contact + 0.01)
            walk = np.where((self.block == k)[:, None], walk, around)
        ready = (along < -0.6 * contact) & (np.linalg.norm(sideways, axis=1, keepdims=True) < 0.03)
        far = np.linalg.norm(walk, axis=1, keepdims=True)
        return np.where(ready, push, walk * np.minimum(1, MAX_STEP / np.maximum(far, 1e-9)))

    def avoid(self, move, centre, radius):
        """`move` without what would lead into a disc: near it, its radial part becomes motion along the rim."""
        offset = self.effector - centre
        distance = np.linalg.norm(offset, axis=1, keepdims=True)
        out = offset / np.maximum(distance, 1e-9)
        inwards = (move * out).sum(1, keepdims=True)
        rim = move - inwards * out
        tangent = np.stack([-out[:, 1], out[:, 0]], 1)
        tangent = tangent * np.where((tangent * rim).sum(1, keepdims=True) < 0, -1, 1)
        length = np.linalg.norm(move, axis=1, keepdims=True)
        around = tangent * length + out * np.maximum(radius - distance, 0)
        return np.where((inwards < 0) & (distance < radius + 0.02) & (length > 1e-6), around, move)


def unit(vectors):
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def apart(offset, radius):
    """How far each of `offset` (..., 2) is short of length `radius`, along it; 0 for what is far enough, or itself."""
    distance = np.linalg.norm(offset, axis=-1, keepdims=True)
    return np.where((distance < radius) & (distance > 0), offset / np.maximum(distance, 1e-9) * (radius - distance), 0)


def scatter(rng, target):
    """Effector and four blocks, (5, 2), none touching another; block `target` lies away from the walls."""
    places = []
    while len(places) < 5:
        inner = len(places) in (0, target + 1)
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


def record(seeds, body="disc", pixels=32, sd=0.35, limit=70):
    """Noisy expert episodes, one per seed: dicts of frames (T, P, P, 3), actions, state (T, 2), instruction, success.

    The last frame shows success; the action there is 0.
    """
    tables = Tables(len(seeds), body, pixels, limit)
    frames, disturbance = tables.reset(seeds), np.zeros((len(seeds), 2))
    rng = [np.random.default_rng([*np.atleast_1d(seed), 1]) for seed in seeds]
    episodes = [dict(frames=[], actions=[], state=[], instruction=text, success=False) for text in tables.instructions]
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
