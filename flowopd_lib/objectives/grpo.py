"""GRPO on flow models (Flow-GRPO 2505.05470): the experts of stage 1, and the mixed-reward baselines.

    A = (r - mean of the group) / std,   loss = -min(rho A, clip(rho, 1 - c, 1 + c) A) + beta KL(student ||
                                         reference)

with rho the ratio of the probabilities of an action now and when it was taken, averaged over images and
trained steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields

import torch

from ..inputs import Count, NotNegative, Positive, one_of
from ..policy import FlowPolicy
from ..prompts import Prompt
from ..rewards import Reward, attribute
from ..rollout import Sampler, Step, trajectory
from ..schedule import Batch, Schedule
from ..sde import REDUCTIONS, velocity_weight
from .base import Share, check_settings, log_ratio, mean_of, squared, surrogate, trained_steps

NORMALISATIONS = ("batch", "group", "gdpo", "none")


def advantages(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    group: int,
    normalise: str = "batch",
    share: Share = Share(),
    limit: float = 5.0,
) -> torch.Tensor:
    """(B,) from rewards (B, R), groups of `group` neighbours, and weights (B, R).

    batch   the weighted sum, centred in its group, over the standard deviation of the whole batch (Flow-GRPO)
    group   the same over the group's own
    gdpo    each reward normalised in its group first, then weighed and added, then over the batch's deviation
            (GDPO)
    none    centred only: the gradient then is in units of the reward

    A reward that does not vary gives no advantage. Clipped to +-`limit`.
    """
    if normalise not in NORMALISATIONS:
        raise ValueError(
            f"unknown normalisation {normalise!r}: choose one of {', '.join(NORMALISATIONS)}"
        )
    if normalise == "gdpo":
        grouped = rewards.unflatten(0, (len(rewards) // group, group))
        rewards = (
            (grouped - grouped.mean(1, keepdim=True))
            / (grouped.std(1, keepdim=True, correction=0) + 1e-4)
        ).flatten(0, 1)
    total = (rewards * weights).sum(1).unflatten(0, (len(rewards) // group, group))
    centred = total - total.mean(1, keepdim=True)
    if normalise == "none":
        return centred.flatten()
    spread = (
        centred.std(1, keepdim=True, correction=0)
        if normalise == "group"
        else share.gather(total.flatten()).std(correction=0)
    )
    return (centred / (spread + 1e-4)).flatten().clamp(-limit, limit)


@dataclass(frozen=True)
class Rollout:
    """One chunk of an iteration: its prompts, the trained steps, (B,) advantages, the update that learns from
    it and how many images that has."""

    prompts: list[Prompt]
    steps: list[Step]
    advantages: torch.Tensor
    update: int
    images: int


@dataclass
class Collected:
    parts: list[Rollout]
    rewards: dict[str, float]
    records: list[dict[str, torch.Tensor]] = field(default_factory=list)


@dataclass
class GRPO:
    """`reward_weights` maps a reward's name to its weight, for every task or (nested) by task: `{"geneval":
    {"GenEval": .8, "DeQA": .2}}`.

    `updates` optimizer updates an iteration, each on its own part of the prompts. `reduction` and `clip`
    belong together: the mean over a latent (Flow-GRPO) brings ratios within 1e-4 of 1, the sum does not.
    `beta` weighs the KL to `reference` (an adapter; None is the base). `micro_batch_size`: images in one forward, in
    rollout and training alike, so that ratios are exact.
    """

    schedule: Schedule
    rewards: Mapping[str, Reward]
    reward_weights: Mapping[str, float | Mapping[str, float]]
    sampler: Sampler = Sampler(10, "sde")
    updates: Count = 2
    normalise: one_of(*NORMALISATIONS) = "batch"
    reduction: one_of(*REDUCTIONS) = "mean"
    clip: Positive = 1e-4
    beta: NotNegative = 0.04
    reference: str | None = None
    steps: int | tuple[int, ...] | None = None
    micro_batch_size: Count = 64

    def __post_init__(self):
        check_settings(self)
        if not self.sampler.explores:
            raise ValueError(
                "GRPO explores by noise: sample with sde or cps at a positive noise level"
            )
        if self.schedule.repeats < 2:
            raise ValueError(
                "GRPO compares the images of a prompt: images_per_prompt must be at least 2"
            )
        trained_steps(self.sampler.at(0, 0), self.steps, 0, 0)
        if self.sampler.last is not None and isinstance(self.steps, tuple):
            raise ValueError(
                "the window moves, so its steps cannot be trained by their numbers; leave steps out, or last"
            )
        for task in self.schedule.prompts:
            unknown = set(self.weights_of(task)) - set(self.rewards)
            if unknown or not self.weights_of(task):
                raise ValueError(
                    f"the rewards of {task} name {', '.join(sorted(unknown)) or 'nothing'}; the rewards are "
                    f"{', '.join(self.rewards)}"
                )
            for name in self.weights_of(task):
                if attribute(self.rewards[name], "held_out"):
                    raise ValueError(
                        f"{name} is an held-out reward, by which nothing may be trained; the rewards of {task} "
                        "name it"
                    )

    def weights_of(self, task: str) -> dict[str, float]:
        nested = any(isinstance(w, Mapping) for w in self.reward_weights.values())
        return dict(self.reward_weights.get(task, {}) if nested else self.reward_weights)

    @property
    def adapters(self) -> set[str]:
        return {self.reference} - {None} if self.beta else set()

    def check(self, policy: FlowPolicy, adapter: str) -> None:
        policy.check_adapters(self.adapters - {adapter})
        policy.check_prompts(self.schedule.every)

    def identity(self) -> dict:
        used = {name for task in self.schedule.prompts for name in self.weights_of(task)}
        return {
            **{f.name: getattr(self, f.name) for f in fields(self) if f.name != "micro_batch_size"},
            "rewards": {n: self.rewards[n] for n in sorted(used)},
        }

    def collect(self, policy: FlowPolicy, adapter: str, iteration: int, share: Share) -> Collected:
        repeats = self.schedule.repeats
        batch = share.of(self.schedule.draw(iteration), repeats)
        sampler = self.sampler.at(iteration, self.schedule.seed)
        keep = trained_steps(sampler, self.steps, iteration, self.schedule.seed)
        walks, images = [], []
        # Images that share a walk stay together.
        micro_batch_size = (
            max(self.micro_batch_size // repeats, 1) * repeats
            if sampler.branch
            else self.micro_batch_size
        )
        pieces = share.updates_of(self.schedule.size, repeats, self.updates, micro_batch_size)
        for _, rows, _ in pieces:
            steps = [
                *trajectory(
                    policy, batch.prompts[rows], batch.seeds[rows], sampler, adapter, repeats
                )
            ]
            images.append(policy.decode(steps[-1].x_next).cpu())
            walks.append([steps[k] for k in keep])
        rewards, weights, seen = self.score(torch.cat(images) if images else torch.empty(0), batch)
        advantage = advantages(rewards, weights, repeats, self.normalise, share).to(policy.device)
        return Collected(
            [
                Rollout(batch.prompts[rows], steps, advantage[rows], update, n)
                for (update, rows, n), steps in zip(pieces, walks)
            ],
            seen,
        )

    def score(
        self, images: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        """Rewards (B, R) divided by the rewards' scales, weights (B, R), and each reward's mean in its own
        units. A reward that fails raises."""
        names = sorted({name for p in batch.prompts for name in self.weights_of(p.task)})
        rewards, weights, seen = (
            torch.zeros(len(batch), len(names)),
            torch.zeros(len(batch), len(names)),
            {},
        )
        for column, name in enumerate(names):
            rows = [i for i, p in enumerate(batch.prompts) if name in self.weights_of(p.task)]
            values = torch.as_tensor(
                self.rewards[name](images[rows], [batch.prompts[i] for i in rows]),
                dtype=torch.float32,
            )
            if not values.isfinite().all():
                raise ValueError(
                    f"{name} gave a reward that is not a number; a failure is never turned into a reward"
                )
            rewards[rows, column] = values / attribute(self.rewards[name], "scale")
            weights[rows, column] = torch.tensor(
                [float(self.weights_of(batch.prompts[i].task)[name]) for i in rows]
            )
            seen[name] = values.mean().item()
        return rewards, weights, seen

    def losses(
        self, policy: FlowPolicy, adapter: str, data: Collected, update: int
    ) -> Iterator[torch.Tensor]:
        for part in (p for p in data.parts if p.update == update):
            text = policy.encode([p.text for p in part.prompts])
            for step in part.steps:
                loss = self._loss(policy, adapter, text, step, part.advantages, data.records)
                yield loss.sum() / (part.images * len(part.steps))

    def _loss(self, policy, adapter, text, step: Step, advantage, records) -> torch.Tensor:
        """(B,): the clipped surrogate and the penalty of one step."""
        s, size = self.sampler, step.x[0].numel()
        one = slice(None, None, step.shared)  # where images part they have one state
        asked = step.x[one], step.sigma, text[one], s.guidance
        v = policy.velocity(*asked, adapter).repeat_interleave(step.shared, 0)
        ratio = log_ratio(step, v, s, self.reduction).exp()
        loss = surrogate(advantage, ratio, self.clip)
        with torch.no_grad():
            records.append(
                {
                    "ratio_error": (ratio - 1).abs().mean(),
                    "clipped": ((ratio - 1).abs() > self.clip).float().mean(),
                }
            )
        if self.beta:
            with torch.no_grad():
                reference = policy.velocity(*asked, self.reference).repeat_interleave(
                    step.shared, 0
                )
            weight = velocity_weight(step.sigma, step.sigma_next, "kl", s.kind, s.noise_level)
            kl = weight * squared(v, reference)
            records[-1]["kl"] = kl.detach().mean()
            loss = loss + self.beta * (kl / size if self.reduction == "mean" else kl)
        return loss

    def metrics(self, data: Collected) -> dict[str, float]:
        return {**data.rewards, **mean_of(data.records)}
