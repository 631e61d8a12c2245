"""Bias and variance of the gradient estimators of the OPD loss (`losses.opd.LOSSES`), measured on
the same rollouts of the same student, in units of the mean gradient of `pathwise`:

    mean along pathwise   <E g, E g_pathwise> / |E g_pathwise|^2    1: the same gradient, 0: none
    noise                 tr Cov(g of one batch) / |E g_pathwise|^2

The mean is estimated with antithetic actions: at every visited state the action taken and its
mirror image, `2 mean - x_next`, which is as likely. The score changes its sign between the two, so
a reward that does not depend on the action adds no noise. `return_to_go` depends on what followed
the action taken, so it has no mirror image. The noise is that of one batch as a training draws it.

An estimator that multiplies a KL by a score has noise that shrinks with the KL, so the mean of
`return_to_go` is clearest with teachers close to the student (`distance`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from ..config import Count
from ..lab.workspace import Workspace
from ..losses import LOSSES, OPD, Shard
from ..losses.opd import mirrored
from ..merge import MergeConfig
from ..policy import FlowPolicy
from .gradients import MIN_BATCHES, distillation, jackknife, loss_gradient, mean_over_pairs
from .tables import TableJob, compute_shared, run_table_job

# pathwise does not depend on the action, and return_to_go on what followed the one taken
WITHOUT_MIRROR = {"pathwise", "return_to_go"}


def estimator_gradients(
    policy: FlowPolicy, adapter: str, objectives: Mapping[str, OPD], iteration: int
) -> dict[str, list[torch.Tensor]]:
    """By objective, (P,): the gradient of one batch with the actions taken and, where the estimator
    depends on them, with their mirror images. The objectives, estimators of one distillation, share
    the rollouts and the teachers' velocities."""
    every = list(objectives.values())
    collector = next((o for o in every if o.uses_actions), every[0])
    data, _ = collector.collect(policy, adapter, iteration, Shard())
    gradients = {}
    for name, objective in objectives.items():
        symmetric = set(str(objective.config.loss).split("+")) <= WITHOUT_MIRROR
        sides = [data] if symmetric else [data, mirrored(data)]
        gradients[name] = [loss_gradient(policy, objective, adapter, side) for side in sides]
    return gradients


def compare_estimators(
    gradients: Mapping[str, torch.Tensor], averaged: Mapping[str, torch.Tensor] | None = None
) -> pd.DataFrame:
    """A row per estimator from its gradients (batches, P), `pathwise` among them: estimator, mean
    along pathwise, se, noise, noise se, n batches. `averaged`: gradients of the same means with
    less noise, for the means. Raises ValueError for fewer than three batches."""
    averaged = gradients if averaged is None else averaged
    reference, rows = averaged["pathwise"].double(), []
    squares = (reference @ reference.T).numpy()
    for name, g in gradients.items():
        cross = (averaged[name].double() @ reference.T).numpy()
        own = (g.double() @ g.double().T).numpy()

        def statistics(batches: np.ndarray) -> np.ndarray:
            a, b, c = (gram[np.ix_(batches, batches)] for gram in (cross, own, squares))
            noise = np.trace(b) / len(b) - mean_over_pairs(b)
            return np.array([mean_over_pairs(a), noise]) / mean_over_pairs(c)

        (mean, noise), (mean_se, noise_se) = jackknife(statistics, len(reference))
        row = {"estimator": name, "mean along pathwise": mean, "se": mean_se}
        rows.append({**row, "noise": noise, "noise se": noise_se, "n": len(reference)})
    return pd.DataFrame(rows)


class EstimatorsJob(TableJob):
    """`batches` of `images`, one a prompt. `distance`: of the teachers from the student `adapter`,
    as a fraction of the experts'. `estimators`: of `losses.opd.LOSSES`, or several joined by
    `+`."""

    batches: Annotated[int, Field(ge=MIN_BATCHES)] = 24
    images: Count = 12
    distance: Annotated[float, Field(gt=0, le=1)] = 1.0
    estimators: list[str] = list(LOSSES)
    file: str = "estimators.parquet"


def estimators_job(config: EstimatorsJob, folder: Path, workspace: Workspace) -> None:
    """`file`: `compare_estimators` of a student and the experts that its prompts are routed to."""
    benchmark, policy, adapter = workspace.benchmark, workspace.policy, config.adapter
    estimators = list(dict.fromkeys(["pathwise", *config.estimators]))
    teachers = {t: e for t, e in benchmark.teachers.items() if t in benchmark.prompt_tasks}

    def near(expert: str) -> str:
        """The teacher that is `distance` of the way from the student to an expert."""
        name = f"near_{expert}_{config.distance:g}".replace(".", "p")
        weights = [1 - config.distance, config.distance]
        source = MergeConfig(merge="cat", adapters=[adapter, expert], weights=weights)
        workspace.load_adapter(name, source, config.adapters)
        return name

    def compute(partial: Path) -> pd.DataFrame:
        opd = {"teachers": {t: near(e) for t, e in teachers.items()} if config.distance < 1 else {}}
        size = config.images, 1, config.seed
        objectives = {name: distillation(benchmark, *size, loss=name, **opd) for name in estimators}
        keys = [(adapter, batch) for batch in range(config.batches)]
        parts = compute_shared(
            keys,
            lambda adapter, batch: estimator_gradients(policy, adapter, objectives, batch),
            partial,
            workspace.shard,
            f"gradients of {len(objectives)} estimators",
            workspace.show_progress,
        )
        taken, averaged = (
            {name: torch.stack([combine(parts[key][name]) for key in keys]) for name in estimators}
            for combine in (lambda sides: sides[0], lambda sides: sum(sides) / len(sides))
        )
        return compare_estimators(taken, averaged)

    run_table_job(config, folder, workspace, teachers.values(), compute)
