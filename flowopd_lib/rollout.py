"""Sampling as a generator over steps, so that a caller may look, learn or stop at any of them."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .policy import FlowPolicy
from .prompts import Prompt
from .sde import KINDS, log_prob, predict_x0, transition


MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Step:
    """One transition of a batch: from `x` at `sigma`, by velocity `v`, to `x_next ~ N(mean, std^2)` at `sigma_next`.

    Latents are (B, C, H, W) and carry no graph; `std == 0` says the step is deterministic.
    """
    index: int
    sigma: float
    sigma_next: float
    x: torch.Tensor
    v: torch.Tensor
    x_next: torch.Tensor
    mean: torch.Tensor
    std: float

    @property
    def x0_hat(self) -> torch.Tensor:
        """The clean latent predicted at this step."""
        return predict_x0(self.x, self.v, self.sigma)

    def log_prob(self, reduction: str = "sum") -> torch.Tensor:
        """(B,): log-probability of the action taken, under the policy that took it."""
        return log_prob(self.x_next, self.mean, self.std, reduction)


@dataclass(frozen=True)
class Sampler:
    """How a trajectory is drawn: steps, kind (`ode`, `sde`, `cps`), noise level (of the last two), guidance.

    `noisy`: how many steps have noise, the others being the ODE's, as in MixGRPO (2507.21802); None: all, but for the last.
    """
    steps: int = 40
    kind: str = "ode"
    noise_level: float = .7
    guidance: float = 1.
    noisy: int | None = None

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"a trajectory needs at least one step, not {self.steps}")
        if self.kind not in KINDS:
            raise ValueError(f"unknown sampler {self.kind!r}: choose one of {', '.join(KINDS)}")
        if not self.noise_level >= 0:
            raise ValueError(f"the noise level must be at least 0, not {self.noise_level}")
        if self.kind == "cps" and self.noise_level > 1:
            raise ValueError(f"the noise level of CPS lies in [0, 1], not at {self.noise_level}")
        if not self.guidance >= 0:
            raise ValueError(f"guidance must be at least 0 (1 is none), not {self.guidance}")
        if self.noisy is not None and not 1 <= self.noisy < self.steps:
            raise ValueError(f"of {self.steps} steps, between 1 and {self.steps - 1} can have noise, not {self.noisy}")

    @property
    def trainable(self) -> int:
        """How many steps, from the first, can be trained: those with noise, or for the ODE all but the last."""
        return self.steps - 1 if self.noisy is None else self.noisy


def generator(seed: int) -> torch.Generator:
    """torch's generator on the CPU, for any whole number from 0. torch itself looks at the last 32 bits alone, so that trainings of different seeds, and
    the evaluations they must not see the noise of, would all share theirs; what is larger is mixed down to 32 bits (splitmix64)."""
    if seed >= 1 << 32:
        z = (seed + 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
        seed = (z ^ z >> 31) >> 32
    return torch.Generator().manual_seed(seed)


class NoiseStreams:
    """Each sample's own stream of noise, drawn on the CPU: a seed gives the same noise in any batch, on any device."""

    def __init__(self, policy: FlowPolicy, seeds: Sequence[int]):
        self.shape, self.device = policy.latent_shape, policy.device
        self.generators = [generator(seed) for seed in seeds]

    def draw(self) -> torch.Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


def initial_noise(policy: FlowPolicy, seeds: Sequence[int]) -> torch.Tensor:
    """(B, C, H, W): where the trajectories of these seeds start."""
    return NoiseStreams(policy, seeds).draw()


@torch.no_grad()
def trajectory(policy: FlowPolicy, prompts: Sequence[Prompt], seeds: Sequence[int], sampler: Sampler = Sampler(),
               adapter: str | None = None) -> Iterator[Step]:
    """Yield the transitions of one batch, from noise to data. A sample depends on its own prompt and seed alone."""
    text = policy.encode([p.text for p in prompts])

    def velocity(x: torch.Tensor, sigma: float, index: int) -> torch.Tensor:
        return policy.velocity(x, sigma, text, sampler.guidance, adapter)
    yield from walk(policy, velocity, prompts, seeds, sampler)


def walk(policy: FlowPolicy, velocity, prompts: Sequence[Prompt], seeds: Sequence[int], sampler: Sampler) -> Iterator[Step]:
    """`trajectory` by any `velocity(x, sigma, index)`. Where that carries a graph, the steps yielded do not."""
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts with {len(seeds)} seeds; every sample needs one of each")
    noise, grid = NoiseStreams(policy, seeds), policy.sigmas(sampler.steps)
    x = noise.draw()
    for index, (sigma, sigma_next) in enumerate(zip(grid, grid[1:])):
        v = velocity(x, sigma, index).detach()
        mean, std = transition(x, v, sigma, sigma_next, sampler.kind if index < sampler.trainable else "ode", sampler.noise_level)
        x_next = mean + std * noise.draw() if std else mean
        yield Step(index, sigma, sigma_next, x, v, x_next, mean, std)
        x = x_next


def sample(policy: FlowPolicy, prompts: Sequence[Prompt], seeds: Sequence[int], sampler: Sampler = Sampler(),
           adapter: str | None = None, batch: int = 64) -> torch.Tensor:
    """Images (N, 3, H, W) in [0, 1] for N prompts and seeds, `batch` at a time."""
    if not len(prompts) or len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts with {len(seeds)} seeds; every sample needs one of each")
    images = []
    for i in range(0, len(prompts), batch):
        for step in trajectory(policy, prompts[i:i + batch], seeds[i:i + batch], sampler, adapter):
            pass
        images.append(policy.decode(step.x_next).cpu())
    return torch.cat(images)
