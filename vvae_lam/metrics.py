"""How good a latent action model is: errors with true and with other codes, use of the codebook, probes to actions."""

import math

import torch
import torch.nn.functional as F
from layers import optical_flow

ENOUGH_SENSITIVITY = 0.05  # of the copy baseline's squared error: below, other codes would do nearly as well


def shuffle(x):
    """Rows (B, T, ...), each replaced by that of another transition: of another clip and time where there are any."""
    B, T = x.shape[:2]
    offset = T + 1 if (T + 1) % (B * T) else 1
    return x.flatten(0, 1).roll(offset, 0).view_as(x)


def mean_square(error):
    """An error (B, ...) -> its mean square in each clip, (B,)."""
    return error.float().square().flatten(1).mean(1)


@torch.no_grad()
def assess(model, latents, generator=None):
    """({name: value of each clip (B,)}, codes) of a batch (B, T, C, H, W), teacher-forced, in normalised units.

    Mean squared errors: true (with the clip's own codes), shuffled (with those of another transition of the batch),
    random (every code another one; only once codes are quantized), copy (the frame before as prediction). mae: mean
    absolute error with the true codes. With --flow: flow (the optical flow predicted from the vectors, minus the flow)
    and no_flow (minus its mean). codes are None before quantization. generator: of the random codes.
    """
    x = model.normalize(latents)
    patches = model.patchify(x)
    vectors, codes, _ = model.quantizer(model.encode_transitions(x, patches=patches))
    position = torch.arange(vectors.shape[1], device=x.device).expand(len(x), -1)
    variants = dict(true=vectors, shuffled=shuffle(vectors))
    if codes is not None:
        K = model.config.num_embeddings
        offset = torch.randint(1, max(2, K), codes.shape, generator=generator).to(codes.device)
        variants["random"] = model.quantizer.lookup((codes + offset) % K)
    found = dict(copy=mean_square(x[:, :-1] - x[:, 1:]))
    for name, z in variants.items():
        error = model.decode(x[:, :-1], z, position, patches=patches[:, :-1])[0].float() - x[:, 1:]
        found[name] = mean_square(error)
        if name == "true":
            found["mae"] = error.abs().flatten(1).mean(1)
    if model.config.flow:
        flow = optical_flow(x[:, :-1], x[:, 1:])
        found["flow"] = mean_square(model.to_flow(vectors.flatten(2)) - flow)
        found["no_flow"] = mean_square(flow - flow.mean((0, 1)))  # the mean needs no vectors
    return found, codes


def reconstruction_metrics(means):
    """The numbers to watch, from the means of what `assess` gives.

    relative_mse: squared error over that of the copy baseline (the frame before), below 1 is good;
    relative_mse_shuffled: the same with shuffled codes; code_sensitivity: their difference, 0 where codes are ignored.
    psnr_gain_over_copy: dB. action_sensitivity_l2: error with random codes minus error with the true ones.
    flow_r2: share of the optical flow that the codes explain.
    """
    true, copy = means["true"], max(means["copy"], 1e-12)
    out = dict(relative_mse=true / copy, relative_mse_shuffled=means["shuffled"] / copy)
    out["code_sensitivity"] = out["relative_mse_shuffled"] - out["relative_mse"]
    out["psnr_gain_over_copy"] = 10 * math.log10(copy / max(true, 1e-12))
    if "random" in means:
        out["action_sensitivity_l2"] = means["random"] - true
    if "flow" in means:
        out["flow_r2"] = 1 - means["flow"] / max(means["no_flow"], 1e-12)
    return out


def code_use(model, latents):
    """How much the vectors of a batch (B, T, C, H, W) are used: {code_sensitivity, and flow_r2 with --flow}."""
    model.eval()
    found = reconstruction_metrics({name: value.mean().item() for name, value in assess(model, latents)[0].items()})
    model.train()
    return {name: found[name] for name in ("code_sensitivity", "flow_r2") if name in found}


def codebook_metrics(counts):
    """counts (S, K) of the codes at each position -> share of all codes used, mean perplexity and that per position."""
    p = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    perplexity = torch.special.entr(p).sum(1).exp()
    out = dict(codebook_usage=(counts > 0).double().mean().item(), codebook_perplexity=perplexity.mean().item())
    return out | {f"codebook_perplexity_position{i}": value.item() for i, value in enumerate(perplexity, 1)}


def count_codes(codes, K):
    """Codes (..., S) -> how often each of the K codes comes at each position, (S, K) int64."""
    return torch.stack([torch.bincount(column.flatten().cpu(), minlength=K) for column in codes.unbind(-1)])


def advice(numbers, K, probes=None):
    """One line: whether codes with these numbers, out of K per position, are good enough to label with; if not, a cure.

    numbers: of reconstruction_metrics and codebook_metrics; probes: of evaluate.py.
    """
    codes, first = ((probes or {}).get(name, {}) for name in ("codes", "first_frame"))
    score, flow = "r2" if "r2" in codes else "accuracy", "flow_r2" in numbers
    if numbers["relative_mse"] >= 1:
        return "not good enough: predictions are worse than the frame before: train longer, or with a smaller --lr"
    if numbers["code_sensitivity"] < ENOUGH_SENSITIVITY:
        known = f"code_sensitivity {numbers['code_sensitivity']:.3f}, wanted {ENOUGH_SENSITIVITY}"
        cure = "train longer" if flow else "train longer, or with --flow"
        return f"not good enough: other codes would do nearly as well ({known}): {cure}"
    if numbers["codebook_perplexity"] < K / 2:
        share = f"a perplexity of {numbers['codebook_perplexity']:.1f} of {K} codes"
        return f"not good enough: {share}: more data, or a smaller --codebook-dim"
    if codes and codes.get(f"{score}_low", codes[score]) <= first[score]:
        cure = "more data" if flow else "try --flow"
        return f"good predictions, but the codes tell no more of the motion than the first frame ({score}): {cure}"
    return "good enough to label with, by these numbers" + ("" if codes else "; evaluate.py tells of the motion")


