"""Figures of a run and of its report. One look for all: grey is true or a baseline, blue is the model."""

import json

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from metrics import histogram

TRUE, MODEL = "0.55", "tab:blue"
COLUMNS, ROWS = 8, 4  # codes and code positions shown at most: of larger codebooks the most frequent codes
matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 120})


def curves(log_file):
    """Reconstruction, codebook and meaning over the steps, from log.jsonl."""
    lines = [json.loads(line) for line in log_file.read_text().splitlines()]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = dict(psnr_gain_over_copy="PSNR gain over a copy of the first frame (dB)", usage="share of codes in use")
    for axis, (key, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        names = sorted({name for line in lines for name in line if name.endswith(f"/{key}")})
        for name in names:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            axis.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1.2, label=name.split("/")[1])
        axis.set(xlabel="step", ylabel=label, title="higher is better")
        axis.axhline(0, color=TRUE, lw=1)
        if names:
            axis.legend(frameon=False)
    return figure


@torch.no_grad()
def effects(model, first, second, decoded, codes, frequent=None):
    """What each code does to a frame: decoded with the code at position n replaced by k.

    One pair (3 S S) each and its codes (N,) -> dict of images (S S 3): first, second, decoded, effects (n k S S 3);
    shown (n k): which codes. frequent (N k): the codes to show; without it the first ones.
    """
    N, K, _ = model.quantizer.shape
    if frequent is None:
        frequent = np.tile(np.arange(min(K, COLUMNS)), (N, 1))
    shown = torch.from_numpy(frequent[:ROWS]).to(codes.device)  # n k
    n, k = shown.shape
    replaced = codes.repeat(n, k, 1)
    for position in range(n):
        replaced[position, :, position] = shown[position]
    made = model.decode(first.expand(n * k, -1, -1, -1), replaced.flatten(0, 1)).unflatten(0, (n, k))
    images = dict(first=first, second=second, decoded=decoded, effects=made)
    images = {name: image.float().movedim(-3, -1).cpu().numpy().clip(0, 1) for name, image in images.items()}
    return images | dict(shown=shown.cpu().numpy(), codes=codes.cpu().numpy())


def codes(examples):
    """Rows of code positions: a held-out pair, and what each code does to the same frame.

    examples: {source: dict of `effects`, and of all held-out pairs all_codes (n N), actions (n A, nan where unknown)}.
    The arrow on a code is the robot's mean motion among the held-out pairs that have it, in the two dims that move
    most.
    """
    rows = [(name, position) for name, e in examples.items() for position in range(len(e["shown"]))]
    width = max(e["shown"].shape[1] for e in examples.values())
    figure = Figure(figsize=(1.25 * (width + 3), 0.6 + 1.4 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), width + 3, squeeze=False)
    for row, (name, position) in zip(axes, rows, strict=True):
        example = examples[name]
        for axis in row:
            axis.axis("off")
        if position == 0:
            titles = dict(first="frame t", second="frame t + gap", decoded="decoded")
            for axis, (key, title) in zip(row, titles.items(), strict=False):
                axis.imshow(example[key], interpolation="nearest")
                axis.set_title(title, fontsize=7)
        dims, arrows = mean_motion(example, position)
        if dims:
            for axis in row:
                axis.set_ylim(1.5 * len(example["first"]), -0.5)
        share = histogram(example["all_codes"], int(example["all_codes"].max()) + 1)[position]
        for axis, code, image, arrow in zip(
            row[3:], example["shown"][position], example["effects"][position], arrows, strict=False
        ):
            axis.imshow(image, interpolation="nearest")
            often = 100 * share[code] if code < len(share) else 0
            axis.set_title(f"code {code}: {often:.0f} %", fontsize=7)
            outline(axis, example["first"], image)
            size = len(image)
            if np.isfinite(arrow).all() and np.hypot(*arrow) > 0.05:  # below the picture, which it would hide
                style = dict(color="tab:red", width=0.02 * size, head_width=0.1 * size, length_includes_head=True)
                axis.arrow(*(np.array([0.5, 1.25]) * size - 0.2 * size * arrow), *(0.4 * size * arrow), **style)
        label = f"{name}, position {position}" + (f"\narrows: motion of dims {dims[0]}, {dims[1]}" if dims else "")
        place = dict(va="center", ha="right", transform=row[0].transAxes)
        row[0].text(-0.12, 0.5, label, rotation=90, fontsize=6, **place)
    figure.suptitle("what each code does to the same frame (blue: what changes; red: the robot's mean motion)")
    return figure


def mean_motion(example, position):
    """The two dims that move most, and for each code shown their mean motion (x, y), the longest with length 1."""
    actions, shown = example["actions"], example["shown"][position]
    known = np.isfinite(actions).all(1)
    arrows = np.full((len(shown), 2), np.nan)
    if actions.shape[1] < 2 or known.sum() < 2:
        return None, arrows
    dims = sorted(actions[known].std(0).argsort()[::-1][:2].tolist())
    moved = actions[:, dims] - actions[known][:, dims].mean(0)
    for i, code in enumerate(shown):
        chosen = known & (example["all_codes"][:, position] == code)
        if chosen.any():
            arrows[i] = moved[chosen].mean(0)
    lengths = np.hypot(*arrows.T)
    return dims, arrows / max(np.nanmax(lengths) if np.isfinite(lengths).any() else 1, 1e-9)


def outline(axis, before, after, least=0.06):
    """Mark in blue what changed between two images."""
    change = np.abs(after - before).max(2)
    if change.max() > least:
        axis.contour(change, [least], colors=MODEL, linewidths=0.6)
