"""A transform coder fitted in closed form: KLT, bits by water-filling, Lloyd-Max points, packed into tokens.

The textbook recipe (Gersho and Gray, Vector Quantization and Signal Compression, 1992, chapters 6 and 8) in float64.
Deterministic; seconds. Letters: B chunks, X values of a chunk (steps x dims), C values of the context, K coefficients
that get bits, N tokens, L levels of a coefficient.
"""

import heapq
import math
from dataclasses import dataclass

import numpy as np

RIDGE = 1e-3  # of the prediction from the context, relative to each value's variance
SPREADS = (0, 1, 2, 4, 8)  # that held-out chunks choose from; see spread
MIX, JITTER = 0.5, 0.1
SAMPLES = 5000  # at least so many: few chunks are spread several times, or each would get a point of its own
LLOYD_ROUNDS = 15
LOOK_AHEAD = 3  # two levels may be worth nothing where three are worth much: a coefficient that is mostly zero
MAX_LEVELS = 256  # of one coefficient
COEFFICIENTS_PER_TOKEN = 12  # at most this many are considered; a token of 1024 has room for 10


@dataclass
class Fit:
    """levels: for each token, the levels of its coefficients; the arrays' rows follow that order."""

    levels: list
    weight: np.ndarray  # C X
    mean: np.ndarray  # X
    basis: np.ndarray  # K X
    points: list  # K arrays (L,)
    deviation: np.ndarray  # K
    span: np.ndarray  # M X: all directions that were considered, times their deviation

    def error(self, x, context):
        """Mean squared error of chunks (B, X) coded with what is known of them, (B, C)."""
        x = x - context @ self.weight - self.mean
        coded = x @ self.basis.T
        for k, points in enumerate(self.points):
            coded[:, k] = points[np.searchsorted((points[1:] + points[:-1]) / 2, coded[:, k])]
        return np.square(x - coded @ self.basis).mean()


@dataclass
class Transform:
    """What is known beforehand predicts a part of each chunk; the rest is turned to its principal directions (KLT)."""

    weight: np.ndarray  # C X
    mean: np.ndarray  # X
    directions: np.ndarray  # M X, the strongest first
    z: np.ndarray  # B M: the training chunks' coefficients


def klt(x, context, tokens):
    """Chunks (B, X) and what is known beforehand of each, (B, C), both float64 -> Transform."""
    weight = ridge(x, context)
    x = x - context @ weight
    mean = x.mean(0)
    directions = np.linalg.eigh((x - mean).T @ (x - mean))[1].T[::-1][: COEFFICIENTS_PER_TOKEN * tokens]
    return Transform(weight, mean, directions, (x - mean) @ directions.T)


def fit(transform, tokens, codebook_size, factor=1):
    """Levels and points for a Transform's coefficients -> Fit. factor: see spread."""
    tables = [LloydMax(samples) for samples in spread(transform.z, factor).T]
    levels, token = allocate(tables, tokens, codebook_size)
    order = [np.flatnonzero((token == n) & (levels > 1)) for n in range(tokens)]
    used, deviation = np.concatenate(order), transform.z.std(0)
    return Fit(
        levels=[levels[rows].tolist() for rows in order],
        weight=transform.weight,
        mean=transform.mean,
        basis=transform.directions[used],
        points=[tables[i](int(levels[i]))[0] for i in used],
        deviation=deviation[used],
        span=transform.directions * deviation[:, None],
    )


def ridge(x, context):
    """Weights (C, X) that predict chunks (B, X) from their context (B, C)."""
    centred = context - context.mean(0)
    gram = centred.T @ centred / len(x)
    gram += np.diag(RIDGE * gram.diagonal() + 1e-6)
    return np.linalg.solve(gram, centred.T @ x / len(x)) if context.shape[1] else np.zeros((0, x.shape[1]))


