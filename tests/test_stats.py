"""Intervals and differences, on made-up tables whose truth is known."""

import numpy as np
import pandas as pd
import pytest

from flowopd_lib import stats


def rows(model, task, n, **columns):
    prompts = [f"{task} {i}" for i in range(n)]
    return pd.DataFrame({"model": model, "task": task, "prompt": prompts, **columns})


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for i in range(200):
        values = rng.random(200) < 0.6 if i % 2 else rng.normal(0.6, 1, 200)
        _, low, high = stats.mean_interval(values, resamples=400, seed=i)
        hits += low <= 0.6 <= high
    assert 0.90 <= hits / 200 <= 0.99  # 95 % +- about 3 standard errors of 200 trials


def test_the_interval_of_0_hits_in_50_is_wilsons_and_of_a_constant_is_the_constant():
    mean, low, high = stats.mean_interval([0] * 50)
    assert mean == low == 0 and high == pytest.approx(0.0713, abs=1e-3)
    assert stats.mean_interval([4.5, 4.5, 4.5]) == (4.5, 4.5, 4.5)
    with pytest.raises(ValueError, match="at least two"):
        stats.mean_interval([1])


def test_summary_counts_only_what_was_scored():
    scores = {"GenEval": [1.0, 0.0, np.nan, np.nan], "DeQA": [4.0, 4.0, 3.0, 5.0]}
    table = pd.DataFrame({"task": ["a", "a", "b", "b"], "seed": range(4), **scores})
    got = stats.summary(table, ["task"]).set_index(["task", "reward"])
    assert got.loc[("a", "GenEval"), "mean"] == 0.5 and got.loc[("a", "GenEval"), "n"] == 2
    assert ("b", "GenEval") not in got.index and got.loc[("b", "DeQA"), "mean"] == 4
    assert set(stats.summary(table)["reward"]) == {"GenEval", "DeQA"}


def with_gain(rng, n, gain):
    """Model `new` is `gain` better than `old` on prompts of very different difficulty."""
    hard = rng.normal(0, 3, n)
    models = [("old", 0.0), ("new", gain)] * 2
    return pd.concat(
        [rows(m, "pickscore", n, DeQA=hard + g + rng.normal(0, 0.3, n)) for m, g in models]
    )


def test_the_paired_interval_covers_the_gain_and_is_narrower_than_the_unpaired_one():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(60):
        row = stats.paired_differences(with_gain(rng, 60, 0.2), "old").iloc[0]
        hits += row["low"] <= 0.2 <= row["high"]
    assert hits >= 52 and row["n"] == 60  # 95 % of 60 is 57, minus three standard errors
    new = with_gain(rng, 60, 0.2).query("model == 'new'")
    _, low, high = stats.mean_interval(new.groupby("prompt").DeQA.mean())
    assert row["high"] - row["low"] < (high - low) / 4
    with pytest.raises(ValueError, match="no model 'gone'"):
        stats.paired_differences(with_gain(rng, 4, 0), "gone")


@pytest.mark.parametrize(
    "scores, printed", [((0.63, 0.59, 4.07, 21.64), 0.72), ((0.92, 0.94, 4.35, 23.08), 0.90)]
)
def test_the_average_of_the_papers_scores_is_the_papers(scores, printed):
    geneval, ocr, deqa, pickscore = scores
    table = pd.concat(
        [
            rows("m", "geneval", 3, GenEval=geneval),
            rows("m", "ocr", 3, OCR=ocr),
            rows("m", "pickscore", 3, DeQA=deqa, PickScore=pickscore),
        ]
    )
    assert stats.paper_average(table)["mean"].item() == pytest.approx(printed, abs=0.006)
    with pytest.raises(ValueError, match="needs OCR on the ocr prompts"):
        stats.paper_average(table.drop(columns="OCR"))


def test_models_are_scored_in_domain_and_a_prompt_counts_once():
    table = pd.concat(
        [
            rows("m", "geneval", 3, GenEval=1.0, PickScore=3.0, DeQA=1.0),
            rows("m", "ocr", 3, OCR=0.5, PickScore=3.0, DeQA=1.0),
            rows("m", "pickscore", 3, PickScore=13.0, DeQA=4.0),
        ]
    )
    got = stats.model_scores(table).set_index("reward")
    means = {"GenEval": 1.0, "OCR": 0.5, "PickScore": 13.0, "DeQA": 4.0}
    means["Average"] = (1 + 0.5 + 0.8 + 0.5) / 4
    assert got["mean"].to_dict() == pytest.approx(means) and got.loc["PickScore", "n"] == 3
    twice = stats.model_scores(pd.concat([table, table])).set_index("reward")
    assert twice["n"].equals(got["n"]) and twice["low"].equals(got["low"])
    assert stats.in_domain_scores(table)["DeQA"].count() == 3 and table["DeQA"].count() == 9


