"""The sections of the report card: what evaluate.py measures of a tokenizer on one source's held-out chunks."""

import math
import time

import baselines
import numpy as np
import torch
import torch.nn.functional as F
from model import dct_matrix

SIGMAS = (1e-2, 3e-2, 1e-1, 3e-1)
FIT_CHUNKS = 20_000  # that the baselines are fitted on, evenly spaced


def in_batches(function, size, *arrays):
    """`function` over batches of the arrays' rows, the results joined."""
    parts = [function(*(a[i : i + size] for a in arrays)) for i in range(0, len(arrays[0]), size)]
    return np.concatenate(parts)


class Coder:
    """The model for one source, on arrays: chunks (B, T, A) in robot units <-> indices (B, N)."""

    def __init__(self, model, name, batch_size):
        self.model, self.name, self.batch_size = model, name, batch_size

    def encode(self, chunks, mask=None):
        mask = np.ones(chunks.shape[:2], bool) if mask is None else mask
        return in_batches(lambda x, m: self.model.encode(x, m, self.name), self.batch_size, chunks, mask)

    def decode(self, indices, first, prefix=None):
        """first (B, A): the chunks' first actions, which only a `relative` model is given."""

        def some(i, a):
            return self.model.decode(i, self.name, prefix, start=a if self.model.relative else None)

        return in_batches(some, self.batch_size, indices, first)

    @torch.no_grad()
    def encode_bf16(self, chunks):
        """What encode would give under autocast; the tokenizer itself always encodes in float32."""
        model, device = self.model, self.model.mean.device

        def some(chunk):
            x = F.pad(torch.from_numpy(chunk).to(device), (0, model.dim - chunk.shape[2]))
            source = torch.full((len(x),), model.source_index(self.name), device=device)
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=device)
            with torch.autocast(device.type, torch.bfloat16):
                return model.quantise(model.normalise(x, mask, source), source)[1].cpu().numpy()

        return in_batches(some, self.batch_size, chunks)


def ratio(a, b):
    return float(a / b) if b > 0 else None


def jerk(x):
    """Mean size of the third difference over time of (B, T, A); 0 where a chunk is too short to have one."""
    return np.abs(np.diff(x, n=3, axis=1)).mean() if x.shape[1] > 3 else 0.0


