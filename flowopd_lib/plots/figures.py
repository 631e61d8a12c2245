"""Static figures, in one style: a colour per task that is the same everywhere, intervals drawn, readable at
half size."""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from ..stats import Home, rewards_in
from ..thumbnails import read_thumbnail


# Okabe and Ito's palette: told apart by colour-blind readers too.
class RewardColors(dict):
    """A colour for every reward: the paper's four have theirs, another the next of the palette."""

    def __missing__(self, reward: str) -> str:
        import seaborn as sns

        palette = sns.color_palette("dark").as_hex()
        self[reward] = palette[(len(self) - 4) % len(palette)]
        return self[reward]


COLORS = RewardColors(GenEval="#0072B2", OCR="#D55E00", PickScore="#009E73", DeQA="#CC79A7")
MODEL_COLORS = {"base": "#666666", "merged": "#E69F00", "student": "#56B4E9", "GRPO-Mix": "#882255"}
# the paper's Average divides by these; a `Benchmark` has its own
FULL_SCALE = {"GenEval": 1.0, "OCR": 1.0, "PickScore": 26.0, "DeQA": 5.0}


def use_style() -> None:
    """Set matplotlib's defaults; call once per notebook."""
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="notebook", font="DejaVu Sans")
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 110,
            "figure.constrained_layout.use": True,
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "image.interpolation": "nearest",
            "savefig.bbox": "tight",
        }
    )


def model_colors(models: Iterable[str]) -> dict[str, str]:
    """A colour for every model or training: the same in every figure for those of `MODEL_COLORS`, the rest in
    order of palettes, without what is hardly told from those."""
    import seaborn as sns

    taken = np.array([to_rgb(color) for color in MODEL_COLORS.values()])
    palette = sns.color_palette("colorblind").as_hex() + sns.color_palette("dark").as_hex()
    rest = itertools.cycle(
        c for c in palette if np.linalg.norm(taken - to_rgb(c), axis=1).min() > 0.2
    )
    return {name: MODEL_COLORS.get(name) or next(rest) for name in models}


