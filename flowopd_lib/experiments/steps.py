"""Per-timestep ablation: how far the student is from its teachers at each denoising step, what
share of the loss each weighting gives to it, and what training at that step alone gains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ..config import Count
from ..data import Prompt
from ..lab.workspace import Workspace
from ..losses import OPD, Shard, sample_teachers
from ..policy import FlowPolicy
from ..progress import progress
from ..rollout import Sampler, sample
from ..stats import mean_interval
from ..train import TrainConfig, fit
from .gradients import distillation
from .tables import TableJob, run_table_job

COMPARED = ("kl", "ode", "uniform_v")  # weightings
DECODED = 64  # latents at a time


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


def image_distances(
    policy: FlowPolicy,
    adapter: str | None,
    prompts: Sequence[Prompt],
    targets: torch.Tensor,
    sampler: Sampler,
    seed: int,
) -> np.ndarray:
    """(N,): the root mean square over the pixels between `targets` (N, 3, H, W) and what the
    adapter samples, the i-th prompt from the noise of `seed + i`."""
    images = sample(policy, prompts, range(seed, seed + len(prompts)), sampler, adapter)
    return (images - targets).square().flatten(1).mean(1).sqrt().numpy()


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
    teachers = {t: e for t, e in benchmark.teachers.items() if t in benchmark.prompt_tasks}
    prompts = [p for p in benchmark.first_prompts("val", config.n) if p.task in teachers]
    sampler, seed = benchmark.sampler(config.steps), config.seed
    size = config.prompts_per_batch, 1, seed
    train = TrainConfig(config.iterations, 1e-3, warmup=3, ema=0.0)

    def compute(partial: Path) -> pd.DataFrame:
        seeds, guidance = range(seed, seed + len(prompts)), benchmark.guidance
        latents = sample_teachers(policy, prompts, seeds, teachers, sampler, guidance=guidance)
        targets = torch.cat([policy.decode(part).cpu() for part in latents.split(DECODED)])
        before = image_distances(policy, start, prompts, targets, sampler, seed)
        table, reductions = loss_by_step(policy, distillation(benchmark, *size), start), []
        shown = workspace.main and workspace.show_progress
        with progress(len(table), "training at each step alone", shown) as advance:
            for k in table["step"].tolist():
                name = f"step_{k}"
                if name in policy.adapters:
                    policy.remove_adapter(name)
                policy.copy_adapter(start, name)
                objective = distillation(benchmark, *size, weighting="uniform_v", trained_steps=[k])
                how = {"show_progress": False, "accelerator": workspace.accelerator}
                fit(policy, objective, partial / name, train, name, **how)
                after = image_distances(policy, name, prompts, targets, sampler, seed)
                mean, low, high = mean_interval(before - after)
                reductions.append({"distance_reduction": mean, "low": low, "high": high})
                policy.remove_adapter(name)
                advance(1)
        rows = pd.DataFrame(reductions).assign(n=len(prompts), before=before.mean())
        return pd.concat([table, rows], axis=1)

    run_table_job(config, folder, workspace, teachers.values(), compute)
