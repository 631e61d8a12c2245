"""The five readings of on-policy distillation, on a policy whose expectations can be measured."""

import math
from functools import cache

import pytest
import torch
from small_policy import SmallPolicy

from flowopd_lib.objectives import ESTIMATORS, OPD, Share
from flowopd_lib.prompts import Prompt
from flowopd_lib.rollout import Sampler, initial_noise, trajectory
from flowopd_lib.schedule import Schedule
from flowopd_lib.sde import coefficients, velocity_weight
from flowopd_lib.studies.estimators import mirrored

STEPS = 5
SAMPLER = Sampler(STEPS, "sde")


def policy_of(size=2):
    g = torch.Generator().manual_seed(7)
    student, teacher = (torch.randn(2, size, generator=g) * 0.3 for _ in range(2))
    return SmallPolicy(size, student=student.requires_grad_(True), teacher=teacher)


def objective(estimator, batch=200, mar=0.0, seed=0, **options):
    schedule = Schedule({"ocr": [Prompt("x", "ocr")]}, batch, seed=seed)
    return OPD(
        schedule, {"ocr": "teacher"}, SAMPLER, estimator, mar=mar, micro_batch_size=batch, **options
    )


def gradients(policy, estimator, rounds=60, **options):
    """(rounds, 2, D): the gradient of each of many independent batches."""
    found, o = [], objective(estimator, **options)
    for i in range(rounds):
        for loss in o.losses(policy, "student", o.collect(policy, "student", i, Share()), 0):
            loss.backward()
        found.append(policy.weights["student"].grad.clone())
        policy.weights["student"].grad = None
    return torch.stack(found)


def mean_and_error(samples):
    return samples.mean(0), samples.std(0) / math.sqrt(len(samples))


def whole_kl(policy, weights, n=100_000):
    """E[sum_k KL_k] along the student's own walk, with the same noise whatever the weights."""
    g, grid = torch.Generator().manual_seed(5), policy.sigmas(STEPS)
    x, total = torch.randn(n, *policy.latent_shape, generator=g, dtype=torch.float64), 0.0
    for sigma, after in zip(grid[:-2], grid[1:-1]):
        v, u = (
            w[0][:, None, None] * x + w[1][:, None, None] * (1 + sigma)
            for w in (weights, policy.weights["teacher"].double())
        )
        total = total + velocity_weight(sigma, after) * (v - u).square().flatten(1).sum(1)
        a, b, std = coefficients(sigma, after, "sde", 0.7)
        x = a * x + b * v + std * torch.randn(x.shape, generator=g, dtype=torch.float64)
    return total.mean().item()


def test_pathwise_and_return_to_go_is_the_gradient_of_the_whole_trajectorys_kl():
    policy = policy_of()
    mean, error = mean_and_error(gradients(policy, "pathwise+return_to_go", rounds=150))
    exact, h, weights = torch.zeros(2, 2), 1e-4, policy.weights["student"].detach().double()
    for i in range(2):
        for j in range(2):
            nudge = torch.zeros(2, 2, dtype=torch.float64)
            nudge[i, j] = h
            exact[i, j] = (
                whole_kl(policy, weights + nudge) - whole_kl(policy, weights - nudge)
            ) / (2 * h)
    assert ((mean - exact).abs() < 4 * error + 0.01 * exact.abs()).all()
    pathwise, noise = mean_and_error(gradients(policy, "pathwise"))
    assert ((pathwise - exact).abs() > 8 * noise).any()  # pathwise alone is another gradient


def test_the_papers_reading_has_no_gradient_in_expectation():
    policy = policy_of()
    mean, error = mean_and_error(gradients(policy, "paper", rounds=150))
    assert (mean.abs() < 4 * error).all()
    pathwise, _ = mean_and_error(gradients(policy, "pathwise"))
    # so "within its error" is not for want of precision
    assert (pathwise.abs() > 10 * error).any()


def test_log_ratio_agrees_with_pathwise_and_is_noisier_the_more_dimensions_there_are():
    excess = {}
    for size in (2, 32):
        policy = policy_of(size)
        path, ratio = gradients(policy, "pathwise"), gradients(policy, "log_ratio", rounds=150)
        (a, ea), (b, eb) = mean_and_error(path), mean_and_error(ratio)
        away = (a - b).abs() / (ea**2 + eb**2).sqrt()
        assert (away < 4.5).all()  # 64 comparisons
        excess[size] = (ratio.var(0).sum() / a.square().sum()).item()
    assert excess[32] > 4 * excess[2]


