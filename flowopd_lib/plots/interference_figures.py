"""Figures of what one reward does to the scores of others: matrices, and ways to foretell them."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .figures import FULL_SCALE, model_colors


def gain_matrix(
    differences: pd.DataFrame, title: str, scales: Mapping[str, float] = FULL_SCALE
) -> Figure:
    """Models (rows) by rewards (columns): the change against the baseline with its interval, coloured by its
    share of the full scale.

    `differences` is `paired_differences` with one row a model and reward. Bold: the interval leaves out 0.
    """
    models, rewards = list(differences["model"].unique()), list(differences["reward"].unique())
    figure, axis = plt.subplots(figsize=(2.3 * len(rewards) + 1.5, 0.75 * len(models) + 1.2))
    picture = _matrix(axis, differences.set_index(["model", "reward"]), models, rewards, scales)
    counts = differences[differences["model"] == models[0]].set_index("reward")["n"]
    axis.set_xticks(range(len(rewards)), [f"{j} (n={counts[j]})" for j in rewards])
    axis.set_title(title)
    figure.colorbar(picture, ax=axis, label="change / full scale")
    return figure


def _matrix(axis, cells: pd.DataFrame, rows: list, columns: list, scales: Mapping[str, float] = {}):
    """A cell for each row and column of which `cells` (mean, low, high) tells."""
    share = np.full((len(rows), len(columns)), np.nan)
    for i, j in [(i, j) for i in range(len(rows)) for j in range(len(columns))]:
        if (rows[i], columns[j]) in cells.index:
            share[i, j] = cells.loc[(rows[i], columns[j]), "mean"] / scales.get(columns[j], 1.0)
    limit = max(np.nanmax(np.abs(share), initial=0.0), 1e-6)
    for i, j in zip(*np.nonzero(np.isfinite(share))):
        cell = cells.loc[(rows[i], columns[j])]
        axis.text(
            j,
            i,
            f"{cell['mean']:+.3f}\n[{cell['low']:+.3f}, {cell['high']:+.3f}]",
            ha="center",
            va="center",
            fontsize=9,
            fontweight="bold" if cell["low"] > 0 or cell["high"] < 0 else "normal",
            color="white" if abs(share[i, j]) > 0.65 * limit else "black",
        )
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.grid(False)
    return axis.imshow(share, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")


def ways_figure(found: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """One question asked several ways (`directions.ways`), a panel each: what is taught (rows) and what it
    does to a score (columns), each panel in its own unit and colours. Bold: the interval leaves out 0."""
    asked = [way for way in titles if way in set(found["way"])]
    rewards = list(found["reward"].unique())
    across = min(2, len(asked))
    down = -(-len(asked) // across)
    size = (across * (1.55 * len(rewards) + 1.2), down * (0.75 * len(rewards) + 0.9))
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False)
    for axis in axes.flat[len(asked) :]:
        axis.set_visible(False)
    for axis, way in zip(axes.flat, asked):
        part = found[found["way"] == way].set_index(["along", "reward"])
        _matrix(axis, part, [j for j in rewards if j in part.index.get_level_values(0)], rewards)
        axis.set_title(titles[way], fontsize=10)
        axis.set_ylabel("taught")
    return figure


def directions_figure(changes: pd.DataFrame, title: str) -> Figure:
    """A panel per reward, a line per direction: the change of the reward's score, in shares of its full scale,
    by the size of the step along the direction (1: the whole of it), with 95 % intervals. `changes`: see
    `studies.directions`."""
    rewards, directions = changes["reward"].unique(), changes["along"].unique()
    figure, axes = plt.subplots(
        1, len(rewards), figsize=(3.3 * len(rewards), 3.5), squeeze=False, sharex=True, sharey=True
    )
    colors, reach = model_colors(directions), changes["size"].abs().max()
    for axis, reward in zip(axes[0], rewards):
        for number, direction in enumerate(directions):
            part = changes[
                (changes["reward"] == reward) & (changes["along"] == direction)
            ].sort_values("size")
            # apart, lest intervals hide each other; every line goes through the start
            at = part["size"] + (number - (len(directions) - 1) / 2) * 0.02 * reach
            points = sorted([*zip(part["size"], part["mean"]), (0.0, 0.0)])
            axis.plot(*zip(*points), color=colors[direction], lw=1, alpha=0.5)
            axis.plot(at, part["mean"], "o", color=colors[direction], ms=4, label=direction)
            axis.vlines(at, part["low"], part["high"], color=colors[direction], alpha=0.6, lw=1.5)
        axis.axhline(0, color=".6", lw=1, zorder=0)
        axis.set(title=f"{reward} (n={part['n'].iloc[0]})", xlabel="size of the step")
    axes[0, 0].set_ylabel("change / full scale")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(len(directions), 8),
        fontsize=9,
        title="along the expert of",
        title_fontsize=9,
    )
    figure.suptitle(title, fontweight="bold")
    return figure


def interference_figure(
    table: pd.DataFrame, unit: str = "reward", title: str = "Gradients of the rewards"
) -> Figure:
    """Cosines and inner products (`unit` squared) of the tasks' gradients over all weights and noise levels,
    with intervals; below by block and by noise level, a pair a colour. A cosine without a known interval has
    no colour. `floor`: the cosine that two single batches would show if the true gradients were parallel,
    noise pulling it to 0."""
    import seaborn as sns

    whole = table[(table["block"] == "all") & (table["sigma"] == "all")].set_index(["task", "on"])
    tasks = list(dict.fromkeys(table["task"]))
    pairs = [(a, b) for i, a in enumerate(tasks) for b in tasks[i + 1 :]]
    figure, ((left, middle), (below, right)) = plt.subplots(2, 2, figsize=(13, 9))
    cells = {(i, j): whole.loc[(a, b)] for i, a in enumerate(tasks) for j, b in enumerate(tasks)}
    for axis, name in ((left, "cosine"), (middle, "inner")):
        known = {
            at: pd.notna(cell[name] if at[0] == at[1] else cell[f"{name}_low"])
            for at, cell in cells.items()
        }
        values = np.array(
            [
                [cells[i, j][name] if known[i, j] else np.nan for j in range(len(tasks))]
                for i in range(len(tasks))
            ],
            float,
        )
        limit = 1.0 if name == "cosine" else max(np.nanmax(np.abs(values)), 1e-12)
        power = int(np.floor(np.log10(limit)))
        axis.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        for (i, j), cell in cells.items():
            numbers = [f"{cell[name + end] / 10**power:+.2f}" for end in ("", "_low", "_high")]
            text = f"{numbers[0]}\n[{numbers[1]}, {numbers[2]}]" if known[i, j] else "lost in noise"
            if name == "cosine":
                text = "1" if i == j and known[i, j] else f"{text}\nfloor {cell['floor']:.2g}"
            axis.text(
                j,
                i,
                text,
                ha="center",
                va="center",
                fontsize=9,
                color="white" if abs(values[i, j]) > 0.6 * limit else "black",
            )
        axis.set_xticks(range(len(tasks)), tasks)
        axis.set_yticks(range(len(tasks)), tasks)
        axis.set_title(
            f"{'cosine of gradients' if name == 'cosine' else f'inner product ($10^{{{power}}}$ {unit}²)'}, "
            f"n={whole['batches'].iloc[0]} batches"
        )
        axis.grid(False)
    for axis, column, fixed in ((below, "block", "sigma"), (right, "sigma", "block")):
        part = table[(table[fixed] == "all") & (table[column] != "all")]
        places = list(dict.fromkeys(part[column]))
        for k, ((a, b), color) in enumerate(
            zip(pairs, sns.color_palette("colorblind", len(pairs)))
        ):
            rows = part[(part["task"] == a) & (part["on"] == b)].set_index(column).loc[places]
            # a cosine whose interval is not known says nothing
            rows = rows.where(rows["cosine_low"].notna())
            x = np.arange(len(places)) + (k - len(pairs) / 2) * 0.08
            axis.errorbar(
                x,
                rows["cosine"],
                yerr=[rows["cosine"] - rows["cosine_low"], rows["cosine_high"] - rows["cosine"]],
                fmt="o",
                ms=5,
                capsize=2,
                color=color,
                label=f"{a} / {b}",
            )
        axis.axhline(0, color=".4", lw=1)
        # a table on disk has its noise levels as texts, beside `all`
        names = places if column == "block" else [f"{float(sigma):.2f}" for sigma in places]
        axis.set_xticks(range(len(places)), names, fontsize=9)
        axis.set(
            ylim=(-1.5, 1.5),
            ylabel="cosine",
            title=f"cosine by {'block' if column == 'block' else 'noise level σ'}",
        )
    right.legend(fontsize=8, ncols=2, loc="lower left")
    figure.suptitle(title)
    return figure


def taylor_figure(check: pd.DataFrame) -> Figure:
    """Predicted against measured change of each task's reward after a real step along each task's gradient,
    with intervals and the identity."""
    import seaborn as sns

    figure, axis = plt.subplots(figsize=(6, 5))
    for task, color in zip(dict.fromkeys(check["task"]), sns.color_palette("colorblind")):
        rows = check[check["task"] == task]
        axis.errorbar(
            rows["predicted"],
            rows["measured"],
            fmt="o",
            ms=6,
            capsize=3,
            color=color,
            label=f"step along {task}",
            xerr=[
                rows["predicted"] - rows["predicted_low"],
                rows["predicted_high"] - rows["predicted"],
            ],
            yerr=[
                rows["measured"] - rows["measured_low"],
                rows["measured_high"] - rows["measured"],
            ],
        )
    ends = [
        check[["predicted", "measured"]].min().min(),
        check[["predicted", "measured"]].max().max(),
    ]
    axis.plot(ends, ends, color=".4", lw=1, ls="--", label="identity")
    axis.set(
        xlabel="predicted change (first order)",
        ylabel="measured change",
        title=f"Taylor's prediction (n={check['n'].max()} prompts a task)",
    )
    axis.legend(fontsize=9)
    return figure
