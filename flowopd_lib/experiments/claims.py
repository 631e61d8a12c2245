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
The paper's numbers (paper.yaml) enter the bound and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import pandas as pd

from ..config import Config, choose, read_yaml, validate
from ..stats import AVERAGE, GOLD, Domain
from .gradients import t_quantile
from .interference import first_order_slope, model_name

PAPER = read_yaml(Path(__file__).with_name("paper.yaml"))
PAPER_MAIN, PAPER_OOD, PAPER_MAR, PAPER_COST = (PAPER[k] for k in ("main", "ood", "mar", "cost"))
# The expert trained for each reward.
EXPERT_OF = {"GenEval": "geneval", "OCR": "ocr", "PickScore": "pickscore", "DeQA": "deqa"}
COLUMNS = """claim statement where verdict claimed effect low high bound n seeds measured
note""".split()


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
            table = pd.read_parquet(self.path(notebook, name))
            self._tables[notebook] = table.drop(columns="embedding", errors="ignore")
        return self._tables[notebook]

    def results(self, notebook: str, key: str) -> Any:
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
    """See claims.yaml. One of `compare`, `first_order`, `estimator` and `untestable` is given."""

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
    margin: float = np.nan


CLAIMS = validate(list[Claim], read_yaml(Path(__file__).with_name("claims.yaml")), "claims.yaml")

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
    note: str
    bound: float
    seeds: int = 1


def prompt_scores(
    table: pd.DataFrame, models: Sequence[str], domains: Sequence[Domain]
) -> list[dict[str, np.ndarray]]:
    """For each task of `domains`, by model: (prompts, trainings), what each prompt adds to the mean
    over the domains in full scales.

    A training is a `train_seed`; repeats are averaged. Prompts are those that every model has.
    Raises MissingResult for an absent model or score.
    """
    seeds = table["train_seed"].fillna(0) if "train_seed" in table else 0
    table, tasks = table.assign(train_seed=seeds), []
    for task in dict.fromkeys(task for _, task, _ in domains):
        rows = table[(table["task"] == task) & table["model"].isin(models)]
        here = [(reward, scale) for reward, t, scale in domains if t == task]
        value = sum(rows.get(reward, np.nan) / scale for reward, scale in here) / len(domains)
        keys = ["prompt", "model", "train_seed"]
        scores = rows.assign(value=value).groupby(keys, sort=False)["value"].mean()
        scores = scores.unstack(["model", "train_seed"]).dropna()
        if len(scores) < 2 or not {*models} <= {*scores.columns.get_level_values("model")}:
            rewards, both = " and ".join(r for r, _ in here), " and ".join(map(repr, models))
            raise MissingResult(f"there is no {rewards} of {both} on two or more {task} prompts")
        tasks.append({model: scores[model].to_numpy() for model in models})
    return tasks


def paired_difference(
    table: pd.DataFrame,
    model: str,
    baseline: str,
    domains: Sequence[Domain] = AVERAGE,
    level: float = 0.95,
    resamples: int = 5000,
) -> tuple[float, float, float, int]:
    """Model minus baseline on the same prompts, mean over `domains` (the paper's Average by
    default) in full scales: mean, low, high, n prompts.

    Percentile bootstrap at `level`; prompts are drawn within their task, for both models and all
    rewards of the task together. Of a model trained several times trainings are drawn too, the same
    for all tasks: the interval then covers other trainings as well (few say little about them).
    """
    tasks = prompt_scores(table, (model, baseline), domains)
    rng, draws, trainings = np.random.default_rng(0), np.zeros(resamples), {}

    def drawn(n: int) -> np.ndarray:
        """(resamples, n): the weights of n items of which n are drawn."""
        return rng.multinomial(n, [1 / n] * n, size=resamples) / n

    for name in (model, baseline):
        trainings[name] = drawn(tasks[0][name].shape[1])
    for scores in tasks:
        prompts = drawn(len(scores[model]))
        ours, theirs = ((prompts @ scores[m] * trainings[m]).sum(1) for m in (model, baseline))
        draws += ours - theirs
    low, high = np.quantile(draws, ((1 - level) / 2, (1 + level) / 2))
    mean = sum(s[model].mean() - s[baseline].mean() for s in tasks)
    return float(mean), float(low), float(high), sum(len(s[model]) for s in tasks)


def domains_of(reward: str, full_scale: bool, gold: bool = False) -> list[Domain]:
    """The domains of a reward, or of the Average; `full_scale`: not in the reward's own units."""
    average = reward == "Average"
    return [
        (name + GOLD * gold, task, scale if full_scale or average else 1.0)
        for name, task, scale in AVERAGE
        if average or name == reward
    ]


def expert_distance(run: Run, reward: str, full_scale: bool) -> float:
    """From the base to the expert in notebook 03 (Average: the mean of all four); NaN where that
    was not run, or where an expert is not above the base."""
    distances = []
    for domain in domains_of(reward, full_scale):
        expert = EXPERT_OF[domain[0]]
        try:
            table = run.samples("03_expert_training")
            distances.append(paired_difference(table, expert, "base", [domain], resamples=1)[0])
        except MissingResult:
            return np.nan
    return float(np.mean(distances)) if min(distances) > 0 else np.nan


