"""Interference (Flow-OPD 4.2): does optimising one reward change another?

Three measurements, each with a 95 % interval:

- task vectors: the change of every score along what an expert learned,
  `J_j(theta + a tau_i) - J_j(theta)`, on the same prompts and noise. A conflict is a score that
  drops for a > 0; a < 0 shows the curvature (central differences would count the harm of going
  backwards as a gain). No gradient is estimated.
- gradients of differentiable rewards, through decoder and trajectory. To first order a step of
  length eta along `g_i` changes `J_j` by `eta <g_i, g_j> / |g_i|`.
- gradients of distillation: does training the student towards one teacher, on that one's prompts,
  bring it closer to another, on the other's prompts?
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch.utils.checkpoint import checkpoint

from ..config import Count
from ..data import Schedule, slices
from ..lab import Lab
from ..lab.workspace import Workspace
from ..losses import Shard
from ..policy import FlowPolicy
from ..rewards import Reward, attribute
from ..rewards.base import check_scores
from ..rollout import NoiseStreams, Sampler
from ..sde import per_row
from ..stats import Domain, in_domain_scores, paired_differences
from .gradients import (
    MIN_BATCHES,
    TableJob,
    distillation,
    flat_gradient,
    gradients_of_batches,
    jackknife,
    loss_gradient,
    mean_over_pairs,
    run_table_job,
    t_quantile,
)
from .multi_reward import single_reward_recipes

TRAJECTORIES = 24  # whose graph is held at a time
# The smallest standard deviation of a score's change over prompts, in full scales, that a weight is
# made of.
MIN_STD = 1e-3

# --- task vectors


def model_name(direction: str, size: float, start: str = "") -> str:
    """Of theta + a tau in tables of samples: `ocr +0.5`, `merged ocr +0.5`."""
    return f"{start} {direction} {size:+g}".lstrip()


def evaluate_task_vectors(lab: Lab, sizes: Sequence[float], **how: Any) -> pd.DataFrame:
    """The samples (`Lab.evaluate`) of theta + a tau for every expert and size a, where theta is the
    base or the experts' average, called `merged`."""
    experts = list(lab.benchmark.experts)
    sources: dict[str, dict] = {"merged": {"merge": "cat", "adapters": experts}}
    for start, mean in (("", {}), ("merged", dict.fromkeys(experts, 1 / len(experts)))):
        for expert, size in itertools.product(experts, sizes):
            weights = {**mean, expert: mean.get(expert, 0.0) + size}
            merged = {"adapters": list(weights), "weights": list(weights.values())}
            sources[model_name(expert, size, start)] = {"merge": "cat", **merged}
    # names of adapters have neither spaces nor dots
    adapters = {m: f"along {m}".replace(" ", "_").replace(".", "p") for m in sources}
    lab.sources |= {adapters[model]: source for model, source in sources.items()}
    return lab.evaluate({"base": None, **adapters}, **how)


def train_first_iterations(
    lab: Lab, iterations: int, trainings: int, prompts: int, images_per_prompt: int, seed: int = 0
) -> dict[str, str]:
    """Train every expert anew for its first `iterations`, several times with prompts and noise of
    their own, all from the same adapter: task vectors of trainings that have just started. Adapters
    by model: `ocr +1#0`, `ocr +1#1`, ..."""
    models, total = {}, iterations * len(lab.benchmark.experts)
    recipes = single_reward_recipes(lab.benchmark, total, prompts, images_per_prompt)
    for expert, recipe in recipes.items():
        recipe["student"] = {**recipe["student"], "seed": seed}
        recipe["grpo"] = {**recipe["grpo"], "updates": min(2, prompts)}
        for number in range(trainings):
            name = f"first_{expert}_{number}"
            lab.train(name, {**recipe, "seed": seed + 1 + number})
            models[f"{model_name(expert, 1.0)}#{number}"] = name
    return models


