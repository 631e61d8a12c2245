"""From a table of samples to means and differences with their uncertainty."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

# The columns of a table of samples that are no reward's scores.
COLUMNS = """model task tag prompt repeat seed train_seed split image embedding guidance steps
resolution""".split()
# The gold reward of a reward, which nothing is trained on, has its name and this.
GOLD = " gold"
# A reward, the task on whose prompts its score counts, and its full scale.
Domain = tuple[str, str, float]
# What the paper's Average adds up; a `Benchmark` has its own.
AVERAGE: Sequence[Domain] = (
    ("GenEval", "geneval", 1.0),
    ("OCR", "ocr", 1.0),
    ("DeQA", "pickscore", 5.0),
    ("PickScore", "pickscore", 26.0),
)
Interval = tuple[float, float, float]  # mean, low, high (95 %)


def mean_interval(values: Sequence[float], resamples: int = 5000, seed: int = 0) -> Interval:
    """Mean and 95 % interval over prompts: Wilson's for yes-or-no scores, otherwise a percentile
    bootstrap.

    Raises ValueError below two values.
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        raise ValueError(f"an interval needs at least two values, not {len(values)}")
    # a bootstrap of 0 hits in 50 would claim certainty
    return _interval(values, resamples, seed, wilson=np.isin(values, (0, 1)).all())


def _interval(values, resamples: int = 5000, seed: int = 0, wilson: bool = False) -> Interval:
    from scipy import stats  # takes a second to import

    if wilson:
        interval = stats.binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
    else:
        rng = np.random.default_rng(seed)
        how = {"n_resamples": resamples, "method": "percentile", "batch": 500, "rng": rng}
        interval = stats.bootstrap((values,), np.mean, **how).confidence_interval
    return float(values.mean()), float(interval.low), float(interval.high)


def _row(keys: Mapping[str, Any], interval: Sequence[float], n: int) -> dict[str, Any]:
    return {**keys, **dict(zip(("mean", "low", "high"), interval)), "n": n}


def _intervals(
    table: pd.DataFrame, by: Sequence[str], rewards: Sequence[str], interval: Callable
) -> list[dict[str, Any]]:
    """A row per group of the columns `by` and reward that has two scores there."""
    rows = []
    for key, group in table.groupby(list(by), sort=False) if by else [((), table)]:
        for reward in rewards:
            values = group[reward].dropna().to_numpy() if reward in group else []
            if len(values) >= 2:
                about = {**dict(zip(by, key)), "reward": reward}
                rows.append(_row(about, interval(values), len(values)))
    return rows


def rewards_in(table: pd.DataFrame) -> list[str]:
    """The rewards whose scores a table of samples has, without their gold rewards."""
    scores = [c for c in table if c not in COLUMNS and pd.api.types.is_numeric_dtype(table[c])]
    return [c for c in scores if not c.endswith(GOLD)]


def summary(
    table: pd.DataFrame, by: Sequence[str] = (), rewards: Sequence[str] | None = None
) -> pd.DataFrame:
    """Long table: the columns of `by`, reward (None: all), mean, low, high (95 %), n. Rewards
    without scores in a group are left out."""
    rewards = rewards_in(table) if rewards is None else rewards
    return pd.DataFrame(_intervals(table, by, rewards, mean_interval))


def paired_differences(
    table: pd.DataFrame,
    baseline: str,
    rewards: Sequence[str] | None = None,
    by: Sequence[str] = ("task",),
) -> pd.DataFrame:
    """Every model's score minus the baseline's on the same prompts and noise: model, the columns of
    `by`, reward, mean, low, high (95 %), n prompts.

    A prompt's repeats are averaged first; the percentile bootstrap draws prompts. Raises ValueError
    for an unknown baseline.
    """
    if baseline not in set(table["model"]):
        raise ValueError(f"no model {baseline!r} in the table, only {sorted(set(table['model']))}")
    rewards = rewards_in(table) if rewards is None else [name for name in rewards if name in table]
    keys = list(dict.fromkeys([*by, "task", "prompt"]))
    scores = table.groupby(["model", *keys], sort=False)[rewards].mean()
    rows = []
    for model in table["model"].unique():
        if model == baseline:
            continue
        change = (scores.loc[model] - scores.loc[baseline]).reset_index()
        # differences of yes-or-no scores are no fractions, so no Wilson here
        rows += [{"model": model, **row} for row in _intervals(change, by, rewards, _interval)]
    return pd.DataFrame(rows)


