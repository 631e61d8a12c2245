"""The average of two teachers' velocities, sampled."""

import pandas as pd
import pytest
import torch
from small_policy import SmallPolicy

from flowopd_lib import Prompt, Sampler
from flowopd_lib.rollout import sample
from flowopd_lib.studies.mixture import kept, sample_average


def test_an_average_lies_between_and_one_teacher_alone_is_itself():
    policy = SmallPolicy(
        3, low=torch.tensor([[0.1] * 3, [0.2] * 3]), high=torch.tensor([[0.3] * 3, [0.6] * 3])
    )
    policy.weights["middle"] = (policy.weights["low"] + policy.weights["high"]) / 2
    prompts, sampler = [Prompt("a", "pickscore")] * 4, Sampler(5)

    def drawn(**weights):
        return sample_average(policy, prompts, range(4), weights, sampler)

    assert torch.equal(drawn(low=1.0, high=0.0), sample(policy, prompts, range(4), sampler, "low"))
    middle = sample(policy, prompts, range(4), sampler, "middle")
    torch.testing.assert_close(drawn(low=0.5, high=0.5), middle)
    assert (drawn(low=0.75, high=0.25) - middle).abs().max() > 1e-3


def test_what_is_kept_is_told_in_shares_of_each_teachers_own_gain():
    scores = {"base": (10.0, 3.0), "0": (14.0, 3.2), "0.5": (13.0, 3.6), "1": (12.0, 4.0)}
    table = pd.DataFrame(
        {"model": model, "task": "pickscore", "prompt": f"{i}", "PickScore": pick + i, "DeQA": deqa + i / 10}
        for model, (pick, deqa) in scores.items()
        for i in range(12)
    )
    told = kept(table, [0.0, 0.5, 1.0]).set_index(["share", "judge"])["kept mean"]
    assert told[0.5, "PickScore"] == pytest.approx(0.75) and told[0.5, "DeQA"] == pytest.approx(0.6)
    assert told[0.0, "PickScore"] == told[1.0, "DeQA"] == 1 and told[0.0, "DeQA"] == pytest.approx(0.2)
