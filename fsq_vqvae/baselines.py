"""Action codecs without a network, to hold a tokenizer against. All work on chunks (B, T, A) in normalised units.

Each is fitted on training chunks and gives, for held-out chunks, a Coded. None clips what it was not told to clip.
"""

import math
from typing import NamedTuple

import numpy as np
from model import dct_matrix

FAST_VOCABULARY, FAST_CHUNKS = 1024, 4000


class Coded(NamedTuple):
    """Held-out chunks through a codec: decoded (B, T, A), tokens (B,), bits of one token (None: not discrete)."""

    method: str
    decoded: np.ndarray
    tokens: np.ndarray
    token_bits: float | None
    undecodable: int = 0


def constant(method, decoded):
    """A codec that sends nothing."""
    return Coded(method, decoded, np.zeros(len(decoded)), 0.0)


def bins256(chunks):
    """OpenVLA's rule: one token per step and dim; 256 edges on [-1, 1], values beyond are clipped."""
    edges = np.linspace(-1, 1, 256)
    centres = (edges[1:] + edges[:-1]) / 2
    digits = np.clip(np.digitize(np.clip(chunks, -1, 1), edges) - 1, 0, len(centres) - 1)
    return Coded("256 bins", centres[digits], np.full(len(chunks), chunks[0].size), 8.0)


def pca(train):
    """Mean (TA,) and principal directions (TA, TA), the strongest first, of the flattened training chunks."""
    flat = train.reshape(len(train), -1).astype(np.float64)
    mean = flat.mean(0)
    return mean, np.linalg.eigh((flat - mean).T @ (flat - mean))[1][:, ::-1]


def pca_codec(train, chunks, mean, directions, k, levels=None):
    """k principal coordinates, each rounded to one of `levels` even steps over its q0.5 to q99.5 (None: exact)."""
    directions = directions[:, :k]
    k = directions.shape[1]
    z, fitted = ((x.reshape(len(x), -1) - mean) @ directions for x in (chunks, train))
    if levels:
        low, high = np.quantile(fitted, [0.005, 0.995], axis=0)
        width = np.maximum((high - low) / (levels - 1), 1e-12)
        z = low + width * np.clip(np.round((z - low) / width), 0, levels - 1)
    method = f"PCA {k}, {levels} levels" if levels else f"PCA {k}, continuous (ceiling of a linear coder)"
    decoded = (mean + z @ directions.T).reshape(chunks.shape)
    return Coded(method, decoded, np.full(len(chunks), k), math.log2(levels) if levels else None)


def fast(train, chunks, scale):
    """FAST (arXiv 2501.09747): DCT over time, rounded, low frequencies first, as text through byte-level BPE.

    The published fit() seeds the BPE with characters that are not byte-level ones, and can then emit chunks that do
    not decode; all 256 bytes are seeded here. What does not decode is counted, and scored as zeros (as openpi acts).
    As published, coefficients below the smallest of the training chunks are clipped to it: costly where data drift.
    """
    from tokenizers import ByteLevelBPETokenizer, pre_tokenizers, trainers

    T, A = chunks.shape[1:]
    dct = dct_matrix(T).numpy()
    train, numbers = (np.around(dct @ x * scale).astype(np.int64).reshape(len(x), -1) for x in (train, chunks))
    low = train.min()

    def text(row):
        return "".join(map(chr, np.clip(row - low, 0, 0xD7FF)))  # beyond lie surrogates, which are no characters

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a set: its order would change from run to run
    trainer = trainers.BpeTrainer(
        vocab_size=FAST_VOCABULARY,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=alphabet,
        max_token_length=10000,
    )
    bpe = ByteLevelBPETokenizer()
    bpe._tokenizer.train_from_iterator(map(text, train), trainer)
    decoded, tokens, undecodable = np.zeros(chunks.shape), [], 0
    for i, row in enumerate(numbers):
        ids = bpe.encode(text(row)).ids
        back = bpe.decode(ids)
        tokens.append(len(ids))
        if len(back) == T * A and "\ufffd" not in back:
            decoded[i] = dct.T @ ((np.array([ord(c) for c in back]) + low) / scale).reshape(T, A)
        else:
            undecodable += 1
    method = f"FAST, scale {scale}, full alphabet"
    return Coded(method, decoded, np.array(tokens), math.log2(FAST_VOCABULARY), undecodable)


def compare(train, chunks, tokens, vocabulary, numbers):
    """All baselines. tokens, vocabulary: of the tokenizer; numbers: how many values its tokens hold together."""
    mean, directions = pca(train)
    yield constant("mean chunk", np.broadcast_to(mean.reshape(chunks[0].shape), chunks.shape))
    yield constant("hold first (given it)", np.broadcast_to(chunks[:, :1], chunks.shape))
    yield bins256(chunks)
    some = train[:: math.ceil(len(train) / FAST_CHUNKS)]
    for scale in (2, 10):
        try:
            yield fast(some, chunks, scale)
        except ImportError:
            print("the FAST baseline is left out: pip install tokenizers", flush=True)
            break
    for k, levels in ((tokens, vocabulary), (2 * tokens, math.isqrt(vocabulary)), (2 * tokens, vocabulary)):
        yield pca_codec(train, chunks, mean, directions, k, levels)
    yield pca_codec(train, chunks, mean, directions, numbers)
