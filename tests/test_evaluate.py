"""Tables and intervals."""
import numpy as np
import pandas as pd
import pytest

from flowopd_lib import evaluate, mean_interval, summary


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        _, low, high = mean_interval(rng.random(200) < .6, resamples=400, seed=i)
        hits += low <= .6 <= high
    assert .90 <= hits / 200 <= .99      # 95 % +- about 3 standard errors of 200 trials


def test_the_interval_of_a_constant_is_the_constant():
    assert mean_interval([1, 1, 1]) == (1, 1, 1)
    with pytest.raises(ValueError, match="at least two"):
        mean_interval([1])


def test_evaluate_scores_what_applies_with_the_same_noise(policy, judges, test_prompts):
    prompts = [p for task in test_prompts.values() for p in task[:3]]
    table = evaluate(policy, prompts, judges, seed=40, steps=3, batch=4, progress=False)
    assert table["seed"].tolist() == list(range(40, 49)) and table["prompt"].tolist() == [p.text for p in prompts]
    assert table["GenEval"].notna().tolist() == [True] * 3 + [False] * 6
    assert table["OCR"].notna().tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert table[["PickScore", "DeQA"]].notna().all(axis=None)
    again = evaluate(policy, prompts, judges, seed=40, steps=3, batch=9, progress=False)
    pd.testing.assert_frame_equal(table, again, rtol=1e-3)


def test_summary_counts_only_what_was_scored():
    table = pd.DataFrame({"task": ["a", "a", "b", "b"], "GenEval": [1., 0., np.nan, np.nan], "DeQA": [4., 4., 3., 5.]})
    rows = summary(table, ["task"]).set_index(["task", "judge"])
    assert rows.loc[("a", "GenEval"), "mean"] == .5 and rows.loc[("a", "GenEval"), "n"] == 2
    assert ("b", "GenEval") not in rows.index and rows.loc[("b", "DeQA"), "mean"] == 4
