"""Gradients of losses by an adapter's weights, and what batches of them say of their means.

The gradient of one batch is the mean plus noise. An inner product of means is estimated from pairs
of *different* batches (a U-statistic): their noise is independent, so the estimate is unbiased, and
so is that of the squared norm `<g, g>`. Standard errors are jackknife over batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..benchmarks import Benchmark
from ..config import validate
from ..lab.recipe import Recipe, build_objective
from ..losses import OPD, Objective
from ..policy import FlowPolicy

MIN_BATCHES = 3  # for a standard error by jackknife of a mean over pairs


def flat_gradient(value: torch.Tensor, parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """(P,) on the CPU: the gradient of a scalar by all parameters, in their order."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)]).cpu()


def loss_gradient(
    policy: FlowPolicy, objective: Objective, adapter: str, data: Any
) -> torch.Tensor:
    """(P,): the gradient of the first update's loss on what `objective.collect` gave, by the
    adapter's weights in the order of `FlowPolicy.adapter_parameters`."""
    parameters = policy.train_adapter(adapter)
    terms = objective.losses(policy, adapter, data, 0)
    return sum(flat_gradient(loss, parameters) for loss, _ in terms)


def distillation(
    benchmark: Benchmark,
    prompts_per_batch: int,
    images_per_prompt: int = 1,
    seed: int = 0,
    tasks: Sequence[str] = (),
    **opd: Any,
) -> OPD:
    """Distillation of the benchmark's experts without an anchor, sampled as the benchmark says, on
    the training prompts of `tasks` (all that have prompts and an expert). `opd`: see
    `OPDConfig`."""
    tasks = list(tasks) or [t for t in benchmark.prompt_tasks if t in benchmark.teachers]
    schedule = {"prompts_per_batch": prompts_per_batch, "images_per_prompt": images_per_prompt}
    recipe = {"schedule": {"tasks": tasks, **schedule}, "opd": {"mar": 0.0, **opd}, "seed": seed}
    return build_objective(validate(Recipe, {**recipe, "train": {"iterations": 1}}), benchmark)


def mean_over_pairs(gram: np.ndarray) -> np.ndarray:
    """The mean of `gram` (..., n, n) over pairs of different batches."""
    n = gram.shape[-1]
    return (gram.sum((-2, -1)) - np.trace(gram, axis1=-2, axis2=-1)) / (n * (n - 1))


def jackknife(
    statistic: Callable[[np.ndarray], np.ndarray], batches: int
) -> tuple[np.ndarray, np.ndarray]:
    """A statistic of the numbers of the batches, at all of them, and its standard error. Raises
    ValueError for fewer than `MIN_BATCHES`."""
    if batches < MIN_BATCHES:
        raise ValueError(
            f"a standard error over batches needs at least {MIN_BATCHES} of them, not {batches}"
        )
    everything = np.arange(batches)
    without = np.stack([statistic(np.delete(everything, i)) for i in everything])
    squares = ((without - without.mean(0)) ** 2).sum(0)
    return statistic(everything), np.sqrt((batches - 1) / batches * squares)


def t_quantile(n: int) -> float:
    """Half a 95 % interval of Student's t over `n` values, in standard errors."""
    from scipy import stats  # takes a second to import

    return float(stats.t.ppf(0.975, n - 1))
