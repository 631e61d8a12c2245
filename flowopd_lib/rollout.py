"""Sampling as a generator over steps, so that a caller may look, learn or stop at any of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .inputs import Count, NotNegative, Whole, check_fields, one_of
from .policy import FlowPolicy
from .prompts import Prompt
from .sde import KINDS, log_prob, predict_x0, transition

MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Step:
    """One transition of a batch: from `x` at `sigma`, by velocity `v`, to `x_next ~ N(mean, std^2)` at
    `sigma_next`.

    Latents are (B, C, H, W) and carry no graph; `std == 0` says the step is deterministic. Where images of a
    prompt part, `shared` neighbours have one `x` and one `v`.
    """

    index: int
    sigma: float
    sigma_next: float
    x: torch.Tensor
    v: torch.Tensor
    x_next: torch.Tensor
    mean: torch.Tensor
    std: float
    shared: int = 1

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

    `noisy`: how many steps, from `first`, have noise, the others being the ODE's, as in MixGRPO (2507.21802);
    None: all, but for the last. With `last` the window moves: it begins at a step from `first` to `last`,
    drawn anew for every iteration of a training or, with `slide`, one later every so many iterations and then
    from `first` again (`at` says which). With `branch` the images of a prompt share one walk of the ODE, from
    one initial noise, down to the window, and part there (Flow-GRPO-Fast; from step 0, DanceGRPO's shared
    start).
    """

    steps: Count = 40
    kind: one_of(*KINDS) = "ode"
    noise_level: NotNegative = 0.7
    guidance: NotNegative = 1.0  # 1 is none
    noisy: int | None = None
    first: int = 0
    last: int | None = None
    slide: Whole = 0  # iterations
    branch: bool = False

    def __post_init__(self):
        check_fields(self)
        if self.kind == "cps" and self.noise_level > 1:
            raise ValueError(f"the noise level of CPS lies in [0, 1], not at {self.noise_level}")
        if self.noisy is not None and not 1 <= self.noisy < self.steps:
            raise ValueError(
                f"of {self.steps} steps, between 1 and {self.steps - 1} can have noise, not {self.noisy}"
            )
        latest = self.steps - 1 - len(self.window)
        if (
            self.steps > 1
            and not 0 <= self.first <= (self.first if self.last is None else self.last) <= latest
        ):
            raise ValueError(
                f"a window of {len(self.window)} noisy steps in a walk of {self.steps}, whose last has "
                f"none, begins at a step from 0 to {latest}, "
                f"not {self.first}" + (f" to {self.last}" if self.last is not None else "")
            )
        if self.slide and self.last is None:
            raise ValueError(
                f"slide ({self.slide} iterations) needs last, where the window turns back"
            )
        if self.branch and not self.explores:
            raise ValueError(
                "branch lets the images of a prompt part by noise: sample with sde or cps at a positive "
                "noise level"
            )

    @property
    def explores(self) -> bool:
        """Whether there is noise in a walk: actions then have probabilities."""
        return self.kind != "ode" and self.noise_level > 0

    @property
    def window(self) -> range:
        """The steps that can be trained: those with noise, or for the ODE all but the last."""
        return range(
            self.first, self.first + (self.steps - 1 if self.noisy is None else self.noisy)
        )

    def at(self, iteration: int, seed: int) -> Sampler:
        """The sampler of an iteration, whose window stands still."""
        if self.last is None:
            return self
        places = range(self.first, self.last + 1)
        first = (
            places[iteration // self.slide % len(places)]
            if self.slide
            else random.Random(f"window/{seed}/{iteration}").choice(places)
        )
        return replace(self, first=first, last=None, slide=0)

    def step(self, x: torch.Tensor, v: torch.Tensor, index: int, grid: Sequence[float]):
        """`transition` at a step of the grid: by noise in the window, by the ODE elsewhere."""
        kind = self.kind if index in self.window else "ode"
        return transition(x, v, grid[index], grid[index + 1], kind, self.noise_level)


def generator(seed: int) -> torch.Generator:
    """torch's generator on the CPU, for any whole number from 0. torch itself looks at the last 32 bits
    alone, so that trainings of different seeds, and the evaluations they must not see the noise of, would all
    share theirs; what is larger is mixed down to 32 bits (splitmix64)."""
    if seed >= 1 << 32:
        z = (seed + 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
        seed = (z ^ z >> 31) >> 32
    return torch.Generator().manual_seed(seed)


class NoiseStreams:
    """Each sample's own stream of noise, drawn on the CPU: a seed gives the same noise in any batch, on any
    device."""

    def __init__(self, policy: FlowPolicy, seeds: Sequence[int]):
        self.shape, self.device = policy.latent_shape, policy.device
        self.generators = [generator(seed) for seed in seeds]

    def draw(self) -> torch.Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(
            self.device
        )


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
) -> Iterator[Step]:
    """Yield the transitions of one batch, from noise to data. A sample depends on its own prompt and seed
    alone or, where the sampler branches, on those of the first of its `group` neighbours, images of one
    prompt, too: on its way to the window, which is walked once a prompt."""
    text = policy.encode([p.text for p in prompts])

    def velocity(x: torch.Tensor, sigma: float, index: int) -> torch.Tensor:
        return policy.velocity(x, sigma, text[:: len(prompts) // len(x)], sampler.guidance, adapter)

    yield from walk(policy, velocity, prompts, seeds, sampler, group)


def walk(
    policy: FlowPolicy,
    velocity,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    sampler: Sampler,
    group: int = 1,
) -> Iterator[Step]:
    """`trajectory` by any `velocity(x, sigma, index)`. Where that carries a graph, the steps yielded do
    not."""
    if len(prompts) != len(seeds):
        raise ValueError(
            f"{len(prompts)} prompts with {len(seeds)} seeds; every sample needs one of each"
        )
    if sampler.branch and (group < 2 or len(seeds) % group):
        raise ValueError(
            f"branch is for several images of a prompt that share a walk, not for {group}; sample without "
            "it, or more images a prompt"
        )
    noise, grid = NoiseStreams(policy, seeds), policy.sigmas(sampler.steps)
    x = noise.draw()
    for index, (sigma, sigma_next) in enumerate(zip(grid, grid[1:])):
        shared = group if sampler.branch and index <= sampler.first else 1
        if shared > 1:
            x = x[::shared].repeat_interleave(shared, 0)
        v = velocity(x[::shared], sigma, index).detach().repeat_interleave(shared, 0)
        mean, std = sampler.step(x, v, index, grid)
        x_next = mean + std * noise.draw() if std else mean
        yield Step(index, sigma, sigma_next, x, v, x_next, mean, std, shared)
        x = x_next


@torch.no_grad()
def states(
    policy: FlowPolicy,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    sampler: Sampler,
    adapter: str | None,
    wanted: Sequence[Sequence[int]],
) -> Iterator[tuple[int, list[int], torch.Tensor]]:
    """(step, rows, x): the states in which the steps `wanted` of each walk begin. A walk ends there at the
    last of its own; those of `trajectory` go on."""
    text = policy.encode([p.text for p in prompts])
    noise, grid = NoiseStreams(policy, seeds), policy.sigmas(sampler.steps)
    x, last = noise.draw(), [max(steps) for steps in wanted]
    for index in range(max(last) + 1):
        here = [i for i, steps in enumerate(wanted) if index in steps]
        on = [i for i, end in enumerate(last) if end > index]
        if here:
            yield index, here, x[here]
        if on:
            v = policy.velocity(x[on], grid[index], text[on], sampler.guidance, adapter)
            mean, std = sampler.step(x[on], v, index, grid)
            x[on] = mean + std * noise.draw()[on] if std else mean


def sample(
    policy: FlowPolicy,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    sampler: Sampler = Sampler(),
    adapter: str | None = None,
    batch: int = 64,
) -> torch.Tensor:
    """Images (N, 3, H, W) in [0, 1] for N prompts and seeds, `batch` at a time."""
    if not len(prompts) or len(prompts) != len(seeds):
        raise ValueError(
            f"{len(prompts)} prompts with {len(seeds)} seeds; every sample needs one of each"
        )
    images = []
    for i in range(0, len(prompts), batch):
        for step in trajectory(
            policy, prompts[i : i + batch], seeds[i : i + batch], sampler, adapter
        ):
            pass
        images.append(policy.decode(step.x_next).cpu())
    return torch.cat(images)
