"""Other action tokenizers to hold ours against. All work on chunks (B, T, A) in normalised units.

Each is fitted on training chunks and gives, for held-out chunks, a Coded. None clips unless its published rule does.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from fsq import FSQ
from torch import nn

FAST_VOCABULARY, FAST_CHUNKS = 1024, 4000


class Coded(NamedTuple):
    """Held-out chunks through a codec: decoded (B, T, A), tokens (B,), bits of one token."""

    method: str
    decoded: np.ndarray
    tokens: np.ndarray
    token_bits: float
    undecodable: int = 0


def dct_matrix(steps):
    """Orthonormal DCT-II, (steps, steps)."""
    t = np.arange(steps)
    matrix = np.cos(math.pi / steps * (t + 0.5) * t[:, None]) * math.sqrt(2 / steps)
    matrix[0] /= math.sqrt(2)
    return matrix


def first_action(chunks):
    """First-action baseline: sends nothing; every step is the first action, which it is given."""
    return Coded("first-action baseline", np.broadcast_to(chunks[:, :1], chunks.shape), np.zeros(len(chunks)), 0)


class Bins:
    """OpenVLA's rule: one token per step and dim; 256 edges on [-1, 1], values beyond are clipped."""

    def __init__(self, steps, dims, edges=256):
        self.shape, self.edges = (steps, dims), np.linspace(-1, 1, edges)

    def encode(self, chunks):
        """Chunks (B, T, A) -> tokens (B, T A) from 0 to 254."""
        digits = np.digitize(np.clip(chunks, -1, 1), self.edges) - 1
        return np.clip(digits, 0, len(self.edges) - 2).reshape(len(chunks), -1)

    def decode(self, tokens):
        """Tokens (B, T A) -> the middle of each bin, (B, T, A)."""
        return ((self.edges[1:] + self.edges[:-1]) / 2)[tokens].reshape(-1, *self.shape)


def bins256(chunks):
    bins = Bins(*chunks.shape[1:])
    return Coded("256 bins", bins.decode(bins.encode(chunks)), np.full(len(chunks), chunks[0].size), 8.0)


def uniform(fitted, values, levels):
    """Each column of `values` to one of `levels` even steps over the q0.5 to q99.5 of `fitted`."""
    low, high = np.quantile(fitted, [0.005, 0.995], axis=0)
    width = np.maximum((high - low) / (levels - 1), 1e-12)
    return low + width * np.clip(np.round((values - low) / width), 0, levels - 1)


def pca(train, chunks, tokens, codebook_size):
    """Two principal coordinates a token, all with the same levels."""
    flat, levels = train.reshape(len(train), -1), math.isqrt(codebook_size)
    mean = flat.mean(0)
    directions = np.linalg.eigh((flat - mean).T @ (flat - mean))[1][:, ::-1][:, : 2 * tokens]
    z, fitted = ((x.reshape(len(x), -1) - mean) @ directions for x in (chunks, train))
    decoded = (mean + uniform(fitted, z, levels) @ directions.T).reshape(chunks.shape)
    return Coded("PCA, equal levels", decoded, np.full(len(chunks), tokens), 2 * math.log2(levels))


def beast(train, chunks, points, levels, degree=4, ridge=1e-4):
    """BEAST (arXiv 2506.06072): clamped B-splines by ridge regression, control points to even levels; not trained."""
    T, A = chunks.shape[1:]
    degree = min(degree, points - 1)
    knots = np.concatenate([np.zeros(degree), np.linspace(0, 1, points - degree + 1), np.ones(degree)])
    time = np.linspace(0, 1, T)
    basis = ((knots[:-1] <= time[:, None]) & (time[:, None] < knots[1:])).astype(float)  # T, number of knots - 1
    basis[-1, np.flatnonzero(knots < 1)[-1]] = 1.0  # the last step belongs to the last span
    for d in range(1, degree + 1):  # Cox and de Boor
        left, right = knots[d:-1] - knots[: -d - 1], knots[d + 1 :] - knots[1:-d]
        rise = (time[:, None] - knots[: -d - 1]) / np.where(left > 0, left, 1)
        fall = (knots[d + 1 :] - time[:, None]) / np.where(right > 0, right, 1)
        basis = rise * basis[:, :-1] + fall * basis[:, 1:]
    solve = np.linalg.solve(basis.T @ basis + ridge * np.eye(points), basis.T)
    fitted, values = ((solve @ x).reshape(len(x), -1) for x in (train, chunks))
    decoded = basis @ uniform(fitted, values, levels).reshape(len(chunks), points, A)
    return Coded(f"BEAST, {levels} levels", decoded, np.full(len(chunks), points * A), math.log2(levels))


