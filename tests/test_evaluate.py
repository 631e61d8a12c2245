"""Tables and intervals."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch

import flowopd_lib.evaluate  # noqa: F401
from flowopd_lib import (
    FlowPolicy,
    Sampler,
    diversity,
    evaluate,
    gain_kept,
    gold_figure,
    gold_gains,
    home_scores,
    kernel_distance,
    load_benchmark,
    mean_interval,
    model_scores,
    paired_differences,
    paper_average,
    summary,
)

BENCHMARK = load_benchmark()

evaluate_module = sys.modules["flowopd_lib.evaluate"]  # the package's `evaluate` is the function


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        sample = rng.random(200) < 0.6 if i % 2 else rng.normal(0.6, 1, 200)  # a share, and a mean
        _, low, high = mean_interval(sample, resamples=400, seed=i)
        hits += low <= 0.6 <= high
    assert 0.90 <= hits / 200 <= 0.99  # 95 % +- about 3 standard errors of 200 trials


def test_no_hit_in_fifty_is_not_certainty():
    mean, low, high = mean_interval([0] * 50)
    assert mean == low == 0 and high == pytest.approx(
        0.0713, abs=1e-3
    )  # Wilson's upper limit for 0 of 50


def test_the_interval_of_a_constant_is_the_constant():
    assert mean_interval([4.5, 4.5, 4.5]) == (4.5, 4.5, 4.5)
    with pytest.raises(ValueError, match="at least two"):
        mean_interval([1])


def test_evaluate_scores_what_applies_with_the_same_noise(policy, rewards, test_prompts):
    prompts = [p for task in test_prompts.values() for p in task[:3]]
    table = evaluate(policy, prompts, rewards, seed=40, sampler=Sampler(3), batch=4, progress=False)
    assert table["seed"].tolist() == list(range(40, 49)) and table["prompt"].tolist() == [
        p.text for p in prompts
    ]
    assert table["GenEval"].notna().tolist() == [True] * 3 + [False] * 6
    assert table["OCR"].notna().tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert table[["PickScore", "DeQA"]].notna().all(axis=None)
    again = evaluate(policy, prompts, rewards, seed=40, sampler=Sampler(3), batch=9, progress=False)
    pd.testing.assert_frame_equal(
        table[["PickScore", "DeQA"]], again[["PickScore", "DeQA"]], rtol=1e-3
    )
    with pytest.raises(ValueError, match="empty"):
        evaluate(policy, [], rewards)


def test_every_model_gets_the_same_noise_and_every_repeat_new_noise(policy, rewards, test_prompts):
    prompts = test_prompts["ocr"][:3]
    table = evaluate(
        policy,
        prompts,
        {"DeQA": rewards["DeQA"]},
        7,
        Sampler(3),
        {"one": None, "two": None},
        repeats=2,
        batch=4,
        progress=False,
    )
    one, two = (table[table.model == name].reset_index(drop=True) for name in ("one", "two"))
    assert one.seed.tolist() == list(range(7, 13)) and one.repeat.tolist() == [0] * 3 + [1] * 3
    pd.testing.assert_frame_equal(one.drop(columns="model"), two.drop(columns="model"))
    assert (one.DeQA[:3].values != one.DeQA[3:].values).all()


def test_the_base_knows_what_it_is_asked(policy, rewards, test_prompts):
    """A floor far below what the notebook measures: noise, or text that does not reach the picture, would
    fail it."""
    prompts = test_prompts["geneval"][:36] + test_prompts["ocr"][:24]
    table = evaluate(
        policy,
        prompts,
        {n: rewards[n] for n in ("GenEval", "OCR")},
        sampler=Sampler(20),
        progress=False,
    )
    assert table["GenEval"].mean() > 0.25 and table["OCR"].mean() > 0.25


def test_summary_counts_only_what_was_scored():
    table = pd.DataFrame(
        {
            "task": ["a", "a", "b", "b"],
            "GenEval": [1.0, 0.0, np.nan, np.nan],
            "DeQA": [4.0, 4.0, 3.0, 5.0],
        }
    )
    rows = summary(table, ["task"]).set_index(["task", "reward"])
    assert rows.loc[("a", "GenEval"), "mean"] == 0.5 and rows.loc[("a", "GenEval"), "n"] == 2
    assert ("b", "GenEval") not in rows.index and rows.loc[("b", "DeQA"), "mean"] == 4


def scores(rng, prompts, gain):
    """A made-up table: model `new` is `gain` better than `old` on prompts of very different difficulty."""
    hard = rng.normal(0, 3, prompts)
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "model": m,
                    "task": "pickscore",
                    "prompt": [f"p{i}" for i in range(prompts)],
                    "repeat": r,
                    "DeQA": hard + g + rng.normal(0, 0.3, prompts),
                }
            )
            for m, g in (("old", 0.0), ("new", gain))
            for r in range(2)
        ],
        ignore_index=True,
    )


def test_the_paired_interval_covers_the_gain_and_is_narrower_than_unpaired():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(60):
        row = paired_differences(scores(rng, 60, 0.2), "old").iloc[0]
        hits += row["low"] <= 0.2 <= row["high"]
    assert hits >= 52 and row["n"] == 60  # 95 % of 60 is 57, minus three standard errors
    _, low, high = mean_interval(
        scores(rng, 60, 0.2).query("model == 'new'").groupby("prompt").DeQA.mean()
    )
    assert row["high"] - row["low"] < (high - low) / 4
    with pytest.raises(ValueError, match="no model 'gone'"):
        paired_differences(scores(rng, 4, 0), "gone")


def test_the_average_is_the_papers():
    """The base and Flow-OPD of the paper's table."""

    def table(geneval, ocr, deqa, pickscore):
        rows = [
            ("geneval", {"GenEval": geneval}),
            ("ocr", {"OCR": ocr}),
            ("pickscore", {"DeQA": deqa, "PickScore": pickscore}),
        ]
        return pd.DataFrame(
            [
                {"model": "m", "task": t, "prompt": f"{t} {i}", **v}
                for t, v in rows
                for i in range(3)
            ]
        )

    for given, printed in (((0.63, 0.59, 4.07, 21.64), 0.72), ((0.92, 0.94, 4.35, 23.08), 0.90)):
        assert paper_average(table(*given))["mean"].item() == pytest.approx(printed, abs=0.006)
    with pytest.raises(ValueError, match="needs OCR on the ocr prompts"):
        paper_average(table(0.6, np.nan, 4.0, 21.0))


