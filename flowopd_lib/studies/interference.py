"""Gradient interference (Flow-OPD 4.2): does training one capability move another?

To first order a step of size lr along the gradient of J_i changes J_j by `lr <g_i, g_j>`. Inner products of
noisy gradients are estimated from pairs of *different* batches (a U-statistic), so the noise of a batch never
meets itself: unbiased, also for <g_i, g_i>. The cosine made of them is not pulled towards 0 as that of two
noisy gradients is. Intervals: jackknife over batches.

The same is asked of distillation: does pulling the student to one teacher, on its prompts, bring it nearer
another, on that one's prompts?
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.checkpoint import checkpoint

from ..checkpoint import load_state, save_state
from ..objectives import GRPO, OPD, Share
from ..policy import FlowPolicy
from ..progress import progress
from ..rewards import attribute
from ..rollout import NoiseStreams, sample
from ..schedule import Batch

ALL = "all"
WALKS = 24  # whose graph is held at a time


def _width(n: int) -> float:
    """Half a 95 % interval of Student's t over `n` values, in standard errors."""
    from scipy import stats  # takes a second, and whoever imports the library may not come to it

    return stats.t.ppf(0.975, n - 1)


def reward_gradients(
    policy: FlowPolicy, objective: GRPO, adapter: str, iteration: int
) -> dict[float, torch.Tensor]:
    """One batch's estimate of the gradient of the mean reward by the adapter's weights, (P,) for each noise
    level (sigma) trained.

    The objective must be plain: no normalisation, no penalty, one update, the sum as reduction; then the
    parts of all steps add up to the gradient of E[reward], in units of the reward. Where the window of noise
    moves, a batch has one place of it and stands for all; steps without noise have no part.
    """
    if (
        objective.normalise != "none"
        or objective.beta
        or objective.updates != 1
        or objective.reduction != "sum"
    ):
        raise ValueError(
            "gradients of the reward itself need GRPO(normalise='none', beta=0., updates=1, reduction='sum')"
        )
    parameters = policy.train_adapter(adapter)
    data = objective.collect(policy, adapter, iteration, Share())
    group, window = objective.schedule.repeats, objective.sampler
    places = 1 if window.last is None else window.last - window.first + 1
    found: dict[float, torch.Tensor] = {}
    steps = [step for part in data.parts for step in part.steps]
    for step, loss in zip(steps, objective.losses(policy, adapter, data, 0), strict=True):
        # The loss is a mean over steps of minus the reward; a group's mean contains each of its own images,
        # which costs 1/group.
        scale = -len(data.parts[0].steps) * places * group / (group - 1)
        gradient = (
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).cpu() * scale
        )
        found[step.sigma] = found.get(step.sigma, 0) + gradient
    return found


def walk_gradients(
    policy: FlowPolicy, objective: GRPO, adapter: str, iteration: int
) -> dict[float, torch.Tensor]:
    """One batch's gradient of the mean reward through decoder and reward, along the whole walk with its noise
    held fixed, (P,) in units of the reward; under the noise level at which walks begin, for its parts cannot
    be told apart. Far less noise than score functions have. The objective must be plain, as there, its
    rewards the same for all its tasks, and its rewards pass a gradient (`with_gradient`).
    """
    parameters, sampler = policy.train_adapter(adapter), objective.sampler
    batch, grid = objective.schedule.draw(iteration), policy.sigmas(sampler.steps)
    total = torch.zeros(sum(p.numel() for p in parameters))
    for i in range(0, len(batch), WALKS):
        prompts, seeds = batch.prompts[i : i + WALKS], batch.seeds[i : i + WALKS]
        noise, text = NoiseStreams(policy, seeds), policy.encode([p.text for p in prompts])
        x = noise.draw()
        for index, sigma in enumerate(grid[:-1]):
            # a step's activations are made anew on the way back: memory of one step, not of the walk
            v = checkpoint(
                policy.velocity, x, sigma, text, sampler.guidance, adapter, use_reentrant=False
            )
            mean, std = sampler.step(x, v, index, grid)
            x = mean + std * noise.draw() if std else mean
        images, reward = policy.decode(x), 0.0
        for name, weight in objective.weights_of(prompts[0].task).items():
            reward = objective.rewards[name]
            scores = reward.with_gradient(images, prompts)
            reward = reward + weight / attribute(reward, "scale") * scores.sum()
        total += torch.cat([g.flatten() for g in torch.autograd.grad(reward, parameters)]).cpu()
    return {grid[0]: total / len(batch)}


