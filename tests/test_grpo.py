"""GRPO's advantages, losses and rollouts, windows of noise, schedules, supervised fine-tuning."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_policy import SmallPolicy

from flowopd_lib.config import validate
from flowopd_lib.data import Batch, Prompt, Schedule
from flowopd_lib.lab import build, grpo_mix
from flowopd_lib.lab.recipe import Recipe
from flowopd_lib.losses import GRPO, OPD, SFT, GRPOConfig, OPDConfig, SFTConfig, Shard, advantages
from flowopd_lib.rollout import Sampler, generator, trajectory
from flowopd_lib.sde import log_prob

pytestmark = pytest.mark.fast

TASKS = {
    task: [Prompt(f"{task} {i}", task) for i in range(7)]
    for task in ("geneval", "ocr", "pickscore")
}
OCR = {"ocr": TASKS["ocr"]}


class Brightness:
    """A reward of the small policy's images."""

    name, range = "OCR", (-np.inf, np.inf)

    def __call__(self, images, prompts):
        return images[:, 0, 0, 0].numpy()


class Constant:
    def __init__(self, value, scale=1.0):
        self.value, self.scale = value, scale

    def __call__(self, images, prompts):
        return np.full(len(prompts), self.value, np.float32)


def grpo(prompts=8, images=6, sampler=Sampler(5, "sde"), seed=0, **config):
    config = {"reward_weights": {"OCR": 1.0}, "micro_batch_size": 12, "beta": 0.0, **config}
    schedule = Schedule(OCR, prompts, images, seed=seed)
    return GRPO(schedule, {"OCR": Brightness()}, validate(GRPOConfig, config), sampler)


def student(value=0.0, size=2, **adapters):
    weights = torch.full((2, size), value, requires_grad=True)
    return SmallPolicy(size, student=weights, **adapters)


def collect(objective, policy, iteration=0, shard=Shard()):
    return objective.collect(policy, "student", iteration, shard)[0]


def gradient(objective, policy, data=None):
    data = collect(objective, policy) if data is None else data
    total = sum(loss for loss, _ in objective.losses(policy, "student", data, 0))
    return torch.autograd.grad(total, policy.weights["student"])[0]


def optimize(objective, policy, iterations):
    """(metrics of each collection, metrics of each last loss)"""
    rows = []
    optimizer = torch.optim.Adam([policy.weights["student"]], 0.05)
    for i in range(iterations):
        data, metrics = objective.collect(policy, "student", i, Shard())
        for update in range(objective.updates):
            for loss, terms in objective.losses(policy, "student", data, update):
                loss.backward()
                metrics |= {name: value.mean().item() for name, value in terms.items()}
            optimizer.step()
            optimizer.zero_grad()
        rows.append(metrics)
    return rows


# ---- advantages and rewards


def test_advantages_by_hand():
    rewards, weights = torch.tensor([[0.0], [1.0], [1.0], [1.0]]), torch.ones(4, 1)  # two prompts
    std = rewards.std(correction=0).item()
    by_hand = {
        "batch": torch.tensor([-0.5, 0.5, 0, 0]) / (std + 1e-4),
        "group": torch.tensor([-1.0, 1.0, 0.0, 0.0]),
    }
    for normalise, expected in by_hand.items():
        values = advantages(rewards, weights, 2, normalise)
        torch.testing.assert_close(values, expected, atol=1e-3, rtol=0)
    # a reward that does not vary gives no advantage, and none exceeds 5
    assert not advantages(torch.ones(6, 1), torch.ones(6, 1), 3).any()
    outlier = torch.eye(1, 100).T
    assert advantages(outlier, torch.ones(100, 1), 100).max() == 5