def test_as_coded_is_pathwise_plus_noise_of_mean_zero():
    policy = policy_of()
    # the same walks
    extra = gradients(policy, "as_coded", rounds=150, batch=50) - gradients(
        policy, "pathwise", rounds=150, batch=50
    )
    mean, error = mean_and_error(extra)
    assert (mean.abs() < 4 * error).all() and extra.abs().max() > 1e-3


def test_an_action_and_its_mirror_image_leave_no_noise_of_the_score():
    policy, found = policy_of(), {}
    o = objective("as_coded", batch=20)
    data = o.collect(policy, "student", 0, Share())
    there, back = data.visits, mirrored(mirrored(data)).visits
    for (*_, visits), (*_, again) in zip(there, back):
        assert all(
            torch.allclose(a.step.x_next, b.step.x_next, atol=1e-6) for a, b in zip(visits, again)
        )
    for name in ("pathwise", "paper", "as_coded", "log_ratio"):
        reading, sides = objective(name, batch=20), []
        for side in (data, mirrored(data)):
            for loss in reading.losses(policy, "student", side, 0):
                loss.backward()
            sides.append(policy.weights["student"].grad.clone())
            policy.weights["student"].grad = None
        found[name] = (sum(sides) / 2, (sides[0] - sides[1]).abs().max())
    size = found["pathwise"][0].abs().max()
    assert (
        found["pathwise"][1] == 0 and found["paper"][1] > 0.05 * size
    )  # one action alone is noise
    assert found["paper"][0].abs().max() < 1e-3 * size
    torch.testing.assert_close(
        found["as_coded"][0], found["pathwise"][0], rtol=1e-3, atol=1e-3 * size.item()
    )
    # of a reward that does depend on the action, the part that does not is noise and goes, the other stays
    assert (found["log_ratio"][0] - found["pathwise"][0]).abs().max() > 0.01 * size


@pytest.mark.parametrize(
    "estimator", ["pathwise", "paper", "as_coded", "log_ratio", "return_to_go"]
)
def test_a_teacher_that_is_the_student_leaves_nothing_to_learn(estimator):
    policy = policy_of()
    policy.weights["teacher"] = policy.weights["student"].detach().clone()
    o = objective(estimator)
    losses = list(o.losses(policy, "student", o.collect(policy, "student", 0, Share()), 0))
    assert len(losses) == STEPS - 1 and all(loss.item() == 0 for loss in losses)


def test_walking_and_learning_at_once_gives_the_gradient_of_doing_them_in_turn():
    # not alone, so not fused
    policy, fused, apart = (
        policy_of(),
        objective("pathwise", batch=8, mar=0.3),
        objective("pathwise+pathwise", batch=8, mar=0.3),
    )
    found = []
    for o in (fused, apart):
        policy.asked.clear()
        for loss in o.losses(policy, "student", o.collect(policy, "student", 3, Share()), 0):
            loss.backward()
        found.append(
            (
                policy.weights["student"].grad.clone(),
                sum(a == "student" for a, _, _ in policy.asked),
            )
        )
        policy.weights["student"].grad = None
        # teachers never keep a graph
        assert not any(grad for name, _, grad in policy.asked if name != "student")
    torch.testing.assert_close(found[0][0], found[1][0])
    assert (found[0][1], found[1][1]) == (
        STEPS - 1,
        2 * (STEPS - 1),
    )  # one forward a state, not two


def test_every_prompt_is_routed_to_its_own_teacher():
    tasks = {t: [Prompt(t, t)] for t in ("geneval", "ocr", "pickscore")}
    weights = {t: torch.full((2, 2), float(i)) for i, t in enumerate(tasks)}
    policy = SmallPolicy(2, student=torch.zeros(2, 2, requires_grad=True), **weights)
    o = OPD(Schedule(tasks, 9), {t: t for t in tasks}, SAMPLER, mar=0.0)
    batch = o.schedule.draw(0)
    x = initial_noise(policy, batch.seeds)
    teacher, anchor = o._targets(policy, x, 0.5, policy.encode(batch.seeds), batch.prompts)
    for i, p in enumerate(batch.prompts):
        torch.testing.assert_close(
            teacher[i], policy.velocity(x[i : i + 1], 0.5, None, adapter=p.task)[0]
        )
    # batched: a forward a teacher
    assert anchor is None and {(name, n) for name, n, _ in policy.asked[:3]} == {
        (t, 3) for t in tasks
    }
    with pytest.raises(ValueError, match="no teacher for the task pickscore"):
        OPD(Schedule(tasks, 9), {"geneval": "geneval", "ocr": "ocr"}, SAMPLER)


