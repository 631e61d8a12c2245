"""On-policy distillation (Flow-OPD 5.1.1): the student walks, and at every state it visits is pulled to its
prompt's teacher.

With KL_k = w_k ||v_S(x_k) - v_T(x_k)||^2 the divergence of the two policies at one step and rho_k the ratio
of the probabilities of the action x_{k+1} now and when it was taken, the readings of "minimise the KL along
the student's walk" are

    pathwise        sum_k KL_k, differentiated through the student's velocity: the gradient of each step's KL
    paper           -rho_k r_k with r_k = -KL_k detached. r_k does not depend on the action, so it is a
                    baseline: zero in expectation
    as_coded        the public code: r_k still attached, and (B, 1) x (B,) broadcast to (B, B): pathwise plus
                    zero-mean noise
    log_ratio       -rho_k r_k with r_k = log pi_T(x_{k+1}) - log pi_S(x_{k+1}) at the action taken:
                    pathwise's mean, noisier
    return_to_go    -rho_k r_k with r_k = -(the KL at later steps): what pathwise drops, today's action moving
                    tomorrow's states

`pathwise` + `return_to_go` is the exact gradient of the whole trajectory's KL. Ratios are clipped as in the
paper.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..inputs import Count, NotNegative, Positive, one_of
from ..policy import FlowPolicy
from ..prompts import Prompt
from ..rollout import NoiseStreams, Sampler, Step, states, trajectory, walk
from ..schedule import Batch, Schedule
from ..sde import REDUCTIONS, WEIGHTINGS, velocity_weight
from ..texts import TextEmbedding
from .base import (
    Share,
    check_settings,
    check_teachers,
    chunks,
    log_ratio,
    mean_of,
    squared,
    surrogate,
    trained_steps,
)

DRAWS = ("walk", "iteration")
ESTIMATORS = ("pathwise", "paper", "as_coded", "log_ratio", "return_to_go")


@dataclass(frozen=True)
class Visit:
    """A trained step of a rollout, what the teacher and the anchor say there, and the KL at later trained
    steps (B,)."""

    step: Step
    teacher: torch.Tensor
    anchor: torch.Tensor | None
    later: torch.Tensor


@dataclass(frozen=True)
class States:
    """States of several walks and steps, learned from together: of each its prompt, its step and `x`
    (M, C, H, W)."""

    prompts: list[Prompt]
    steps: list[int]
    x: torch.Tensor


@dataclass
class Walks:
    batch: Batch
    trained: list[int]
    images: int  # of the iteration, over all processes
    # update, rows, images of that update; None: rollout and training are one
    visits: list[tuple[int, slice, int, list[Visit] | States]] | None
    records: list[dict[str, torch.Tensor]] = field(default_factory=list)


@dataclass
class OPD:
    """`teachers` maps a task to the adapter its prompts are routed to (None: the base). No reward is computed
    and nothing is decoded.

    `estimator`: one of ESTIMATORS, or several joined by `+`. `weighting`: of the steps, see
    `velocity_weight`; its noise is the sampler's, or for ODE rollouts that of the SDE with the same noise
    level; a weight is at most `max_weight`. `mar` weighs Manifold Anchor Regularization towards `anchor` (an
    adapter; None is the base) on all prompts. `guidance`: a teacher's or the anchor's own scale, by adapter.

    `steps`: of a walk, those that are learned from: None all with noise, a tuple exactly those, a number that
    many of the N, drawn at random and weighed N/k, so that the loss stays an unbiased estimate of that of
    all: for every walk anew where the reading is pathwise (`draw="walk"`), else for every iteration. A walk
    ends at the last of them. Pathwise on the same steps of every walk with one update an iteration needs no
    second forward: the one that takes the step is differentiated.
    """

    schedule: Schedule
    teachers: Mapping[str, str | None]
    sampler: Sampler = Sampler(10, "sde")
    estimator: str = "pathwise"
    weighting: one_of(*WEIGHTINGS) = "kl"
    max_weight: Positive | None = None
    mar: NotNegative = 0.04
    anchor: str | None = None
    guidance: Mapping[str | None, NotNegative] = field(default_factory=dict)
    steps: int | tuple[int, ...] | None = None
    draw: one_of(*DRAWS) = "walk"
    updates: Count = 1
    reduction: one_of(*REDUCTIONS) = "sum"
    clip: Positive = 1e-4
    micro_batch_size: Count = 64

    def __post_init__(self):
        check_settings(self)
        self.readings = self.estimator.split("+")
        unknown = set(self.readings) - set(ESTIMATORS)
        if unknown:
            raise ValueError(
                f"unknown estimator {', '.join(sorted(unknown))}: choose among {', '.join(ESTIMATORS)}, "
                "joined by +"
            )
        if self.readings != ["pathwise"] and not self.sampler.explores:
            raise ValueError(
                f"{self.estimator} needs the probabilities of actions: sample with sde or cps, or use "
                "pathwise"
            )
        check_teachers(self.schedule.prompts, self.teachers)
        if self.sampler.branch or self.sampler.last is not None:
            raise ValueError(
                "branch and a window that moves are for GRPO; OPD learns from the steps that `steps` says"
            )
        noisy = len(trained_steps(self.sampler, None, 0, 0))
        trained_steps(self.sampler, self.steps, 0, 0)
        if "return_to_go" in self.readings and self.steps == 1 < noisy:
            raise ValueError(
                "return_to_go weighs a step by the KL at later ones, so one drawn step says nothing of it; "
                "draw at least 2, or name the steps"
            )
        # Of N steps k are drawn: one is seen in k/N of the draws, and with it a later one in (k - 1) / (N -
        # 1) of these.
        drawn = self.steps if isinstance(self.steps, int) else noisy
        self._seen, self._seen_later = (
            drawn / noisy,
            (drawn - 1) / (noisy - 1) if drawn > 1 else 1.0,
        )
        guided = {*self.teachers.values(), self.anchor}
        unguided = [name for name in self.guidance if name not in guided]
        if unguided:
            raise ValueError(
                f"guidance names {unguided[0]!r}, which is no teacher and no anchor; there are "
                f"{', '.join(map(str, guided))}"
            )

    @property
    def adapters(self) -> set[str]:
        teachers = {self.teachers[task] for task in self.schedule.prompts}
        return (teachers | ({self.anchor} if self.mar else set())) - {None}

    @torch.no_grad()
    def check(self, policy: FlowPolicy, adapter: str) -> None:
        """Also for a teacher or an anchor that is the base without its name (None): it teaches nothing, and
        the KL to it looks perfect."""
        policy.check_adapters(self.adapters)
        policy.check_prompts(self.schedule.every)
        if adapter in self.adapters:
            raise ValueError(
                f"{adapter!r} is in training, so it can be no teacher and no anchor; copy it first"
            )
        batch, sigma = self.schedule.draw(0), policy.sigmas(self.sampler.steps)[1]
        x = NoiseStreams(policy, batch.seeds[:4]).draw()
        text = policy.encode([p.text for p in batch.prompts[:4]])
        base = policy.velocity(x, sigma, text)
        for name in sorted(self.adapters):
            if torch.equal(policy.velocity(x, sigma, text, adapter=name), base):
                raise ValueError(
                    f"the teacher or anchor {name!r} has the velocity of the base: its weights change "
                    "nothing; "
                    "load the right adapter, or name the base itself (null in a recipe, None in Python)"
                )

    def collect(self, policy: FlowPolicy, adapter: str, iteration: int, share: Share) -> Walks:
        images = self.schedule.size * self.schedule.repeats
        batch = share.of(self.schedule.draw(iteration))
        trained = trained_steps(self.sampler, self.steps, iteration, self.schedule.seed)
        data = Walks(batch, trained, images, None)
        apart = self.readings == ["pathwise"] and isinstance(self.steps, int)
        if self.readings == ["pathwise"] and self.updates == 1 and not apart:
            return data
        visit = self._states if apart else self._visit
        data.visits = [
            (
                update,
                rows,
                images,
                visit(policy, adapter, batch.prompts[rows], batch.seeds[rows], trained),
            )
            for update, rows, images in share.updates_of(
                images, 1, self.updates, self.micro_batch_size
            )
        ]
        return data

    def _states(self, policy, adapter, prompts, seeds, trained) -> States:
        noisy, drawn = self.sampler.window, [trained] * len(prompts)
        # by the sample's own seed, so that it does not depend on the processes
        if self.draw == "walk":
            drawn = [random.Random(f"steps/{seed}").sample(noisy, self.steps) for seed in seeds]
        found = list(states(policy, prompts, seeds, self.sampler, adapter, drawn))
        return States(
            [prompts[i] for _, rows, _ in found for i in rows],
            [k for k, rows, _ in found for _ in rows],
            torch.cat([x for _, _, x in found]),
        )

    def _visit(self, policy, adapter, prompts, seeds, trained) -> list[Visit]:
        text, found = policy.encode([p.text for p in prompts]), []
        for step in trajectory(policy, prompts, seeds, self.sampler, adapter):
            if step.index in trained:
                found.append((step, *self._targets(policy, step.x, step.sigma, text, prompts)))
            if step.index == trained[-1]:
                break
        visits, later = [], torch.zeros(len(prompts), device=policy.device)
        for step, teacher, anchor in reversed(found):
            visits.append(Visit(step, teacher, anchor, later))
            later = later + self._distance(step, step.v, teacher) / self._seen_later
        return visits[::-1]

    @torch.no_grad()
    def _targets(
        self, policy: FlowPolicy, x, sigma, text: TextEmbedding, prompts: Sequence[Prompt]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The velocities of each row's own teacher and of the anchor; `sigma` is a number or (B,). One
        forward per adapter, never with a graph."""
        wanted: dict[str | None, list[int]] = {}
        for row, prompt in enumerate(prompts):
            wanted.setdefault(self.teachers[prompt.task], []).append(row)
        anchor_scale = self.guidance.get(self.anchor, 1.0)
        anchor = policy.velocity(x, sigma, text, anchor_scale, self.anchor) if self.mar else None
        teacher = torch.empty_like(x)
        for name, rows in wanted.items():
            scale = self.guidance.get(name, 1.0)
            if anchor is not None and name == self.anchor:
                teacher[rows] = anchor[rows]
            else:
                at = sigma[rows] if torch.is_tensor(sigma) else sigma
                teacher[rows] = policy.velocity(x[rows], at, text[rows], scale, name)
        return teacher, anchor

    @property
    def _kind(self) -> str:
        return "sde" if self.sampler.kind == "ode" else self.sampler.kind

    def _weight(self, sigma: float, sigma_next: float, size: int) -> float:
        weight = velocity_weight(
            sigma, sigma_next, self.weighting, self._kind, self.sampler.noise_level, size
        )
        return weight if self.max_weight is None else min(weight, self.max_weight)

    def _nats(self, sigma: float, sigma_next: float) -> float:
        """The KL of a step over the squared difference of the velocities; NaN where a walk has no noise."""
        return (
            velocity_weight(sigma, sigma_next, "kl", self._kind, self.sampler.noise_level)
            if self.sampler.noise_level
            else math.nan
        )

    def _distance(self, step: Step, v: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """(B,): `w ||v - other||^2` at one step."""
        return self._weight(step.sigma, step.sigma_next, v[0].numel()) * squared(v, other)

    def losses(
        self, policy: FlowPolicy, adapter: str, data: Walks, update: int
    ) -> Iterator[torch.Tensor]:
        if data.visits is None:
            yield from self._walk_and_learn(policy, adapter, data)
            return
        for _, rows, images, visits in (v for v in data.visits if v[0] == update):
            if isinstance(visits, States):
                yield from self._learn(policy, adapter, visits, images, data.records)
                continue
            text = policy.encode([p.text for p in data.batch.prompts[rows]])
            for visit in visits:
                v = policy.velocity(
                    visit.step.x, visit.step.sigma, text, self.sampler.guidance, adapter
                )
                loss = self._loss(visit, v, data.records, data.batch.prompts[rows])
                yield loss.sum() / (images * self._seen)

    def _learn(
        self, policy: FlowPolicy, adapter: str, found: States, images: int, records: list
    ) -> Iterator[torch.Tensor]:
        """Pathwise at states of any walks and steps, in one forward: as many as `micro_batch_size` together."""
        grid = policy.sigmas(self.sampler.steps)
        for rows in chunks(len(found.steps), self.micro_batch_size):
            prompts, x = found.prompts[rows], found.x[rows]
            at = [(k, grid[k], grid[k + 1]) for k in found.steps[rows]]
            sigma = torch.tensor([sigma for _, sigma, _ in at], device=x.device)
            text = policy.encode([p.text for p in prompts])
            teacher, anchor = self._targets(policy, x, sigma, text, prompts)
            v = policy.velocity(x, sigma, text, self.sampler.guidance, adapter)
            to_teacher, to_anchor = self._pulls(v, teacher, anchor, at, prompts, records)
            yield (to_teacher + to_anchor).sum() / (images * self._seen)

    def _pulls(
        self,
        v: torch.Tensor,
        teacher: torch.Tensor,
        anchor: torch.Tensor | None,
        at: Sequence[tuple[int, float, float]],
        prompts: Sequence[Prompt],
        records: list,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,), twice: the weighed distance to the teacher and, times `mar`, to the anchor; `at` is each
        row's step, sigma and next sigma.

        `records` gets the KL, in nats whatever the loss weighs, and `gap`, the mean squared difference of the
        velocities, which varies far less with the step. NaN: there is none, of a task that is not among the
        prompts or of a walk without noise.
        """
        size, steps = v[0].numel(), [k for k, _, _ in at]
        nats = torch.tensor([self._nats(sigma, after) for _, sigma, after in at], device=v.device)
        weight = torch.tensor(
            [self._weight(sigma, after, size) for _, sigma, after in at], device=v.device
        )
        apart = squared(v, teacher)
        gap, kl = apart.detach() / size, nats * apart.detach()
        by_step = {
            f"kl_step_{k}": kl[[step == k for step in steps]].mean() for k in sorted(set(steps))
        }
        of = {task: [p.task == task for p in prompts] for task in self.schedule.prompts}
        records.append(
            {
                "kl": torch.stack(list(by_step.values())).mean(),
                **by_step,
                **{
                    f"{name}_{task}": values[rows].mean()
                    for task, rows in of.items()
                    for name, values in (("kl", kl), ("gap", gap))
                },
            }
        )
        if not self.mar:
            return weight * apart, torch.zeros_like(apart)
        to_anchor = weight * squared(v, anchor)
        records[-1]["mar"] = to_anchor.detach().mean()
        return weight * apart, self.mar * to_anchor

    def _walk_and_learn(
        self, policy: FlowPolicy, adapter: str, data: Walks
    ) -> Iterator[torch.Tensor]:
        for rows in chunks(len(data.batch), self.micro_batch_size):
            prompts = data.batch.prompts[rows]
            text, kept = policy.encode([p.text for p in prompts]), []

            def velocity(x: torch.Tensor, sigma: float, index: int) -> torch.Tensor:
                with torch.set_grad_enabled(index in data.trained):
                    kept[:] = [policy.velocity(x, sigma, text, self.sampler.guidance, adapter)]
                return kept[0]

            for step in walk(policy, velocity, prompts, data.batch.seeds[rows], self.sampler):
                if step.index in data.trained:
                    told = self._targets(policy, step.x, step.sigma, text, prompts)
                    visit = Visit(step, *told, torch.zeros(()))
                    yield self._loss(visit, kept.pop(), data.records, prompts).sum() / data.images
                if step.index == data.trained[-1]:
                    break

    def _loss(
        self, visit: Visit, v: torch.Tensor, records: list, prompts: Sequence[Prompt]
    ) -> torch.Tensor:
        """(B,): the chosen readings and the anchor at one step; `v` is the student's and carries the
        graph."""
        step = visit.step
        at = [(step.index, step.sigma, step.sigma_next)] * len(v)
        kl, to_anchor = self._pulls(v, visit.teacher, visit.anchor, at, prompts, records)
        loss = kl if "pathwise" in self.readings else torch.zeros_like(kl)
        if self.readings != ["pathwise"]:
            ratio = log_ratio(step, v, self.sampler, self.reduction).exp()
            for reading in self.readings:
                if reading == "paper":
                    loss = loss + surrogate(-kl.detach(), ratio, self.clip)
                elif reading == "as_coded":
                    loss = loss + surrogate(-kl[:, None], ratio, self.clip).mean(1)
                elif reading == "return_to_go":
                    loss = loss + surrogate(-visit.later, ratio, self.clip)
                elif reading == "log_ratio":
                    reward = log_ratio(step, visit.teacher, self.sampler, self.reduction)
                    loss = loss + surrogate(reward, ratio, self.clip)
        return loss + to_anchor

    def metrics(self, data: Walks) -> dict[str, float]:
        return mean_of(data.records)
