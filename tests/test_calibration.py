"""What a benchmark is held to, on made-up scores whose truth is known."""

import numpy as np
import pandas as pd

from flowopd_lib.stats import AVERAGE
from flowopd_lib.studies.calibration import beside_paper
from flowopd_lib.studies.paper import PAPER_MAIN


def table(shifts, n=60, noise=0.02, seed=0):
    rng, rows = np.random.default_rng(seed), []
    hard = {reward: rng.uniform(0.3, 0.6, n) for reward, *_ in AVERAGE}
    for model, of in shifts.items():
        for task in ("geneval", "ocr", "pickscore"):
            scores = {
                reward: scale * (hard[reward] + of.get(reward, 0.0) + noise * rng.normal(size=n))
                for reward, home, scale in AVERAGE
                if home == task
            }
            rows.append(
                pd.DataFrame(
                    {"model": model, "task": task, "prompt": range(n), "repeat": 0, **scores}
                )
            )
    return pd.concat(rows, ignore_index=True)


def test_an_expert_agrees_where_the_papers_change_is_large():
    moved = {"GenEval": -0.1, "OCR": -0.05, "PickScore": 0.1, "DeQA": 0.1}
    told = beside_paper(table({"base": {}, "pickscore": moved}), AVERAGE).set_index(
        ["model", "reward"]
    )
    assert told.loc[("base", "OCR"), "paper"] == PAPER_MAIN["base"]["OCR"]
    geneval, ocr, deqa = (told.loc[("pickscore", reward)] for reward in ("GenEval", "OCR", "DeQA"))
    assert abs(geneval["paper"] + 0.12) < 1e-9 and geneval["agrees"] is True  # .63 to .51
    assert abs(ocr["paper"] - 0.10) < 1e-9 and ocr["agrees"] is False
    assert deqa["agrees"] is None and abs(deqa["mean"] - 0.5) < 0.05 and deqa["n"] == 60  # .15 of 5
    # a reward and an expert that the paper does not know
    mine = [
        ("Warmth" if reward == "DeQA" else reward, task, scale) for reward, task, scale in AVERAGE
    ]
    own = table({"base": {}, "warm": moved}).rename(columns={"DeQA": "Warmth"})
    told = beside_paper(own, mine).set_index(["model", "reward"])
    assert (
        np.isnan(told.loc[("base", "Warmth"), "paper"]) and told.loc["warm", "paper"].isna().all()
    )
    assert (
        told.loc[("warm", "Warmth"), "agrees"] is None and told.loc[("warm", "Warmth"), "low"] > 0
    )
    unsure = beside_paper(table({"base": {}, "pickscore": {}}, noise=0.2), AVERAGE)
    row = unsure.set_index(["model", "reward"]).loc[("pickscore", "GenEval")]
    assert row["low"] < 0 < row["high"] and row["agrees"] is False