def test_models_are_scored_on_their_own_prompts():
    rows = [
        ("geneval", {"GenEval": 1.0, "PickScore": 3.0, "DeQA": 1.0}),
        ("ocr", {"OCR": 0.5, "PickScore": 3.0, "DeQA": 1.0}),
        ("pickscore", {"PickScore": 13.0, "DeQA": 4.0}),
    ]
    table = pd.DataFrame(
        [{"model": "m", "task": t, "prompt": f"{t} {i}", **v} for t, v in rows for i in range(3)]
    )
    got = model_scores(table).set_index("reward")
    assert got["mean"].to_dict() == pytest.approx(
        {
            "GenEval": 1.0,
            "OCR": 0.5,
            "PickScore": 13.0,
            "DeQA": 4.0,
            "Average": (1 + 0.5 + 0.8 + 0.5) / 4,
        }
    )
    # a second sample of a prompt is no second prompt
    twice = model_scores(pd.concat([table, table])).set_index("reward")
    assert twice["n"].equals(got["n"]) and twice["low"].equals(got["low"])
    assert (
        got.loc["PickScore", "n"] == 3
        and home_scores(table)["DeQA"].count() == 3
        and table["DeQA"].count() == 9
    )


def test_the_distance_to_renders_is_small_for_renders_and_large_for_noise(rewards):
    embed = rewards["PickScore"].embed
    pictures = {
        "renders": [
            BENCHMARK.truth.clean_renders(t, "test", 30, seed=1) for t in ("ocr", "pickscore")
        ],
        "noise": [torch.rand(30, 3, 64, 64) for _ in range(2)],
    }
    table = pd.concat(
        [
            pd.DataFrame({"model": m, "task": t, "repeat": 0, "embedding": list(embed(images))})
            for m, both in pictures.items()
            for t, images in zip(("ocr", "pickscore"), both)
        ]
    )
    rows = BENCHMARK.truth.render_distance(table, embed, seed=0).set_index("model")
    assert rows.loc["renders", "high"] < rows.loc["noise", "low"] and (rows["n"] == 60).all()
    again = table[table["model"] == "noise"].assign(
        model="renders", train_seed=1
    )  # another training
    several = pd.concat([table.assign(train_seed=0), again])
    pd.testing.assert_frame_equal(
        BENCHMARK.truth.render_distance(several, embed, seed=0).set_index("model"), rows
    )


