"""What each expert does to every score, next to the paper's numbers: how a benchmark is held to the
facts about real models that are not under test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..benchmarks import Benchmark
from ..evaluate import evaluate
from ..stats import AVERAGE, Domain, in_domain_scores, model_scores, paired_differences
from .paper import PAPER_MAIN

VALIDATION_SEED = 1 << 20
# Of the full scale: where the paper's change is as large, a benchmark must agree in sign.
LARGE = 0.08


def compare_with_paper(table: pd.DataFrame, domains: Sequence[Domain] = AVERAGE) -> pd.DataFrame:
    """A row for each score of the base, then one for each change of it by an expert: model, reward,
    mean, low, high (95 %, over prompts), n, the `paper`'s number (NaN where it has none), and where
    its change is large whether the whole interval `agrees` with its sign (else None)."""
    scores, scales = model_scores(table, domains), {reward: scale for reward, _, scale in domains}
    base = scores[(scores["model"] == "base") & (scores["reward"] != "Average")]
    own = in_domain_scores(table, domains)
    change, rows = paired_differences(own, "base", list(scales), by=()), []
    for row in pd.concat([base, change], ignore_index=True).to_dict("records"):
        reward = row["reward"]
        start = PAPER_MAIN["base"].get(reward, np.nan)
        expert = PAPER_MAIN.get(f"{row['model']} expert", {}).get(reward, np.nan)
        paper, agrees = start if row["model"] == "base" else expert - start, None
        if row["model"] != "base" and abs(paper) / scales[reward] >= LARGE:
            agrees = row["low"] > 0 if paper > 0 else row["high"] < 0
        rows.append({**row, "paper": paper, "agrees": agrees})
    return pd.DataFrame(rows)


def calibrate(
    benchmark: Benchmark,
    experts: Sequence[str] | None = None,
    n: int = 120,
    repeats: int = 4,
    steps: int = 20,
    into: str | Path | None = None,
) -> pd.DataFrame:
    """`compare_with_paper` of the base and some experts (None: all) on the first `n` val prompts of
    each task, `repeats` samples each with common noise. `into`: a parquet file for the samples."""
    names = list(benchmark.experts if experts is None else experts)
    policy = benchmark.policy()
    for name in names:
        policy.load_adapter(name, benchmark.adapter(name))
    prompts, sampler = benchmark.first_prompts("val", n), benchmark.sampler(steps)
    models, guidance = {"base": None, **{name: name for name in names}}, benchmark.guidance
    how = {"repeats": repeats, "into": into, "guidance": guidance}
    rewards = benchmark.rewards()
    table = evaluate(policy, prompts, rewards, VALIDATION_SEED, sampler, models, **how)
    return compare_with_paper(table, benchmark.domains)
