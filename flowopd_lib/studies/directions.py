"""Interference as what it does (Flow-OPD 4.2): how every score changes along every task's direction.

    J_j(theta + a tau_i) - J_j(theta)

`tau_i` is what the expert of task i changed, a fraction or a multiple of it is `a`. Prompts and noise are
the same before and after, and no gradient has to be estimated: this is the paper's claim itself. A conflict
is a score that falls on the way forward, a > 0. Central differences mislead, for they credit the harm of
walking backwards; backwards is asked for the curvature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ..benchmarks import Benchmark
from ..policy import FlowPolicy
from ..stats import Home, home_scores, paired_differences
from .interference import block_of, gram_table

# Below this, in full scales, what a score changes from prompt to prompt is no noise to weigh it by.
LEAST = 1e-3


def model_of(direction: str, size: float, start: str = "") -> str:
    """The name of theta + a tau in a table of scores."""
    return f"{start}{' ' if start else ''}{direction} {size:+g}"


def adapter_of(model: str) -> str:
    """An adapter's name for it: without dots, which PEFT does not take."""
    return model.replace(" ", "_").replace(".", "_")


def along(
    directions: Sequence[str], sizes: Sequence[float], start: str = "", mean_of: Sequence[str] = ()
) -> dict[str, dict]:
    """Sources of the adapters theta + a tau, by model: from the base or, named `start`, from the average of
    `mean_of`. Raises ValueError for a size of 0, which is the start."""
    if not all(sizes):
        raise ValueError("a step of size 0 goes nowhere: leave it out of the sizes")
    found = {}
    for direction in directions:
        for size in sizes:
            weights = {name: 1 / len(mean_of) for name in mean_of}
            weights[direction] = weights.get(direction, 0.0) + size
            found[model_of(direction, size, start)] = {
                "merge": "cat",
                "adapters": list(weights),
                "weights": list(weights.values()),
            }
    return found


def changes(
    table: pd.DataFrame,
    home: Home,
    directions: Sequence[str],
    sizes: Sequence[float],
    start: str = "",
) -> pd.DataFrame:
    """A row per direction, size and reward: along, size, reward, mean, low, high (95 %, over n prompts), in
    shares of the full scale, against the model `start` (the base if it is empty). `table`: `evaluate`'s."""
    asked = {model_of(d, a, start): (d, a) for d in directions for a in sizes}
    scale = {reward: full for reward, _, full in home}
    baseline = start or "base"
    own = home_scores(table[table["model"].isin([baseline, *asked])], home)
    found = paired_differences(own, baseline, list(scale), by=())
    shares = found[["mean", "low", "high"]].div(found["reward"].map(scale), axis=0)
    names = pd.DataFrame(
        [asked[m] for m in found["model"]], columns=["along", "size"], index=found.index
    )
    return pd.concat([names, found[["reward"]], shares, found[["n"]]], axis=1)


