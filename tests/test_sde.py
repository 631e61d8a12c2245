"""The step as a Gaussian policy, against diffusers, closed forms, torch.distributions and Monte Carlo."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flowopd_lib.sde import (
    coefficients,
    gaussian_kl,
    log_prob,
    predict_x0,
    transition,
    velocity_weight,
)


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


MEAN, SPREAD = (
    1.5,
    0.5,
)  # of the data: x0 ~ N(MEAN, SPREAD^2), so the velocity is known in closed form


def exact_velocity(x, sigma):
    variance = ((1 - sigma) * SPREAD) ** 2 + sigma**2
    away = x - (1 - sigma) * MEAN
    # E[eps | x] - E[x0 | x]
    return sigma / variance * away - (MEAN + (1 - sigma) * SPREAD**2 / variance * away)


def errors(kind, steps, n=100_000):
    """[(sigma, error of the mean, error of the standard deviation)] along the grid, against those of
    x_sigma."""
    _, sigmas = grid(steps)
    g = torch.Generator().manual_seed(1)
    x, found = torch.randn(n, 1, 1, 1, generator=g), []
    for sigma, after in zip(sigmas, sigmas[1:]):
        mean, std = transition(x, exact_velocity(x, sigma), sigma, after, kind)
        x = mean + std * torch.randn(x.shape, generator=g)
        found.append(
            (
                after,
                x.mean().item() - (1 - after) * MEAN,
                x.std().item() - math.hypot((1 - after) * SPREAD, after),
            )
        )
    return found


SAMPLING = 4 / math.sqrt(100_000)  # four standard errors of a mean, at the largest spread there is


@pytest.mark.parametrize("kind", ["ode", "sde"])
def test_marginals_are_those_of_the_interpolation_and_a_finer_grid_is_nearer(kind):
    coarse, fine = (errors(kind, steps) for steps in (10, 320))
    for i in (1, 2):
        worst = [max(abs(row[i]) for row in run if row[0] <= 0.9) for run in (coarse, fine)]
        assert worst[1] < 0.005 + SAMPLING
        assert worst[1] < worst[0] / 4 + SAMPLING


@pytest.mark.parametrize("steps", [10, 320])
def test_the_first_step_of_flow_grpo_adds_variance_however_fine_the_grid(steps):
    """s^2 dt is a^2 there for every grid, so the variance becomes (1 - a^2/2)^2 + a^2 = 1 + a^4/4, where it
    should be near 1."""
    _, _, excess = errors("sde", steps)[0]
    first = grid(steps)[1][1]
    assert excess == pytest.approx(
        math.sqrt(1 + 0.7**4 / 4) - math.hypot((1 - first) * SPREAD, first), abs=0.02 + SAMPLING
    )


def test_cps_keeps_the_coefficients_and_not_the_marginals():
    """It replaces a share of the noise at every step, by predictions that vary less than what they
    predict."""
    coarse, fine = (errors("cps", steps)[-1][2] for steps in (10, 320))
    assert coarse < fine < -0.05


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_log_probability_and_kl_against_torch_and_monte_carlo(kind):
    g = torch.Generator().manual_seed(2)
    x, v, u = (torch.randn(3, 4, 2, 2, generator=g) for _ in range(3))
    mean, std = transition(x, v, 0.8, 0.7, kind)
    other, _ = transition(x, u, 0.8, 0.7, kind)
    p, q = torch.distributions.Normal(mean, std), torch.distributions.Normal(other, std)
    action = mean + std * torch.randn(mean.shape, generator=g)
    torch.testing.assert_close(
        log_prob(action, mean, std), p.log_prob(action).flatten(1).sum(1), rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(
        log_prob(action, mean, std, "mean"), p.log_prob(action).flatten(1).mean(1)
    )
    exact = torch.distributions.kl_divergence(p, q).flatten(1).sum(1)
    torch.testing.assert_close(gaussian_kl(mean, other, std), exact)
    torch.testing.assert_close(gaussian_kl(other, mean, std), exact)
    torch.testing.assert_close(
        velocity_weight(0.8, 0.7, "kl", kind) * (v - u).square().flatten(1).sum(1), exact
    )
    actions = mean + std * torch.randn(20_000, *mean.shape, generator=g)
    sampled = (p.log_prob(actions) - q.log_prob(actions)).flatten(2).sum(2)
    error = sampled.std(0) / math.sqrt(len(actions))
    assert ((sampled.mean(0) - exact).abs() < 5 * error).all()


def test_the_formula_of_the_kl_and_what_the_public_code_makes_of_it():
    _, sigmas = grid(10)
    weights = {}
    for sigma, after in zip(sigmas[:-2], sigmas[1:-1]):
        dt, s = sigma - after, 0.7 * math.sqrt(sigma / (1 - (after if sigma == 1 else sigma)))
        assert velocity_weight(sigma, after) == pytest.approx(
            dt / 2 * (s * (1 - sigma) / (2 * sigma) + 1 / s) ** 2
        )
        weights[sigma] = (
            velocity_weight(sigma, after),
            velocity_weight(sigma, after, "as_coded", size=1024),
        )
    first, last = weights[sigmas[0]], weights[sigmas[-3]]
    assert (last[1] / last[0]) / (first[1] / first[0]) == pytest.approx(
        7, rel=0.25
    )  # METHOD.md: about 7x
    assert velocity_weight(0.5, 0.4, "x0", size=10) == pytest.approx(0.025)
    assert velocity_weight(0.5, 0.0, "uniform_v", size=10) == pytest.approx(0.1)


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_finite_from_pure_noise_to_the_last_step(kind):
    _, sigmas = grid(10)
    x, v = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    for sigma, after in zip(sigmas, sigmas[1:]):
        mean, std = transition(x, v, sigma, after, kind)
        assert mean.isfinite().all() and math.isfinite(std)
        if after:
            assert std > 0 and log_prob(x, mean, std).isfinite().all()
    assert std == 0  # no noise is left in the picture
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
        (lambda: coefficients(0.5, 0.4, "dpm", 0.7), "unknown sampler"),
        (lambda: coefficients(0.5, 0.4, "cps", 1.7), "lies in"),
        (lambda: velocity_weight(0.5, 0.4, "snr"), "unknown weighting"),
        (lambda: velocity_weight(0.5, 0.0, "kl"), "needs a step with noise"),
        (lambda: log_prob(torch.zeros(1, 1), torch.zeros(1, 1), 1.0, "max"), "unknown reduction"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
