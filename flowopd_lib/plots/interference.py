"""What optimising one reward does to the scores of others, and what each denoising step is worth
(notebooks 01 and 07)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .style import color_of, draw_intervals, draw_matrix, finish, make_panels
from .training import plot_score_curves


def plot_directions(changes: pd.DataFrame, title: str) -> Figure:
    """A panel per reward and a line per direction in the space of the weights: the change of the
    score, in shares of its full scale, by the size of the step along the direction (1: all of it),
    with 95 % intervals. `changes`: along, size, reward, mean, low, high, n."""
    start = changes.drop_duplicates(["along", "reward"]).copy()
    start[["size", "mean", "low", "high"]] = 0.0
    curves = dict(list(pd.concat([changes, start]).groupby("along", sort=False)))
    figure = plot_score_curves(curves, "size", title, sharey=True)
    figure.legends[0].set_title("along the expert")
    for axis in figure.axes:
        axis.axhline(0, color=".6", lw=1, zorder=0)
        axis.set_xlabel("size of the step")
    figure.axes[0].set_ylabel("change / full scale, 95 % interval")
    return figure


def plot_gradient_interference(table: pd.DataFrame, title: str, unit: str) -> Figure:
    """Cosines and inner products (in `unit` squared) of the gradients of two tasks, with 95 %
    intervals. Bold: the interval excludes 0. A cosine without an interval is below the noise and is
    left out. `table`: task, on, batches, and cosine and inner, each with `_low` and `_high`
    (`experiments.interference.gradient_table`)."""
    count, n = table["task"].nunique(), f"n={table['batches'].max():.0f} batches"
    figure, axes = make_panels(2, size=(1.35 * count + 0.8, 0.6 * count + 0.8))
    power = int(np.floor(np.log10(table["inner"].abs().max())))
    for axis, name, scale, label in (
        (axes[0], "cosine", 1.0, "cosine (blank: below the noise)"),
        (axes[1], "inner", 10.0**power, f"inner product, $10^{{{power}}}$ {unit}²"),
    ):
        ends = {"mean": name, "low": f"{name}_low", "high": f"{name}_high"}
        rows = table.assign(**{end: table[column] / scale for end, column in ends.items()})
        rows["mean"] = rows["mean"].where(rows["low"].notna())
        draw_matrix(axis, rows, "task", "on", number="+.2f", cbar=False)
        axis.set(title=f"{label}, {n}", xlabel="", ylabel="")
    return finish(figure, title)


def plot_timestep_ablation(table: pd.DataFrame, title: str) -> Figure:
    """Left: the share of the loss that each denoising step has, by weighting (columns `share
    NAME`). Right: by how much training on that step alone reduces the distance to the teachers'
    images (distance_reduction, low, high, n), by step and sigma."""
    figure, (left, right) = make_panels(2, size=(5.2, 3.4))
    names = [f"{row.step}\nσ {row.sigma:.2f}" for row in table.itertuples()]
    shares = table.filter(like="share ").rename(columns=lambda name: name.removeprefix("share "))
    shares.set_axis(names).plot.bar(ax=left, rot=0, width=0.8, color=[*map(color_of, shares)])
    left.set(xlabel="denoising step", ylabel="share of the loss")
    left.legend(title="weighting")
    draw_intervals(right, table.rename(columns={"distance_reduction": "mean"}), names)
    right.axhline(0, color=".3", lw=1)
    right.set(xlabel="only denoising step trained", ylabel="reduction of the distance (RMS)")
    right.set_title(f"95 % intervals, n={table['n'].iloc[0]} prompts")
    return finish(figure, title, legend=False)
