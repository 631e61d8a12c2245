"""One denoising step as a Gaussian policy: mean, standard deviation, log-probability, KL.

diffusers' direction: `sigma = 1` is noise, `sigma = 0` is data, and the grid goes down:

    x_t = (1 - sigma) x0 + sigma eps,   v = eps - x0,   sigma_0 = 1 > ... > sigma_N = 0,
    dt = sigma_k - sigma_{k+1}

The SDE has the marginals of the ODE in the limit of a fine grid, except next to sigma = 1, where
its noise diverges: the first step always adds a^4/4 to the variance. CPS keeps the coefficients of
signal and noise on any grid, and the marginals on none.

`sigma` and `sigma_next` are numbers or tensors (B,): every function gives one value a row.
Coefficients are computed in float64, latents in float32 whatever the model's dtype: in bf16 the
probability of one's own action is already wrong. Sources: Flow-GRPO 2505.05470 eq. 9 (SDE),
Flow-CPS 2509.05952 (CPS), Flow-OPD 2605.08063 section 5.1.1 (KL).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch

from .config import choose

Kind = Literal["ode", "sde", "cps"]
Reduction = Literal["sum", "mean"]
Sigma = float | torch.Tensor
# (sigma, sigma_next, noise level) -> s, the scale of the SDE's noise
NoiseScale = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def per_row(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B,) or a scalar as float32 that multiplies latents (B, C, H, W)."""
    return values.to(x.device, torch.float32).reshape(-1, *[1] * (x.ndim - 1))


def predict_x0(x_t: torch.Tensor, v: torch.Tensor, sigma: Sigma) -> torch.Tensor:
    """The clean latent that the velocity points at: `x0_pred = x_t - sigma v`, (B, C, H, W)."""
    return x_t.float() - per_row(torch.as_tensor(sigma), x_t) * v.float()


def flow_grpo_noise(
    sigma: torch.Tensor, sigma_next: torch.Tensor, noise_level: float
) -> torch.Tensor:
    """`s = a sqrt(sigma / (1 - sigma))`, Flow-GRPO eq. 9; at sigma = 1 the denominator is that of
    the next sigma."""
    return noise_level * (sigma / (1 - torch.where(sigma == 1, sigma_next, sigma))).sqrt()


