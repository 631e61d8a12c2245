"""The gradient estimators of OPD, on a policy whose expectations can be measured."""

import math
from functools import cache

import pytest
import torch
from small_policy import SmallPolicy

from flowopd_lib.config import validate
from flowopd_lib.data import Prompt, Schedule
from flowopd_lib.fingerprint import describe
from flowopd_lib.losses import LOSSES, OPD, OPDConfig, Shard
from flowopd_lib.losses.grpo import clipped_surrogate
from flowopd_lib.losses.opd import mirrored
from flowopd_lib.rollout import Sampler, trajectory
from flowopd_lib.sde import coefficients, kl_weight

pytestmark = pytest.mark.fast

STEPS = 5
SAMPLER = Sampler(STEPS, "sde")
ONE_TASK = {"ocr": [Prompt("x", "ocr")]}


def small_policy(size=2):
    g = torch.Generator().manual_seed(7)
    student, teacher = (torch.randn(2, size, generator=g) * 0.3 for _ in range(2))
    return SmallPolicy(size, student=student.requires_grad_(True), teacher=teacher)


def objective(loss="pathwise", batch=200, mar=0.0, seed=0, sampler=SAMPLER, **options):
    options = {"teachers": {"ocr": "teacher"}, "micro_batch_size": batch, **options}
    config = validate(OPDConfig, {"loss": loss, "mar": mar, **options})
    return OPD(Schedule(ONE_TASK, batch, seed=seed), config, sampler)


def run(o, policy, iteration=0, shard=Shard()):
    data, _ = o.collect(policy, "student", iteration, shard)
    return list(o.losses(policy, "student", data, 0))


def gradient(o, policy, iteration=0, data=None):
    data = data or o.collect(policy, "student", iteration, Shard())[0]
    for loss, _ in o.losses(policy, "student", data, 0):
        loss.backward()
    g, policy.weights["student"].grad = policy.weights["student"].grad.clone(), None
    return g


def gradients(policy, loss, rounds=60, **options):
    """(rounds, 2, D): the gradient of each of many independent batches."""
    o = objective(loss, **options)
    return torch.stack([gradient(o, policy, i) for i in range(rounds)])


def mean_and_error(samples):
    return samples.mean(0), samples.std(0) / math.sqrt(len(samples))


def trajectory_kl(policy, weights, n=100_000):
    """E[sum_k KL_k] along the student's trajectory, with the same noise whatever the weights."""
    g, grid = torch.Generator().manual_seed(5), policy.sigmas(STEPS)
    x, total = torch.randn(n, *policy.latent_shape, generator=g, dtype=torch.float64), 0.0
    for sigma, after in zip(grid[:-2], grid[1:-1]):
        v, u = (
            w[0][:, None, None] * x + w[1][:, None, None] * (1 + sigma)
            for w in (weights, policy.weights["teacher"].double())
        )
        total = total + kl_weight(sigma, after) * (v - u).square().flatten(1).sum(1)
        a, b, std = coefficients(sigma, after, "sde", 0.7)
        x = a * x + b * v + std * torch.randn(x.shape, generator=g, dtype=torch.float64)
    return total.mean().item()


def test_pathwise_plus_return_to_go_is_the_gradient_of_the_trajectory_kl():
    policy = small_policy()
    mean, error = mean_and_error(gradients(policy, "pathwise+return_to_go", rounds=150))
    exact, h, weights = torch.zeros(2, 2), 1e-4, policy.weights["student"].detach().double()
    for i in range(2):
        for j in range(2):
            nudge = torch.zeros(2, 2, dtype=torch.float64)
            nudge[i, j] = h
            up, down = (trajectory_kl(policy, weights + s * nudge) for s in (1, -1))
            exact[i, j] = (up - down) / (2 * h)
    assert ((mean - exact).abs() < 4 * error + 0.01 * exact.abs()).all()
    pathwise, noise = mean_and_error(gradients(policy, "pathwise"))
    assert ((pathwise - exact).abs() > 8 * noise).any()  # pathwise alone is another gradient


def test_the_papers_loss_has_zero_gradient_in_expectation():
    policy = small_policy()
    mean, error = mean_and_error(gradients(policy, "paper", rounds=150))
    assert (mean.abs() < 4 * error).all()
    pathwise, _ = mean_and_error(gradients(policy, "pathwise"))
    # so "within its error" is not for want of precision
    assert (pathwise.abs() > 10 * error).any()