def paper_average(
    table: pd.DataFrame, domains: Sequence[Domain] = AVERAGE, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """The Average by model, each reward on its own prompts over its full scale: model, reward,
    mean, low, high (95 %, prompts drawn within their task), n prompts. Flow-OPD's is (GenEval + OCR
    + DeQA/5 + PickScore/26) / 4, DeQA and PickScore on the preference prompts. Raises ValueError if
    one is missing.
    """
    rows = []
    for model, group in table.groupby("model", sort=False):
        rng, total, draws = np.random.default_rng(seed), 0.0, np.zeros(resamples)
        drawn: dict[str, np.ndarray] = {}
        for reward, task, scale in domains:
            part = group[group["task"] == task]
            if reward not in part or part[reward].isna().all():
                raise ValueError(
                    f"the Average needs {reward} on the {task} prompts, also of {model}"
                )
            values = part.groupby("prompt", sort=False)[reward].mean().to_numpy() / scale
            if task not in drawn:  # rewards of the same images are drawn together
                drawn[task] = rng.integers(len(values), size=(resamples, len(values)))
            total += values.mean() / len(domains)
            draws += values[drawn[task]].mean(1) / len(domains)
        interval = (total, *np.percentile(draws, (2.5, 97.5)))
        about = {"model": model, "reward": "Average"}
        rows.append(_row(about, interval, group["prompt"].nunique()))
    return pd.DataFrame(rows)


def in_domain_scores(table: pd.DataFrame, domains: Sequence[Domain] = AVERAGE) -> pd.DataFrame:
    """The same table with each score on its own prompts only, NaN elsewhere: PickScore and DeQA,
    which can score any image, on the preference prompts."""
    own = {r: table[r].where(table["task"] == task) for r, task, _ in domains if r in table}
    return table.assign(**own)


def model_scores(table: pd.DataFrame, domains: Sequence[Domain] = AVERAGE) -> pd.DataFrame:
    """What the paper's tables show: every model's scores, each on its own prompts, and the Average:
    model, reward, mean, low, high, n prompts.

    A prompt's repeats, and several trainings under one name, are averaged first: they are no new
    prompts.
    """
    rewards, keys = [r for r, _, _ in domains if r in table], ["model", "task", "prompt"]
    own = in_domain_scores(table, domains).groupby(keys, sort=False)[rewards].mean().reset_index()
    tables = [summary(own, ["model"], rewards), paper_average(table, domains)]
    return pd.concat(tables, ignore_index=True)


def gold_gains(
    table: pd.DataFrame, baseline: str = "base", domains: Sequence[Domain] = AVERAGE
) -> pd.DataFrame:
    """What every model gained over the baseline by a reward (`proxy`) and by its gold reward
    (`gold`), on the same samples of the reward's own prompts, in full scales: model, reward, by
    (proxy, gold or gap: proxy minus gold), mean, low, high (95 %), n prompts. A gap above 0 is
    reward over-optimisation. Empty where the table has no gold rewards."""
    columns = ["model", "reward", "by", "mean", "low", "high", "n"]
    gains = [pd.DataFrame(columns=columns)]
    for reward, task, scale in domains:
        if reward + GOLD in table:
            rows = table[table["task"] == task]
            proxy, gold = rows[reward] / scale, rows[reward + GOLD] / scale
            scores = {"proxy": proxy, "gold": gold, "gap": proxy - gold}
            scored = rows[["model", "task", "prompt"]].assign(**scores)
            change = paired_differences(scored, baseline, list(scores), by=())
            gains.append(change.rename(columns={"reward": "by"}).assign(reward=reward)[columns])
    return pd.concat(gains[1:] or gains, ignore_index=True)


def fraction_kept(
    table: pd.DataFrame,
    student: str,
    experts: Mapping[str, str],
    base: str = "base",
    domains: Sequence[Domain] = AVERAGE,
    resamples: int = 5000,
    seed: int = 0,
) -> pd.DataFrame:
    """The fraction of each expert's gain over the base that a student keeps, (student - base) /
    (expert - base): reward, expert, both gains, mean, low, high (95 %), n prompts.

    `experts` maps a reward to the model trained for it; prompts are those of the Average. The
    bootstrap draws prompts for all three models together. NaN where the expert's own gain is not
    above 0 with its interval.
    """
    rows = []
    for reward, task, _ in domains:
        if reward not in experts:
            continue
        part = table[table["task"] == task]
        scores = part.groupby(["prompt", "model"], sort=False)[reward].mean().unstack("model")
        ours, theirs = ((scores[m] - scores[base]).to_numpy() for m in (student, experts[reward]))
        drawn = np.random.default_rng(seed).integers(len(ours), size=(resamples, len(ours)))
        gain, interval = theirs[drawn].mean(1), (np.nan,) * 3
        if np.percentile(gain, 2.5) > 0:
            fractions = ours[drawn].mean(1)[gain > 0] / gain[gain > 0]
            interval = (ours.mean() / theirs.mean(), *np.percentile(fractions, (2.5, 97.5)))
        gains = {"expert's gain": theirs.mean(), "student's gain": ours.mean()}
        about = {"reward": reward, "expert": experts[reward], **gains}
        rows.append(_row(about, interval, len(ours)))
    return pd.DataFrame(rows)


def diversity(table: pd.DataFrame, by: Sequence[str] = ("model", "task")) -> pd.DataFrame:
    """How different a prompt's samples are: mean of 1 - cosine over pairs of its repeats'
    embeddings (within a training), with a 95 % interval over prompts.

    A model that collapsed to one image a prompt has 0. Raises ValueError for a table without
    embeddings or repeats.
    """
    prompt, keys = ["task", "prompt"], ["task", "prompt", "train_seed"]
    table = table if "train_seed" in table else table.assign(train_seed=0)
    if "embedding" not in table or table.groupby(["model", *keys]).size().min() < 2:
        raise ValueError("diversity needs embeddings (embed=) and at least 2 repeats of a prompt")

    def spread(embeddings: pd.Series) -> float:
        z = np.stack(embeddings)
        z = z / np.linalg.norm(z, axis=1, keepdims=True)
        return 1 - (z @ z.T)[np.triu_indices(len(z), 1)].mean()

    rows = []
    for key, group in table.groupby(list(by), sort=False):
        trainings = group.groupby(keys, sort=False)["embedding"].agg(spread)
        spreads = trainings.groupby(prompt, sort=False).mean().to_numpy()
        rows.append(_row(dict(zip(by, key)), _interval(spreads), len(spreads)))
    return pd.DataFrame(rows)


def kernel_distance(embeddings: np.ndarray, reference: np.ndarray) -> Interval:
    """Squared MMD of two samples (n, D) of the same prompts in the same order, with the cubic
    kernel of KID (1801.01401), and its 95 % interval.

    The U-statistic is unbiased: it is about 0, and may be negative, for two samples of one
    distribution.
    """
    x, y = np.asarray(embeddings, float), np.asarray(reference, float)
    if x.shape != y.shape or len(x) < 3:
        raise ValueError(f"two samples of one shape and 3 rows are needed: {x.shape}, {y.shape}")

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    h = kernel(x, x) + kernel(y, y) - kernel(x, y) - kernel(y, x)
    np.fill_diagonal(h, 0)
    rows = h.sum(1) / (len(x) - 1)
    half = 1.96 * 2 * rows.std(ddof=1) / np.sqrt(len(x))
    return float(rows.mean()), float(rows.mean() - half), float(rows.mean() + half)
