"""What evaluate.py measures of a tokenizer on chunks that it was not trained on."""

import math
import time

import baselines
import numpy as np
import torch
from model import CONTEXT, FSQVQVAE

RATES = (4, 8, 13, 16, 26)  # tokens per chunk of the rate-distortion front: 40 to 260 bits
ENSEMBLE = 0.01  # decay of temporal ensembling, ACT's


def in_batches(function, size, *arrays):
    """`function` over batches of the arrays' rows, the results joined."""
    parts = [function(*(a[i : i + size] for a in arrays)) for i in range(0, len(arrays[0]), size)]
    return np.concatenate(parts)


class Tokenizer:
    """The model for one source, on arrays: chunks (B, T, A), robot units, and contexts (B, R, A) <-> indices (B, N)."""

    def __init__(self, model, name, batch_size=256):
        self.model, self.name, self.batch_size = model, name, batch_size

    def encode(self, chunks, context, mask=None):
        mask = np.ones(chunks.shape[:2], bool) if mask is None else mask

        def some(chunks, context, mask):
            return self.model.encode(chunks, mask, self.name, context)

        return in_batches(some, self.batch_size, chunks, context, mask)

    def decode(self, indices, context, **more):
        def some(indices, context):
            return self.model.decode(indices, self.name, context, **more)

        return in_batches(some, self.batch_size, indices, context)


def ratio(a, b):
    return float(a / b) if b > 0 else None


def jerk(x):
    """Mean size of the third difference over time of (B, T, A); 0 where a chunk is too short to have one."""
    return np.abs(np.diff(x, n=3, axis=1)).mean() if x.shape[1] > 3 else 0.0


def entropy(counts):
    """Bits per draw; counts above 0."""
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())


