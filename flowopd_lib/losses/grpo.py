"""GRPO on flow models (Flow-GRPO 2505.05470): the experts of stage 1, and the mixed-reward
baselines.

    A = (r - mean of the group) / std
    loss = -min(rho A, clip(rho, 1 - c, 1 + c) A) + beta KL(student || reference)

with rho the ratio of the probabilities of an action now and when it was taken, averaged over images
and trained steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import model_validator

from ..config import Config, Count, NonNegative, Plugin, Positive, choose, refuse_unused
from ..data import Batch, Prompt, Schedule, Shard
from ..policy import FlowPolicy
from ..rewards import Reward, attribute, score_images
from ..rollout import Sampler, Step, trajectory
from ..sde import Reduction, log_prob

# One term of an update's loss with its graph, and detached metrics: scalars, or (B,) one value a
# row.
Term = tuple[torch.Tensor, dict[str, torch.Tensor]]
Normalisation = Literal["batch", "group", "gdpo"]
ADVANTAGE_LIMIT = 5.0


def advantages(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    group: int,
    normalise: Normalisation = "batch",
    shard: Shard = Shard(),
) -> torch.Tensor:
    """(B,) from rewards (B, R), groups of `group` neighbours, and weights (B, R); clipped to +-5.

    batch   the weighted sum, centred in its group, over the standard deviation of the whole batch
            (Flow-GRPO)
    group   the same over the group's own
    gdpo    each reward normalised in its group first, then weighed and added, then over the batch's
            deviation (GDPO)

    A reward that does not vary gives no advantage.
    """
    if normalise == "gdpo":
        grouped = rewards.unflatten(0, (-1, group))
        centred = grouped - grouped.mean(1, keepdim=True)
        rewards = (centred / (grouped.std(1, keepdim=True, correction=0) + 1e-4)).flatten(0, 1)
    total = (rewards * weights).sum(1).unflatten(0, (-1, group))
    centred = total - total.mean(1, keepdim=True)
    std = (
        centred.std(1, keepdim=True, correction=0)
        if normalise == "group"
        else shard.gather(total.flatten()).std(correction=0)
    )
    return (centred / (std + 1e-4)).flatten().clamp(-ADVANTAGE_LIMIT, ADVANTAGE_LIMIT)


@dataclass
class GRPOBatch:
    """What a loss function sees: B images of one forward at one trained step.

    `ratio` (B,) carries the graph, as does `v_student`; `kl` (B,) is that of the step to the
    reference, 0 without one. `step` has x_t, sigma, the action x_next and its mean and std when it
    was taken.
    """

    step: Step
    v_student: torch.Tensor
    v_reference: torch.Tensor | None
    ratio: torch.Tensor
    advantages: torch.Tensor
    kl: torch.Tensor
    clip: float
    beta: float


def clipped_surrogate(advantage: torch.Tensor, ratio: torch.Tensor, clip: float) -> torch.Tensor:
    """`-min(rho A, clip(rho, 1 - c, 1 + c) A)`."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def clipped_loss(batch: GRPOBatch) -> torch.Tensor:
    """(B,): the clipped surrogate and the KL penalty."""
    return clipped_surrogate(batch.advantages, batch.ratio, batch.clip) + batch.beta * batch.kl


LOSSES = {"clipped": clipped_loss}


def find_loss(losses: Mapping[str, Callable], name: str | Callable) -> Callable:
    """A loss of a table by its name, several added up (`a+b`), or a user's own function. Raises
    ValueError."""
    if callable(name):
        return name
    terms = [losses[choose("loss", part, losses)] for part in name.split("+")]
    return lambda batch: sum(term(batch) for term in terms)


def check_updates(updates: int, schedule: Schedule) -> None:
    if updates > schedule.prompts_per_batch:
        raise ValueError(
            f"{updates} updates need as many prompts in an iteration, not "
            f"{schedule.prompts_per_batch}; lower updates or raise prompts_per_batch"
        )


