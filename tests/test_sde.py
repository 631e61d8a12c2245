"""The step as a Gaussian policy: against diffusers, closed forms, torch and Monte Carlo."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flowopd_lib.rollout import Sampler
from flowopd_lib.sde import (
    WEIGHTINGS,
    coefficients,
    kl_weight,
    log_prob,
    per_row,
    predict_x0,
    transition,
)

pytestmark = pytest.mark.fast


def grid(steps, shift=3.0):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler, scheduler.sigmas.tolist()


@pytest.mark.parametrize("kind", ["ode", "sde", "cps"])
def test_without_noise_every_kind_is_diffusers_euler_step(kind):
    scheduler, sigmas = grid(10)
    g = torch.Generator().manual_seed(0)
    x = theirs = torch.randn(2, 4, 8, 8, generator=g)
    for k, t in enumerate(scheduler.timesteps):
        v = torch.randn(x.shape, generator=g)
        x, std = transition(x, v, sigmas[k], sigmas[k + 1], kind, noise_level=0.0)
        theirs = scheduler.step(v, t, theirs).prev_sample
        assert std == 0
        torch.testing.assert_close(x, theirs, rtol=0, atol=1e-6)


# of the data: x0 ~ N(MEAN, SPREAD^2), so the velocity is known in closed form
MEAN, SPREAD = 1.5, 0.5


def exact_velocity(x, sigma):
    variance = ((1 - sigma) * SPREAD) ** 2 + sigma**2
    away = x - (1 - sigma) * MEAN
    # E[eps | x] - E[x0 | x]
    return sigma / variance * away - (MEAN + (1 - sigma) * SPREAD**2 / variance * away)


def errors(kind, steps, n=100_000):
    """[(sigma, error of the mean, error of the standard deviation)] along the grid, against those
    of x_sigma."""
    _, sigmas = grid(steps)
    g = torch.Generator().manual_seed(1)
    x, rows = torch.randn(n, 1, 1, 1, generator=g), []
    for sigma, after in zip(sigmas, sigmas[1:]):
        mean, std = transition(x, exact_velocity(x, sigma), sigma, after, kind)
        x = mean + per_row(std, mean) * torch.randn(x.shape, generator=g)
        spread = math.hypot((1 - after) * SPREAD, after)
        rows.append((after, x.mean().item() - (1 - after) * MEAN, x.std().item() - spread))
    return rows


SAMPLING = 4 / math.sqrt(100_000)  # four standard errors of a mean, at the largest spread there is


@pytest.mark.parametrize("kind", ["ode", "sde"])
def test_marginals_are_those_of_the_interpolation_and_a_finer_grid_is_closer(kind):
    coarse, fine = (errors(kind, steps) for steps in (10, 320))
    for i in (1, 2):
        worst = [max(abs(row[i]) for row in run if row[0] <= 0.9) for run in (coarse, fine)]
        assert worst[1] < 0.005 + SAMPLING
        assert worst[1] < worst[0] / 4 + SAMPLING


@pytest.mark.parametrize("steps", [10, 320])
def test_the_first_step_of_flow_grpo_adds_variance_however_fine_the_grid(steps):
    """s^2 dt is a^2 there for every grid, so the variance becomes (1 - a^2/2)^2 + a^2 = 1 + a^4/4,
    where it should be near 1."""
    _, _, excess = errors("sde", steps)[0]
    first = grid(steps)[1][1]
    expected = math.sqrt(1 + 0.7**4 / 4) - math.hypot((1 - first) * SPREAD, first)
    assert excess == pytest.approx(expected, abs=0.02 + SAMPLING)


def test_cps_keeps_the_coefficients_and_not_the_marginals():
    """It replaces a part of the noise at every step, by predictions that vary less than what they
    predict."""
    coarse, fine = (errors("cps", steps)[-1][2] for steps in (10, 320))
    assert coarse < fine < -0.05


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_log_probability_and_kl_against_torch_and_monte_carlo(kind):
    g = torch.Generator().manual_seed(2)
    x, v, u = (torch.randn(3, 4, 2, 2, generator=g) for _ in range(3))
    mean, std = transition(x, v, 0.8, 0.7, kind)
    other, _ = transition(x, u, 0.8, 0.7, kind)
    p, q = (torch.distributions.Normal(m, std.float()) for m in (mean, other))
    action = mean + std.float() * torch.randn(mean.shape, generator=g)
    torch.testing.assert_close(
        log_prob(action, mean, std), p.log_prob(action).flatten(1).sum(1), rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(
        log_prob(action, mean, std, "mean"), p.log_prob(action).flatten(1).mean(1)
    )
    exact = torch.distributions.kl_divergence(p, q).flatten(1).sum(1)
    backward = torch.distributions.kl_divergence(q, p).flatten(1).sum(1)
    torch.testing.assert_close(backward, exact)  # the covariance is shared
    weight = kl_weight(0.8, 0.7, kind).float()
    torch.testing.assert_close(weight * (v - u).square().flatten(1).sum(1), exact)
    actions = mean + std.float() * torch.randn(20_000, *mean.shape, generator=g)
    sampled = (p.log_prob(actions) - q.log_prob(actions)).flatten(2).sum(2)
    error = sampled.std(0) / math.sqrt(len(actions))
    assert ((sampled.mean(0) - exact).abs() < 5 * error).all()


def test_every_weighting_has_the_value_computed_by_hand():
    """On the squared difference of the velocities *summed* over the latent, sigma .5 to .4: dt =
    .1, s = .7."""
    by_hand = {
        "kl": 0.05 * (0.7 * 0.5 / 1.0 + 1 / 0.7) ** 2,
        "as_coded": 0.1 * 0.05 * (0.7 * 0.5 / 1.0 + 1 / 0.7) ** 2,
        "uniform_v": 1.0,
        "x0": 0.25,
        "ode": 0.005,
    }
    assert by_hand.keys() == WEIGHTINGS.keys()
    for name, value in by_hand.items():
        assert WEIGHTINGS[name](0.5, 0.4).item() == pytest.approx(value), name
        assert Sampler(10, "ode").step_weights(0.5, 0.4, name).item() == pytest.approx(value), name
    # a user's noise
    sampler = Sampler(10, "sde", noise_scale=lambda sigma, sigma_next, a: a * sigma)
    by_hand = 0.05 * (0.35 * 0.5 + 1 / 0.35) ** 2
    assert sampler.step_weights(0.5, 0.4, "kl").item() == pytest.approx(by_hand)
    assert sampler.step_weights(0.5, 0.4, lambda sigma, *_: 3 * sigma).item() == pytest.approx(1.5)


def test_the_public_code_weighs_the_last_step_seven_times_more_against_the_first():
    _, sigmas = grid(10)
    for sigma, after in zip(sigmas[:-2], sigmas[1:-1]):
        dt, s = sigma - after, 0.7 * math.sqrt(sigma / (1 - (after if sigma == 1 else sigma)))
        by_hand = dt / 2 * (s * (1 - sigma) / (2 * sigma) + 1 / s) ** 2
        assert kl_weight(sigma, after).item() == pytest.approx(by_hand)
    first, last = ((sigmas[k], sigmas[k + 1]) for k in (0, 8))
    ratio = {n: (WEIGHTINGS[n](*last) / WEIGHTINGS[n](*first)).item() for n in ("kl", "as_coded")}
    assert ratio["as_coded"] / ratio["kl"] == pytest.approx(7, rel=0.25)


def test_a_tensor_of_sigmas_gives_each_row_its_own_step():
    _, sigmas = grid(10)
    sigma, after = (torch.tensor(s, dtype=torch.float64) for s in (sigmas[:-1], sigmas[1:]))
    x, v = torch.randn(10, 4, 2, 2), torch.randn(10, 4, 2, 2)
    for kind in ("ode", "sde", "cps"):
        mean, std = transition(x, v, sigma, after, kind)
        for k in range(10):
            one, of_one = transition(x[k : k + 1], v[k : k + 1], sigmas[k], sigmas[k + 1], kind)
            assert torch.equal(mean[k], one[0]) and std[k] == of_one


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_finite_from_pure_noise_to_the_last_step(kind):
    _, sigmas = grid(10)
    x, v = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    for sigma, after in zip(sigmas, sigmas[1:]):
        mean, std = transition(x, v, sigma, after, kind)
        assert mean.isfinite().all() and std.isfinite()
        if after:
            assert std > 0 and log_prob(x, mean, std).isfinite().all()
    assert std == 0  # no noise is left in the image
    torch.testing.assert_close(mean, predict_x0(x, v, sigma))
    with pytest.raises(ValueError, match="deterministic"):
        log_prob(x, mean, std)


def test_arithmetic_is_float32_whatever_the_model():
    x, v = torch.randn(2, 4, 4, 4).bfloat16(), torch.randn(2, 4, 4, 4).bfloat16()
    mean, _ = transition(x, v, 0.9, 0.8)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, transition(x.float(), v.float(), 0.9, 0.8)[0])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: coefficients(0.5, 0.6, "sde", 0.7), "goes down"),
        (lambda: coefficients(0.5, 0.4, "dpm", 0.7), "there is no sampler 'dpm'"),
        (lambda: kl_weight(0.5, 0.0), "needs a step with noise"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
