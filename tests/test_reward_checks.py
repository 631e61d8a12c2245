"""The rewards' held-out figures, on small samples; the notebook measures them on large ones."""

import pytest

from flowopd_lib import load_benchmark
from flowopd_lib.benchmarks.tiny.reward_checks import check_rewards
from flowopd_lib.stats import GOLD

BENCHMARK = load_benchmark()


REWARDS = [name + gold for name in ("GenEval", "OCR", "PickScore", "DeQA") for gold in ("", GOLD)]


@pytest.fixture(scope="module")
def tests(rewards):
    return check_rewards(rewards | BENCHMARK.held_out_rewards("cpu"), n=120, seed=1)[0]


@pytest.mark.parametrize("reward", REWARDS)
def test_no_reward_is_below_its_aim(tests, reward):
    """A reward fails if chance does not explain it: if its aim lies above the whole 95 % interval."""
    for _, row in tests[tests["reward"] == reward].iterrows():
        assert row["high"] >= row["aim"], (
            f"{row['reward']} {row['test']}: {row['value']:.3f}, aim {row['aim']}"
        )


def test_every_reward_is_rewardd(tests):
    assert list(tests["reward"].unique()) == REWARDS
    assert (
        (tests["n"] == 120).all()
        and (tests["low"] <= tests["value"]).all()
        and (tests["value"] <= tests["high"]).all()
    )


def test_a_blind_reward_would_be_found_out(rewards):
    """The same tests reject rewards that always say the same."""

    class Blind:
        def __init__(self, reward):
            self.reward = reward

        def __call__(self, images, prompts):
            return self.reward(images, prompts) * 0 + 1

        def read(self, images, prompts):
            return ["AB"] * len(images)

    rows = check_rewards(
        {name: Blind(reward) for name, reward in rewards.items() if name != "DeQA"}
        | {"DeQA": rewards["DeQA"]},
        n=60,
    )[0].set_index("test")
    assert rows.loc["rejects renders of a wrong caption", "high"] < 0.5
    assert rows.loc["reads clean signs exactly", "high"] < 0.5
    assert rows[rows["reward"] == "PickScore"]["value"].item() == 0


def test_clean_renders_are_right_for_the_prompts_of_the_files(rewards, test_prompts):
    for task, reward in (("geneval", "GenEval"), ("ocr", "OCR")):
        pictures = BENCHMARK.truth.clean_renders(task, "test", 24)
        assert rewards[reward](pictures, test_prompts[task][:24]).mean() > 0.9
    with pytest.raises(ValueError, match="300 prompts a task, not 301"):
        BENCHMARK.truth.clean_renders("ocr", "test", 301)