def image_grid(
    images: torch.Tensor, captions: Sequence[str], columns: int = 6, title: str = ""
) -> Figure:
    """Images (N, 3, H, W) in [0, 1], each with its caption below."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.05 * columns, 2.85 * rows + 0.3 * bool(title)), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes.flat, images, captions):
        axis.imshow(image.permute(1, 2, 0).float().cpu().numpy())
        lines = "\n".join(
            line for part in caption.split("\n") for line in textwrap.wrap(part, 25) or [""]
        )
        axis.text(0.5, -0.04, lines, transform=axis.transAxes, ha="center", va="top", fontsize=9)
    if title:
        figure.suptitle(title, fontweight="bold")
    return figure


def pictures_of(table: pd.DataFrame, folder: str | Path) -> torch.Tensor:
    """(N, 3, H, W) in [0, 1]: the thumbnails of a table of samples that lies in `folder`."""
    pictures = [Image.open(io.BytesIO(read_thumbnail(folder, place))) for place in table["picture"]]
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def captions_of(table: pd.DataFrame) -> list[str]:
    """A prompt and its scores, for each row of a table of samples: the task's own reward first, the looks
    below."""

    rewards = rewards_in(table)
    looks = [name for name in rewards if table[name].max() > 1]

    def line(row, names, digits):
        return "  ".join(f"{n} {row[n]:.{digits}f}" for n in names if not np.isnan(row[n]))

    return [
        "\n".join(
            filter(
                None,
                (
                    row["prompt"],
                    line(row, [n for n in rewards if n not in looks], 2),
                    line(row, looks, 1),
                ),
            )
        )
        for _, row in table.iterrows()
    ]


def readable(summary: pd.DataFrame) -> pd.DataFrame:
    """A summary with "mean [low, high]" in one column, for a reader."""
    text = [f"{r['mean']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for _, r in summary.iterrows()]
    return summary.drop(columns=["mean", "low", "high"]).assign(**{"mean [95 % interval]": text})


def score_bars(
    summary: pd.DataFrame, label: str, title: str, scales: Mapping[str, float] = FULL_SCALE
) -> Figure:
    """A bar per row of a summary, as a share of each reward's full scale, with its interval; `label` names the
    column."""
    figure, axis = plt.subplots(figsize=(9, 0.42 * len(summary) + 1.3))
    scale = summary["reward"].map(lambda reward: scales.get(reward, 1.0))
    mean, low, high = (summary[c] / scale for c in ("mean", "low", "high"))
    told = [f"{reward} {scales.get(reward, 1.0):g}" for reward in summary["reward"].unique()]
    names = [f"{r[label]} · {r['reward']} (n={r['n']})" for _, r in summary.iterrows()]
    axis.barh(
        names,
        mean,
        xerr=[mean - low, high - mean],
        color=[COLORS[reward] for reward in summary["reward"]],
        height=0.7,
        error_kw=dict(lw=1.6, capsize=3),
    )
    axis.set(
        xlim=(0, 1.02),
        xlabel=f"mean score / full scale ({', '.join(told)}), 95 % interval",
        title=title,
    )
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    return figure


def model_panels(summary: pd.DataFrame, title: str) -> Figure:
    """A panel per reward, a point with its interval per model (columns model, reward, mean, low, high); the
    line is the first model's mean."""
    rewards, models = list(summary["reward"].unique()), list(summary["model"].unique())
    figure, axes = plt.subplots(
        1,
        len(rewards),
        figsize=(2.9 * len(rewards) + 1.4, 0.42 * len(models) + 1.6),
        sharey=True,
        squeeze=False,
    )
    for axis, reward in zip(axes[0], rewards):
        rows = summary[summary["reward"] == reward].set_index("model").loc[models]
        axis.axvline(rows["mean"].iloc[0], color=".6", lw=1, ls="--")
        axis.errorbar(
            rows["mean"],
            range(len(models)),
            xerr=[rows["mean"] - rows["low"], rows["high"] - rows["mean"]],
            fmt="o",
            ms=7,
            capsize=4,
            color=COLORS.get(reward, ".2"),
        )
        axis.set_yticks(range(len(models)), models)
        axis.xaxis.set_major_locator(plt.MaxNLocator(4))
        axis.set(ylim=(len(models) - 0.5, -0.5), xlabel="mean, 95 % interval")
        axis.set_title(f"{reward} (n={rows['n'].iloc[0]})", fontsize=11)
    figure.suptitle(title, fontweight="bold")
    return figure


def training_curves(
    curves: Mapping[str, pd.DataFrame],
    columns: Sequence[str],
    title: str,
    figure: Figure | None = None,
) -> Figure:
    """A panel per column of the metrics, a line per training: its value at every iteration, faint, and the
    mean of ten neighbours.

    Drawn into `figure`, if it is given; else into one of pyplot's, which only the main thread may make.
    """
    import seaborn as sns

    figure = figure or plt.figure()
    figure.set_size_inches(4.2 * len(columns), 3.3)
    axes = figure.subplots(1, len(columns), squeeze=False)
    for axis, column in zip(axes[0], columns):
        for (name, curve), color in zip(
            curves.items(), sns.color_palette("colorblind", len(curves))
        ):
            if column in curve:
                axis.plot(curve["iteration"], curve[column], color=color, alpha=0.25, lw=1)
                axis.plot(
                    curve["iteration"],
                    curve[column].rolling(10, min_periods=1, center=True).mean(),
                    color=color,
                    lw=2,
                    label=name,
                )
        axis.set(xlabel="iteration", title=column, ylabel="nats" if column in ("kl", "mar") else "")
    # a first panel may lack some
    known = {
        label: handle
        for axis in axes[0]
        for handle, label in zip(*axis.get_legend_handles_labels())
    }
    axes[0, 0].legend(known.values(), known, fontsize=9)
    figure.suptitle(title, fontweight="bold")
    return figure


