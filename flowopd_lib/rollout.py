"""Sampling as a generator over denoising steps, so that a caller may look, learn or stop at any of
them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .config import Count, Index, NonNegative, Plugin, settings
from .data import Prompt, slices
from .policy import FlowPolicy
from .sde import (
    WEIGHTINGS,
    Kind,
    Reduction,
    Sigma,
    flow_grpo_noise,
    log_prob,
    per_row,
    predict_x0,
    transition,
)

MASK = (1 << 64) - 1


@settings
class Sampler:
    """How a trajectory is sampled: steps, kind (`ode`, `sde`, `cps`), noise level of the last two,
    guidance.

    `noise_scale`: the SDE's noise as a function (sigma, sigma_next, noise level) -> s; Flow-GRPO's
    by default. `noisy_steps`: how many steps, from `window_start`, have noise; the others are the
    ODE's, as in MixGRPO (2507.21802). None: all but the last. A pair (first, last) as
    `window_start` moves the window: its start is drawn for every iteration of a training from first
    to last (`at` gives the sampler of an iteration). With `branch` the images of a prompt share one
    ODE trajectory, from one initial noise, down to the window, and separate there (Flow-GRPO-Fast;
    from step 0, DanceGRPO's shared start).
    """

    steps: Count = 40
    kind: Kind = "ode"
    noise_level: NonNegative = 0.7
    guidance: NonNegative = 1.0  # 1 is none
    noise_scale: Plugin = flow_grpo_noise
    noisy_steps: Count | None = None
    window_start: Index | tuple[Index, Index] = 0
    branch: bool = False

    def __post_init__(self):
        if self.kind == "cps" and self.noise_level > 1:
            raise ValueError(f"the noise level of CPS lies in [0, 1], not at {self.noise_level}")
        first, last = self.window_range
        latest = self.steps - 1 - (self.noisy_steps or self.steps - 1)
        if self.steps > 1 and not first <= last <= latest:
            raise ValueError(
                f"of {self.steps} steps the last has no noise, so a window of noisy_steps "
                f"{self.noisy_steps} starts at a step from 0 to {latest}, not at "
                f"{self.window_start}"
            )
        if self.branch and not self.has_noise:
            raise ValueError("branch separates the images of a prompt by noise: sample with sde")

    @property
    def has_noise(self) -> bool:
        """Whether actions have probabilities."""
        return self.kind != "ode" and self.noise_level > 0

    @property
    def window_range(self) -> tuple[int, int]:
        return (self.window_start,) * 2 if isinstance(self.window_start, int) else self.window_start

    @property
    def trainable_steps(self) -> range:
        """Those with noise, or for the ODE all but the last."""
        first, _ = self.window_range
        return range(first, first + (self.noisy_steps or self.steps - 1))

    def at(self, iteration: int, seed: int) -> Sampler:
        """The sampler of an iteration, whose window does not move."""
        first, last = self.window_range
        if first == last:
            return self
        starts = range(first, last + 1)
        start = random.Random(f"window/{seed}/{iteration}").choice(starts)
        return replace(self, window_start=start)

    def trained_steps(
        self, which: int | list[int] | None, iteration: int = 0, seed: int = 0
    ) -> list[int]:
        """The steps that are trained: None all that have noise, a number that many of them drawn
        for every iteration, a list exactly those. Raises ValueError for steps that do not exist or
        have no noise."""
        noisy = self.trainable_steps
        if not noisy:
            raise ValueError("the last step has no noise, so take at least 2 steps to train")
        if which is None:
            return list(noisy)
        number = len(which) if isinstance(which, list) else which
        chosen = which if isinstance(which, list) else noisy
        if not 1 <= number <= len(noisy) or not set(chosen) <= set(noisy):
            raise ValueError(
                f"trained steps are numbers from {noisy[0]} to {noisy[-1]} (the others are "
                f"deterministic), or how many of these, not {which}"
            )
        if chosen is noisy:
            chosen = random.Random(f"steps/{seed}/{iteration}").sample(noisy, number)
        return sorted(chosen)

    def transition(
        self,
        x_t: torch.Tensor,
        v: torch.Tensor,
        sigma: Sigma,
        sigma_next: Sigma,
        index: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of a step. `index`: its number, outside the window of which
        the step is the ODE's; None: it is in the window."""
        kind = self.kind if index is None or index in self.trainable_steps else "ode"
        return transition(x_t, v, sigma, sigma_next, kind, self.noise_level, self.noise_scale)

    def step_weights(self, sigma: Sigma, sigma_next: Sigma, weighting) -> torch.Tensor:
        """(B,) float32: `w` of `w ||v - v'||^2` (see `sde.WEIGHTINGS`), by name or by a function of
        the same arguments. For ODE trajectories the noise is that of the SDE with the same noise
        level."""
        function = WEIGHTINGS[weighting] if isinstance(weighting, str) else weighting
        kind = "sde" if self.kind == "ode" else self.kind
        weights = function(sigma, sigma_next, kind, self.noise_level, self.noise_scale)
        return torch.as_tensor(weights).float()


@dataclass(frozen=True)
class Step:
    """One transition of a batch: from `x_t` at `sigma`, by velocity `v`, to `x_next ~ N(mean,
    std^2)` at `sigma_next`.

    Latents are (B, C, H, W) and carry no graph; `std == 0` says that the step is deterministic.
    Where images of a prompt separate, `shared` neighbours have one `x_t` and one `v`. `rows`: which
    of the trajectories it is of, if some ended before.
    """

    index: int
    sigma: float
    sigma_next: float
    x_t: torch.Tensor
    v: torch.Tensor
    x_next: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    shared: int
    rows: list[int]

    @property
    def x0_pred(self) -> torch.Tensor:
        return predict_x0(self.x_t, self.v, self.sigma)

    def log_prob(self, reduction: Reduction = "sum") -> torch.Tensor:
        """(B,): log-probability of the action taken, under the policy that took it."""
        return log_prob(self.x_next, self.mean, self.std, reduction)


def generator(seed: int) -> torch.Generator:
    """torch's generator on the CPU, for any integer from 0. torch itself uses the last 32 bits
    alone, so that trainings of different seeds, and the evaluations whose noise they must not see,
    would share theirs; what is larger is mixed down to 32 bits (splitmix64)."""
    if seed >= 1 << 32:
        z = (seed + 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
        seed = (z ^ z >> 31) >> 32
    return torch.Generator().manual_seed(seed)


class NoiseStreams:
    """Each sample's own stream of noise, drawn on the CPU: a seed gives the same noise in any
    batch, on any device."""

    def __init__(self, policy: FlowPolicy, seeds: Sequence[int]):
        self.shape, self.device = policy.latent_shape, policy.device
        self.generators = [generator(seed) for seed in seeds]

    def draw(self) -> torch.Tensor:
        noise = [torch.randn(self.shape, generator=g) for g in self.generators]
        return torch.stack(noise).to(self.device)


def initial_noise(policy: FlowPolicy, seeds: Sequence[int]) -> torch.Tensor:
    """(B, C, H, W): where the trajectories of these seeds start."""
    return NoiseStreams(policy, seeds).draw()


@torch.no_grad()
def trajectory(
    policy: FlowPolicy,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    sampler: Sampler = Sampler(),
    adapter: str | None = None,
    group: int = 1,
    ends: Sequence[int] | None = None,
) -> Iterator[Step]:
    """Yield the transitions of one batch, from noise to data or, of each sample, the first `ends`.

    A sample depends on its own prompt and seed alone. Where the sampler branches, it also depends
    on those of the first of its `group` neighbours, images of one prompt, whose steps down to the
    window are computed once.
    """
    if len(prompts) != len(seeds):
        raise ValueError(
            f"{len(prompts)} prompts with {len(seeds)} seeds; a sample has one of each"
        )
    if sampler.branch and (group < 2 or len(seeds) % group):
        raise ValueError(f"branch is for several images of a prompt, not for {group}")
    text = policy.encode([p.text for p in prompts])
    noise, grid = NoiseStreams(policy, seeds), policy.sigmas(sampler.steps)
    x_t, rows = noise.draw(), list(range(len(seeds)))
    for index, (sigma, sigma_next) in enumerate(zip(grid, grid[1:])):
        if ends is not None:
            going = [n for n, row in enumerate(rows) if ends[row] > index]
            x_t, rows = x_t[going], [rows[n] for n in going]
        if not rows:
            return
        shared = group if sampler.branch and index <= sampler.window_range[0] else 1
        if shared > 1:
            x_t = x_t[::shared].repeat_interleave(shared, 0)
        v = policy.velocity(x_t[::shared], sigma, text[rows[::shared]], sampler.guidance, adapter)
        v = v.repeat_interleave(shared, 0)
        mean, std = sampler.transition(x_t, v, sigma, sigma_next, index)
        x_next = mean + per_row(std, mean) * noise.draw()[rows] if std > 0 else mean
        yield Step(index, sigma, sigma_next, x_t, v, x_next, mean, std, shared, rows)
        x_t = x_next


def visited_states(
    policy: FlowPolicy,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    sampler: Sampler,
    adapter: str | None,
    wanted: Sequence[Sequence[int]],
) -> Iterator[tuple[int, list[int], torch.Tensor]]:
    """(step, rows, x_t of these rows): the states in which the `wanted` steps of each trajectory
    begin. A trajectory ends there at the last of them; nothing is computed for that one."""
    last, x_t = [max(steps) for steps in wanted], initial_noise(policy, seeds)
    steps = trajectory(policy, prompts, seeds, sampler, adapter, ends=last)
    for index in range(max(last) + 1):
        if rows := [i for i, of_row in enumerate(wanted) if index in of_row]:
            yield index, rows, x_t[rows]
        if index < max(last):
            step = next(steps)
            x_t = x_t.index_copy(0, torch.tensor(step.rows, device=x_t.device), step.x_next)


def sample(
    policy: FlowPolicy,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    sampler: Sampler = Sampler(),
    adapter: str | None = None,
    batch: int = 64,
) -> torch.Tensor:
    """Images (N, 3, H, W) in [0, 1] for N prompts and seeds, `batch` at a time."""
    images = []
    for rows in slices(len(seeds), batch):
        for step in trajectory(policy, prompts[rows], seeds[rows], sampler, adapter):
            pass  # no more than one is held in memory
        images.append(policy.decode(step.x_next).cpu())
    return torch.cat(images)