def entropy(counts):
    """Bits per draw."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


# --- the sections of the card; each gives {name: number, list or None (not defined here)}


def reconstruction(true, decoded):
    """true, decoded (B, T, A), both normalised."""
    error, variance = decoded - true, true.var((0, 1))
    moves = variance > 1e-8  # a dim that never moves has no NMSE
    size, squared = np.abs(error), np.square(error)
    worst = size.max((1, 2))  # B
    spectrum = np.square(dct_matrix(true.shape[1]).numpy() @ error).mean((0, 2)) / true.shape[1]  # sums to the MSE
    low, mid, high = (float(band.sum()) for band in np.array_split(spectrum, 3))
    return dict(
        mse=float(squared.mean()),
        nmse=float((squared.mean((0, 1))[moves] / variance[moves]).mean()) if moves.any() else None,
        mae=float(size.mean()),
        p99=float(np.quantile(size, 0.99)),
        max=float(size.max()),
        **{f"vrr_{sigma:g}": float((worst < sigma).mean()) for sigma in SIGMAS},
        mse_low=low,
        mse_mid=mid,
        mse_high=high,
        jerk=ratio(jerk(decoded), jerk(true)),
        mae_per_dim=size.mean((0, 1)).tolist(),
    )


def two_valued(rows):
    """Dims of (n, A) whose values all lie within 5 % of the span from the lowest or the highest, and the middles."""
    low, high = rows.min(0), rows.max(0)
    near = np.minimum(rows - low, high - rows).max(0) <= 0.05 * (high - low)
    return np.flatnonzero(near & (high > low)), (low + high) / 2


def boundary(source, coder, scale):
    """Mean step, normalised, from a chunk's last action to the next one's first: decoded, true, and their ratio."""
    rows, episodes = source.starts(validation=True, stride=source.chunk, whole=True)
    follows = np.flatnonzero(episodes[1:] == episodes[:-1])
    if not len(follows):
        return dict(boundary_jump=None, boundary_jump_true=None, boundary_ratio=None)
    true = source.gather(rows, episodes)[0]
    decoded = coder.decode(coder.encode(true), true[:, 0])
    ours, theirs = (float((np.abs(x[follows + 1, 0] - x[follows, -1]) / scale).mean()) for x in (decoded, true))
    return dict(boundary_jump=ours, boundary_jump_true=theirs, boundary_ratio=ratio(ours, theirs))


def rate(indices, vocabulary, about):
    N, steps = indices.shape[1], about["chunk"]
    bits = N * math.log2(vocabulary)
    return dict(
        tokens=N,
        tokens_per_s=N * about["fps"] / steps if about["fps"] else None,
        bits=bits,
        entropy_bits=N * entropy(np.bincount(indices.ravel())),
        times_fewer_tokens_than_256_bins=steps * about["action_dim"] / N,
        times_fewer_bits_than_256_bins=8 * steps * about["action_dim"] / bits,
    )


def codebook(indices, fsq):
    counts = np.bincount(indices.ravel(), minlength=fsq.size)
    codes = fsq.codes(torch.from_numpy(indices).to(fsq.width.device))
    digits = ((codes + 1) * fsq.width).round().long().cpu().numpy()  # B N L
    levels = [np.bincount(digits[..., i].ravel(), minlength=n) for i, n in enumerate(fsq.levels.tolist())]
    return dict(
        usage=float((counts > 0).mean()),
        token_samples=int(counts.sum()),
        most_usage_these_samples_allow=min(1.0, counts.sum() / fsq.size),
        perplexity=2 ** entropy(counts),
        normalised_entropy=entropy(counts) / math.log2(fsq.size),
        bits_per_slot=[entropy(np.bincount(slot)) for slot in indices.T],
        dead_levels=int(sum((level == 0).sum() for level in levels)),
        level_counts=[level.tolist() for level in levels],
        code_counts=counts.tolist(),
    )


def structure(source, coder, rows, episodes, true, indices, normal, rng):
    """normal: robot units -> normalised. What neighbouring chunks share and what each slot says."""
    N = indices.shape[1]
    shifts = rows + 1 + source.chunk <= (source.start + source.length)[episodes]
    same = (
        coder.encode(source.gather(rows[shifts] + 1, episodes[shifts])[0]) == indices[shifts] if shifts.any() else None
    )

    def mse(tokens, prefix=None):
        return float(np.square(normal(coder.decode(tokens, true[:, 0], prefix)) - normal(true)).mean())

    two = rng.permuted(np.tile(np.arange(N), (len(indices), 1)), axis=1)[:, :2]
    swapped = indices.copy()
    np.put_along_axis(swapped, two, np.take_along_axis(indices, two[:, ::-1], 1), 1)
    return dict(
        prefix_mse=[mse(indices, n) for n in range(1, N + 1)] if coder.model.ordered else None,
        overlap_after_1_step=None if same is None else float(same.mean()),
        overlap_per_slot=None if same is None else same.mean(0).tolist(),
        mse_two_slots_swapped=mse(swapped) if N > 1 else None,
    )


def robustness(coder, about, true, indices, tuples, normal, rng):
    model, (N, T) = coder.model, (indices.shape[1], about["chunk"])
    failed, farthest = 0, 0.0
    for first in range(0, tuples, coder.batch_size):
        size = min(coder.batch_size, tuples - first)
        draw = rng.integers(0, model.fsq.size, (size, N))
        decoded = coder.decode(draw, true[rng.integers(0, len(true), size), 0])
        good = np.isfinite(decoded).all((1, 2)) & (decoded.shape == (size, T, about["action_dim"]))
        failed += int((~good).sum())
        farthest = max(farthest, float(np.abs(normal(decoded[good])).max(initial=0.0)))

    fsq, every = model.fsq, torch.arange(model.fsq.size, device=model.mean.device)
    reach = (fsq.codes(every) * fsq.width + fsq.offset) / fsq.reach
    codes, back = fsq(torch.atanh(reach.clamp(-0.9999, 0.9999)) - fsq.shift)  # the "paper" bound ends short of +-1

    length = rng.integers(1, T + 1, len(true))
    mask = np.arange(T) < length[:, None]
    noise = np.where(mask[..., None], true, rng.normal(0, 100, true.shape).astype(np.float32))
    outside = (true < np.float32(about["low"])) | (true > np.float32(about["high"]))
    return dict(
        random_tuples=tuples,
        random_tuples_failed=failed,
        random_tuples_farthest=farthest,
        codes_changed_in_round_trip=int(((back != every) | (codes - fsq.codes(every)).abs().amax(-1).gt(1e-5)).sum()),
        tokens_changed_by_pad_content=int((coder.encode(true, mask) != coder.encode(noise, mask)).sum()),
        values_outside_training_range=float(outside.mean()),
        chunks_outside_training_range=float(outside.any((1, 2)).mean()),
        tokens_equal_in_bf16=float((coder.encode_bf16(true) == indices).mean()),
    )


def speed(model, name, true, indices):
    """Median milliseconds of a call, arrays in and out (so a device has finished), after one call to warm up."""
    card = dict(parameters=sum(p.numel() for p in model.parameters()), threads=torch.get_num_threads())
    for size, repeats in ((1, 20), (256, 5)):
        some = np.arange(size) % len(true)
        x, i, first = true[some], indices[some], true[some, 0] if model.relative else None
        for what, call in (
            ("encode", lambda x=x: model.encode(x, source=name)),
            ("decode", lambda i=i, first=first: model.decode(i, name, start=first)),
        ):
            call()
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            card[f"{what}_ms_batch_{size}"] = 1e3 * float(np.median(times))
    return card


def measure(model, source, args):
    """The card of one source, and three of its chunks (easy, median, worst) for the figure; None if it has none."""
    rows, episodes = source.starts(validation=True, stride=args.val_stride, whole=True)
    fit_rows, fit_episodes = source.starts(validation=False, whole=True)
    if not len(rows) or not len(fit_rows):
        return None
    rng = np.random.default_rng(args.seed)
    name, about = source.name, model.sources[model.names.index(source.name)]
    center, scale = np.float32(about["center"]), np.float32(about["scale"])
    coder = Coder(model, name, args.batch_size)

    def normal(actions):
        return (actions - center) / scale

    true = source.gather(rows, episodes)[0]
    indices = coder.encode(true)
    decoded = coder.decode(indices, true[:, 0])
    x, x_hat = normal(true), normal(decoded)
    card = dict(episodes=len(np.unique(episodes)), chunks=len(rows), reconstruction=reconstruction(x, x_hat))
    binary, middle = two_valued(source.rows(validation=False))
    right = (decoded > middle) == (true > middle)
    card["reconstruction"] |= boundary(source, coder, scale) | dict(
        mae_raw=float(np.abs(decoded - true).mean()),
        mae_raw_per_dim=np.abs(decoded - true).mean((0, 1)).tolist(),
        two_valued_dims=binary.tolist(),
        two_valued_accuracy=right[..., binary].mean((0, 1)).tolist(),
    )
    card["rate"] = rate(indices, model.fsq.size, about)
    card["codebook"] = codebook(indices, model.fsq)
    card["structure"] = structure(source, coder, rows, episodes, true, indices, normal, rng)
    card["robustness"] = robustness(coder, about, true, indices, args.random_tuples, normal, rng)
    card["speed"] = speed(model, name, true, indices)

    # the baselines see what the model sees: chunks minus their first action if it is relative
    some = np.linspace(0, len(fit_rows) - 1, min(len(fit_rows), FIT_CHUNKS)).astype(int)
    train = normal(source.gather(fit_rows[some], fit_episodes[some])[0])
    train, shift = (train - train[:, :1], x[:, :1]) if model.relative else (train, 0.0)
    N, K = model.num_tokens, model.fsq.size
    ours = baselines.Coded("FSQVQVAE", x_hat - shift, np.full(len(x), N), math.log2(K))
    card["table"] = []
    for coded in (ours, *baselines.compare(train, x - shift, N, K, N * len(model.fsq.levels))):
        card["table"].append(
            dict(
                method=coded.method,
                tokens=float(coded.tokens.mean()),
                tokens_p95=float(np.quantile(coded.tokens, 0.95)),
                bits=None if coded.token_bits is None else float(coded.tokens.mean()) * coded.token_bits,
                undecodable=coded.undecodable,
                **reconstruction(x, coded.decoded + shift),
            )
        )
    order = np.square(x_hat - x).mean((1, 2)).argsort()
    shown = {
        f"{name} {how}": order[int(q * (len(order) - 1))] for how, q in dict(easy=0.1, median=0.5, worst=1).items()
    }
    return card, {label: (true[i], decoded[i], about["fps"]) for label, i in shown.items()}