def test_diversity_measures_collapse_and_kernel_distance_a_shift():
    rng = np.random.default_rng(0)
    means = rng.normal(size=(100, 16))

    def samples(model, spread):
        embeddings = [list(means + spread * rng.normal(size=(100, 16))) for _ in range(3)]
        return pd.concat([rows(model, "ocr", 100, embedding=e) for e in embeddings])

    table = pd.concat([samples("collapsed", 0.0), samples("varied", 0.5)])
    got = stats.diversity(table).set_index("model")
    assert got.loc["collapsed", "mean"] == pytest.approx(0, abs=1e-9)
    assert got.loc["varied", "low"] > 0.05
    # two trainings that collapsed, each to images of its own, have none either
    both = [samples("collapsed", 0.0).assign(train_seed=k) for k in range(2)]
    both[1]["embedding"] = list(-np.stack(both[1]["embedding"]))
    (row,) = stats.diversity(pd.concat(both), ["model"]).to_dict("records")
    assert row["mean"] == pytest.approx(0, abs=1e-9) and row["n"] == 100
    hits = 0
    for _ in range(60):
        _, low, high = stats.kernel_distance(*rng.normal(size=(2, 80, 16)))
        hits += low <= 0 <= high
    assert hits >= 52
    x, y = rng.normal(size=(2, 80, 16))
    assert stats.kernel_distance(x, y + 0.5)[1] > 0
    with pytest.raises(ValueError, match="embed="):
        stats.diversity(table.drop(columns="embedding"))


def test_the_fraction_of_an_experts_gain_that_a_student_keeps():
    rng, hits, experts = np.random.default_rng(2), 0, {"OCR": "expert"}
    for _ in range(40):
        hard, gains = rng.normal(0, 1, 80), {"base": 0.0, "expert": 0.4, "student": 0.3}
        parts = [
            rows(m, "ocr", 80, OCR=hard + g + rng.normal(0, 0.2, 80)) for m, g in gains.items()
        ]
        table = pd.concat(parts)
        (row,) = stats.fraction_kept(table, "student", experts, resamples=400).to_dict("records")
        hits += row["low"] <= 0.75 <= row["high"]
    assert hits >= 34 and row["expert's gain"] == pytest.approx(0.4, abs=0.1)
    assert row["mean"] == pytest.approx(row["student's gain"] / row["expert's gain"])
    noise = table.assign(OCR=rng.normal(size=len(table)))  # the expert gained nothing
    unsure = stats.fraction_kept(noise, "student", experts, resamples=200)
    assert unsure[["mean", "low", "high"]].isna().all(axis=None)


def test_a_gain_that_only_the_reward_measures_is_a_gap_to_its_gold_reward():
    rng = np.random.default_rng(0)
    hard, gains = (
        rng.normal(20, 1, 90),
        {"base": (0, 0), "honest": (1.3, 1.3), "hacked": (2.6, -0.52)},
    )
    scored = [
        rows(model, "pickscore", 90)
        .assign(PickScore=hard + proxy + rng.normal(0, 0.1, 90))
        .assign(**{"PickScore gold": hard + gold + rng.normal(0, 0.1, 90)})
        for model, (proxy, gold) in gains.items()
    ]
    # scores on another task's prompts do not count
    table = pd.concat([*scored, *(rows(m, "ocr", 90, OCR=1.0) for m in ("base", "honest"))])
    got = stats.gold_gains(table)
    assert set(got["reward"]) == {"PickScore"} and (got["n"] == 90).all()
    got = got.set_index(["model", "by"])
    for model, proxy, gold in (("honest", 0.05, 0.05), ("hacked", 0.1, -0.02)):  # of 26
        assert got.loc[(model, "proxy"), "mean"] == pytest.approx(proxy, abs=0.003)
        assert got.loc[(model, "gold"), "mean"] == pytest.approx(gold, abs=0.003)
        gap = got.loc[(model, "gap")]
        assert gap["mean"] == pytest.approx(proxy - gold, abs=0.004)
        assert gap["low"] < gap["mean"] < gap["high"]
    assert got.loc[("hacked", "gap"), "low"] > 0.1 and got.loc[("honest", "gap"), "low"] < 0.003
    # without gold rewards there is no gap, and a gold reward is none of the rewards
    assert stats.gold_gains(table.drop(columns="PickScore gold")).empty
    assert "PickScore gold" not in set(stats.summary(table, ["model"])["reward"])