def pull_gradients(
    policy: FlowPolicy, objective: OPD, adapter: str, iteration: int
) -> dict[float, torch.Tensor]:
    """One batch's estimate of where distillation pulls: minus the gradient of the KL at the visited states,
    in nats, (P,) for each noise level trained.

    The parts of all steps add up. Raises ValueError for another reading than `pathwise`, or an anchor, which
    is no task's.
    """
    if objective.estimator != "pathwise" or objective.mar or objective.updates != 1:
        raise ValueError("the pull of a teacher needs OPD(estimator='pathwise', mar=0., updates=1)")
    parameters = policy.train_adapter(adapter)
    data = objective.collect(policy, adapter, iteration, Share())
    sigmas, found = policy.sigmas(objective.sampler.steps), {}
    # step by step, chunk after chunk
    for k, loss in zip(itertools.cycle(data.trained), objective.losses(policy, adapter, data, 0)):
        gradient = -torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).cpu()
        found[sigmas[k]] = found.get(sigmas[k], 0) + gradient
    return found


def block_of(place: str) -> str:
    """The transformer block of a layer, as tables name it."""
    match = re.search(r"transformer_blocks\.(\d+)\.", place)
    return f"block {match.group(1)}" if match else "other"


def block_slices(policy: FlowPolicy, adapter: str) -> dict[str, slice]:
    """Where each transformer block's weights lie in the flat gradient, and `all` of them."""
    slices, start = {}, 0
    for name, p in policy.adapter_parameters(adapter).items():
        block = block_of(name)
        slices[block] = slice(slices.get(block, slice(start, 0)).start, start + p.numel())
        start += p.numel()
    return {ALL: slice(0, start), **slices}


@dataclass(frozen=True)
class Interference:
    """Gram matrices (tasks * batches, tasks * batches) of the gradients, by block and noise level; `all` is
    their sum.

    `gradients`: by task, (batches, P), over all noise levels.
    """

    gradients: dict[str, torch.Tensor]
    grams: dict[tuple[str, float | str], np.ndarray]

    @property
    def tasks(self) -> list[str]:
        return list(self.gradients)

    @property
    def batches(self) -> int:
        return len(self.gradients[self.tasks[0]])

    def table(self) -> pd.DataFrame:
        """See `gram_table`."""
        return gram_table(self.grams, self.tasks)


def _inner(gram: np.ndarray, kept: Sequence[int]) -> np.ndarray:
    """(T, T) from (T, n, T, n): mean inner product over pairs of different ones of those `kept`."""
    blocks, n = gram[:, kept][..., kept], len(kept)
    return (blocks.sum((1, 3)) - np.einsum("ibjb->ij", blocks)) / (n * (n - 1))


def _cosine(inner: np.ndarray) -> np.ndarray:
    # not above its noise: no direction
    norms = np.sqrt(np.where(np.diag(inner) > 0, np.diag(inner), np.nan))
    return inner / np.outer(norms, norms)