def test_diversity_sees_collapse_and_distance_sees_a_shift():
    rng = np.random.default_rng(0)
    means = rng.normal(size=(100, 16))

    def table(name, spread):
        return pd.DataFrame(
            [
                {
                    "model": name,
                    "task": "ocr",
                    "prompt": str(i),
                    "embedding": means[i] + spread * rng.normal(size=16),
                }
                for i in range(100)
                for _ in range(3)
            ]
        )

    rows = diversity(pd.concat([table("collapsed", 0.0), table("varied", 0.5)])).set_index("model")
    assert (
        rows.loc["collapsed", "mean"] == pytest.approx(0, abs=1e-9)
        and rows.loc["varied", "low"] > 0.05
    )
    # two trainings that collapsed, each to pictures of its own, have none either
    both = [table("collapsed", 0.0).assign(train_seed=k) for k in range(2)]
    both[1]["embedding"] = list(-np.stack(both[1]["embedding"]))
    (row,) = diversity(pd.concat(both), ["model"]).to_dict("records")
    assert row["mean"] == pytest.approx(0, abs=1e-9) and row["n"] == 100
    hits = 0
    for _ in range(60):
        value, low, high = kernel_distance(rng.normal(size=(80, 16)), rng.normal(size=(80, 16)))
        hits += low <= 0 <= high
    assert hits >= 52
    assert kernel_distance(rng.normal(size=(80, 16)), rng.normal(size=(80, 16)) + 0.5)[1] > 0
    with pytest.raises(ValueError, match="embed="):
        diversity(scores(rng, 3, 0.0))


def test_a_table_keeps_as_parquet_with_its_embeddings(policy, rewards, test_prompts, tmp_path):
    table = evaluate(
        policy,
        test_prompts["ocr"][:2],
        {"DeQA": rewards["DeQA"]},
        sampler=Sampler(2),
        repeats=2,
        embed=rewards["PickScore"].embed,
        progress=False,
    )
    table.to_parquet(tmp_path / "samples.parquet")
    again = pd.read_parquet(tmp_path / "samples.parquet")
    assert np.allclose(np.stack(again.embedding), np.stack(table.embedding)) and again.drop(
        columns="embedding"
    ).equals(table.drop(columns="embedding"))
    assert np.square(np.stack(table.embedding)).mean(1) == pytest.approx(1, rel=1e-4)
    assert 0 < diversity(table)["mean"].item() < 2


def test_an_evaluation_cut_off_goes_on_to_the_same_table_and_pictures(
    rewards, test_prompts, tmp_path, monkeypatch
):
    policy = FlowPolicy(BENCHMARK.base)
    policy.load_adapter("expert", BENCHMARK.adapter("ocr"))
    prompts, kinds = (
        test_prompts["ocr"][:3] + test_prompts["geneval"][:3],
        {n: rewards[n] for n in ("GenEval", "OCR", "DeQA")},
    )
    asked, draw = [], evaluate_module.sample

    def run(name, prompts=prompts, **options):
        asked.clear()
        return evaluate(
            policy,
            prompts,
            kinds,
            3,
            Sampler(2),
            {"base": None, "expert": "expert"},
            embed=rewards["PickScore"].embed,
            batch=4,
            progress=False,
            pictures=tmp_path / name / "pictures",
            into=tmp_path / name / "samples.parquet",
            **options,
        )

    def cut_after(n):
        def sample(*arguments):
            if len(asked) == n:
                raise KeyboardInterrupt
            asked.append(arguments)
            return draw(*arguments)

        monkeypatch.setattr(evaluate_module, "sample", sample)

    cut_after(100)
    whole = run("whole")
    assert len(asked) == 4
    for n in (1, 2):  # killed twice
        cut_after(n)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
        assert not (tmp_path / "cut" / "samples.parquet").exists()
    cut_after(100)
    table = run("cut")
    assert len(asked) == 1  # 1 and 2 batches were there
    pd.testing.assert_frame_equal(table, whole, check_exact=True)
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "cut" / "samples.parquet"), table, check_exact=True
    )
    assert {p.name: p.read_bytes() for p in (tmp_path / "cut" / "pictures").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole" / "pictures").iterdir()
    }
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == ["pictures", "samples.parquet"]
    pd.testing.assert_frame_equal(run("cut"), whole, check_exact=True)
    assert not asked  # only read
    plain = evaluate(
        policy,
        prompts,
        kinds,
        3,
        Sampler(2),
        {"base": None, "expert": "expert"},
        batch=4,
        progress=False,
    )
    pd.testing.assert_frame_equal(
        plain, whole.drop(columns=["picture", "embedding"]), check_exact=True
    )
    # something else: other weights under the name, other prompts
    with torch.no_grad():
        next(iter(policy.adapter_parameters("expert").values())).add_(0.1)
    assert not run("cut")["DeQA"].equals(whole["DeQA"]) and len(asked) == 4
    run("cut", prompts[:2])
    kept = sorted((tmp_path / "cut" / "earlier").rglob("samples.parquet"))
    assert len(kept) == 2 and pd.read_parquet(kept[0]).equals(table)


