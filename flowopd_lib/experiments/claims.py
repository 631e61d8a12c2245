"""The paper's claims (claims.yaml), their tests on the tables that a run's notebooks left, and the
verdicts.

A claim is a sign. With the 95 % interval of the effect it is

    contradicted          the interval is on the other side of 0
    effect excluded       the interval holds no effect as large as the bound, a third of the paper's
                          own: smaller than claimed, and known to be
    reproduced            the interval is on the side claimed
    undecided             otherwise
    true by construction  the benchmark was made to have it, so it is no result
    not testable here     it needs what a run does not have

Effects of other benchmarks are compared as fractions of the distance from the base to the expert.
The paper's numbers enter the bound and nothing else.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow.parquet
from pydantic import model_validator

from ..config import Config, choose, read_yaml, validate
from ..stats import AVERAGE, GOLD, Domain
from .gradients import t_quantile
from .interference import first_order_slope, model_name
from .paper import PAPER_MAIN

# The expert trained for each reward.
EXPERT_OF = {"GenEval": "geneval", "OCR": "ocr", "PickScore": "pickscore", "DeQA": "deqa"}
NOT_MEASURED = dict.fromkeys(("effect", "low", "high", "bound"), np.nan)
NOT_MEASURED |= {"n": None, "seeds": None, "measured": ""}


class MissingResult(LookupError):
    """A run does not have what a claim or a table needs; the message says it in one line."""


class Run:
    """The tables in a run's folder, read once and without embeddings. `ood` replaces
    08_results/ood.parquet."""

    def __init__(self, folder: str | Path, ood: pd.DataFrame | None = None):
        self.folder = Path(folder)
        self._tables = {} if ood is None else {"08_results": ood}

    def samples(self, notebook: str) -> pd.DataFrame:
        if notebook not in self._tables:
            name = "ood.parquet" if notebook == "08_results" else "samples.parquet"
            path = self.path(notebook, name)
            columns = [c for c in pyarrow.parquet.read_schema(path).names if c != "embedding"]
            self._tables[notebook] = pd.read_parquet(path, columns=columns)
        return self._tables[notebook]

    def results(self, notebook: str, key: str):
        record = json.loads(self.path(notebook, "results.json").read_text())
        if key not in record:
            raise MissingResult(f"{notebook} has no {key!r} in its results")
        return record[key]

    def path(self, notebook: str, name: str) -> Path:
        path = self.folder / notebook / name
        if not path.parent.is_dir():
            raise MissingResult(f"{notebook} has not been run")
        if not path.exists():
            raise MissingResult(f"{notebook} has left no {name}")
        return path


class Claim(Config):
    """See claims.yaml."""

    id: str
    statement: str
    section: str
    notebook: str = ""
    compare: dict[str, list[str]] = {}
    baseline: str = "base"
    baseline_notebook: str = ""
    gold: bool = False
    first_order: tuple[float, float] | None = None
    estimator: str = ""
    untestable: str = ""
    claimed: Literal["> 0", "< 0"] = "> 0"
    margin: float | tuple[str, str, str] = np.nan
    fraction: float = 1.0

    @model_validator(mode="after")
    def _one_test(self):
        kinds = ("compare", "first_order", "estimator", "untestable")
        if sum(bool(getattr(self, kind)) for kind in kinds) != 1:
            raise ValueError(f"the claim {self.id} needs exactly one of {', '.join(kinds)}")
        for reward in {r for rewards in self.compare.values() for r in rewards}:
            choose(f"reward (claim {self.id})", reward, ["Average", *EXPERT_OF])
        return self

    @property
    def relative_margin(self) -> float:
        """`margin` as a fraction of the distance from the base to the expert."""
        if isinstance(self.margin, float):
            return self.fraction * self.margin
        return self.fraction * third_of_paper(*self.margin)


CLAIMS = validate(list[Claim], read_yaml(Path(__file__).with_name("claims.yaml")), "claims.yaml")


def third_of_paper(model: str, baseline: str, reward: str = "Average") -> float:
    """A third of the paper's difference between two models of its main table, as a fraction of the
    distance from its base to its expert (for the Average: the mean of all four)."""
    distances = [
        (PAPER_MAIN[f"{EXPERT_OF[name]} expert"][name] - PAPER_MAIN["base"][name])
        / (scale if reward == "Average" else 1)
        for name, _, scale in AVERAGE
        if reward in (name, "Average")
    ]
    difference = abs(PAPER_MAIN[model][reward] - PAPER_MAIN[baseline][reward])
    return difference / float(np.mean(distances)) / 3


# --- effects


@dataclass(frozen=True)
class Effect:
    """What a test measured, with its 95 % interval; n of what `measured` says; `seeds`: trainings
    of the model; `bound`: the claim's margin in the units of the effect (NaN: not known)."""

    effect: float
    low: float
    high: float
    n: int
    measured: str
    note: str = ""
    bound: float = np.nan
    seeds: int = 1


