"""Tables and intervals."""
import numpy as np
import pandas as pd
import pytest

from flowopd_lib import Sampler, evaluate, mean_interval, summary


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        sample = rng.random(200) < .6 if i % 2 else rng.normal(.6, 1, 200)      # a share, and a mean
        _, low, high = mean_interval(sample, resamples=400, seed=i)
        hits += low <= .6 <= high
    assert .90 <= hits / 200 <= .99      # 95 % +- about 3 standard errors of 200 trials


def test_no_hit_in_fifty_is_not_certainty():
    mean, low, high = mean_interval([0] * 50)
    assert mean == low == 0 and high == pytest.approx(.0713, abs=1e-3)      # Wilson's upper limit for 0 of 50


def test_the_interval_of_a_constant_is_the_constant():
    assert mean_interval([4.5, 4.5, 4.5]) == (4.5, 4.5, 4.5)
    with pytest.raises(ValueError, match="at least two"):
        mean_interval([1])


def test_evaluate_scores_what_applies_with_the_same_noise(policy, judges, test_prompts):
    prompts = [p for task in test_prompts.values() for p in task[:3]]
    table = evaluate(policy, prompts, judges, seed=40, sampler=Sampler(3), batch=4, progress=False)
    assert table["seed"].tolist() == list(range(40, 49)) and table["prompt"].tolist() == [p.text for p in prompts]
    assert table["GenEval"].notna().tolist() == [True] * 3 + [False] * 6
    assert table["OCR"].notna().tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert table[["PickScore", "DeQA"]].notna().all(axis=None)
    again = evaluate(policy, prompts, judges, seed=40, sampler=Sampler(3), batch=9, progress=False)
    pd.testing.assert_frame_equal(table[["PickScore", "DeQA"]], again[["PickScore", "DeQA"]], rtol=1e-3)
    with pytest.raises(ValueError, match="no task has a judge called Taste"):
        evaluate(policy, prompts, {"Taste": judges["DeQA"]}, sampler=Sampler(1), progress=False)
    with pytest.raises(ValueError, match="empty"):
        evaluate(policy, [], judges)


def test_every_model_gets_the_same_noise_and_every_repeat_new_noise(policy, judges, test_prompts):
    prompts = test_prompts["ocr"][:3]
    table = evaluate(policy, prompts, {"DeQA": judges["DeQA"]}, 7, Sampler(3), {"one": None, "two": None}, repeats=2, batch=4, progress=False)
    one, two = (table[table.model == name].reset_index(drop=True) for name in ("one", "two"))
    assert one.seed.tolist() == list(range(7, 13)) and one.repeat.tolist() == [0] * 3 + [1] * 3
    pd.testing.assert_frame_equal(one.drop(columns="model"), two.drop(columns="model"))
    assert (one.DeQA[:3].values != one.DeQA[3:].values).all()


def test_the_base_knows_what_it_is_asked(policy, judges, test_prompts):
    """A floor far below what the notebook measures: noise, or text that does not reach the picture, would fail it."""
    prompts = test_prompts["geneval"][:36] + test_prompts["ocr"][:24]
    table = evaluate(policy, prompts, {n: judges[n] for n in ("GenEval", "OCR")}, sampler=Sampler(20), progress=False)
    assert table["GenEval"].mean() > .25 and table["OCR"].mean() > .25


def test_summary_counts_only_what_was_scored():
    table = pd.DataFrame({"task": ["a", "a", "b", "b"], "GenEval": [1., 0., np.nan, np.nan], "DeQA": [4., 4., 3., 5.]})
    rows = summary(table, ["task"]).set_index(["task", "judge"])
    assert rows.loc[("a", "GenEval"), "mean"] == .5 and rows.loc[("a", "GenEval"), "n"] == 2
    assert ("b", "GenEval") not in rows.index and rows.loc[("b", "DeQA"), "mean"] == 4
