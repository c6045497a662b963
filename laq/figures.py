"""Figures of a run. One look for all: grey is true, blue is decoded."""

import json

import matplotlib
import numpy as np
from matplotlib.figure import Figure

TRUE, DECODED = "0.55", "tab:blue"
matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 120})


def curves(log_file):
    """What log.jsonl tells of the reconstruction, of the codes in use, and of what they mean."""
    lines = [json.loads(line) for line in log_file.read_text().splitlines()]
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    panels = [
        (left, "gain", "PSNR gain over “nothing moves” (dB)", "reconstruction (above 0, higher is better)"),
        (left, "delta_psnr", "", ""),
        (middle, "usage", "codes in use (%)", "codebook (higher is better)"),
        (middle, "commonest", "", ""),
        (right, "action_r2", "R² of the robot's move from the codes", "meaning (higher is better, 1 is all)"),
    ]
    styles = dict(gain="-", delta_psnr="--", usage="-", commonest=":", action_r2="-")
    labels = dict(delta_psnr=", true − random codes", commonest=", commonest word")
    for axis, key, ylabel, title in panels:
        names = sorted(
            {name for line in lines for name in line if name.startswith("val/") and name.endswith(f"/{key}")}
        )
        for number, name in enumerate(names):
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            scale = 100 if axis is middle else 1
            steps, values = zip(*points, strict=True) if points else ((), ())
            label = name.split("/")[1] + labels.get(key, "")
            style = dict(marker="o", ms=3, lw=1.2, ls=styles[key], color=f"C{number}")
            axis.plot(steps, [scale * value for value in values], label=label, **style)
        if title:
            axis.set(xlabel="step", ylabel=ylabel, title=title)
    left.axhline(0, color=TRUE, lw=1)
    middle.set_ylim(0, 102)
    for axis in (left, middle, right):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    if not right.has_data():
        right.set_title("meaning: no actions in the data")
    return figure


def codes(examples):
    """What each code does to a frame. examples: {source: (first, second, decoded, effects)}, images (H W 3) in [0, 1];
    effects (N, K, H, W, 3): the frame decoded with slot n's code replaced by k."""
    rows = [(name, slot) for name, example in examples.items() for slot in range(len(example[3]))]
    width = max(len(example[3][0]) for example in examples.values())
    figure = Figure(figsize=(1.25 * (width + 3), 0.45 + 1.35 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), width + 3, squeeze=False)
    for row, (name, slot) in zip(axes, rows, strict=True):
        first, second, decoded, effects = examples[name]
        images = [first, second, decoded] if slot == 0 else [None] * 3
        titles = ["frame", "next frame", "decoded"] if slot == 0 else [""] * 3
        images += list(effects[slot])
        titles += [f"slot {slot}, code {code}" for code in range(len(effects[slot]))]
        for axis in row:
            axis.axis("off")
        for axis, image, title in zip(row, images, titles, strict=False):
            if image is not None:
                axis.imshow(np.clip(image, 0, 1), interpolation="nearest")
                axis.set_title(title, fontsize=7)
                outline(axis, first, image) if title.startswith("slot") else None
        row[0].text(-0.1, 0.5, name, rotation=90, va="center", ha="right", transform=row[0].transAxes)
    figure.suptitle("a held-out pair, and what each code does to the same frame (good: each does something else)")
    return figure


def outline(axis, before, after, least=0.06):
    """Mark in blue what changed between two images."""
    change = np.abs(after - before).max(2)
    if change.max() > least:
        axis.contour(change, [least], colors=DECODED, linewidths=0.6)


def moves(tables):
    """True moves of held-out pairs, coloured by code. tables: {source: (moves (n, A), codes (n, N))}."""
    slots = max(found.shape[1] for _, found in tables.values())
    figure = Figure(figsize=(max(4.4, 2.9 * slots + 0.6), 0.5 + 2.9 * len(tables)), layout="constrained")
    axes = figure.subplots(len(tables), slots, squeeze=False)
    for row, (name, (true, found)) in zip(axes, tables.items(), strict=True):
        dims = sorted(true.std(0).argsort()[::-1][:2])
        jitter = np.random.default_rng(0).normal(0, 0.02, (len(true), len(dims))) * true[:, dims].std(0)
        points = true[:, dims] + jitter
        for slot, axis in enumerate(row):
            if slot >= found.shape[1]:
                axis.axis("off")
                continue
            vertical = points[:, 1] if len(dims) > 1 else np.zeros(len(points))
            axis.scatter(points[:, 0], vertical, c=found[:, slot], cmap="tab10", s=6)
            axis.set(title=f"{name}, slot {slot}", xlabel=f"action dim {dims[0]}", ylabel=f"dim {dims[-1]}")
    figure.suptitle("true moves of held-out pairs, coloured by code\n(good: one colour, one move)")
    return figure