def squared_distance(v: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(B,): `||v - other||^2`, summed over the latent."""
    return (v - other).square().flatten(1).sum(1)


class GRPOConfig(Config):
    """`reward_weights` maps a reward's name to its weight, for every task or (nested) by task:
    `{"geneval": {"GenEval": 0.8, "DeQA": 0.2}}`.

    `updates` optimizer updates an iteration, each on its own part of the prompts. `reduction` and
    `clip` belong together: the mean over a latent (Flow-GRPO) brings ratios within 1e-4 of 1, the
    sum does not. `beta` weighs the KL to `reference` (an adapter; None is the base).
    `trained_steps`: all with noise, so many drawn for every iteration, or exactly these.
    `micro_batch_size`: images in one forward, in rollout and training alike, so that ratios are
    exact. `loss`: one of LOSSES, or a function of a `GRPOBatch`.
    """

    reward_weights: Mapping[str, float | Mapping[str, float]] = {}
    updates: Count = 2
    normalise: Normalisation = "batch"
    reduction: Reduction = "mean"
    clip: Positive = 1e-4
    beta: NonNegative = 0.04
    reference: str | None = None
    trained_steps: Count | list[int] | None = None
    micro_batch_size: Count = 64
    loss: Plugin = "clipped"

    @model_validator(mode="after")
    def _effects(self):
        if not self.beta:
            refuse_unused(self, reference="with beta 0")
        return self


@dataclass
class Rollout:
    """One micro-batch of an iteration: its prompts, the trained steps, (B,) advantages, the update
    that learns from it and how many images that has over all processes."""

    prompts: list[Prompt]
    steps: list[Step]
    advantages: torch.Tensor
    update: int
    images: int


class GRPO:
    """The objective. `rewards` are those that `reward_weights` names, by name."""

    def __init__(
        self,
        schedule: Schedule,
        rewards: Mapping[str, Reward],
        config: GRPOConfig,
        sampler: Sampler = Sampler(10, "sde"),
    ):
        self.schedule, self.rewards, self.config, self.sampler = schedule, rewards, config, sampler
        self.updates, self.loss = config.updates, find_loss(LOSSES, config.loss)
        check_updates(config.updates, schedule)
        if not sampler.has_noise:
            raise ValueError("GRPO explores by noise: sample with sde or cps and a noise_level")
        if schedule.images_per_prompt < 2:
            raise ValueError(
                "GRPO compares images of a prompt: images_per_prompt must be at least 2"
            )
        first, last = sampler.window_range
        if first != last and isinstance(config.trained_steps, list):
            raise ValueError("the window of noisy steps moves: leave trained_steps out")
        sampler.at(0, 0).trained_steps(config.trained_steps)
        for task in schedule.prompts:
            weights = self.weights_of(task)
            for name in weights:
                choose(f"reward (reward_weights of {task})", name, rewards)
                if attribute(rewards[name], "held_out"):
                    raise ValueError(f"{name} is a held-out reward: nothing may be trained on it")
            if not weights:
                raise ValueError(f"reward_weights has no reward for {task}")

    def weights_of(self, task: str) -> dict[str, float]:
        weights = self.config.reward_weights
        nested = any(isinstance(w, Mapping) for w in weights.values())
        return dict(weights.get(task, {}) if nested else weights)

    @property
    def adapters(self) -> set[str]:
        return {self.config.reference} - {None} if self.config.beta else set()

    def check(self, policy: FlowPolicy, adapter: str) -> None:
        policy.check_adapters(self.adapters - {adapter})
        policy.check_prompts(self.schedule.all_prompts)

    def identity(self) -> dict:
        used = {name for task in self.schedule.prompts for name in self.weights_of(task)}
        rewards = {name: self.rewards[name] for name in sorted(used)}
        config = dict(self.config) | {"micro_batch_size": None, "rewards": rewards}
        return {**config, "schedule": self.schedule, "sampler": self.sampler}

    def collect(
        self, policy: FlowPolicy, adapter: str, iteration: int, shard: Shard
    ) -> tuple[list[Rollout], dict[str, float]]:
        group, config = self.schedule.images_per_prompt, self.config
        batch = shard.of(self.schedule.draw(iteration), group)
        sampler = self.sampler.at(iteration, self.schedule.seed)
        trained = sampler.trained_steps(config.trained_steps, iteration, self.schedule.seed)
        size = config.micro_batch_size
        if sampler.branch:  # images that share steps stay together
            size = max(size // group, 1) * group
        pieces = shard.micro_batches(self.schedule.prompts_per_batch, group, config.updates, size)
        steps, images = [], []
        for _, rows, _ in pieces:
            here = batch.prompts[rows], batch.seeds[rows]
            taken = list(trajectory(policy, *here, sampler, adapter, group))
            images.append(policy.decode(taken[-1].x_next).cpu())
            steps.append([taken[k] for k in trained])
        rewards, weights, means = self.score(torch.cat(images) if images else torch.empty(0), batch)
        a = advantages(rewards, weights, group, config.normalise, shard).to(policy.device)
        rollouts = [
            Rollout(batch.prompts[rows], of_piece, a[rows], update, n)
            for (update, rows, n), of_piece in zip(pieces, steps)
        ]
        return rollouts, means

    def score(
        self, images: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        """Rewards (B, R) divided by their scales, weights (B, R), and each reward's mean in its own
        units."""
        names = sorted({name for p in batch.prompts for name in self.weights_of(p.task)})
        rewards, weights = torch.zeros(2, len(batch), len(names))
        means = {}
        for column, name in enumerate(names):
            rows = [i for i, p in enumerate(batch.prompts) if name in self.weights_of(p.task)]
            reward, prompts = self.rewards[name], [batch.prompts[i] for i in rows]
            scores = score_images(reward, images[rows], prompts)
            rewards[rows, column] = torch.from_numpy(scores) / attribute(reward, "scale")
            of_row = [float(self.weights_of(p.task)[name]) for p in prompts]
            weights[rows, column] = torch.tensor(of_row)
            means[name] = float(np.mean(scores))
        return rewards, weights, means

    def losses(
        self, policy: FlowPolicy, adapter: str, data: list[Rollout], update: int
    ) -> Iterator[Term]:
        for rollout in (r for r in data if r.update == update):
            text = policy.encode([p.text for p in rollout.prompts])
            for step in rollout.steps:
                batch = self._batch(policy, adapter, text, step, rollout.advantages)
                loss = self.loss(batch).sum() / (rollout.images * len(rollout.steps))
                off = (batch.ratio.detach() - 1).abs()
                clipped = (off > batch.clip).float().mean()
                metrics = {"ratio_error": off.mean(), "clip_fraction": clipped}
                if self.config.beta:
                    metrics["kl"] = batch.kl.detach().mean()
                yield loss, metrics

    def _batch(
        self, policy: FlowPolicy, adapter: str, text, step: Step, a: torch.Tensor
    ) -> GRPOBatch:
        config, sampler, shared = self.config, self.sampler, step.shared
        # where the images of a prompt separate they have one state
        state = step.x_t[::shared], step.sigma, text[::shared], sampler.guidance
        v = policy.velocity(*state, adapter).repeat_interleave(shared, 0)
        mean, std = sampler.transition(step.x_t, v, step.sigma, step.sigma_next)
        now = log_prob(step.x_next, mean, std, config.reduction)
        ratio = (now - step.log_prob(config.reduction)).exp()
        kl, v_reference = torch.zeros_like(ratio), None
        if config.beta:
            with torch.no_grad():
                v_reference = policy.velocity(*state, config.reference).repeat_interleave(shared, 0)
            weight = sampler.step_weights(step.sigma, step.sigma_next, "kl").to(v.device)
            kl = weight * squared_distance(v, v_reference)
            kl = kl / v[0].numel() if config.reduction == "mean" else kl
        return GRPOBatch(step, v, v_reference, ratio, a, kl, config.clip, config.beta)
