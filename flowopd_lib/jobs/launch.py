"""A training beside the notebook, in a thread of its kernel, and looks at its samples on the way. It tells of
itself by its folder alone, as one in processes of its own does (see `processes`).

metrics.jsonl   a line an iteration (`train` writes it)
looks.jsonl     a line a sample drawn on the way, as `evaluate` makes it; its picture is in looks/
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from ..evaluate import evaluate
from ..files import locked, read_lines, write_whole
from ..objectives import Objective
from ..policy import FlowPolicy
from ..prompts import Prompt
from ..rewards import Reward, attribute
from ..rollout import Sampler
from ..schedule import Schedule
from ..train import StepInfo, TrainConfig, train


@dataclass(frozen=True)
class Look:
    """The same prompts and noise drawn and scored before a training, after every `every` iterations and, by
    its averaged weights, at its end."""

    prompts: Sequence[Prompt]
    rewards: Mapping[str, Reward] = field(default_factory=dict)
    every: int = 10
    sampler: Sampler = Sampler(20)
    seed: int = 0

    def __post_init__(self):
        if self.every < 1 or not self.prompts:
            raise ValueError(
                f"a look needs at least one prompt and one iteration between two, not {len(self.prompts)} "
                f"and {self.every}"
            )

    def __call__(self, policy: FlowPolicy, adapter: str, folder: Path, iteration: int) -> None:
        rewards = {n: j for n, j in self.rewards.items() if not attribute(j, "training")}
        rows = evaluate(
            policy,
            self.prompts,
            rewards,
            self.seed,
            self.sampler,
            {f"iteration {iteration}": adapter},
            progress=False,
            pictures=folder / "looks",
        )
        # A resumed training looks again at iterations since its checkpoint, and one that ends replaces its
        # last look: the last word counts.
        before = read_lines(folder / "looks.jsonl")
        kept = (
            pd.concat(
                [before[before["model"] != f"iteration {iteration}"], rows], ignore_index=True
            )
            if len(before)
            else rows
        )
        # a reader sees all of a look's rows or none
        write_whole(folder / "looks.jsonl", kept.to_json(orient="records", lines=True))

    def during(
        self, updates: Iterator[StepInfo], policy: FlowPolicy, adapter: str, folder: str | Path
    ) -> Iterator[StepInfo]:
        """The same updates, with looks between them; closing this closes `updates`."""
        folder, done = Path(folder), 0
        if not (folder / "state.safetensors").exists():
            # `updates` has not begun, so it has no lock yet
            with locked(folder, f"a look at {adapter}"):
                self(policy, adapter, folder, 0)
        with contextlib.closing(updates):
            for info in updates:
                if info.metrics:
                    done = info.iteration + 1
                    if done % self.every == 0:
                        self(policy, adapter, folder, done)
                yield info
        if done:
            self(policy, adapter, folder, done)


def some_prompts(schedule: Schedule, n: int = 6) -> list[Prompt]:
    """About `n` different training prompts, as many of each task."""
    return [
        p
        for prompts in schedule.prompts.values()
        for p in list(dict.fromkeys(prompts))[: max(1, n // len(schedule.prompts))]
    ]


class InProcess:
    """`train` in a thread of this process; its policy is the thread's until it ends. A kernel that goes loses
    what came after the last checkpoint."""

    def __init__(
        self,
        policy: FlowPolicy,
        objective: Objective,
        folder: str | Path,
        config: TrainConfig,
        adapter: str = "student",
        look: Look | None = None,
    ):
        self.folder, self.iterations = Path(folder), config.iterations
        self._arguments, self._look, self._stop, self._thread = (
            (policy, objective, self.folder, config, adapter),
            look,
            threading.Event(),
            None,
        )
        self.state, self.error = "waiting", ""  # waiting, running, stopped, over, failed

    def start(self) -> None:
        """Begin, or go on from the checkpoint in the folder."""
        if self.state == "running":
            raise RuntimeError(f"the training in {self.folder} is running already")
        self._stop.clear()
        self.state, self.error = "running", ""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        policy, adapter, state = self._arguments[0], self._arguments[-1], "over"
        try:
            updates = train(*self._arguments)
            with contextlib.closing(
                self._look.during(updates, policy, adapter, self.folder) if self._look else updates
            ) as updates:
                for info in updates:
                    if info.metrics and self._stop.is_set():
                        state = "stopped"
                        break
        except Exception as error:  # a thread's errors are seen by nobody else
            state, self.error = "failed", f"{type(error).__name__}: {error}"
        self.state = state

    def stop(self) -> None:
        """Ask it to end after this iteration, with a checkpoint."""
        self._stop.set()

    def wait(self) -> None:
        """Until it has ended. Raises RuntimeError with what it failed by."""
        if self._thread is not None:
            self._thread.join()
        if self.state == "failed":
            raise RuntimeError(f"the training in {self.folder} failed: {self.error}")
