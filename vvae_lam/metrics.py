"""How good a latent action model is: errors with true and with other codes, use of the codebook, probes to actions."""

import math

import torch
import torch.nn.functional as F
from layers import optical_flow

ENOUGH_USE = 0.05  # of the squared error, or of the flow: below, shuffled codes would do nearly as well


def distances(x_hat, x):
    """{l1, l2, cos}: mean absolute, mean squared and cosine distance of frames (B, T, C, H, W), normalised units."""
    error = x_hat.float() - x
    cos = 1 - F.cosine_similarity(x_hat.float().flatten(2), x.flatten(2), dim=2)
    return dict(l1=error.abs().mean().item(), l2=error.square().mean().item(), cos=cos.mean().item())


def shuffle(x):
    """Rows (B, T, ...), each replaced by that of another transition: of another clip and time where there are any."""
    B, T = x.shape[:2]
    offset = T + 1 if (T + 1) % (B * T) else 1
    return x.flatten(0, 1).roll(offset, 0).view_as(x)


def random_codes(codes, K, generator=None):
    """Codes of the same shape (B, T, S): every position another than the true one; and one position of each changed."""
    offset = torch.randint(1, max(2, K), codes.shape, generator=generator).to(codes.device)
    random = (codes + offset) % K
    position = torch.randint(codes.shape[2], (*codes.shape[:2], 1), generator=generator).to(codes.device)
    return random, codes.scatter(2, position, random.gather(2, position))


@torch.no_grad()
def assess(model, latents, generator=None):
    """({name: distance}, codes) of a batch (B, T, C, H, W), teacher-forced, with the true codes and with others.

    Names: true_l2, shuffled_l2 (codes of another transition of the batch) and, once codes are quantized, random_l2
    (every code another) and flipped_l2 (one code another); l1 and cos likewise; copy_l2: the frame before as
    prediction. With --flow: true_flow, the error of the flow told by the codes, and copy_flow, that of no flow.
    codes are None before quantization. generator: of the random codes.
    """
    x = model.normalize(latents)
    patches = model.patchify(x)
    vectors, codes, _ = model.quantizer(model.encode_transitions(x, patches=patches))
    position = torch.arange(vectors.shape[1], device=x.device).expand(len(x), -1)
    variants = dict(true=vectors)
    if vectors.shape[0] * vectors.shape[1] > 1:
        variants["shuffled"] = shuffle(vectors)
    if codes is not None:
        random, flipped = random_codes(codes, model.config.num_embeddings, generator)
        variants |= dict(random=model.quantizer.lookup(random), flipped=model.quantizer.lookup(flipped))
    found = {f"copy_{name}": value for name, value in distances(x[:, :-1], x[:, 1:]).items()}
    if model.config.flow:
        found["true_flow"] = model.flow_error(x, vectors).item()
        found["copy_flow"] = optical_flow(x[:, :-1], x[:, 1:]).square().mean().item()
    for name, vectors in variants.items():
        x_hat = model.decode(x[:, :-1], vectors, position, patches=patches[:, :-1])[0]
        found |= {f"{name}_{kind}": value for kind, value in distances(x_hat, x[:, 1:]).items()}
    return found, codes


def reconstruction_metrics(means):
    """The numbers to watch, from the means of what `assess` gives.

    relative_mse: squared error over that of the copy baseline (the frame before), below 1 is good;
    relative_mse_shuffled: the same with shuffled codes; code_sensitivity: their difference, 0 where codes are ignored.
    psnr_gain_over_copy: dB. action_sensitivity_*: error with random codes minus error with the true ones.
    flow_r2: share of the optical flow that the codes tell.
    random_over_flipped: (d_random - d_true) / (d_flipped - d_true), large where one wrong code does little harm.
    """
    true, copy = means["true_l2"], max(means["copy_l2"], 1e-12)
    out = dict(relative_mse=true / copy, psnr_gain_over_copy=10 * math.log10(copy / max(true, 1e-12)))
    if "shuffled_l2" in means:
        out["relative_mse_shuffled"] = means["shuffled_l2"] / copy
        out["code_sensitivity"] = out["relative_mse_shuffled"] - out["relative_mse"]
    if "true_flow" in means:
        out["flow_r2"] = 1 - means["true_flow"] / max(means["copy_flow"], 1e-12)
    if "random_l2" in means:
        for kind in ("l1", "l2", "cos"):
            out[f"action_sensitivity_{kind}"] = means[f"random_{kind}"] - means[f"true_{kind}"]
        flipped = means["flipped_l2"] - true
        if abs(flipped) > 1e-9:
            out["random_over_flipped"] = out["action_sensitivity_l2"] / flipped
    return out