class Fast:
    """FAST (arXiv 2501.09747): DCT over time, rounded, low frequencies first, as text through byte-level BPE.

    The published fit() seeds the BPE with characters that are not byte-level ones, and can then emit chunks that do
    not decode; all 256 bytes are seeded here. As published, coefficients below the smallest of the training chunks are
    clipped to it: costly where data drift.
    """

    def __init__(self, train, scale):
        """train: chunks (B, T, A) to learn the BPE from. scale: of the coefficients before they are rounded."""
        from tokenizers import ByteLevelBPETokenizer, pre_tokenizers, trainers

        self.shape, self.scale, self.dct = train.shape[1:], scale, dct_matrix(train.shape[1])
        numbers = self.coefficients(train[:: math.ceil(len(train) / FAST_CHUNKS)])
        self.low = numbers.min()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a set: its order would change from run to run
        settings = dict(vocab_size=FAST_VOCABULARY, min_frequency=2, max_token_length=10000, show_progress=False)
        self.bpe = ByteLevelBPETokenizer()
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **settings)
        self.bpe._tokenizer.train_from_iterator(map(self.text, numbers), trainer)

    def coefficients(self, chunks):
        return np.around(self.dct @ chunks * self.scale).astype(np.int64).reshape(len(chunks), -1)

    def text(self, row):
        return "".join(map(chr, np.clip(row - self.low, 0, 0xD7FF)))  # beyond lie surrogates, which are no characters

    def encode(self, chunks):
        """Chunks (B, T, A) -> a list of B lists of tokens, of any length."""
        return [self.bpe.encode(self.text(row)).ids for row in self.coefficients(chunks)]

    def decode(self, tokens):
        """One list of tokens -> its chunk (T, A), or None where it is no chunk."""
        text = self.bpe.decode(list(tokens))
        if len(text) != math.prod(self.shape) or "\ufffd" in text:
            return None
        numbers = np.array([ord(c) for c in text]) + self.low
        return self.dct.T @ (numbers / self.scale).reshape(self.shape)


def fast(train, chunks, scale):
    """Chunks that do not decode are counted, and scored as zeros (as openpi acts)."""
    codec = Fast(train, scale)
    tokens = codec.encode(chunks)
    decoded = [codec.decode(some) for some in tokens]
    undecodable = sum(chunk is None for chunk in decoded)
    decoded = np.stack([np.zeros(codec.shape) if chunk is None else chunk for chunk in decoded])
    return Coded(
        f"FAST, scale {scale}", decoded, np.array(list(map(len, tokens))), math.log2(FAST_VOCABULARY), undecodable
    )


class RegisterTokenizer(nn.Module):
    """The plain learned tokenizer: a transformer encoder over steps and N registers, FSQ of the registers, a
    transformer decoder over steps; as in QueST (2407.15840) and OAT (2602.04215). Mean squared error."""

    def __init__(self, steps, dims, tokens, levels=(8, 5, 5, 5), width=128, depth=2, heads=4):
        super().__init__()
        self.fsq, self.tokens = FSQ(levels), tokens
        layer = dict(nhead=heads, dim_feedforward=4 * width, activation="gelu", batch_first=True, norm_first=True)

        def transformer():
            layers = nn.TransformerEncoderLayer(width, dropout=0.1, **layer)
            return nn.TransformerEncoder(layers, depth, nn.LayerNorm(width), enable_nested_tensor=False)

        self.encoder, self.decoder = transformer(), transformer()
        self.enter, self.leave = nn.Linear(dims, width), nn.Linear(width, dims)
        self.to_latent, self.from_latent = nn.Linear(width, len(levels)), nn.Linear(len(levels), width)
        self.step = nn.Parameter(torch.randn(2, steps, width) * 0.02)
        self.register = nn.Parameter(torch.randn(2, tokens, width) * 0.02)

    def forward(self, x):
        """x (B, T, A) -> its reconstruction (B, T, A)."""
        h = torch.cat([self.enter(x) + self.step[0], self.register[0].expand(len(x), -1, -1)], 1)
        codes, _ = self.fsq(self.to_latent(self.encoder(h)[:, -self.tokens :]))
        h = torch.cat([self.step[1].expand(len(x), -1, -1), self.from_latent(codes) + self.register[1]], 1)
        return self.leave(self.decoder(h)[:, : -self.tokens])


def register_transformer(train, chunks, tokens, steps, batch_size=128, lr=1e-3, mix=0.5, seed=0):
    """RegisterTokenizer trained for `steps` steps with the augmentation and optimizer of train.py."""
    torch.manual_seed(seed)
    draw, train = np.random.default_rng(seed), train.astype(np.float32)
    model = RegisterTokenizer(*chunks.shape[1:], tokens)
    opt = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        opt, lr, steps, pct_start=min(0.3, 100 / steps), cycle_momentum=False
    )
    for _ in range(steps):
        one, two = train[draw.integers(0, len(train), (2, batch_size))]
        weight = np.where(draw.random(batch_size) < 0.5, draw.uniform(-mix, 1 + mix, batch_size), 1.0)[:, None, None]
        x = torch.from_numpy((two + weight * (one - two)).astype(np.float32))
        (model(x) - x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        schedule.step()
        opt.zero_grad(set_to_none=True)
    with torch.no_grad():
        decoded = torch.cat([model.eval()(x) for x in torch.from_numpy(chunks.astype(np.float32)).split(256)]).numpy()
    name = f"register transformer + FSQ, {steps} steps"
    return Coded(name, decoded, np.full(len(chunks), tokens), math.log2(model.fsq.size))


def compare(train, chunks, tokens, codebook_size, register_steps=0, seed=0):
    """All of them. tokens: the numbers of tokens that those of fixed length are measured at, ours first."""
    yield first_action(chunks)
    yield bins256(chunks)
    for n in tokens:
        yield pca(train, chunks, n, codebook_size)
    for points, levels in ((2, 16), (3, 16), (5, 32), (5, 256)):
        yield beast(train, chunks, min(points, chunks.shape[1]), levels)
    try:
        for scale in (1, 2, 5, 10):
            yield fast(train, chunks, scale)
    except ImportError:
        print("FAST is left out: pip install tokenizers", flush=True)
    if register_steps:
        yield register_transformer(train, chunks, tokens[0], register_steps, seed=seed)
