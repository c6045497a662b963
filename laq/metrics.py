"""What a latent action model is measured by: images, codebooks, and probes from latents to the robot's motion.

Nothing here reads files. Letters: n pairs, N code positions, K codes of each, D features, A dims of the motion, E
episodes. Numpy arrays are float64 unless said otherwise.
"""

import numpy as np
import torch
from quantizer import all_gather, ranks

LAMBDAS = np.logspace(3, -5, 9)  # of ridge, strongest first: a tie, or nothing to choose by, falls on the safe side
FOLDS = 3  # of the fitted episodes, to choose lambda
TURN = (2 * np.pi, 360.0)  # a dim whose values span a full turn and jump by more than half of it is an angle

# --- images


def psnr(mse):
    """Decibels of images in [0, 1]; 100 for a perfect one."""
    return float(-10 * np.log10(max(mse, 1e-10)))


@torch.no_grad()
def assess(model, first, second):
    """Pairs (B 3 S S) -> errors (B 3), decoded second frames (B 3 S S), codes (B N).

    errors: mean squared error of each second frame decoded from its codes, from shuffled codes (those of the next
    pair), and of a copy of the first frame.
    """
    decoded, shuffled, codes = model.reconstruct(first, second)
    errors = torch.stack([(x.float() - second).square().mean((1, 2, 3)) for x in (decoded, shuffled, first)], 1)
    return errors, decoded, codes


