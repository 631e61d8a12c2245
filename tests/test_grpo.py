"""Group advantages, the clipped surrogate, the schedule of prompts."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_policy import SmallPolicy

from flowopd_lib.jobs.recipes import build, grpo_mix
from flowopd_lib.objectives import GRPO, OPD, SFT, Share, advantages
from flowopd_lib.prompts import Prompt
from flowopd_lib.rollout import Sampler, generator, trajectory
from flowopd_lib.schedule import Batch, Schedule
from flowopd_lib.sde import log_prob, transition

TASKS = {
    task: [Prompt(f"{task} {i}", task) for i in range(7)]
    for task in ("geneval", "ocr", "pickscore")
}


class Brightness:
    """A reward of the small policy's pictures."""

    name, range = "OCR", (-9.0, 9.0)

    def __call__(self, images, prompts):
        return images[:, 0, 0, 0].numpy()


def grpo(**options):
    schedule = Schedule({"ocr": TASKS["ocr"]}, options.pop("prompts", 8), options.pop("images", 6))
    return GRPO(
        schedule,
        {"OCR": Brightness()},
        {"OCR": 1.0},
        **{"sampler": Sampler(5, "sde"), "micro_batch_size": 12, "beta": 0.0, **options},
    )


def test_advantages_by_hand():
    rewards = torch.tensor([[0.0], [1.0], [1.0], [1.0]])  # two prompts, two images each
    got = advantages(rewards, torch.ones(4, 1), 2)
    std = rewards.std(correction=0).item()
    torch.testing.assert_close(got, torch.tensor([-0.5, 0.5, 0, 0]) / (std + 1e-4))
    torch.testing.assert_close(
        advantages(rewards, torch.ones(4, 1), 2, "group"),
        torch.tensor([-1.0, 1.0, 0.0, 0.0]),
        atol=1e-3,
        rtol=0,
    )
    # a reward that does not vary teaches nothing
    assert not advantages(torch.ones(6, 1), torch.ones(6, 1), 3).any()


def test_gdpo_weighs_rewards_of_any_size_alike():
    rewards = torch.tensor([[0.0, 0.0], [0.0, 100.0], [1.0, 0.0], [1.0, 100.0]])
    summed, gdpo = (advantages(rewards, torch.ones(4, 2), 4, how) for how in ("batch", "gdpo"))
    assert summed[1] > 0 > summed[2]  # the large reward decides
    # here each counts once
    assert gdpo[1] == pytest.approx(0, abs=1e-2) and gdpo[2] == pytest.approx(0, abs=1e-2)


def test_a_reward_is_scaled_weighed_by_task_and_left_out_where_it_does_not_apply():
    class Constant:
        def __init__(self, value, scale=1.0):
            self.value, self.scale = value, scale

        def __call__(self, images, prompts):
            return np.full(len(prompts), self.value, np.float32)

    schedule = Schedule({t: TASKS[t] for t in ("geneval", "ocr")}, 4, 2)
    o = GRPO(
        schedule,
        {"GenEval": Constant(1.0), "OCR": Constant(0.5), "DeQA": Constant(4.0, 5.0)},
        {"geneval": {"GenEval": 0.8, "DeQA": 0.2}, "ocr": {"OCR": 1.0}},
        Sampler(5, "sde"),
    )
    batch = schedule.draw(0)
    rewards, weights, seen = o.score(torch.zeros(len(batch), 3, 1, 1), batch)
    total = (rewards * weights).sum(1)
    for i, p in enumerate(batch.prompts):
        assert total[i] == pytest.approx(0.8 + 0.2 * 4 / 5 if p.task == "geneval" else 0.5)
    assert seen == {"DeQA": 4.0, "GenEval": 1.0, "OCR": 0.5}
    o.rewards["DeQA"].value = float("nan")
    with pytest.raises(ValueError, match="never turned into a reward"):
        o.score(torch.zeros(len(batch), 3, 1, 1), batch)