def test_the_anchor_pulls_on_every_prompt():
    policy = policy_of()
    policy.weights["anchor"] = torch.ones(2, 2)
    free, held = (
        gradients(policy, "pathwise", rounds=1, mar=m, anchor="anchor") for m in (0.0, 0.5)
    )
    teacher = policy.weights["teacher"]
    policy.weights["teacher"] = policy.weights["anchor"]
    towards = gradients(policy, "pathwise", rounds=1)
    policy.weights["teacher"] = teacher
    torch.testing.assert_close(held, free + 0.5 * towards)


def test_ode_rollouts_subsets_of_steps_and_weightings():
    policy = policy_of()
    schedule = Schedule({"ocr": [Prompt("x", "ocr")]}, 4)
    for weighting in ("kl", "as_coded", "uniform_v", "x0", "ode"):
        o = OPD(
            schedule,
            {"ocr": "teacher"},
            Sampler(STEPS, "ode"),
            weighting=weighting,
            steps=(0, 2),
            mar=0.0,
        )
        policy.asked.clear()
        assert (
            len(list(o.losses(policy, "student", o.collect(policy, "student", 0, Share()), 0))) == 2
        )
        # the walk ends at the last trained step
        assert sum(name == "student" for name, _, _ in policy.asked) == 3
    drawn = {
        tuple(
            OPD(schedule, {"ocr": "teacher"}, SAMPLER, steps=1)
            .collect(policy, "student", i, Share())
            .trained
        )
        for i in range(40)
    }
    assert drawn == {(0,), (1,), (2,), (3,)}


@cache
def of_all_steps(estimator):
    return mean_and_error(gradients(policy_of(), estimator, rounds=240, mar=0.1, anchor=None))


@pytest.mark.parametrize(
    "estimator, options",
    [
        ("pathwise", dict(steps=1)),
        ("pathwise", dict(steps=3)),
        ("pathwise", dict(steps=2, draw="iteration")),
        ("pathwise+log_ratio", dict(steps=1)),
        ("return_to_go", dict(steps=2)),
        ("pathwise+return_to_go", dict(steps=3)),
    ],
)
def test_a_few_steps_drawn_at_random_estimate_the_gradient_of_all(estimator, options):
    whole, e1 = of_all_steps(estimator)
    drawn, e2 = mean_and_error(
        gradients(policy_of(), estimator, rounds=240, mar=0.1, anchor=None, **options)
    )
    assert ((whole - drawn).abs() < 4 * (e1**2 + e2**2).sqrt()).all() and (
        whole.abs() > 8 * (e1**2 + e2**2).sqrt()
    ).any()