def score_changes(
    table: pd.DataFrame,
    domains: Sequence[Domain],
    directions: Sequence[str],
    sizes: Sequence[float],
    start: str = "",
) -> pd.DataFrame:
    """A row per direction, size and reward: along, size, reward, mean, low, high (95 %, over n
    prompts), the change against the model `start` (the base if empty) in full scales. `table`:
    `evaluate`'s."""
    steps = pd.DataFrame(itertools.product(directions, sizes), columns=["along", "size"])
    steps["model"] = [model_name(*step, start) for step in itertools.product(directions, sizes)]
    scale, baseline = {reward: full for reward, _, full in domains}, start or "base"
    own = in_domain_scores(table[table["model"].isin([baseline, *steps["model"]])], domains)
    change = paired_differences(own, baseline, list(scale), by=())
    ends = ["mean", "low", "high"]
    change[ends] = change[ends].div(change["reward"].map(scale), axis=0)
    return steps.merge(change, on="model").drop(columns="model")


def first_order_slope(
    table: pd.DataFrame,
    domains: Sequence[Domain],
    trained_for: Mapping[str, str],
    small: float,
    whole: float,
    resamples: int = 2000,
) -> tuple[float, float, float, int]:
    """Does the change of a small step, times whole / small, predict that of the whole step? The
    slope of the measured on the predicted change, from the base, over all pairs of a direction and
    a reward it was not trained for (`trained_for`: direction -> reward): slope, low, high (95 %,
    prompts drawn), number of pairs. 1 is exact.

    One half of the prompts predicts and the other is measured, each way, so that no prompt's noise
    is on both sides, and `sum(p_A m_B) / sum(p_A p_B)` undoes the attenuation by noise. The pairs
    of a reward weigh by the inverse variance of its change over prompts (weighted least squares),
    or a yes-or-no reward's noise would dominate.
    """
    parts = []
    for reward, task, scale in domains:
        rows = table[table["task"] == task]
        scores = rows.groupby(["prompt", "model"], sort=False)[reward].mean() / scale
        scores = scores.unstack("model")
        others = [d for d, own in trained_for.items() if own != reward]
        p, m = (
            np.stack([scores[model_name(d, size)] - scores["base"] for d in others], 1)
            for size in (small, whole)
        )
        parts.append((p * (whole / small), m, 1 / max(m.var(0).mean(), MIN_STD**2)))
    rng, top, bottom = np.random.default_rng(0), 0.0, 0.0
    for p, m, weight in parts:
        means = []
        for half in (0, 1):
            n = len(p[half::2])
            # the first row is the half itself, the others are draws of its prompts
            drawn = np.vstack([np.ones(n), rng.multinomial(n, [1 / n] * n, size=resamples)]) / n
            means.append((drawn @ p[half::2], drawn @ m[half::2]))
        (pa, ma), (pb, mb) = means
        top = top + weight * (pa * mb + pb * ma).sum(1)
        bottom = bottom + weight * 2 * (pa * pb).sum(1)
    slopes = np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)
    # otherwise the small steps change nothing above their noise
    known = np.isfinite(slopes).mean() >= 0.95
    low, high = np.nanquantile(slopes[1:], (0.025, 0.975)) if known else (np.nan, np.nan)
    return float(slopes[0]), float(low), float(high), sum(p.shape[1] for p, *_ in parts)


# --- gradients


def reward_gradient(
    policy: FlowPolicy,
    schedule: Schedule,
    reward: Reward,
    sampler: Sampler,
    adapter: str,
    iteration: int,
) -> torch.Tensor:
    """(P,): the gradient of the mean reward of a batch, over its scale, by the adapter's weights,
    through the reward (its `with_gradient`), the decoder and the whole trajectory with its noise
    held fixed. Far less noisy than score functions are."""
    parameters, total = policy.train_adapter(adapter), 0.0
    batch, grid = schedule.draw(iteration), policy.sigmas(sampler.steps)
    for rows in slices(len(batch), TRAJECTORIES):
        prompts = batch.prompts[rows]
        noise = NoiseStreams(policy, batch.seeds[rows])
        text = policy.encode([p.text for p in prompts])
        x_t = noise.draw()
        for index, (sigma, sigma_next) in enumerate(zip(grid, grid[1:])):
            # activations are computed again on the way back: memory of one step, not of all
            state = x_t, sigma, text, sampler.guidance, adapter
            v = checkpoint(policy.velocity, *state, use_reentrant=False)
            mean, std = sampler.transition(x_t, v, sigma, sigma_next, index)
            x_t = mean + per_row(std, mean) * noise.draw() if std > 0 else mean
        images = policy.decode(x_t)
        scores = reward.with_gradient(images, prompts)
        check_scores(reward, scores, images, prompts)
        total += flat_gradient(scores.sum(), parameters)
    return total / (len(batch) * attribute(reward, "scale"))


