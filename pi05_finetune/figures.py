"""Figures of a run and of a report. One look for all: grey is recorded, blue is predicted."""

import json

import matplotlib
import numpy as np
from matplotlib.figure import Figure

TRUE, PREDICTED = "0.55", "tab:blue"
matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 120})


def curves(log_file):
    """Loss of training and of each held-out data set against the step, from log.jsonl."""
    lines = [json.loads(line) for line in log_file.read_text().splitlines()]
    names = sorted({name for line in lines for name in line if name.startswith("val/") and name.endswith("/loss")})
    names = [name for name in names if name.count("/") == 2 or len(names) > 2]  # of one data set the mean is itself
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    for name in ["train/loss", *names]:
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        style = dict(color=TRUE, lw=1) if name == "train/loss" else dict(marker="o", ms=3, lw=1.2)
        if points:
            axis.plot(*zip(*points, strict=True), label=name.removesuffix("/loss"), **style)
    axis.set(xlabel="step", ylabel="flow-matching loss (normalised)", yscale="log", title="loss (lower is better)")
    axis.legend(frameon=False)
    return figure


def plot_dims(axes, true, predicted, names, rate, chunk=None):
    """Recorded and predicted (T, A) of the dims that move most, one per axis; predicted chunk by chunk."""
    chunk, time = chunk or len(true), np.arange(len(true)) / rate
    dims = sorted(np.argsort(-true.std(0), kind="stable")[: len(axes)])
    for axis, dim in zip(axes, dims, strict=False):
        axis.plot(time, true[:, dim], color=TRUE, lw=2.5, label="recorded")
        for first in range(0, len(true), chunk):
            here = slice(first, first + chunk)
            axis.plot(time[here], predicted[here, dim], PREDICTED, lw=1.2, label=None if first else "predicted")
        axis.set(title=names[dim], xlabel="s")
    for axis in axes[len(dims) :]:
        axis.axis("off")
    axes[0].set_ylabel("action (robot units)")
    axes[0].legend(frameon=False)


def traces(examples):
    """Recorded and predicted actions; the six dims that move most.

    examples: {title: (recorded (T, A), predicted (T, A), names of the dims, rate in Hz)}, arrays in robot units.
    """
    columns = min(6, max(len(names) for _, _, names, _ in examples.values()))
    figure = Figure(figsize=(max(6, 2 * columns), 2.4 * len(examples) + 0.4), layout="constrained")
    axes = figure.subplots(len(examples), columns, squeeze=False)
    for row, (title, (true, predicted, names, rate)) in zip(axes, examples.items(), strict=True):
        plot_dims(row, true, predicted, names, rate)
        row[0].set_title(f"{title}: {row[0].get_title()}")
    figure.suptitle("recorded and predicted actions of held-out episodes (closer is better)")
    return figure


def closed_loop(report, examples):
    """Success rates as bars; beside them six scenes with the gripper's paths under both instructions.

    examples: (image (H, W, 3) of [-1.1, 1.1] squared, colour first named, {instruction: path (T, 3)}).
    """
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    bars, scenes = figure.subfigures(1, 2, width_ratios=[1, 2.2])
    axis, names = bars.subplots(), ("one block named", "the other named")
    for place, name in enumerate(names):
        rate, (low, high) = report[name]["success"], report[name]["interval"]
        axis.bar(place, rate, 0.5, color=PREDICTED)
        axis.errorbar(place, rate, [[rate - low], [high - rate]], color="0.2", capsize=4)
        axis.text(place, high + 0.02, f"{100 * rate:.0f} %", ha="center", fontsize=12)
    axis.axhline(0.5, color="0.2", ls=":", lw=1)
    axis.text(0.5, 0.51, "ignores\nthe words", ha="center")
    axis.set_xticks(range(2), names)
    axis.set(ylim=(0, 1.15), ylabel="grasped the named block", title=f"success, {report['rollouts']} rollouts each")
    for axis, (image, target, paths) in zip(scenes.subplots(2, 3).flat, examples, strict=False):
        axis.imshow(image, extent=(-1.1, 1.1, 1.1, -1.1))
        for (name, path), style, fill in zip(paths.items(), ("-", ":"), ("k", "w"), strict=True):
            axis.plot(path[:, 0], path[:, 1], "k" + style, lw=1.6, label=f"path, {name}")
            axis.plot(*path[-1, :2], "ko", ms=5, mfc=fill, label="closes there")
        axis.set(title=f"{target} is named, then the other", xlim=(-1.1, 1.1), ylim=(1.1, -1.1), xticks=[], yticks=[])
    handles = scenes.axes[0].get_legend_handles_labels()
    scenes.legend(*handles, frameon=False, fontsize=8, ncols=4, loc="outside lower center")
    figure.suptitle("closed loop: the gripper should close on the block that is named")
    return figure


def episodes(examples, chunk):
    """Whole held-out episodes: frames of a camera above, the six dims that move most below.

    examples: {title: (recorded (T, A), predicted (T, A), names, rate in Hz, [(seconds, frame (H, W, 3))])}; predicted
    is chunk after chunk, each from the recorded observation at its beginning.
    """
    figure = Figure(figsize=(14, 7.2 * len(examples)), layout="constrained")
    parts = figure.subfigures(len(examples), 1, squeeze=False)[:, 0]
    for part, (title, (true, predicted, names, rate, shown)) in zip(parts, examples.items(), strict=True):
        strip, plots = part.subfigures(2, 1, height_ratios=[1, 3])
        for axis, (seconds, frame) in zip(strip.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            axis.imshow(frame)
            axis.set_title(f"{seconds:.1f} s")
            axis.axis("off")
        rows = -(-min(6, len(names)) // 3)
        plot_dims(list(plots.subplots(rows, 3, squeeze=False).flat), true, predicted, names, rate, chunk)
        part.suptitle(f"{title}: recorded and predicted chunk by chunk (closer is better)")
    return figure