def spread(z, factor):
    """Coefficients (B, K), spread: the points must also serve motions that were not recorded.

    Half of the values are mixed with another chunk's, also beyond the two of them (weights -MIX to 1 + MIX) unless
    `factor` is 0; all get noise of JITTER deviations. Half of the chunks are `factor` times as large: for data whose
    few episodes do not show how far a robot moves.
    """
    draw = np.random.default_rng(0)
    z, mix = np.tile(z, (math.ceil(SAMPLES / len(z)), 1)), MIX if factor else 0.0
    weight = np.where(draw.random(z.shape) < 0.5, draw.uniform(-mix, 1 + mix, z.shape), 1.0)
    mixed = weight * z + (1 - weight) * z[draw.permutation(len(z))]
    mixed += JITTER * z.std(0) * draw.normal(size=z.shape)
    return mixed * np.where(draw.random((len(z), 1)) < 0.5, max(factor, 1), 1)


class LloydMax:
    """The points that code one coefficient's samples with the least squared error, for any number of levels."""

    def __init__(self, samples):
        self.x = np.sort(samples)
        moments = np.stack([self.x, self.x**2], 1)
        self.sums = np.concatenate([np.zeros((1, 2)), np.cumsum(moments, 0)])  # B+1 2
        self.found = {}

    def __call__(self, levels):
        """Points (L,) in increasing order, and their mean squared error."""
        if levels not in self.found:
            place = (np.arange(levels) + 0.5) / levels
            even = self.x[0] + (self.x[-1] - self.x[0]) * place
            points = (even + self.x[(place * len(self.x)).astype(int)]) / 2
            for _ in range(LLOYD_ROUNDS):
                count, first, _ = self.cells(points)
                points = np.where(count > 0, first / np.maximum(count, 1), points)
            count, first, second = self.cells(points)
            self.found[levels] = points, (second - 2 * points * first + count * points**2).sum() / len(self.x)
        return self.found[levels]

    def cells(self, points):
        """Number, sum and sum of squares of the samples nearest to each point."""
        edges = np.searchsorted(self.x, (points[1:] + points[:-1]) / 2)
        edges = np.concatenate([[0], edges, [len(self.x)]])
        return np.diff(edges), *np.diff(self.sums[edges], axis=0).T


def allocate(tables, tokens, codebook_size):
    """Levels (K,) and token (K,) of the coefficients; a token's levels multiply to at most codebook_size.

    First as if all tokens were one. Then the coefficients go into the tokens, the strongest first, so that the first
    tokens hold the coarse shape; and the levels are given again within each token's room.
    """
    wanted, _ = water_fill(tables, np.zeros(len(tables), int), [codebook_size**tokens])
    size, token = [1] * tokens, np.full(len(tables), -1)
    for i in np.argsort(-wanted, kind="stable"):
        fits = [n for n in range(tokens) if size[n] * int(wanted[i]) <= codebook_size]
        if wanted[i] > 1 and fits:
            token[i] = fits[0]
            size[token[i]] *= int(wanted[i])
    return water_fill(tables, token, [codebook_size] * tokens)


def water_fill(tables, token, sizes):
    """Give levels, one after another, to the coefficient whose error falls most per bit. Returns levels, token.

    token (K,): where each coefficient's levels count, -1 where that is open (then it takes the emptiest token when its
    turn comes). sizes: the largest product of levels of each token.
    """
    levels, token, product, queue = np.ones(len(tables), np.int64), token.copy(), [1] * len(sizes), []

    def room(i):
        if token[i] < 0:
            return max(size // used for size, used in zip(sizes, product, strict=True))
        return sizes[token[i]] // (product[token[i]] // int(levels[i]))

    def offer(i):
        now = int(levels[i])
        best, to = 0.0, 0
        for more in range(now + 1, min(now + LOOK_AHEAD, room(i), MAX_LEVELS) + 1):
            gain = (tables[i](now)[1] - tables[i](more)[1]) / math.log2(more / now)
            best, to = max((best, to), (gain, more))
        if best > 0:
            heapq.heappush(queue, (-best, i, to))

    for i in range(len(tables)):
        offer(i)
    while queue:
        _, i, to = heapq.heappop(queue)
        if to <= room(i):
            token[i] = product.index(min(product)) if token[i] < 0 else token[i]
            product[token[i]] = product[token[i]] // int(levels[i]) * to
            levels[i] = to
        offer(i)
    return levels, token
