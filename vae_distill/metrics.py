"""What the report card measures, from the records of played episodes (see rollout.py)."""

import numpy as np
from env import ENDS
from model import ACTIVE
from rollout import summary


def interval(values, clip, rng, count=1000):
    """95 % bootstrap interval of the mean of `values` (E), resampling clips, as episodes of one clip are alike."""
    groups = [values[clip == i] for i in np.unique(clip)]
    sums, sizes = np.array([g.sum() for g in groups]), np.array([len(g) for g in groups])
    drawn = rng.integers(len(groups), size=(count, len(groups)))
    return np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), [0.025, 0.975]).tolist()


def measure(outs, clip, own, seed):
    """One row per policy over the episodes `own`: summary, reward per term and step, intervals, what ended episodes."""
    rows = {}
    for name, out in outs.items():
        alive, rng = out["alive"][:, own], np.random.default_rng(seed)
        row, played = summary(out, own), alive.sum()
        reward = (out["reward"][:, own] * alive).sum(0)
        terms = {key: float((value[:, own] * alive).sum() / played) for key, value in out["terms"].items()}
        row |= dict(
            reward_interval=interval(reward, clip[own], rng),
            reward_per_step=float(reward.sum() / played),
            survived_interval=interval(1 - out["failed"][:, own].sum(0), clip[own], rng),
            terms={key: value for key, value in terms.items() if key.endswith(("_reward", "_cost"))},
            ended_by={key: int(round(terms[key] * played)) for key in ENDS if key in terms},
            steps=int(played),
        )
        rows[name] = row
    teacher = rows["teacher"]["reward"]
    for row in rows.values():
        row["reward_share"] = row["reward"] / teacher
    return rows


def latents(out, own):
    """KL and spread of every latent dim over the played steps, and the two main directions of the means."""
    alive = out["alive"][:, own] > 0
    mean, kl = out["latent"][:, own][alive], out["kl"][:, own][alive]
    centred = mean - mean.mean(0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    share = np.square(sizes) / max(np.square(sizes).sum(), 1e-12)
    shown = np.linspace(0, len(mean) - 1, min(len(mean), 3000)).astype(int)
    where = np.nonzero(alive)
    points = dict(xy=(centred @ directions[:2].T)[shown], episode=where[1][shown], step=where[0][shown])
    card = dict(
        kl_per_dim=kl.mean(0).tolist(),
        kl=float(kl.sum(-1).mean()),
        active_dims=int((kl.mean(0) > ACTIVE).sum()),
        std_per_dim=mean.std(0).tolist(),
        pca_share=share[: min(8, len(share))].tolist(),
    )
    return card, points
