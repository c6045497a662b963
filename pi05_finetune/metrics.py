"""What the report of evaluate.py measures, on arrays alone.

N predictions, T steps of a chunk, A action dims. Normalised: errors divided by half of the q01-to-q99 range of the
recorded training actions, per dim, so that 1 is from the middle of a dim's range to its end.
"""

import numpy as np


def score(predicted, true, mask, scale, low, high):
    """Numbers of `predicted` (N, T, A) against `true` (N, T, A) where `mask` (N, T), as a dict of plain values.

    scale (A,): half the range of each dim. low, high (A,): what an action should not leave; clipping is the share of
    predicted values that do. Steps count alike.
    """
    error = predicted - true
    square, normal = np.square(error)[mask], np.square(error / scale)[mask]  # n A
    steps = np.arange(mask.shape[1])[mask.any(0)]
    pairs = mask[:, 1:] & mask[:, :-1]
    return dict(
        mse_normalised=float(normal.mean()),
        mse=float(square.mean()),
        mae=float(np.abs(error)[mask].mean()),
        mae_normalised=float(np.abs(error / scale)[mask].mean()),
        mse_per_dim=square.mean(0).tolist(),
        mse_normalised_per_dim=normal.mean(0).tolist(),
        mse_normalised_by_step=[float(np.square(error[:, t] / scale)[mask[:, t]].mean()) for t in steps],
        delta=magnitude(predicted / scale, pairs, 1),
        delta_recorded=magnitude(true / scale, pairs, 1),
        jerk=magnitude(predicted / scale, mask[:, 3:], 3),
        jerk_recorded=magnitude(true / scale, mask[:, 3:], 3),
        clipping=float(((predicted < low) | (predicted > high))[mask].mean()),
    )


def magnitude(x, mask, order):
    """Mean size of the differences of `order` over time: 1 tells how fast x moves, 3 how it jerks. None if none."""
    return float(np.abs(np.diff(x, order, axis=1))[mask].mean()) if mask.any() else None


def references(episodes, places, chunk, mean):
    """{name: predictions (N, chunk, A)} of two policies that look at nothing.

    hold last: the action of the step before, held (at an episode's first step: the recorded one, which flatters it).
    mean: the mean action of the training episodes. places: (episode, step) of each prediction.
    """
    last = np.stack([episode.actions[max(step - 1, 0)] for episode, step in places])
    return {
        "hold last": np.repeat(last[:, None], chunk, axis=1),
        "mean": np.broadcast_to(mean, (len(places), chunk, len(mean))),
    }
