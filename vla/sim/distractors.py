"""What moves and is not the robot, drawn into a picture: a texture on the table, three discs, a camera that shakes.

In the manner of Distracting Meta-World (MaskLAM, arXiv 2602.02259), which plays videos behind the robot.
"""

import numpy as np

CELLS = 8  # of the texture, along a side
TEXTURE = 0.55  # its share of a background pixel
DISCS = 3


def blur(noise, offset, pixels):
    """Noise (CELLS, CELLS, 3) that repeats, moved by `offset` pixels, interpolated to (pixels, pixels, 3)."""
    for axis in (0, 1):
        place = ((np.arange(pixels) + offset[axis]) * CELLS / pixels) % CELLS
        low, part = place.astype(int) % CELLS, (place % 1).reshape(-1, *[1] * (2 - axis))
        noise = np.take(noise, low, axis) * (1 - part) + np.take(noise, (low + 1) % CELLS, axis) * part
    return noise


class Distractors:
    """Those of one episode, drawn from its seed."""

    def __init__(self, seed, pixels):
        self.rng = rng = np.random.default_rng([*np.atleast_1d(seed), 2])
        self.pixels = pixels
        self.noise, self.offset, self.drift = rng.uniform(0, 1, (2, CELLS, CELLS, 3)), np.zeros(2), rng.normal(0, 2, 2)
        self.place, self.speed = rng.uniform(0, pixels, (DISCS, 2)), rng.normal(0, pixels / 50, (DISCS, 2))
        self.colour, self.radius = rng.uniform(0, 1, (DISCS, 3)), pixels * rng.uniform(0.06, 0.11, DISCS)

    def __call__(self, image, robot, background):
        """The next picture (P, P, 3) uint8, and where the robot is in it (P, P) bool; both masks (P, P) bool."""
        x = image / 255
        texture = (blur(self.noise[0], self.offset, self.pixels) + blur(self.noise[1], -self.offset, self.pixels)) / 2
        x = np.where(background[..., None], (1 - TEXTURE) * x + TEXTURE * texture, x)
        down, right = np.mgrid[: self.pixels, : self.pixels] + 0.5
        for place, colour, radius in zip(self.place, self.colour, self.radius, strict=True):
            cover = np.clip(radius - np.hypot(down - place[0], right - place[1]) + 0.5, 0, 1)
            x, robot = x + cover[..., None] * (colour - x), robot & (cover == 0)
        self.offset, self.place = self.offset + self.drift, self.place + self.speed
        self.speed = np.where((self.place < 0) | (self.place > self.pixels), -self.speed, self.speed)
        shake = self.rng.integers(-1, 2, 2)
        return np.roll((255 * x).round().astype(np.uint8), shake, (0, 1)), np.roll(robot, shake, (0, 1))
