"""Which prompts an iteration trains on: a function of the seed and the iteration alone, so a resumed run goes
on exactly."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .prompts import Prompt


@dataclass(frozen=True)
class Batch:
    """Prompts with the seeds of their samples, in the order of the whole iteration, of which a process has a
    part."""

    prompts: list[Prompt]
    seeds: list[int]

    def __len__(self) -> int:
        return len(self.prompts)


class Schedule:
    """`prompts_per_batch` prompts an iteration, `images_per_prompt` samples each (K-repeat sampling).

    `shares` weighs the tasks; equal by default. `alternate`: an iteration has one task and the tasks take
    turns by their shares, as GRPO-Mix does (GenEval : OCR : PickScore = 3 : 1 : 1); otherwise every batch is
    mixed. Each task goes through its prompts in random order before any is drawn again.
    """

    def __init__(
        self,
        prompts: Mapping[str, Sequence[Prompt]],
        prompts_per_batch: int,
        images_per_prompt: int = 1,
        task_weights: Mapping[str, int] | None = None,
        alternate: bool = False,
        seed: int = 0,
    ):
        weights = dict(task_weights or dict.fromkeys(prompts, 1))
        if not prompts or not all(prompts.values()):
            raise ValueError("a schedule needs at least one prompt for every task")
        if set(weights) != set(prompts) or not all(
            isinstance(n, int) and n > 0 for n in weights.values()
        ):
            raise ValueError(
                f"task_weights must give a positive integer for each of {', '.join(prompts)}, not {weights}"
            )
        if prompts_per_batch < 1 or images_per_prompt < 1:
            raise ValueError("a batch needs at least one prompt and one image a prompt")
        if seed < 0:
            raise ValueError(f"the seed of a schedule must be at least 0, not {seed}")
        self.prompts, self.seed, self.alternate = (
            {t: list(p) for t, p in prompts.items()},
            seed,
            alternate,
        )
        self.size, self.repeats = prompts_per_batch, images_per_prompt
        turns = [(i / n, task) for task, n in weights.items() for i in range(n)]
        self.task_schedule = [
            task for _, task in sorted(turns, key=lambda turn: turn[0])
        ]  # 3:1:1 -> g o p g g

    @property
    def every(self) -> list[Prompt]:
        """Every prompt it may draw."""
        return [p for prompts in self.prompts.values() for p in prompts]

    def _task(self, position: int) -> tuple[str, int]:
        """The task of the n-th draw (an iteration's, or a prompt's), and how many draws it had before."""
        rounds, turn = divmod(position, len(self.task_schedule))
        task = self.task_schedule[turn]
        return task, rounds * self.task_schedule.count(task) + self.task_schedule[:turn].count(task)

    def _prompt(self, task: str, index: int) -> Prompt:
        epoch, place = divmod(index, len(self.prompts[task]))
        order = list(range(len(self.prompts[task])))
        random.Random(f"{self.seed}/{task}/{epoch}").shuffle(order)
        return self.prompts[task][order[place]]

    def draw(self, iteration: int) -> Batch:
        """The prompts of an iteration, repeats beside each other, and a fresh seed for every sample."""
        if self.alternate:
            task, before = self._task(iteration)
            chosen = [self._prompt(task, before * self.size + i) for i in range(self.size)]
        else:
            chosen = [
                self._prompt(*self._task(iteration * self.size + i)) for i in range(self.size)
            ]
        prompts = [p for p in chosen for _ in range(self.repeats)]
        # Far above the seeds of evaluations, which count from a small number.
        first = (self.seed + 1 << 40) + iteration * len(prompts)
        return Batch(prompts, list(range(first, first + len(prompts))))
