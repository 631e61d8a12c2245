"""Arms at equal seconds: the studies' files, and what is told of their trainings."""

import numpy as np
import pandas as pd
import pytest
import torch
from small_policy import SmallPolicy

from flowopd_lib import Prompt, Sampler, sample
from flowopd_lib.files import RUNS
from flowopd_lib.jobs.recipes import build
from flowopd_lib.studies import arms as studies
from flowopd_lib.studies.steps import picture_distance, teacher_pictures

STUDIES = sorted((RUNS / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=[p.stem for p in STUDIES])
def test_every_arm_of_every_study_can_be_trained(path):
    arms = studies.load_study(path)
    policy = build(next(iter(arms.values())))[0]
    objectives = {arm: build(recipe, policy=policy)[1] for arm, recipe in arms.items()}
    # no two are the same
    assert len({repr(recipe) for recipe in arms.values()}) == len(arms) == len(objectives)


@pytest.mark.parametrize(
    "text, message",
    [
        ("recipe: student_opd", "is no study"),
        ("recipe: student_opd\narms: {a: {}, b: {opd: {steps: 1}}}\nseconds: 3", "has no 'seconds'"),
        ("recipe: student_odp\narms: {a: {}, b: {}}", "did you mean 'student_opd'"),
        ("recipe: student_opd\narms: {a: {}, b: {odp: {steps: 1}}}", "did you mean 'opd'"),
    ],
)
def test_a_study_that_is_none_is_named(text, message, tmp_path):
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises((ValueError, OSError), match=message):
        studies.load_study(tmp_path / "study.yaml")


def test_what_is_told_of_two_arms():
    recipe = {"schedule": {"tasks": ["ocr"]}, "opd": {"teachers": {"ocr": "ocr"}}}
    # two pictures of each
    rng, prompts = np.random.default_rng(0), [f"sign {i // 2}" for i in range(40)]

    def table(model, score, colour):
        pixels = [np.full(12, colour, np.float16)] * 40
        return pd.DataFrame(
            {
                "task": "ocr",
                "tag": "ocr",
                "prompt": prompts,
                "repeat": [0, 1] * 20,
                "OCR": score + rng.normal(0, 0.01, 40),
                "model": model,
                "embedding": pixels,
            }
        )

    reference = pd.concat([table("base", 0.2, 0.0), table("start", 0.4, 0.2), table("ocr", 0.8, 1.0)])
    tables = {
        ("a", 0): table("x", 0.5, 0.5),
        ("a", 1): table("x", 0.5, 0.5),
        ("b", 0): table("x", 0.65, 0.75),
        ("b", 1): table("x", 0.75, 0.75),
    }
    told = studies.tell(tables, {"a": recipe, "b": recipe}, reference).set_index(["arm", "what"])
    assert told.loc[("b", "OCR"), "mean"] == pytest.approx(0.7, abs=0.01) and np.allclose(
        told.loc[("b", "OCR"), "by seed"], [0.65, 0.75], atol=0.01
    )
    row = told.loc[("b", "OCR minus that of a")]
    assert row["low"] < 0.2 < row["high"] and row["high"] - row["low"] < 0.02 and row["n"] == 20
    assert told.loc[("b", "OCR kept"), "mean"] == pytest.approx(0.5 / 0.6, abs=0.02)
    assert told.loc[("a", "distance"), "mean"] == pytest.approx(0.5, abs=0.01) and told.loc[
        ("b", "distance minus that of a"), "mean"
    ] == pytest.approx(-0.25, abs=0.01)


def test_when_the_gains_are_kept_to_nine_tenths_is_told():
    def table(model, task, **scores):
        return pd.DataFrame({"model": model, "task": task, "tag": task, "prompt": ["x", "y"], **scores})

    reference = pd.concat(
        [
            table("base", "ocr", OCR=0.2),
            table("ocr", "ocr", OCR=0.7),
            table("base", "geneval", GenEval=0.0),
            table("geneval", "geneval", GenEval=1.0),
        ]
    )
    looks = [
        {"judge": judge, "mean": mean, "iteration": i}
        for i, ocr, geneval in ((0, 0.2, 0.5), (4, 0.65, 0.88), (8, 0.65, 0.9), (12, 0.7, 1.0))
        for judge, mean in (("OCR", ocr), ("GenEval", geneval), ("Average", 0.0))
    ]
    experts = {"GenEval": "geneval", "OCR": "ocr", "DeQA": "deqa"}  # there are no scores of DeQA's
    assert studies.reached(looks, reference, 0.9, experts) == 8 and np.isnan(
        studies.reached(looks[:6], reference, 0.9, experts)
    )


def test_pictures_are_held_against_those_of_each_prompts_own_teacher_from_the_same_noise():
    weights = {
        name: torch.randn(2, 2, generator=torch.Generator().manual_seed(i))
        for i, name in enumerate(("a", "b", "student"))
    }
    policy, prompts = (
        SmallPolicy(2, **weights),
        [Prompt("x", "ocr"), Prompt("y", "geneval"), Prompt("z", "ocr")],
    )
    theirs = teacher_pictures(policy, prompts, {"ocr": "a", "geneval": "b"}, Sampler(4), 7)
    away = picture_distance(policy, "student", prompts, theirs, Sampler(4), 7)
    pictures = {name: sample(policy, prompts, [7, 8, 9], Sampler(4), name) for name in ("a", "b", "student")}
    for i, name in enumerate("aba"):
        assert (
            away[i]
            == pytest.approx(
                (pictures["student"][i] - pictures[name][i]).square().mean().sqrt().item(), rel=1e-5
            )
            and away[i] > 0
        )
    assert (
        picture_distance(
            policy,
            "a",
            prompts,
            teacher_pictures(policy, prompts, {"ocr": "a", "geneval": "a"}, Sampler(4), 7),
            Sampler(4),
            7,
        ).max()
        < 1e-6
    )
