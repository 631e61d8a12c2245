"""What each expert does to every score, beside the paper's: `python -m flowopd_lib.studies.calibration`.

How a benchmark is held to the facts about real models that are not under test: where the base stands, and what an
expert of one reward does to the other three. Val prompts, common noise; a score on its own prompts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from ..benchmarks import load_benchmark
from ..evaluate import evaluate
from ..files import write_whole
from ..stats import home_scores, model_scores, paired_differences
from .paper import PAPER_MAIN

SEED = 1 << 20  # of val samples
LARGE = 0.08  # of full scale: where the paper's change is as large, a benchmark must agree in sign


def beside_paper(table: pd.DataFrame, home) -> pd.DataFrame:
    """A row for each score of the base, then one for each change of it by an expert: model, reward, mean, low,
    high (95 %, over prompts), n, paper; `agrees` where the paper's change is large. What the paper has no
    number for has none."""
    scores = model_scores(table, home)
    base = scores[(scores["model"] == "base") & (scores["reward"] != "Average")]
    change = paired_differences(
        home_scores(table, home), "base", [reward for reward, *_ in home], by=()
    )
    told, scales = (
        pd.concat([base, change], ignore_index=True),
        {reward: scale for reward, _, scale in home},
    )
    rows = []
    for row in told.to_dict("records"):
        reward, start = row["reward"], PAPER_MAIN["base"].get(row["reward"], np.nan)
        there = PAPER_MAIN.get(f"{row['model']} expert", {}).get(reward, np.nan)
        row |= {"paper": start if row["model"] == "base" else there - start, "agrees": None}
        if row["model"] != "base" and abs(row["paper"]) / scales[reward] >= LARGE:
            row["agrees"] = row["low"] > 0 if row["paper"] > 0 else row["high"] < 0
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flowopd_lib.studies.calibration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--benchmark", default="tiny")
    parser.add_argument(
        "--experts",
        nargs="*",
        help="some of the benchmark's; all if left out, none for the base alone",
    )
    parser.add_argument("--n", type=int, default=120, help="val prompts a task")
    parser.add_argument("--repeats", type=int, default=4, help="samples of each")
    parser.add_argument("--steps", type=int, default=20, help="of the ODE")
    parser.add_argument(
        "--out", type=Path, help="a CSV file for the table; what was sampled is kept beside it"
    )
    args = parser.parse_args()
    try:
        benchmark = load_benchmark(args.benchmark)
        experts = list(benchmark.experts) if args.experts is None else args.experts
        adapters = {name: benchmark.adapter(name) for name in experts}
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    policy = benchmark.policy()
    for name, adapter in adapters.items():
        policy.load_adapter(name, adapter)
    prompts = [p for task in benchmark.own for p in benchmark.prompts(task, "val")[: args.n]]
    table = evaluate(
        policy,
        prompts,
        benchmark.rewards(),
        SEED,
        benchmark.sampler(args.steps),
        {"base": None, **{name: name for name in experts}},
        args.repeats,
        into=args.out and args.out.with_suffix(".parquet"),
        guidance={name: benchmark.experts[name].guidance for name in experts},
    )
    told = beside_paper(table, benchmark.home)
    print(told.round(3).to_string(index=False))
    if args.out:
        write_whole(args.out, told.round(4).to_csv(index=False))


if __name__ == "__main__":
    main()
