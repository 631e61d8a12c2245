"""Tables of scores, their intervals, thumbnails, and an evaluation that was cut off."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch

import flowopd_lib.evaluate  # noqa: F401
from flowopd_lib import (
    Sampler,
    diversity,
    fraction_kept,
    gold_gains,
    in_domain_scores,
    kernel_distance,
    load_benchmark,
    mean_interval,
    model_scores,
    paired_differences,
    paper_average,
    summary,
)
from flowopd_lib.thumbnails import read_thumbnail

BENCHMARK = load_benchmark()
evaluate_module = sys.modules["flowopd_lib.evaluate"]


def evaluate(*arguments, **options):
    return evaluate_module.evaluate(*arguments, show_progress=False, **options)


class Brightness:
    """A reward that costs nothing."""

    name, range = "Brightness", (0.0, 1.0)

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))


BRIGHTNESS = {"Brightness": Brightness()}


def embed(images):
    return images.flatten(1)[:, ::512].numpy()


# ---- evaluate


def test_every_reward_scores_the_prompts_it_applies_to(policy, rewards, test_prompts):
    prompts = [p for task in test_prompts.values() for p in task[:2]]
    table = evaluate(policy, prompts, rewards, seed=40, sampler=Sampler(2), batch=4)
    assert table["seed"].tolist() == list(range(40, 46))
    assert table["prompt"].tolist() == [p.text for p in prompts]
    assert table["task"].tolist() == ["geneval"] * 2 + ["ocr"] * 2 + ["pickscore"] * 2
    assert table["GenEval"].notna().tolist() == [True] * 2 + [False] * 4
    assert table["OCR"].notna().tolist() == [False] * 2 + [True] * 2 + [False] * 2
    assert table[["PickScore", "DeQA"]].notna().all(axis=None)
    again = evaluate(policy, prompts, rewards, seed=40, sampler=Sampler(2), batch=9)
    pd.testing.assert_frame_equal(table[["DeQA"]], again[["DeQA"]], rtol=1e-3)
    with pytest.raises(ValueError, match="the list of prompts is empty"):
        evaluate(policy, [], rewards)
    with pytest.raises(ValueError, match="no adapter 'ten'"):
        evaluate(policy, prompts, rewards, models={"x": "ten"})


def test_every_model_gets_the_same_noise_and_every_repeat_new_noise(policy, test_prompts):
    prompts, models = test_prompts["ocr"][:3], {"one": None, "two": None}
    table = evaluate(policy, prompts, BRIGHTNESS, 7, Sampler(2), models, repeats=2, batch=4)
    one, two = (table[table.model == name].reset_index(drop=True) for name in models)
    assert one.seed.tolist() == list(range(7, 13)) and one.repeat.tolist() == [0] * 3 + [1] * 3
    pd.testing.assert_frame_equal(one.drop(columns="model"), two.drop(columns="model"))
    assert (one.Brightness[:3].values != one.Brightness[3:].values).all()


def test_an_evaluation_that_was_cut_off_resumes_to_the_same_table_and_thumbnails(
    workspace, test_prompts, tmp_path, monkeypatch
):
    workspace.load_adapter("expert", "ocr")
    policy, prompts = workspace.policy, test_prompts["ocr"][:3] + test_prompts["geneval"][:3]
    models, sample = {"base": None, "expert": "expert"}, evaluate_module.sample
    batches = []

    def run(name, prompts=prompts):
        batches.clear()
        images, into = tmp_path / name / "images", tmp_path / name / "samples.parquet"
        how = dict(embed=embed, batch=4, images=images, into=into)
        return evaluate(policy, prompts, BRIGHTNESS, 3, Sampler(2), models, **how)

    def cut_after(n):
        def sample_or_stop(*arguments):
            if len(batches) == n:
                raise KeyboardInterrupt
            batches.append(arguments)
            return sample(*arguments)

        monkeypatch.setattr(evaluate_module, "sample", sample_or_stop)

    cut_after(100)
    whole = run("whole")
    assert len(batches) == 4
    for n in (1, 2):  # cut off twice
        cut_after(n)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
        assert not (tmp_path / "cut" / "samples.parquet").exists()
    cut_after(100)
    table = run("cut")
    assert len(batches) == 1  # 1 and 2 batches were there
    pd.testing.assert_frame_equal(table, whole, check_exact=True)
    saved = pd.read_parquet(tmp_path / "cut" / "samples.parquet")
    pd.testing.assert_frame_equal(saved, table, check_exact=True)
    files = [
        {p.name: p.read_bytes() for p in (tmp_path / name / "images").iterdir()}
        for name in ("cut", "whole")
    ]
    assert files[0] == files[1]
    assert read_thumbnail(tmp_path / "cut", table["image"][0])[:4] == b"RIFF"
    pd.testing.assert_frame_equal(run("cut"), whole, check_exact=True)
    assert not batches  # only read
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == ["images", "samples.parquet"]
    plain = evaluate(policy, prompts, BRIGHTNESS, 3, Sampler(2), models, batch=4)
    expected = whole.drop(columns=["image", "embedding"])
    pd.testing.assert_frame_equal(plain, expected, check_exact=True)
    # other weights under the name, and other prompts: the table that was there is moved
    with torch.no_grad():
        next(iter(policy.adapter_parameters("expert").values())).add_(0.1)
    assert not run("cut")["Brightness"].equals(whole["Brightness"]) and len(batches) == 4
    run("cut", prompts[:2])
    earlier = sorted((tmp_path / "cut" / "earlier").rglob("samples.parquet"))
    assert len(earlier) == 2 and pd.read_parquet(earlier[0]).equals(table)


def test_another_version_of_a_reward_is_another_table(policy, test_prompts, tmp_path):
    class Power(Brightness):
        def __init__(self, power):
            self.power = power

        def __call__(self, images, prompts):
            return super().__call__(images, prompts) ** self.power

    def run(reward):
        into = tmp_path / "samples.parquet"
        return evaluate(policy, test_prompts["ocr"][:2], {"R": reward}, 0, Sampler(1), into=into)

    first, second = run(Power(1)), run(Power(2))
    np.testing.assert_allclose(first["R"] ** 2, second["R"], rtol=1e-5)
    np.testing.assert_allclose(run(lambda images, prompts: images.mean((1, 2, 3)))["R"], first["R"])


def test_a_table_is_written_with_its_embeddings(policy, rewards, test_prompts, tmp_path):
    embedding = rewards["PickScore"].embed
    how = dict(sampler=Sampler(1), repeats=2, embed=embedding, into=tmp_path / "samples.parquet")
    table = evaluate(policy, test_prompts["ocr"][:2], BRIGHTNESS, **how)
    again = pd.read_parquet(tmp_path / "samples.parquet")
    assert np.array_equal(np.stack(again.embedding), np.stack(table.embedding))
    assert np.square(np.stack(table.embedding)).mean(1) == pytest.approx(1, rel=1e-4)
    assert 0 < diversity(table)["mean"].item() < 2


# ---- statistics


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for i in range(200):
        values = rng.random(200) < 0.6 if i % 2 else rng.normal(0.6, 1, 200)  # yes or no; a mean
        _, low, high = mean_interval(values, resamples=400, seed=i)
        hits += low <= 0.6 <= high
    assert 0.90 <= hits / 200 <= 0.99  # 95 % +- about 3 standard errors of 200 trials


def test_intervals_of_zeros_and_of_constants():
    mean, low, high = mean_interval([0] * 50)
    assert mean == low == 0 and high == pytest.approx(0.0713, abs=1e-3)  # Wilson's for 0 of 50
    assert mean_interval([4.5, 4.5, 4.5]) == (4.5, 4.5, 4.5)
    with pytest.raises(ValueError, match="at least two"):
        mean_interval([1])


def test_a_summary_counts_what_was_scored():
    table = pd.DataFrame(
        {"task": list("aabb"), "GenEval": [1.0, 0.0, np.nan, np.nan], "DeQA": [4.0, 4.0, 3.0, 5.0]}
    )
    rows = summary(table, ["task"]).set_index(["task", "reward"])
    assert rows.loc[("a", "GenEval"), "mean"] == 0.5 and rows.loc[("a", "GenEval"), "n"] == 2
    assert ("b", "GenEval") not in rows.index and rows.loc[("b", "DeQA"), "mean"] == 4


def scores(rng, prompts, gains, noise=0.3, repeats=1, task="ocr", reward="OCR"):
    """A table of models that are so much better on prompts of very different difficulty."""
    difficulty = rng.normal(0, 3, prompts)
    names = [f"p{i}" for i in range(prompts)]
    rows = [
        {"model": model, "task": task, "prompt": names, "repeat": r}
        | {reward: difficulty + gain + rng.normal(0, noise, prompts)}
        for model, gain in gains.items()
        for r in range(repeats)
    ]
    return pd.concat(map(pd.DataFrame, rows), ignore_index=True)


def test_the_paired_interval_covers_the_gain_and_is_narrower_than_an_unpaired_one():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(60):
        table = scores(rng, 60, {"old": 0.0, "new": 0.2}, repeats=2)
        row = paired_differences(table, "old").iloc[0]
        hits += row["low"] <= 0.2 <= row["high"]
    assert hits >= 52 and row["n"] == 60  # 95 % of 60 is 57, minus three standard errors
    _, low, high = mean_interval(table.query("model == 'new'").groupby("prompt").OCR.mean())
    assert row["high"] - row["low"] < (high - low) / 4
    with pytest.raises(ValueError, match="no model 'gone'"):
        paired_differences(table, "gone")


def table_of(*rows):
    """Three prompts of each task, with the same scores."""
    return pd.DataFrame(
        [
            {"model": "m", "task": task, "prompt": f"{task} {i}", **values}
            for task, values in rows
            for i in range(3)
        ]
    )


def test_the_average_is_the_papers():
    """The base and Flow-OPD of the paper's table."""
    for (geneval, ocr, deqa, pickscore), printed in (
        ((0.63, 0.59, 4.07, 21.64), 0.72),
        ((0.92, 0.94, 4.35, 23.08), 0.90),
        ((0.63, np.nan, 4.07, 21.64), None),
    ):
        table = table_of(
            ("geneval", {"GenEval": geneval}),
            ("ocr", {"OCR": ocr}),
            ("pickscore", {"DeQA": deqa, "PickScore": pickscore}),
        )
        if printed:
            assert paper_average(table)["mean"].item() == pytest.approx(printed, abs=0.006)
        else:
            with pytest.raises(ValueError, match="needs OCR on the ocr prompts"):
                paper_average(table)