def test_log_ratio_agrees_with_pathwise_and_its_variance_grows_with_dimension():
    excess = {}
    for size in (2, 32):
        policy = small_policy(size)
        path, ratio = gradients(policy, "pathwise"), gradients(policy, "log_ratio", rounds=150)
        (a, ea), (b, eb) = mean_and_error(path), mean_and_error(ratio)
        assert ((a - b).abs() / (ea**2 + eb**2).sqrt() < 4.5).all()  # 64 comparisons
        excess[size] = (ratio.var(0).sum() / a.square().sum()).item()
    assert excess[32] > 4 * excess[2]


def test_as_coded_is_pathwise_plus_zero_mean_noise():
    policy = small_policy()
    coded, path = (gradients(policy, n, rounds=150, batch=50) for n in ("as_coded", "pathwise"))
    mean, error = mean_and_error(coded - path)  # of the same trajectories
    assert (mean.abs() < 4 * error).all() and (coded - path).abs().max() > 1e-3


def test_antithetic_actions_cancel_the_noise_of_the_score_function():
    policy, estimates = small_policy(), {}
    data, _ = objective("as_coded", batch=20).collect(policy, "student", 0, Shard())
    for once, twice in zip(data, mirrored(mirrored(data))):
        torch.testing.assert_close(once.states.x_next, twice.states.x_next, atol=1e-6, rtol=0)
    for name in ("paper", "as_coded", "log_ratio"):
        o = objective(name, batch=20)
        sides = [gradient(o, policy, data=d) for d in (data, mirrored(data))]
        estimates[name] = sum(sides) / 2, (sides[0] - sides[1]).abs().max()
    pathwise = gradient(objective(batch=20), policy)
    size = pathwise.abs().max().item()
    assert estimates["paper"][1] > 0.05 * size  # one action alone is noise
    assert estimates["paper"][0].abs().max() < 1e-3 * size
    torch.testing.assert_close(estimates["as_coded"][0], pathwise, rtol=1e-3, atol=1e-3 * size)
    # a reward that depends on the action keeps the part of its noise that is even in the action
    assert (estimates["log_ratio"][0] - pathwise).abs().max() > 0.01 * size


@pytest.mark.parametrize("loss", LOSSES)
def test_a_teacher_equal_to_the_student_gives_zero_loss(loss):
    policy = small_policy()
    policy.weights["teacher"] = policy.weights["student"].detach().clone()
    o = objective(loss, micro_batch_size=200)
    terms = run(o, policy)
    assert len(terms) == (4 if loss == "pathwise" else STEPS - 1)
    assert all(value.item() == 0 for value, _ in terms)


def test_every_prompt_is_routed_to_its_own_teacher():
    tasks = {t: [Prompt(t, t)] for t in ("geneval", "ocr", "pickscore")}
    weights = {t: torch.full((2, 2), float(i)) for i, t in enumerate(tasks)}
    policy = SmallPolicy(2, student=torch.zeros(2, 2, requires_grad=True), **weights)
    config = OPDConfig(teachers={t: t for t in tasks}, mar=0.0, trained_steps=[1])
    [visited], _ = OPD(Schedule(tasks, 9), config, SAMPLER).collect(policy, "student", 0, Shard())
    states = visited.states
    for i, p in enumerate(states.prompts):
        x_t, sigma = states.x_t[i : i + 1], states.sigma[i : i + 1]
        alone = policy.velocity(x_t, sigma, None, adapter=p.task)
        torch.testing.assert_close(states.v_teacher[i], alone[0])
    assert states.v_anchor is None
    # one forward a teacher, none of them with a graph
    forwards = [call for call in policy.calls if call[0] in tasks][:3]
    assert sorted(forwards) == [(t, 3, False) for t in sorted(tasks)]
    with pytest.raises(ValueError, match="no teacher for the task pickscore"):
        OPD(Schedule(tasks, 9), OPDConfig(teachers={"geneval": "geneval", "ocr": "ocr"}), SAMPLER)


