"""What training on one reward does to the scores of others, and how well it can be predicted
(notebooks 01, 02 and 07)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .style import color_of, colors_of, draw_intervals, draw_matrix, finish, make_panels, spread
from .training import plot_score_curves


def plot_directions(changes: pd.DataFrame, title: str) -> Figure:
    """A panel per reward and a line per direction in the space of the weights: the change of the
    score, in shares of its full scale, by the size of the step along the direction (1: all of it),
    with 95 % intervals. `changes`: along, size, reward, mean, low, high, n."""
    start = changes.drop_duplicates(["along", "reward"]).copy()
    start[["size", "mean", "low", "high"]] = 0.0
    figure = plot_score_curves(
        dict(list(pd.concat([changes, start]).groupby("along", sort=False))),
        "size",
        title,
        xlabel="size of the step",
        ylabel="change / full scale, 95 % interval",
        legend_title="along the expert",
        sharey=True,
    )
    for axis in figure.axes:
        axis.axhline(0, color=".6", lw=1, zorder=0)
    return figure


def plot_methods(effects: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """A panel per method of measuring interference, in its own unit and colours: which reward is
    optimised (rows) and what that does to each score (columns). Bold: the 95 % interval excludes 0.

    `effects`: method, along, reward, mean, low, high; `titles`: by method, in the order of the
    panels.
    """
    methods = [method for method in titles if method in set(effects["method"])]
    count = effects["reward"].nunique()
    figure, axes = make_panels(len(methods), 2, size=(1.35 * count + 0.8, 0.6 * count + 0.6))
    for axis, method in zip(axes, methods):
        draw_matrix(axis, effects[effects["method"] == method], "along", "reward", cbar=False)
        axis.set(title=titles[method], xlabel="score", ylabel="optimised")
    return finish(figure, "")


def plot_gradient_interference(
    table: pd.DataFrame, unit: str = "reward", title: str = "Gradients of the rewards"
) -> Figure:
    """Cosines and inner products (in `unit` squared) of the gradients of two tasks with 95 %
    intervals: over all weights and noise levels above, by block and by noise level below. A cosine
    without an interval is below the noise and is left out.

    `table`: task, on, block, sigma (`all` for both: everything), batches, and cosine and inner,
    each with `_low` and `_high`.
    """
    known = table["cosine"].where(table["cosine_low"].notna())
    table = table.assign(sigma=table["sigma"].astype(str), cosine=known)
    whole = table[(table["block"] == "all") & (table["sigma"] == "all")]
    figure, (left, right, blocks, levels) = make_panels(4, columns=2, size=(5.6, 3.6))
    power = int(np.floor(np.log10(whole["inner"].abs().max())))
    n = f"n={whole['batches'].iloc[0]} batches"
    for axis, name, scale, label in (
        (left, "cosine", 1.0, "cosine (blank: below the noise)"),
        (right, "inner", 10.0**power, f"inner product, $10^{{{power}}}$ {unit}²"),
    ):
        rows = _interval_of(whole, name, scale)
        draw_matrix(axis, rows, "task", "on", number="+.2f", cbar=False)
        axis.set(title=f"{label}, {n}", xlabel="", ylabel="")
    pairs = list(itertools.combinations(whole["task"].unique(), 2))
    for axis, column, other, label in (
        (blocks, "block", "sigma", "transformer block"),
        (levels, "sigma", "block", "noise level σ"),
    ):
        rows = table[(table[other] == "all") & (table[column] != "all")]
        keys = rows[column].unique()
        rows = _interval_of(rows, "cosine").set_index(["task", "on", column]).sort_index()
        for pair, offset in zip(pairs, spread(len(pairs), 0.1)):
            at, name = np.arange(len(keys)) + offset, " / ".join(pair)
            points = rows.loc[pair].reindex(keys)
            draw_intervals(axis, points, at, color=color_of(name), label=name)
        names = keys if column == "block" else [f"{float(sigma):.2f}" for sigma in keys]
        axis.set_xticks(range(len(keys)), names)
        axis.axhline(0, color=".4", lw=1)
        axis.set(ylim=(-1.5, 1.5), ylabel="cosine, 95 % interval", xlabel=label)
    return finish(figure, title)


def _interval_of(table: pd.DataFrame, name: str, scale: float = 1.0) -> pd.DataFrame:
    """The columns NAME, NAME_low and NAME_high, over `scale`, as mean, low and high."""
    ends = {"mean": name, "low": f"{name}_low", "high": f"{name}_high"}
    return table.assign(**{end: table[column] / scale for end, column in ends.items()})


def plot_taylor_check(check: pd.DataFrame) -> Figure:
    """Predicted against measured change of each task's reward after a step along each task's
    gradient, with 95 % intervals: task (the gradient), on, n, and predicted and measured, each with
    `_low` and `_high`."""
    figure, (axis,) = make_panels(1, size=(5.4, 4.2))
    for task, rows in check.groupby("task", sort=False):
        x, y = _interval_of(rows, "predicted"), _interval_of(rows, "measured")
        style = {"color": color_of(task), "alpha": 0.8, "capsize": 2}
        draw_intervals(axis, y, x["mean"], label=f"step along {task}", **style)
        draw_intervals(axis, x, y["mean"], horizontal=True, **style)
    axis.axline((0, 0), slope=1, color=".4", lw=1, ls="--", label="measured = predicted")
    axis.set_xlabel("predicted change (first order), 95 % interval")
    axis.set_ylabel("measured change, 95 % interval")
    return finish(figure, f"First-order prediction (n={check['n'].max()} prompts per task)")


def plot_timestep_ablation(table: pd.DataFrame, title: str) -> Figure:
    """Left: the share of the loss that each denoising step has, by weighting (columns `share
    NAME`). Right: by how much training on that step alone reduces the distance to the teachers'
    images (distance_reduction, low, high, n), by step and sigma."""
    figure, (left, right) = make_panels(2, size=(5.2, 3.4))
    names = [f"{row.step}\nσ {row.sigma:.2f}" for row in table.itertuples()]
    shares = table.filter(like="share ").rename(columns=lambda name: name.removeprefix("share "))
    shares.set_axis(names).plot.bar(ax=left, rot=0, width=0.8, color=colors_of(shares))
    left.set(xlabel="denoising step", ylabel="share of the loss")
    left.legend(title="weighting")
    draw_intervals(right, table.rename(columns={"distance_reduction": "mean"}), names)
    right.axhline(0, color=".3", lw=1)
    right.set(xlabel="only denoising step trained", ylabel="reduction of the distance (RMS)")
    right.set_title(f"95 % intervals, n={table['n'].iloc[0]} prompts")
    return finish(figure, title, legend=False)
