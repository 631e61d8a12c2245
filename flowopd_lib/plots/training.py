"""How a training went: its metrics, its scores on validation prompts, and its distance to the
teachers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from .style import color_of, draw_intervals, finish, make_panels, spread


def smooth(values, window: int = 10):
    """The centred mean of `window` neighbours of a series or of each column."""
    return values.rolling(window, min_periods=1, center=True).mean()


def plot_training_curves(
    curves: Mapping[str, pd.DataFrame], columns: Sequence[str], title: str
) -> Figure:
    """A panel per metric and a line per training (iteration and `columns`): the value at every
    iteration, faint, and the mean of ten neighbours."""
    figure, axes = make_panels(len(columns), size=(4.0, 3.0))
    for axis, column in zip(axes, columns):
        for name, curve in curves.items():
            if column in curve:
                x, y, color = curve["iteration"], curve[column], color_of(name)
                axis.plot(x, y, color=color, alpha=0.25, lw=1)
                axis.plot(x, smooth(y), color=color, lw=2, label=name)
        low, high = axis.dataLim.intervaly
        if low > 0 and high > 100 * low:
            axis.set_yscale("log")
        unit = {"kl": "KL to the teachers, nats", "anchor_loss": "anchor term"}
        axis.set(xlabel="iteration (line: mean of 10)", ylabel=unit.get(column, column))
    return finish(figure, title)


def plot_score_curves(curves: Mapping[str, pd.DataFrame], x: str, title: str, **panels) -> Figure:
    """A panel per reward and a line per entry of `curves` (reward, mean, low, high, n and the
    column `x`, such as `iteration` or `seconds`), with 95 % intervals. Lines are shifted a
    little, so that intervals do not hide each other."""
    table = pd.concat(curves, names=["name"]).reset_index("name").sort_values(x)
    offsets = dict(zip(curves, spread(len(curves), 0.012 * np.ptp(table[x]))))
    rewards = table["reward"].unique()
    figure, axes = make_panels(len(rewards), size=(3.0, 3.0), **panels)
    for axis, reward in zip(axes, rewards):
        panel = table[table["reward"] == reward]
        for name, offset in offsets.items():
            rows = panel[panel["name"] == name]
            style = {"color": color_of(name), "label": name, "markersize": 4, "capsize": 0}
            draw_intervals(axis, rows, rows[x] + offset, fmt="o-", elinewidth=1, **style)
        axis.set(xlabel=x, title=f"{reward} (n={panel['n'].max():.0f})")
    axes[0].set_ylabel("mean score, 95 % interval")
    return finish(figure, title)


def plot_score_paths(
    probes: Mapping[str, pd.DataFrame], rewards: Sequence[str], title: str
) -> Figure:
    """A panel per pair of rewards and a line per training (iteration, reward, mean): both
    validation scores from the start (ring) to the end (dot). A line down to the right, or up to the
    left, is a conflict. Small dots are single probes, of few prompts; the line is the mean of five
    neighbours."""
    pairs = list(itertools.combinations(rewards, 2))
    figure, axes = make_panels(len(pairs), columns=3, size=(4.0, 3.2))
    for axis, (x, y) in zip(axes, pairs):
        for name, rows in probes.items():
            path = rows.pivot(index="iteration", columns="reward", values="mean")[[x, y]]
            line, color = smooth(path, 5), color_of(name)
            line.iloc[[0, -1]] = path.iloc[[0, -1]]
            axis.plot(path[x], path[y], ".", color=color, markersize=4, alpha=0.35)
            axis.plot(line[x], line[y], color=color, lw=2, label=name)
            axis.plot(*path.iloc[0], "o", color=color, markerfacecolor="white", markersize=7)
            axis.plot(*path.iloc[-1], "o", color=color, markersize=6)
        axis.set(xlabel=f"{x}, mean score", ylabel=f"{y}, mean score")
    return finish(figure, title)


def plot_distillation(metrics: pd.DataFrame, title: str) -> Figure:
    """How a student approaches its teachers: the mean squared difference of the velocities by task
    (columns `velocity_mse_TASK`), and the KL by denoising step (`kl_step_K`, from 0), over
    `iteration`, as means of ten neighbours. Where steps are drawn at random, a row has those it
    drew."""
    figure, (left, right) = make_panels(2, size=(5.2, 3.4))
    table = metrics.set_index("iteration")
    tasks, steps = table.filter(like="velocity_mse_"), table.filter(like="kl_step_")
    for column in tasks:
        task = column.removeprefix("velocity_mse_")
        left.plot(smooth(tasks[column].dropna()), color=color_of(task), label=task)
    for column, color in zip(steps, sns.color_palette("viridis", len(steps.columns))):
        step = int(column.removeprefix("kl_step_")) + 1
        right.plot(smooth(steps[column].dropna()), color=color, label=step)
    mse, kl = "mean squared difference of velocities", "KL of a step, nats"
    left.set(xlabel="iteration", yscale="log", ylabel=mse, title="by task")
    right.set(xlabel="iteration", yscale="log", ylabel=kl, title="by denoising step")
    left.legend(title="to the teacher of")
    right.legend(title="step", loc="center left", bbox_to_anchor=(1, 0.5))
    return finish(figure, title, legend=False)
