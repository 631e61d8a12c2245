"""One step of the sampler. diffusers' direction: `sigma = 1` is noise, `sigma = 0` is data (METHOD.md, conventions).

    x_sigma = (1 - sigma) x0 + sigma eps,    v = eps - x0,    sigma_0 = 1 > ... > sigma_N = 0

Arithmetic is float32 whatever the model's dtype: in bf16 the probability of one's own action is already wrong.
"""
from __future__ import annotations

import torch


def predict_x0(x: torch.Tensor, v: torch.Tensor, sigma: float) -> torch.Tensor:
    """The clean latent the velocity points at: `x0_hat = x - sigma v`. Shapes (B, C, H, W)."""
    return x.float() - sigma * v.float()


def ode_step(x: torch.Tensor, v: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
    """Euler's step of the probability-flow ODE, `x + (sigma_next - sigma) v`: diffusers' FlowMatchEulerDiscreteScheduler."""
    return x.float() + (sigma_next - sigma) * v.float()
