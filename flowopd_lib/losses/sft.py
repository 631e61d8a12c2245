"""Supervised fine-tuning by flow matching: the cold start of Flow-OPD that learns from the experts'
samples."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from ..config import Config, Count
from ..data import Prompt, Shard, slices
from ..policy import FlowPolicy
from ..rollout import Sampler, generator, trajectory
from ..sde import per_row
from .grpo import Term
from .opd import check_teachers


def sample_teachers(
    policy: FlowPolicy,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    teachers: Mapping[str, str | None],
    sampler: Sampler = Sampler(),
    batch: int = 64,
    guidance: Mapping[str, float] = MappingProxyType({}),
    shard: Shard = Shard(),
) -> torch.Tensor:
    """Latents (N, C, H, W) at sigma 0: each prompt sampled by its own task's teacher (`guidance`: a
    teacher's own); several processes share the batches."""
    check_teachers((p.task for p in prompts), teachers)
    latents = torch.zeros(len(prompts), *policy.latent_shape, device=policy.device)
    batches = []
    for task, adapter in teachers.items():
        rows = [i for i, p in enumerate(prompts) if p.task == task]
        batches += [(adapter, rows[i : i + batch]) for i in range(0, len(rows), batch)]
    for adapter, rows in batches[shard.rank :: shard.processes]:
        here = [prompts[r] for r in rows], [seeds[r] for r in rows]
        own = replace(sampler, guidance=guidance.get(adapter, sampler.guidance))
        for step in trajectory(policy, *here, own, adapter):
            pass
        latents[rows] = step.x_next
    return shard.gather(latents).unflatten(0, (shard.processes, -1)).sum(0)


class SFTConfig(Config):
    """`samples` of each prompt's own teacher in `steps` denoising steps (None: as in evaluations),
    of all tasks or of some; `batch` images an update."""

    samples: Count = 96
    steps: Count | None = None
    tasks: list[str] | None = None
    batch: Count = 48
    micro_batch_size: Count = 64


@dataclass
class Examples:
    """Noisy latents and the velocities to learn, of an update of `images` over all processes."""

    prompts: list[Prompt]
    x_t: torch.Tensor
    sigma: torch.Tensor
    target: torch.Tensor
    images: int


class SFT:
    """`||v(x_t, sigma) - (eps - x0)||^2` on given latents, sigma from SD3's logit-normal with the
    model's shift."""

    updates = 1
    adapters = frozenset()

    def __init__(
        self,
        latents: torch.Tensor,
        prompts: Sequence[Prompt],
        config: SFTConfig = SFTConfig(),
        seed: int = 0,
    ):
        self.latents, self.prompts, self.config, self.seed = latents, list(prompts), config, seed

    def check(self, policy: FlowPolicy, adapter: str) -> None:
        policy.check_prompts(self.prompts)

    def identity(self) -> dict:
        data = {"latents": self.latents, "prompts": self.prompts}
        return {**data, "images an update": self.config.batch, "seed": self.seed}

    def collect(
        self, policy: FlowPolicy, adapter: str, iteration: int, shard: Shard
    ) -> tuple[Examples, dict[str, float]]:
        n, g = self.config.batch, generator((self.seed + 1 << 40) + iteration)
        epoch, position = divmod(iteration * n, len(self.prompts))
        epochs = range(epoch, epoch - (-n // len(self.prompts)) + 1)
        order = []
        for e in epochs:
            rows = list(range(len(self.prompts)))
            random.Random(f"sft/{self.seed}/{e}").shuffle(rows)
            order += rows
        sigma = torch.sigmoid(torch.randn(n, generator=g))
        shift = policy.pipeline.scheduler.config.shift
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        eps = torch.randn(n, *policy.latent_shape, generator=g)
        mine, rows = slice(shard.rank, None, shard.processes), order[position : position + n]
        x0, sigma, eps = (
            t.to(policy.device).float() for t in (self.latents[rows][mine], sigma[mine], eps[mine])
        )
        at = per_row(sigma, x0)
        prompts = [self.prompts[r] for r in rows][mine]
        return Examples(prompts, (1 - at) * x0 + at * eps, sigma, eps - x0, n), {}

    def losses(
        self, policy: FlowPolicy, adapter: str, data: Examples, update: int
    ) -> Iterator[Term]:
        for rows in slices(len(data.prompts), self.config.micro_batch_size):
            text = policy.encode([p.text for p in data.prompts[rows]])
            v = policy.velocity(data.x_t[rows], data.sigma[rows], text, adapter=adapter)
            loss = (v - data.target[rows]).square().flatten(1).mean(1)
            yield loss.sum() / data.images, {"flow_matching_loss": loss.detach()}
