"""Figures of the studies: what a notebook asked, drawn."""

from __future__ import annotations

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..stats import GOLD
from .figures import COLORS, model_colors
from .trajectories import Walk


def reward_figure(tests: pd.DataFrame, graded: pd.DataFrame) -> Figure:
    """Left: each reward's test with its interval and the aim, a ring for a gold's. Right: DeQA's score against
    the true level."""
    import seaborn as sns

    height = max(3.9, 0.55 * len(tests) + 0.9)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, height), width_ratios=(1.25, 1))
    rows, colors = (
        np.arange(len(tests)),
        [COLORS[reward.removesuffix(GOLD)] for reward in tests["reward"]],
    )
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
        c=["white" if j.endswith(GOLD) else c for j, c in zip(tests["reward"], colors)],
        edgecolors=colors,
        linewidths=2,
        s=70,
        zorder=3,
        label="measured, 95 % interval",
    )
    left.scatter(tests["aim"], rows, marker="|", s=300, c="k", label="aim")
    names = [
        textwrap.fill(f"{r['reward']} {r['test']} (n={r['n']})", 40) for _, r in tests.iterrows()
    ]
    left.set_yticks(rows, names, fontsize=9)
    left.set(
        xlim=(min(0.8, tests["low"].min() - 0.02), 1.005),
        xlabel="share right, or rank correlation",
        title="Rewards, scored on held-out pictures",
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
        xlabel="true quality level",
        ylabel="DeQA score",
        ylim=(0.8, 5.2),
        title=f"DeQA (n={len(graded)})",
    )
    right.legend(title="spoiled by", fontsize=9, loc="upper left")
    return figure


def walk_figure(walk: Walk, title: str, columns: int = 8) -> Figure:
    """A walk at `columns` of its steps: the noisy latent decoded, the clean picture predicted, where each
    teacher's velocity differs (one scale for all); below, the KL to each teacher at every step."""
    shown = sorted({round(i * (len(walk.sigmas) - 1) / (columns - 1)) for i in range(columns)})
    names, top = (
        list(walk.difference),
        max((field.max() for field in walk.difference.values()), default=1.0),
    )
    rows = 2 + len(names)
    figure = plt.figure(figsize=(1.35 * len(shown) + 1.2, 1.45 * rows + (2.6 if names else 0.5)))
    grid = figure.add_gridspec(
        rows + bool(names), len(shown), height_ratios=[1] * rows + [1.7] * bool(names)
    )
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
            axis.plot(
                range(1, len(walk.sigmas) + 1), walk.kl[name], "o-", ms=4, color=color, label=name
            )
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
        axis.plot(
            told["iteration"],
            told[column].rolling(window, min_periods=1, center=True).mean(),
            **style,
        )

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
        yscale="log",
        xlabel="iteration",
        ylabel="mean squared difference of velocities",
        title="by teacher",
    )
    right.set(
        yscale="log", xlabel="iteration", ylabel="KL of a step, nats", title="by step of the walk"
    )
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
