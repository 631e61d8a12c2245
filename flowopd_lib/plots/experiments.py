"""Figures and tables of single notebooks: interference (01), the per-timestep ablation (07), and
the results: training time, the student against its teachers, the claims table (08)."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..benchmarks import Benchmark
from ..stats import mean_interval
from .style import color_of, draw_intervals, draw_matrix, finish, make_panels
from .training import plot_score_curves

# The verdicts on a claim that was measured, and their colours.
VERDICTS = {
    "reproduced": "#009E73",
    "effect excluded": "#0072B2",
    "undecided": ".55",
    "contradicted": "#D55E00",
    "true by construction": "#CC79A7",
}
TICKS = (-30, -10, -3, -1, 0, 1, 3, 10, 30)  # of the claims figure, which is cut off at the ends

# --- interference


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
    figure, axes = make_panels(2, size=(max(1.35 * count, 3.6) + 0.8, 0.6 * count + 0.8))
    labels = {"cosine": "cosine (blank: below the noise)", "inner": f"inner product, {unit}²"}
    for axis, (name, label) in zip(axes, labels.items()):
        rows = table.rename(columns={name: "mean", f"{name}_low": "low", f"{name}_high": "high"})
        rows["mean"] = rows["mean"].where(rows["low"].notna())
        draw_matrix(axis, rows, "task", "on", number="+.2g", cbar=False)
        axis.set(title=f"{label}, {n}", xlabel="", ylabel="")
    return finish(figure, title)


# --- the per-timestep ablation


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


# --- training time and teachers


def sum_training_seconds(benchmark: Benchmark, seconds: Mapping[str, float]) -> pd.Series:
    """Seconds of training in total, by model. `seconds`: of the trainings of a run, by model; those
    of students and of the merged model count their experts' too. NaN where an expert has no
    manifest because it was trained elsewhere."""
    experts = {}
    for name in benchmark.experts:
        path = Path(benchmark.adapter(name)) / "manifest.json"
        record = json.loads(path.read_text()) if path.is_file() else {}
        experts[f"{name} expert"] = record.get("seconds", np.nan)
    total = sum(experts.values())
    own = {name: s + (total if name.startswith("student") else 0) for name, s in seconds.items()}
    return pd.Series({"base": 0.0, **experts, "merged": total, **own}, name="training, s")


def compare_with_teachers(samples: pd.DataFrame, benchmark: Benchmark) -> pd.DataFrame:
    """On what share of a task's prompts the student scores above, equal to and below its teacher:
    reward, teacher, student is, mean, low, high (95 %), n. Draw it with `plot_scores(...,
    rows="student is")`."""
    rows = []
    for reward, task, _ in benchmark.domains:
        if reward not in benchmark.experts_of:
            continue
        teacher = f"{benchmark.experts_of[reward]} expert"
        scores = samples[samples["task"] == task].pivot_table(reward, "prompt", "model")
        difference = (scores["student"] - scores[teacher]).dropna().round(9)
        for outcome, sign in (("above", 1), ("equal", 0), ("below", -1)):
            interval = mean_interval(np.sign(difference) == sign)
            rows.append((reward, teacher, outcome, *interval, len(difference)))
    columns = ["reward", "teacher", "student is", "mean", "low", "high", "n"]
    return pd.DataFrame(rows, columns=columns)


# --- the claims table


def format_claims(claims: pd.DataFrame) -> pd.DataFrame:
    """The claims table for a reader: the effect and its interval in one column, empty where nothing
    was measured."""
    effects = claims.apply("{effect:+.3f} [{low:+.3f}, {high:+.3f}]".format_map, axis=1)
    table = claims.assign(**{"effect [95 % interval]": effects.where(claims["effect"].notna())})
    columns = "claim statement where verdict measured claimed".split()
    columns += ["effect [95 % interval]", "n", "seeds", "note"]
    return table[columns].astype(object).fillna("")


def summarize_claims(claims: pd.DataFrame) -> str:
    """How many claims got which verdict, and how far the intervals go."""
    counts = {name: int((claims["verdict"] == name).sum()) for name in VERDICTS}
    made_so = counts.pop("true by construction")
    tested, counted = sum(counts.values()), ", ".join(f"{n} {name}" for name, n in counts.items())
    return (
        f"Of {len(claims)} claims {tested} are tested here: {counted}. {made_so} more are true by "
        "construction of the benchmark, so no result. Intervals are over prompts or batches; for "
        "a model trained once (`seeds`) they describe that training only. If none of the "
        f"{tested} effects existed, about {0.025 * tested:.1f} would still be expected to be "
        "called reproduced."
    )


def plot_claims(claims: pd.DataFrame, source: str) -> Figure:
    """A row per claim that was measured: the effect over half the width of its 95 % interval, with
    the sign turned so that the claim is right of 0. `source` names the run.

    `claims`: statement, verdict, claimed ("> 0" or "< 0"), effect, low, high, n.
    """
    rows = claims[claims["high"] > claims["low"]].reset_index(drop=True)
    unit = (rows["high"] - rows["low"]) / 2 * np.where(rows["claimed"] == "< 0", -1, 1)
    scaled = rows[["effect", "low", "high"]].div(unit, axis=0).clip(TICKS[0], TICKS[-1])
    ends = scaled[["low", "high"]]
    scaled = scaled.assign(mean=scaled["effect"], low=ends.min(axis=1), high=ends.max(axis=1))
    figure, (axis,) = make_panels(1, size=(12, 0.4 * len(rows) + 1.0))
    for name, color in VERDICTS.items():
        group = scaled[rows["verdict"] == name]
        if len(group):
            draw_intervals(axis, group, group.index, horizontal=True, color=color, label=name)
    names = [textwrap.fill(f"{row.statement} (n={row.n:.0f})", 72) for row in rows.itertuples()]
    axis.set_yticks(range(len(rows)), names, fontsize=8, linespacing=0.95)
    axis.axvline(0, color=".3", lw=1)
    axis.set_xscale("symlog", linthresh=2)
    axis.set_xticks(TICKS, map(str, TICKS))
    label = "effect in the direction claimed / half the width of its 95 % interval"
    axis.set(ylim=(max(len(rows), 1) - 0.5, -0.5), xlabel=f"{label} (cut off at {TICKS[-1]})")
    return finish(figure, f"The paper's claims on {source}")
