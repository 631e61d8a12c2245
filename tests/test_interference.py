"""Gradients of rewards, their inner products and Taylor's prediction, on a policy whose rewards are known to
agree or to fight."""

import numpy as np
import pytest
import torch
from small_policy import SmallPolicy

from flowopd_lib.objectives import GRPO, OPD, Share
from flowopd_lib.prompts import Prompt
from flowopd_lib.rollout import Sampler
from flowopd_lib.schedule import Schedule
from flowopd_lib.studies.interference import (
    ALL,
    interference,
    pull_gradients,
    reward_gradients,
    taylor_check,
    walk_gradients,
)


class Reward:
    """Pixels weighed by `of`."""

    def __init__(self, *of):
        self.of = torch.tensor(of)

    def with_gradient(self, images, prompts):
        return images[:, :2, 0, 0] @ self.of

    def __call__(self, images, prompts):
        return self.with_gradient(images, prompts).numpy()


class Policy(SmallPolicy):
    def decode(self, latents):
        return latents[:, [0, 1, 1]]

    def train_adapter(self, name):
        return [self.weights[name]] if name else []

    def adapter_parameters(self, name):
        return {"transformer_blocks.0.w": self.weights[name]}


def setting(seed=0):
    policy = Policy(2, student=torch.full((2, 2), 0.1, requires_grad=True))
    objectives = {}
    for i, (name, reward) in enumerate(
        {
            "one": Reward(1.0, 0.0),
            "same": Reward(2.0, 0.0),
            "against": Reward(-1.0, 0.0),
            "other": Reward(0.0, 1.0),
        }.items()
    ):
        schedule = Schedule({"ocr": [Prompt("x", "ocr")]}, 16, 8, seed=10 * seed + i)
        objectives[name] = GRPO(
            schedule,
            {"OCR": reward},
            {"OCR": 1.0},
            Sampler(5, "sde"),
            updates=1,
            normalise="none",
            reduction="sum",
            clip=1e9,
            beta=0.0,
            micro_batch_size=128,
        )
    return policy, objectives


def test_the_gradient_is_that_of_the_mean_reward():
    policy, objectives = setting()
    found = torch.stack(
        [
            sum(reward_gradients(policy, objectives["one"], "student", b).values())
            for b in range(120)
        ]
    ).reshape(-1, 2, 2)
    mean, error = found.mean(0), found.std(0) / len(found) ** 0.5

    def reward(nudge):
        with torch.no_grad():
            policy.weights["student"] += nudge
            value = np.mean(
                [
                    objectives["one"].collect(policy, "student", 500 + i, Share()).rewards["OCR"]
                    for i in range(10)
                ]
            )
            policy.weights["student"] -= nudge
        return value

    for i in range(2):
        for j in range(2):
            nudge = torch.zeros(2, 2)
            nudge[i, j] = 0.05
            slope = (reward(nudge) - reward(-nudge)) / 0.1
            assert abs(mean[i, j] - slope) < 4 * error[i, j] + 0.05 * abs(slope) + 0.02


def test_the_gradient_through_the_reward_is_that_of_the_score_functions_with_less_noise():
    policy, objectives = setting()
    found = {
        how: torch.stack(
            [sum(how(policy, objectives["one"], "student", b).values()) for b in range(60)]
        )
        for how in (reward_gradients, walk_gradients)
    }
    (scores, noisy), (walks, quiet) = (
        (g.mean(0), g.std(0) / len(g) ** 0.5) for g in found.values()
    )
    assert walks.abs().max() > 10 * quiet.max()
    assert (quiet < noisy / 2).all()
    assert ((scores - walks).abs() < 4 * (noisy**2 + quiet**2).sqrt()).all()


def test_cosines_of_tasks_that_agree_fight_and_ignore_each_other():
    policy, objectives = setting()
    table = interference(policy, objectives, "student", batches=12).table()
    # four noise levels and their sum
    assert set(table.block) == {ALL, "block 0"} and len(set(table.sigma)) == 5
    rows = table[(table.block == ALL) & (table.sigma == ALL)].set_index(["task", "on"])
    for on, cosine in (("same", 1.0), ("against", -1.0), ("other", 0.0)):
        row = rows.loc[("one", on)]
        width = (row.cosine_high - row.cosine_low) / 2
        assert abs(row.cosine - cosine) < 2 * width and width < 0.5
        assert abs(row.raw) <= abs(row.floor) + 0.2
    assert rows.loc[("one", "one"), "cosine"] == pytest.approx(1.0)
    assert rows.loc[("one", "same"), "inner"] == pytest.approx(
        2 * rows.loc[("one", "one"), "inner"], rel=0.4
    )


