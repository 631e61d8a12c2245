"""Studies: variants of one recipe as a file, and what is told of their trainings (`compare` trains them).

Where students have teachers there is a second measure beside the scores, which tells two students apart on
far fewer prompts: how far a picture lies from the one that the prompt's teacher draws from the same noise,
the root mean square over the pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from ..benchmarks import Benchmark, load_benchmark
from ..benchmarks.benchmark import DEFAULT
from ..files import RUNS
from ..inputs import check_keys, read_yaml
from ..stats import (
    AVERAGE,
    Home,
    gain_kept,
    home_scores,
    mean_interval,
    paired_differences,
    paper_average,
    summary,
)


def load_study(path: Path) -> dict[str, dict]:
    """By variant, its recipe. Raises ValueError for what is none."""
    study = read_yaml(path)
    if (
        not isinstance(study, dict)
        or not isinstance(study.get("variants"), dict)
        or len(study["variants"]) < 2
    ):
        raise ValueError(
            f"{path} is no study: it has a recipe, the name of a file in papermill_runs/recipes, and "
            "at least two variants"
        )
    check_keys("the study", study, ("recipe", "variants"))
    base, variants = read_yaml(RUNS / "recipes" / f"{study.get('recipe')}.yaml"), {}
    for variant, changes in study["variants"].items():
        check_keys(f"the variant {variant}", changes, list(base))
        variants[variant] = {
            **base,
            **{section: {**base[section], **values} for section, values in changes.items()},
        }
    return variants


def benchmark_of(recipe: Mapping) -> Benchmark:
    return load_benchmark(recipe.get("benchmark", DEFAULT))


def tasks_of(recipe: Mapping) -> list[str]:
    """Whose prompts students of it are scored on."""
    benchmark = benchmark_of(recipe)
    asked = {benchmark.tasks[task].home for task in recipe["schedule"]["tasks"]}
    return [task for task in benchmark.own if task in asked]


def teachers_of(recipe: Mapping, task: str) -> list[str]:
    benchmark, teachers = benchmark_of(recipe), recipe.get("opd", {}).get("teachers", {})
    return [
        name
        for t, name in teachers.items()
        if benchmark.tasks[t].home == benchmark.tasks[task].home
    ]


def scores_of(table: pd.DataFrame, home: Home = AVERAGE) -> pd.DataFrame:
    """Each score on its own prompts and, where all of them are there, the paper's Average: model, reward,
    mean, low, high, n."""
    rows = summary(home_scores(table, home), ["model"])
    if not {task for _, task, _ in home} <= set(table["task"]):
        return rows
    return pd.concat([rows, paper_average(table, home)], ignore_index=True)


def reached(
    looks: Sequence[Mapping], reference: pd.DataFrame, share: float, experts: Mapping[str, str]
) -> float:
    """The iteration of the first look at which the gains of the `experts` (by reward) are kept to `share`, in
    the mean over the rewards; NaN if none is. A look is the rows of `scores_of` and their iteration."""
    means = {
        name: summary(home_scores(t)).set_index("reward")["mean"]
        for name, t in reference.groupby("model")
    }
    taught = {reward: name for reward, name in experts.items() if name in means}
    seen = (
        pd.DataFrame(looks).pivot(index="iteration", columns="reward", values="mean").sort_index()
    )
    base = pd.Series({reward: means["base"][reward] for reward in taught})
    best = pd.Series({reward: means[name][reward] for reward, name in taught.items()})
    kept = ((seen[list(taught)] - base) / (best - base)).mean(axis=1)
    return float(kept.index[kept >= share].min())


def distances(table: pd.DataFrame, reference: pd.DataFrame, recipe: Mapping) -> pd.Series:
    """By task and prompt: how far the pictures lie from those of the prompt's teachers."""
    pictures = {
        (r.model, r.task, r.prompt, r.repeat): r.embedding.astype(np.float32)
        for r in reference.itertuples()
    }

    def away(row) -> float:
        theirs = [
            pictures[name, row.task, row.prompt, row.repeat]
            for name in teachers_of(recipe, row.task)
        ]
        return float(
            np.mean([np.sqrt(np.mean((row.embedding - picture) ** 2)) for picture in theirs])
        )

    return (
        table.assign(away=[away(row) for row in table.itertuples()])
        .groupby(["task", "prompt"])["away"]
        .mean()
    )