def gradient_table(gradients: Mapping[str, torch.Tensor]) -> pd.DataFrame:
    """A row per pair of tasks from their gradients (batches, P): task, on, inner product and cosine
    of the means with 95 % intervals (`inner_low`, ...), and batches.

    The cosine is made of unbiased inner products, so noise does not bias it towards 0. NaN for a
    task whose gradient is not above its noise.
    """
    tasks, n = list(gradients), len(next(iter(gradients.values())))
    rows = torch.cat(list(gradients.values()))
    gram = (rows @ rows.T).double().numpy().reshape(len(tasks), n, len(tasks), n)
    gram = gram.transpose(0, 2, 1, 3)

    @np.errstate(invalid="ignore")
    def statistics(batches: np.ndarray) -> np.ndarray:
        inner = mean_over_pairs(gram[:, :, batches][..., batches])
        squares = np.diag(inner)
        norms = np.sqrt(np.where(squares > 0, squares, np.nan))
        return np.stack([inner, inner / np.outer(norms, norms)])

    values, errors = jackknife(statistics, n)
    half, table = t_quantile(n) * errors, []
    for i, j in np.ndindex(len(tasks), len(tasks)):
        row = {"task": tasks[i], "on": tasks[j], "batches": n}
        for name, value, h in zip(("inner", "cosine"), values[:, i, j], half[:, i, j]):
            row |= {name: value, f"{name}_low": value - h, f"{name}_high": value + h}
        table.append(row)
    return pd.DataFrame(table)


class InterferenceJob(TableJob):
    """`gradient_of`: every differentiable reward of a task (by task), or the distillation towards
    every teacher on its own prompts (by expert), at `adapter`."""

    gradient_of: Literal["reward", "distillation"]
    batches: Annotated[int, Field(ge=MIN_BATCHES)]
    prompts_per_batch: Count
    images_per_prompt: Count = 1
    file: str = "interference.parquet"


def interference_job(config: InterferenceJob, folder: Path, workspace: Workspace) -> None:
    """`file`: a `gradient_table`, without rows where no reward can be differentiated."""
    benchmark, policy, adapter = workspace.benchmark, workspace.policy, config.adapter
    size = config.prompts_per_batch, config.images_per_prompt
    experts = {e: t for t, e in benchmark.teachers.items() if e != adapter}

    def of_distillation(expert: str, batch: int) -> torch.Tensor:
        objective = distillation(benchmark, *size, config.seed, [experts[expert]])
        data, _ = objective.collect(policy, adapter, batch, Shard())
        return loss_gradient(policy, objective, adapter, data)

    def of_reward(task: str, batch: int) -> torch.Tensor:
        name, shares_prompts = benchmark.tasks[task].reward, benchmark.tasks[task].prompts_of
        # a task that shares another's prompts is measured on those of all tasks
        tasks = benchmark.prompt_tasks if shares_prompts else (task,)
        prompts = {t: benchmark.prompts(t, "train") for t in tasks}
        schedule = Schedule(prompts, *size, seed=config.seed)
        whole = {"noisy_steps": None, "window_start": 0, "branch": False}
        sampler = replace(benchmark.sampling.grpo, **whole)
        reward = benchmark.rewards_named([name], workspace.device)[name]
        return reward_gradient(policy, schedule, reward, sampler, adapter, batch)

    def compute(partial: Path) -> pd.DataFrame:
        names, gradient = list(experts), of_distillation
        if config.gradient_of == "reward":
            gradient = of_reward
            names = [t for t, c in benchmark.tasks.items() if benchmark.passes_gradient(c.reward)]
        if not names:
            return pd.DataFrame({"task": [], "on": []})
        found = gradients_of_batches(gradient, names, config.batches, partial, workspace)
        return gradient_table({name: torch.stack(rows) for name, rows in found.items()})

    used = experts if config.gradient_of == "distillation" else ()
    run_table_job(config, folder, workspace, used, compute)
