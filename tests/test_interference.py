"""Interference: task vectors, gradients of rewards and of distillation, on cases whose answer is
known."""

import pandas as pd
import pytest
import torch
from small_policy import SmallPolicy
from test_multi_reward import RecordingLab

from flowopd_lib.data import Prompt, Schedule
from flowopd_lib.experiments import interference
from flowopd_lib.experiments.gradients import loss_gradient
from flowopd_lib.lab.workspace import Workspace
from flowopd_lib.losses import OPD, OPDConfig, Shard
from flowopd_lib.rollout import Sampler, sample

SAMPLER = Sampler(5, "sde")


class PixelReward:
    def __init__(self, *weights, scale=1.0):
        self.weights, self.scale = torch.tensor(weights), scale

    def with_gradient(self, images, prompts):
        return images[:, :2, 0, 0] @ self.weights


class Policy(SmallPolicy):
    def decode(self, latents):
        return latents[:, [0, 1, 1]]

    def train_adapter(self, name):
        return [self.weights[name]] if name else []


def small_policy():
    return Policy(2, student=torch.full((2, 2), 0.1, requires_grad=True))


def schedule(prompts=4, images=8, seed=0):
    return Schedule({"ocr": [Prompt("x", "ocr")]}, prompts, images, seed=seed)


# --- gradients


def test_the_reward_gradient_is_the_derivative_of_the_mean_reward_at_fixed_noise():
    policy, reward, batch = small_policy(), PixelReward(1.0, 0.5, scale=2.0), schedule().draw(3)
    arguments = schedule(), reward, SAMPLER, "student", 3
    gradient = interference.reward_gradient(policy, *arguments).view(2, 2)

    def mean_reward(i, j, step):
        with torch.no_grad():
            policy.weights["student"][i, j] += step
            images = sample(policy, batch.prompts, batch.seeds, SAMPLER, "student")
            policy.weights["student"][i, j] -= step
            return reward.with_gradient(images, batch.prompts).mean().item() / 2

    for i in range(2):
        for j in range(2):
            slope = (mean_reward(i, j, 0.02) - mean_reward(i, j, -0.02)) / 0.04
            assert gradient[i, j].item() == pytest.approx(slope, rel=5e-3, abs=1e-3)


def test_a_reward_gradient_of_a_score_that_is_not_a_number_is_an_error():
    arguments = schedule(), PixelReward(1.0, float("nan")), SAMPLER, "student", 0
    with pytest.raises(ValueError, match="PixelReward gave nan for 'x'"):
        interference.reward_gradient(small_policy(), *arguments)


def test_cosines_of_rewards_that_agree_conflict_and_are_independent():
    policy, gradients = small_policy(), {}
    weights = {"one": (1.0, 0.0), "same": (2.0, 0.0), "against": (-1.0, 0.0), "other": (0.0, 1.0)}
    for seed, (name, w) in enumerate(weights.items()):
        how = schedule(seed=seed), PixelReward(*w), SAMPLER, "student"
        gradients[name] = torch.stack(
            [interference.reward_gradient(policy, *how, b) for b in range(12)]
        )
    rows = interference.gradient_table(gradients).set_index(["task", "on"])
    assert len(rows) == 16 and (rows["batches"] == 12).all()
    for on, cosine in (("same", 1.0), ("against", -1.0), ("other", 0.0)):
        row = rows.loc[("one", on)]
        width = (row.cosine_high - row.cosine_low) / 2
        assert abs(row.cosine - cosine) < 2 * width + 1e-6 and width < 0.5
    assert rows.loc[("one", "one"), "cosine"] == pytest.approx(1.0)
    double = 2 * rows.loc[("one", "one"), "inner"]
    assert rows.loc[("one", "same"), "inner"] == pytest.approx(double, rel=0.1)


def test_inner_products_are_unbiased_and_covered_where_single_batches_are_mostly_noise():
    g, hits, rows = torch.Generator().manual_seed(0), 0, []
    a, b = torch.randn(2, 300, generator=g)
    b = 0.5 * a + b  # cosine 0.45
    for _ in range(40):
        noisy = {n: m + 4 * torch.randn(12, 300, generator=g) for n, m in (("a", a), ("b", b))}
        rows.append(interference.gradient_table(noisy).set_index(["task", "on"]).loc[("a", "b")])
        hits += rows[-1]["inner_low"] <= a @ b <= rows[-1]["inner_high"]
    mean = pd.DataFrame(rows).mean()
    assert hits >= 34  # 95 % of 40 is 38, minus three standard errors
    assert mean["inner"] == pytest.approx((a @ b).item(), rel=0.1)
    assert mean["cosine"] == pytest.approx(torch.cosine_similarity(a, b, 0).item(), abs=0.05)
    noise = {"a": torch.randn(6, 9, generator=g) * 1e-3, "b": torch.zeros(6, 9)}
    assert interference.gradient_table(noise)[["cosine_low", "cosine_high"]].isna().any(axis=None)


