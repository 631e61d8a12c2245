"""A training to its end in one call, with what is asked of the model on the way."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from .files import append_lines, read_lines
from .objectives import Objective
from .policy import FlowPolicy
from .progress import progress
from .train import StepInfo, TrainConfig, train

if TYPE_CHECKING:
    from accelerate import Accelerator


@contextlib.contextmanager
def weights_of(policy: FlowPolicy, adapter: str, weights: Sequence[torch.Tensor]) -> Iterator[None]:
    """The adapter with other weights for a while; with none, as it is."""
    own = list(policy.adapter_parameters(adapter).values()) if weights else []
    before = [p.detach().clone() for p in own]
    with torch.no_grad():
        for p, other in zip(own, weights):
            p.copy_(other)
        try:
            yield
        finally:
            for p, saved in zip(own, before):
                p.copy_(saved)


def fit(
    policy: FlowPolicy,
    objective: Objective,
    folder: str | Path,
    config: TrainConfig,
    adapter: str = "student",
    probe: Callable[[str], pd.DataFrame] | None = None,
    every: int = 0,
    shown: bool = True,
    accelerator: Accelerator | None = None,
    told: Callable[[StepInfo], bool | None] | None = None,
    during: Callable[[Iterator[StepInfo]], Iterator[StepInfo]] = lambda updates: updates,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`train` to the end: its metrics, a row an iteration, and what `probe(adapter)`, asked in all processes,
    told on the way. `told` hears of every iteration and may end the training there, with a checkpoint, by
    returning True; `during` may do something between two updates.

    The probe is asked before the first iteration, after every `every` and after the last, about the averaged
    weights; its rows get `iteration` (how many were done) and `seconds` of training. They are kept in
    `folder/probes.jsonl`, so a resumed training has them all.
    """
    folder = Path(folder)
    log = folder / "probes.jsonl"
    asked = set(read_lines(log).get("iteration", []))
    main = accelerator is None or accelerator.is_main_process

    def ask(iteration: int, seconds: float, average: Sequence[torch.Tensor] = ()) -> None:
        if probe is not None and iteration not in asked:
            with weights_of(policy, adapter, average):
                rows = probe(adapter).assign(iteration=iteration, seconds=seconds)
            if main:  # one write, so that a kill leaves all of a probe's rows or none
                append_lines(log, rows.to_json(orient="records", lines=True))

    ask(0, 0.0)
    by_time = config.max_seconds < math.inf
    total = config.max_seconds if by_time else config.iterations
    ended = True
    with (
        progress(total, f"train {adapter}", shown and main) as advance,
        contextlib.closing(
            during(train(policy, objective, folder, config, adapter, accelerator))
        ) as updates,
    ):
        before = 0.0
        for info in updates:
            done = info.iteration + 1
            if not info.metrics:
                continue
            now = min(info.seconds, config.max_seconds) if by_time else done
            advance(now - before)
            before = now
            if (
                every
                and done % every == 0
                and done < config.iterations
                and info.seconds < config.max_seconds
            ):
                ask(done, info.seconds, info.average)
            if told is not None and told(info):
                ended = False
                break
    curve = read_lines(folder / "metrics.jsonl")
    if ended:
        ask(len(curve), curve["seconds"].iloc[-1])
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return curve, read_lines(log)
