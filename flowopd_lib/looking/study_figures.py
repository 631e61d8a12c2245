"""Figures of the studies: what a notebook asked, drawn."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..stats import GOLD
from .figures import COLORS, FULL_SCALE, model_colors
from .trajectories import Walk


def judge_figure(tests: pd.DataFrame, graded: pd.DataFrame) -> Figure:
    """Left: each judge's test with its interval and the aim, a ring for a twin's. Right: DeQA's score against
    the true level."""
    import seaborn as sns

    height = max(3.9, 0.55 * len(tests) + 0.9)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, height), width_ratios=(1.25, 1))
    rows, colors = np.arange(len(tests)), [COLORS[judge.removesuffix(GOLD)] for judge in tests["judge"]]
    left.errorbar(
        tests["value"],
        rows,
        xerr=[tests["value"] - tests["low"], tests["high"] - tests["value"]],
        fmt="none",
        ecolor=".25",
        capsize=4,
    )
    left.scatter(
        tests["value"],
        rows,
        c=["white" if j.endswith(GOLD) else c for j, c in zip(tests["judge"], colors)],
        edgecolors=colors,
        linewidths=2,
        s=70,
        zorder=3,
        label="measured, 95 % interval",
    )
    left.scatter(tests["aim"], rows, marker="|", s=300, c="k", label="aim")
    names = [textwrap.fill(f"{r['judge']} {r['test']} (n={r['n']})", 40) for _, r in tests.iterrows()]
    left.set_yticks(rows, names, fontsize=9)
    left.set(
        xlim=(min(0.8, tests["low"].min() - 0.02), 1.005),
        xlabel="share right, or rank correlation",
        title="Judges, judged on held-out pictures",
        ylim=(len(tests) - 0.5, -0.5),
    )
    left.legend(loc="best", fontsize=9)
    sns.pointplot(
        graded,
        x="level",
        y="score",
        hue="kind",
        dodge=0.3,
        errorbar=("ci", 95),
        palette="colorblind",
        ax=right,
        markersize=5,
        linewidth=1.5,
        seed=0,
    )
    right.set(
        xlabel="true quality level", ylabel="DeQA score", ylim=(0.8, 5.2), title=f"DeQA (n={len(graded)})"
    )
    right.legend(title="spoiled by", fontsize=9, loc="upper left")
    return figure


def walk_figure(walk: Walk, title: str, columns: int = 8) -> Figure:
    """A walk at `columns` of its steps: the noisy latent decoded, the clean picture predicted, where each
    teacher's velocity differs (one scale for all); below, the KL to each teacher at every step."""
    shown = sorted({round(i * (len(walk.sigmas) - 1) / (columns - 1)) for i in range(columns)})
    names, top = list(walk.difference), max((field.max() for field in walk.difference.values()), default=1.0)
    rows = 2 + len(names)
    figure = plt.figure(figsize=(1.35 * len(shown) + 1.2, 1.45 * rows + (2.6 if names else 0.5)))
    grid = figure.add_gridspec(rows + bool(names), len(shown), height_ratios=[1] * rows + [1.7] * bool(names))
    for column, step in enumerate(shown):
        pictures = [
            (walk.noisy[step], "$x_σ$ decoded"),
            (walk.clean[step], "predicted $x_0$"),
            *((walk.difference[n][step], f"Δv to\n{n}") for n in names),
        ]
        for row, (picture, label) in enumerate(pictures):
            axis = figure.add_subplot(grid[row, column])
            if row < 2:
                axis.imshow(picture.permute(1, 2, 0).numpy())
            else:
                axis.imshow(picture, cmap="magma", vmin=0, vmax=top)
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            if not column:
                axis.set_ylabel(label, fontsize=9)
            if not row:
                axis.set_title(f"σ {walk.sigmas[step]:.2f}", fontsize=10, fontweight="normal")
    if names:
        axis = figure.add_subplot(grid[rows, :])
        for name, color in model_colors(names).items():
            axis.plot(range(1, len(walk.sigmas) + 1), walk.kl[name], "o-", ms=4, color=color, label=name)
        axis.set(
            yscale="log" if (walk.kl > 0).any(axis=None) else "linear",
            xlabel="step",
            ylabel="KL of a step, nats",
        )
        axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
        axis.legend(fontsize=8, ncols=4)
    figure.suptitle(title, fontweight="bold")
    return figure


