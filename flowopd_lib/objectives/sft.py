"""Supervised fine-tuning by flow matching: the cold start of Flow-OPD that learns from the experts'
samples."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..inputs import Count, check_fields
from ..policy import FlowPolicy
from ..prompts import Prompt
from ..rollout import Sampler, generator, trajectory
from .base import Share, check_teachers, mean_of


def teacher_samples(
    policy: FlowPolicy,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    teachers: Mapping[str, str | None],
    sampler: Sampler = Sampler(),
    batch: int = 64,
    share: Share = Share(),
) -> torch.Tensor:
    """Latents (N, C, H, W) at sigma 0: each prompt sampled by its own task's teacher; several processes deal
    the batches out among themselves."""
    check_teachers((p.task for p in prompts), teachers)
    latents = torch.zeros(len(prompts), *policy.latent_shape, device=policy.device)
    parts = []
    for task, adapter in teachers.items():
        rows = [i for i, p in enumerate(prompts) if p.task == task]
        parts += [(adapter, rows[i : i + batch]) for i in range(0, len(rows), batch)]
    for adapter, part in parts[share.rank :: share.processes]:
        for step in trajectory(
            policy, [prompts[r] for r in part], [seeds[r] for r in part], sampler, adapter
        ):
            pass
        latents[part] = step.x_next
    return share.gather(latents).unflatten(0, (share.processes, -1)).sum(0)


@dataclass
class Examples:
    prompts: list[Prompt]
    x0: torch.Tensor
    sigma: torch.Tensor
    eps: torch.Tensor
    images: int
    records: list[dict[str, torch.Tensor]] = field(default_factory=list)


@dataclass
class SFT:
    """`||v(x_sigma, sigma) - (eps - x0)||^2` on given latents, sigma from SD3's logit-normal with the model's
    shift."""

    latents: torch.Tensor
    prompts: Sequence[Prompt]
    batch: Count = 64
    micro_batch_size: Count = 64
    seed: int = 0
    updates = 1

    def __post_init__(self):
        check_fields(self)
        if len(self.latents) != len(self.prompts) or not len(self.prompts):
            raise ValueError(
                f"SFT needs one prompt for every latent, not {len(self.prompts)} for {len(self.latents)}"
            )

    @property
    def adapters(self) -> set[str]:
        return set()

    def check(self, policy: FlowPolicy, adapter: str) -> None:
        policy.check_prompts(self.prompts)

    def identity(self) -> dict:
        return {
            "latents": self.latents,
            "prompts": list(self.prompts),
            "images an update": self.batch,
            "seed": self.seed,
        }

    def collect(self, policy: FlowPolicy, adapter: str, iteration: int, share: Share) -> Examples:
        g = generator((self.seed + 1 << 40) + iteration)
        epoch, place = divmod(iteration * self.batch, len(self.prompts))
        order = [
            row
            for e in range(-(-self.batch // len(self.prompts)) + 1)
            for row in self._order(epoch + e)
        ]
        sigma = torch.sigmoid(torch.randn(self.batch, generator=g))
        shift = policy.pipeline.scheduler.config.shift
        sigma = (shift * sigma / (1 + (shift - 1) * sigma))[:, None, None, None]
        eps = torch.randn(self.batch, *policy.latent_shape, generator=g)
        mine, rows = slice(share.rank, None, share.processes), order[place : place + self.batch]
        return Examples(
            [self.prompts[r] for r in rows][mine],
            self.latents[rows][mine].to(policy.device).float(),
            sigma[mine].to(policy.device),
            eps[mine].to(policy.device),
            self.batch,
        )

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.prompts)))
        random.Random(f"sft/{self.seed}/{epoch}").shuffle(order)
        return order

    def losses(
        self, policy: FlowPolicy, adapter: str, data: Examples, update: int
    ) -> Iterator[torch.Tensor]:
        for i in range(0, len(data.prompts), self.micro_batch_size):
            rows = slice(i, i + self.micro_batch_size)
            x0, sigma, eps = data.x0[rows], data.sigma[rows], data.eps[rows]
            text = policy.encode([p.text for p in data.prompts[rows]])
            v = policy.velocity(
                (1 - sigma) * x0 + sigma * eps, sigma.flatten(), text, adapter=adapter
            )
            loss = (v - (eps - x0)).square().flatten(1).mean(1)
            data.records.append({"loss": loss.detach().mean()})
            yield loss.sum() / data.images

    def metrics(self, data: Examples) -> dict[str, float]:
        return mean_of(data.records)
