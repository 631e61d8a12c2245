"""The benchmark compares like with like."""

import torch

from flowopd_lib.bench.speed import (
    MAR,
    SAMPLER,
    TASKS,
    TEACHERS,
    public_update,
    setting,
    whole_copy,
)
from flowopd_lib.objectives import OPD, Share


class Kept:
    """In an optimizer's place: keeps the gradients."""

    def __init__(self, parameters):
        self.parameters = parameters

    def step(self):
        self.gradients = [p.grad.clone() for p in self.parameters]

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None


def test_the_public_pattern_makes_the_same_update_as_ours(rewards):
    policy, schedule = setting("", "cpu", torch.float32, 6, (*TASKS, "deqa"))
    ours, theirs = (Kept(policy.train_adapter("student")) for _ in range(2))
    objective = OPD(schedule, TEACHERS, SAMPLER, mar=MAR, anchor="deqa")
    for loss in objective.losses(
        policy, "student", objective.collect(policy, "student", 0, Share()), 0
    ):
        loss.backward()
    ours.step(), ours.zero_grad()
    copies = {name: whole_copy("", "cpu", torch.float32, name) for name in (*TASKS, "deqa")}
    public_update(policy, copies, schedule, rewards, theirs)(0)
    for a, b in zip(ours.gradients, theirs.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()) + 1e-7)