def probe_curves(probes: Mapping[str, pd.DataFrame], x: str, title: str) -> Figure:
    """A panel per reward, a line per training: what `fit`'s probes told on the way, with 95 % intervals, over
    `iteration` or `seconds` of training.

    Lines are moved apart by a hundredth of the axis, lest intervals hide each other.
    """
    rewards = list(dict.fromkeys(reward for rows in probes.values() for reward in rows["reward"]))
    figure, axes = plt.subplots(1, len(rewards), figsize=(3.3 * len(rewards), 3.5), squeeze=False)
    colors = model_colors(probes)
    for axis, reward in zip(axes[0], rewards):
        for number, (name, rows) in enumerate(probes.items()):
            part = rows[rows["reward"] == reward].sort_values("iteration")
            at = part[x] + (number - (len(probes) - 1) / 2) * 0.012 * max(
                r[x].max() for r in probes.values()
            )
            axis.plot(at, part["mean"], "o-", color=colors[name], lw=2, ms=4, label=name)
            axis.vlines(at, part["low"], part["high"], color=colors[name], alpha=0.35, lw=1.5)
        axis.set(
            title=f"{reward} (n={part['n'].iloc[0]})", xlabel="training, s" if x == "seconds" else x
        )
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(len(probes), 6),
        fontsize=9,
    )
    figure.suptitle(title, fontweight="bold")
    return figure


def paths_figure(probes: Mapping[str, pd.DataFrame], home: Home, title: str) -> Figure:
    """A panel per pair of rewards, a line per training: where its two scores went while it trained, from the
    ring to the dot. A line down to the right, or up to the left, is a seesaw. Small dots are looks, whose
    prompts are few; the line is the mean of up to five neighbours, but at its ends."""
    pairs = list(itertools.combinations([reward for reward, *_ in home], 2))
    columns = min(len(pairs), 3)
    rows = -(-len(pairs) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.4 * rows), squeeze=False)
    colors = model_colors(probes)
    for axis, (x, y) in zip(axes.flat, pairs):
        for name, seen in probes.items():
            path = seen.pivot(index="iteration", columns="reward", values="mean").sort_index()[
                [x, y]
            ]
            reach = [min(2, i, len(path) - 1 - i) for i in range(len(path))]
            smooth = np.array([path.iloc[i - r : i + r + 1].mean() for i, r in enumerate(reach)])
            axis.plot(path[x], path[y], ".", color=colors[name], ms=4, alpha=0.35)
            axis.plot(*smooth.T, "-", color=colors[name], lw=2, label=name)
            axis.plot(*path[[x, y]].iloc[0], "o", color=colors[name], mfc="white", ms=7)
            axis.plot(*path[[x, y]].iloc[-1], "o", color=colors[name], ms=6)
        axis.set(xlabel=x, ylabel=y)
    for axis in axes.flat[len(pairs) :]:
        axis.set_axis_off()
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(len(probes), 6), fontsize=9)
    figure.suptitle(title, fontweight="bold")
    return figure


def gold_figure(gains: pd.DataFrame, title: str) -> Figure:
    """`gold_gains`: for each reward what every model gained with it and with its gold that nothing is trained
    on, in full scales with 95 % intervals. Below the line a gain is the reward's alone."""
    rewards = list(gains["reward"].unique())
    figure, axes = plt.subplots(1, len(rewards), figsize=(4.2 * len(rewards), 4.6), squeeze=False)
    colors = model_colors(gains["model"].unique())
    for axis, reward in zip(axes.flat, rewards):
        here = gains[gains["reward"] == reward].set_index(["by", "model"])
        proxy, gold = here.loc["proxy"], here.loc["gold"]
        for model in proxy.index:
            x, y = proxy.loc[model], gold.loc[model]
            axis.errorbar(
                x["mean"],
                y["mean"],
                xerr=[[x["mean"] - x["low"]], [x["high"] - x["mean"]]],
                yerr=[[y["mean"] - y["low"]], [y["high"] - y["mean"]]],
                fmt="o",
                ms=6,
                color=colors[model],
                label=model,
            )
        ends = [
            min(proxy["low"].min(), gold["low"].min(), 0),
            max(proxy["high"].max(), gold["high"].max(), 0),
        ]
        axis.plot(ends, ends, color=".6", lw=1, zorder=0)
        axis.axhline(0, color=".8", lw=1, zorder=0)
        axis.axvline(0, color=".8", lw=1, zorder=0)
        axis.set(title=f"{reward} (n={int(proxy['n'].max())})", xlabel="gained with the reward")
    axes[0, 0].set_ylabel("gained with its gold")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 6), fontsize=9
    )
    figure.suptitle(title, fontweight="bold")
    return figure
