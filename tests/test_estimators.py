"""The comparison of gradient estimators, and the loss by timestep."""

import pytest
import torch
from test_interference import SAMPLER, Policy

from flowopd_lib.data import Prompt, Schedule
from flowopd_lib.experiments.estimators import compare_estimators, estimator_gradients, loss_by_step
from flowopd_lib.losses import LOSSES, OPD, OPDConfig
from flowopd_lib.sde import kl_weight


def test_bias_and_noise_are_measured():
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(400, generator=g)
    true = {"pathwise": (1.0, 0.5), "half": (0.5, 2.0), "nothing": (0.0, 3.0)}
    gradients = {
        name: size * mean + noise * torch.randn(24, 400, generator=g)
        for name, (size, noise) in true.items()
    }
    rows = compare_estimators(gradients, gradients).set_index("estimator")
    for name, (size, noise) in true.items():
        row = rows.loc[name]
        assert abs(row["mean along pathwise"] - size) < 4 * row["se"] + 1e-9, name
        assert row["noise"] == pytest.approx(noise**2 * 400 / float(mean @ mean), rel=0.2), name
    assert rows.loc["pathwise", "mean along pathwise"] == 1
    assert 0 < rows.loc["half", "se"] < rows.loc["nothing", "se"] < 0.1


def small_opd(loss="pathwise", images=20):
    schedule = Schedule({"ocr": [Prompt("x", "ocr")]}, images)
    return OPD(schedule, OPDConfig(teachers={"ocr": "teacher"}, loss=loss, mar=0.0), SAMPLER)


def small_policy():
    weights = torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(7)) * 0.3
    return Policy(2, student=weights[0].requires_grad_(True), teacher=weights[1])


def test_estimators_share_rollouts_and_only_those_that_depend_on_actions_have_two_sides():
    objectives = {name: small_opd(name) for name in LOSSES}
    gradients = estimator_gradients(small_policy(), "student", objectives, 0)
    sides = {name: len(g) for name, g in gradients.items()}
    assert sides == {"pathwise": 1, "paper": 2, "as_coded": 2, "log_ratio": 2, "return_to_go": 1}
    pathwise, paper = gradients["pathwise"][0], sum(gradients["paper"])
    assert paper.abs().max() < 1e-3 * pathwise.abs().max() < gradients["paper"][0].abs().max()
    coded = sum(gradients["as_coded"]) / 2
    torch.testing.assert_close(coded, pathwise, rtol=1e-3, atol=1e-3 * pathwise.abs().max().item())


def test_the_loss_of_each_step_is_shared_out_by_weighting():
    policy = small_policy()
    table = loss_by_step(policy, small_opd(images=200), "student")
    grid = policy.sigmas(5)
    assert table["step"].tolist() == [0, 1, 2, 3] and table["sigma"].tolist() == grid[:4]
    distance = table["kl"] / [float(kl_weight(a, b)) for a, b in zip(grid[:4], grid[1:5])]
    for name in ("kl", "ode", "uniform_v"):
        assert table[f"share {name}"].sum() == pytest.approx(1)
    assert table["share kl"].to_numpy() == pytest.approx(
        (table["kl"] / table["kl"].sum()).to_numpy()
    )
    share = (distance / distance.sum()).to_numpy()
    assert table["share uniform_v"].to_numpy() == pytest.approx(share, rel=1e-4)