def test_the_anchor_applies_to_every_prompt():
    policy = small_policy()
    policy.weights["anchor"] = torch.ones(2, 2)
    free = gradients(policy, "pathwise", 1)
    held = gradients(policy, "pathwise", 1, mar=0.5, anchor="anchor")
    policy.weights["teacher"] = policy.weights["anchor"]
    torch.testing.assert_close(held, free + 0.5 * gradients(policy, "pathwise", 1))


def test_a_users_loss_and_weighting_are_functions():
    def huber(batch):
        return batch.weight * (batch.v_student - batch.v_teacher).abs().flatten(1).sum(1)

    def early(sigma, sigma_next, *_):
        return (torch.as_tensor(sigma) > 0.9).double()

    policy = small_policy()
    [visited], _ = objective(huber, batch=8, weighting=early).collect(policy, "student", 0, Shard())
    assert (visited.states.weight > 0).tolist() == (visited.states.sigma > 0.9).tolist()
    total = sum(loss for loss, _ in run(objective(huber, batch=8, weighting=early), policy))
    late = sum(loss for loss, _ in run(objective(huber, batch=8, weighting="uniform_v"), policy))
    assert 0 < total.item() < late.item()
    own = gradient(objective(lambda b: LOSSES["pathwise"](b), batch=8), policy)
    torch.testing.assert_close(own, gradient(objective(batch=8), policy))


def test_a_trajectory_ends_at_the_last_trained_step_and_drawn_steps_are_all_reached():
    policy = small_policy()
    for weighting in ("kl", "as_coded", "uniform_v", "x0", "ode"):
        how = {"weighting": weighting, "trained_steps": [0, 2]}
        o = objective(sampler=Sampler(STEPS, "ode"), batch=4, **how)
        policy.calls.clear()
        o.collect(policy, "student", 0, Shard())
        assert sum(name == "student" for name, _, _ in policy.calls) == 2  # steps 0 and 1
    drawn = set()
    for i in range(40):
        o = objective(batch=4, trained_steps=1, draw="iteration")
        drawn |= set(o.collect(policy, "student", i, Shard())[0][0].states.step.tolist())
    assert drawn == {0, 1, 2, 3}


@cache
def of_all_steps(loss):
    return mean_and_error(gradients(small_policy(), loss, rounds=240, mar=0.1, anchor=None))


@pytest.mark.parametrize(
    "loss, options",
    [
        ("pathwise", dict(trained_steps=1)),
        ("pathwise", dict(trained_steps=3)),
        ("pathwise", dict(trained_steps=2, draw="iteration")),
        ("pathwise+log_ratio", dict(trained_steps=1)),
        ("return_to_go", dict(trained_steps=2)),
        ("pathwise+return_to_go", dict(trained_steps=3)),
    ],
)
def test_a_few_steps_drawn_at_random_estimate_the_gradient_of_all(loss, options):
    whole, e1 = of_all_steps(loss)
    samples = gradients(small_policy(), loss, rounds=240, mar=0.1, anchor=None, **options)
    drawn, e2 = mean_and_error(samples)
    error = (e1**2 + e2**2).sqrt()
    assert ((whole - drawn).abs() < 4 * error).all() and (whole.abs() > 8 * error).any()


