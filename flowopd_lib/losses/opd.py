"""On-policy distillation (Flow-OPD 5.1.1): the student samples its own trajectories and is trained,
at every state it visits, towards the velocity of its prompt's teacher.

With KL_k = w_k ||v_S(x_k) - v_T(x_k)||^2 the divergence of the two policies at one step and rho_k
the ratio of the probabilities of the action x_{k+1} now and when it was taken, the gradient
estimators of "minimise the KL along the student's trajectory" are

    pathwise        sum_k KL_k, differentiated through the student's velocity: the gradient of each
                    step's KL
    paper           -rho_k r_k with r_k = -KL_k detached. r_k does not depend on the action, so it
                    is a baseline: zero in expectation
    as_coded        the public code: r_k still attached, and (B, 1) x (B,) broadcast to (B, B):
                    pathwise plus zero-mean noise
    log_ratio       -rho_k r_k with r_k = log pi_T(x_{k+1}) - log pi_S(x_{k+1}) at the action taken:
                    pathwise's mean, noisier
    return_to_go    -rho_k r_k with r_k = -(the KL at later steps): what pathwise drops, this action
                    moving later states

`pathwise` + `return_to_go` is the exact gradient of the whole trajectory's KL. Ratios are clipped
as in the paper.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import torch
from pydantic import model_validator

from ..config import Config, Count, NonNegative, Plugin, Positive, choose, refuse_unused
from ..data import Prompt, Schedule, Shard, slices
from ..policy import FlowPolicy
from ..rollout import Sampler, initial_noise, trajectory, visited_states
from ..sde import WEIGHTINGS, log_prob
from .grpo import Term, check_updates, clipped_surrogate, find_loss, squared_distance


@dataclass
class OPDBatch:
    """What a loss function sees: M visited states with the velocities there. Latents are (M, C, H,
    W), all else is (M,).

    `weight` is such that the distillation loss is `weight ||v_student - v_teacher||^2`, summed over
    the latent. Only for estimators that need the action taken: `x_next`, its `mean` and `std` then,
    `ratio` (with the graph), and `later_kl`, the loss at later steps of the trajectory.
    """

    prompts: list[Prompt]
    step: torch.Tensor
    sigma: torch.Tensor
    sigma_next: torch.Tensor
    x_t: torch.Tensor
    weight: torch.Tensor
    v_student: torch.Tensor | None = None  # with the graph
    v_teacher: torch.Tensor | None = None
    v_anchor: torch.Tensor | None = None
    x_next: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    std: torch.Tensor | None = None
    later_kl: torch.Tensor | None = None
    ratio: torch.Tensor | None = None
    log_ratio_teacher: torch.Tensor | None = None
    clip: float = 1e-4

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: slice) -> OPDBatch:
        parts = {k: v[rows] for k, v in vars(self).items() if isinstance(v, (list, torch.Tensor))}
        return replace(self, **parts)


def pathwise(batch: OPDBatch) -> torch.Tensor:
    """(M,): the distillation loss, `w ||v_student - v_teacher||^2`."""
    return batch.weight * squared_distance(batch.v_student, batch.v_teacher)


def paper(batch: OPDBatch) -> torch.Tensor:
    return clipped_surrogate(-pathwise(batch).detach(), batch.ratio, batch.clip)


def as_coded(batch: OPDBatch) -> torch.Tensor:
    return clipped_surrogate(-pathwise(batch)[:, None], batch.ratio, batch.clip).mean(1)


def log_ratio(batch: OPDBatch) -> torch.Tensor:
    return clipped_surrogate(batch.log_ratio_teacher, batch.ratio, batch.clip)


def return_to_go(batch: OPDBatch) -> torch.Tensor:
    return clipped_surrogate(-batch.later_kl, batch.ratio, batch.clip)


LOSSES = {f.__name__: f for f in (pathwise, paper, as_coded, log_ratio, return_to_go)}


def anchor_loss(batch: OPDBatch) -> torch.Tensor:
    """(M,): Manifold Anchor Regularization, `w ||v_student - v_anchor||^2`."""
    return batch.weight * squared_distance(batch.v_student, batch.v_anchor)


def check_teachers(tasks: Iterable[str], teachers: Mapping[str, str | None]) -> None:
    """Raises ValueError for tasks that have none."""
    if missing := set(tasks) - set(teachers):
        raise ValueError(
            f"no teacher for the task {', '.join(sorted(missing))}, only for {list(teachers)}"
        )


class OPDConfig(Config):
    """`teachers` maps a task to the adapter its prompts are routed to (None: the base). No reward
    is computed and nothing is decoded.

    `loss`: one of LOSSES, several joined by `+`, or a function of an `OPDBatch`. `weighting`: of
    the steps, one of `sde.WEIGHTINGS`, or a function. `mar` weighs Manifold Anchor Regularization
    towards `anchor` (an adapter; None is the base) on all prompts: relative to the distillation
    loss, of the same weighting, whatever estimates its gradient. `guidance`: a teacher's or the
    anchor's own scale, by adapter.

    `trained_steps`: None all with noise, a list exactly those, a number that many of the N, drawn
    at random and weighed N/k, so that the loss is an unbiased estimate of that of all: for every
    trajectory anew (`draw="trajectory"`, the default where the loss needs no actions), or for every
    iteration. A trajectory ends at the last of them. `micro_batch_size`: states in one forward;
    as_coded pairs these with each other, and depends on how many they are.
    """

    teachers: dict[str, str | None] = {}
    loss: Plugin = "pathwise"
    weighting: Plugin = "kl"
    mar: NonNegative = 0.04
    anchor: str | None = None
    guidance: dict[str | None, NonNegative] = {}
    trained_steps: Count | list[int] | None = None
    draw: Literal["trajectory", "iteration"] | None = None
    updates: Count = 1
    clip: Positive = 1e-4
    micro_batch_size: Count = 64

    @model_validator(mode="after")
    def _effects(self):
        if not isinstance(self.trained_steps, int):
            refuse_unused(self, draw="unless trained_steps is a number")
        if self.loss == "pathwise":
            refuse_unused(self, clip="with the loss pathwise, which takes no ratios")
        elif isinstance(self.loss, str) and self.draw == "trajectory":
            raise ValueError("draw: trajectory is for pathwise; the others need iteration")
        if "log_ratio" in str(self.loss).split("+") and self.weighting != "kl":
            raise ValueError("log_ratio estimates the KL, so weighting must be kl, or left out")
        if not self.mar:
            refuse_unused(self, anchor="with mar 0")
        return self


@dataclass
class Visited:
    """The states of one micro-batch of trajectories, the update that learns from them and how many
    images that has over all processes. `forwards`: the states of each forward."""

    states: OPDBatch
    forwards: list[slice]
    update: int
    images: int


class OPD:
    """The objective."""

    def __init__(
        self, schedule: Schedule, config: OPDConfig, sampler: Sampler = Sampler(10, "sde")
    ):
        self.schedule, self.config, self.sampler = schedule, config, sampler
        self.updates, self.loss = config.updates, find_loss(LOSSES, config.loss)
        if isinstance(config.weighting, str):
            choose("weighting", config.weighting, WEIGHTINGS)
        self.uses_actions = config.loss != "pathwise"
        check_updates(config.updates, schedule)
        check_teachers(schedule.prompts, config.teachers)
        if self.uses_actions and isinstance(config.loss, str) and not sampler.has_noise:
            raise ValueError(f"{config.loss} needs the probabilities of actions: sample with sde")
        self.uses_actions &= sampler.has_noise
        if sampler.branch or sampler.window_range[0] != sampler.window_range[1]:
            raise ValueError("branch and a moving window are for GRPO; OPD has trained_steps")
        noisy = len(sampler.trained_steps(None))
        sampler.trained_steps(config.trained_steps)
        if config.trained_steps == 1 < noisy and "return_to_go" in str(config.loss):
            raise ValueError("return_to_go weighs a step by the KL at later ones: draw at least 2")
        # Of N steps k are drawn: one is visited in k/N of the draws, and with it a later one in
        # (k-1)/(N-1).
        drawn = config.trained_steps if isinstance(config.trained_steps, int) else noisy
        self._visited = drawn / noisy
        self._visited_later = (drawn - 1) / (noisy - 1) if drawn > 1 else 1.0
        guided = {*config.teachers.values(), config.anchor}
        for name in set(config.guidance) - guided:
            choose("teacher or anchor (guidance)", name, sorted(guided - {None}))

    @property
    def adapters(self) -> set[str]:
        teachers = {self.config.teachers[task] for task in self.schedule.prompts}
        return (teachers | ({self.config.anchor} if self.config.mar else set())) - {None}

    def identity(self) -> dict:
        paired = "as_coded" in str(self.config.loss).split("+")
        size = self.config.micro_batch_size if paired else None
        config = dict(self.config) | {"micro_batch_size": size}
        return {**config, "schedule": self.schedule, "sampler": self.sampler}

    @torch.no_grad()
    def check(self, policy: FlowPolicy, adapter: str) -> None:
        """Also refuses a teacher or an anchor that is the base without its name (None): it teaches
        nothing, and the KL to it looks perfect."""
        policy.check_adapters(self.adapters)
        policy.check_prompts(self.schedule.all_prompts)
        if adapter in self.adapters:
            raise ValueError(f"{adapter!r} is in training, so it is no teacher or anchor; copy it")
        batch, sigma = self.schedule.draw(0), policy.sigmas(self.sampler.steps)[1]
        x_t = initial_noise(policy, batch.seeds[:4])
        text = policy.encode([p.text for p in batch.prompts[:4]])
        base = policy.velocity(x_t, sigma, text)
        for name in sorted(self.adapters):
            if torch.equal(policy.velocity(x_t, sigma, text, adapter=name), base):
                raise ValueError(
                    f"the teacher or anchor {name!r} has the velocity of the base: load the right "
                    "adapter, or name the base itself (null in a recipe, None in Python)"
                )

    def collect(
        self, policy: FlowPolicy, adapter: str, iteration: int, shard: Shard
    ) -> tuple[list[Visited], dict[str, float]]:
        config, batch = self.config, self.schedule.draw(iteration)
        pieces = shard.micro_batches(len(batch), 1, config.updates, config.micro_batch_size)
        batch = shard.of(batch)
        which, noisy = config.trained_steps, self.sampler.trainable_steps
        steps = self.sampler.trained_steps(which, iteration, self.schedule.seed)
        visited = []
        for update, rows, n in pieces:
            prompts, seeds = batch.prompts[rows], batch.seeds[rows]
            wanted = [steps] * len(seeds)
            if isinstance(which, int) and config.draw != "iteration" and not self.uses_actions:
                # by the sample's own seed, so that it does not depend on the processes
                wanted = [random.Random(f"steps/{seed}").sample(noisy, which) for seed in seeds]
            states, forwards = self._states(policy, adapter, prompts, seeds, wanted)
            visited.append(Visited(states, forwards, update, n))
        return visited, {}

    def _states(
        self, policy: FlowPolicy, adapter: str, prompts, seeds, wanted
    ) -> tuple[OPDBatch, list[slice]]:
        """The wanted states of these trajectories with their teachers' and the anchor's velocities,
        and how they are cut into forwards. Where ratios of probabilities are taken, a forward has
        the states of one step, as in the rollout: then ratios before an update are exactly 1."""
        grid = torch.tensor(policy.sigmas(self.sampler.steps))
        sampler, how = self.sampler, (policy, prompts, seeds, self.sampler, adapter)
        if self.uses_actions:  # all trajectories are trained at the same steps
            steps = islice(trajectory(*how), max(wanted[0]) + 1)
            taken = [s for s in steps if s.index in wanted[0]]
            visits = [(s.index, s.rows, s.x_t) for s in taken]
        else:
            visits = [*visited_states(*how, wanted)]
        step = torch.tensor([index for index, rows, _ in visits for _ in rows])
        sigma, sigma_next = grid[step], grid[step + 1]
        states = OPDBatch(
            [prompts[row] for _, rows, _ in visits for row in rows],
            step,
            sigma,
            sigma_next,
            torch.cat([x_t for _, _, x_t in visits]),
            sampler.step_weights(sigma, sigma_next, self.config.weighting).to(policy.device),
            clip=self.config.clip,
        )
        size = len(prompts) if self.uses_actions else self.config.micro_batch_size
        forwards = slices(len(states), size)
        targets = [self._targets(policy, states[rows]) for rows in forwards]
        states.v_teacher = torch.cat([teacher for teacher, _ in targets])
        if self.config.mar:
            states.v_anchor = torch.cat([anchor for _, anchor in targets])
        if self.uses_actions:
            states.x_next = torch.cat([s.x_next for s in taken])
            states.mean = torch.cat([s.mean for s in taken])
            states.std = torch.stack([s.std for s in taken]).repeat_interleave(size)
            states.later_kl = torch.zeros(len(states), device=policy.device)
            later = 0.0
            for s, rows in reversed(list(zip(taken, forwards))):
                states.later_kl[rows] = later
                at = replace(states[rows], v_student=s.v)
                later = later + pathwise(at) / self._visited_later
        return states, forwards

    @torch.no_grad()
    def _targets(
        self, policy: FlowPolicy, states: OPDBatch
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The velocities of each state's own teacher and of the anchor: one forward an adapter."""
        text = policy.encode([p.text for p in states.prompts])

        def velocity(name: str | None, rows: slice | list[int]) -> torch.Tensor:
            at, guidance = (states.x_t[rows], states.sigma[rows]), self.config.guidance
            return policy.velocity(*at, text[rows], guidance.get(name, 1.0), name)

        anchor = velocity(self.config.anchor, slice(None)) if self.config.mar else None
        names = [self.config.teachers[p.task] for p in states.prompts]
        teacher = torch.empty_like(states.x_t)
        for name in dict.fromkeys(names):
            rows = [i for i, own in enumerate(names) if own == name]
            known = anchor is not None and name == self.config.anchor
            teacher[rows] = anchor[rows] if known else velocity(name, rows)
        return teacher, anchor

    def losses(
        self, policy: FlowPolicy, adapter: str, data: list[Visited], update: int
    ) -> Iterator[Term]:
        for visited in (v for v in data if v.update == update):
            for rows in visited.forwards:
                batch = self.forward(policy, adapter, visited.states[rows])
                loss = self.loss(batch)
                if self.config.mar:
                    loss = loss + self.config.mar * anchor_loss(batch)
                yield loss.sum() / (visited.images * self._visited), self._metrics(batch)

    def forward(self, policy: FlowPolicy, adapter: str, states: OPDBatch) -> OPDBatch:
        """The states with the student's velocity and, where the loss needs it, `ratio`."""
        text = policy.encode([p.text for p in states.prompts])
        v = policy.velocity(states.x_t, states.sigma, text, self.sampler.guidance, adapter)
        batch = replace(states, v_student=v)
        if self.uses_actions:
            then = log_prob(states.x_next, states.mean, states.std)

            def log_ratio_of(velocity: torch.Tensor) -> torch.Tensor:
                at = states.sigma, states.sigma_next
                mean, std = self.sampler.transition(states.x_t, velocity, *at)
                return log_prob(states.x_next, mean, std) - then

            batch.ratio = log_ratio_of(v).exp()
            batch.log_ratio_teacher = log_ratio_of(states.v_teacher)
        return batch

    @torch.no_grad()
    def _metrics(self, batch: OPDBatch) -> dict[str, torch.Tensor]:
        """`kl` is that of the SDE's policies whatever the loss weighs, by step and task;
        `velocity_mse` varies far less with the step. What a batch does not have is left out."""
        squared = squared_distance(batch.v_student, batch.v_teacher)
        metrics = {"velocity_mse": squared / batch.v_student[0].numel()}
        if self.sampler.noise_level:
            weight = self.sampler.step_weights(batch.sigma, batch.sigma_next, "kl")
            metrics["kl"] = weight.to(squared.device) * squared
            for k in batch.step.unique().tolist():
                metrics[f"kl_step_{k}"] = metrics["kl"][(batch.step == k).to(squared.device)]
        names = [n for n in ("kl", "velocity_mse") if n in metrics]
        for task in dict.fromkeys(p.task for p in batch.prompts):
            rows = [i for i, p in enumerate(batch.prompts) if p.task == task]
            metrics |= {f"{name}_{task}": metrics[name][rows] for name in names}
        if self.config.mar:
            metrics["anchor_loss"] = anchor_loss(batch)
        return metrics


def mirrored(data: Sequence[Visited]) -> list[Visited]:
    """The same trajectories with the mirror image of every action taken, `2 mean - x_next`:
    antithetic samples for the estimators that use actions (states are left as they are)."""
    return [
        replace(v, states=replace(v.states, x_next=2 * v.states.mean - v.states.x_next))
        for v in data
    ]