def tell(
    tables: Mapping[tuple[str, int], pd.DataFrame],
    variants: Mapping[str, Mapping],
    reference: pd.DataFrame,
) -> pd.DataFrame:
    """What the trainings came to, in long form: variant, what, mean, low, high (95 % over prompts, of which
    several seeds are no more), n, the mean of each seed, and half the width of their 95 % t interval.

    `what` is a score, its difference to the first variant's, the share of an expert's gain that is kept, or the
    distance to the teachers' pictures. The variant `start` is the student before it is trained.
    """
    first, rows = next(iter(variants)), []
    benchmark = benchmark_of(variants[first])
    taught = {
        reward: name
        for reward, name in benchmark.experts_of.items()
        if name in set(reference["model"])
    }
    start = reference[reference["model"] == "start"]
    of = {
        "start": [start],
        **{
            variant: [t.assign(model=variant) for (a, _), t in tables.items() if a == variant]
            for variant in variants
        },
    }
    every = pd.concat([t for some in of.values() for t in some], ignore_index=True)
    rewards = [reward for reward, _, _ in benchmark.home if reward in every]
    by_prompt = every.groupby(["model", "task", "prompt"], sort=False)[rewards].mean().reset_index()
    scores = {
        variant: [scores_of(t).set_index("reward")["mean"] for t in some]
        for variant, some in of.items()
    }

    def tell_of(
        variant: str, what: str, mean: float, low: float, high: float, n: int, seeds: list[float]
    ) -> None:
        half = stats.t.ppf(0.975, len(seeds) - 1) * stats.sem(seeds) if len(seeds) > 1 else np.nan
        told = {
            "mean": mean,
            "low": low,
            "high": high,
            "n": n,
            "by seed": seeds,
            "over seeds": half,
        }
        rows.append({"variant": variant, "what": what, **told})

    for r in scores_of(by_prompt).itertuples():
        tell_of(
            r.model, r.reward, r.mean, r.low, r.high, r.n, [s[r.reward] for s in scores[r.model]]
        )
    trained = by_prompt[by_prompt["model"] != "start"]
    for r in paired_differences(home_scores(trained), first, by=()).itertuples():
        seeds = [a[r.reward] - b[r.reward] for a, b in zip(scores[r.model], scores[first])]
        tell_of(r.model, f"{r.reward} minus that of {first}", r.mean, r.low, r.high, r.n, seeds)
    if not taught:
        return pd.DataFrame(rows)
    apart = {
        variant: [distances(t, reference, variants.get(variant, variants[first])) for t in some]
        for variant, some in of.items()
    }
    mean_apart = {variant: pd.concat(some, axis=1).mean(axis=1) for variant, some in apart.items()}
    others = reference[reference["model"] != "start"]
    for variant, some in of.items():
        kept = [
            gain_kept(pd.concat([others, t]), variant, taught).set_index("reward")["mean"]
            for t in some
        ]
        for r in gain_kept(pd.concat([others, *some]), variant, taught).itertuples():
            tell_of(
                variant, f"{r.reward} kept", r.mean, r.low, r.high, r.n, [k[r.reward] for k in kept]
            )
        values = mean_apart[variant].to_numpy()
        tell_of(
            variant,
            "distance",
            *mean_interval(values),
            len(values),
            [d.mean() for d in apart[variant]],
        )
        if variant not in (first, "start"):
            values = (mean_apart[variant] - mean_apart[first]).to_numpy()
            seeds = [(a - b).mean() for a, b in zip(apart[variant], apart[first])]
            tell_of(
                variant,
                f"distance minus that of {first}",
                *mean_interval(values),
                len(values),
                seeds,
            )
    return pd.DataFrame(rows)