def test_gdpo_weighs_rewards_of_any_size_alike():
    rewards = torch.tensor([[0.0, 0.0], [0.0, 100.0], [1.0, 0.0], [1.0, 100.0]])
    summed, gdpo = (advantages(rewards, torch.ones(4, 2), 4, how) for how in ("batch", "gdpo"))
    assert summed[1] > 0 > summed[2]  # the large reward decides
    assert gdpo[1:3].tolist() == pytest.approx([0, 0], abs=1e-2)  # here each counts once


def test_a_reward_is_scaled_weighed_by_task_and_left_out_where_it_has_no_weight():
    schedule = Schedule({t: TASKS[t] for t in ("geneval", "ocr")}, 4, 2)
    rewards = {"GenEval": Constant(1.0), "OCR": Constant(0.5), "DeQA": Constant(4.0, 5.0)}
    weights = {"geneval": {"GenEval": 0.8, "DeQA": 0.2}, "ocr": {"OCR": 1.0}}
    objective = GRPO(schedule, rewards, GRPOConfig(reward_weights=weights), Sampler(5, "sde"))
    batch = schedule.draw(0)
    values, of_row, means = objective.score(torch.zeros(len(batch), 3, 1, 1), batch)
    for total, p in zip((values * of_row).sum(1), batch.prompts):
        assert total == pytest.approx(0.8 + 0.2 * 4 / 5 if p.task == "geneval" else 0.5)
    assert means == {"DeQA": 4.0, "GenEval": 1.0, "OCR": 0.5}


# ---- the loss


# CPS adds so much noise to two numbers that one training says little: more images, and what four
# trainings have in common.
@pytest.mark.parametrize("kind, images", [("sde", 6), ("cps", 24)])
@pytest.mark.parametrize("reduction, clip", [("mean", 1e-4), ("sum", 0.2)])
def test_grpo_increases_the_reward(kind, images, reduction, clip):
    gains, weights = [], []
    for seed in range(4):
        how = dict(reduction=reduction, clip=clip, micro_batch_size=4 * images, seed=seed)
        objective, policy = grpo(images=images, sampler=Sampler(5, kind), **how), student()
        before = [objective.collect(policy, "student", 100 + i, Shard())[1] for i in range(10)]
        after = optimize(objective, policy, 60)[-10:]
        gains.append(np.mean([m["OCR"] for m in after]) - np.mean([m["OCR"] for m in before]))
        weights.append(-policy.weights["student"][1, 0].item())  # v points away from the data
    for values in (gains, weights):
        assert np.mean(values) > max(0.1, np.std(values, ddof=1))  # twice its standard error


def test_before_an_update_the_ratio_is_one_and_the_gradient_is_reinforces():
    policy, objective = student(), grpo(updates=1)
    data, total = collect(objective, policy), 0.0
    terms = list(objective.losses(policy, "student", data, 0))
    assert all(m["ratio_error"] == 0 and m["clip_fraction"] == 0 for _, m in terms)
    for rollout in data:
        for step in rollout.steps:
            v = policy.velocity(step.x_t, step.sigma, None, adapter="student")
            mean, std = objective.sampler.transition(step.x_t, v, step.sigma, step.sigma_next)
            objectives = log_prob(step.x_next, mean, std, "mean") * rollout.advantages
            total = total - objectives.sum() / (rollout.images * len(rollout.steps))
    reinforce = torch.autograd.grad(total, policy.weights["student"])[0]
    torch.testing.assert_close(gradient(objective, policy, data), reinforce, rtol=1e-4, atol=1e-6)


def test_the_kl_penalty_is_towards_the_reference_and_zero_at_it():
    policy = student(0.5, other=torch.full((2, 2), 0.5))
    free, to_base, to_other = (
        gradient(grpo(updates=1, beta=beta, reference=name), policy)
        for beta, name in ((0.0, None), (10.0, None), (10.0, "other"))
    )
    torch.testing.assert_close(free, to_other)
    assert (to_base - free)[1].min() > 0.1  # the bias is above the base's, which is 0


