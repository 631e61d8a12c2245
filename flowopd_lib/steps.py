"""What each step of a walk is worth to a student: how far it is from its teachers there, what a loss makes of that, and what learning from it alone brings."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .evaluate import mean_interval
from .objectives import OPD, Share
from .policy import FlowPolicy
from .progress import progress
from .prompts import Prompt
from .rollout import Sampler, sample
from .schedule import Schedule
from .sde import velocity_weight
from .train import TrainConfig, fit

WEIGHTINGS = ("kl", "ode", "uniform_v")


def teacher_pictures(policy: FlowPolicy, prompts: Sequence[Prompt], teachers: Mapping[str, str | None], sampler: Sampler, seed: int) -> torch.Tensor:
    """(N, 3, H, W): what each prompt's own teacher draws, the i-th from the noise of `seed + i`."""
    found = {}
    for name in dict.fromkeys(teachers[p.task] for p in prompts):
        rows = [i for i, p in enumerate(prompts) if teachers[p.task] == name]
        found |= dict(zip(rows, sample(policy, [prompts[i] for i in rows], [seed + i for i in rows], sampler, name)))
    return torch.stack([found[i] for i in range(len(prompts))])


def picture_distance(policy: FlowPolicy, adapter: str | None, prompts: Sequence[Prompt], theirs: torch.Tensor, sampler: Sampler, seed: int) -> np.ndarray:
    """(N,): how far the pictures of an adapter lie from `theirs`, drawn from the same noise: the root mean square over the pixels."""
    ours = sample(policy, prompts, range(seed, seed + len(prompts)), sampler, adapter)
    return (ours - theirs).square().flatten(1).mean(1).sqrt().numpy()


def worth_of_steps(policy: FlowPolicy, start: str, schedule: Schedule, teachers: Mapping[str, str | None], prompts: Sequence[Prompt], folder: str | Path, iterations: int,
                   walk: Sampler = Sampler(10, "sde"), sampler: Sampler = Sampler(20), lr: float = 1e-3, seed: int = 0) -> pd.DataFrame:
    """A row a step: sigma, KL in nats, the share of the loss by weighting, and by how much pictures of `prompts` are nearer their teachers' after `iterations`
    updates on that step alone, from `start`, equally many for every step: nearer, low, high (95 % over prompts), n.
    """
    policy.train_adapter(None)
    data = OPD(schedule, teachers, walk, mar=0., micro=schedule.size)
    walks = data.collect(policy, start, 0, Share())
    with torch.no_grad():
        for _ in data.losses(policy, start, walks, 0):
            pass
    told, grid, rows = data.metrics(walks), policy.sigmas(walk.steps), []
    losses = {w: {k: told[f"kl_step_{k}"] * velocity_weight(grid[k], grid[k + 1], w) / velocity_weight(grid[k], grid[k + 1], "kl") for k in walk.window} for w in WEIGHTINGS}
    theirs = teacher_pictures(policy, prompts, teachers, sampler, seed)
    before = picture_distance(policy, start, prompts, theirs, sampler, seed)
    with progress(len(walk.window), "each step alone") as advance:
        for k in walk.window:
            name = f"step_{k}"
            policy.copy_adapter(start, name)
            fit(policy, OPD(schedule, teachers, walk, weighting="uniform_v", mar=0., steps=(k,)), Path(folder) / name, TrainConfig(iterations, lr, warmup=3, ema=0.), name,
                shown=False)
            nearer = before - picture_distance(policy, name, prompts, theirs, sampler, seed)
            mean, low, high = mean_interval(nearer)
            rows.append({"step": k, "sigma": grid[k], "kl": told[f"kl_step_{k}"], **{f"share {w}": losses[w][k] / sum(losses[w].values()) for w in WEIGHTINGS},
                         "nearer": mean, "low": low, "high": high, "n": len(nearer), "before": before.mean()})
            advance(1)
    return pd.DataFrame(rows)
