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


def picture_distance(policy: FlowPolicy, adapter: str | None, prompts: Sequence[Prompt], teachers: Mapping[str, str | None], sampler: Sampler, seed: int) -> np.ndarray:
    """(N,): how far the pictures of an adapter lie from those that each prompt's teacher draws from the same noise, root mean square over the pixels."""
    seeds, theirs = range(seed, seed + len(prompts)), {}
    for name in set(teachers[p.task] for p in prompts):
        rows = [i for i, p in enumerate(prompts) if teachers[p.task] == name]
        theirs |= dict(zip(rows, sample(policy, [prompts[i] for i in rows], [seeds[i] for i in rows], sampler, name)))
    ours = sample(policy, prompts, seeds, sampler, adapter)
    return np.array([(ours[i] - theirs[i]).square().mean().sqrt().item() for i in range(len(prompts))])


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
    before = picture_distance(policy, start, prompts, teachers, sampler, seed)
    with progress(len(walk.window), "each step alone") as advance:
        for k in walk.window:
            name = f"step_{k}"
            policy.copy_adapter(start, name)
            fit(policy, OPD(schedule, teachers, walk, weighting="uniform_v", mar=0., steps=(k,)), Path(folder) / name, TrainConfig(iterations, lr, warmup=3, ema=0.), name,
                shown=False)
            nearer = before - picture_distance(policy, name, prompts, teachers, sampler, seed)
            mean, low, high = mean_interval(nearer)
            rows.append({"step": k, "sigma": grid[k], "kl": told[f"kl_step_{k}"], **{f"share {w}": losses[w][k] / sum(losses[w].values()) for w in WEIGHTINGS},
                         "nearer": mean, "low": low, "high": high, "n": len(nearer), "before": before.mean()})
            advance(1)
    return pd.DataFrame(rows)
