"""Figures of a run and of a report. One look for all: grey is true (or the copy baseline), blue is predicted."""

import json

import matplotlib
import numpy as np
import torch
from layers import cells, optical_flow
from matplotlib.figure import Figure
from metrics import count_codes

TRUE, PREDICTED, WRONG = "0.55", "tab:blue", "tab:red"
matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 120})


def colours(latents):
    """Function that turns frames (..., C, H, W) into pictures (..., H, W, 3): their three leading components as RGB."""
    pixels = latents.movedim(-3, -1).flatten(0, -2).float().cpu()
    mean = pixels.mean(0)
    directions = torch.linalg.eigh((pixels - mean).T @ (pixels - mean))[1][:, -3:].flip(1)
    shown = ((pixels - mean) @ directions)[:: len(pixels) // 100_000 + 1]
    low, high = torch.quantile(shown, torch.tensor([0.01, 0.99]), 0)

    def pictures(frames):
        shown = (frames.movedim(-3, -1).float().cpu() - mean) @ directions
        shown = ((shown - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
        grey = shown.mean(-1, keepdim=True).expand(*shown.shape[:-1], 3)
        return (shown if shown.shape[-1] == 3 else grey).numpy()

    return pictures


def picture_grid(rows, columns, title, size=1.25):
    """Rows of pictures. rows: {name: n pictures (H, W, 3)}; columns: n names."""
    shape = next(iter(rows.values()))[0].shape
    figure = Figure(figsize=(0.9 + size * len(columns) * max(1, shape[1] / shape[0]), 0.5 + size * len(rows)))
    figure.set_layout_engine("constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes, (name, pictures) in zip(grid, rows.items(), strict=True):
        for axis, picture in zip(axes, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for axis, name in zip(grid[0], columns, strict=True):
        axis.set_title(name, fontsize=8)
    figure.suptitle(title)
    return figure


@torch.no_grad()
def prediction(model, clip):
    """A clip (T, C, H, W): the true frames, the one-step predictions and a rollout from the first frame."""
    codes = model.encode(clip)
    rows = dict(true=clip[1:], predicted=model.predict(clip, codes), rollout=model.rollout(clip[0], codes))
    pictures = colours(clip)
    shown = {name: pictures(frames) for name, frames in rows.items()}
    change = (clip[1:] - clip[:-1]).abs().mean(1, keepdim=True)
    error = (rows["predicted"] - clip[1:]).abs().mean(1, keepdim=True)
    for name, values in dict(change=change, error=error).items():
        grey = 1 - (values / change.max().clamp(min=1e-6)).clamp(0, 1)
        shown[name] = grey[:, 0, :, :, None].expand(-1, -1, -1, 3).cpu().numpy()
    columns = [f"frame {t}\n{' '.join(map(str, code.tolist()))}" for t, code in enumerate(codes, 1)]
    return picture_grid(shown, columns, "a held-out clip and its codes (error paler than change is good)")


def curves(log_file):
    """Loss, errors with true and shuffled codes, and perplexity against the step, from log.jsonl."""
    lines = [json.loads(line) for line in log_file.read_text().splitlines()]

    def draw(axis, x, name, **style):
        points = [(line[x], line[name]) for line in lines if line.get(x) is not None and line.get(name) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), **style)

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    loss, use, book = figure.subplots(1, 3)
    draw(loss, "step", "train/mse_loss", color=TRUE, lw=1, label="train")
    draw(loss, "step", "val/mse_loss", color=PREDICTED, marker="o", ms=3, label="held out")
    loss.set(xlabel="step", ylabel="MSE (normalised)", yscale="log", title="prediction (lower is better)")
    draw(use, "step", "val/relative_mse", color=PREDICTED, marker="o", ms=3, label="true codes")
    draw(use, "step", "val/relative_mse_shuffled", color=WRONG, marker="o", ms=3, label="shuffled codes")
    use.axhline(1, color=TRUE, ls="--", lw=1, label="copy baseline")
    use.set(xlabel="step", ylabel="MSE / MSE of the copy", title="use of the codes (a wide gap is good)")
    for name in sorted({name for line in lines for name in line if name.startswith("val/codebook_perplexity_pos")}):
        draw(book, "step", name, marker="o", ms=3, label=name.rpartition("_")[2])
    book.set(xlabel="step", ylabel="perplexity (codes)", title="codebook (higher is better)")
    for axis in (loss, use, book):
        axis.legend(frameon=False) if axis.lines else None
    return figure


@torch.no_grad()
def code_motion(model, clips, most=6):
    """Mean optical flow of the transitions that have a code, as arrows, for the most used codes of every position.

    clips: held-out recordings (T, C, H, W).
    """
    gap, (H, W), (rows, columns) = model.config.gap, model.shape[1:], cells(*model.shape[1:])
    codes = torch.cat([model.encode(x, gap) for x in clips]).cpu()  # n S
    frames = [model.normalize(x)[None] for x in clips]
    flow = torch.cat([optical_flow(x[:, :-gap], x[:, gap:])[0] for x in frames]).cpu().unflatten(1, (2, rows, columns))
    counts, picture = count_codes(codes, model.config.num_embeddings), colours(clips[0])(clips[0][0])
    most = min(most, counts.shape[1])
    x, y = np.meshgrid((np.arange(columns) + 0.5) * W / columns - 0.5, (np.arange(rows) + 0.5) * H / rows - 0.5)
    scale = max(1e-6, flow.norm(dim=1).quantile(0.9).item()) * columns / W  # the longest arrows are about a cell
    style = dict(angles="xy", scale_units="xy", scale=scale, color=WRONG, width=0.015)
    figure = Figure(figsize=(0.4 + 1.7 * most, 0.5 + len(counts) * (0.3 + 1.6 * H / W)), layout="constrained")
    for position, axes in enumerate(figure.subplots(len(counts), most, squeeze=False)):
        for axis, code in zip(axes, counts[position].argsort(descending=True), strict=False):
            axis.imshow(picture, alpha=0.5)
            if counts[position, code]:
                axis.quiver(x, y, *flow[codes[:, position] == code].mean(0).numpy(), **style)
            axis.set_title(f"code {code} ({100 * counts[position, code] / len(codes):.0f} %)", fontsize=8)
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(f"position {position + 1}")
    figure.suptitle("mean motion where a code is given (arrows that differ from code to code are good)")
    return figure


def of_run(model, example, log_file):
    """(name, figure) of everything that train.py draws at a validation. example: clips (B, T, C, H, W)."""
    yield "curves", curves(log_file)
    if model.quantizer.quantizing:
        yield "prediction", prediction(model, example[0])
