"""Notebook 07. Bias and variance of the gradient estimators of the OPD loss (`losses.opd.LOSSES`),
measured on the same rollouts of the same student, in units of the mean gradient of `pathwise`:

    mean along pathwise   <E g, E g_pathwise> / |E g_pathwise|^2    1: the same gradient, 0: none
    noise                 tr Cov(g of one batch) / |E g_pathwise|^2

The mean is estimated with antithetic actions: at every visited state the action taken and its
mirror image, `2 mean - x_next`, which is as likely. The score changes its sign between the two, so
a reward that does not depend on the action adds no noise. `return_to_go` depends on what followed
the action taken, so it has no mirror image. The noise is that of one batch as a training draws it.

An estimator that multiplies a KL by a score has noise that shrinks with the KL, so the mean of
`return_to_go` is clearest with teachers close to the student (`distance`).

And the per-timestep ablation: how far the student is from its teachers at each denoising step, what
share of the loss each weighting gives to it, and what training at that step alone gains.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from ..config import Count
from ..files import progress
from ..lab.recipe import guidance_of
from ..lab.workspace import Workspace
from ..losses import LOSSES, OPD, Shard, sample_teachers
from ..losses.opd import mirrored
from ..merge import MergeConfig
from ..policy import FlowPolicy
from ..rollout import sample
from ..stats import mean_interval
from ..train import TrainConfig, fit
from .gradients import (
    MIN_BATCHES,
    TableJob,
    distillation,
    gradients_of_batches,
    jackknife,
    loss_gradient,
    mean_over_pairs,
    run_table_job,
)

# pathwise does not depend on the action, and return_to_go on what followed the one taken
WITHOUT_MIRROR = {"pathwise", "return_to_go"}
COMPARED = ("kl", "ode", "uniform_v")  # weightings, in the ablation

# --- estimators


def estimator_gradients(
    policy: FlowPolicy, adapter: str, objectives: Mapping[str, OPD], iteration: int
) -> dict[str, list[torch.Tensor]]:
    """By objective, (P,): the gradient of one batch with the actions taken and, where the estimator
    depends on them, with their mirror images. The objectives, estimators of one distillation, share
    the rollouts and the teachers' velocities."""
    collector = max(objectives.values(), key=lambda objective: objective.uses_actions)
    data, _ = collector.collect(policy, adapter, iteration, Shard())
    gradients = {}
    for name, objective in objectives.items():
        symmetric = set(str(objective.config.loss).split("+")) <= WITHOUT_MIRROR
        sides = [data] if symmetric else [data, mirrored(data)]
        gradients[name] = [loss_gradient(policy, objective, adapter, side) for side in sides]
    return gradients


def compare_estimators(
    gradients: Mapping[str, torch.Tensor], averaged: Mapping[str, torch.Tensor]
) -> pd.DataFrame:
    """A row per estimator from its gradients (batches, P), `pathwise` among them: estimator, mean
    along pathwise, se, noise, noise se, n batches. `averaged`: gradients of the same means with
    less noise, for the means."""
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
    teachers = {task: benchmark.teachers[task] for task in benchmark.distilled_tasks}

    def near(expert: str) -> str:
        """The teacher that is `distance` of the way from the student to an expert."""
        name = f"near_{expert}_{config.distance:g}".replace(".", "p")
        weights = [1 - config.distance, config.distance]
        source = MergeConfig(merge="cat", adapters=[adapter, expert], weights=weights)
        workspace.load_adapter(name, source, config.adapters)
        return name

    def compute(partial: Path) -> pd.DataFrame:
        opd = {"teachers": {t: near(e) for t, e in teachers.items()} if config.distance < 1 else {}}
        objectives = {
            name: distillation(benchmark, config.images, 1, config.seed, loss=name, **opd)
            for name in dict.fromkeys(["pathwise", *config.estimators])
        }

        def gradients(adapter: str, batch: int) -> dict[str, list[torch.Tensor]]:
            return estimator_gradients(policy, adapter, objectives, batch)

        found = gradients_of_batches(gradients, [adapter], config.batches, partial, workspace)
        sides = {name: [batch[name] for batch in found[adapter]] for name in objectives}
        taken = {name: torch.stack([s[0] for s in batches]) for name, batches in sides.items()}
        averaged = {
            name: torch.stack([sum(s) / len(s) for s in batches]) for name, batches in sides.items()
        }
        return compare_estimators(taken, averaged)

    run_table_job(config, folder, workspace, teachers.values(), compute)