def learned(kind, reduction, clip, seed, images):
    """What 60 iterations make of the reward, and of the weight that decides it."""
    weights = torch.zeros(2, 2, requires_grad=True)
    o = GRPO(
        Schedule({"ocr": TASKS["ocr"]}, 8, images, seed=seed),
        {"OCR": Brightness()},
        {"OCR": 1.0},
        Sampler(5, kind),
        reduction=reduction,
        clip=clip,
        micro_batch_size=2 * images,
        beta=0.0,
    )
    policy, optimizer, seen = SmallPolicy(2, student=weights), torch.optim.Adam([weights], 0.05), []
    before = np.mean(
        [o.collect(policy, "student", 100 + i, Share()).rewards["OCR"] for i in range(10)]
    )
    for i in range(60):
        data = o.collect(policy, "student", i, Share())
        for update in range(o.updates):
            for loss in o.losses(policy, "student", data, update):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        seen.append(o.metrics(data)["OCR"])
    return np.mean(seen[-10:]) - before, weights[1, 0].item()


# CPS adds so much noise to two numbers that one training says little: more images, and what four trainings
# have in common.
@pytest.mark.parametrize("kind, images", [("sde", 6), ("cps", 24)])
@pytest.mark.parametrize("reduction, clip", [("mean", 1e-4), ("sum", 0.2)])
def test_grpo_raises_the_reward(kind, images, reduction, clip):
    gain, weight = np.transpose([learned(kind, reduction, clip, seed, images) for seed in range(4)])
    errors = [x.std(ddof=1) / 2 for x in (gain, weight)]
    assert gain.mean() > max(0.1, 2 * errors[0])
    assert weight.mean() < -max(0.1, 2 * errors[1])  # v points away from the data


def test_before_any_update_the_ratio_is_one_and_the_gradient_is_reinforces():
    policy = SmallPolicy(2, student=torch.zeros(2, 2, requires_grad=True))
    o = grpo(updates=1, reduction="sum")
    data = o.collect(policy, "student", 0, Share())
    losses = list(o.losses(policy, "student", data, 0))
    assert o.metrics(data)["ratio_error"] < 1e-5
    found = torch.autograd.grad(sum(losses), policy.weights["student"])[0]
    total = 0.0
    for part in data.parts:
        for step in part.steps:
            v = policy.velocity(step.x, step.sigma, None, adapter="student")
            mean, std = transition(step.x, v, step.sigma, step.sigma_next)
            total = total - (log_prob(step.x_next, mean, std) * part.advantages).sum() / (
                part.images * len(part.steps)
            )
    torch.testing.assert_close(
        found, torch.autograd.grad(total, policy.weights["student"])[0], rtol=1e-4, atol=1e-6
    )


def test_the_kl_penalty_holds_the_student_at_its_reference():
    policy = SmallPolicy(
        2, student=torch.full((2, 2), 0.5, requires_grad=True), other=torch.full((2, 2), 0.5)
    )
    free, held, home = (
        grpo(updates=1, beta=beta, reference=name)
        for beta, name in ((0.0, None), (10.0, None), (10.0, "other"))
    )
    grads = []
    for o in (free, held, home):
        data = o.collect(policy, "student", 0, Share())
        grads.append(
            torch.autograd.grad(
                sum(o.losses(policy, "student", data, 0)), policy.weights["student"]
            )[0]
        )
    # at its reference, there is nothing to hold
    torch.testing.assert_close(grads[0], grads[2])
    assert (grads[1] - grads[0])[1].min() > 0.1  # above the base's bias: pulled down


def test_each_update_has_its_own_images_and_processes_share_whole_groups():
    o = grpo(updates=2)
    data = o.collect(
        SmallPolicy(2, student=torch.zeros(2, 2, requires_grad=True)), "student", 0, Share()
    )
    assert [len(p.prompts) for p in data.parts] == [12] * 4 and [p.update for p in data.parts] == [
        0,
        0,
        1,
        1,
    ]
    batch = o.schedule.draw(0)
    mine, yours = Share(0, 2).of(batch, 6), Share(1, 2).of(batch, 6)
    assert sorted(mine.seeds + yours.seeds) == batch.seeds and len(mine) == 24
    assert all(count == 6 for count in Counter(p.text for p in mine.prompts).values())
    # no multiple of the processes: some have one group less, and none is lost or cut
    parts = [Share(rank, 3).of(batch, 6) for rank in range(3)]
    assert [len(part) for part in parts] == [18, 18, 12]
    assert sorted(sum((part.seeds for part in parts), [])) == batch.seeds
    for part in parts:
        assert all(count == 6 for count in Counter(p.text for p in part.prompts).values())
    # more processes than groups: some have nothing
    assert [len(Share(rank, 12).of(batch, 6)) for rank in range(12)] == [6] * 8 + [0] * 4


