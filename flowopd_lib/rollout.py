"""Sampling as a generator over steps, so that a caller may look, plot or stop at any of them."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .policy import FlowPolicy
from .prompts import Prompt
from .sde import ode_step, predict_x0


@dataclass(frozen=True)
class Step:
    """One transition of a batch: from `x` at `sigma`, by velocity `v`, to `x_next` at `sigma_next`; all (B, C, H, W)."""
    index: int
    sigma: float
    sigma_next: float
    x: torch.Tensor
    v: torch.Tensor
    x_next: torch.Tensor

    @property
    def x0_hat(self) -> torch.Tensor:
        """The clean latent predicted at this step."""
        return predict_x0(self.x, self.v, self.sigma)


def initial_noise(policy: FlowPolicy, seeds: Sequence[int]) -> torch.Tensor:
    """(B, C, H, W): each sample's own stream, drawn on the CPU, so a seed gives the same noise in any batch, anywhere."""
    return torch.stack([torch.randn(policy.latent_shape, generator=torch.Generator().manual_seed(seed))
                        for seed in seeds]).to(policy.device)


@torch.no_grad()
def trajectory(policy: FlowPolicy, prompts: Sequence[Prompt], seeds: Sequence[int], steps: int = 40,
               guidance: float = 1.0) -> Iterator[Step]:
    """Yield the `steps` ODE transitions of one batch, from noise to data."""
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts with {len(seeds)} seeds; every sample needs one of each")
    text, x, grid = policy.encode([p.text for p in prompts]), initial_noise(policy, seeds), policy.sigmas(steps)
    for index, (sigma, sigma_next) in enumerate(zip(grid, grid[1:])):
        v = policy.velocity(x, sigma, text, guidance)
        x_next = ode_step(x, v, sigma, sigma_next)
        yield Step(index, sigma, sigma_next, x, v, x_next)
        x = x_next


def sample(policy: FlowPolicy, prompts: Sequence[Prompt], seeds: Sequence[int], steps: int = 40, guidance: float = 1.0,
           batch: int = 64) -> torch.Tensor:
    """Images (N, 3, H, W) in [0, 1] for N prompts and seeds, `batch` at a time."""
    if not len(prompts) or len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts with {len(seeds)} seeds; every sample needs one of each")
    images = []
    for i in range(0, len(prompts), batch):
        for step in trajectory(policy, prompts[i:i + batch], seeds[i:i + batch], steps, guidance):
            pass
        images.append(policy.decode(step.x_next).cpu())
    return torch.cat(images)