def prompt_scores(
    table: pd.DataFrame, models: Sequence[str], domains: Sequence[Domain]
) -> list[dict[str, np.ndarray]]:
    """For each task of `domains`, by model: (prompts, trainings), what each prompt adds to the mean
    over the domains in full scales.

    A training is a `train_seed`; repeats are averaged. Prompts are those that every model has.
    Raises MissingResult for an absent model or score.
    """
    absent = [name for name in models if name not in set(table["model"])]
    if absent:
        raise MissingResult(f"the table has no {' and no '.join(map(repr, absent))}")
    table = table.assign(train_seed=table["train_seed"].fillna(0) if "train_seed" in table else 0)
    tasks = []
    for task in dict.fromkeys(task for _, task, _ in domains):
        rows = table[(table["task"] == task) & table["model"].isin(models)]
        here = [(reward, scale) for reward, t, scale in domains if t == task]
        lacking = [r for r, _ in here if r not in rows or rows[r].isna().all()]
        if lacking:
            raise MissingResult(f"the table has no {' and no '.join(lacking)} on {task} prompts")
        value = sum(rows[reward] / scale for reward, scale in here) / len(domains)
        keys = ["prompt", "model", "train_seed"]
        scores = rows.assign(value=value).groupby(keys, sort=False)["value"].mean()
        scores = scores.unstack(["model", "train_seed"]).dropna()
        if len(scores) < 2:
            raise MissingResult(
                f"{' and '.join(map(repr, models))} share {len(scores)} {task} prompts: too few "
                "for an interval"
            )
        tasks.append({model: scores[model].to_numpy() for model in models})
    return tasks


