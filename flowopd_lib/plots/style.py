"""What all figures share: colours, panels, points with intervals, matrices, legends."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, whose colours colour-blind readers can tell apart.
COLORS = {
    "geneval": "#0072B2",
    "ocr": "#D55E00",
    "pickscore": "#009E73",
    "deqa": "#CC79A7",
    "base": "#666666",
    "merged": "#E69F00",
    "student": "#56B4E9",
    "grpo-mix": "#882255",
}
# for all other names, in the order in which they are first drawn
OTHER_COLORS = itertools.cycle(sns.color_palette("dark").as_hex())


def use_style() -> None:
    """Set matplotlib's defaults; call once per notebook."""
    settings = {
        "figure.dpi": 110,
        "savefig.bbox": "tight",
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    sns.set_theme(context="paper", style="whitegrid", font="DejaVu Sans", rc=settings)


@cache
def color_of(name: str) -> str:
    """The colour of a model, reward or task, the same in all figures of a process. A reward, its
    gold reward and its expert share one."""
    key = name.removesuffix(" gold").removesuffix(" expert").lower()
    return COLORS[key] if key in COLORS else next(OTHER_COLORS)


def make_panels(
    count: int, columns: int | None = None, size: tuple[float, float] = (3.6, 3.3), **options
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes of `size` inches, at most `columns` in a row (None: all);
    `options` as `plt.subplots` takes them. Only the main thread may use pyplot, which keeps a list
    of its figures."""
    columns = min(count, columns or count)
    rows = -(-count // columns)
    make = plt.figure if threading.current_thread() is threading.main_thread() else Figure
    figure = make(figsize=(columns * size[0] + 0.6, rows * size[1] + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for axis in axes[count:]:
        axis.remove()
    return figure, list(axes[:count])


def finish(figure: Figure, title: str, legend: bool = True) -> Figure:
    """Add the title and, below, where it covers nothing, one legend for all axes."""
    entries = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles))
    if legend and len(entries) > 1:
        columns = int(figure.get_figwidth() / (0.08 * max(map(len, entries)) + 0.5)) or 1
        figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns)
    figure.suptitle(title, fontweight="bold", fontsize=12)
    return figure


def spread(count: int, width: float) -> np.ndarray:
    """(count,): offsets around 0 in steps of `width`: intervals at one position, next to each
    other."""
    return (np.arange(count) - (count - 1) / 2) * width


def draw_intervals(
    axis: Axes, rows: pd.DataFrame, at: Sequence, horizontal: bool = False, **style
) -> None:
    """Points with their 95 % intervals at the positions `at`; `rows` has mean, low, high."""
    style = {"fmt": "o", "markersize": 6, "capsize": 3, **style}
    below, above = rows["mean"] - rows["low"], rows["high"] - rows["mean"]
    errors = [below.clip(lower=0), above.clip(lower=0)]
    x, y = (rows["mean"], at) if horizontal else (at, rows["mean"])
    axis.errorbar(x, y, **{"xerr" if horizontal else "yerr": errors}, **style)


def draw_matrix(
    axis: Axes, table: pd.DataFrame, row: str, column: str, scale=1.0, number="+.3f", **options
) -> None:
    """A heatmap of the means in `table` (columns `row`, `column`, mean, low, high), coloured by
    mean / `scale` (a number or a series).

    Each cell shows its mean and 95 % interval, in bold where the interval excludes 0; one whose
    mean is NaN is blank. `number` is the format of the numbers; `options` as `seaborn.heatmap`
    takes them.
    """
    text = f"{{mean:{number}}}\n[{{low:{number}}}, {{high:{number}}}]"
    texts = [text.format(**values) for values in table[["mean", "low", "high"]].to_dict("records")]
    bold = (table["low"] > 0) | (table["high"] < 0)
    cells = table[[row, column]].assign(share=table["mean"] / scale, text=texts, bold=bold)
    cells = cells.pivot(index=row, columns=column).reindex(table[row].unique())
    cells = cells.reindex(table[column].unique(), axis=1, level=1)
    share, texts, bold = cells["share"], cells["text"], cells["bold"]
    limit = max(share.abs().max(axis=None), 1e-9)
    colors = {"cmap": "RdBu", "vmin": -limit, "vmax": limit}
    sns.heatmap(share, annot=texts, fmt="", ax=axis, annot_kws={"fontsize": 9}, **colors, **options)
    for label, strong in zip(axis.texts, bold.to_numpy()[share.notna()]):
        label.set_fontweight("bold" if strong else "normal")
    axis.tick_params(rotation=0)
    axis.grid(False)