def test_models_are_scored_on_the_prompts_of_each_rewards_task():
    table = table_of(
        ("geneval", {"GenEval": 1.0, "PickScore": 3.0, "DeQA": 1.0}),
        ("ocr", {"OCR": 0.5, "PickScore": 3.0, "DeQA": 1.0}),
        ("pickscore", {"PickScore": 13.0, "DeQA": 4.0}),
    )
    rows = model_scores(table).set_index("reward")
    means = {"GenEval": 1.0, "OCR": 0.5, "PickScore": 13.0, "DeQA": 4.0}
    assert rows["mean"].to_dict() == pytest.approx({**means, "Average": (1 + 0.5 + 0.8 + 0.5) / 4})
    # a second sample of a prompt is no second prompt
    twice = model_scores(pd.concat([table, table])).set_index("reward")
    assert twice["n"].equals(rows["n"]) and twice["low"].equals(rows["low"])
    assert rows.loc["PickScore", "n"] == in_domain_scores(table)["DeQA"].count() == 3


def test_the_distance_to_renders_is_small_for_renders_and_large_for_noise(rewards):
    embed, renderer, tasks = rewards["PickScore"].embed, BENCHMARK.renderer, ("ocr", "pickscore")
    images = {
        "renders": [renderer.clean_renders(t, "test", 20, seed=1) for t in tasks],
        "noise": [torch.rand(20, 3, 64, 64) for _ in tasks],
    }
    rows = [
        pd.DataFrame({"model": m, "task": t, "repeat": 0, "embedding": list(embed(batch))})
        for m, both in images.items()
        for t, batch in zip(tasks, both)
    ]
    distances = renderer.render_distance(pd.concat(rows), embed, seed=0).set_index("model")
    assert distances.loc["renders", "high"] < distances.loc["noise", "low"]
    assert (distances["n"] == 40).all()


