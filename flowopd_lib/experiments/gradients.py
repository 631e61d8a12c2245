"""Gradients of losses by an adapter's weights, what batches of them say of their means, and jobs
that leave one table: computed once, resumed after a stop, shared by several processes.

The gradient of one batch is the mean plus noise. An inner product of means is estimated from pairs
of *different* batches (a U-statistic): their noise is independent, so the estimate is unbiased, and
so is that of the squared norm `<g, g>`. Standard errors are jackknife over batches.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..benchmarks import DEFAULT, Benchmark
from ..config import Config, Seed, validate
from ..evaluate import read_fingerprint, write_with_fingerprint
from ..files import load_state, progress, save_state, set_aside
from ..fingerprint import CODE, code_hashes, sha256_of_json
from ..lab.cache import trained_on
from ..lab.recipe import Recipe, Source, build_objective
from ..lab.workspace import Workspace
from ..losses import OPD, Objective
from ..policy import FlowPolicy

MIN_BATCHES = 3  # for a standard error by jackknife of a mean over pairs

# --- gradients


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
    schedule = {"tasks": list(tasks or benchmark.distilled_tasks)}
    schedule |= {"prompts_per_batch": prompts_per_batch, "images_per_prompt": images_per_prompt}
    recipe = {"schedule": schedule, "opd": {"mar": 0.0, **opd}, "seed": seed}
    return build_objective(validate(Recipe, {**recipe, "train": {"iterations": 1}}), benchmark)


def mean_over_pairs(gram: np.ndarray) -> np.ndarray:
    """The mean of `gram` (..., n, n) over pairs of different batches."""
    n = gram.shape[-1]
    return (gram.sum((-2, -1)) - np.trace(gram, axis1=-2, axis2=-1)) / (n * (n - 1))


def jackknife(
    statistic: Callable[[np.ndarray], np.ndarray], batches: int
) -> tuple[np.ndarray, np.ndarray]:
    """A statistic of the numbers of the batches (at least `MIN_BATCHES`), at all of them, and its
    standard error."""
    everything = np.arange(batches)
    without = np.stack([statistic(np.delete(everything, i)) for i in everything])
    squares = ((without - without.mean(0)) ** 2).sum(0)
    return statistic(everything), np.sqrt((batches - 1) / batches * squares)


def t_quantile(n: int) -> float:
    """Half a 95 % interval of Student's t over `n` values, in standard errors."""
    from scipy import stats  # takes a second to import

    return float(stats.t.ppf(0.975, n - 1))


# --- tables


class TableJob(Config):
    """`adapter`: the one that is examined, an expert of the benchmark or one of `adapters` (name ->
    source). `file`: of the table, in the job's folder."""

    benchmark: str = DEFAULT
    adapters: dict[str, Source] = {}
    adapter: str
    seed: Seed = 0
    file: str


def run_table_job(
    config: TableJob,
    folder: Path,
    workspace: Workspace,
    adapters: Iterable[str],
    compute: Callable[[Path], pd.DataFrame],
) -> None:
    """Write `compute(partial)` to `folder/file`, where `partial` is a folder for partial results.

    Nothing is computed where the table is there already and follows from the same configuration,
    model and adapters (`adapters`: those used besides `config.adapter`); a table of something else
    is moved into `earlier/`.
    """
    policy, shard, path = workspace.policy, workspace.shard, folder / config.file
    names = sorted({config.adapter, *adapters})
    workspace.load_adapters(names, config.adapters)
    follows_from = {
        "config": config.model_dump(mode="json", exclude={"benchmark", "adapters"}),
        "adapters": {name: policy.adapter(name).sha256 for name in names},
        "base": policy.base_hash,
        "precision": policy.precision,
        "benchmark": trained_on(workspace.benchmark),
        "code": code_hashes((*CODE, "experiments")),
    }
    fingerprint = sha256_of_json(follows_from)
    finished = path.is_file() and read_fingerprint(path) == fingerprint
    shard.wait()  # all processes have checked before the first one moves anything
    if finished:
        return
    if workspace.main:
        set_aside(folder, path)
    partial = folder / f".{path.stem}_{fingerprint[:12]}"
    table = compute(partial)
    policy.train_adapter(None)
    shard.wait()
    if workspace.main:
        write_with_fingerprint(path, fingerprint, table)
        shutil.rmtree(partial, ignore_errors=True)
    shard.wait()


def gradients_of_batches(
    compute: Callable[[str, int], Any],
    names: Sequence[str],
    batches: int,
    partial: Path,
    workspace: Workspace,
) -> dict[str, list[Any]]:
    """`compute(name, batch)` (tensors and JSON values) of every batch, by name. Each result is
    saved in `partial` when it is there, so a second call resumes; several processes share them."""
    keys = [(name, batch) for name in names for batch in range(batches)]
    files = {key: partial / "{}_{}.safetensors".format(*key) for key in keys}
    mine = keys[workspace.shard.rank :: workspace.shard.processes]
    shown = workspace.show_progress and workspace.main
    with progress(len(mine), f"gradients of {len(keys)} batches", shown) as advance:
        for key in mine:
            if not files[key].is_file():
                save_state(files[key], compute(*key))
            advance(1)
    workspace.shard.wait()
    return {name: [load_state(files[name, b]) for b in range(batches)] for name in names}
