"""A training to its end in one call, with what is asked of the model on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from .files import append_lines, read_lines
from .objectives import Objective
from .policy import FlowPolicy
from .progress import progress
from .train import TrainConfig, train


def fit(
    policy: FlowPolicy,
    objective: Objective,
    folder: str | Path,
    config: TrainConfig,
    adapter: str = "student",
    probe: Callable[[str], pd.DataFrame] | None = None,
    every: int = 0,
    shown: bool = True,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`train` to the end, in one process: its metrics, a row an iteration, and what `probe(adapter)` told on
    the way.

    The probe is asked before the first iteration, after every `every` and after the last (then about the
    averaged weights); its rows get
    `iteration` (how many were done) and `seconds` of training. They are kept in `folder/probes.jsonl`, so a
    resumed training has them all.
    """
    folder = Path(folder)
    log = folder / "probes.jsonl"
    asked = set(read_lines(log).get("iteration", []))

    def ask(iteration: int, seconds: float) -> None:
        if probe is not None and iteration not in asked:
            rows = probe(adapter).assign(iteration=iteration, seconds=seconds)
            # one write, so that a kill leaves all of a probe's rows or none
            append_lines(log, rows.to_json(orient="records", lines=True))

    ask(0, 0.0)
    by_time = config.max_seconds < math.inf
    with progress(config.max_seconds if by_time else config.iterations, f"train {adapter}", shown) as advance:
        before = 0.0
        for info in train(policy, objective, folder, config, adapter):
            done = info.iteration + 1
            if not info.metrics:
                continue
            now = min(info.seconds, config.max_seconds) if by_time else done
            advance(now - before)
            before = now
            if every and done % every == 0 and done < config.iterations and info.seconds < config.max_seconds:
                ask(done, info.seconds)
    curve = read_lines(folder / "metrics.jsonl")
    ask(len(curve), curve["seconds"].iloc[-1])
    return curve, read_lines(log)