def gram_table(
    grams: Mapping[tuple[str, float | str], np.ndarray], tasks: Sequence[str]
) -> pd.DataFrame:
    """A row per block, noise level and pair of tasks: inner product and cosine with 95 % intervals, the
    cosine of two noisy batches (`raw`), and the noise floor of that, the raw cosine of a task with itself.
    `grams`: (tasks * batches, tasks * batches), by block and noise level."""
    rows = []
    for (block, sigma), gram in grams.items():
        n = len(gram) // len(tasks)
        gram, everything = gram.reshape(len(tasks), n, len(tasks), n), list(range(n))
        inner = _inner(gram, everything)
        inners = np.stack([_inner(gram, [b for b in everything if b != out]) for out in everything])
        with np.errstate(invalid="ignore"):
            cosine, cosines = _cosine(inner), np.stack([_cosine(i) for i in inners])
        half = _width(n) * np.sqrt(n - 1)
        size = np.sqrt(np.einsum("ibib->i", gram) / n)
        for i, j in itertools.product(range(len(tasks)), repeat=2):
            with np.errstate(invalid="ignore"):  # a gradient that is 0 has no direction
                raw = inner[i, j] / (size[i] * size[j])
                floor = np.sqrt(max(inner[i, i], 0) * max(inner[j, j], 0)) / (size[i] * size[j])
            row = dict(
                block=block,
                sigma=sigma,
                task=tasks[i],
                on=tasks[j],
                raw=raw,
                floor=floor,
                batches=n,
            )
            for name, value, values in (("inner", inner, inners), ("cosine", cosine, cosines)):
                error = half * values[:, i, j].std()
                row |= {
                    name: value[i, j],
                    f"{name}_low": value[i, j] - error,
                    f"{name}_high": value[i, j] + error,
                }
            rows.append(row)
    return pd.DataFrame(rows)


def interference(
    policy: FlowPolicy,
    objectives: Mapping[str, GRPO | OPD],
    adapter: str,
    batches: int = 8,
    gradients_of: Callable = reward_gradients,
    kept: Gradients | None = None,
    share: Share = Share(),
) -> Interference:
    """Gradients of every task at the adapter's present weights, of the reward or (`pull_gradients`) of
    distillation. `kept`: a folder for them, out of which it goes on; several processes (`share`) deal the
    batches out among themselves by way of it. Raises ValueError for fewer than three batches."""
    if batches < 3:
        raise ValueError(
            f"pairs of batches and a jackknife need at least three batches, not {batches}"
        )
    kept = kept or Gradients()
    asked = [(task, b) for task in objectives for b in range(batches)]
    mine = asked[share.rank :: share.processes]
    with progress(len(mine), f"gradients of {len(objectives)} tasks", share.rank == 0) as advance:
        for task, b in mine:
            if not kept.has(task, b):
                kept.put(task, b, gradients_of(policy, objectives[task], adapter, b))
            advance(1)
    share.wait()
    levels: dict[float | str, list[torch.Tensor]] = {}
    for task, b in asked:
        found = kept.get(task, b)
        levels.setdefault(ALL, []).append(sum(found.values()))
        for sigma, gradient in found.items():
            # half the memory; a batch's noise drowns the rounding
            levels.setdefault(sigma, []).append(gradient.bfloat16())
    grams = {}
    for sigma, vectors in levels.items():
        if len(vectors) < 3 * len(
            objectives
        ):  # where the window of noise moves, not all batches have a level
            continue
        for block, columns in block_slices(policy, adapter).items():
            rows = torch.stack([v[columns] for v in vectors]).float()
            grams[block, sigma] = (rows @ rows.T).double().numpy()
    return Interference(
        {
            task: torch.stack(levels[ALL][i * batches : (i + 1) * batches])
            for i, task in enumerate(objectives)
        },
        grams,
    )


class Gradients:
    """Gradients by name and batch, by noise level each: in memory or, so that a cut costs one batch and
    processes can share them, in a folder."""

    def __init__(self, folder: Path | None = None):
        self.folder, self._held = folder, {}

    def _file(self, name: str, batch: int) -> Path:
        return self.folder / f"{name}_{batch}.safetensors"

    def has(self, name: str, batch: int) -> bool:
        return (
            (name, batch) in self._held
            if self.folder is None
            else self._file(name, batch).is_file()
        )

    def put(self, name: str, batch: int, found: dict) -> None:
        if self.folder is None:
            self._held[name, batch] = found
        else:
            save_state(self._file(name, batch), found)

    def get(self, name: str, batch: int) -> dict:
        return (
            self._held[name, batch] if self.folder is None else load_state(self._file(name, batch))
        )