# --- probes


def ridge(x, y, new, strengths):
    """Predictions (n, A) for features `new` (n, F), one per strength: ridge regression on standardised features."""
    mean, scale, middle = x.mean(0), x.std(0, correction=min(1, len(x) - 1)).clamp(min=1e-6), y.mean(0)
    x, new = (x - mean) / scale, (new - mean) / scale
    values, vectors = torch.linalg.eigh(x.T @ x)
    left, right = new @ vectors, vectors.T @ (x.T @ (y - middle))
    return [left / (values.clamp(min=0) + strength) @ right + middle for strength in strengths]


def folds_of(episodes, most=10):
    """Fold number of each row: an episode is in one fold; one episode alone is cut into five blocks in time."""
    names, index = torch.unique(episodes, return_inverse=True)
    if len(names) == 1:
        return torch.arange(len(episodes)) * 5 // len(episodes)
    mix = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
    return (mix % most)[index] if len(names) > most else index


def cross_predict(x, y, fold, strengths):
    """For every row: predictions (n, A) of each strength, and the mean, of a fit to the other folds."""
    guesses, baseline = torch.empty(len(strengths), *y.shape, dtype=y.dtype), torch.empty_like(y)
    for number in fold.unique():
        test, train = fold == number, fold != number
        guesses[:, test] = torch.stack(ridge(x[train], y[train], x[test], strengths))
        baseline[test] = y[train].mean(0)
    return guesses, baseline


def nested_predict(x, y, fold, strengths):
    """The same with the strength that does best among the fitted folds: (predictions (n, A), means (n, A))."""
    guesses, baseline = cross_predict(x, y, fold, strengths)
    guess = guesses[0].clone()
    for number in fold.unique():
        train = fold != number
        if len(fold[train].unique()) > 1:
            inner, _ = cross_predict(x[train], y[train], fold[train], strengths)
            errors = ((inner - y[train]).square().mean(1) / y[train].var(0).clamp(min=1e-12)).mean(1)
            guess[~train] = guesses[errors.argmin(), ~train]
    return guess, baseline


def probe(features, actions, episodes, tested=None, strengths=(1.0, 10.0, 100.0, 1000.0)):
    """How well actions follow linearly from features: ridge regression, leave-one-episode-out.

    features (n, F), episodes (n,) numbers, actions (n, A) floats or (n,) class numbers. Each row is predicted by a fit
    to other episodes (ten groups of episodes if there are more). tested (n,) bool: the rows that count; all may be
    fitted. Classes: {accuracy, chance: share of the most frequent class}. Floats: {r2: mean over dims, r2_weighted:
    1 - sum of squared errors / sum of squares over all dims, r2_per_dim}, against the mean of the fitted episodes; dims
    that do not move are left out. *_low, *_high: 95 % bootstrap interval over episodes, if there are at least three.
    """
    classes = not actions.is_floating_point()
    actions = actions.unique(return_inverse=True)[1] if classes else actions  # numbers from 0 on
    y = F.one_hot(actions).double() if classes else actions.double()
    tested = torch.ones(len(y), dtype=torch.bool) if tested is None else tested
    guess, baseline = nested_predict(features.double(), y, folds_of(episodes), strengths)
    guess, baseline, y, actions, episodes = (part[tested] for part in (guess, baseline, y, actions, episodes))
    if classes:  # one "dim": wrong rows out of all rows
        wrong = (guess.argmax(1) != actions).double()
        sums = torch.stack([wrong, torch.ones_like(wrong)], 1)[:, :, None]
    else:
        moves = y.std(0) > 1e-9
        sums = torch.stack([(guess - y).square()[:, moves], (baseline - y).square()[:, moves]], 1)  # n 2 A
    names, index = torch.unique(episodes, return_inverse=True)
    each = torch.zeros(len(names), *sums.shape[1:], dtype=sums.dtype).index_add_(0, index, sums)  # episodes 2 A

    def scores(total):
        """Sums (..., 2, A) of errors and of what they are compared with -> {score: (...)}."""
        least = each.sum(0)[1].clamp(min=1e-11) / 10  # for draws of episodes in which a dim rests
        per_dim = 1 - total[..., 0, :] / torch.maximum(total[..., 1, :], least)
        error, whole = total.sum(-1).unbind(-1)
        if classes:
            return dict(accuracy=per_dim.mean(-1))
        return dict(r2=per_dim.mean(-1), r2_weighted=1 - error / whole.clamp(min=1e-12), r2_per_dim=per_dim)

    out = {name: value.tolist() for name, value in scores(each.sum(0)).items()}
    if len(names) >= 3:
        draws = torch.randint(len(names), (1000, len(names)), generator=torch.Generator().manual_seed(0))
        many = scores(torch.stack([each[draw].sum(0) for draw in draws]))
        ends = torch.tensor([0.025, 0.975]).double()
        for name in [name for name in many if name != "r2_per_dim"]:
            out[f"{name}_low"], out[f"{name}_high"] = many[name].quantile(ends).tolist()
    if classes:
        out["chance"] = (torch.bincount(actions.long()).max() / len(actions)).item()
    return out
