"""What the training loop asks of an objective, and what GRPO and OPD share."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..config import nearest
from ..data import Batch
from ..policy import FlowPolicy
from ..rollout import Sampler

# One term of an update's loss with its graph, and detached metrics: scalars, or (B,) one value a
# row.
Term = tuple[torch.Tensor, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Shard:
    """One process's part of every iteration: items `rank::processes` of it, a way to gather
    everybody's values, and one to wait for the others."""

    rank: int = 0
    processes: int = 1
    gather: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda values: values)
    wait: Callable[[], None] = field(default=lambda: None)

    def of(self, batch: Batch, group: int = 1) -> Batch:
        """Whole groups of `group` neighbours (the samples of one prompt) go to one process. Where
        they are no multiple of the processes, some have one less, or none."""
        groups = range(self.rank, len(batch) // group, self.processes)
        rows = [g * group + i for g in groups for i in range(group)]
        return Batch([batch.prompts[r] for r in rows], [batch.seeds[r] for r in rows])

    def micro_batches(
        self, groups: int, group: int, updates: int, size: int
    ) -> list[tuple[int, slice, int]]:
        """How this process's part of `groups` groups of `group` neighbours is cut into forwards:
        (update, rows, images of that update over all processes).

        The groups of an iteration are dealt to its updates in blocks, so which images an update
        sees follows from the iteration alone, not from the processes or from `size`, the images in
        a forward.
        """
        mine, pieces, row = range(self.rank, groups, self.processes), [], 0
        for update in range(updates):
            block = range(update * groups // updates, (update + 1) * groups // updates)
            here = sum(g in block for g in mine) * group
            pieces += [
                (update, slice(row + s.start, row + s.stop), len(block) * group)
                for s in slices(here, size)
            ]
            row += here
        return pieces


class Objective(Protocol):
    """Data collected once, then `updates` optimizer updates on it.

    `losses` yields terms that the loop differentiates one by one, so no more than one graph is
    alive; their sum over all processes is the update's loss. Everything random follows from the
    seed and the iteration.
    """

    updates: int

    @property
    def adapters(self) -> set[str]:
        """The adapters it uses besides the one in training: teachers, anchors, references."""
        ...

    def check(self, policy: FlowPolicy, adapter: str) -> None:
        """Raises ValueError, before anything long begins, for what cannot be trained with this
        policy."""
        ...

    def collect(
        self, policy: FlowPolicy, adapter: str, iteration: int, shard: Shard
    ) -> tuple[Any, dict[str, float]]:
        """Data for the updates, and metrics of the collection, such as mean rewards."""
        ...

    def losses(
        self, policy: FlowPolicy, adapter: str, data: Any, update: int
    ) -> Iterator[Term]: ...


def find_loss(losses: Mapping[str, Callable], name: str | Callable) -> Callable:
    """A loss of a table by its name, several added up (`a+b`), or a user's own function. Raises
    ValueError."""
    if callable(name):
        return name
    terms = []
    for part in name.split("+"):
        if part not in losses:
            raise ValueError(
                f"unknown loss {part!r}{nearest(part, losses)}: choose among {', '.join(losses)}"
            )
        terms.append(losses[part])
    return terms[0] if len(terms) == 1 else lambda batch: sum(term(batch) for term in terms)


def trained_steps(
    sampler: Sampler, which: int | Sequence[int] | None, iteration: int, seed: int
) -> list[int]:
    """The steps of a trajectory that are trained: None all that have noise, a number that many of
    them drawn for every iteration, a list exactly those. Raises ValueError for steps that do not
    exist or have no noise."""
    noisy = sampler.trainable_steps
    if not noisy:
        raise ValueError(
            f"a trajectory of {sampler.steps} step has none to train, for the last is "
            "deterministic; take at least 2 steps"
        )
    if which is None:
        return list(noisy)
    if isinstance(which, int):
        if not 1 <= which <= len(noisy):
            raise ValueError(
                f"of {sampler.steps} steps between 1 and {len(noisy)} can be trained, not {which}"
            )
        return sorted(random.Random(f"steps/{seed}/{iteration}").sample(noisy, which))
    if not which or not set(which) <= set(noisy):
        raise ValueError(
            f"trained steps are numbers from {noisy[0]} to {noisy[-1]} (the others are "
            f"deterministic), not {tuple(which)}"
        )
    return sorted(which)


def check_updates(updates: int, prompts_per_batch: int) -> None:
    if updates > prompts_per_batch:
        raise ValueError(
            f"{updates} updates need as many prompts in an iteration, not {prompts_per_batch}; "
            "lower updates or raise prompts_per_batch"
        )


def check_teachers(tasks: Iterable[str], teachers: Mapping[str, str | None]) -> None:
    """Raises ValueError for tasks that have none."""
    missing = set(tasks) - set(teachers)
    if missing:
        raise ValueError(
            f"no teacher for the task {', '.join(sorted(missing))}; there are teachers for "
            f"{', '.join(teachers)}"
        )


def squared_distance(v: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(B,): `||v - other||^2`, summed over the latent."""
    return (v - other).square().flatten(1).sum(1)


def clipped_surrogate(advantage: torch.Tensor, ratio: torch.Tensor, clip: float) -> torch.Tensor:
    """`-min(rho A, clip(rho, 1 - c, 1 + c) A)`."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def slices(n: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]
