"""Figures of a run and of a report card. One look for all: grey is true, blue is decoded."""

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


def per_dim(errors):
    """Mean absolute error of every action dim. errors: {source: list of A numbers}, normalised units."""
    figure = Figure(figsize=(9, 0.4 + 2.2 * len(errors)), layout="constrained")
    axes = figure.subplots(len(errors), 1, squeeze=False)[:, 0]
    for axis, (name, values) in zip(axes, errors.items(), strict=True):
        axis.bar(range(len(values)), values, color=DECODED)
        axis.axhline(sum(values) / len(values), color=TRUE, lw=1, ls="--", label="mean over dims")
        axis.set(title=name, xlabel="action dim", ylabel="MAE (normalised)", xticks=range(len(values)))
    axes[0].legend(frameon=False)
    figure.suptitle("error of each dim on held-out chunks (lower is better; one tall bar is a dim to look at)")
    return figure


def rate_distortion(tables):
    """Bits against error, ours among the baselines. tables: {source: rows with method, bits, mse}, ours first.

    What sends no bits, or unlimited ones, has no place on the axis and is a line.
    """
    figure = Figure(figsize=(6.5 * len(tables), 4.2), layout="constrained")
    for axis, (name, rows) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        for i, row in enumerate(rows):
            style = (
                dict(color=DECODED, marker="*", ms=13, zorder=3) if i == 0 else dict(color=f"C{i}", marker="o", ms=6)
            )
            if row["bits"]:
                axis.plot(row["bits"], row["mse"], ls="", label=row["method"], **style)
            else:
                axis.axhline(row["mse"], color=style["color"], lw=1, ls="--", label=row["method"])
        axis.set(xscale="log", yscale="log", xlabel="bits per chunk (nominal)", title=name)
        axis.set_ylabel("mean squared error (normalised)")
        axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle("rate and distortion on held-out chunks (lower left is better)")
    return figure


def codebook(counts):
    """How often each code is used, the most used first. counts: {source: K numbers}."""
    figure = Figure(figsize=(5.5 * len(counts), 3.2), layout="constrained")
    for axis, (name, used) in zip(figure.subplots(1, len(counts), squeeze=False)[0], counts.items(), strict=True):
        total, rank = sum(used), range(1, len(used) + 1)
        axis.fill_between(rank, [100 * n / total for n in sorted(used, reverse=True)], step="mid", color=DECODED)
        axis.axhline(100 / len(used), color=TRUE, lw=1, ls="--", label="all codes alike")
        axis.set(title=f"{name}: {total:,} tokens", xlabel="code, most used first", ylabel="share of tokens (%)")
        axis.legend(frameon=False)
    figure.suptitle("use of the codebook on held-out chunks (flat and wide is better; few tokens cannot fill it)")
    return figure
