"""What evaluate.py measures of a tokenizer on chunks that it was not trained on."""

import math
from functools import partial

import baselines
import numpy as np
from model import CONTEXT, FSQVQVAE

RATES = (4, 8, 13, 16, 26)  # tokens per chunk of the rate-distortion front: 40 to 260 bits
ENSEMBLE = 0.01  # decay of temporal ensembling, ACT's
MOST = 20_000  # chunks, evenly spaced


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
    )


def in_robot_units(true, decoded):
    """Errors of each dim in the units of the recorded actions."""
    error = np.abs(decoded - true)
    per_chunk = np.sort(error.max(1), 0)  # B A
    return dict(
        mae_per_dim=error.mean((0, 1)).tolist(),
        p99_per_dim=np.quantile(error, 0.99, axis=(0, 1)).tolist(),
        worst_1_percent_per_dim=per_chunk[-max(1, len(error) // 100) :].mean(0).tolist(),
    )


def seams(source, encode, decode, scale, context):
    """Mean step, normalised, from a chunk's last action to the next one's first: true, decoded, and where chunks that
    begin every fifth of a chunk are averaged (temporal ensembling)."""
    T, sums = source.chunk, np.zeros(4)
    stride = next(s for s in range(max(1, T // 5), 0, -1) if T % s == 0)  # so that every T-th step begins a chunk
    weight = np.exp(-ENSEMBLE * np.arange(T))[:, None]  # the newest chunk counts a little more
    for i in np.flatnonzero(source.validation):
        start, length = source.start[i], source.length[i]
        if length < 2 * T:
            continue
        true = source.actions[start : start + length] / scale
        rows = start + np.arange(0, length - T + 1, stride)
        episodes = np.full(len(rows), i)
        known = source.context(rows, episodes, context)
        decoded = decode(encode(source.gather(rows, episodes)[0], context=known), context=known) / scale
        total, weights = np.zeros_like(true), np.zeros((length, 1))
        stitched = np.zeros_like(true)
        for first, chunk in zip(rows - start, decoded, strict=True):
            total[first : first + T] += weight * chunk
            weights[first : first + T] += weight
            if first % T == 0:
                stitched[first : first + T] = chunk
        at = np.arange(T, length - T + 1, T)
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
    )


def structure(source, encode, context, at, indices, error_of, rng):
    """What neighbouring chunks share, and what one wrong token costs."""
    rows, episodes = at
    after = rows + 1 + source.chunk <= (source.start + source.length)[episodes]
    same = None
    if after.any():
        at = rows[after] + 1, episodes[after]
        later = encode(source.gather(*at)[0], context=source.context(*at, context))
        same = float((later == indices[after]).mean())
    flipped, every = indices.copy(), np.arange(len(indices))
    token = rng.integers(0, indices.shape[1], len(indices))
    flipped[every, token] = rng.permutation(indices)[every, token]
    return dict(overlap_after_1_step=same, mse_one_token_of_another_chunk=error_of(flipped))


def robustness(decode, own, size, data, tuples, normalise, rng):
    true, known, indices = data
    failed, farthest = 0, 0.0
    for first in range(0, tuples, 1000):
        count = min(1000, tuples - first)
        random = rng.integers(0, size, (count, indices.shape[1]))
        decoded = decode(random, context=known[rng.integers(0, len(known), count)])
        good = np.isfinite(decoded).all((1, 2)) & (decoded.shape[1:] == true.shape[1:])
        failed += int((~good).sum())
        farthest = max(farthest, float(np.abs(normalise(decoded[good])).max(initial=0.0)))
    outside = (true < np.float32(own["low"])) | (true > np.float32(own["high"]))
    return dict(
        random_tuples=tuples,
        random_tuples_failed=failed,
        random_tuples_farthest=farthest,
        values_outside_training_range=float(outside.mean()),
    )


def front(model, own, sample, true, known, normalise):
    """Rows of our closed form at all RATES, fitted on the training sample: (tokens, bits, decoded)."""
    source = {key: value for key, value in own.items() if key != "levels"}
    sizes = dict(codebook_size=model.config.codebook_size, condition=model.config.condition, hidden_dim=1)
    for tokens in RATES:
        closed = FSQVQVAE.fit([source], [sample], tokens, **sizes).eval()
        bits = sum(float(np.log2(levels).sum()) for levels in closed.sources[0]["levels"])
        yield tokens, bits, normalise(closed.decode(closed.encode(true, context=known), context=known))


def measure(model, name, source, sample, args):
    """All results for one source, and three of its chunks (easy, median, worst) for the figure.

    source: the episodes to evaluate are its validation ones. sample: chunks of the run's own training episodes, that
    the baselines are fitted on, or None.
    """
    condition, rng, own = CONTEXT[model.config.condition], np.random.default_rng(0), model.coder_of(name).source
    rows, episodes = source.starts(validation=True, stride=args.val_stride, whole=True)
    at = rows[:: math.ceil(len(rows) / MOST)], episodes[:: math.ceil(len(rows) / MOST)]
    encode, decode = partial(model.encode, source=name), partial(model.decode, source=name)
    center, scale = np.float32(own["center"]), np.float32(own["scale"])

    def normalise(actions):
        return (actions - center) / scale

    true, known = source.gather(*at)[0], source.context(*at, condition)
    indices = encode(true, context=known)
    decoded = decode(indices, context=known)
    x, x_hat = normalise(true), normalise(decoded)

    def error_of(tokens):
        return float(np.square(normalise(decode(tokens, context=known)) - x).mean())

    results = dict(episodes=len(np.unique(at[1])), chunks=len(x))
    results["reconstruction"] = reconstruction(x, x_hat) | seams(source, encode, decode, scale, condition)
    results["robot_units"] = in_robot_units(true, decoded)
    results["rate"] = rate(indices, own, source)
    results["structure"] = structure(source, encode, condition, at, indices, error_of, rng)
    data, size = (true, known, indices), model.config.codebook_size
    results["robustness"] = robustness(decode, own, size, data, args.random_tuples, normalise, rng)

    N, bits, table = model.num_tokens, results["rate"]["bits"], []

    def row(method, decoded, tokens, bits, undecodable=0):
        return dict(method=method, tokens=tokens, bits=bits, undecodable=undecodable, **reconstruction(x, decoded))

    table.append(row("this", x_hat, N, bits))
    if model.coder_of(name).use_network:
        closed = normalise(decode(indices, context=known, closed_form=True))
        table.append(row("this, closed form alone", closed, N, bits))
    if sample is not None:
        for tokens, bits, closed in front(model, own, sample, true, known, normalise):
            table.append(row("closed form, refitted", closed, tokens, bits))
        # the others see chunks minus what ours are coded relative to
        train, shift = normalise(sample["actions"].numpy()), np.float32(0)
        if condition:
            train, shift = train - normalise(sample["context"].numpy()[:, :1]), normalise(known[:, :1])
        rates = (N, *(n for n in RATES if n != N))
        for coded in baselines.compare(train, x - shift, rates, size, args.register_steps):
            tokens = float(coded.tokens.mean())
            table.append(row(coded.method, coded.decoded + shift, tokens, tokens * coded.token_bits, coded.undecodable))
    results["table"] = table
    order = np.square(x_hat - x).mean((1, 2)).argsort()
    places = dict(easy=0.1, median=0.5, worst=1)
    shown = {f"{source.name} {how}": order[int(q * (len(order) - 1))] for how, q in places.items()}
    return results, {label: (true[i], decoded[i], source.fps) for label, i in shown.items()}