def test_taylors_prediction_is_what_a_small_step_does_and_the_step_is_taken_back():
    policy, objectives = setting()
    before = policy.weights["student"].detach().clone()
    gradients = interference(policy, objectives, "student", batches=20).gradients
    table = taylor_check(policy, objectives, "student", 0.1, gradients, images=512).set_index(
        ["task", "on"]
    )
    assert torch.equal(policy.weights["student"], before) and len(table) == 16
    assert set(table["n"]) == {512 // 8}  # prompts, for the images of one are not independent
    for pair, sign in ((("one", "same"), 1), (("one", "against"), -1), (("same", "one"), 1)):
        row = table.loc[pair]
        assert sign * row.measured > 0 and sign * row.predicted > 0
        assert row.predicted == pytest.approx(row.measured, rel=0.4)


def pulled(policy, name, estimator="pathwise", mar=0.0):
    return OPD(
        Schedule({"ocr": [Prompt("x", "ocr")]}, 16, 1, seed=3),
        {"ocr": name},
        Sampler(5, "sde"),
        estimator,
        mar=mar,
        micro_batch_size=8,
    )


def test_a_pull_is_the_way_down_the_kl_and_teachers_on_opposite_sides_fight():
    policy, nudge = (
        Policy(2, student=torch.full((2, 2), 0.1, requires_grad=True)),
        torch.tensor([[0.0, 0.0], [0.2, 0.0]]),
    )
    for name, side in (("near", 1.0), ("far", 3.0), ("behind", -1.0)):
        policy.weights[name] = policy.weights["student"].detach() + side * nudge
    found = pull_gradients(policy, pulled(policy, "near"), "student", 0)
    assert list(found) == policy.sigmas(5)[:4]  # the last step has no noise, and is not trained
    # Two chunks of images: the sum over both and all steps is the gradient of the loss itself.
    data = pulled(policy, "near").collect(policy, "student", 0, Share())
    whole = torch.autograd.grad(
        sum(pulled(policy, "near").losses(policy, "student", data, 0)),
        policy.train_adapter("student"),
    )[0]
    torch.testing.assert_close(sum(found.values()), -whole.flatten())
    assert (sum(found.values()) * nudge.flatten()).sum() > 0
    table = interference(
        policy,
        {name: pulled(policy, name) for name in ("near", "far", "behind")},
        "student",
        4,
        pull_gradients,
    ).table()
    rows = table[(table.block == ALL) & (table.sigma == ALL)].set_index(["task", "on"])
    assert rows.loc[("near", "far"), "cosine"] == pytest.approx(1.0, abs=0.01) and rows.loc[
        ("near", "behind"), "cosine"
    ] == pytest.approx(-1.0, abs=0.01)
    assert rows.loc[("near", "far"), "inner"] == pytest.approx(
        3 * rows.loc[("near", "near"), "inner"], rel=0.01
    )


@pytest.mark.parametrize("settings", [{"estimator": "paper"}, {"mar": 0.1}])
def test_only_the_pull_of_a_teacher_alone_is_measured(settings):
    policy = Policy(2, student=torch.full((2, 2), 0.1, requires_grad=True))
    with pytest.raises(ValueError, match="the pull of a teacher needs"):
        pull_gradients(policy, pulled(policy, None, **settings), "student", 0)


def test_settings_that_would_bias_are_refused():
    policy, objectives = setting()
    with pytest.raises(ValueError, match="at least three batches"):
        interference(policy, objectives, "student", batches=2)
    with pytest.raises(ValueError, match="even number"):
        taylor_check(
            policy, objectives, "student", 0.1, {name: torch.ones(5, 4) for name in objectives}
        )
    objectives["one"].beta = 0.1
    with pytest.raises(ValueError, match="gradients of the reward itself"):
        reward_gradients(policy, objectives["one"], "student", 0)
