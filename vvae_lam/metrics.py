"""How good a latent action model is: errors with true and with wrong codes, use of the codebook, probes to actions."""

import math

import torch
import torch.nn.functional as F


def distances(x_hat, x):
    """{l1, l2, cos}: mean absolute, mean squared and cosine distance of frames (B, T, C, H, W), normalised units."""
    error = x_hat.float() - x
    cos = 1 - F.cosine_similarity(x_hat.float().flatten(2), x.flatten(2), dim=2)
    return dict(l1=error.abs().mean().item(), l2=error.square().mean().item(), cos=cos.mean().item())


def wrong_codes(codes, K, generator=None):
    """Codes of the same shape (B, T, S): every slot another than the true one; and one slot of each changed."""
    offset = torch.randint(1, K, codes.shape, generator=generator).to(codes.device)
    random = (codes + offset) % K
    slot = torch.randint(codes.shape[2], (*codes.shape[:2], 1), generator=generator).to(codes.device)
    return random, codes.scatter(2, slot, random.gather(2, slot))


@torch.no_grad()
def assess(model, latents, generator=None):
    """({name: distance}, codes) of a batch (B, T, C, H, W), teacher-forced, with the true codes and with wrong ones.

    Names: true_l2, shuffled_l2 (codes of another transition of the batch), and once codes have begun random_l2 (every
    code another) and flipped_l2 (one code another); l1 and cos likewise; still_l2: the frame before as prediction.
    generator: of the wrong codes.
    """
    x = (latents - model.mean) / model.std
    patches = model.patches(x)
    z = model.infer(patches).float()
    codes, started = model.quantizer.nearest(z), model.quantizer.started
    place = torch.arange(z.shape[1], device=x.device).expand(len(x), -1)
    vectors = model.quantizer.lookup(codes) if started else z
    shuffled = vectors.flatten(0, 1).roll(z.shape[1] + 1, 0).view_as(vectors)  # another clip, another time
    variants = dict(true=vectors, shuffled=shuffled)
    if started:
        wrong = wrong_codes(codes, len(model.quantizer.codebook), generator)
        variants |= {name: model.quantizer.lookup(c) for name, c in zip(("random", "flipped"), wrong, strict=True)}
    found = {f"still_{name}": value for name, value in distances(x[:, :-1], x[:, 1:]).items()}
    for name, vectors in variants.items():
        x_hat = model.decode(x[:, :-1], vectors, place, patches=patches[:, :-1])[0]
        found |= {f"{name}_{kind}": value for kind, value in distances(x_hat, x[:, 1:]).items()}
    return found, codes


def summary(means):
    """The numbers to watch, from the means of what `assess` gives.

    relative, shuffled: squared error over that of "nothing moves"; psnr_gain: dB over it. action_sensitivity_*: error
    with random codes minus error with the true ones (0: codes are ignored). dsnr: (d_random - d_true) / (d_one_flipped
    - d_true): large if a code that is nearly right does little harm.
    """
    true, still = means["true_l2"], max(means["still_l2"], 1e-12)
    out = dict(relative=true / still, shuffled=means["shuffled_l2"] / still)
    out["psnr_gain"] = 10 * math.log10(still / max(true, 1e-12))
    if "random_l2" in means:
        for kind in ("l1", "l2", "cos"):
            out[f"action_sensitivity_{kind}"] = means[f"random_{kind}"] - means[f"true_{kind}"]
        flipped = means["flipped_l2"] - true
        out["dsnr"] = out["action_sensitivity_l2"] / flipped if abs(flipped) > 1e-9 else math.nan
    return out


def codebook_use(counts):
    """counts (S, K) of each slot's codes -> share of the codes used by any slot, perplexity of all and per slot."""
    p = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    all_slots = counts.sum(0).double() / counts.sum().clamp(min=1)
    out = dict(codebook_usage=(counts.sum(0) > 0).double().mean().item())
    out["codebook_perplexity"] = torch.special.entr(all_slots).sum().exp().item()
    for slot, row in enumerate(p):
        out[f"codebook_perplexity_slot{slot + 1}"] = torch.special.entr(row).sum().exp().item()
    return out


def probe(features, actions, test_features, test_actions, ridge=1.0):
    """Ridge regression from standardised features (n, F) to actions; how well it does on the test rows.

    Actions of whole numbers (n,) are classes: {"accuracy", "chance"}, chance being the share of the most frequent one.
    Others (n, A): {"r2": mean over dims, "r2_per_dim"}, 0 for the training mean; dims that do not move are left out.
    """
    classes = actions.ndim == 1 and not actions.is_floating_point()
    y = F.one_hot(actions.long(), int(max(actions.max(), test_actions.max())) + 1) if classes else actions
    x, y, test_x = features.double(), y.double(), test_features.double()
    mean, scale, middle = x.mean(0), x.std(0).clamp(min=1e-6), y.mean(0)
    x, test_x = (x - mean) / scale, (test_x - mean) / scale
    weight = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype), x.T @ (y - middle))
    guess = test_x @ weight + middle
    if classes:
        right = (guess.argmax(1) == test_actions).double().mean().item()
        return dict(accuracy=right, chance=(torch.bincount(test_actions.long()).max() / len(test_actions)).item())
    test_y = test_actions.double()
    moves = test_y.std(0) > 1e-6
    spread = (test_y - middle).square().mean(0).clamp(min=1e-12)
    r2 = (1 - (guess - test_y).square().mean(0) / spread)[moves]
    return dict(r2=r2.mean().item(), r2_per_dim=r2.tolist())
