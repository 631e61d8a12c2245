"""From models and prompts to one tidy table of scores, and from that to means with their uncertainty."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import pandas as pd
from scipy import stats
from tqdm.auto import tqdm

from .policy import FlowPolicy
from .prompts import Prompt
from .rewards import Reward
from .rollout import Sampler, sample

# Which judges can judge a task's prompts: the others need something the prompt does not have.
JUDGES_OF_TASK = {"geneval": ("GenEval", "PickScore", "DeQA"), "ocr": ("OCR", "PickScore", "DeQA"),
                  "pickscore": ("PickScore", "DeQA")}


def score(images, prompts: Sequence[Prompt], judges: Mapping[str, Reward]) -> pd.DataFrame:
    """One row an image: task, tag, prompt and a column per judge, NaN where a judge does not apply."""
    unknown = set(judges) - {name for names in JUDGES_OF_TASK.values() for name in names}
    if unknown:
        raise ValueError(f"no task has a judge called {', '.join(sorted(unknown))}; see JUDGES_OF_TASK")
    table = pd.DataFrame({"task": [p.task for p in prompts], "tag": [p.tag for p in prompts],
                          "prompt": [p.text for p in prompts]})
    for name, judge in judges.items():
        rows = [i for i, p in enumerate(prompts) if name in JUDGES_OF_TASK[p.task]]
        table[name] = np.nan
        if rows:
            table.loc[rows, name] = judge(images[rows], [prompts[i] for i in rows])
    return table


def evaluate(policy: FlowPolicy, prompts: Sequence[Prompt], judges: Mapping[str, Reward], seed: int = 0,
             sampler: Sampler = Sampler(), models: Mapping[str, str | None] = MappingProxyType({"base": None}), repeats: int = 1,
             batch: int = 64, progress: bool = True) -> pd.DataFrame:
    """Sample every prompt `repeats` times under every model and score it: one row an image.

    `models` maps a name to an adapter (None: the base). Image j of prompt i has seed `seed + j * len(prompts) + i` under every
    model: the same noise, so that models can be compared prompt by prompt. Columns: model, task, tag, prompt, repeat, seed,
    and one per judge.
    """
    if not len(prompts):
        raise ValueError("nothing to evaluate: the list of prompts is empty")
    every, tables = list(prompts) * repeats, []
    with tqdm(total=len(models) * len(every), desc="evaluate", disable=not progress) as bar:
        for model, adapter in models.items():
            for i in range(0, len(every), batch):
                part = every[i:i + batch]
                seeds = list(range(seed + i, seed + i + len(part)))
                images = sample(policy, part, seeds, sampler, adapter, batch)
                repeat = [j // len(prompts) for j in range(i, i + len(part))]
                tables.append(score(images, part, judges).assign(model=model, repeat=repeat, seed=seeds))
                bar.update(len(part))
    return pd.concat(tables, ignore_index=True)


def mean_interval(values: Sequence[float], resamples: int = 5000, seed: int = 0) -> tuple[float, float, float]:
    """Mean and 95 % interval over prompts: Wilson's for yes-or-no scores, else a percentile bootstrap.

    Raises ValueError below two values.
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        raise ValueError(f"an interval needs at least two values, not {len(values)}")
    if np.isin(values, (0, 1)).all():       # a bootstrap of 0 hits in 50 would claim certainty
        interval = stats.binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
        return float(values.mean()), float(interval.low), float(interval.high)
    interval = stats.bootstrap((values,), np.mean, n_resamples=resamples, method="percentile", batch=500,
                               rng=np.random.default_rng(seed)).confidence_interval
    return float(values.mean()), float(interval.low), float(interval.high)


def summary(table: pd.DataFrame, by: Sequence[str] = (), judges: Sequence[str] = ("GenEval", "OCR", "PickScore", "DeQA")
            ) -> pd.DataFrame:
    """Long table: the columns of `by`, judge, mean, low, high (95 %), n. Judges without scores in a group are left out."""
    rows = []
    groups = table.groupby(list(by), sort=False) if by else [((), table)]
    for key, group in groups:
        for name in judges:
            values = group[name].dropna() if name in group else []
            if len(values) >= 2:
                mean, low, high = mean_interval(values)
                rows.append({**dict(zip(by, key)), "judge": name, "mean": mean, "low": low, "high": high, "n": len(values)})
    return pd.DataFrame(rows)
