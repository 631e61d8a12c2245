"""The loop that every training of the build shares: resume, log, checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...checkpoint import load_state, save_state


def run_steps(
    name: str,
    work: Path,
    steps: int,
    parts: Mapping[str, Any],
    step: Callable[[int], float],
    log: Callable[[str], Any] = print,
    every: int = 500,
    settings: Any = None,
    on_save: Callable[[], Any] = lambda: None,
) -> None:
    """`step(i)` -> loss, for i up to `steps`. `parts`: everything with a state (modules,
    optimizers, schedules), saved in `work/NAME.safetensors` every `every` steps and at the end, and
    resumed from there.

    Raises ValueError where that file was begun with other `settings`.
    """
    file, first = work / f"{name}.safetensors", 0
    if file.exists():
        state = load_state(file)
        if state["settings"] != settings:
            raise ValueError(
                f"{file} was begun with {state['settings']}, not {settings}; delete it to start "
                "over"
            )
        first = state["step"]
        for key, part in parts.items():
            part.load_state_dict(state[key])
        log(f"{name}: resumed at step {first}")
    start, losses = time.time(), []
    for i in range(first, steps):
        losses.append(step(i))
        if (i + 1) % 100 == 0:
            speed = (time.time() - start) / (i + 1 - first)
            log(f"{name} {i + 1}/{steps} loss {sum(losses) / len(losses):.4f} {speed:.3f} s/step")
            losses = []
        if (i + 1) % every == 0 or i + 1 == steps:
            states = {key: part.state_dict() for key, part in parts.items()}
            save_state(file, {**states, "step": i + 1, "settings": settings})
            on_save()


def update_average(average: Iterable, parameters: Iterable, step: int, decay: float) -> None:
    """Exponential moving average of weights, shorter at the beginning."""
    with torch.no_grad():
        weight = 1 - min(decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average), list(parameters), weight)