def alignment(policy: FlowPolicy, trainings: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Inner products and cosines of task vectors, what adapters changed of the base's weights: by direction,
    the adapters of its trainings, which differ in prompts and noise. As `gram_table` has it: products are
    of *different* trainings only, so that no training's noise meets itself, and intervals over trainings.

    Raises ValueError unless every direction has the same number of trainings, at least three.
    """
    counts = {len(adapters) for adapters in trainings.values()}
    if len(counts) != 1 or min(counts) < 3:
        raise ValueError(
            "task vectors are compared across at least three trainings, as many for each direction, not "
            + ", ".join(f"{name}: {len(adapters)}" for name, adapters in trainings.items())
        )
    loras = [policy.adapter(name) for adapters in trainings.values() for name in adapters]
    grams = {("all", "all"): np.zeros((len(loras), len(loras)))}
    for place in loras[0].a:
        gram = grams.setdefault((block_of(place), "all"), np.zeros((len(loras), len(loras))))
        for i, one in enumerate(loras):
            for j, other in enumerate(loras):
                if place in one.a and place in other.a:
                    # <B A, B' A'> without the products, which are as large as the base
                    inner = (one.b[place].T @ other.b[place]) * (one.a[place] @ other.a[place].T)
                    scale = (
                        one.alpha[place]
                        * other.alpha[place]
                        / (len(one.a[place]) * len(other.a[place]))
                    )
                    gram[i, j] += scale * inner.double().sum().item()
    for block, gram in list(grams.items())[1:]:
        grams["all", "all"] = grams["all", "all"] + gram
    return gram_table(grams, list(trainings))


WAYS = {
    "along": "Half of the expert: change of the score",
    "first": "The first iterations: change of the score",
    "walk": "A step along the gradient through the reward",
    "vectors": "Cosine of what the first iterations changed",
    "branch": "Cosine of score functions",
}


def ways(benchmark: Benchmark, tables: Mapping[str, pd.DataFrame | None]) -> pd.DataFrame:
    """The answers of several measurements (`tables`, by their name in `WAYS`) to one question, does what
    teaches one reward move another: way, along, reward, mean, low, high, and `says`, the sign where the
    interval leaves out 0. A value without a known interval says nothing and is left out."""
    of_expert = {expert: reward for reward, expert in benchmark.experts_of.items()}
    of_task, rows = {name: task.reward for name, task in benchmark.tasks.items()}, []
    for way in WAYS:
        table = tables.get(way)
        if table is None or table.empty:
            continue
        if way in ("along", "first"):
            size = min(table["size"][table["size"] > 0], key=lambda a: abs(a - 0.5))
            told = table[table["size"] == size].assign(along=lambda t: t["along"].map(of_expert))
        elif way == "walk":
            told = table.assign(along=table["task"].map(of_task), reward=table["on"].map(of_task))
            told = told.rename(
                columns=lambda c: c.replace("measured_", "").replace("measured", "mean")
            )
        else:
            names = of_expert if way == "vectors" else of_task
            told = table[(table["block"] == "all") & (table["sigma"].astype(str) == "all")]
            told = told.assign(along=told["task"].map(names), reward=told["on"].map(names))
            told = told.assign(
                mean=told["cosine"], low=told["cosine_low"], high=told["cosine_high"]
            )
        rows.append(told.assign(way=way)[["way", "along", "reward", "mean", "low", "high"]])
    found = pd.concat(rows).dropna(subset=["low", "high"]).reset_index(drop=True)
    return found.assign(says=np.where(found["low"] > 0, 1, np.where(found["high"] < 0, -1, 0)))


def agreement(found: pd.DataFrame) -> tuple[int, int, int]:
    """Of the pairs of different rewards in `ways`' table: how many two ways or more decide, on how many of
    these all that do say the same, and how many there are."""
    pairs = found[found["along"] != found["reward"]].groupby(["along", "reward"])["says"]
    decided = pairs.apply(lambda says: (says != 0).sum() >= 2)
    same = pairs.apply(lambda says: says[says != 0].nunique() == 1)
    return int(decided.sum()), int((decided & same).sum()), len(decided)


def foretold(
    table: pd.DataFrame,
    home: Home,
    directions: Mapping[str, str],
    small: float,
    whole: float,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float, int]:
    """Does the change of a small step, times whole / small, foretell that of the whole? The slope of the
    measured on the foretold change, from the base, over all pairs of a direction and another reward than that
    it was trained for (`directions`: by name, that reward): slope, low, high (95 %, prompts drawn), number of
    pairs. 1 is exact.

    One half of the prompts foretells and the other is measured, each way, so that no prompt's noise is on
    both sides; and what noise takes from the slope, sum(p_A m_B) / sum(p_A p_B) gives back. A reward's pairs
    weigh by the inverse variance of its change from prompt to prompt (weighted least squares), or the noise
    of a reward that says yes or no would be all there is.
    """
    parts = []
    for reward, task, scale in home:
        rows = table[table["task"] == task]
        scores = (
            rows.groupby(["prompt", "model"], sort=False)[reward].mean().unstack("model") / scale
        )
        others = [d for d, own in directions.items() if own != reward]
        p = np.stack([scores[model_of(d, small)] - scores["base"] for d in others], 1) * (
            whole / small
        )
        m = np.stack([scores[model_of(d, whole)] - scores["base"] for d in others], 1)
        parts.append((p, m, 1 / max(m.var(0).mean(), LEAST**2)))
    rng, top, bottom = np.random.default_rng(seed), 0.0, 0.0
    for p, m, weight in parts:
        means = []
        for side in (0, 1):
            n = len(p[side::2])
            # the first row is the half itself, the others are draws of its prompts
            drawn = np.vstack([np.ones(n), rng.multinomial(n, [1 / n] * n, size=resamples)]) / n
            means.append((drawn @ p[side::2], drawn @ m[side::2]))
        (pa, ma), (pb, mb) = means
        top = top + weight * (pa * mb + pb * ma).sum(1)
        bottom = bottom + weight * 2 * (pa * pb).sum(1)
    slopes = np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)
    # else the small steps move nothing above their noise
    known = np.isfinite(slopes).mean() >= 0.95
    low, high = np.nanquantile(slopes[1:], (0.025, 0.975)) if known else (np.nan, np.nan)
    return float(slopes[0]), float(low), float(high), sum(p.shape[1] for p, *_ in parts)