def test_the_share_of_an_experts_gain_that_a_student_keeps():
    rng, hits = np.random.default_rng(2), 0
    for _ in range(40):
        hard = rng.normal(0, 1, 80)
        table = pd.concat(
            [
                pd.DataFrame(
                    {
                        "model": m,
                        "task": "ocr",
                        "prompt": [f"p{i}" for i in range(80)],
                        "OCR": hard + g + rng.normal(0, 0.2, 80),
                    }
                )
                for m, g in (("base", 0.0), ("expert", 0.4), ("student", 0.3))
            ]
        )
        row = gain_kept(table, "student", {"OCR": "expert"}, resamples=400).iloc[0]
        hits += row["low"] <= 0.75 <= row["high"]
    assert hits >= 34 and len(gain_kept(table, "student", {"OCR": "expert"}, resamples=10)) == 1
    assert row["expert's gain"] == pytest.approx(0.4, abs=0.1) and row["mean"] == pytest.approx(
        row["student's gain"] / row["expert's gain"]
    )
    # nobody gained
    unsure = gain_kept(
        table.assign(OCR=rng.normal(size=len(table))), "student", {"OCR": "expert"}, resamples=200
    )
    assert unsure[["mean", "low", "high"]].isna().all(axis=None)


def test_a_gain_that_only_the_reward_sees_is_told_by_its_gold_reward(tmp_path):
    rng = np.random.default_rng(0)
    hard, one = rng.normal(20, 1, 90), [f"p{i}" for i in range(90)]
    table = pd.concat(
        [
            pd.DataFrame(
                {
                    "model": model,
                    "task": "pickscore",
                    "prompt": one,
                    "PickScore": hard + proxy + rng.normal(0, 0.1, 90),
                    "PickScore gold": hard + gold + rng.normal(0, 0.1, 90),
                }
            )
            for model, proxy, gold in (("base", 0, 0), ("honest", 1.3, 1.3), ("hacked", 2.6, -0.52))
        ]
        # on others' prompts a reward does not count
        + [
            pd.DataFrame({"model": m, "task": "ocr", "prompt": one, "OCR": 1.0})
            for m in ("base", "honest")
        ]
    )
    gains = gold_gains(table)
    found = gains.set_index(["model", "by"])
    assert set(gains["reward"]) == {"PickScore"} and (found["n"] == 90).all()
    for model, proxy, gold in (
        ("honest", 0.05, 0.05),
        ("hacked", 0.1, -0.02),
    ):  # of the full scale, 26
        assert found.loc[(model, "proxy"), "mean"] == pytest.approx(proxy, abs=0.003)
        assert found.loc[(model, "gold"), "mean"] == pytest.approx(gold, abs=0.003)
        gap = found.loc[(model, "gap")]
        assert (
            gap["mean"] == pytest.approx(proxy - gold, abs=0.004)
            and gap["low"] < gap["mean"] < gap["high"]
        )
    assert found.loc[("hacked", "gap"), "low"] > 0.1 and found.loc[("honest", "gap"), "low"] < 0.003
    gold_figure(gains, "Gains").savefig(tmp_path / "gold.png")
    # what has no gold has no gap, and a gold is no reward of its own
    assert gold_gains(table.drop(columns="PickScore gold")).empty
    assert "PickScore gold" not in set(summary(table, ["model"])["reward"])