def coefficients(
    sigma: Sigma,
    sigma_next: Sigma,
    kind: Kind = "sde",
    noise_level: float = 0.7,
    noise_scale: NoiseScale = flow_grpo_noise,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(a, b, std) of `x_next ~ N(a x_t + b v, std^2)`, float64, each of the shape of `sigma`. The
    step to sigma 0 is deterministic: noise left in an image is a fault.

    Raises ValueError for an unknown kind, a grid that does not go down from at most 1 to at least
    0, or noise too strong.
    """
    sigma, sigma_next = (torch.as_tensor(s, dtype=torch.float64).cpu() for s in (sigma, sigma_next))
    choose("sampler", kind, get_args(Kind))
    if not ((sigma <= 1) & (sigma > sigma_next) & (sigma_next >= 0)).all():
        raise ValueError(f"a step goes down, from 1 to 0 at most, not from {sigma} to {sigma_next}")
    dt = sigma - sigma_next
    euler = torch.ones_like(sigma), -dt, torch.zeros_like(sigma)
    if kind == "ode" or noise_level == 0:
        return euler  # diffusers' step
    if kind == "sde":
        s = noise_scale(sigma, sigma_next, noise_level)
        a = 1 - s**2 / (2 * sigma) * dt
        noisy = a, -(1 + s**2 * (1 - sigma) / (2 * sigma)) * dt, s * dt.sqrt()
    else:
        s = sigma_next * math.sin(noise_level * math.pi / 2)
        # mean = (1 - sigma_next) x0_pred + kept eps_pred
        kept = (sigma_next**2 - s**2).sqrt()
        noisy = 1 - sigma_next + kept, -(1 - sigma_next) * sigma + kept * (1 - sigma), s
    return tuple(torch.where(sigma_next == 0, e, n) for e, n in zip(euler, noisy))


def transition(
    x_t: torch.Tensor,
    v: torch.Tensor,
    sigma: Sigma,
    sigma_next: Sigma,
    kind: Kind = "sde",
    noise_level: float = 0.7,
    noise_scale: NoiseScale = flow_grpo_noise,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (B, C, H, W), float32, and standard deviation, of the shape of `sigma`, of one step; 0
    says that the step is deterministic."""
    a, b, std = coefficients(sigma, sigma_next, kind, noise_level, noise_scale)
    return per_row(a, x_t) * x_t.float() + per_row(b, x_t) * v.float(), std


def log_prob(
    x_next: torch.Tensor, mean: torch.Tensor, std: Sigma, reduction: Reduction = "sum"
) -> torch.Tensor:
    """(B,): log N(x_next; mean, std^2). `sum` is the density of the whole latent; `mean`,
    Flow-GRPO's, divides it by C*H*W, which makes ratios of probabilities that much closer to 1
    (hence its clip range of 1e-4).

    Raises ValueError for a deterministic step, which has no density.
    """
    std = torch.as_tensor(std, dtype=torch.float64)
    if not (std > 0).all():
        raise ValueError("a deterministic step has no log-probability; leave the last step out")
    z = (x_next.float() - mean.float()) / per_row(std, mean)
    log_density = -0.5 * z**2 - per_row(std.log(), mean) - 0.5 * math.log(2 * math.pi)
    log_density = log_density.flatten(1)
    return log_density.sum(1) if reduction == "sum" else log_density.mean(1)


# --- weights of the steps of a trajectory


def kl_weight(
    sigma, sigma_next, kind="sde", noise_level=0.7, noise_scale=flow_grpo_noise
) -> torch.Tensor:
    """The KL of two policies that share the covariance, `||mean_p - mean_q||^2 / (2 std^2)`, over
    `||v_p - v_q||^2`: `b^2 / (2 std^2)`, for the SDE `dt/2 (s (1 - sigma) / (2 sigma) + 1/s)^2`.
    Forward and reverse KL are the same. Raises ValueError for a deterministic step."""
    _, b, std = coefficients(sigma, sigma_next, kind, noise_level, noise_scale)
    if not (std > 0).all():
        raise ValueError("the KL needs a step with noise; without it use uniform_v, x0 or ode")
    return b**2 / (2 * std**2)


def as_coded_weight(sigma, sigma_next, *how) -> torch.Tensor:
    """Flow-OPD's public code up to a constant factor: `s^2` where `std^2 = s^2 dt` belongs."""
    dt = torch.as_tensor(sigma) - torch.as_tensor(sigma_next)
    return kl_weight(sigma, sigma_next, *how) * dt


def uniform_v_weight(sigma, sigma_next, *how) -> torch.Tensor:
    """The squared difference of the velocities."""
    return torch.ones_like(torch.as_tensor(sigma, dtype=torch.float64))


def x0_weight(sigma, sigma_next, *how) -> torch.Tensor:
    """The squared difference of the predicted clean latents."""
    return torch.as_tensor(sigma, dtype=torch.float64) ** 2


def ode_weight(sigma, sigma_next, *how) -> torch.Tensor:
    """`dt^2 / 2`: half the squared distance of where the two ODE steps end (DiffusionOPD
    2605.15055)."""
    return (torch.as_tensor(sigma, dtype=torch.float64) - torch.as_tensor(sigma_next)) ** 2 / 2


# Each gives `w` such that the distance of two policies at one step is `w ||v_p - v_q||^2`, *summed*
# over the latent: called as weighting(sigma, sigma_next, kind, noise_level, noise_scale).
WEIGHTINGS = {
    "kl": kl_weight,
    "as_coded": as_coded_weight,
    "uniform_v": uniform_v_weight,
    "x0": x0_weight,
    "ode": ode_weight,
}
