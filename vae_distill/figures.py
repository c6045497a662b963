"""Figures of a run and of a report. One look for all: grey is the reference or the teacher, blue the student."""

import json

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from teacher.walker import positions

TRUE, STUDENT = "0.55", "tab:blue"
matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 120})


def curves(log_file):
    """Action error and reward relative to the teacher's against the step, from log.jsonl."""
    lines = [json.loads(line) for line in log_file.read_text().splitlines()]
    names = sorted({name.split("/")[1] for line in lines for name in line if name.count("/") == 2})
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)

    def plot(axis, name, **style):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        axis.plot(*zip(*points, strict=True), **style) if points else None

    plot(axes[0], "train/action_mse", color=TRUE, lw=1, label="train, sampled latent")
    for source in names:
        plot(axes[0], f"val/{source}/action_mse", marker="o", ms=3, lw=1.2, label=f"val {source}, latent mean")
        plot(axes[1], f"val/{source}/reward_share", marker="o", ms=3, lw=1.2, label=source)
    plot(axes[2], "train/kl", color=STUDENT, lw=1.2)
    axes[0].set(
        xlabel="step", ylabel="mean squared error", yscale="log", title="action against the teacher's (lower is better)"
    )
    axes[1].axhline(1, color=TRUE, lw=1, ls="--", label="teacher")
    axes[1].set(xlabel="step", ylabel="reward / teacher's", title="reward on held-out clips (1 is the teacher)")
    axes[2].set(xlabel="step", ylabel="KL(q || p) (nats)", title="latent (low: the prior predicts it)")
    for axis in axes[:2]:
        axis.legend(frameon=False)
    return figure


def tracking(examples, rate):
    """Joint angles of one episode per source: the reference and what the student did; the four that move most.

    examples: {source: (reference (T J), student (T J))} in rad (m for slides); rate: control steps per second.
    """
    figure = Figure(figsize=(12, 0.6 + 2.0 * len(examples)), layout="constrained")
    most = min(4, max(reference.shape[1] for reference, _ in examples.values()))
    axes = figure.subplots(len(examples), most, squeeze=False)
    for row, (name, (reference, student)) in zip(axes, examples.items(), strict=True):
        time = np.arange(len(reference)) / rate
        joints = sorted(reference.std(0).argsort()[::-1][:most])
        for axis, joint in zip(row, joints, strict=False):
            axis.plot(time, reference[:, joint], color=TRUE, lw=2.5, label="reference")
            axis.plot(time, student[:, joint], color=STUDENT, lw=1.2, label="student")
            axis.set(title=f"{name}, coordinate {joint}", xlabel="s")
        for axis in row[len(joints) :]:
            axis.axis("off")
        row[0].set_ylabel("angle (rad)")
    axes[0, 0].legend(frameon=False)
    figure.suptitle("a held-out clip and the student's motion (closer is better)")
    return figure


# --- the report's


def latent(points):
    """Latent means of held-out episodes in their two main directions, by clip and by phase.

    points: xy (n 2), clip (n), phase (n): the share of the clip that has passed.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    kinds = {clip: i for i, clip in enumerate(dict.fromkeys(points["clip"].tolist()))}
    colors = [kinds[clip] for clip in points["clip"].tolist()]
    axes[0].scatter(*points["xy"].T, c=colors, cmap="tab10", s=3)
    seen = axes[1].scatter(*points["xy"].T, c=100 * points["phase"], cmap="viridis", s=3)
    figure.colorbar(seen, ax=axes[1], label="share of the clip that has passed (%)")
    axes[0].set(xlabel="first direction", ylabel="second direction", title="by clip")
    axes[1].set(xlabel="first direction", title="by phase")
    figure.suptitle("latent means, PCA (good: smooth paths, and clips that share them)")
    return figure


def learning(curves, steps_per_update, goal, task):
    """Reward per control step while learning a new task: the seeds' mean and range. curves: {kind: (seeds updates)}."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    for (kind, curve), color in zip(curves.items(), (STUDENT, "tab:orange"), strict=False):
        steps = np.arange(1, curve.shape[1] + 1) * steps_per_update / 1000
        axis.plot(steps, curve.mean(0), color=color, lw=1.4, label=f"{kind} actions")
        axis.fill_between(steps, curve.min(0), curve.max(0), color=color, alpha=0.2, lw=0)
    axis.axhline(goal, color=TRUE, lw=1, ls="--", label="80 % of the better one's end")
    axis.set(xlabel="control steps (thousands)", ylabel="reward per step (1 is best)", ylim=(0, 1))
    axis.set_title(f"{task}: PPO on latents and on motor commands (seeds: mean, range)")
    axis.legend(frameon=False)
    return figure


def strip(model, qpos):
    """Film strip of an interpolation, a panel per latent: postures, the later the darker, as lines between the bodies.

    qpos: (T E nq), T postures of E latents; seen in the plane in which the bodies move most.
    """
    places = np.stack([positions(model, postures) for postures in np.moveaxis(qpos, 1, 0)])  # E T nb 3
    bones = [(i, model.body_parentid[i]) for i in range(1, model.nbody) if model.body_parentid[i] > 0]
    across = sorted(places[:, :, 1:].std((0, 1, 2)).argsort()[::-1][:2])
    figure = Figure(figsize=(1.8 * len(places), 2.6), layout="constrained")
    axes = figure.subplots(1, len(places), sharex=True, sharey=True)
    for axis, postures, share in zip(axes, places, np.linspace(0, 1, len(places)), strict=True):
        for t, bodies in enumerate(postures):
            for bone in bones:
                axis.plot(*bodies[list(bone)][:, across].T, color=STUDENT, lw=1.5, alpha=(t + 1) / len(postures))
        axis.set(title=f"{share:.2f}", aspect="equal", xlabel="xyz"[across[0]])
    figure.axes[0].set_ylabel("xyz"[across[1]])
    figure.suptitle("a third of a second with the latent held, between two latents (good: it changes gradually)")
    return figure
