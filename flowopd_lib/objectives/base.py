"""What the training loop asks of an objective."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..inputs import check_fields
from ..policy import FlowPolicy
from ..rollout import Sampler, Step
from ..schedule import Batch
from ..sde import log_prob, transition


@dataclass(frozen=True)
class Share:
    """One process's part of every iteration: items `rank::processes` of it, a way to see everybody's numbers, and
    one to wait for the others."""

    rank: int = 0
    processes: int = 1
    gather: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda values: values)
    wait: Callable[[], None] = field(default=lambda: None)

    def of(self, batch: Batch, group: int = 1) -> Batch:
        """Whole groups of `group` neighbours (the samples of one prompt) go to one process. Where they are no
        multiple of the processes, some have one less, or none: the batch is what the iteration says."""
        groups = len(batch) // group
        rows = [
            g * group + i for g in range(self.rank, groups, self.processes) for i in range(group)
        ]
        return Batch([batch.prompts[r] for r in rows], [batch.seeds[r] for r in rows])

    def updates_of(
        self, groups: int, group: int, updates: int, micro_batch_size: int
    ) -> list[tuple[int, slice, int]]:
        """How this process's part of `groups` groups of `group` neighbours is cut into forwards: (update,
        rows, images of that update over all processes).

        The groups of an iteration, in its order, are dealt to its updates in blocks, so which images an
        update sees follows from the iteration alone, not from the processes or from `micro_batch_size`, the images in a
        forward.
        """
        mine, pieces, row = range(self.rank, groups, self.processes), [], 0
        for update in range(updates):
            block = range(update * groups // updates, (update + 1) * groups // updates)
            here = sum(g in block for g in mine) * group
            pieces += [
                (update, slice(row + c.start, row + c.stop), len(block) * group)
                for c in chunks(here, micro_batch_size)
            ]
            row += here
        return pieces


class Objective(Protocol):
    """Data collected once, then `updates` optimizer updates on it.

    `losses` yields terms that the loop differentiates one by one, so no more than one graph is alive; their
    sum over all processes is the update's loss. Everything random follows from `seed` and the iteration.
    """

    updates: int

    @property
    def adapters(self) -> set[str]:
        """The adapters it asks, beside the one in training: teachers, anchors, references."""
        ...

    def check(self, policy: FlowPolicy, adapter: str) -> None:
        """Raises ValueError, before anything long begins, for what cannot be trained with this policy."""
        ...

    def collect(self, policy: FlowPolicy, adapter: str, iteration: int, share: Share) -> Any: ...

    def losses(
        self, policy: FlowPolicy, adapter: str, data: Any, update: int
    ) -> Iterator[torch.Tensor]: ...

    def metrics(self, data: Any) -> dict[str, float]:
        """Means over this process's part, after the iteration's last update."""
        ...


def trained_steps(
    sampler: Sampler, which: int | tuple[int, ...] | None, iteration: int, seed: int
) -> list[int]:
    """The steps of a trajectory, whose window stands still, that are trained: None all that have noise, a
    number that many of them drawn anew for every iteration, a tuple exactly those.

    Raises ValueError for steps that do not exist or have no noise.
    """
    noisy = sampler.window
    if not noisy:
        raise ValueError(
            f"a walk of {sampler.steps} step has none to train, for the last is deterministic; take at "
            "least 2 steps"
        )
    if which is None:
        return list(noisy)
    if isinstance(which, int):
        if not 1 <= which <= len(noisy):
            raise ValueError(
                f"of {sampler.steps} steps, between 1 and {len(noisy)} can be trained, not {which}"
            )
        return sorted(random.Random(f"steps/{seed}/{iteration}").sample(noisy, which))
    if not which or not set(which) <= set(noisy):
        raise ValueError(
            f"trained steps are numbers from {noisy[0]} to {noisy[-1]} (the others are deterministic), not "
            f"{tuple(which)}"
        )
    return sorted(which)


def check_settings(objective: Any) -> None:
    """What GRPO and OPD have in common: fields as their annotations say, and a prompt at least for each
    update. Raises ValueError, naming the setting."""
    check_fields(objective)
    if objective.updates > objective.schedule.size:
        raise ValueError(
            f"{objective.updates} updates need as many prompts in an iteration, not "
            f"{objective.schedule.size}; lower updates or raise prompts_per_batch"
        )


def check_teachers(tasks: Iterable[str], teachers: Mapping[str, str | None]) -> None:
    """Raises ValueError for tasks that have none."""
    missing = set(tasks) - set(teachers)
    if missing:
        raise ValueError(
            f"no teacher for the task {', '.join(sorted(missing))}; there are teachers for "
            f"{', '.join(teachers)}"
        )


def log_ratio(step: Step, v: torch.Tensor, sampler: Sampler, reduction: str) -> torch.Tensor:
    """(B,): log-probability of the action taken under the policy of velocity `v`, less that under the one
    that took it."""
    mean, std = transition(
        step.x, v, step.sigma, step.sigma_next, sampler.kind, sampler.noise_level
    )
    return log_prob(step.x_next, mean, std, reduction) - step.log_prob(reduction)


def squared(v: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(B,): `||v - other||^2`."""
    return (v - other).square().flatten(1).sum(1)


def surrogate(reward: torch.Tensor, ratio: torch.Tensor, clip: float) -> torch.Tensor:
    """`-min(rho r, clip(rho, 1 - c, 1 + c) r)`."""
    return -torch.minimum(ratio * reward, ratio.clamp(1 - clip, 1 + clip) * reward)


def chunks(n: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def mean_of(records: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Means of detached scalars collected along an iteration; NaN, which says there was nothing to measure,
    is left out of them."""
    return {
        key: torch.stack([r[key] for r in records if key in r]).nanmean().item()
        for key in {k: 0 for r in records for k in r}
    }