def taylor_check(
    policy: FlowPolicy,
    objectives: Mapping[str, GRPO],
    adapter: str,
    size: float,
    gradients: Mapping[str, torch.Tensor],
    images: int = 256,
    only: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Predicted against measured change of every task's mean reward after a real step of length `size` along
    each task's gradient.

    Of `gradients`, an `Interference`'s, the first half of the batches gives the direction, the other the
    prediction; the change is measured on new prompts and seeds, the same before and after (paired), `images`
    a task. A row per pair: predicted and measured with 95 % intervals, over batches and over the `n` prompts
    measured (`only`: along some of the tasks' gradients); NaN, with a warning, for a task whose rewards never
    varied, which has no direction. What no gradient is known of (`objectives` beyond `gradients`) is measured
    and not predicted.
    """
    batches = min(map(len, gradients.values()))
    if batches < 4 or batches % 2:
        raise ValueError(
            "half of the batches give the direction and half the prediction: take an even number from 4, "
            f"not {batches}"
        )
    policy.train_adapter(None)  # one that does not train is sampled with a third of the products
    parameters = list(policy.adapter_parameters(adapter).values())
    parameters_before = [p.detach().clone() for p in parameters]
    before = {task: _rewards(policy, o, adapter, batches, images) for task, o in objectives.items()}
    rows = []
    for task in gradients if only is None else only:
        direction = gradients[task][: batches // 2].mean(0)
        if not direction.any():
            warnings.warn(
                f"no prompt's samples differ in {task}'s reward, so it has no direction; take more prompts, "
                "samples or batches",
                stacklevel=2,
            )
            unknown = {
                f"{name}{end}": np.nan
                for name in ("predicted", "measured")
                for end in ("", "_low", "_high")
            }
            rows += [dict(task=task, on=on, size=size, n=0) | unknown for on in objectives]
            continue
        direction = direction / direction.norm()
        with torch.no_grad():
            for p, d in zip(parameters, direction.split([p.numel() for p in parameters])):
                p.add_(size * d.view_as(p).to(p.device))
        for on, objective in objectives.items():
            known = on in gradients
            predicted = (
                size * (gradients[on][batches // 2 :] @ direction).numpy()
                if known
                else [np.nan] * 2
            )
            change = _rewards(policy, objective, adapter, batches, images) - before[on]
            # neighbours share one, so they are not independent
            prompt = np.arange(images) // objective.schedule.repeats
            measured = np.bincount(prompt, change) / np.bincount(prompt)
            row = dict(task=task, on=on, size=size, n=len(measured))
            for name, values in (("predicted", np.array(predicted)), ("measured", measured)):
                error = _width(len(values)) * values.std(ddof=1) / np.sqrt(len(values))
                row |= {
                    name: values.mean(),
                    f"{name}_low": values.mean() - error,
                    f"{name}_high": values.mean() + error,
                }
            rows.append(row)
        with torch.no_grad():
            for p, saved in zip(parameters, parameters_before):
                p.copy_(saved)
    return pd.DataFrame(rows)


def _rewards(
    policy: FlowPolicy, objective: GRPO, adapter: str, first: int, images: int
) -> np.ndarray:
    """(images,) weighted rewards of iterations from `first` on, whose prompts and seeds no gradient has
    seen."""
    prompts, seeds, values = [], [], []
    for iteration in itertools.count(first):
        if len(prompts) >= images:
            break
        batch = objective.schedule.draw(iteration)
        prompts, seeds = prompts + batch.prompts, seeds + batch.seeds
    for i in range(0, images, objective.micro_batch_size):  # whatever an iteration's batch is
        part = Batch(
            *(of[i : min(i + objective.micro_batch_size, images)] for of in (prompts, seeds))
        )
        drawn = sample(
            policy, part.prompts, part.seeds, objective.sampler, adapter, objective.micro_batch_size
        )
        rewards, weights, _ = objective.score(drawn, part)
        values += (rewards * weights).sum(1).tolist()
    return np.array(values)
