"""What evaluate.py computes: image quality, use of the codes, and probes from latents to actions. Nothing here reads
files. Arrays are float64 unless said otherwise; n pairs, N slots, K codes, D features, A action dims."""

import numpy as np
import torch
import torch.nn.functional as F

LAMBDAS = np.logspace(3, -5, 9)  # strongest first: a tie, or nothing to choose by, falls on the safe side
FOLDS = 3

# --- images


def psnr(mse):
    """Decibels on [0, 1]; None for a perfect image."""
    return float(-10 * np.log10(mse)) if mse > 0 else None


def minus(a, b):
    return None if a is None or b is None else a - b


def ssim(a, b):
    """Structural similarity (Wang et al. 2004, Gaussian window of 11, sigma 1.5) of (B, C, H, W) in [0, 1] -> (B,).

    Only where the whole window fits; images smaller than it get a smaller window.
    """
    width = min(11, (min(a.shape[2:]) - 1) // 2 * 2 + 1)
    window = torch.exp(-((torch.arange(width, device=a.device) - width // 2) ** 2) / (2 * 1.5**2))
    window = torch.outer(window, window) / window.sum() ** 2

    def mean(x):
        return F.conv2d(x.flatten(0, 1)[:, None], window[None, None])[:, 0].unflatten(0, x.shape[:2])

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, both = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return (top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean((1, 2, 3))


# --- codes


def health(counts, K):
    """Of a histogram: perplexity exp(-sum p ln p), usage (share of the K codes with p > 1 / 10 K), commonest share."""
    p = counts / counts.sum()
    seen = p[p > 0]
    perplexity = float(np.exp(-(seen * np.log(seen)).sum()))
    return dict(perplexity=perplexity, usage=float((p > 0.1 / K).sum() / K), commonest=float(p.max()))


def histograms(codes, K):
    """codes (n, N) -> shares (N, K) of each code in each slot."""
    return np.stack([np.bincount(slot, minlength=K) for slot in codes.T]) / len(codes)


def words_of(codes):
    """codes (n, N) -> (n,) the number of each pair's word among the distinct ones."""
    return np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1)


def eta_squared(y, word):
    """Share of the variance of each dim of y (n, A) that lies between words, (A,); and what chance alone gives it.

    1 - within / total. n pairs in W words, dealt at random, have (W - 1) / (n - 1) on average.
    """
    W, n = word.max() + 1, len(word)
    sums = np.zeros((W, y.shape[1]))
    np.add.at(sums, word, y)
    within = np.square(y - (sums / np.bincount(word)[:, None])[word]).sum(0)
    total = np.square(y - y.mean(0)).sum(0)
    moves = total > 1e-12 * n
    return np.where(moves, 1 - within / np.where(moves, total, 1), np.nan), (W - 1) / max(n - 1, 1)


def one_hot(codes, K):
    """codes (n, N) -> (n, N K)."""
    return np.eye(K)[codes].reshape(len(codes), -1)


# --- probes: fitted on some pairs, scored on pairs of other episodes


def standardise(x, *others):
    """Each minus x's mean, over x's deviation; at least a tenth of the largest one, or noise in a still pixel grows."""
    center, scale = x.mean(0), x.std(0)
    scale = np.maximum(scale, 0.1 * scale.max() + 1e-12)
    return [(each - center) / scale for each in (x, *others)]


def ridge(x, y, x_test, lambdas=LAMBDAS):
    """Closed-form ridge with intercept on standardised features, for every lambda: predictions (L, n', A).

    Minimises ||x W - y||^2 / n + lambda ||W||^2. Solved over features or over pairs, whichever are fewer.
    """
    x, x_test = standardise(x, x_test)
    center = y.mean(0)
    if len(x) < x.shape[1]:
        gram, left, right = x @ x.T, x_test @ x.T, y - center
    else:
        gram, left, right = x.T @ x, x_test, x.T @ (y - center)
    values, axes = np.linalg.eigh(gram)
    left, right = left @ axes, axes.T @ right
    values = values[:, None].clip(min=0)
    return np.stack([center + left @ (right / (values + lam * len(x))) for lam in lambdas])


def probe(x, y, episodes, x_test):
    """Ridge predictions (n', A), each dim with the lambda that is best over folds of the training episodes alone."""
    number = np.unique(episodes, return_inverse=True)[1]
    fold = number % FOLDS if number.max() > 0 else np.arange(len(x)) * FOLDS // len(x)  # one episode: its thirds
    errors = np.zeros((len(LAMBDAS), y.shape[1]))
    for out in np.unique(fold):
        if (fold != out).any():
            guess = ridge(x[fold != out], y[fold != out], x[fold == out])
            errors += np.square(guess - y[fold == out]).sum(1)
    best = errors.argmin(0)
    return np.take_along_axis(ridge(x, y, x_test), best[None, None], 0)[0]


# --- scores


def nmse(true, guess):
    """MSE of each dim over its variance among `true` (n, A), (A,); nan where a dim does not move. R2 is 1 - NMSE."""
    variance = true.var(0)
    moves = variance > 1e-8 * np.maximum(1e-4, np.square(true).mean(0))
    return np.where(moves, np.square(guess - true).mean(0) / np.where(moves, variance, 1), np.nan)


def weighted_r2(true, guess):
    """R2 of all dims together, each weighing as much as it moves: 1 - sum of MSE / sum of variances; None if still."""
    total = true.var(0).sum()
    return float(1 - np.square(guess - true).mean(0).sum() / total) if total > 0 else None


def classes(y, most=10):
    """Distinct values of y (n,), equal up to 1e-4 of its range: (n,) int, or None if there is one or over `most`."""
    step = 1e-4 * np.ptp(y)
    index = np.unique(np.round(y / step), return_inverse=True)[1] if step > 0 else np.zeros(1, int)
    return index if 1 <= index.max() < most else None


def directions(y, most=17):
    """Moves y (n, 2) -> (n,) int, which of a few directions (or staying) each is, or None if there are over `most`."""
    length = np.hypot(*y.T)
    degrees = np.round(np.degrees(np.arctan2(y[:, 1], y[:, 0]))) % 360
    index = np.unique(np.where(length > 1e-3 * length.max(), degrees, -1), return_inverse=True)[1]
    return index if 1 <= index.max() < most else None


def accuracies(true, guess):
    """Share of right classes, and its mean over the true classes, each counting the same."""
    right = true == guess
    return float(right.mean()), float(np.mean([right[true == kind].mean() for kind in np.unique(true)]))


# --- the probe of one source


def average(values):
    """Mean of the finite ones; None without any."""
    values = np.asarray(values, float)
    return float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else None


def plain(values):
    """(n,) as a list for JSON, None where it is not a number."""
    return [float(value) if np.isfinite(value) else None for value in values]


def table(features, y, episode, folds):
    """One row of scores per entry of features {method: (n, D)}; y (n, A), episode (n,), folds [(training, test rows)].

    Tests are scored together over all folds. A dim of few values is also classified, as the one nearest to its
    prediction; so is the direction of a 2-D move, by ridge on one-hot directions of which the largest wins.
    """
    A, kinds = y.shape[1], {dim: classes(y[:, dim]) for dim in range(y.shape[1])}
    kinds = {dim: kind for dim, kind in kinds.items() if kind is not None}
    move = directions(y) if A == 2 else None
    targets = y if move is None else np.concatenate([y, np.eye(move.max() + 1)[move]], 1)
    test = np.concatenate([out for _, out in folds])
    for method, x in features.items():
        guess = np.concatenate([probe(x[fit], targets[fit], episode[fit], x[out]) for fit, out in folds])
        guess, votes = guess[:, :A], guess[:, A:]
        error, scores = nmse(y[test], guess), {}
        for dim, kind in kinds.items():
            values = np.array([y[kind == k, dim].mean() for k in range(kind.max() + 1)])
            nearest = np.abs(guess[:, dim, None] - values).argmin(1)
            scores[f"dim {dim}"] = accuracies(kind[test], nearest)
        if move is not None:
            scores["move"] = accuracies(move[test], votes.argmax(1))
        each = {int(e): episode[test] == e for e in np.unique(episode[test])}
        yield dict(
            method=method,
            r2=average(1 - error),
            r2_weighted=weighted_r2(y[test], guess),
            nmse=average(error),
            r2_per_dim=plain(1 - error),
            nmse_per_dim=plain(error),
            r2_per_episode={e: average(1 - nmse(y[test][rows], guess[rows])) for e, rows in each.items()},
            accuracy={what: score[0] for what, score in scores.items()},
            balanced_accuracy={what: score[1] for what, score in scores.items()},
        )


def few_shot(features, y, episode, folds, seed):
    """R2 (mean over dims, then over draws) against the number of labelled training episodes: 1, 2, 4, ..., all.

    features: {name: (n, D)}, each probed; the drawn episodes are the same for all of them.
    """
    most = min(len(np.unique(episode[fit])) for fit, _ in folds)
    test = np.concatenate([out for _, out in folds])
    for count in [*(2**i for i in range(20) if 2**i < most), most]:
        scores = {name: [] for name in features}
        for draw in range(1 if len(folds) > 1 or count == most else 3):
            order = [np.random.default_rng([seed, draw]).permutation(np.unique(episode[fit])) for fit, _ in folds]
            some = [fit[np.isin(episode[fit], e[:count])] for (fit, _), e in zip(folds, order, strict=True)]
            for name, x in features.items():
                sides = zip(some, folds, strict=True)
                guess = [probe(x[fit], y[fit], episode[fit], x[out]) for fit, (_, out) in sides]
                scores[name].append(average(1 - nmse(y[test], np.concatenate(guess))))
        yield dict(episodes=count, **{name: average(values) for name, values in scores.items()})