def paired_difference(
    table: pd.DataFrame,
    model: str,
    baseline: str,
    domains: Sequence[Domain] = AVERAGE,
    level: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> tuple[float, float, float, int]:
    """Model minus baseline on the same prompts, mean over `domains` (the paper's Average by
    default) in full scales: mean, low, high, n prompts.

    Percentile bootstrap at `level`; prompts are drawn within their task, for both models and all
    rewards of the task together. Of a model trained several times trainings are drawn too, the same
    for all tasks: the interval then covers other trainings as well (few say little about them).
    """
    tasks = prompt_scores(table, (model, baseline), domains)
    rng, draws = np.random.default_rng(seed), np.zeros(resamples)
    trainings = {}
    for name in (model, baseline):
        n = tasks[0][name].shape[1]
        trainings[name] = rng.multinomial(n, [1 / n] * n, size=resamples) / n
    for scores in tasks:
        n = len(scores[model])
        prompts = rng.multinomial(n, [1 / n] * n, size=resamples) / n
        ours, theirs = (
            (prompts @ scores[name] * trainings[name]).sum(1) for name in (model, baseline)
        )
        draws += ours - theirs
    low, high = np.quantile(draws, ((1 - level) / 2, (1 + level) / 2))
    mean = sum(s[model].mean() - s[baseline].mean() for s in tasks)
    return float(mean), float(low), float(high), sum(len(s[model]) for s in tasks)


def expert_distance(run: Run, domains: Sequence[Domain]) -> float:
    """From the base to the expert in notebook 03, mean over `domains`; NaN where that was not run,
    or where an expert is not above the base."""
    try:
        table = run.samples("03_expert_training")
        distances = []
        for domain in domains:
            expert = EXPERT_OF[domain[0]]
            [scores] = prompt_scores(table, (expert, "base"), [domain])
            distances.append(scores[expert].mean() - scores["base"].mean())
    except MissingResult:
        return np.nan
    return float(np.mean(distances)) if min(distances) > 0 else np.nan


def compared_samples(run: Run, claim: Claim) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """The samples of a claim's models and baseline, and its comparisons: (model, reward)."""
    table = run.samples(claim.notebook)
    pairs = [
        (model, reward)
        for pattern, rewards in claim.compare.items()
        for model in table["model"].unique()
        if fnmatchcase(model, pattern)
        for reward in rewards
    ]
    if not pairs:
        raise MissingResult(f"the table has no model {' or '.join(map(repr, claim.compare))}")
    if claim.baseline_notebook:
        other = run.samples(claim.baseline_notebook)
        if claim.baseline not in set(other["model"]):
            raise MissingResult(f"{claim.baseline_notebook}: the table has no {claim.baseline!r}")
        ours = table[table["model"].isin([model for model, _ in pairs])]
        table = pd.concat([ours, other[other["model"] == claim.baseline]], ignore_index=True)
    return table, pairs


def training_times(run: Run, claim: Claim, model: str) -> str:
    """Of the model and the baseline, where the notebook's results have `seconds` of both."""
    with contextlib.suppress(MissingResult):
        seconds, names = run.results(claim.notebook, "seconds"), (model, claim.baseline)
        if isinstance(seconds, dict) and set(names) <= set(seconds):
            spent = ", ".join(f"{name} {seconds[name]:.0f} s" for name in names)
            return f"training time, experts excluded: {spent}"
    return ""


def compare_models(run: Run, claim: Claim) -> Effect:
    """The most favourable of the claim's comparisons, by prompts. Its interval holds with 95 %
    because all of Bonferroni's intervals hold together. Several rewards are compared in full
    scales, one in its own units."""
    table, pairs = compared_samples(run, claim)
    full_scales = len({reward for rewards in claim.compare.values() for reward in rewards}) > 1
    domains = {name: [(name, task, scale if full_scales else 1.0)] for name, task, scale in AVERAGE}
    domains["Average"] = list(AVERAGE)
    measured = {
        name: [(reward + GOLD * claim.gold, task, scale) for reward, task, scale in of]
        for name, of in domains.items()
    }
    level = 1 - 0.05 / len(pairs)
    effects = {
        (model, reward): paired_difference(table, model, claim.baseline, measured[reward], level)
        for model, reward in pairs
    }
    best = max if claim.claimed == "> 0" else min
    effect, low, high = (best(e[i] for e in effects.values()) for i in range(3))
    model, reward = next(pair for pair in pairs if effects[pair][0] == effect)
    rows, note = table[table["model"] == model], ""
    seeds = int(rows["train_seed"].fillna(0).nunique()) if "train_seed" in rows else 1
    if len(pairs) > 1:
        note = f"the most favourable of {len(pairs)}, Bonferroni's interval"
    elif seeds > 1:
        scores = prompt_scores(table, (model, claim.baseline), measured[reward])
        each = sum(s[model].mean(0) - s[claim.baseline].mean() for s in scores)
        note = f"by training: {', '.join(f'{e:+.3f}' for e in each)}"
    distance = np.min([expert_distance(run, domains[r]) for r in {r for _, r in pairs}])
    what = f"{reward}{' of the gold rewards' * claim.gold}{' / full scale' * full_scales}"
    return Effect(
        effect,
        low,
        high,
        effects[model, reward][3],
        f"{what}, {model} minus {claim.baseline}, by prompts",
        "; ".join(filter(None, (note, training_times(run, claim, model)))),
        claim.relative_margin * distance,
        seeds,
    )


def measure_slope(run: Run, claim: Claim) -> Effect:
    """The slope of measured on predicted changes of the other scores along the experts
    (`first_order_slope`)."""
    table, (small, whole) = run.samples(claim.notebook), claim.first_order
    models = set(table["model"])
    trained_for = {
        expert: reward
        for reward, expert in EXPERT_OF.items()
        if {model_name(expert, small), model_name(expert, whole)} <= models
    }
    if not trained_for:
        raise MissingResult(f"the table has no steps {small:g} and {whole:g} along an expert")
    slope, low, high, pairs = first_order_slope(table, AVERAGE, trained_for, small, whole)
    includes = "includes" if low <= 1 <= high else "excludes"
    return Effect(
        slope,
        low,
        high,
        pairs,
        f"slope of the change at {whole:g} of an expert on {whole / small:g} times that at "
        f"{small:g}, by pairs of expert and reward",
        f"the interval {includes} 1, the exact prediction",
        claim.relative_margin,
    )


def measure_gradient(run: Run, claim: Claim) -> Effect:
    """The mean gradient of an estimator along that of `pathwise`, in its lengths, with the closest
    teachers, where noise is least."""
    rows = pd.DataFrame(run.results(claim.notebook, "estimators"))
    rows = rows[rows["distance"] == rows["distance"].min()].set_index("estimator")
    if claim.estimator not in rows.index:
        raise MissingResult(f"the table has no estimator {claim.estimator!r}")
    mean, se, n = rows.loc[claim.estimator, ["mean along pathwise", "se", "n"]].astype(float)
    # an action and its mirror image may cancel to the last bit: at least what float32 rounds
    half = max(t_quantile(int(n)) * se, np.finfo(np.float32).eps)
    includes = "includes" if mean - half <= 1 <= mean + half else "excludes"
    return Effect(
        mean,
        mean - half,
        mean + half,
        int(n),
        f"gradient of {claim.estimator} along that of pathwise, by batches",
        f"the interval {includes} 1, the gradient of the KL",
        claim.relative_margin,
    )


# --- verdicts


def measure(run: Run, claim: Claim) -> Effect:
    """Raises MissingResult where the run does not have what the claim needs."""
    if claim.compare:
        return compare_models(run, claim)
    return measure_slope(run, claim) if claim.first_order else measure_gradient(run, claim)


def decide(claimed: str, low: float, high: float, bound: float) -> tuple[str, str]:
    """The verdict on an effect with its 95 % interval, and the reason."""
    if np.isnan(low) or np.isnan(high):
        return "undecided", "nothing above the noise"
    sign = "> 0" if low > 0 else "< 0" if high < 0 else ""
    if sign and sign != claimed:
        return "contradicted", "the interval is on the other side of 0"
    if not sign and low == high:
        return "undecided", "no score changed on any prompt, which says nothing about the next one"
    if -bound <= low and high <= bound:
        reason = f"an effect of {bound:.3g}, a third of the paper's or what was fixed, is excluded"
        return "effect excluded", reason
    if sign:
        return "reproduced", ""
    beyond = "" if np.isnan(bound) else f" and reaches beyond {bound:.3g} from it"
    return "undecided", f"the interval includes 0{beyond}"


def evaluate_claims(
    run_dir: str | Path,
    ood: pd.DataFrame | None = None,
    claims: Sequence[Claim] = CLAIMS,
    true_by_construction: Mapping[str, str] = MappingProxyType({}),
) -> pd.DataFrame:
    """The claims table, a row a claim: claim, statement, where, verdict, claimed, effect, low, high
    (95 %), bound, n, seeds, measured, note. `ood`: notebook 08's table if it is not in the run's
    folder. `true_by_construction`: the claims that the benchmark was made to have, and why. Raises
    ValueError if that names no claim."""
    for name in true_by_construction:
        choose("claim (true_by_construction)", name, [claim.id for claim in claims])
    run, rows = Run(run_dir, ood), []
    for claim in claims:
        row = {"claim": claim.id, "statement": claim.statement, "where": claim.section}
        row |= {"verdict": "not testable here", "claimed": "", **NOT_MEASURED}
        row["note"] = claim.untestable
        if not claim.untestable:
            row["claimed"] = claim.claimed
            try:
                effect = measure(run, claim)
                verdict = decide(claim.claimed, effect.low, effect.high, effect.bound)
                if claim.id in true_by_construction:
                    verdict = "true by construction", true_by_construction[claim.id]
                note = "; ".join(filter(None, (verdict[1], effect.note)))
                row |= {**asdict(effect), "verdict": verdict[0], "note": note}
            except MissingResult as error:
                notebooks = {claim.notebook, claim.baseline_notebook} - {""}
                named = any(notebook in str(error) for notebook in notebooks)
                row["note"] = str(error) if named else f"{claim.notebook}: {error}"
        rows.append(row)
    # integers next to None
    counts = {n: pd.Series([row[n] for row in rows], dtype=object) for n in ("n", "seeds")}
    return pd.DataFrame(rows).assign(**counts)
