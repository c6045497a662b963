"""Figures of a run: loss curves, true against decoded actions. One look for all: grey is true, blue is decoded."""

import json

import matplotlib
from matplotlib.figure import Figure

TRUE, DECODED = "0.55", "tab:blue"
matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 120})


def curves(log_file):
    """Training loss and each source's validation error against the step, from log.jsonl. Lower is better."""
    lines = [json.loads(line) for line in log_file.read_text().splitlines()]
    names = sorted({name for line in lines for name in line if name.count("/") == 2 and name.endswith("/mse")})
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for name in ["train/mse", *names, *(["val/mse"] if len(names) > 1 else [])]:
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        style = dict(color=TRUE, lw=1) if name == "train/mse" else dict(marker="o", ms=3, lw=1.2)
        style |= (
            dict(color="black", ls="--", label="val, mean of sources") if name == "val/mse" else dict(label=name[:-4])
        )
        axes[0].plot(*zip(*points, strict=True), **style) if points else None
    axes[0].set(
        xlabel="step", ylabel="mean squared error (normalised)", yscale="log", title="reconstruction (lower is better)"
    )
    axes[0].legend(frameon=False)
    for name in sorted({name for line in lines for name in line if name.endswith("/usage")}):
        points = [(line["step"], 100 * line[name]) for line in lines if name in line]
        axes[1].plot(*zip(*points, strict=True), marker="o", ms=3, lw=1.2, label=name.split("/")[1])
    axes[1].set(
        xlabel="step",
        ylabel="codes in use (%)",
        ylim=(0, 102),
        title="codebook on validation chunks (higher is better)",
    )
    axes[1].legend(frameon=False)
    return figure


def reconstruction(examples):
    """True and decoded actions of one held-out chunk per source; the six dims that move most.

    examples: {source: (true (T, A), decoded (T, A), rate in Hz or None)}, arrays in robot units.
    """
    figure = Figure(figsize=(12, 0.6 + 2.0 * len(examples)), layout="constrained")
    axes = figure.subplots(len(examples), 6, squeeze=False)
    for row, (name, (true, decoded, fps)) in zip(axes, examples.items(), strict=True):
        time = [step / (fps or 1.0) for step in range(len(true))]
        dims = sorted(true.std(0).argsort()[::-1][:6])
        for axis, dim in zip(row, dims, strict=False):
            axis.plot(time, true[:, dim], color=TRUE, lw=2.5, label="true")
            axis.plot(time, decoded[:, dim], color=DECODED, lw=1.2, label="decoded")
            axis.set(title=f"{name}, dim {dim}", xlabel="s" if fps else "step")
        for axis in row[len(dims) :]:
            axis.axis("off")
        row[0].set_ylabel("action (robot units)")
    axes[0, 0].legend(frameon=False)
    figure.suptitle("a held-out chunk and what its tokens decode to (closer is better)")
    return figure
