"""Figures of runs and reports. Grey is true or a baseline, blue is predicted."""

import json

import matplotlib
from matplotlib.figure import Figure

TRUE, PREDICTED = "0.55", "tab:blue"
matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 120})


def curves(log_file):
    """Loss against the step, and what validation says in its own terms, from log.jsonl."""
    lines = [json.loads(line) for line in log_file.read_text().splitlines()]

    def draw(axis, name, **style):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), **style)

    names = sorted({name for line in lines for name in line})
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    draw(axes[0], "train/loss", color=TRUE, lw=1, label="train")
    for name in [name for name in names if name.startswith("val/") and name.endswith("/loss") and name.count("/") == 2]:
        draw(axes[0], name, marker="o", ms=3, lw=1.2, label=name[:-5])
    axes[0].set(xlabel="step", ylabel="loss", title="loss (lower is better)")
    parts = ("/token_accuracy", "/exact_match", "/action_mae", "/success")
    for i, name in enumerate(name for name in names if name.startswith("val/") and name.endswith(parts)):
        draw(axes[1], name, marker="o", ms=3, lw=1.2, color=f"C{i}", label=name[4:])
    references = {"/bigram_accuracy": "--", "/majority_accuracy": ":", "/majority_exact_match": "-."}
    for name, style in [(name, style) for name in names for end, style in references.items() if name.endswith(end)]:
        draw(axes[1], name, color=TRUE, lw=1, ls=style, label=f"{name[4:]} (without the image)")
    axes[1].set(xlabel="step", ylabel="accuracy, or normalised error", title="held-out episodes")
    for axis in axes:
        axis.legend(frameon=False, fontsize=7)
    return figure


def commands(examples):
    """True and predicted commands of one held-out clip per source; the six dims that move most.

    examples: {source: (true (T, A), predicted (T, A))} in robot units: predicted chunks laid end to end.
    """
    figure = Figure(figsize=(12, 0.6 + 2.0 * len(examples)), layout="constrained")
    axes = figure.subplots(len(examples), 6, squeeze=False)
    for row, (name, (true, predicted)) in zip(axes, examples.items(), strict=True):
        dims = sorted(true.std(0).argsort()[::-1][:6])
        for axis, dim in zip(row, dims, strict=False):
            axis.plot(true[:, dim], color=TRUE, lw=2.5, label="true")
            axis.plot(predicted[:, dim], color=PREDICTED, lw=1.2, label="predicted")
            axis.set(title=f"{name}, dim {dim}", xlabel="step")
        for axis in row[len(dims) :]:
            axis.axis("off")
        row[0].set_ylabel("command (robot units)")
    axes[0, 0].legend(frameon=False)
    figure.suptitle("commands on a held-out clip, chunk after chunk (closer is better)")
    return figure


def strips(videos, shown=8):
    """Rollouts (caption, frames) as strips of `shown` frames, from the first to the last, one row each."""
    figure = Figure(figsize=(1.2 * shown, 0.3 + 1.35 * len(videos)), layout="constrained")
    rows = figure.subfigures(len(videos), 1, squeeze=False)[:, 0]
    for row, (caption, frames) in zip(rows, videos, strict=True):
        row.suptitle(caption, fontsize=9, x=0.01, ha="left")
        for i, axis in enumerate(row.subplots(1, shown)):
            number = round(i * (len(frames) - 1) / (shown - 1))
            axis.imshow(frames[number])
            axis.set_title(f"step {number}", fontsize=7)
            axis.axis("off")
    return figure
