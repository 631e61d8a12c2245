"""The rewards on rendered images of test prompts, few of them; notebook 00 takes more."""

import pytest
import torch
import torch.nn.functional as F

from flowopd_lib import load_benchmark
from flowopd_lib.benchmarks.tiny.reward_checks import check_rewards, shuffle_patches
from flowopd_lib.stats import GOLD

BENCHMARK = load_benchmark()
REWARDS = [name + gold for name in ("GenEval", "OCR", "PickScore", "DeQA") for gold in ("", GOLD)]
REWARDS.insert(2, "GenEvalScore")


@pytest.fixture(scope="module")
def checks():
    rewards = BENCHMARK.training_rewards("cpu") | BENCHMARK.held_out_rewards("cpu")
    return check_rewards(rewards, n=120, seed=1)[0]


@pytest.mark.parametrize("reward", REWARDS)
def test_no_reward_is_below_its_target(checks, reward):
    """A reward fails if its target lies above the whole 95 % interval."""
    for row in checks[(checks["reward"] == reward) & checks["aim"].notna()].itertuples():
        assert row.high >= row.aim, f"{row.test}: {row.value:.3f}, target {row.aim}"


def test_only_the_gold_reward_rejects_a_surplus_object(checks):
    rows = checks[checks["test"] == "rejects a surplus object"].set_index("reward")
    assert rows.loc["GenEval", "high"] < 0.5 < rows.loc["GenEval" + GOLD, "low"]


def test_what_the_learned_rewards_cannot_tell_from_images_is_shown_without_an_aim(checks):
    rows = checks[checks["test"].str.startswith("prefers an image")].set_index("reward")
    learned = ["PickScore", "PickScore" + GOLD, "DeQA", "DeQA" + GOLD]
    assert list(rows.index) == learned and rows["aim"].isna().all()
    assert (rows.loc[learned[:2], "high"] < 0.5).all()  # a weakness
    assert (rows.loc[learned[2:], "value"] == 1).all()


def test_shuffled_patches_are_those_of_the_image():
    images = torch.rand(2, 3, 64, 64)
    shuffled = shuffle_patches(images)
    before, after = (F.unfold(x, 8, stride=8).sum(1) for x in (images, shuffled))
    assert torch.equal(before.sort().values, after.sort().values) and not torch.equal(before, after)


def test_every_reward_is_checked(checks):
    assert list(checks["reward"].unique()) == REWARDS and (checks["n"] == 120).all()
    assert ((checks["low"] <= checks["value"]) & (checks["value"] <= checks["high"])).all()


def test_a_constant_reward_fails_the_checks(rewards):
    class Constant:
        def __init__(self, reward):
            self.reward = reward

        def __call__(self, images, prompts):
            return self.reward(images, prompts) * 0 + 1

        def read(self, images, prompts):
            return ["AB"] * len(images)

    constant = {name: Constant(reward) for name, reward in rewards.items() if name != "DeQA"}
    rows = check_rewards({**constant, "DeQA": rewards["DeQA"]}, n=60)[0].set_index("test")
    assert rows.loc["rejects renders of a wrong caption", "high"] < 0.5
    assert rows.loc["reads clean signs exactly", "high"] < 0.5
    assert (rows[rows["reward"] == "PickScore"]["value"] == 0).all()


def test_clean_renders_are_right_for_the_prompts_of_the_files(rewards, test_prompts):
    for task, reward in (("geneval", "GenEval"), ("ocr", "OCR")):
        images = BENCHMARK.renderer.clean_renders(task, "test", 24)
        assert rewards[reward](images, test_prompts[task][:24]).mean() > 0.9
