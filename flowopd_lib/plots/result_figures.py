"""Tables and figures of the results notebook: the paper's numbers beside ours, the student against its
teachers, the cost, the claims table."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..benchmarks import Benchmark
from ..stats import GOLD, mean_interval, model_scores
from ..studies.claims import HOME, Missing, Run
from .figures import readable

TEACHERS = {
    "GenEval": "geneval expert",
    "OCR": "ocr expert",
    "PickScore": "pickscore expert",
    "DeQA": "deqa expert",
}
VERDICTS = {  # on a claim that was tested: its title and its colour
    "reproduced": ("Reproduced", "#009E73"),
    "bounded": ("Bounded: smaller than claimed, and known to be", "#0072B2"),
    "undecided": ("Undecided at this n", ".55"),
    "contradicted": ("Contradicted: the other way", "#D55E00"),
    "calibrated": ("Calibrated: the benchmark was made so, which is no result", "#CC79A7"),
}

# How far from 0 the figure of the claims table goes.
FAR = 30


def said(make: Callable[[], pd.DataFrame]) -> pd.DataFrame | str:
    """What `make` returns, or the line that says what the run lacks for it."""
    try:
        return make()
    except Missing as error:
        return f"{error}: nothing to show."


def mar_scores(run: Run) -> pd.DataFrame:
    """Notebook 06's scores, distance to clean renders and diversity in one long table: model, reward, mean,
    low, high, n."""
    more = [
        pd.DataFrame(
            run.results("06_mar", key), columns=["model", "mean", "low", "high", "n"]
        ).assign(reward=key)
        for key in ("distance", "diversity")
    ]
    return pd.concat(
        [model_scores(run.samples("06_mar")), *(m for m in more if len(m))], ignore_index=True
    )


def beside(long: pd.DataFrame, paper: Mapping[str, Mapping] | None = None) -> pd.DataFrame:
    """A row a model, a column a reward, "mean [95 % interval] n=..." in each cell; the paper's numbers for
    that model at the right."""

    def cell(mean, low, high, n):
        digits = 3 if max(-low, high) >= 0.1 else 4  # distances are small
        return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}] n={n}"

    cells = [cell(*row) for row in zip(long["mean"], long["low"], long["high"], long["n"])]
    here = (
        long.assign(cell=cells)
        .pivot(index="model", columns="reward", values="cell")
        .reindex(index=long["model"].unique(), columns=long["reward"].unique())
    )
    if paper is not None:
        here = here.join(
            pd.DataFrame.from_dict(paper, orient="index")
            .drop(columns="paper's name")
            .add_prefix("paper: ")
        )
    return here.astype(object).fillna("–")


def surpassing(table: pd.DataFrame, student: str = "student") -> pd.DataFrame:
    """On what share of prompts the student is above, equal to and below its teacher: reward, teacher, student
    is, mean, low, high (95 %), n prompts."""
    rows = []
    for reward, teacher in TEACHERS.items():
        part = table[(table["task"] == HOME[reward]) & table["model"].isin((student, teacher))]
        if part["model"].nunique() < 2:
            raise Missing(f"the table lacks {student!r} or {teacher!r}")
        means = (
            part.groupby(["prompt", "model"], sort=False)[reward].mean().unstack("model").dropna()
        )
        ours, theirs = means[student].to_numpy(), means[teacher].to_numpy()
        same = np.isclose(ours, theirs, rtol=0, atol=1e-9)
        for word, hit in (
            ("above", ~same & (ours > theirs)),
            ("equal", same),
            ("below", ~same & (ours < theirs)),
        ):
            rows.append(
                {
                    "reward": reward,
                    "teacher": teacher,
                    "student is": word,
                    **dict(zip(("mean", "low", "high"), mean_interval(hit))),
                    "n": len(hit),
                }
            )
    return pd.DataFrame(rows)


def manifests(benchmark: Benchmark) -> dict[str, dict]:
    """What is told of the training of the benchmark's experts; nothing of those that others trained."""
    paths = {name: Path(benchmark.adapter(name)) / "manifest.json" for name in benchmark.experts}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}