def test_diversity_is_zero_after_a_collapse():
    rng = np.random.default_rng(0)
    means = rng.normal(size=(60, 16))

    def samples(model, spread):
        rows = [means[i] + spread * rng.normal(size=16) for i in range(60) for _ in range(3)]
        prompts = [str(i) for i in range(60) for _ in range(3)]
        columns = {"model": model, "task": "ocr", "prompt": prompts, "embedding": rows}
        return pd.DataFrame(columns)

    rows = diversity(pd.concat([samples("collapsed", 0.0), samples("varied", 0.5)]))
    collapsed, varied = rows.to_dict("records")
    assert collapsed["mean"] == pytest.approx(0, abs=1e-9) and varied["low"] > 0.05
    # two trainings that collapsed, each to images of its own, have none either
    both = [samples("collapsed", 0.0).assign(train_seed=k) for k in range(2)]
    both[1]["embedding"] = list(-np.stack(both[1]["embedding"]))
    [row] = diversity(pd.concat(both), ["model"]).to_dict("records")
    assert row["mean"] == pytest.approx(0, abs=1e-9) and row["n"] == 60
    with pytest.raises(ValueError, match="embed="):
        diversity(scores(rng, 3, {"m": 0.0}))


def test_the_kernel_distance_is_unbiased_and_sees_a_shift():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(60):
        _, low, high = kernel_distance(rng.normal(size=(80, 16)), rng.normal(size=(80, 16)))
        hits += low <= 0 <= high
    assert hits >= 52
    assert kernel_distance(rng.normal(size=(80, 16)), rng.normal(size=(80, 16)) + 0.5)[1] > 0


