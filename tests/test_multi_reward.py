"""The variants of training on several rewards, and one training in stages."""

from pathlib import Path

import pandas as pd
import pytest

from flowopd_lib.config import validate
from flowopd_lib.experiments import multi_reward
from flowopd_lib.lab import Recipe, Training, build
from flowopd_lib.lab.recipe import build_objective
from flowopd_lib.lab.workspace import Workspace

SIZE = (8, 4, 3, 0, 1e-3)  # iterations, prompts, images, seed, learning rate


def variants(benchmark):
    return multi_reward.variant_recipes(benchmark, *SIZE)


def test_the_variants_are_the_papers(benchmark):
    recipes = variants(benchmark)
    names = ["+GenEval", "+OCR", "+PickScore", "+DeQA", "Mix 3:1:1", "Mix 3:1:1, GDPO"]
    assert list(recipes) == names and multi_reward.mix_name(benchmark) == "Mix 3:1:1"
    assert recipes["+OCR"]["schedule"]["tasks"] == ["geneval", "ocr"]
    assert recipes["+PickScore"]["grpo"]["reward_weights"]["pickscore"] == {"PickScore": 1.0}
    assert recipes["+DeQA"]["grpo"]["reward_weights"]["ocr"] == {"OCR": 0.8, "DeQA": 0.2}
    assert recipes["Mix 3:1:1, GDPO"]["grpo"]["normalise"] == "gdpo"
    assert recipes["Mix 3:1:1"]["schedule"]["alternate"]
    assert "alternate" not in recipes["+DeQA"]["schedule"]


def test_single_rewards_cost_as_much_as_one_variant_together(benchmark):
    recipes = multi_reward.single_reward_recipes(benchmark, *SIZE)
    assert list(recipes) == list(benchmark.experts)
    assert sum(r["train"]["iterations"] for r in recipes.values()) == 8
    weights = {n: r["grpo"]["reward_weights"] for n, r in recipes.items()}
    assert weights["ocr"] == {"ocr": {"OCR": 1.0}}
    assert weights["deqa"] == {"pickscore": {"DeQA": 0.4, "PickScore": 0.6}}


def test_every_recipe_can_be_built(benchmark):
    singles = multi_reward.single_reward_recipes(benchmark, *SIZE)
    for recipe in (variants(benchmark) | singles).values():
        objective = build_objective(validate(Recipe, recipe), benchmark, "cpu")
        assert objective.schedule.prompts_per_batch == 4


def test_a_stage_continues_from_an_adapter_with_new_prompts_and_noise(benchmark, policy):
    whole = {**variants(benchmark)["Mix 3:1:1"], "seed": 1}
    stage = multi_reward.continue_recipe(whole, str(benchmark.adapter("ocr")), 6)
    workspace = Workspace(benchmark, policy=policy)
    objective, train = build(validate(Recipe, stage), workspace, "stage")
    assert train.iterations == 2 and train.lr == whole["train"]["lr"] and train.warmup
    workspace.load_adapter("ocr")
    assert policy.adapter("stage").sha256 == policy.adapter("ocr").sha256
    first = build_objective(validate(Recipe, whole), benchmark, "cpu").schedule
    drawn = [{s for i in range(8) for s in b.draw(i).seeds} for b in (first, objective.schedule)]
    assert not drawn[0] & drawn[1]
    policy.remove_adapters()


class RecordingLab:
    """Trains and evaluates nothing."""

    def __init__(self, benchmark):
        self.benchmark, self.sources, self.recipes, self.calls = benchmark, {}, {}, []

    def train(self, name, recipe, continue_from=""):
        self.recipes[name], iterations = recipe, recipe["train"]["iterations"]
        self.calls.append((name, iterations, recipe["student"].get("load"), continue_from))
        metrics = pd.DataFrame({"seconds": [iterations]})
        return Training(name, Path(name), metrics, pd.DataFrame())

    def evaluate(self, models, **how):
        return models


def test_stages_are_trained_one_after_the_other_and_their_seconds_count_on(benchmark):
    lab, recipe = RecordingLab(benchmark), variants(benchmark)["Mix 3:1:1"]
    budgets = {"twice": 20, "total": 12}
    trainings = multi_reward.train_in_stages(lab, "mix", recipe, budgets, "variant4")
    adapter = trainings["total"].adapter
    assert lab.calls == [("mix_total", 12, None, "variant4"), ("mix_twice", 8, adapter, "")]
    assert [trainings[name].seconds for name in budgets] == [20, 12]
    assert multi_reward.train_in_stages(lab, "mix", recipe, {}) == {}
    with pytest.raises(ValueError, match="has one number of iterations twice, .*'again': 4"):
        multi_reward.train_in_stages(lab, "mix", recipe, {"once": 4, "again": 4})