def test_a_process_without_a_prompt_of_an_iteration_adds_nothing_and_is_no_error():
    policy = SmallPolicy(2, student=torch.zeros(2, 2, requires_grad=True), ocr=torch.ones(2, 2))
    one = Schedule({"ocr": TASKS["ocr"]}, 1)
    second = Share(1, 2, lambda values: torch.cat([torch.arange(6.0), values]))
    for objective in (
        grpo(prompts=1, updates=1),
        OPD(one, {"ocr": "ocr"}, Sampler(5, "sde"), mar=0.0),
        OPD(one, {"ocr": "ocr"}, Sampler(5, "sde"), mar=0.0, steps=1),
        SFT(torch.zeros(3, 2, 1, 1), TASKS["ocr"][:3], batch=1),
    ):
        data = objective.collect(policy, "student", 0, second)
        assert (
            list(objective.losses(policy, "student", data, 0)) == []
            and objective.metrics(data) == {}
        )


@pytest.mark.parametrize("groups, updates", [(12, 2), (8, 3), (4, 4), (7, 2)])
def test_which_images_an_update_sees_follows_from_the_iteration_alone(groups, updates):
    batch = Batch(
        [Prompt(f"{g}", "ocr") for g in range(groups) for _ in range(3)], list(range(3 * groups))
    )

    def seen(benchmark, micro_batch_size):
        images = {u: [] for u in range(updates)}
        for rank in range(benchmark):
            share = Share(rank, benchmark)
            mine = share.of(batch, 3)
            for update, rows, n in share.updates_of(groups, 3, updates, micro_batch_size):
                assert rows.stop - rows.start <= micro_batch_size
                images[update] += [(seed, n) for seed in mine.seeds[rows]]
        return {u: sorted(found) for u, found in images.items()}

    alone = seen(1, 100)
    assert sorted(s for found in alone.values() for s, _ in found) == batch.seeds
    assert all(n == len(found) for found in alone.values() for _, n in found)
    assert max(map(len, alone.values())) - min(map(len, alone.values())) <= 3
    for benchmark in (2, 3, 4, groups + 1):
        assert seen(benchmark, 100) == seen(benchmark, 3) == seen(1, 5) == alone


def test_trainings_of_two_seeds_and_evaluations_share_no_noise():
    first = {
        seed: Schedule({"ocr": TASKS["ocr"]}, 2, 2, seed=seed).draw(0).seeds[0] for seed in range(4)
    }
    drawn = {
        tuple(torch.randn(4, generator=generator(s)).tolist())
        for s in (*first.values(), 1 << 39, *range(4))
    }
    assert len(drawn) == 9
    assert torch.equal(
        torch.randn(3, generator=generator(7)),
        torch.randn(3, generator=torch.Generator().manual_seed(7)),
    )


def test_the_schedule_follows_its_shares_and_repeats_no_prompt_before_all_were_seen():
    alternating = Schedule(TASKS, 2, 3, {"geneval": 3, "ocr": 1, "pickscore": 1}, alternate=True)
    batches = [alternating.draw(i) for i in range(20)]
    assert all(len({p.task for p in b.prompts}) == 1 and len(b) == 6 for b in batches)
    assert Counter(b.prompts[0].task for b in batches) == {"geneval": 12, "ocr": 4, "pickscore": 4}
    assert all(len({b.prompts[0].task for b in batches[i : i + 5]}) == 3 for i in range(0, 20, 5))
    mixed = [p.text for i in range(7) for p in Schedule(TASKS, 3).draw(i).prompts]
    assert len(set(mixed)) == 21  # 7 prompts a task, each once
    seeds = [s for b in batches for s in b.seeds]
    assert len(set(seeds)) == len(seeds)
    assert alternating.draw(5) == Schedule(
        TASKS, 2, 3, {"geneval": 3, "ocr": 1, "pickscore": 1}, alternate=True
    ).draw(5)
    assert Schedule(TASKS, 3, seed=1).draw(0) != Schedule(TASKS, 3).draw(0)