# --- the per-timestep ablation


@torch.no_grad()
def loss_by_step(policy: FlowPolicy, objective: OPD, adapter: str) -> pd.DataFrame:
    """A row per trained step of one batch: step, sigma, kl (of the SDE's policies), and the share
    of the loss it has by weighting (`share kl`, ...)."""
    sampler, grid = objective.sampler, policy.sigmas(objective.sampler.steps)
    data, _ = objective.collect(policy, adapter, 0, Shard())
    values, rows = defaultdict(list), []
    for _, metrics in objective.losses(policy, adapter, data, 0):
        for name, value in metrics.items():
            values[name].append(value.reshape(-1))
    for k in sampler.trainable_steps:
        kl = torch.cat(values[f"kl_step_{k}"]).mean().item()
        weight = {n: sampler.step_weights(grid[k], grid[k + 1], n).item() for n in COMPARED}
        losses = {f"share {n}": kl * weight[n] / weight["kl"] for n in COMPARED}
        rows.append({"step": k, "sigma": grid[k], "kl": kl, **losses})
    table = pd.DataFrame(rows)
    shares = table.filter(like="share ")
    return table.assign(**(shares / shares.sum()))


class StepsJob(TableJob):
    """`iterations` of OPD at each step alone, `prompts_per_batch` images each, measured on the
    first `n` val prompts of each task, sampled in `steps` ODE steps."""

    iterations: Count
    prompts_per_batch: Count
    n: Count = 24
    steps: Count = 20
    file: str = "steps.parquet"


def steps_job(config: StepsJob, folder: Path, workspace: Workspace) -> None:
    """`file`: `loss_by_step` with, of a student that starts at `adapter` and trains at that step
    alone, by how much its images come closer to those of their teachers from the same noise:
    distance_reduction, low, high (95 % over prompts), n, and the mean distance before."""
    benchmark, policy, start = workspace.benchmark, workspace.policy, config.adapter
    teachers = {task: benchmark.teachers[task] for task in benchmark.distilled_tasks}
    prompts = [p for p in benchmark.first_prompts("val", config.n) if p.task in teachers]
    sampler, seed = benchmark.sampler(config.steps), config.seed
    train = TrainConfig(config.iterations, 1e-3, warmup=3, ema=0.0)

    def compute(partial: Path) -> pd.DataFrame:
        seeds, guidance = range(seed, seed + len(prompts)), guidance_of(benchmark, config.adapters)
        latents = sample_teachers(policy, prompts, seeds, teachers, sampler, guidance=guidance)
        targets = torch.cat([policy.decode(part).cpu() for part in latents.split(64)])

        def distances(adapter: str) -> np.ndarray:
            """(N,): root mean square over the pixels between the teachers' images and its own."""
            images = sample(policy, prompts, seeds, sampler, adapter)
            return (images - targets).square().flatten(1).mean(1).sqrt().numpy()

        def objective(**opd) -> OPD:
            return distillation(benchmark, config.prompts_per_batch, 1, seed, **opd)

        before, table, reductions = distances(start), loss_by_step(policy, objective(), start), []
        shown = workspace.main and workspace.show_progress
        with progress(len(table), "training at each step alone", shown) as advance:
            for k in table["step"].tolist():
                name = f"step_{k}"
                workspace.load_adapter(name, start, config.adapters)
                alone = objective(weighting="uniform_v", trained_steps=[k])
                how = {"show_progress": False, "accelerator": workspace.accelerator}
                fit(policy, alone, partial / name, train, name, **how)
                reductions.append(mean_interval(before - distances(name)))
                policy.remove_adapter(name)
                advance(1)
        rows = pd.DataFrame(reductions, columns=["distance_reduction", "low", "high"])
        rows = rows.assign(n=len(prompts), before=before.mean())
        return pd.concat([table, rows], axis=1)

    run_table_job(config, folder, workspace, teachers.values(), compute)