def in_all(table: pd.DataFrame, benchmark: Benchmark, seconds: Mapping[str, float]) -> pd.DataFrame:
    """A row a model: each score, beside it that of the reward's gold, the Average, with 95 % intervals, and
    the seconds of training in all: `seconds`, of the trainings here by model, and theirs for who learns from
    the experts or averages them."""
    gold_rewards = [
        (reward + GOLD, task, scale)
        for reward, task, scale in benchmark.home
        if reward + GOLD in table
    ]
    found = [model_scores(table, benchmark.home)]
    if gold_rewards:
        found.append(model_scores(table, gold_rewards)[lambda rows: rows["reward"] != "Average"])
    order = [name for reward, *_ in benchmark.home for name in (reward, reward + GOLD)] + [
        "Average"
    ]
    shown = readable(pd.concat(found)).pivot(
        index="model", columns="reward", values="mean [95 % interval]"
    )
    shown = shown.reindex(table["model"].unique())[[name for name in order if name in shown]]
    spent = {f"{name} expert": told["seconds"] for name, told in manifests(benchmark).items()}
    every = sum(spent.values()) if len(spent) == len(benchmark.experts) else np.nan

    def total(model: str) -> float:
        of_experts = every if model.split()[0] in ("merged", "student") else 0.0
        return of_experts + {"base": 0.0, "merged": 0.0, **spent, **seconds}.get(model, np.nan)

    return shown.assign(**{"seconds in all": [total(model) for model in shown.index]})


def cost(run: Run, benchmark: Benchmark) -> pd.DataFrame:
    """Training time of every stage, one run each: stage, minutes, measured where. What has not been run has
    no minutes."""
    rows = [
        {
            "stage": f"{name} expert",
            "minutes": manifest["seconds"] / 60,
            "measured": f"its manifest: {manifest['machine']}",
        }
        for name, manifest in manifests(benchmark).items()
    ]
    if rows:
        rows.append(
            {"stage": "all experts", "minutes": sum(r["minutes"] for r in rows), "measured": "sum"}
        )
    for notebook in ("05_opd", "02_mixed_reward_seesaw"):
        try:
            rows += [
                {"stage": variant, "minutes": seconds / 60, "measured": notebook}
                for variant, seconds in run.results(notebook, "seconds").items()
            ]
        except Missing as error:
            rows.append({"stage": str(error), "minutes": np.nan, "measured": notebook})
    return pd.DataFrame(rows)


def show_claims(claims_table: pd.DataFrame) -> pd.DataFrame:
    """The claims table for a reader: "effect [95 % interval]" in one column, nothing where nothing was measured."""
    effect = [
        f"{r['effect']:+.3f} [{r['low']:+.3f}, {r['high']:+.3f}]" if pd.notna(r["effect"]) else ""
        for _, r in claims_table.iterrows()
    ]
    table = (
        claims_table.assign(**{"effect [95 % interval]": effect})
        .astype({"n": object, "seeds": object})
        .fillna({"n": "", "seeds": ""})
    )
    return table[
        [
            "claim",
            "statement",
            "where",
            "verdict",
            "measured",
            "claimed",
            "effect [95 % interval]",
            "n",
            "seeds",
            "note",
        ]
    ]


def conclusion(claims_table: pd.DataFrame) -> str:
    """Markdown: how many claims got which verdict, and which; those the benchmark was calibrated for count as
    none."""
    kinds = claims_table["verdict"]
    tested = int((~kinds.isin(["not testable here", "calibrated"])).sum())
    counts = ", ".join(
        f"{(kinds == kind).sum()} {kind}" for kind in VERDICTS if kind != "calibrated"
    )
    lines = [f"Of {len(claims_table)} claims {tested} are tested here: {counts}."]
    for kind, (title, _) in VERDICTS.items():
        rows = [
            f"- {r.statement} (`{r.claim}`): "
            + (
                f"{r.effect:+.3f} [{r.low:+.3f}, {r.high:+.3f}], n={r.n}"
                if pd.notna(r.effect)
                else r.note
            )
            for r in claims_table[kinds == kind].itertuples()
        ]
        lines += ["", f"**{title}**", "", *(rows or ["- none"])]
    reasons = (
        claims_table[kinds == "not testable here"]
        .groupby("note", sort=False)["claim"]
        .agg(", ".join)
    )
    lines += [
        "",
        "**Not testable here**",
        "",
        *(f"- {claims}: {note}" for note, claims in reasons.items()),
    ]
    if tested:
        lines += [
            "",
            "The intervals are over prompts or batches; where a model has one training (`seeds`), they "
            f"speak of that training alone. If none of the {tested} effects existed, "
            f"about {0.025 * tested:.1f} would still be expected to come out as reproduced.",
        ]
    return "\n".join(lines)


