"""The paper's claims as data, each with a test on a run's artifacts: the claims table of what a benchmark
reproduces.

A claim is a sign. It is "contradicted" if the effect has the other sign with its 95 % interval, else
"bounded" if that holds no effect as large as a third of the paper's own (smaller than claimed, and known to
be), "reproduced" if it has the sign, and else "undecided". Effects of other benchmarks are compared in shares of
the distance from the base to the expert. Numbers of the paper are those of Flow-OPD (2605.08063), SD-3.5-M;
they enter that bound and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet
from scipy import stats

from ..stats import AVERAGE
from .directions import foretold, model_of
from .paper import PAPER_MAIN

HOME = {reward: task for reward, task, _ in AVERAGE}
# The experts, and the reward each was trained for.
EXPERTS = {"geneval": "GenEval", "ocr": "OCR", "pickscore": "PickScore", "deqa": "DeQA"}
TRAINED_FOR = {reward: expert for expert, reward in EXPERTS.items()}
# How far along the experts notebook 01 looks for a conflict, and which step foretells which.
HALF, SMALL, WHOLE = 0.5, 0.25, 1.0


class Missing(LookupError):
    """A run does not have what a claim or a table needs; the message says it in one line."""


class Run:
    """What the notebooks left in a run's folder; the tables are read once, without embeddings. `ood` stands
    in for 08_results/ood.parquet."""

    def __init__(self, folder: str | Path, ood: pd.DataFrame | None = None):
        self.folder = Path(folder)
        self._tables = {} if ood is None else {"08_results": ood}

    def samples(self, notebook: str) -> pd.DataFrame:
        if notebook not in self._tables:
            path = self.path(
                notebook, "ood.parquet" if notebook == "08_results" else "samples.parquet"
            )
            self._tables[notebook] = pd.read_parquet(
                path,
                columns=[c for c in pyarrow.parquet.read_schema(path).names if c != "embedding"],
            )
        return self._tables[notebook]

    def results(self, notebook: str, key: str):
        record = json.loads(self.path(notebook, "results.json").read_text())
        if key not in record:
            raise Missing(f"{notebook} has no {key!r} in its results")
        return record[key]

    def path(self, notebook: str, name: str) -> Path:
        if not (self.folder / notebook / name).exists():
            raise Missing(
                f"{notebook} has not been run"
                if not (self.folder / notebook).is_dir()
                else f"{notebook} has left no {name}"
            )
        return self.folder / notebook / name


@dataclass(frozen=True)
class Effect:
    """What a test measured, with its 95 % interval; n as `measured` says; `seeds`: trainings of the model
    scored; `bound`: what `Claim.margin` is in the units of the effect (NaN: not known)."""

    effect: float
    low: float
    high: float
    n: int
    seeds: int
    measured: str
    note: str = ""
    bound: float = np.nan


@dataclass(frozen=True)
class Claim:
    """`claimed` is the sign of the effect. `test` is None where it cannot be tested here, and `why` says so.
    `margin`: a third of the paper's own effect, in shares of the distance from the base to the expert or,
    where it gives none, what was fixed before any run."""

    key: str
    statement: str
    where: str
    needs: str = ""
    test: Callable[[Run, Claim], Effect] | None = None
    claimed: str = "> 0"
    why: str = ""
    margin: float = np.nan


def prompt_scores(
    table: pd.DataFrame, models: Sequence[str], parts: Sequence[tuple[str, str, float]]
) -> list[dict[str, np.ndarray]]:
    """For each task in `parts` (reward, task, full scale), by model: (prompts, trainings), what each prompt
    adds to the mean over parts in full scales.

    A training is a `train_seed`; repeats are averaged. Prompts are those that every model has. Raises Missing
    for an absent model or score.
    """
    absent = [name for name in models if name not in set(table["model"])]
    if absent:
        raise Missing(f"the table has no {' and no '.join(map(repr, absent))}")
    table = table.assign(train_seed=table["train_seed"].fillna(0) if "train_seed" in table else 0)
    found = []
    for task in dict.fromkeys(task for _, task, _ in parts):
        rows, here = (
            table[(table["task"] == task) & table["model"].isin(models)],
            [(j, scale) for j, t, scale in parts if t == task],
        )
        lacking = [j for j, _ in here if j not in rows or rows[j].isna().all()]
        if lacking:
            raise Missing(f"the table has no {' and no '.join(lacking)} on {task} prompts")
        value = sum(rows[j] / scale for j, scale in here) / len(parts)
        scores = (
            rows.assign(value=value)
            .groupby(["prompt", "model", "train_seed"], sort=False)["value"]
            .mean()
            .unstack(["model", "train_seed"])
            .dropna()
        )
        if len(scores) < 2:
            raise Missing(
                f"{' and '.join(map(repr, models))} share {len(scores)} {task} prompts: too few for an "
                "interval"
            )
        found.append({model: scores[model].to_numpy() for model in models})
    return found


def paired(
    table: pd.DataFrame,
    model: str,
    baseline: str,
    parts: Sequence[tuple[str, str, float]] = AVERAGE,
    level: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> tuple[float, float, float, int]:
    """Model minus baseline on the same prompts, mean over `parts` (the paper's Average by default): mean,
    low, high, n prompts.

    Percentile bootstrap at `level`; prompts are drawn within their task, for both models and all rewards of
    the task together. Of a model trained several times, trainings are drawn too, the same for all tasks: the
    interval then speaks of other trainings as well, if few tell little of them.
    """
    tasks, rng = prompt_scores(table, (model, baseline), parts), np.random.default_rng(seed)
    count = {name: tasks[0][name].shape[1] for name in (model, baseline)}
    trainings = {
        name: rng.multinomial(n, [1 / n] * n, size=resamples) / n for name, n in count.items()
    }
    draws = np.zeros(resamples)
    for scores in tasks:
        n = len(scores[model])
        prompts = rng.multinomial(n, [1 / n] * n, size=resamples) / n
        draws += sum(
            sign * (prompts @ scores[name] * trainings[name]).sum(1)
            for name, sign in ((model, 1), (baseline, -1))
        )
    low, high = np.quantile(draws, ((1 - level) / 2, (1 + level) / 2))
    return (
        float(sum(s[model].mean() - s[baseline].mean() for s in tasks)),
        float(low),
        float(high),
        sum(len(s[model]) for s in tasks),
    )


def third(model: str, baseline: str, reward: str = "Average") -> float:
    """A third of the paper's difference between two models of its main table, in shares of the distance from
    its base to its expert (for the Average: of all four)."""
    rewards = [(j, s) for j, _, s in AVERAGE if reward in (j, "Average")]
    apart = [
        (PAPER_MAIN[f"{TRAINED_FOR[j]} expert"][j] - PAPER_MAIN["base"][j])
        / (s if reward == "Average" else 1)
        for j, s in rewards
    ]
    difference = abs(PAPER_MAIN[model][reward] - PAPER_MAIN[baseline][reward])
    return difference / float(np.mean(apart)) / 3


def distance(run: Run, parts: Sequence[tuple[str, str, float]]) -> float:
    """From the base to the expert, as notebook 03 has it, mean over `parts` (reward, task, full scale); NaN
    where that was not run, or an expert has not learned."""
    try:
        table = run.samples("03_expert_training")
        scores = [prompt_scores(table, (TRAINED_FOR[p[0]], "base"), [p])[0] for p in parts]
    except Missing:
        return np.nan
    apart = [s[TRAINED_FOR[p[0]]].mean() - s["base"].mean() for s, p in zip(scores, parts)]
    return float(np.mean(apart)) if min(apart) > 0 else np.nan


def least(run: Run, parts: Sequence[tuple[str, str, float]]) -> float:
    """The shortest of the parts' distances; NaN if one is not known."""
    return float(np.min([distance(run, [part]) for part in parts]))


def against(model: str, baseline: str, reward: str = "Average"):
    """Test: model minus baseline by a reward on its own prompts, in its units."""
    parts = AVERAGE if reward == "Average" else [(reward, HOME[reward], 1.0)]

    def test(run: Run, claim: Claim) -> Effect:
        table = run.samples(claim.needs)
        tasks = prompt_scores(table, (model, baseline), parts)
        each = sum(s[model].mean(0) - s[baseline].mean() for s in tasks)
        note = f"by training: {', '.join(f'{e:+.3f}' for e in each)}" if len(each) > 1 else ""
        return Effect(
            *paired(table, model, baseline, parts),
            len(each),
            f"{reward}, {model} minus {baseline}, by prompts",
            note,
            claim.margin * distance(run, parts),
        )

    return test


def beyond_mix(run: Run, claim: Claim) -> Effect:
    """Test: the student's Average against GRPO-Mix's, and how long each of them trained."""
    found = against("student", "GRPO-Mix")(run, claim)
    try:
        seconds = run.results(claim.needs, "seconds")
        spent = (
            f"training: student {seconds['student']:.0f} s, its experts not counted, GRPO-Mix "
            f"{seconds['GRPO-Mix']:.0f} s"
        )
    except Missing as error:
        spent = f"training times unknown: {error}"
    return replace(found, note="; ".join(filter(None, (found.note, spent))))


def at_compute(mix: str, gold: str = ""):
    """Test: the student's Average less that of GRPO-Mix with all the time that the experts and the student
    took ("Mix total") or twice that ("Mix twice"), by the rewards or, with GOLD, by their gold rewards, on which
    nothing is trained. For the total both were asked after the run of commit e566ec6 was seen, and of that
    run are a description, not a test; for twice it, before any such training had ended."""
    notebook = "02_mixed_reward_seesaw"
    parts = [(reward + gold, task, scale) for reward, task, scale in AVERAGE]

    def test(run: Run, claim: Claim) -> Effect:
        ours, other = run.samples(claim.needs), run.samples(notebook)
        if mix not in set(other["model"]):
            raise Missing(f"{notebook}: the table has no {mix!r}")
        table = pd.concat(
            [ours[ours["model"] == "student"], other[other["model"] == mix]], ignore_index=True
        )
        return Effect(
            *paired(table, "student", mix, parts),
            table.loc[table["model"] == "student", "train_seed"].nunique()
            if "train_seed" in table
            else 1,
            f"Average{' of the gold rewards' if gold else ''}, student minus {mix}, by prompts",
            bound=claim.margin * distance(run, AVERAGE),
        )

    return test


def some(prefix: str, baseline: str, *rewards: str):
    """Test: the change claimed appears for some model that begins with `prefix` and some reward, with
    Bonferroni's intervals over all of them.

    The interval is that of the most favourable true change: it holds that with 95 % because all intervals
    hold together. Several rewards are compared in shares of their full scales.
    """

    def test(run: Run, claim: Claim) -> Effect:
        table = run.samples(claim.needs)
        pairs = [(m, j) for m in table["model"].unique() if m.startswith(prefix) for j in rewards]
        if not pairs:
            raise Missing(f"the table has no model that begins with {prefix!r}")
        scale = {j: s if len(rewards) > 1 else 1.0 for j, _, s in AVERAGE}
        found = {
            pair: paired(
                table,
                pair[0],
                baseline,
                [(pair[1], HOME[pair[1]], scale[pair[1]])],
                1 - 0.05 / len(pairs),
            )
            for pair in pairs
        }
        best = np.max if claim.claimed == "> 0" else np.min
        effect, low, high = (float(best([f[i] for f in found.values()])) for i in range(3))
        model, reward = next(pair for pair in pairs if found[pair][0] == effect)
        trainings = (
            table.loc[table["model"] == model, "train_seed"].nunique()
            if "train_seed" in table
            else 1
        )
        measured = f"{reward}{' / full scale' if len(rewards) > 1 else ''}, {model} minus {baseline}, by prompts"
        note = (
            f"the most favourable of {len(pairs)}, Bonferroni's interval" if len(pairs) > 1 else ""
        )
        bound = claim.margin * least(run, [(j, HOME[j], scale[j]) for j in rewards])
        return Effect(effect, low, high, found[model, reward][3], trainings, measured, note, bound)

    return test


def along_others(run: Run, claim: Claim) -> Effect:
    """Test: the lowest change of a score half way along another task's expert, from the base, with
    Bonferroni's intervals over all pairs."""
    table = run.samples(claim.needs)
    models = {d: model_of(d, HALF) for d in EXPERTS if model_of(d, HALF) in set(table["model"])}
    pairs = [(d, j, t, s) for d in models for j, t, s in AVERAGE if EXPERTS[d] != j]
    if not pairs:
        raise Missing(f"{claim.needs} has gone {HALF:g} along no expert")
    level = 1 - 0.05 / len(pairs)
    found = [paired(table, models[d], "base", [(j, t, s)], level) for d, j, t, s in pairs]
    effect, low, high = (min(f[i] for f in found) for i in range(3))
    where = next(i for i, f in enumerate(found) if f[0] == effect)
    return Effect(
        effect,
        low,
        high,
        found[where][3],
        1,
        f"{pairs[where][1]} / full scale, {HALF:g} of the {pairs[where][0]} expert minus base, by prompts",
        f"the lowest of {len(pairs)}, Bonferroni's interval",
        claim.margin * least(run, AVERAGE),
    )


def first_order(run: Run, claim: Claim) -> Effect:
    """Test: slope of measured on foretold changes of the *other* scores along the experts (`foretold`)."""
    table = run.samples(claim.needs)
    models = set(table["model"])
    there = {d: j for d, j in EXPERTS.items() if {model_of(d, SMALL), model_of(d, WHOLE)} <= models}
    if not there:
        raise Missing(f"{claim.needs} has gone {SMALL:g} and {WHOLE:g} along no expert")
    slope, low, high, pairs = foretold(table, AVERAGE, there, SMALL, WHOLE)
    return Effect(
        slope,
        low,
        high,
        pairs,
        1,
        f"slope of the change along whole experts on {WHOLE / SMALL:g} times that along {SMALL:g} of them, "
        "by pairs of expert and reward",
        f"the interval {'holds' if low <= 1 <= high else 'leaves out'} 1, the exact prediction",
        claim.margin,
    )


def follows(estimator: str):
    """Test: the mean gradient of a reading of the loss along that of `pathwise`, in its lengths, with the
    nearest teachers, where noise is least."""

    def test(run: Run, claim: Claim) -> Effect:
        rows = pd.DataFrame(run.results(claim.needs, "estimators"))
        rows = rows[rows["distance"] == rows["distance"].min()].set_index("estimator")
        if estimator not in rows.index:
            raise Missing(f"{claim.needs} has not measured {estimator!r}")
        mean, se, n = rows.loc[estimator, ["mean along pathwise", "se", "n"]].astype(float)
        # an action and its mirror image may cancel to the last bit: no less than what float32 rounds
        half = max(stats.t.ppf(0.975, n - 1) * se, np.finfo(np.float32).eps)
        note = (
            "1 would be the gradient of the KL: the interval "
            f"{'holds' if mean - half <= 1 <= mean + half else 'leaves out'} it"
        )
        return Effect(
            mean,
            mean - half,
            mean + half,
            int(n),
            1,
            f"gradient of {estimator} along pathwise's, by batches",
            note,
            claim.margin,
        )

    return test