def reconstruction(true, decoded):
    """true, decoded (B, T, A), both normalised. worst_1_percent: mean squared error of the worst chunks."""
    error, variance = decoded - true, true.var((0, 1))
    moves = variance > 1e-8  # a dim that never moves has no NMSE
    per_chunk = np.sort(np.square(error).mean((1, 2)))
    return dict(
        mse=float(per_chunk.mean()),
        nmse=float((np.square(error).mean((0, 1))[moves] / variance[moves]).mean()) if moves.any() else None,
        mae=float(np.abs(error).mean()),
        p99=float(np.quantile(np.abs(error), 0.99)),
        worst_1_percent=float(per_chunk[-max(1, len(per_chunk) // 100) :].mean()),
        jerk=ratio(jerk(decoded), jerk(true)),
    )


def in_robot_units(true, decoded):
    """Errors of each dim in the units of the recorded actions."""
    error = np.abs(decoded - true)
    per_chunk = error.max(1)  # B A
    return dict(
        mae_per_dim=error.mean((0, 1)).tolist(),
        p99_per_dim=np.quantile(error, 0.99, axis=(0, 1)).tolist(),
        worst_1_percent_per_dim=np.quantile(per_chunk, 0.99, axis=0).tolist(),
    )


def seams(source, tokenizer, scale, context):
    """Mean step, normalised, from a chunk's last action to the next one's first: true, decoded, and where chunks that
    begin every fifth of a chunk are averaged (temporal ensembling)."""
    T, sums = source.chunk, np.zeros(4)
    for i in np.flatnonzero(source.validation):
        start, length = source.start[i], source.length[i]
        if length < 2 * T:
            continue
        true = source.actions[start : start + length] / scale
        rows = start + np.arange(0, length - T + 1, max(1, T // 5))
        episodes = np.full(len(rows), i)
        known = source.context(rows, episodes, context)
        decoded = tokenizer.decode(tokenizer.encode(source.gather(rows, episodes)[0], known), known) / scale
        total, weights = np.zeros_like(true), np.zeros((length, 1))
        stitched = np.zeros_like(true)
        for first, chunk in zip(rows - start, decoded, strict=True):
            weight = np.exp(ENSEMBLE * first) * np.ones((T, 1))  # the newest chunk counts a little more
            total[first : first + T] += weight * chunk
            weights[first : first + T] += weight
            if first % T == 0:
                stitched[first : first + T] = chunk
        at = np.arange(T, length - T + 1, T)
        at = at[np.isin(at, rows - start) & np.isin(at - T, rows - start)]
        mean = total / np.maximum(weights, 1e-9)
        steps = [np.abs(x[at] - x[at - 1]).mean(1).sum() for x in (true, stitched, mean)]
        sums += [*steps, len(at)]
    names = ("seam_true", "seam_decoded", "seam_with_ensembling")
    return {name: float(value / sums[3]) if sums[3] else None for name, value in zip(names, sums[:3], strict=True)}


def rate(indices, own, source):
    sizes = [math.prod(levels) for levels in own["levels"]]
    counts = [np.unique(column, return_counts=True)[1] for column in indices.T]
    return dict(
        tokens=len(sizes),
        tokens_per_s=len(sizes) * source.fps / source.chunk if source.fps else None,
        codes_per_token=sizes,
        bits=float(np.log2(sizes).sum()),
        entropy_bits=sum(map(entropy, counts)),
        codebook_usage=[len(count) / size for count, size in zip(counts, sizes, strict=True)],
        times_fewer_bits_than_256_bins=8 * source.chunk * source.actions.shape[1] / float(np.log2(sizes).sum()),
    )


def structure(source, tokenizer, rows, episodes, data, normalise, rng):
    """What each token says, what neighbouring chunks share, and what one wrong token costs."""
    true, known, indices = data
    N = indices.shape[1]

    def mse(tokens, **more):
        return float(np.square(normalise(tokenizer.decode(tokens, known, **more)) - normalise(true)).mean())

    shifted = rows + 1 + source.chunk <= (source.start + source.length)[episodes]
    same = None
    if shifted.any():
        at = rows[shifted] + 1, episodes[shifted]
        later = tokenizer.encode(source.gather(*at)[0], source.context(*at, CONTEXT[tokenizer.model.config.condition]))
        same = float((later == indices[shifted]).mean())
    flipped = indices.copy()
    token = rng.integers(0, N, len(indices))
    flipped[np.arange(len(indices)), token] = rng.permutation(indices)[np.arange(len(indices)), token]
    return dict(
        prefix_mse=[mse(indices, prefix=n) for n in range(1, N + 1)],
        overlap_after_1_step=same,
        mse_one_token_of_another_chunk=mse(flipped),
    )


def robustness(tokenizer, own, data, tuples, normalise, rng):
    true, known, indices = data
    size, failed, farthest = tokenizer.model.config.codebook_size, 0, 0.0
    for first in range(0, tuples, tokenizer.batch_size):
        count = min(tokenizer.batch_size, tuples - first)
        decoded = tokenizer.decode(
            rng.integers(0, size, (count, indices.shape[1])), known[rng.integers(0, len(known), count)]
        )
        good = np.isfinite(decoded).all((1, 2)) & (decoded.shape[1:] == true.shape[1:])
        failed += int((~good).sum())
        farthest = max(farthest, float(np.abs(normalise(decoded[good])).max(initial=0.0)))
    mask = np.arange(true.shape[1]) < rng.integers(1, true.shape[1] + 1, (len(true), 1))
    noise = np.where(mask[..., None], true, rng.normal(0, 100, true.shape).astype(np.float32))
    outside = (true < np.float32(own["low"])) | (true > np.float32(own["high"]))
    return dict(
        random_tuples=tuples,
        random_tuples_failed=failed,
        random_tuples_farthest=farthest,
        tokens_changed_by_pad_content=int(
            (tokenizer.encode(true, known, mask) != tokenizer.encode(noise, known, mask)).sum()
        ),
        values_outside_training_range=float(outside.mean()),
    )


def speed(tokenizer, data):
    """Median milliseconds of a call, arrays in and out (so a device has finished), after one call to warm up."""
    model, (true, known, indices) = tokenizer.model, data
    results = dict(parameters=sum(p.numel() for p in model.parameters()), threads=torch.get_num_threads())
    for size, repeats in ((1, 50), (256, 5)):
        some = np.arange(size) % len(true)
        x, c, i = true[some], known[some], indices[some]
        for what, call in dict(
            encode=lambda x=x, c=c: model.encode(x, source=tokenizer.name, context=c),
            decode=lambda i=i, c=c: model.decode(i, tokenizer.name, c),
            decode_closed_form=lambda i=i, c=c: model.decode(i, tokenizer.name, c, closed_form=True),
        ).items():
            call()
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            results[f"{what}_ms_batch_{size}"] = 1e3 * float(np.median(times))
    return results


def front(model, own, sample, true, known, normalise):
    """Rows of our closed form at all RATES, fitted on the training sample: (tokens, bits, decoded)."""
    source = {key: value for key, value in own.items() if key != "levels"}
    for tokens in RATES:
        sizes = dict(codebook_size=model.config.codebook_size, condition=model.config.condition, hidden_dim=1)
        closed = FSQVQVAE.fit([source], [sample], tokens, **sizes).eval()
        tokenizer = Tokenizer(closed, own["name"])
        bits = sum(float(np.log2(levels).sum()) for levels in closed.sources[0]["levels"])
        yield tokens, bits, normalise(tokenizer.decode(tokenizer.encode(true, known), known))


def measure(model, name, source, sample, args):
    """All results for one source, and three of its chunks (easy, median, worst) for the figure.

    source: the episodes to evaluate are its validation ones. sample: chunks of the run's own training episodes, that
    the baselines are fitted on, or None.
    """
    condition = CONTEXT[model.config.condition]
    rows, episodes = source.starts(validation=True, stride=args.val_stride, whole=True)
    rng, own = np.random.default_rng(args.seed), model.coder_of(name).source
    center, scale = np.float32(own["center"]), np.float32(own["scale"])
    tokenizer = Tokenizer(model, name, args.batch_size)

    def normalise(actions):
        return (actions - center) / scale

    true, known = source.gather(rows, episodes)[0], source.context(rows, episodes, condition)
    indices = tokenizer.encode(true, known)
    data, decoded = (true, known, indices), tokenizer.decode(indices, known)
    x, x_hat = normalise(true), normalise(decoded)
    results = dict(episodes=len(np.unique(episodes)), chunks=len(rows))
    results["reconstruction"] = reconstruction(x, x_hat) | seams(source, tokenizer, scale, condition)
    results["robot_units"] = in_robot_units(true, decoded)
    results["rate"] = rate(indices, own, source)
    results["structure"] = structure(source, tokenizer, rows, episodes, data, normalise, rng)
    results["robustness"] = robustness(tokenizer, own, data, args.random_tuples, normalise, rng)
    results["speed"] = speed(tokenizer, data)

    N, bits, table = model.num_tokens, results["rate"]["bits"], []

    def row(method, decoded, tokens, bits, undecodable=0):
        return dict(method=method, tokens=tokens, bits=bits, undecodable=undecodable, **reconstruction(x, decoded))

    table.append(row("this", x_hat, N, bits))
    if model.coder_of(name).use_network:
        table.append(
            row("this, closed form alone", normalise(tokenizer.decode(indices, known, closed_form=True)), N, bits)
        )
    if sample is not None:
        for tokens, bits, closed in front(model, own, sample, true, known, normalise):
            table.append(row("closed form, refitted", closed, tokens, bits))
        # the others see chunks minus what ours are coded relative to
        train, shift = normalise(sample["actions"].numpy()), np.float32(0)
        if condition:
            train, shift = train - normalise(sample["context"].numpy()[:, :1]), normalise(known[:, :1])
        rates = (N, *(n for n in RATES if n != N))
        size = model.config.codebook_size
        for coded in baselines.compare(train, x - shift, rates, size, args.register_steps, args.seed):
            tokens = float(coded.tokens.mean())
            table.append(row(coded.method, coded.decoded + shift, tokens, tokens * coded.token_bits, coded.undecodable))
    results["table"] = table
    order = np.square(x_hat - x).mean((1, 2)).argsort()
    shown = {
        f"{name} {how}": order[int(q * (len(order) - 1))] for how, q in dict(easy=0.1, median=0.5, worst=1).items()
    }
    return results, {label: (true[i], decoded[i], source.fps) for label, i in shown.items()}
