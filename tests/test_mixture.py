"""The average of two teachers' velocities, sampled."""

import torch
from small_policy import SmallPolicy

from flowopd_lib import Prompt, Sampler
from flowopd_lib.rollout import sample
from flowopd_lib.studies.mixture import sample_average


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