def test_the_fraction_of_an_experts_gain_that_a_student_keeps():
    rng, hits = np.random.default_rng(2), 0
    for _ in range(40):
        table = scores(rng, 80, {"base": 0.0, "expert": 0.4, "student": 0.3}, noise=0.2)
        row = fraction_kept(table, "student", {"OCR": "expert"}, resamples=400).iloc[0]
        hits += row["low"] <= 0.75 <= row["high"]
    assert hits >= 34
    assert row["expert's gain"] == pytest.approx(0.4, abs=0.1)
    assert row["mean"] == pytest.approx(row["student's gain"] / row["expert's gain"])
    nobody_gained = table.assign(OCR=rng.normal(size=len(table)))
    unsure = fraction_kept(nobody_gained, "student", {"OCR": "expert"}, resamples=200)
    assert unsure[["mean", "low", "high"]].isna().all(axis=None)


def test_a_gain_that_the_gold_reward_does_not_see_is_reported():
    rng = np.random.default_rng(0)
    proxy = {"base": 0.0, "honest": 1.3, "overoptimised": 2.6}  # of the full scale, 26
    gold = {"base": 0.0, "honest": 1.3, "overoptimised": -0.52}
    where = dict(noise=0.1, task="pickscore")
    table = scores(np.random.default_rng(1), 90, proxy, reward="PickScore", **where)
    other = scores(np.random.default_rng(1), 90, gold, reward="PickScore gold", **where)
    table = table.assign(**{"PickScore gold": other["PickScore gold"]})
    # on the prompts of other tasks a reward does not count
    table = pd.concat([table, scores(rng, 9, {"base": 0.0, "honest": 5.0})])
    gains = gold_gains(table)
    rows = gains.set_index(["model", "by"])
    assert set(gains["reward"]) == {"PickScore"} and (rows["n"] == 90).all()
    for model in ("honest", "overoptimised"):
        for by, gain in (("proxy", proxy), ("gold", gold)):
            assert rows.loc[(model, by), "mean"] == pytest.approx(gain[model] / 26, abs=0.003)
    gap = rows.loc[("overoptimised", "gap")]
    assert 0.1 < gap["low"] <= gap["mean"] <= gap["high"]
    assert rows.loc[("honest", "gap"), "low"] < 0.003
    assert gold_gains(table.drop(columns="PickScore gold")).empty
    assert "PickScore gold" not in set(summary(table, ["model"])["reward"])