def compare_models(run: Run, claim: Claim) -> Effect:
    """The most favourable of the claim's comparisons, by prompts. Its interval holds with 95 %
    because all of Bonferroni's intervals hold together. Several rewards are compared in full
    scales, one in its own units."""
    table, baseline = run.samples(claim.notebook), claim.baseline
    pairs = [
        (model, reward)
        for pattern, rewards in claim.compare.items()
        for model in table["model"].unique()
        if fnmatchcase(model, pattern)
        for reward in rewards
    ]
    if not pairs:
        raise MissingResult(f"there is no model {' or '.join(map(repr, claim.compare))}")
    other = run.samples(claim.baseline_notebook or claim.notebook)
    ours = table["model"].isin([model for model, _ in pairs])
    table = pd.concat([table[ours], other[other["model"] == baseline]], ignore_index=True)
    rewards = {reward for _, reward in pairs}
    full = len(rewards) > 1
    domains = {reward: domains_of(reward, full, claim.gold) for reward in rewards}
    level = 1 - 0.05 / len(pairs)
    effects = {
        (model, reward): paired_difference(table, model, baseline, domains[reward], level)
        for model, reward in pairs
    }
    best = max if claim.claimed == "> 0" else min
    effect, low, high = (best(e[i] for e in effects.values()) for i in range(3))
    model, reward = next(pair for pair in pairs if effects[pair][0] == effect)
    scores, note = prompt_scores(table, (model, baseline), domains[reward]), ""
    each = sum(s[model].mean(0) - s[baseline].mean() for s in scores)
    if len(pairs) > 1:
        note = f"the most favourable of {len(pairs)}, Bonferroni's interval"
    elif len(each) > 1:
        note = f"by training: {', '.join(f'{e:+.3f}' for e in each)}"
    what = f"{reward}{' of the gold rewards' * claim.gold}{' / full scale' * full}"
    measured = f"{what}, {model} minus {baseline}, by prompts"
    bound = claim.margin * np.min([expert_distance(run, r, full) for r in rewards])
    return Effect(effect, low, high, effects[model, reward][3], measured, note, bound, len(each))


def measure_slope(run: Run, claim: Claim) -> Effect:
    """The slope of measured on predicted changes of the other scores along the experts
    (`first_order_slope`)."""
    table, (small, whole) = run.samples(claim.notebook), claim.first_order
    trained_for = {
        expert: reward
        for reward, expert in EXPERT_OF.items()
        if {model_name(expert, small), model_name(expert, whole)} <= set(table["model"])
    }
    if not trained_for:
        raise MissingResult(f"there are no steps {small:g} and {whole:g} along an expert")
    slope, low, high, pairs = first_order_slope(table, AVERAGE, trained_for, small, whole)
    measured = (
        f"slope of the change at {whole:g} of an expert on {whole / small:g} times that at "
        f"{small:g}, by pairs of expert and reward"
    )
    note = f"the interval {'includes' if low <= 1 <= high else 'excludes'} 1, the exact prediction"
    return Effect(slope, low, high, pairs, measured, note, claim.margin)


def measure_gradient(run: Run, claim: Claim) -> Effect:
    """The mean gradient of an estimator along that of `pathwise`, in its lengths, with the closest
    teachers, where noise is least."""
    rows = pd.DataFrame(run.results(claim.notebook, "estimators"))
    rows = rows[rows["distance"] == rows["distance"].min()].set_index("estimator")
    mean, se, n = rows.loc[claim.estimator, ["mean along pathwise", "se", "n"]].astype(float)
    # an action and its mirror image may cancel to the last bit: at least what float32 rounds
    half = max(t_quantile(int(n)) * se, np.finfo(np.float32).eps)
    low, high = mean - half, mean + half
    measured = f"gradient of {claim.estimator} along that of pathwise, by batches"
    includes = "includes" if low <= 1 <= high else "excludes"
    note = f"the interval {includes} 1, the gradient of the KL"
    return Effect(mean, low, high, int(n), measured, note, claim.margin)


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
    if low == high == 0:
        return "undecided", "no score changed on any prompt, which says nothing about the next one"
    if -bound <= low and high <= bound:
        reason = f"an effect of {bound:.3g}, a third of the paper's or what was fixed, is excluded"
        return "effect excluded", reason
    if sign:
        return "reproduced", ""
    return "undecided", "the interval includes 0"


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
        row |= {"verdict": "not testable here", "claimed": "", "measured": ""}
        row["note"] = claim.untestable
        if not claim.untestable:
            row["claimed"] = claim.claimed
            try:
                effect = measure(run, claim)
                verdict, reason = decide(claim.claimed, effect.low, effect.high, effect.bound)
                if claim.id in true_by_construction:
                    verdict, reason = "true by construction", true_by_construction[claim.id]
                note = "; ".join(filter(None, (reason, effect.note)))
                row |= {**asdict(effect), "verdict": verdict, "note": note}
            except MissingResult as error:
                notebooks = [*filter(None, (claim.notebook, claim.baseline_notebook))]
                named = str(error).startswith(tuple(notebooks))
                row["note"] = str(error) if named else f"{' and '.join(notebooks)}: {error}"
        rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS).astype({"n": "Int64", "seeds": "Int64"})
