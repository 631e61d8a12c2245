"""What the trainings of the build share: AdamW, and a loop that logs, saves and resumes."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...files import load_state, save_state


def say(message: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {message}", flush=True)


class Descent:
    """AdamW on clipped gradients, with one cycle of the learning rate over all steps."""

    def __init__(
        self, parameters: Iterable, rate: float, steps: int, warmup: float, weight_decay: float
    ):
        self.parameters = list(parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters, rate, betas=(0.9, 0.98), weight_decay=weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, rate, steps, pct_start=warmup, cycle_momentum=False
        )
        self.parts = {"optimizer": self.optimizer, "schedule": self.schedule}

    def step(self, loss: torch.Tensor) -> float:
        """One update; the loss as a number."""
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


def run_steps(
    name: str,
    work: Path,
    steps: int,
    parts: Mapping[str, Any],
    step: Callable[[int], float],
    every: int = 500,
    settings: Any = None,
) -> None:
    """`step(i)` -> loss, for i up to `steps`. `parts`: everything with a state (modules,
    optimizers, schedules), saved in `work/NAME.safetensors` every `every` steps and at the end, and
    resumed from there.

    Raises ValueError where that file was started with other `settings`.
    """
    file, first = work / f"{name}.safetensors", 0
    if file.exists():
        state = load_state(file)
        first = state["step"]
        if state["settings"] != settings:
            raise ValueError(
                f"{file} was started with {state['settings']}, not {settings}; delete it to start "
                "over"
            )
        for key, part in parts.items():
            part.load_state_dict(state[key])
        say(f"{name}: resumed at step {first}")
    start, losses = time.time(), []
    for i in range(first, steps):
        losses.append(step(i))
        if (i + 1) % 100 == 0:
            speed = (time.time() - start) / (i + 1 - first)
            say(f"{name} {i + 1}/{steps} loss {sum(losses) / len(losses):.4f} {speed:.3f} s/step")
            losses = []
        if (i + 1) % every == 0 or i + 1 == steps:
            states = {key: part.state_dict() for key, part in parts.items()}
            save_state(file, {**states, "step": i + 1, "settings": settings})


def update_average(average: Iterable, parameters: Iterable, step: int, decay: float) -> None:
    """Exponential moving average of weights, shorter at the beginning."""
    with torch.no_grad():
        weight = 1 - min(decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average), list(parameters), weight)
