"""Experts next to the paper's numbers, on made-up scores whose truth is known."""

import numpy as np
from test_claims import samples

from flowopd_lib.experiments.calibration import compare_with_paper
from flowopd_lib.experiments.paper import PAPER_MAIN
from flowopd_lib.stats import AVERAGE


def test_an_expert_agrees_where_the_papers_change_is_large():
    shift = {"GenEval": -0.1, "OCR": -0.05, "PickScore": 0.1, "DeQA": 0.1}
    scores = samples({"base": {}, "pickscore": shift}, noise=0.02)
    rows = compare_with_paper(scores).set_index(["model", "reward"])
    assert rows.loc[("base", "OCR"), "paper"] == PAPER_MAIN["base"]["OCR"]
    geneval, ocr, deqa = (rows.loc[("pickscore", r)] for r in ("GenEval", "OCR", "DeQA"))
    assert abs(geneval["paper"] + 0.12) < 1e-9 and geneval["agrees"] is True  # .63 to .51
    assert abs(ocr["paper"] - 0.10) < 1e-9 and ocr["agrees"] is False
    assert deqa["agrees"] is None and abs(deqa["mean"] - 0.5) < 0.05 and deqa["n"] == 40
    # a reward and an expert that the paper does not have
    names = {"DeQA": "Warmth", "pickscore": "warm"}
    domains = [(names.get(reward, reward), task, scale) for reward, task, scale in AVERAGE]
    own = scores.rename(columns=names).replace({"model": names})
    rows = compare_with_paper(own, domains).set_index(["model", "reward"])
    assert np.isnan(rows.loc[("base", "Warmth"), "paper"])
    assert rows.loc["warm", "paper"].isna().all() and rows.loc["warm", "agrees"].isna().all()
    unsure = compare_with_paper(samples({"base": {}, "pickscore": {}}, noise=0.2))
    row = unsure.set_index(["model", "reward"]).loc[("pickscore", "GenEval")]
    assert row["low"] < 0 < row["high"] and row["agrees"] is False