@pytest.mark.parametrize(
    "kind, loss",
    [("ode", "pathwise"), ("sde", "pathwise"), ("sde", "log_ratio"), ("cps", "log_ratio")],
)
def test_visited_states_are_those_of_whole_trajectories(kind, loss):
    policy = small_policy()
    o = objective(loss, sampler=Sampler(STEPS, kind), batch=12, trained_steps=2, micro_batch_size=5)
    batch = o.schedule.draw(0)
    whole = list(trajectory(policy, batch.prompts, batch.seeds, o.sampler, "student"))
    policy.calls.clear()
    data, _ = o.collect(policy, "student", 0, Shard())
    x_t, step = (torch.cat([getattr(v.states, n) for v in data]) for n in ("x_t", "step"))
    assert len(step) == 24
    for k in range(STEPS - 1):
        for x in x_t[step == k]:
            assert (whole[k].x_t - x).flatten(1).abs().sum(1).min() < 1e-5
    if loss == "log_ratio":
        x_next = torch.cat([v.states.x_next for v in data])
        for k, x in zip(step.tolist(), x_next):
            assert (whole[k].x_next - x).flatten(1).abs().sum(1).min() < 1e-5
        terms = list(o.losses(policy, "student", data, 0))
        batches = [o.forward(policy, "student", v.states[r]) for v in data for r in v.forwards]
        assert terms and all((b.ratio == 1).all() for b in batches)  # before an update, exactly
    else:
        assert set(step.tolist()) == set(range(STEPS - 1))
        # some trajectories ended before the last trained step
        assert sum(n for name, n, _ in policy.calls if name == "student") < 12 * (STEPS - 2)
        halves = [o.collect(policy, "student", 0, Shard(rank, 2))[0] for rank in (0, 1)]
        of_halves = torch.cat([v.states.step for half in halves for v in half])
        assert sorted(of_halves.tolist()) == sorted(step.tolist())  # whoever samples them


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(trained_steps=1, loss="return_to_go"), "draw at least 2"),
        (dict(draw="prompt"), "draw: Input should be 'trajectory' or 'iteration', not 'prompt'"),
        (dict(trained_steps=9), "or how many of these, not 9"),
        (dict(sampler=Sampler(5, "ode"), loss="paper"), "probabilities of actions"),
        (dict(sampler=Sampler(5, "sde", branch=True)), "for GRPO"),
    ],
)
def test_bad_settings_are_errors_before_anything_is_sampled(options, message):
    with pytest.raises(ValueError, match=message):
        objective(**{"batch": 4, **options})


def test_the_fingerprint_has_the_micro_batch_where_the_estimator_depends_on_it():
    for loss, depends in (("pathwise", False), ("log_ratio", False), ("log_ratio+as_coded", True)):
        a, b = (describe(objective(loss, 8, micro_batch_size=n)) for n in (2, 4))
        assert (a != b) == depends


def means(terms):
    names = {n for _, metrics in terms for n in metrics}
    values = {n: [m[n].reshape(-1) for _, m in terms if n in m] for n in names}
    return {n: torch.cat(v).mean().item() for n, v in values.items()}


def test_the_kl_is_reported_by_task_and_by_step():
    schedule = Schedule({"ocr": [Prompt("x", "ocr")], "geneval": [Prompt("y", "geneval")]}, 4)
    teachers = {"ocr": "teacher", "geneval": "student"}
    o = OPD(schedule, OPDConfig(teachers=teachers, mar=0.0, micro_batch_size=3), SAMPLER)
    metrics = means(run(o, small_policy()))
    steps = [f"kl_step_{k}" for k in range(STEPS - 1)]
    assert metrics["kl_geneval"] == 0 < metrics["kl_ocr"]
    assert sorted(k for k in metrics if k.startswith("kl_step")) == steps
    assert sum(metrics[s] for s in steps) / len(steps) == pytest.approx(metrics["kl"], rel=1e-5)
    assert metrics["velocity_mse_geneval"] == 0 < metrics["velocity_mse_ocr"]


@pytest.mark.parametrize(
    "options", [{}, {"trained_steps": 3}, {"trained_steps": 2, "draw": "iteration"}]
)
def test_the_reported_kl_does_not_depend_on_the_weighting(options):
    policy = small_policy()
    a, b = (run(objective(batch=12, weighting=w, **options), policy) for w in ("kl", "uniform_v"))
    assert sum(x.item() for x, _ in a) != pytest.approx(sum(x.item() for x, _ in b), rel=0.1)
    assert means(a)["kl"] == pytest.approx(means(b)["kl"], rel=1e-4)


def test_a_trajectory_without_noise_has_no_kl_and_can_be_trained_on():
    sampler = Sampler(STEPS, "ode", noise_level=0.0)
    for steps in (None, 2):
        o = objective(batch=4, sampler=sampler, weighting="uniform_v", trained_steps=steps)
        terms = run(o, small_policy())
        assert sum(loss.item() for loss, _ in terms) > 0
        assert means(terms)["velocity_mse_ocr"] > 0 and "kl" not in means(terms)


def test_the_clipped_surrogate_has_zero_gradient_beyond_the_clip():
    for advantage, ratio, flat in ((1.0, 1.2, True), (1.0, 0.8, False), (-1.0, 0.8, True)):
        r = torch.tensor(ratio, requires_grad=True)
        clipped_surrogate(torch.tensor(advantage), r, 0.1).backward()
        assert (r.grad == 0) == flat