def test_a_users_loss_is_a_function_of_the_batch():
    def reinforce(batch):
        return -batch.advantages * batch.ratio + batch.beta * batch.kl

    policy, options = student(0.5), dict(updates=1, beta=0.1, clip=0.5)
    shipped, own = (gradient(grpo(**options, **f), policy) for f in ({}, {"loss": reinforce}))
    torch.testing.assert_close(shipped, own)  # before an update nothing is clipped


# ---- processes and seeds


def test_a_process_without_a_prompt_of_an_iteration_adds_nothing():
    policy = student(ocr=torch.ones(2, 2))
    second = Shard(1, 2, lambda values: torch.cat([torch.arange(6.0), values]))
    opd = dict(teachers={"ocr": "ocr"}, mar=0.0)
    for objective in (
        grpo(prompts=1, updates=1),
        OPD(Schedule(OCR, 1), OPDConfig(**opd), Sampler(5, "sde")),
        OPD(Schedule(OCR, 1), OPDConfig(**opd, trained_steps=1), Sampler(5, "sde")),
        SFT(torch.zeros(3, 2, 1, 1), TASKS["ocr"][:3], SFTConfig(batch=1)),
    ):
        data, metrics = objective.collect(policy, "student", 0, second)
        assert list(objective.losses(policy, "student", data, 0)) == [] and metrics == {}


@pytest.mark.parametrize("groups, updates", [(12, 2), (8, 3), (4, 4), (7, 2)])
def test_which_images_an_update_sees_depends_on_the_iteration_alone(groups, updates):
    prompts = [Prompt(f"{g}", "ocr") for g in range(groups) for _ in range(3)]
    batch = Batch(prompts, list(range(3 * groups)))

    def images_of_updates(processes, size):
        images = {u: [] for u in range(updates)}
        for rank in range(processes):
            shard = Shard(rank, processes)
            part = shard.of(batch, 3)
            assert all(n == 3 for n in Counter(p.text for p in part.prompts).values())
            seeds = part.seeds
            for update, rows, n in shard.micro_batches(groups, 3, updates, size):
                assert rows.stop - rows.start <= size
                images[update] += [(seed, n) for seed in seeds[rows]]
        return {u: sorted(rows) for u, rows in images.items()}

    alone = images_of_updates(1, 100)
    assert sorted(seed for rows in alone.values() for seed, _ in rows) == batch.seeds
    assert all(n == len(rows) for rows in alone.values() for _, n in rows)
    assert max(map(len, alone.values())) - min(map(len, alone.values())) <= 3
    assert images_of_updates(1, 5) == alone
    for processes in (2, 3, 4, groups + 1):
        assert images_of_updates(processes, 100) == images_of_updates(processes, 3) == alone


def test_trainings_of_several_seeds_and_evaluations_share_no_noise():
    first = [Schedule(OCR, 2, 2, seed=seed).draw(0).seeds[0] for seed in range(4)]
    seeds = (*first, 1 << 39, *range(4))
    noise = {tuple(torch.randn(4, generator=generator(seed)).tolist()) for seed in seeds}
    assert len(noise) == len(seeds)
    plain = torch.randn(3, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.randn(3, generator=generator(7)), plain)


def test_the_schedule_follows_its_weights_and_repeats_no_prompt_before_all_were_drawn():
    weights = {"geneval": 3, "ocr": 1, "pickscore": 1}
    schedule, same = (Schedule(TASKS, 2, 3, weights, alternate=True) for _ in range(2))
    batches = [schedule.draw(i) for i in range(20)]
    assert all(len({p.task for p in b.prompts}) == 1 and len(b) == 6 for b in batches)
    assert Counter(b.prompts[0].task for b in batches) == {"geneval": 12, "ocr": 4, "pickscore": 4}
    assert all(len({b.prompts[0].task for b in batches[i : i + 5]}) == 3 for i in range(0, 20, 5))
    mixed = [p.text for i in range(7) for p in Schedule(TASKS, 3).draw(i).prompts]
    assert len(set(mixed)) == 21  # 7 prompts a task, each once
    seeds = [seed for b in batches for seed in b.seeds]
    assert len(set(seeds)) == len(seeds)
    assert schedule.draw(5) == same.draw(5)
    assert Schedule(TASKS, 3, seed=1).draw(0) != Schedule(TASKS, 3).draw(0)


