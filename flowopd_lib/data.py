"""Prompts, their files, and which of them an iteration trains on.

Prompt files have the formats of Flow-GRPO's `dataset/` folder, so that its own load unchanged:

    geneval/{split}_metadata.jsonl   one GenEval record a line: tag, include, exclude, prompt
    ocr/{split}.txt                  one prompt a line, the words to be drawn in double quotes
    pickscore_sfw/{split}.txt        one prompt a line
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictInt, model_validator

from .config import Config, Count, Index, validate
from .files import write_whole

Kind = Literal["geneval", "quoted", "plain"]  # of a prompt file
Line = Annotated[str, Field(pattern=r"\S")]


@dataclass(frozen=True)
class Prompt:
    """A prompt, the task it is routed by, and (for GenEval) the record of what a correct image
    shows."""

    text: str
    task: str
    metadata: dict = field(default_factory=dict, compare=False)

    @property
    def tag(self) -> str:
        return self.metadata.get("tag", self.task)


class Requirement(BaseModel):
    """One entry of `include` or `exclude` in a GenEval record."""

    label: Line = Field(alias="class")
    count: Annotated[StrictInt, Field(ge=1)]
    color: str | None = None
    # a relation, and the number of an entry before this one
    position: tuple[str, Index] | None = None


class GenEvalRecord(BaseModel):
    """A line of a GenEval file."""

    tag: Line
    prompt: Line
    include: Annotated[list[Requirement], Field(min_length=1)]
    exclude: list[Requirement] = []

    @model_validator(mode="after")
    def _positions(self):
        for number, entry in enumerate(self.include):
            if entry.position and entry.position[1] >= number:
                raise ValueError(f"include[{number}].position names no entry before it")
        return self


def read_prompts(path: str | Path, task: str, kind: Kind) -> list[Prompt]:
    """Read a file of prompts for a task. Raises ValueError, with file and line, for what is not in
    the format, and FileNotFoundError."""
    try:
        # splitlines() would split at U+2028 too
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        if kind == "geneval":
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            validate(GenEvalRecord, record, where)
            prompts.append(Prompt(record["prompt"], task, record))
            continue
        if kind == "quoted":
            quoted_words(line, where)
        prompts.append(Prompt(line.strip(), task))
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def write_prompts(path: str | Path, prompts: Sequence[Prompt]) -> None:
    """Write what `read_prompts` and Flow-GRPO read: GenEval's records where prompts have them, else
    lines."""
    lines = [json.dumps(p.metadata) if p.metadata else p.text for p in prompts]
    write_whole(Path(path), "\n".join(lines) + "\n")


def quoted_words(prompt: str, where: str = "") -> str:
    """What a sign has to say: the words between the first two double quotes. Raises ValueError
    without any. A single letter is allowed, but OCR may read it as another (rewards/ocr.py)."""
    parts = prompt.split('"')
    if len(parts) < 3 or not parts[1].strip():
        raise ValueError(f"{where or repr(prompt)} has no words in double quotes")
    return parts[1]


@dataclass(frozen=True)
class Batch:
    """Prompts with the seeds of their samples: those of an iteration, or one process's shard of
    them."""

    prompts: list[Prompt]
    seeds: list[int]

    def __len__(self) -> int:
        return len(self.prompts)


def slices(n: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


@dataclass(frozen=True)
class Shard:
    """One process's part of every iteration: items `rank::processes` of it, a way to gather
    everybody's values (tensors), and one to wait for the others."""

    rank: int = 0
    processes: int = 1
    gather: Callable[[Any], Any] = field(default=lambda values: values)
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
            here, images = sum(g in block for g in mine) * group, len(block) * group
            for s in slices(here, size):
                pieces.append((update, slice(row + s.start, row + s.stop), images))
            row += here
        return pieces


class ScheduleConfig(Config):
    """`prompts_per_batch` prompts an iteration, `images_per_prompt` samples of each.

    `task_weights`: how often each task's prompts are drawn; equal by default. `alternate`: an
    iteration has one task, in turn by its weight, as in GRPO-Mix (GenEval : OCR : PickScore = 3 : 1
    : 1); otherwise batches are mixed. `tag_weights`: how often prompts of a GenEval tag are drawn;
    1 by default.
    """

    tasks: Annotated[list[str], Field(min_length=1)] | None = None
    prompts_per_batch: Count
    images_per_prompt: Count = 1
    task_weights: dict[str, Count] = {}
    alternate: bool = False
    tag_weights: dict[str, Index] = {}


class Schedule:
    """Which prompts an iteration trains on: a function of seed and iteration alone, so that a
    resumed run continues exactly. Each task goes through its prompts in random order before any is
    drawn again."""

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
        if set(weights) != set(prompts):
            raise ValueError(f"task_weights must be of {', '.join(prompts)}, not {weights}")
        self.prompts = {task: list(p) for task, p in prompts.items()}
        self.prompts_per_batch, self.images_per_prompt = prompts_per_batch, images_per_prompt
        self.alternate, self.seed = alternate, seed
        turns = [(i / n, task) for task, n in weights.items() for i in range(n)]
        # 3:1:1 -> geneval ocr pickscore geneval geneval
        self.task_order = [task for _, task in sorted(turns, key=lambda turn: turn[0])]

    @property
    def all_prompts(self) -> list[Prompt]:
        return [p for prompts in self.prompts.values() for p in prompts]

    def _task(self, position: int) -> tuple[str, int]:
        """The task of the n-th draw (of an iteration, or of a prompt), and how many draws it had
        before."""
        rounds, turn = divmod(position, len(self.task_order))
        task = self.task_order[turn]
        return task, rounds * self.task_order.count(task) + self.task_order[:turn].count(task)

    def _prompt(self, task: str, index: int) -> Prompt:
        epoch, position = divmod(index, len(self.prompts[task]))
        order = list(range(len(self.prompts[task])))
        random.Random(f"{self.seed}/{task}/{epoch}").shuffle(order)
        return self.prompts[task][order[position]]

    def draw(self, iteration: int) -> Batch:
        """The prompts of an iteration, the samples of one prompt next to each other, each with a
        seed of its own."""
        n = self.prompts_per_batch
        if self.alternate:
            task, before = self._task(iteration)
            chosen = [self._prompt(task, before * n + i) for i in range(n)]
        else:
            chosen = [self._prompt(*self._task(iteration * n + i)) for i in range(n)]
        prompts = [p for p in chosen for _ in range(self.images_per_prompt)]
        # far above the seeds of evaluations, which count from a small number
        first = (self.seed + 1 << 40) + iteration * len(prompts)
        return Batch(prompts, list(range(first, first + len(prompts))))