def kl_figure(curve: pd.DataFrame, steps: int, title: str) -> Figure:
    """How a student nears its teachers while it is distilled: the velocities' squared difference by task, and
    the KL by step of its walk of so many `steps`. Where steps are drawn at random, an iteration
    tells of those it drew."""
    import seaborn as sns

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    gaps = [c for c in curve if c.startswith("gap_")]
    colors = dict(zip(gaps, [*COLORS.values(), *sns.color_palette("dark").as_hex()]))

    def line(axis, column: str, window: int, **style) -> None:
        told = curve[["iteration", column]].dropna()
        axis.plot(told["iteration"], told[column].rolling(window, min_periods=1, center=True).mean(), **style)

    number, steps = (
        steps,
        sorted([c for c in curve if c.startswith("kl_step_")], key=lambda c: int(c.split("_")[-1])),
    )
    # where steps are drawn: all of them, about twice
    window = 2 * len(steps) if curve[steps].isna().any(axis=None) else 5
    for column in gaps:
        line(
            left,
            column,
            window,
            lw=2,
            color=colors[column],
            label=f"to the teacher of {column.removeprefix('gap_')}",
        )
    for column, color in zip(steps, sns.color_palette("viridis", len(steps))):
        line(
            right,
            column,
            min(5, max(1, curve[column].count() // 4)),
            lw=1.6,
            marker=".",
            color=color,
            label=f"step {int(column.split('_')[-1]) + 1} of {number}",
        )
    left.set(
        yscale="log", xlabel="iteration", ylabel="mean squared difference of velocities", title="by teacher"
    )
    right.set(yscale="log", xlabel="iteration", ylabel="KL of a step, nats", title="by step of the walk")
    left.legend(fontsize=9)
    figure.legend(*right.get_legend_handles_labels(), fontsize=9, loc="outside right center")
    figure.suptitle(title, fontweight="bold")
    return figure


def steps_figure(table: pd.DataFrame, title: str) -> Figure:
    """By step of a walk: the share of the loss that it is under each weighting, and what learning from it
    alone brings (`steps.worth_of_steps`)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    shares, ticks = (
        [c for c in table if c.startswith("share ")],
        [f"{r.step}\nσ {r.sigma:.2f}" for r in table.itertuples()],
    )
    for i, (column, colour) in enumerate(zip(shares, ("#D55E00", "#E69F00", "#0072B2"))):
        left.bar(
            table["step"] + 0.27 * (i - (len(shares) - 1) / 2),
            table[column],
            0.25,
            color=colour,
            label=column.removeprefix("share "),
        )
    left.set(ylabel="share of the loss", xlabel="step", title="what a loss looks at")
    left.legend(title="weighting", fontsize=9)
    right.errorbar(
        table["step"],
        table["nearer"],
        yerr=[table["nearer"] - table["low"], table["high"] - table["nearer"]],
        fmt="o",
        ms=7,
        capsize=4,
        color="#0072B2",
    )
    right.axhline(0, color=".3", lw=1)
    right.set(
        ylabel="pictures nearer their teachers'",
        xlabel="step learned from, alone",
        title=f"what it brings (n={table['n'].iloc[0]} prompts)",
    )
    for axis in (left, right):
        axis.set_xticks(table["step"], ticks, fontsize=8)
    figure.suptitle(title, fontweight="bold")
    return figure


def gain_matrix(differences: pd.DataFrame, title: str, scales: Mapping[str, float] = FULL_SCALE) -> Figure:
    """Models (rows) by judges (columns): the change against the baseline with its interval, coloured by its
    share of the full scale.

    `differences` is `paired_differences` with one row a model and judge. Bold: the interval leaves out 0.
    """
    models, judges = list(differences["model"].unique()), list(differences["judge"].unique())
    figure, axis = plt.subplots(figsize=(2.3 * len(judges) + 1.5, 0.75 * len(models) + 1.2))
    picture = _matrix(axis, differences.set_index(["model", "judge"]), models, judges, scales)
    counts = differences[differences["model"] == models[0]].set_index("judge")["n"]
    axis.set_xticks(range(len(judges)), [f"{j} (n={counts[j]})" for j in judges])
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
    judges = list(found["judge"].unique())
    across = min(2, len(asked))
    down = -(-len(asked) // across)
    size = (across * (1.55 * len(judges) + 1.2), down * (0.75 * len(judges) + 0.9))
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False)
    for axis in axes.flat[len(asked) :]:
        axis.set_visible(False)
    for axis, way in zip(axes.flat, asked):
        part = found[found["way"] == way].set_index(["along", "judge"])
        _matrix(axis, part, [j for j in judges if j in part.index.get_level_values(0)], judges)
        axis.set_title(titles[way], fontsize=10)
        axis.set_ylabel("taught")
    return figure


def directions_figure(changes: pd.DataFrame, title: str) -> Figure:
    """A panel per judge, a line per direction: the change of the judge's score, in shares of its full scale,
    by the size of the step along the direction (1: the whole of it), with 95 % intervals. `changes`: see
    `studies.directions`."""
    judges, directions = changes["judge"].unique(), changes["along"].unique()
    figure, axes = plt.subplots(
        1, len(judges), figsize=(3.3 * len(judges), 3.5), squeeze=False, sharex=True, sharey=True
    )
    colors, reach = model_colors(directions), changes["size"].abs().max()
    for axis, judge in zip(axes[0], judges):
        for number, direction in enumerate(directions):
            part = changes[(changes["judge"] == judge) & (changes["along"] == direction)].sort_values("size")
            # apart, lest intervals hide each other; every line goes through the start
            at = part["size"] + (number - (len(directions) - 1) / 2) * 0.02 * reach
            points = sorted([*zip(part["size"], part["mean"]), (0.0, 0.0)])
            axis.plot(*zip(*points), color=colors[direction], lw=1, alpha=0.5)
            axis.plot(at, part["mean"], "o", color=colors[direction], ms=4, label=direction)
            axis.vlines(at, part["low"], part["high"], color=colors[direction], alpha=0.6, lw=1.5)
        axis.axhline(0, color=".6", lw=1, zorder=0)
        axis.set(title=f"{judge} (n={part['n'].iloc[0]})", xlabel="size of the step")
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
            at: pd.notna(cell[name] if at[0] == at[1] else cell[f"{name}_low"]) for at, cell in cells.items()
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
        for k, ((a, b), color) in enumerate(zip(pairs, sns.color_palette("colorblind", len(pairs)))):
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
            xerr=[rows["predicted"] - rows["predicted_low"], rows["predicted_high"] - rows["predicted"]],
            yerr=[rows["measured"] - rows["measured_low"], rows["measured_high"] - rows["measured"]],
        )
    ends = [check[["predicted", "measured"]].min().min(), check[["predicted", "measured"]].max().max()]
    axis.plot(ends, ends, color=".4", lw=1, ls="--", label="identity")
    axis.set(
        xlabel="predicted change (first order)",
        ylabel="measured change",
        title=f"Taylor's prediction (n={check['n'].max()} prompts a task)",
    )
    axis.legend(fontsize=9)
    return figure
