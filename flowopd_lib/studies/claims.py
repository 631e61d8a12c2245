"""The paper's claims as data, each with a test on a run's artifacts: the ledger of what a world
reproduces.

A claim is a sign. It is "reproduced" if the effect has that sign with its 95 % interval, else "not
reproduced", and the note says whether the interval lies on the other side or holds 0. Numbers of the paper
are those of Flow-OPD (2605.08063), SD-3.5-M; none of them enters a test.
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

HOME = {judge: task for judge, task, _ in AVERAGE}


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
            path = self.path(notebook, "ood.parquet" if notebook == "08_results" else "samples.parquet")
            self._tables[notebook] = pd.read_parquet(
                path, columns=[c for c in pyarrow.parquet.read_schema(path).names if c != "embedding"]
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
    judged."""

    effect: float
    low: float
    high: float
    n: int
    seeds: int
    measured: str
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """`claimed` is the sign of the effect. `test` is None where it cannot be tested here, and `why` says
    so."""

    key: str
    statement: str
    where: str
    needs: str = ""
    test: Callable[[Run, Claim], Effect] | None = None
    claimed: str = "> 0"
    why: str = ""


def prompt_scores(
    table: pd.DataFrame, models: Sequence[str], parts: Sequence[tuple[str, str, float]]
) -> list[dict[str, np.ndarray]]:
    """For each task in `parts` (judge, task, full scale), by model: (prompts, trainings), what each prompt
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

    Percentile bootstrap at `level`; prompts are drawn within their task, for both models and all judges of
    the task together. Of a model trained several times, trainings are drawn too, the same for all tasks: the
    interval then speaks of other trainings as well, if few tell little of them.
    """
    tasks, rng = prompt_scores(table, (model, baseline), parts), np.random.default_rng(seed)
    count = {name: tasks[0][name].shape[1] for name in (model, baseline)}
    trainings = {name: rng.multinomial(n, [1 / n] * n, size=resamples) / n for name, n in count.items()}
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


def against(model: str, baseline: str, judge: str = "Average"):
    """Test: model minus baseline by a judge on its own prompts, in its units."""
    parts = AVERAGE if judge == "Average" else [(judge, HOME[judge], 1.0)]

    def test(run: Run, claim: Claim) -> Effect:
        table = run.samples(claim.needs)
        tasks = prompt_scores(table, (model, baseline), parts)
        each = sum(s[model].mean(0) - s[baseline].mean() for s in tasks)
        note = f"by training: {', '.join(f'{e:+.3f}' for e in each)}" if len(each) > 1 else ""
        return Effect(
            *paired(table, model, baseline, parts),
            len(each),
            f"{judge}, {model} minus {baseline}, by prompts",
            note,
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


def some(prefix: str, baseline: str, *judges: str):
    """Test: the change claimed appears for some model that begins with `prefix` and some judge, with
    Bonferroni's intervals over all of them.

    The interval is that of the most favourable true change: it holds that with 95 % because all intervals
    hold together. Several judges are compared in shares of their full scales.
    """

    def test(run: Run, claim: Claim) -> Effect:
        table = run.samples(claim.needs)
        pairs = [(m, j) for m in table["model"].unique() if m.startswith(prefix) for j in judges]
        if not pairs:
            raise Missing(f"the table has no model that begins with {prefix!r}")
        scale = {j: s if len(judges) > 1 else 1.0 for j, _, s in AVERAGE}
        found = {
            pair: paired(
                table, pair[0], baseline, [(pair[1], HOME[pair[1]], scale[pair[1]])], 1 - 0.05 / len(pairs)
            )
            for pair in pairs
        }
        best = np.max if claim.claimed == "> 0" else np.min
        effect, low, high = (float(best([f[i] for f in found.values()])) for i in range(3))
        model, judge = next(pair for pair in pairs if found[pair][0] == effect)
        trainings = table.loc[table["model"] == model, "train_seed"].nunique() if "train_seed" in table else 1
        measured = (
            f"{judge}{' / full scale' if len(judges) > 1 else ''}, {model} minus {baseline}, by prompts"
        )
        note = f"the most favourable of {len(pairs)}, Bonferroni's interval" if len(pairs) > 1 else ""
        return Effect(effect, low, high, found[model, judge][3], trainings, measured, note)

    return test


def most_opposed(run: Run, claim: Claim) -> Effect:
    """Test: the lowest cosine of two tasks' gradients. Jackknife intervals over batches are widened so that
    those of all pairs hold together."""
    rows = pd.DataFrame(run.results(claim.needs, "interference"))
    pairs = rows[rows["task"] < rows["on"]]
    cosine, batches, columns = (
        pairs.set_index(["task", "on"]),
        int(rows["batches"].iloc[0]),
        ["cosine", "cosine_low", "cosine_high"],
    )
    known = cosine[columns].astype(float).dropna()
    lost = (
        f"; {len(pairs) - len(known)} of {len(pairs)} pairs lost in noise" if len(known) < len(pairs) else ""
    )
    if known.empty:
        return Effect(np.nan, np.nan, np.nan, batches, 1, "lowest cosine of two tasks, by batches", lost[2:])
    wider = stats.t.ppf(1 - 0.025 / len(pairs), batches - 1) / stats.t.ppf(0.975, batches - 1)
    low, high = (known["cosine"] + wider * (known[c] - known["cosine"]) for c in columns[1:])
    return Effect(
        known["cosine"].min(),
        low.min(),
        high.min(),
        batches,
        1,
        "lowest cosine of two tasks, by batches",
        f"{' and '.join(known['cosine'].idxmin())}, Bonferroni's interval over {len(pairs)} pairs{lost}",
    )


def first_order(run: Run, claim: Claim) -> Effect:
    """Test: slope of measured on predicted changes of the *other* tasks after a real step; 1 is exact, noise
    of the prediction pulls it to 0.

    Weighted by the measurement's variance. Changes of one task are measured on the same prompts, so their
    errors are taken as fully correlated, the widest case: se(slope) = sqrt(sum_on (sum_task |p|/se)^2) / sum
    p^2/se^2.
    """
    rows = pd.DataFrame(run.results(claim.needs, "taylor"))
    # no spread: no weight
    rows = rows[(rows["task"] != rows["on"]) & (rows["measured_high"] > rows["measured_low"])]
    if rows.empty:
        raise Missing("no measured change has a spread")
    error = (rows["measured_high"] - rows["measured_low"]) / 2 / stats.t.ppf(0.975, rows["n"] - 1)
    p, m = rows["predicted"] / error, rows["measured"] / error
    slope, half = (
        (p * m).sum() / (p**2).sum(),
        1.96 * np.sqrt((p.abs().groupby(rows["on"]).sum() ** 2).sum()) / (p**2).sum(),
    )
    return Effect(
        slope,
        slope - half,
        slope + half,
        len(rows),
        1,
        f"slope of measured on predicted change, by pairs of tasks ({rows['n'].iloc[0]} prompts each)",
        f"the interval {'holds' if slope - half <= 1 <= slope + half else 'leaves out'} 1, the exact "
        "prediction",
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
        half = stats.t.ppf(0.975, n - 1) * se
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
        )

    return test
