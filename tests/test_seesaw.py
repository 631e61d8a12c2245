"""The variants of the seesaw, and the rule that ends a training."""

import pandas as pd
import pytest
import torch

from flowopd_lib.jobs.recipes import build
from flowopd_lib.jobs.site import Site
from flowopd_lib.studies.seesaw import Plateau, alone, mix_of, rewards_of, variants_of
from flowopd_lib.studies.stages import go_on, stages_of

SIZE = (8, 4, 3, 0, 1e-3)  # iterations, prompts, images, seed, rate


def looks(values: dict[str, list[float]], every: int = 2) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"iteration": every * i, "reward": reward, "mean": mean}
            for reward, means in values.items()
            for i, mean in enumerate(means)
        ]
    )


def test_a_training_stands_still_when_its_own_scores_have_not_risen(benchmark):
    rule = Plateau(2, 20, patience=2, rise=0.01)
    rising = [0.1, 0.2, 0.3, 0.4]
    assert not rule.reached(looks({"GenEval": rising}), ["GenEval"], benchmark.home)
    assert not rule.reached(looks({"GenEval": [*rising, 0.405]}), ["GenEval"], benchmark.home)
    assert rule.reached(looks({"GenEval": [*rising, 0.405, 0.409]}), ["GenEval"], benchmark.home)
    # a rise too small for a look, but not for two of them
    assert not rule.reached(
        looks({"GenEval": [*rising, 0.406, 0.412]}), ["GenEval"], benchmark.home
    )
    both = looks({"GenEval": [*rising, 0.4, 0.4], "PickScore": [10, 10, 10, 10, 11, 12]})
    assert rule.reached(both, ["GenEval"], benchmark.home)
    assert not rule.reached(both, ["GenEval", "PickScore"], benchmark.home)  # 1 / 26 / 2 a look
    with pytest.raises(
        ValueError,
        match="patience of 3 looks, one every 5 iterations, ends no training of at most 15",
    ):
        Plateau(5, 15, patience=3)


def test_the_arms_are_the_papers(benchmark, policy):
    variants = variants_of(benchmark, *SIZE)
    assert list(variants) == [
        "+GenEval",
        "+OCR",
        "+PickScore",
        "+DeQA",
        "Mix 3:1:1",
        "Mix 3:1:1, GDPO",
    ]
    assert mix_of(benchmark) == "Mix 3:1:1"
    assert variants["+OCR"]["schedule"]["tasks"] == ["geneval", "ocr"]
    assert variants["+PickScore"]["grpo"]["reward_weights"]["pickscore"] == {"PickScore": 1.0}
    assert variants["+DeQA"]["grpo"]["reward_weights"]["ocr"] == {"OCR": 0.8, "DeQA": 0.2}
    assert rewards_of(variants["+OCR"], benchmark) == ["GenEval", "OCR"]
    assert rewards_of(variants["Mix 3:1:1"], benchmark) == ["GenEval", "OCR", "PickScore", "DeQA"]
    partial = {
        "schedule": {"tasks": ["geneval"]},
        "grpo": {"reward_weights": {"geneval": {"GenEvalScore": 1.0}}},
    }
    assert rewards_of(partial, benchmark) == ["GenEval"]  # what pays is not reported
    flat = {"schedule": {"tasks": ["ocr"]}, "grpo": {"reward_weights": {"DeQA": 0.2, "OCR": 0.8}}}
    assert rewards_of(flat, benchmark) == ["OCR", "DeQA"]
    single = alone(benchmark, *SIZE)
    assert list(single) == list(benchmark.experts) and {
        r["train"]["iterations"] for r in single.values()
    } == {2}
    assert single["deqa"]["grpo"]["reward_weights"] == {"pickscore": {"DeQA": 1.0}}
    for recipe in (*variants.values(), *single.values()):  # each is one that can be trained
        _, objective, config = build(recipe, site=Site(benchmark, policy=policy), name="variant")
        assert objective.schedule.size == 4 and config.iterations in (8, 2)
        policy.remove_adapters()


def test_a_stage_does_what_is_left_from_the_adapter_of_the_one_before(benchmark):
    assert stages_of({"twice": 8, "once": 4, "more": 6}) == [
        ("once", 4, "", 0),
        ("more", 6, "once", 4),
        ("twice", 8, "more", 6),
    ]
    assert stages_of({}) == []
    with pytest.raises(
        ValueError, match="budgets gives once and again the same 4 iterations, and each goes"
    ):
        stages_of({"once": 4, "again": 4})
    whole = variants_of(benchmark, *SIZE)["Mix 3:1:1"]
    adapter = str(benchmark.adapter("ocr"))
    stage = go_on({**whole, "seed": 1}, adapter, 6)
    site = Site(benchmark)
    policy, objective, config = build(stage, site=site, name="stage")
    site.adapters(["ocr"], {})
    assert config.iterations == 2 and config.lr == whole["train"]["lr"] and config.warmup
    assert all(
        torch.equal(w, policy.adapter_parameters("ocr")[name])
        for name, w in policy.adapter_parameters("stage").items()
    )
    begun = build({**whole, "seed": 1}, site=site, name="whole")[1].schedule
    drawn = [{s for i in range(8) for s in b.draw(i).seeds} for b in (begun, objective.schedule)]
    assert not drawn[0] & drawn[1]