def test_sft_learns_the_latents_it_is_given():
    weights = torch.zeros(2, 2, requires_grad=True)
    policy = SmallPolicy(2, student=weights)
    o = SFT(torch.full((10, 2, 1, 1), 3.0), [Prompt(str(i), "ocr") for i in range(10)], batch=64)
    seen = []
    optimizer = torch.optim.Adam([weights], 0.05)
    for i in range(150):
        data = o.collect(policy, "student", i, Share())
        for loss in o.losses(policy, "student", data, 0):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(o.metrics(data)["loss"])
    assert seen[-1] < seen[0] / 2
    assert {p.text for p in o.collect(policy, "student", 4, Share()).prompts} == {
        str(i) for i in range(10)
    }


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(sampler=Sampler(5, "ode")), "explores by noise"),
        (dict(images=1), "at least 2"),
        (dict(steps=5), "between 1 and 4"),
        (dict(normalise="z"), "normalise must be one of batch, group, gdpo, none, not 'z'"),
        (dict(updates=9), "9 updates need as many prompts"),
        (dict(updates=0), "updates must be at least 1, not 0"),
        (dict(micro_batch_size=0), "micro_batch_size must be at least 1, not 0"),
        (dict(clip=0.0), "clip must be more than 0"),
        (dict(beta=-1.0), "beta must be at least 0"),
        (dict(reduction="max"), "reduction must be one of sum, mean"),
        (dict(sampler=Sampler(1, "sde")), "take at least 2 steps"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        grpo(**options).collect(SmallPolicy(2, student=torch.zeros(2, 2)), "student", 0, Share())


def test_rewards_without_a_reward_are_named():
    with pytest.raises(ValueError, match="the rewards of ocr name Taste; the rewards are OCR"):
        GRPO(Schedule({"ocr": TASKS["ocr"]}, 2, 2), {"OCR": Brightness()}, {"Taste": 1.0})
    with pytest.raises(ValueError, match="shares must give a positive whole number"):
        Schedule(TASKS, 3, task_weights={"ocr": 1})


def test_only_the_noisy_steps_of_a_mixed_sampler_have_noise_and_are_trained():
    policy, sampler = (
        SmallPolicy(2, student=torch.ones(2, 2, requires_grad=True)),
        Sampler(6, "sde", noisy=2),
    )
    steps = list(trajectory(policy, TASKS["ocr"][:1], [3], sampler, "student"))
    ode = list(trajectory(policy, TASKS["ocr"][:1], [3], Sampler(6), "student"))
    assert [step.std > 0 for step in steps] == [True, True, False, False, False, False]
    for step, other in zip(steps[2:], ode[2:]):  # from there on Euler's step
        torch.testing.assert_close(step.x_next - step.x, (other.sigma_next - other.sigma) * step.v)
    assert [
        s.index
        for part in grpo(sampler=sampler).collect(policy, "student", 0, Share()).parts[:1]
        for s in part.steps
    ] == [0, 1]
    with pytest.raises(ValueError, match="from 0 to 1"):
        grpo(sampler=sampler, steps=(0, 2))
    with pytest.raises(ValueError, match="between 1 and 5 can have noise, not 6"):
        Sampler(6, "sde", noisy=6)


def test_a_window_moves_by_the_iteration_alone():
    drawn, sliding = (
        Sampler(8, "sde", noisy=2, first=1, last=3),
        Sampler(8, "sde", noisy=2, first=1, last=3, slide=2),
    )
    assert [sliding.at(i, 0).first for i in range(8)] == [1, 1, 2, 2, 3, 3, 1, 1]
    seen = [drawn.at(i, 5).first for i in range(60)]
    assert set(seen) == {1, 2, 3} and seen == [drawn.at(i, 5).first for i in range(60)] != [
        drawn.at(i, 6).first for i in range(60)
    ]
    policy = SmallPolicy(2, student=torch.ones(2, 2, requires_grad=True))
    trained = [
        {
            s.index
            for part in grpo(sampler=drawn).collect(policy, "student", i, Share()).parts
            for s in part.steps
        }
        for i in range(20)
    ]
    assert {tuple(sorted(t)) for t in trained} == {(1, 2), (2, 3), (3, 4)}


def test_a_window_of_all_steps_without_branch_is_the_plain_rollout_to_the_bit():
    policy = SmallPolicy(3, student=torch.ones(2, 3))
    plain, window = (
        list(trajectory(policy, TASKS["ocr"] * 2, range(2 * len(TASKS["ocr"])), s, "student"))
        for s in (Sampler(6, "sde"), Sampler(6, "sde", noisy=5, first=0, last=0).at(3, 1))
    )
    assert all(
        torch.equal(a.x, b.x) and torch.equal(a.x_next, b.x_next) and a.std == b.std
        for a, b in zip(plain, window, strict=True)
    )


@pytest.mark.parametrize("first", [0, 2])
def test_images_of_a_prompt_share_a_walk_to_the_window_and_part_there(first):
    policy = SmallPolicy(2, student=torch.ones(2, 2, requires_grad=True))
    sampler, prompts = (
        Sampler(6, "sde", noisy=1, first=first, branch=True),
        [p for p in TASKS["ocr"][:2] for _ in range(3)],
    )
    steps = list(trajectory(policy, prompts, range(6), sampler, "student", 3))
    # walked once a prompt
    assert [n for _, n, _ in policy.asked] == [2] * (first + 1) + [6] * (5 - first)
    # from the noise of a prompt's first image
    ode = list(trajectory(policy, prompts[::3], [0, 3], Sampler(6), "student"))
    for k in range(first + 1):
        assert torch.equal(steps[k].x[::3], ode[k].x) and torch.equal(
            steps[k].x, ode[k].x.repeat_interleave(3, 0)
        )
    assert [s.std > 0 for s in steps] == [k == first for k in range(6)]
    assert len({tuple(x.flatten().tolist()) for x in steps[-1].x_next}) == 6
    with pytest.raises(ValueError, match="several images of a prompt"):
        next(trajectory(policy, prompts, range(6), sampler, "student"))


def test_the_loss_of_a_branch_is_that_of_its_images_one_by_one_at_a_forward_a_prompt():
    policy = SmallPolicy(2, student=torch.full((2, 2), 0.3, requires_grad=True))
    objective = grpo(
        sampler=Sampler(6, "sde", noisy=2, first=1, branch=True),
        images=4,
        beta=0.1,
        micro_batch_size=6,
    )
    data = objective.collect(policy, "student", 0, Share())
    assert all(len(part.prompts) == 4 for part in data.parts)  # a prompt's images stay together
    found = []
    for parts in (
        data.parts,
        [replace(p, steps=[replace(s, shared=1) for s in p.steps]) for p in data.parts],
    ):
        policy.asked.clear()
        for loss in objective.losses(policy, "student", replace(data, parts=parts), 0):
            loss.backward()
        found.append((policy.weights["student"].grad.clone(), {n for name, n, _ in policy.asked}))
        policy.weights["student"].grad = None
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][0].abs().max() > 0 and found[0][1] == {1, 4} and found[1][1] == {4}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(noisy=2, first=4), "begins at a step from 0 to 3, not 4"),
        (dict(noisy=2, first=2, last=1), "begins at a step from 0 to 3, not 2 to 1"),
        (dict(noisy=2, slide=3), "needs last"),
        (dict(kind="ode", branch=True), "part by noise"),
        (dict(first=1), "begins at a step from 0 to 0, not 1"),
    ],
)
def test_windows_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**{"steps": 6, "kind": "sde", **options})


