"""Figures of a run and of a report. One look for all: grey is true, blue is ours."""

import json

import matplotlib
from matplotlib.figure import Figure

TRUE, OURS = "0.55", "tab:blue"
matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 120})


def curves(log_file):
    """Training loss, and each source's validation error with and without the network, against the step."""
    lines = [json.loads(line) for line in log_file.read_text().splitlines()]
    names = sorted({name for line in lines for name in line if name.startswith("val/") and name.endswith("/mse")})
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    for i, name in enumerate(["train/mse", *(name for name in names if name != "val/mse")]):
        for key, style in ((name, "-"), (f"{name}_closed_form", "--")):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                label = key.removesuffix("/mse").replace("/mse_closed_form", ", closed form")
                axis.plot(*zip(*points, strict=True), style, color=TRUE if i == 0 else f"C{i - 1}", lw=1.2, label=label)
    axis.set(xlabel="step", ylabel="mean squared error (normalised)", yscale="log", title="lower is better")
    axis.legend(frameon=False)
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
            axis.plot(time, decoded[:, dim], color=OURS, lw=1.2, label="decoded")
            axis.set(title=f"{name}, dim {dim}", xlabel="s" if fps else "step")
        for axis in row[len(dims) :]:
            axis.axis("off")
        row[0].set_ylabel("action (robot units)")
    axes[0, 0].legend(frameon=False)
    figure.suptitle("a held-out chunk and what its tokens decode to (closer is better)")
    return figure


def rate_distortion(tables):
    """Bits against error, all methods. tables: {source: rows with method, bits, mse}, ours first.

    A method that is measured at several rates is a line. What sends no bits is a dashed line.
    """
    figure = Figure(figsize=(6.5 * len(tables), 4.2), layout="constrained")
    for axis, (name, rows) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        others = [(row["method"].partition(", ")[0], row["bits"], row["mse"]) for row in rows]
        for i, method in enumerate(dict.fromkeys(name for name, *_ in others if name != "this")):
            points = sorted((point for name, *point in others if name == method), key=lambda point: -point[1])
            style = dict(color=f"C{i + 1}", label=method)
            if method == "closed form":
                style = dict(color=OURS, zorder=2, label="ours, closed form")
            if points[0][0]:
                axis.plot(*zip(*points, strict=True), marker="o", ms=4, lw=1.2, **style)
            else:
                axis.axhline(points[0][1], lw=1, ls="--", **style)
        style = dict(ls="", marker="*", ms=14, color=OURS, zorder=3)
        axis.plot(rows[0]["bits"], rows[0]["mse"], label="ours, with its network", **style)
        axis.set(xscale="log", yscale="log", xlabel="bits per chunk", title=name)
        axis.set_ylabel("mean squared error (normalised)")
        axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle("rate and distortion on held-out chunks (lower left is better)")
    return figure
