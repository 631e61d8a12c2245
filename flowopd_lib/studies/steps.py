"""What each step of a walk is worth to a student: how far it is from its teachers there, what a loss makes of
that, and what learning from it alone brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from ..fit import fit
from ..objectives import OPD, Share
from ..policy import FlowPolicy
from ..progress import progress
from ..prompts import Prompt
from ..rollout import Sampler, sample
from ..schedule import Schedule
from ..sde import velocity_weight
from ..stats import mean_interval
from ..train import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

SHOWN = ("kl", "ode", "uniform_v")  # weightings


def teacher_pictures(
    policy: FlowPolicy, prompts: Sequence[Prompt], teachers: Mapping, sampler: Sampler, seed: int
) -> torch.Tensor:
    """(N, 3, H, W): what each prompt's own teacher draws, the i-th from the noise of `seed + i`."""
    found = {}
    for name in dict.fromkeys(teachers[p.task] for p in prompts):
        rows = [i for i, p in enumerate(prompts) if teachers[p.task] == name]
        pictures = sample(
            policy, [prompts[i] for i in rows], [seed + i for i in rows], sampler, name
        )
        found |= dict(zip(rows, pictures))
    return torch.stack([found[i] for i in range(len(prompts))])


def picture_distance(
    policy: FlowPolicy,
    adapter: str | None,
    prompts: Sequence[Prompt],
    theirs: torch.Tensor,
    sampler: Sampler,
    seed: int,
) -> np.ndarray:
    """(N,): how far the pictures of an adapter lie from `theirs`, drawn from the same noise: the root mean
    square over the pixels."""
    ours = sample(policy, prompts, range(seed, seed + len(prompts)), sampler, adapter)
    return (ours - theirs).square().flatten(1).mean(1).sqrt().numpy()


def worth_of_steps(
    policy: FlowPolicy,
    start: str,
    schedule: Schedule,
    teachers: Mapping[str, str | None],
    prompts: Sequence[Prompt],
    folder: str | Path,
    iterations: int,
    sampler: Sampler,
    seed: int = 0,
    walk: Sampler | None = None,
    accelerator: Accelerator | None = None,
) -> pd.DataFrame:
    """A row a step of the walks (`walk`; None: OPD's default): sigma, KL in nats, the share of the loss by
    weighting, and by how much pictures of `prompts`, drawn by `sampler`, are nearer their teachers' after
    `iterations` updates on that step alone, from `start`, equally many for every step: nearer, low, high
    (95 % over prompts), n.
    """
    objective = OPD(schedule, teachers, *([walk] if walk else []), mar=0.0)
    walks, walk = objective.collect(policy, start, 0, Share()), objective.sampler
    for _ in objective.losses(policy, start, walks, 0):
        pass
    kl, grid = objective.metrics(walks), policy.sigmas(walk.steps)
    lost = {name: [] for name in SHOWN}
    for k in walk.window:
        weight = {
            n: velocity_weight(grid[k], grid[k + 1], n, walk.kind, walk.noise_level) for n in SHOWN
        }
        for name in SHOWN:
            lost[name].append(kl[f"kl_step_{k}"] * weight[name] / weight["kl"])
    theirs = teacher_pictures(policy, prompts, teachers, sampler, seed)
    before, rows = picture_distance(policy, start, prompts, theirs, sampler, seed), []
    config = TrainConfig(iterations, 1e-3, warmup=3, ema=0.0)
    shown = accelerator is None or accelerator.is_main_process
    with progress(len(walk.window), "each step alone", shown) as advance:
        for k in walk.window:
            name = f"step_{k}"
            if name not in policy.adapters:
                policy.copy_adapter(start, name)
            alone = OPD(schedule, teachers, walk, weighting="uniform_v", mar=0.0, steps=(k,))
            fit(
                policy,
                alone,
                Path(folder) / name,
                config,
                name,
                shown=False,
                accelerator=accelerator,
            )
            nearer = before - picture_distance(policy, name, prompts, theirs, sampler, seed)
            shares = {f"share {name}": losses[k] / sum(losses) for name, losses in lost.items()}
            of_step = {"step": k, "sigma": grid[k], "kl": kl[f"kl_step_{k}"], **shares}
            measured = dict(zip(("nearer", "low", "high"), mean_interval(nearer)))
            rows.append({**of_step, **measured, "n": len(nearer), "before": before.mean()})
            advance(1)
    return pd.DataFrame(rows)