def test_sft_learns_the_latents_and_goes_through_all_prompts():
    policy, prompts = student(), [Prompt(str(i), "ocr") for i in range(10)]
    objective = SFT(torch.full((10, 2, 1, 1), 3.0), prompts, SFTConfig(batch=64))
    losses = [m["flow_matching_loss"] for m in optimize(objective, policy, 100)]
    assert losses[-1] < losses[0] / 2
    assert set(collect(objective, policy, 4).prompts) == set(prompts)


# ---- which steps have noise


def test_outside_the_window_a_step_is_the_odes_and_is_not_trained():
    policy, sampler = student(1.0), Sampler(6, "sde", noisy_steps=2)
    steps = list(trajectory(policy, TASKS["ocr"][:1], [3], sampler, "student"))
    assert [bool(s.std > 0) for s in steps] == [True] * 2 + [False] * 4
    for s in steps[2:]:
        torch.testing.assert_close(s.x_next - s.x_t, (s.sigma_next - s.sigma) * s.v)
    rollout = collect(grpo(sampler=sampler), policy)[0]
    assert [s.index for s in rollout.steps] == [0, 1]
    with pytest.raises(ValueError, match="from 0 to 1"):
        grpo(sampler=sampler, trained_steps=[0, 2])


def test_the_window_moves_by_iteration_and_seed_alone():
    drawn = Sampler(8, "sde", noisy_steps=2, window_start=(1, 3))
    of_seed = [[drawn.at(i, seed).window_start for i in range(60)] for seed in (5, 5, 6)]
    assert set(of_seed[0]) == {1, 2, 3} and of_seed[0] == of_seed[1] != of_seed[2]
    rollouts = [collect(grpo(2, 2, drawn), student(1.0), i)[0] for i in range(20)]
    trained = {tuple(s.index for s in rollout.steps) for rollout in rollouts}
    assert trained == {(1, 2), (2, 3), (3, 4)}


def test_a_window_of_all_steps_is_the_plain_trajectory_to_the_bit():
    policy, seeds = student(1.0, 3), range(len(TASKS["ocr"]))
    plain, window = (
        list(trajectory(policy, TASKS["ocr"], seeds, sampler, "student"))
        for sampler in (Sampler(6, "sde"), Sampler(6, "sde", noisy_steps=5).at(3, 1))
    )
    for a, b in zip(plain, window, strict=True):
        assert torch.equal(a.x_t, b.x_t) and torch.equal(a.x_next, b.x_next) and a.std == b.std


@pytest.mark.parametrize("start", [0, 2])
def test_images_of_a_prompt_share_a_trajectory_to_the_window_and_separate_there(start):
    policy, prompts = student(1.0), [p for p in TASKS["ocr"][:2] for _ in range(3)]
    sampler = Sampler(6, "sde", noisy_steps=1, window_start=start, branch=True)
    steps = list(trajectory(policy, prompts, range(6), sampler, "student", 3))
    # computed once a prompt
    assert [n for _, n, _ in policy.calls] == [2] * (start + 1) + [6] * (5 - start)
    # from the noise of a prompt's first image
    ode = list(trajectory(policy, prompts[::3], [0, 3], Sampler(6), "student"))
    for k in range(start + 1):
        assert torch.equal(steps[k].x_t, ode[k].x_t.repeat_interleave(3, 0))
    assert [bool(s.std > 0) for s in steps] == [k == start for k in range(6)]
    assert len({tuple(x.flatten().tolist()) for x in steps[-1].x_next}) == 6
    with pytest.raises(ValueError, match="several images of a prompt"):
        next(trajectory(policy, prompts, range(6), sampler, "student"))