def test_distillation_towards_teachers_on_opposite_sides_conflicts():
    policy, nudge = small_policy(), torch.tensor([[0.0, 0.0], [0.2, 0.0]])
    gradients = {}
    for name, side in (("near", 1.0), ("far", 3.0), ("behind", -1.0)):
        policy.weights[name] = policy.weights["student"].detach() + side * nudge
        config = OPDConfig(teachers={"ocr": name}, mar=0.0, micro_batch_size=8)
        objective = OPD(schedule(16, 1, seed=3), config, SAMPLER)
        batches = [objective.collect(policy, "student", b, Shard())[0] for b in range(4)]
        rows = [loss_gradient(policy, objective, "student", data) for data in batches]
        gradients[name] = torch.stack(rows)
        # two micro-batches: the sum of their gradients is that of the whole loss
        sum(loss for loss, _ in objective.losses(policy, "student", batches[0], 0)).backward()
        torch.testing.assert_close(rows[0], policy.weights["student"].grad.flatten())
        policy.weights["student"].grad = None
        assert -side * (rows[0] @ nudge.flatten()) > 0
    rows = interference.gradient_table(gradients).set_index(["task", "on"])
    assert rows.loc[("near", "far"), "cosine"] == pytest.approx(1.0, abs=0.01)
    assert rows.loc[("near", "behind"), "cosine"] == pytest.approx(-1.0, abs=0.01)
    triple = 3 * rows.loc[("near", "near"), "inner"]
    assert rows.loc[("near", "far"), "inner"] == pytest.approx(triple, rel=0.01)


# --- task vectors


def test_a_step_along_an_expert_is_that_fraction_of_its_task_vector(benchmark, policy):
    lab, workspace = RecordingLab(benchmark), Workspace(benchmark, policy=policy)
    models = interference.evaluate_task_vectors(lab, [-0.5, 0.25], n=3)
    assert len(models) == 2 + 2 * 4 * 2 and models["base"] is None
    assert {"merged", "ocr -0.5", "ocr +0.25", "merged ocr -0.5"} <= set(models)
    assert all("." not in name and " " not in name for name in lab.sources)
    assert set(lab.sources) == set(models.values()) - {None}
    names = [models[m] for m in ("ocr -0.5", "ocr +0.25", "merged ocr -0.5")]
    workspace.load_adapters([*benchmark.experts, *names], lab.sources)
    back, forth, merged = (policy.adapter(name) for name in names)
    experts = [policy.adapter(name) for name in benchmark.experts]
    for path in back.a:
        delta = policy.adapter("ocr").delta(path)
        torch.testing.assert_close(back.delta(path), -0.5 * delta)
        torch.testing.assert_close(forth.delta(path), 0.25 * delta)
        average = sum(expert.delta(path) for expert in experts) / 4
        torch.testing.assert_close(merged.delta(path), average - 0.5 * delta)
    policy.remove_adapters()


def test_score_changes_are_paired_and_in_full_scales():
    domains = (("OCR", "ocr", 1.0), ("DeQA", "pickscore", 5.0))
    gains = {"base": 0.0, "ocr +0.5": 0.1, "ocr -1": -0.3, "merged ocr +0.5": 9.0}
    rows = [
        {"model": model, "task": task, "prompt": f"{task} {i}", reward: i + gain * full}
        for model, gain in gains.items()
        for reward, task, full in domains
        for i in range(5)
    ]
    changes = interference.score_changes(pd.DataFrame(rows), domains, ["ocr"], [0.5, -1.0])
    assert len(changes) == 4 and set(changes["n"]) == {5}
    for row in changes.itertuples():
        assert (row.mean, row.low, row.high) == pytest.approx((gains[f"ocr {row.size:+g}"],) * 3)


def test_first_iterations_differ_in_prompts_and_noise_and_start_from_one_adapter(benchmark):
    lab = RecordingLab(benchmark)
    models = interference.train_first_iterations(lab, 5, 3, 8, 6, seed=7)
    assert models["ocr +1#2"] == "first_ocr_2" and len(models) == len(lab.recipes) == 12
    recipes = [lab.recipes[models[f"ocr +1#{k}"]] for k in range(3)]
    assert [r["seed"] for r in recipes] == [8, 9, 10]
    assert {r["student"]["seed"] for r in recipes} == {7}
    assert {r["train"]["iterations"] for r in recipes} == {5}
