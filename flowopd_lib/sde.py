"""One step of the sampler as a Gaussian policy: mean, standard deviation, log-probability, KL.

diffusers' direction: `sigma = 1` is noise, `sigma = 0` is data, and the grid goes down:

    x_sigma = (1 - sigma) x0 + sigma eps,    v = eps - x0,    sigma_0 = 1 > ... > sigma_N = 0,    dt = sigma_k
                                                            - sigma_{k+1}

The SDE has the marginals of the ODE in the limit of a fine grid, except beside sigma = 1, where its noise
diverges: the first step always adds a^4/4 to the variance. CPS keeps the coefficients of signal and noise at
any grid, and the marginals at none.

Arithmetic is float32 whatever the model's dtype: in bf16 the probability of one's own action is already
wrong. Sources: Flow-GRPO 2505.05470 eq. 9 (SDE), Flow-CPS 2509.05952 (CPS), Flow-OPD 2605.08063 section 5.1.1
(KL).
"""

from __future__ import annotations

import math

import torch

KINDS = ("ode", "sde", "cps")
WEIGHTINGS = ("kl", "as_coded", "uniform_v", "x0", "ode")
REDUCTIONS = ("sum", "mean")


def predict_x0(x: torch.Tensor, v: torch.Tensor, sigma: float) -> torch.Tensor:
    """The clean latent the velocity points at: `x0_hat = x - sigma v`. Shapes (B, C, H, W)."""
    return x.float() - sigma * v.float()


def noise_scale(sigma: float, sigma_next: float, noise_level: float) -> float:
    """`s(sigma) = a sqrt(sigma / (1 - sigma))`, Flow-GRPO eq. 9; at sigma = 1 the denominator is that of the
    next sigma."""
    return noise_level * math.sqrt(sigma / (1 - (sigma_next if sigma == 1 else sigma)))


def coefficients(
    sigma: float, sigma_next: float, kind: str, noise_level: float
) -> tuple[float, float, float]:
    """(a, b, std) of `x_next ~ N(a x + b v, std^2)`. The step to sigma 0 is deterministic: noise left in a
    picture is a fault.

    Raises ValueError for an unknown kind, a grid that does not go down from at most 1 to at least 0, or noise
    too strong.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown sampler {kind!r}: choose one of {', '.join(KINDS)}")
    if not 1 >= sigma > sigma_next >= 0:
        raise ValueError(
            f"a step goes down, from at most 1 to at least 0, not from {sigma} to {sigma_next}"
        )
    dt = sigma - sigma_next
    if kind == "ode" or noise_level == 0 or sigma_next == 0:
        return 1.0, -dt, 0.0  # Euler: diffusers' step
    if kind == "sde":
        s = noise_scale(sigma, sigma_next, noise_level)
        return (
            1 - s**2 / (2 * sigma) * dt,
            -(1 + s**2 * (1 - sigma) / (2 * sigma)) * dt,
            s * math.sqrt(dt),
        )
    if not 0 <= noise_level <= 1:
        raise ValueError(f"the noise level of CPS lies in [0, 1], not at {noise_level}")
    s = sigma_next * math.sin(noise_level * math.pi / 2)
    # mean = (1 - sigma') x0_hat + kept eps_hat
    kept = math.sqrt(sigma_next**2 - s**2)
    return 1 - sigma_next + kept, -(1 - sigma_next) * sigma + kept * (1 - sigma), s


def transition(
    x: torch.Tensor,
    v: torch.Tensor,
    sigma: float,
    sigma_next: float,
    kind: str = "sde",
    noise_level: float = 0.7,
) -> tuple[torch.Tensor, float]:
    """Mean (B, C, H, W), float32, and standard deviation of one step; `std == 0` says the step is
    deterministic."""
    a, b, std = coefficients(sigma, sigma_next, kind, noise_level)
    return a * x.float() + b * v.float(), std


def _reduce(z: torch.Tensor, reduction: str) -> torch.Tensor:
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"unknown reduction {reduction!r}: choose sum (the true density) or mean (Flow-GRPO's, over the "
            "pixels)"
        )
    return z.flatten(1).sum(1) if reduction == "sum" else z.flatten(1).mean(1)


def log_prob(
    x_next: torch.Tensor, mean: torch.Tensor, std: float, reduction: str = "sum"
) -> torch.Tensor:
    """(B,): log N(x_next; mean, std^2). `sum` is the density of the whole latent; `mean`, Flow-GRPO's,
    divides it by C*H*W, which makes ratios of probabilities that far closer to 1 (hence its clip range of
    1e-4).

    Raises ValueError for a deterministic step, which has no density.
    """
    if std <= 0:
        raise ValueError(
            "a deterministic step has no log-probability; sample with noise, and leave the last step out"
        )
    z = (x_next.float() - mean.float()) / std
    return _reduce(-0.5 * z**2 - math.log(std) - 0.5 * math.log(2 * math.pi), reduction)


def gaussian_kl(
    mean_p: torch.Tensor, mean_q: torch.Tensor, std: float, reduction: str = "sum"
) -> torch.Tensor:
    """(B,): `||mean_p - mean_q||^2 / (2 std^2)`. The covariance is shared, so forward and reverse KL are the
    same."""
    if std <= 0:
        raise ValueError(
            "the KL of two deterministic steps is infinite or 0; compare noisy ones, and leave the last "
            "step out"
        )
    return _reduce((mean_p.float() - mean_q.float()) ** 2, reduction) / (2 * std**2)


def velocity_weight(
    sigma: float,
    sigma_next: float,
    weighting: str = "kl",
    kind: str = "sde",
    noise_level: float = 0.7,
    size: int = 1,
) -> float:
    """`w` such that one step's distance of two policies is `w ||v_p - v_q||^2` (summed over a latent of
    `size` numbers).

    kl         the KL itself; for the SDE it is `dt/2 (s (1 - sigma) / (2 sigma) + 1/s)^2`
    as_coded   Flow-OPD's public code: mean over the latent, and `s^2` where `std^2 = s^2 dt` belongs
    uniform_v  mean squared difference of the velocities
    x0         mean squared difference of the predicted clean latents, `sigma^2` times that
    ode        `dt^2 / 2`: half the squared distance of where the two ODE steps end (DiffusionOPD 2605.15055)
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {weighting!r}: choose one of {', '.join(WEIGHTINGS)}")
    if weighting in ("uniform_v", "x0"):
        return (sigma**2 if weighting == "x0" else 1.0) / size
    if weighting == "ode":
        return (sigma - sigma_next) ** 2 / 2
    _, b, std = coefficients(sigma, sigma_next, kind, noise_level)
    if std <= 0:
        raise ValueError(
            f"weighting {weighting!r} needs a step with noise; use uniform_v, x0 or ode for "
            "deterministic steps"
        )
    kl = b**2 / (2 * std**2)
    return kl if weighting == "kl" else kl * (sigma - sigma_next) / size
