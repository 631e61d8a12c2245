"""Images with their scores, scores by model, and gains: the figures and tables that most notebooks
draw."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from PIL import Image

from ..files import read_thumbnail
from ..stats import rewards_in
from .style import color_of, draw_intervals, draw_matrix, finish, make_panels, spread

# --- images


def load_images(table: pd.DataFrame, folder: str | Path) -> torch.Tensor:
    """(N, 3, H, W) in [0, 1]: the thumbnails in the column `image` of a table of samples that lies
    in `folder`."""
    images = [Image.open(io.BytesIO(read_thumbnail(folder, path))) for path in table["image"]]
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255


def format_captions(table: pd.DataFrame) -> list[str]:
    """The prompt and, below it, the scores of each row of a table of samples."""
    captions = []
    for row in table.to_dict("records"):
        scores = [f"{name} {row[name]:.2f}" for name in rewards_in(table) if pd.notna(row[name])]
        captions.append("\n".join([row["prompt"], *scores]))
    return captions


def plot_image_grid(
    images: Sequence[torch.Tensor | None],
    captions: Sequence[str],
    columns: int = 6,
    title: str = "",
    column_titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
) -> Figure:
    """Images (3, H, W) in [0, 1], each with its caption below; None leaves a cell empty."""
    captions = [
        "\n".join(textwrap.fill(line, 25) for line in text.split("\n")) for text in captions
    ]
    height = 1.8 + 0.14 * max(text.count("\n") + 1 for text in captions)
    figure, axes = make_panels(len(images), columns, size=(1.8, height))
    for axis, image, caption in zip(axes, images, captions):
        if image is not None:
            axis.imshow(image.permute(1, 2, 0).float().cpu().numpy(), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel(caption, fontsize=8)
        sns.despine(ax=axis, left=True, bottom=True)
    for axis, name in zip(axes, column_titles):
        axis.set_title(name)
    for axis, name in zip(axes[::columns], row_titles):
        text = textwrap.fill(name, 22)
        axis.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)
    return finish(figure, title)


# --- tables


def format_intervals(summary: pd.DataFrame) -> pd.DataFrame:
    """A summary with mean, low and high in one column, for a reader."""
    ends, cells = ["mean", "low", "high"], []
    for mean, low, high in summary[ends].to_numpy():
        digits = 3 if max(-low, high) >= 0.1 else 4  # distances are small
        cells.append(f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
    return summary.drop(columns=ends).assign(**{"mean [95 % interval]": cells})


def tabulate_scores(
    scores: pd.DataFrame, paper: Mapping[str, Mapping] | None = None
) -> pd.DataFrame:
    """A row per model and a column per reward, "mean [95 % interval] n=..." in each cell; `paper`'s
    numbers, by model and reward, at the right. `scores`: model, reward, mean, low, high, n."""
    cells = format_intervals(scores)
    cells["cell"] = cells["mean [95 % interval]"] + " n=" + cells["n"].astype(str)
    order = {"index": scores["model"].unique(), "columns": scores["reward"].unique()}
    table = cells.pivot(index="model", columns="reward", values="cell").reindex(**order)
    if paper is not None:
        numbers = pd.DataFrame.from_dict(paper, orient="index").drop(columns="paper's name")
        table = table.join(numbers.add_prefix("paper: "))
    return table.astype(object).fillna("–")


# --- scores and gains


def plot_scores(
    summary: pd.DataFrame,
    title: str,
    rows: str = "model",
    series: str | None = None,
    reference: float | None = None,
    xlabel: str = "mean, 95 % interval",
) -> Figure:
    """A panel per reward and a row per value of the column `rows`: points with 95 % intervals
    (reward, mean, low, high, n).

    With `series`, a column, its values are drawn below one another, the second hollow. The dashed
    line is `reference`, or the mean of the first row.
    """
    labels, rewards = summary[rows].unique(), summary["reward"].unique()
    names = [None] if series is None else summary[series].unique()
    figure, axes = make_panels(len(rewards), size=(2.6, 0.36 * len(labels) + 1.0), sharey=True)
    for axis, reward in zip(axes, rewards):
        panel, color = summary[summary["reward"] == reward], color_of(reward)
        for name, offset, face in zip(names, spread(len(names), 0.3), (color, "white")):
            points = panel if name is None else panel[panel[series] == name]
            points = points.set_index(rows).reindex(labels)
            at, style = np.arange(len(labels)) + offset, {"color": color, "markerfacecolor": face}
            draw_intervals(axis, points, at, horizontal=True, **style)
        line = points["mean"].iloc[0] if reference is None else reference
        axis.axvline(line, color=".5", linewidth=1, linestyle="--", zorder=0)
        axis.set_yticks(range(len(labels)), labels)
        axis.xaxis.set_major_locator(plt.MaxNLocator(4))
        axis.set(ylim=(len(labels) - 0.5, -0.5), xlabel=xlabel)
        axis.set_title(f"{reward} (n={panel['n'].max():.0f})")
    for name, face in zip(names if series else (), (".3", "white")):
        axes[0].plot([], [], "o", color=".3", markerfacecolor=face, label=name)
    return finish(figure, title)


def plot_gain_matrix(differences: pd.DataFrame, title: str, scales: Mapping[str, float]) -> Figure:
    """Models (rows) by rewards (columns): the change of the score with its 95 % interval, coloured
    by its share of the full scale (`scales`). Bold: the interval excludes 0.

    `differences`: model, reward, mean, low, high, n, as `paired_differences` gives them without
    tasks.
    """
    counts = differences.groupby("reward", sort=False)["n"].max()
    rows = differences["model"].nunique()
    figure, (axis,) = make_panels(1, size=(1.7 * len(counts) + 2.5, 0.6 * rows + 0.6))
    scale, bar = differences["reward"].map(scales), {"label": "change / full scale"}
    draw_matrix(axis, differences, "model", "reward", scale, cbar_kws=bar)
    axis.set_xticklabels([f"{reward} (n={n})" for reward, n in counts.items()])
    axis.set(xlabel="", ylabel="")
    return finish(figure, title)


def plot_gold_gains(gains: pd.DataFrame, title: str) -> Figure:
    """By reward and model, what was gained over the baseline by the reward that is optimised
    (filled) and by its gold reward (hollow), which nothing is trained on. A filled point right of
    its hollow one is reward over-optimisation. `gains`: model, reward, by (proxy or gold), mean,
    low, high, n (`stats.gold_gains`)."""
    names = {"proxy": "reward", "gold": "gold reward"}
    rows = gains[gains["by"].isin(names)].replace({"by": names})
    xlabel = "gain / full scale, 95 % interval"
    return plot_scores(rows, title, series="by", reference=0.0, xlabel=xlabel)


def plot_reward_checks(checks: pd.DataFrame, graded: pd.DataFrame) -> Figure:
    """Left: each check of a reward on rendered images with its 95 % interval and its target
    (reward, test, value, low, high, aim, n). Right: the DeQA score by true quality level (kind,
    level, score)."""
    figure, (left, right) = make_panels(2, size=(5.6, max(3.2, 0.5 * len(checks))))
    names = [textwrap.fill(f"{r.reward} {r.test} (n={r.n})", 40) for r in checks.itertuples()]
    draw_intervals(left, checks.rename(columns={"value": "mean"}), names, horizontal=True)
    left.plot(checks["aim"], names, "k|", markersize=16, label="target")
    left.set_xlabel("share scored correctly, or rank correlation, 95 % interval")
    left.invert_yaxis()
    left.legend()
    sns.pointplot(graded, x="level", y="score", hue="kind", dodge=0.3, seed=0, ax=right)
    right.set(xlabel="true quality level", ylabel=f"DeQA, 95 % interval (n={len(graded)})")
    return finish(figure, "Rewards on images whose truth is known", legend=False)