def code_use(model, latents):
    """What the codes of a batch (B, T, C, H, W) are good for: {code_sensitivity, and flow_r2 with --flow}."""
    model.eval()
    found = reconstruction_metrics(assess(model, latents)[0])
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
    score = "r2" if "r2" in codes else "accuracy"
    if numbers["relative_mse"] >= 1:
        return "not good enough: predictions are worse than the frame before: train longer, or with a smaller --lr"
    use = max(numbers["code_sensitivity"], numbers.get("flow_r2", 0.0))
    if use < ENOUGH_USE:
        return f"not good enough: the codes hardly matter ({use:.3f} of {ENOUGH_USE}): train longer, or with --flow"
    if numbers["codebook_perplexity"] < K / 2:
        share = f"a perplexity of {numbers['codebook_perplexity']:.1f} of {K} codes"
        return f"not good enough: {share}: more data, or a smaller --codebook-dim"
    if codes and codes.get(f"{score}_low", codes[score]) <= first[score]:
        return f"good predictions, but the codes tell no more of the motion than the first frame ({score}): try --flow"
    return "good enough to label with, by these numbers" + ("" if codes else "; evaluate.py tells of the motion")


# --- probes


def ridge(x, y, new, strengths):
    """Predictions (n, A) for features `new` (n, F), one per strength: ridge regression on standardised features."""
    mean, scale, middle = x.mean(0), x.std(0).clamp(min=1e-6), y.mean(0)
    x, new = (x - mean) / scale, (new - mean) / scale
    dual = len(x) < x.shape[1]
    values, vectors = torch.linalg.eigh(x @ x.T if dual else x.T @ x)
    left = new @ (x.T @ vectors) if dual else new @ vectors
    right = vectors.T @ (y - middle if dual else x.T @ (y - middle))
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
    y = F.one_hot(actions.long()).double() if classes else actions.double()
    x, fold = features.double(), folds_of(episodes)
    tested = torch.ones(len(x), dtype=torch.bool) if tested is None else tested
    guess, baseline = nested_predict(x, y, fold, strengths)
    guess, baseline, y, actions, episodes = (part[tested] for part in (guess, baseline, y, actions, episodes))
    names, index = torch.unique(episodes, return_inverse=True)
    if classes:
        right = (guess.argmax(1) == actions).double()
        sums = torch.stack([right, torch.ones_like(right)], 1)[:, :, None]

        def score(total):
            return dict(accuracy=total[0, 0] / total[1, 0])
    else:
        moves = y.std(0) > 1e-9
        sums = torch.stack([(guess - y).square()[:, moves], (baseline - y).square()[:, moves]], 1)  # n 2 A

        def score(total):
            per_dim = 1 - total[0] / total[1].clamp(min=1e-12)
            return dict(r2=per_dim.mean(), r2_weighted=1 - total[0].sum() / total[1].sum().clamp(min=1e-12))

    each = torch.zeros(len(names), *sums.shape[1:], dtype=sums.dtype).index_add_(0, index, sums)
    out = {name: value.item() for name, value in score(each.sum(0)).items()}
    if len(names) >= 3:
        draws = torch.randint(len(names), (1000, len(names)), generator=torch.Generator().manual_seed(0))
        many = [score(each[draw].sum(0)) for draw in draws]
        for name in list(out):
            low, high = (
                torch.stack([found[name] for found in many]).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
            )
            out |= {f"{name}_low": low, f"{name}_high": high}
    if classes:
        return out | dict(chance=(torch.bincount(actions.long()).max() / len(actions)).item())
    total = each.sum(0)
    return out | dict(r2_per_dim=(1 - total[0] / total[1].clamp(min=1e-12)).tolist())