def test_the_mix_takes_turns_and_weighs_as_the_paper_does(benchmark):
    recipe = grpo_mix(benchmark, 9, 2, 4, seed=3, lr=1e-3, normalise="gdpo")
    policy, mix, config = build(recipe, device="cpu")
    assert (config.iterations, config.lr, mix.schedule.size, mix.schedule.repeats) == (
        9,
        1e-3,
        2,
        4,
    )
    assert (mix.normalise, mix.schedule.seed, mix.beta, mix.micro_batch_size, mix.sampler) == (
        "gdpo",
        3,
        0.0,
        4,
        benchmark.exploration,
    )
    tasks = [{p.task for p in mix.schedule.draw(i).prompts} for i in range(10)]
    assert all(len(t) == 1 for t in tasks) and [
        sum(t == {name} for t in tasks) for name in benchmark.own
    ] == [6, 2, 2]
    # GenEval counts half as partial credit
    assert {task: mix.weights_of(task) for task in benchmark.own} == {
        "geneval": pytest.approx({"GenEval": 0.4, "GenEvalScore": 0.4, "DeQA": 0.2}),
        "ocr": pytest.approx({"OCR": 0.8, "DeQA": 0.2}),
        "pickscore": pytest.approx({"PickScore": 0.8, "DeQA": 0.2}),
    }
    assert benchmark.reward_weights() == {
        "geneval": {"GenEval": 0.5, "GenEvalScore": 0.5},
        "ocr": {"OCR": 1.0},
        "pickscore": {"PickScore": 1.0},
    }
    assert {n: mix.rewards[n].scale for n in ("PickScore", "DeQA")} == {
        "PickScore": 26.0,
        "DeQA": 5.0,
    }