def claims_figure(claims_table: pd.DataFrame, source: str) -> Figure:
    """A row per claim that was measured, in its own words: the effect over half its interval's width, turned
    so that the claim is at the right of 0; `source` names the run."""
    rows = claims_table[claims_table["high"] > claims_table["low"]]
    half = (rows["high"] - rows["low"]) / 2 * np.where(rows["claimed"] == "< 0", -1, 1)
    effect, ends = (
        rows["effect"] / half,
        np.sort(np.stack([rows["low"] / half, rows["high"] / half]), 0),
    )
    # what has next to no noise would be all that the axis shows
    effect, ends = effect.clip(-FAR, FAR), ends.clip(-FAR, FAR)
    figure, axis = plt.subplots(figsize=(13, 0.42 * len(rows) + 1.7))
    for name, (_, colour) in VERDICTS.items():
        here = np.flatnonzero(rows["verdict"] == name)
        axis.errorbar(
            effect.iloc[here],
            here,
            xerr=[effect.iloc[here] - ends[0, here], ends[1, here] - effect.iloc[here]],
            fmt="o",
            ms=6,
            capsize=3,
            color=colour,
            label=f"{name} ({len(here)})",
        )
    axis.axvline(0, color=".3", lw=1)
    words = [
        textwrap.fill(textwrap.shorten(f"{r.statement} (n={r.n:.0f})", 140, placeholder=" …"), 72)
        for r in rows.itertuples()
    ]
    axis.set_yticks(range(len(rows)), words, fontsize=8, linespacing=0.95)
    axis.set_xscale("symlog", linthresh=2)
    ticks = [
        t
        for t in (-FAR, -10, -3, -1, 0, 1, 3, 10, FAR)
        if rows.empty or min(ends.min(), -1) - 2 <= t <= max(ends.max(), 1) + 2
    ]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.set(
        ylim=(max(len(rows), 1) - 0.5, -0.5),
        xlabel=f"effect in the direction claimed / half the width of its 95 % interval, drawn to {FAR}",
        title=f"The paper's claims on {source}",
    )
    axis.legend(fontsize=9, loc="best")
    return figure


def surpassing_figure(table: pd.DataFrame) -> Figure:
    """Share of prompts where the student is above, equal to and below its teacher, with intervals, a group
    per reward."""
    figure, axis = plt.subplots(figsize=(7.5, 3.2))
    rewards = list(table["reward"].unique())
    words = {"above": "reproduced", "equal": "undecided", "below": "contradicted"}
    for shift, (word, verdict) in enumerate(words.items()):
        rows = table[table["student is"] == word].set_index("reward").loc[rewards]
        axis.errorbar(
            np.arange(len(rewards)) + 0.2 * (shift - 1),
            rows["mean"],
            yerr=[rows["mean"] - rows["low"], rows["high"] - rows["mean"]],
            fmt="o",
            ms=7,
            capsize=4,
            color=VERDICTS[verdict][1],
            label=f"student {word}",
        )
    n = table.groupby("reward")["n"].first()
    axis.set_xticks(range(len(rewards)), [f"{j} (n={n[j]})" for j in rewards])
    axis.set(
        ylim=(-0.03, 1.03),
        ylabel="share of prompts, 95 % interval",
        title="The student against the teacher of each task",
    )
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    return figure
