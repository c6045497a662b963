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
            for axis, key in zip(row, ("first", "second", "decoded"), strict=False):
                axis.imshow(example[key], interpolation="nearest")
                axis.set_title(key, fontsize=7)
        dims, arrows = mean_motion(example, position)
        share = histogram(example["all_codes"], int(example["all_codes"].max()) + 1)[position]
        for axis, code, image, arrow in zip(
            row[3:], example["shown"][position], example["effects"][position], arrows, strict=False
        ):
            axis.imshow(image, interpolation="nearest")
            often = 100 * share[code] if code < len(share) else 0
            axis.set_title(f"code {code}: {often:.0f} %", fontsize=7)
            outline(axis, example["first"], image)
            center, size = (len(image) - 1) / 2, len(image)
            if np.isfinite(arrow).all() and np.hypot(*arrow) > 0.05:
                style = dict(color="tab:red", width=0.02 * size, head_width=0.1 * size, length_includes_head=True)
                axis.arrow(center, center, *(0.4 * size * arrow), **style)
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


# --- the report


def probes(reports, baselines):
    """R2 of every probe of {source: report}, with its interval over episodes."""
    figure = Figure(figsize=(1 + 5 * len(reports), 3.6), layout="constrained")
    figure.suptitle("how much of the robot's motion each tells, held-out episodes (higher is better)")
    for axis, (source, report) in zip(figure.subplots(1, len(reports), squeeze=False)[0], reports.items(), strict=True):
        table = {name: scores for name, scores in report["probe"].items() if scores["r2"] is not None}
        values = np.array([scores["r2_weighted"] for scores in table.values()])
        ends = [scores.get("r2_weighted_interval", [scores["r2_weighted"]] * 2) for scores in table.values()]
        bars = np.abs(np.array(ends).reshape(-1, 2).T - values)
        colours = [TRUE if name in baselines else MODEL for name in table]
        axis.barh(list(table), values.clip(-0.5), color=colours, xerr=bars, error_kw=dict(lw=1))
        axis.invert_yaxis()
        axis.axvline(0, color="black", lw=0.8)
        axis.set(title=source, xlabel="R2, dims weighted by their motion (shown from -0.5)", xlim=(-0.55, 1))
    return figure