def code_sensitivity(model, frames, most=64):
    """How much the decoder relies on its codes, or on its vectors before quantization starts, during training.

    frames (B 2 3 S S) of each rank, of which about `most` are taken in all; every rank has to call this.
    """
    model.eval()
    errors, _, _ = assess(model, *all_gather(frames[: max(1, most // ranks()[1])]).unbind(1))
    model.train()
    return reconstruction_metrics(errors.cpu())["code_sensitivity"]


def reconstruction_metrics(errors):
    """errors (n 3) of `assess` -> {mse, psnr, psnr_gain_over_copy, code_sensitivity}, over all pairs.

    code_sensitivity: (shuffled - true) / copy; 0 means that the decoder ignores its codes.
    """
    true, shuffled, copy = np.asarray(errors, float).mean(0)
    gain = psnr(true) - psnr(copy)
    sensitivity = float((shuffled - true) / max(copy, 1e-12))
    return dict(mse=float(true), psnr=psnr(true), psnr_gain_over_copy=gain, code_sensitivity=sensitivity)


# --- codebooks


def codebook_metrics(codes, K):
    """codes (n N) int -> usage, perplexity, perplexity_0 ... perplexity_N-1, joint_perplexity, top1_frequency.

    usage: share of the N K codes that at least 1 pair in 10 K chooses; perplexity: exp of the entropy, at most K, and
    its mean over positions; joint_perplexity and top1_frequency are those of whole latent actions.
    """
    share = histogram(codes, K)
    each = [entropy(p) for p in share]
    joint = np.unique(codes, axis=0, return_counts=True)[1] / len(codes)
    metrics = dict(usage=float((share > 0.1 / K).mean()), perplexity=float(np.mean(each)))
    metrics |= {f"perplexity_{position}": value for position, value in enumerate(each)}
    return metrics | dict(joint_perplexity=entropy(joint), top1_frequency=float(joint.max()))


def histogram(codes, K):
    """codes (n N) -> share of each code at each position (N K)."""
    return np.stack([np.bincount(position, minlength=K) for position in np.asarray(codes).T]) / len(codes)


def entropy(p):
    """exp of the entropy of shares p."""
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def validation_metrics(rows, K, quantizing):
    """rows: [(errors (n 3), codes (n N), actions (n A))] of a rank -> metrics, codes and actions of all ranks' pairs.

    No metrics without rows; none of codes before quantization starts.
    """
    parts = [rows]
    if torch.distributed.is_initialized():
        parts = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, rows)
    rows = [row for part in parts for row in part]
    if not rows:
        return {}, None, None
    errors, codes, actions = (np.concatenate(column) for column in zip(*rows, strict=True))
    found = reconstruction_metrics(errors)
    if not quantizing:
        del found["code_sensitivity"]
        return found, codes, actions
    return found | codebook_metrics(codes, K), codes, actions


def advice(metrics, K):
    """Advice on a run, in a line: "good enough to label ..." or what is missing and what helps."""
    if "mse" not in metrics:
        return "no held-out pair could be read"
    if "usage" not in metrics:
        return "not yet: quantization has not begun; train on"
    names = ("psnr_gain_over_copy", "code_sensitivity", "perplexity", "top1_frequency")
    (gain, sensitivity, perplexity, frequency), wrong = (metrics[name] for name in names), []
    if gain <= 0:
        wrong.append(f"{gain:.2f} dB against a copy of the first frame: train longer")
    if sensitivity < 0.1:
        wrong.append(f"code sensitivity {sensitivity:.2f}: a longer --gap, or --motion-weight 10")
    if perplexity < 0.5 * K:
        wrong.append(f"perplexity {perplexity:.1f} of {K}: a smaller --codebook-size, or more pairs")
    if frequency > 0.5:
        wrong.append(f"one latent action holds {100 * frequency:.0f} % of the pairs: a longer --gap")
    if wrong:
        return "not yet: " + "; ".join(wrong)
    about = f"{gain:.2f} dB over a copy, code sensitivity {sensitivity:.2f}, perplexity {perplexity:.1f} of {K}"
    return f"good enough to label: {about}"


# --- the robot's motion


def turns(values):
    """values (list of (T A)): the period of each dim that is an angle and wraps, else infinity, (A,)."""
    low, high = (np.stack([f(v, axis=0) for v in values]) for f in (np.min, np.max))
    span = high.max(0) - low.min(0)
    jumps = [np.abs(np.diff(v, axis=0)).max(0) for v in values if len(v) > 1]
    jump, period = np.max(jumps, axis=0) if jumps else 0 * span, np.full(len(span), np.inf)
    for turn in TURN:
        period[(0.9 * turn < span) & (span < 1.01 * turn) & (jump > turn / 2)] = turn
    return period


def wrap(difference, period):
    """A difference (n A), of angles the short way round."""
    around = np.where(np.isfinite(period), period, 1.0)
    return np.where(np.isfinite(period), (difference + around / 2) % around - around / 2, difference)


# --- probes: fitted on some episodes, scored on others


def one_hot(codes, K):
    """codes (n N) -> (n N K)."""
    return np.eye(K)[codes].reshape(len(codes), -1)


def ridge(x, y, x_test, lambdas=LAMBDAS):
    """Closed-form ridge with intercept on standardised features, for every lambda: predictions (L n' A).

    Minimises ||x W - y||^2 / n + lambda ||W||^2. Solved over features or over pairs, whichever are fewer.
    """
    center, scale = x.mean(0), x.std(0)
    scale = np.maximum(scale, 0.1 * scale.max() + 1e-12)  # or noise in a pixel that never changes would grow
    x, x_test, mean = (x - center) / scale, (x_test - center) / scale, y.mean(0)
    if len(x) < x.shape[1]:
        gram, left, right = x @ x.T, x_test @ x.T, y - mean
    else:
        gram, left, right = x.T @ x, x_test, x.T @ (y - mean)
    values, axes = np.linalg.eigh(gram)
    left, right = left @ axes, axes.T @ right
    values = values[:, None].clip(min=0)
    return np.stack([mean + left @ (right / (values + lam * len(x))) for lam in lambdas])


def probe(x, y, episode, x_test):
    """Ridge predictions (n' A), each dim with the lambda that is best over folds of the fitted episodes."""
    number = np.unique(episode, return_inverse=True)[1]
    fold = number % FOLDS if number.max() > 0 else np.arange(len(x)) * FOLDS // len(x)  # one episode: its thirds
    errors = np.zeros((len(LAMBDAS), y.shape[1]))
    for out in np.unique(fold):
        if (fold != out).any():
            guess = ridge(x[fold != out], y[fold != out], x[fold == out])
            errors += np.square(guess - y[fold == out]).sum(1)
    best = errors.argmin(0)
    return np.take_along_axis(ridge(x, y, x_test), best[None, None], 0)[0]


def leave_one_out(episode, tested, most=20):
    """[(rows to fit on, rows to test)]: each of the `tested` episodes held out in turn, all other episodes fitted.

    More than `most` are held out in groups. One episode alone is held out in five parts of its time.
    """
    names = np.unique(episode)
    if len(names) < 2:
        part = np.arange(len(episode)) * 5 // max(1, len(episode))
        return [(np.flatnonzero(part != i), np.flatnonzero(part == i)) for i in np.unique(part)]
    groups = np.array_split(np.array(sorted(tested)), min(most, len(tested)))
    sides = [np.isin(episode, group) for group in groups]
    return [(np.flatnonzero(~side), np.flatnonzero(side)) for side in sides if (~side).any()]


def scores(true, guess, episode, draws=1000):
    """R2 of a probe's predictions (n A), with 95 % intervals from `draws` bootstraps over episodes.

    r2: mean over the dims that move; r2_weighted: all dims together, each weighing as much as it moves; r2_per_dim:
    None for a dim that does not move. In a draw of episodes in which a dim rests, it counts as moving a tenth as much
    as in all: else one such episode makes the interval endless.
    """
    names = np.unique(episode)
    left = np.stack([np.square(guess - true)[episode == e].sum(0) for e in names])  # E A
    total = np.stack([np.square(true - true.mean(0))[episode == e].sum(0) for e in names])
    moves = total.sum(0) > 1e-8 * np.square(true).sum(0).clip(1e-12)
    least = (total.sum(0) / 10).clip(1e-12)

    def r2(rows):
        a, b = left[rows].sum(-2), total[rows].sum(-2).clip(least)
        dims = 1 - a[..., moves] / b[..., moves]
        return dims, dims.mean(-1), 1 - a.sum(-1) / b.sum(-1)

    if not moves.any():
        return dict(r2=None, r2_weighted=None, r2_per_dim=[None] * len(moves))
    dims, mean, weighted = r2(np.arange(len(names)))
    each = iter(dims.tolist())
    found = dict(r2=float(mean), r2_weighted=float(weighted), r2_per_dim=[next(each) if m else None for m in moves])
    if len(names) > 1:
        rows = np.random.default_rng(0).integers(len(names), size=(draws, len(names)))
        _, mean, weighted = r2(rows)
        for name, value in (("r2", mean), ("r2_weighted", weighted)):
            found[f"{name}_interval"] = np.quantile(value, [0.025, 0.975]).tolist()
    return found


def probe_tables(features, y, episode, camera, tested):
    """R2 of features {method: (n D)} for the motion y (n A): ({method: scores}, {camera: {method: scores}}, pairs).

    Each of the `tested` episodes is held out in turn. A camera has probes of its own: the same motion looks different
    from elsewhere. The first table scores the predictions of all cameras together. pairs: how many a probe was fitted
    on at least, and how many were scored in all.
    """
    rows, guesses, fitted, cameras = [], {method: [] for method in features}, [], {}
    for name in np.unique(camera):
        own = np.flatnonzero(camera == name)
        held_out = np.intersect1d(tested, episode[own])
        folds = leave_one_out(episode[own], held_out) if len(held_out) else []
        alone = len(np.unique(episode[own])) == 1 < len(np.unique(episode))  # no other episode to fit on
        if not folds or alone or min(len(fit) for fit, _ in folds) < 2:
            continue
        folds = [(own[fit], own[test]) for fit, test in folds]
        test = np.concatenate([test for _, test in folds])
        rows.append(test)
        fitted += [len(fit) for fit, _ in folds]
        cameras[str(name)] = {}
        for method, x in features.items():
            guess = np.concatenate([probe(x[fit], y[fit], episode[fit], x[out]) for fit, out in folds])
            guesses[method].append(guess)
            cameras[str(name)][method] = scores(y[test], guess, episode[test])
    if not rows:
        return {}, {}, (0, 0)
    rows = np.concatenate(rows)
    table = {method: scores(y[rows], np.concatenate(guess), episode[rows]) for method, guess in guesses.items()}
    return table, cameras, (min(fitted), len(rows))