def test_drawn_steps_of_all_kinds_of_walks_are_those_of_whole_walks_and_a_walk_ends_at_its_last():
    policy, schedule = policy_of(), Schedule({"ocr": [Prompt("x", "ocr")]}, 12)
    for kind in ("ode", "sde", "cps"):
        o = OPD(
            schedule, {"ocr": "teacher"}, Sampler(STEPS, kind), steps=2, mar=0.0, micro_batch_size=5
        )
        batch = o.schedule.draw(0)
        walks = list(trajectory(policy, batch.prompts, batch.seeds, o.sampler, "student"))
        policy.asked.clear()
        data = o.collect(policy, "student", 0, Share())
        steps, found = (
            sum((v[3].steps for v in data.visits), []),
            torch.cat([v[3].x for v in data.visits]),
        )
        assert len(steps) == 24 and set(steps) == set(range(STEPS - 1))
        for k in range(STEPS - 1):
            mine = found[[s == k for s in steps]]
            assert all((walks[k].x - x).flatten(1).abs().sum(1).min() < 1e-5 for x in mine)
        assert sum(n for _, n, _ in policy.asked) < 12 * (STEPS - 2)  # some ended before
        policy.asked.clear()
        # `micro_batch_size` states at once
        assert (
            list(o.losses(policy, "student", data, 0))
            and max(n for _, n, grad in policy.asked if grad) == 5
        )
    # The same images draw the same steps whoever walks them.
    halves = [o.collect(policy, "student", 0, Share(rank, 2)).visits for rank in (0, 1)]
    assert sorted(sum((v[3].steps for half in halves for v in half), [])) == sorted(steps)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(steps=1, estimator="return_to_go"), "one drawn step says nothing"),
        (dict(draw="prompt"), "draw must be one of walk, iteration"),
        (dict(max_weight=0.0), "max_weight must be more than 0"),
        (dict(estimator="gkd"), "unknown estimator gkd"),
        (dict(weighting="snr"), "weighting must be one of kl, as_coded"),
        (dict(steps=(4,)), "the others are deterministic"),
        (dict(steps=9), "between 1 and 4"),
        (dict(sampler=Sampler(5, "ode"), estimator="paper"), "probabilities of actions"),
    ],
)
def test_bad_settings_are_named_before_anything_is_walked(options, message):
    with pytest.raises(ValueError, match=message):
        OPD(
            Schedule({"ocr": [Prompt("x", "ocr")]}, 4),
            {"ocr": "teacher"},
            **{"sampler": SAMPLER, **options},
        )


def test_the_kl_is_told_by_task_and_by_step():
    schedule = Schedule({"ocr": [Prompt("x", "ocr")], "geneval": [Prompt("y", "geneval")]}, 4)
    policy = policy_of()
    o = OPD(
        schedule, {"ocr": "teacher", "geneval": "student"}, SAMPLER, mar=0.0, micro_batch_size=3
    )
    data = o.collect(policy, "student", 0, Share())
    for loss in o.losses(policy, "student", data, 0):
        loss.backward()
    told = o.metrics(data)
    assert told["kl_geneval"] == 0 < told["kl_ocr"] and [
        k for k in told if k.startswith("kl_step")
    ] == [f"kl_step_{k}" for k in range(STEPS - 1)]
    assert sum(told[f"kl_step_{k}"] for k in range(STEPS - 1)) / (STEPS - 1) == pytest.approx(
        told["kl"], rel=1e-5
    )
    assert told["gap_geneval"] == 0 < told["gap_ocr"]


@pytest.mark.parametrize("options", [dict(), dict(steps=3), dict(steps=2, draw="iteration")])
def test_the_kl_is_told_in_nats_whatever_the_loss_weighs(options):
    policy, found = policy_of(), []
    for weighting in ("kl", "uniform_v"):
        o = objective("pathwise", batch=12, weighting=weighting, **options)
        data = o.collect(policy, "student", 2, Share())
        found.append(
            (sum(loss.item() for loss in o.losses(policy, "student", data, 0)), o.metrics(data))
        )
    assert found[0][0] != pytest.approx(found[1][0], rel=0.1) and found[0][1] == pytest.approx(
        found[1][1], rel=1e-4
    )


@pytest.mark.parametrize("steps", [None, 2])
def test_a_walk_without_any_noise_has_no_kl_and_can_be_learned_from_all_the_same(steps):
    policy = policy_of()
    o = OPD(
        Schedule({"ocr": [Prompt("x", "ocr")]}, 4),
        {"ocr": "teacher"},
        Sampler(STEPS, "ode", noise_level=0.0),
        weighting="uniform_v",
        steps=steps,
        mar=0.0,
    )
    data = o.collect(policy, "student", 0, Share())
    assert sum(loss.item() for loss in o.losses(policy, "student", data, 0)) > 0
    told = o.metrics(data)
    assert told["gap_ocr"] > 0 and math.isnan(told["kl"])


def test_readings_that_share_the_rollouts_of_one_of_them_have_the_gradients_of_their_own():
    policy, readings = policy_of(), {name: objective(name, batch=20) for name in ESTIMATORS}

    def gradient(reading, collector):
        policy.weights["student"].grad = None
        for loss in reading.losses(
            policy, "student", collector.collect(policy, "student", 1, Share()), 0
        ):
            loss.backward()
        return policy.weights["student"].grad.clone()

    for name, reading in readings.items():
        assert torch.allclose(
            gradient(reading, readings["paper"]), gradient(reading, reading), rtol=1e-4, atol=1e-6
        ), name
