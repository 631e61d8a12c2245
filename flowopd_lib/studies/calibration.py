"""What each expert does to every score, beside the paper's: `python -m flowopd_lib.studies.calibration`.

How a world is held to the facts about real models that are not under test: where the base stands, and what an
expert of one reward does to the other three. Val prompts, common noise; a score on its own prompts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from ..evaluate import evaluate
from ..files import write_whole
from ..stats import home_scores, model_scores, paired_differences
from ..worlds import load_world
from .paper import PAPER_MAIN

SEED = 1 << 20  # of val samples
LARGE = 0.08  # of full scale: where the paper's change is as large, a world must agree in sign


def beside_paper(table: pd.DataFrame, home) -> pd.DataFrame:
    """A row for each score of the base, then one for each change of it by an expert: model, judge, mean, low,
    high (95 %, over prompts), n, paper; `agrees` where the paper's change is large. What the paper has no
    number for has none."""
    scores = model_scores(table, home)
    base = scores[(scores["model"] == "base") & (scores["judge"] != "Average")]
    change = paired_differences(home_scores(table, home), "base", [judge for judge, *_ in home], by=())
    told, scales = pd.concat([base, change], ignore_index=True), {judge: scale for judge, _, scale in home}
    rows = []
    for row in told.to_dict("records"):
        judge, start = row["judge"], PAPER_MAIN["base"].get(row["judge"], np.nan)
        there = PAPER_MAIN.get(f"{row['model']} expert", {}).get(judge, np.nan)
        row |= {"paper": start if row["model"] == "base" else there - start, "agrees": None}
        if row["model"] != "base" and abs(row["paper"]) / scales[judge] >= LARGE:
            row["agrees"] = row["low"] > 0 if row["paper"] > 0 else row["high"] < 0
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flowopd_lib.studies.calibration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--world", default="tiny")
    parser.add_argument(
        "--experts", nargs="*", help="some of the world's; all if left out, none for the base alone"
    )
    parser.add_argument("--n", type=int, default=120, help="val prompts a task")
    parser.add_argument("--repeats", type=int, default=4, help="samples of each")
    parser.add_argument("--steps", type=int, default=20, help="of the ODE")
    parser.add_argument(
        "--out", type=Path, help="a CSV file for the table; what was sampled is kept beside it"
    )
    args = parser.parse_args()
    try:
        world = load_world(args.world)
        experts = list(world.experts) if args.experts is None else args.experts
        adapters = {name: world.adapter(name) for name in experts}
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    policy = world.policy()
    for name, adapter in adapters.items():
        policy.load_adapter(name, adapter)
    prompts = [p for task in world.own for p in world.prompts(task, "val")[: args.n]]
    table = evaluate(
        policy,
        prompts,
        world.judges(),
        SEED,
        world.sampler(args.steps),
        {"base": None, **{name: name for name in experts}},
        args.repeats,
        into=args.out and args.out.with_suffix(".parquet"),
        guidance={name: world.experts[name].guidance for name in experts},
    )
    told = beside_paper(table, world.home)
    print(told.round(3).to_string(index=False))
    if args.out:
        write_whole(args.out, told.round(4).to_csv(index=False))


if __name__ == "__main__":
    main()
