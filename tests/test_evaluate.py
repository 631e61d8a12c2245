"""Tables of scores, thumbnails, and an evaluation that was cut off."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch

import flowopd_lib.evaluate  # noqa: F401
from flowopd_lib import Sampler, files, load_benchmark
from flowopd_lib.files import read_thumbnail

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
    assert one.seed.nunique() == 6 and one.repeat.tolist() == [0] * 3 + [1] * 3
    pd.testing.assert_frame_equal(one.drop(columns="model"), two.drop(columns="model"))
    assert (one.Brightness[:3].values != one.Brightness[3:].values).all()
    # a sample's noise does not depend on what else is evaluated
    later = evaluate(policy, prompts[:0:-1], BRIGHTNESS, 7, Sampler(2), first_repeat=1, batch=4)
    assert later.seed.tolist() == [one.seed[5], one.seed[4]]
    np.testing.assert_allclose(later.Brightness, [one.Brightness[5], one.Brightness[4]], rtol=1e-3)


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
    assert read_thumbnail(earlier[0].parent, table["image"][0])[:4] == b"RIFF"
    # another version of the code
    monkeypatch.setattr(evaluate_module, "code_hashes", lambda names: {"sde.py": "another"})
    run("cut", prompts[:2])
    assert len(batches) == 2


def test_two_evaluations_do_not_mix_in_one_folder(policy, test_prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WAIT", 0.1)
    how = dict(sampler=Sampler(1), images=tmp_path / "images", into=tmp_path / "a.parquet")
    prompts = test_prompts["ocr"][:2]
    with files.locked(tmp_path / ".a.parquet.partial", "an evaluation"):
        with pytest.raises(files.FolderInUse, match="is in use by process"):
            evaluate(policy, prompts, BRIGHTNESS, **how)
    evaluate(policy, prompts, BRIGHTNESS, **how)
    with pytest.raises(ValueError, match="holds the images of another table, a.parquet"):
        evaluate(policy, prompts[:1], BRIGHTNESS, **how | {"into": tmp_path / "b.parquet"})


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