def test_the_loss_of_a_branch_is_that_of_its_images_one_by_one():
    policy = student(0.3)
    sampler = Sampler(6, "sde", noisy_steps=2, window_start=1, branch=True)
    objective = grpo(images=4, sampler=sampler, beta=0.1, micro_batch_size=6)
    data = collect(objective, policy)
    assert all(len(r.prompts) == 4 for r in data)  # a prompt's images stay together
    one_by_one = [replace(r, steps=[replace(s, shared=1) for s in r.steps]) for r in data]
    grads, sizes = [], []
    for rollouts in (data, one_by_one):
        policy.calls.clear()
        grads.append(gradient(objective, policy, rollouts))
        sizes.append({n for _, n, _ in policy.calls})
    torch.testing.assert_close(*grads)
    assert grads[0].abs().max() > 0 and sizes == [{1, 4}, {4}]


# ---- what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(sampler=Sampler(5, "ode")), "explores by noise"),
        (dict(images=1), "at least 2"),
        (dict(trained_steps=5), "or how many of these, not 5"),
        (dict(updates=9), "9 updates need as many prompts"),
        (dict(loss="clippd"), r"there is no loss 'clippd' \(did you mean 'clipped'\?\)"),
        (
            dict(reward_weights={"Taste": 1.0}),
            "there is no reward .reward_weights of ocr. 'Taste'; there are OCR",
        ),
        (
            dict(sampler=Sampler(6, "sde", noisy_steps=1, window_start=(0, 2)), trained_steps=[0]),
            "the window of noisy steps moves",
        ),
    ],
)
def test_bad_settings_of_grpo_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        grpo(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(noisy_steps=2, window_start=4), "starts at a step from 0 to 3, not at 4"),
        (dict(noisy_steps=2, window_start=(2, 1)), r"from 0 to 3, not at \(2, 1\)"),
        (dict(noisy_steps=6), "of 6 steps the last has no noise"),
        (dict(kind="ode", branch=True), "separates the images of a prompt by noise"),
        (dict(window_start=1), "from 0 to 0, not at 1"),
        (dict(kind="cps", noise_level=2.0), "noise level of CPS lies in"),
    ],
)
def test_bad_windows_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**{"steps": 6, "kind": "sde", **options})


def test_a_schedule_without_weights_of_all_tasks_is_refused():
    with pytest.raises(ValueError, match="task_weights must be of geneval, ocr, pickscore, not"):
        Schedule(TASKS, 3, task_weights={"ocr": 1})


def test_a_held_out_reward_is_refused():
    reward = Brightness()
    reward.held_out = True
    with pytest.raises(ValueError, match="OCR is a held-out reward"):
        GRPO(Schedule(OCR, 2, 2), {"OCR": reward}, GRPOConfig(reward_weights={"OCR": 1.0}))


def test_grpo_mix_alternates_tasks_and_adds_the_auxiliary_reward(benchmark, workspace):
    recipe = grpo_mix(benchmark, 9, 2, 4, seed=3)
    mix, _ = build(validate(Recipe, recipe), workspace)
    tasks = [{p.task for p in mix.schedule.draw(i).prompts} for i in range(10)]
    assert Counter(task for [task] in tasks) == {"geneval": 6, "ocr": 2, "pickscore": 2}
    assert {task: mix.weights_of(task) for task in benchmark.prompt_tasks} == {
        "geneval": pytest.approx({"GenEvalScore": 0.8, "DeQA": 0.2}),
        "ocr": pytest.approx({"OCR": 0.8, "DeQA": 0.2}),
        "pickscore": pytest.approx({"PickScore": 0.8, "DeQA": 0.2}),
    }
    assert [mix.rewards[n].scale for n in ("PickScore", "DeQA")] == [26.0, 5.0]
