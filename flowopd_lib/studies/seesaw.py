"""One model, several rewards (Flow-OPD 4.3): the variants, and when a training has come to where it goes, by a
rule that is fixed before it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..benchmarks import Benchmark
from ..inputs import Count, NotNegative, check_fields
from ..jobs.recipes import grpo_mix
from ..stats import Home

if TYPE_CHECKING:
    from ..jobs.lab import Lab


@dataclass(frozen=True)
class Plateau:
    """A training stands still where, on val, the mean of the scores it is for (in full scales) has come no
    `rise` above its best in `patience` looks, one every `every` iterations. It ends there, or after `most`.

    Raises ValueError for a rule that could never fire.
    """

    every: Count
    most: Count
    patience: Count = 3
    rise: NotNegative = 0.005

    def __post_init__(self):
        check_fields(self)
        if self.patience * self.every >= self.most:
            raise ValueError(
                f"a patience of {self.patience} looks, one every {self.every} iterations, ends no "
                f"training of at most {self.most}; take fewer looks, or more than "
                f"{self.patience * self.every} iterations"
            )

    def reached(self, probes: pd.DataFrame, rewards: Sequence[str], home: Home) -> bool:
        """Whether the looks so far (`probes`: iteration, reward, mean) fire the rule for a training on
        `rewards`."""
        scales = {reward: scale for reward, _, scale in home}
        seen = probes[probes["reward"].isin(rewards)]
        shares = seen.assign(share=seen["mean"] / seen["reward"].map(scales))
        looks = shares.groupby("iteration")["share"].mean().sort_index()
        best, since = looks.iloc[0], 0
        for value in looks.iloc[1:]:
            best, since = (value, 0) if value > best + self.rise else (best, since + 1)
        return since >= self.patience


def _on(recipe: Mapping[str, Any], rewards: Mapping[str, Mapping[str, float]]) -> dict:
    """The recipe of GRPO-Mix on some prompts and rewards alone, which do not take turns."""
    batches = {k: recipe["schedule"][k] for k in ("prompts_per_batch", "images_per_prompt")}
    grpo = {**recipe["grpo"], "reward_weights": dict(rewards)}
    return {**recipe, "schedule": {"tasks": list(rewards), **batches}, "grpo": grpo}


def mix_of(benchmark: Benchmark) -> str:
    """What GRPO-Mix is called there: by how often each task's prompts come."""
    return "Mix " + ":".join(str(benchmark.task_schedule.get(task, 1)) for task in benchmark.own)


def variants_of(benchmark: Benchmark, *size) -> dict[str, dict]:
    """The paper's variants by name, as recipes: rewards stacked one after the other, GRPO-Mix, and that with
    advantages by reward (GDPO). `size`: see `grpo_mix`."""
    mix, name = grpo_mix(benchmark, *size), mix_of(benchmark)
    stacked, own = {}, list(benchmark.own)
    for n, task in enumerate(own, 1):
        rewards = benchmark.reward_weights()
        stacked[f"+{benchmark.tasks[task].reward}"] = _on(mix, {t: rewards[t] for t in own[:n]})
    if benchmark.auxiliary_rewards:
        stacked[f"+{'+'.join(benchmark.auxiliary_rewards)}"] = _on(
            mix, benchmark.reward_weights(auxiliary=True)
        )
    return stacked | {name: mix, f"{name}, GDPO": grpo_mix(benchmark, *size, normalise="gdpo")}


def alone(benchmark: Benchmark, *size) -> dict[str, dict]:
    """A recipe for each expert of the benchmark by itself, all together for as many iterations as an variant."""
    mix = grpo_mix(benchmark, *size)
    taught = {task.expert: task for task in benchmark.tasks.values() if task.expert}
    train = {**mix["train"], "iterations": max(1, mix["train"]["iterations"] // len(taught))}
    return {
        name: {**_on(mix, {t.home: t.reward_weights}), "train": train} for name, t in taught.items()
    }


def begin_experts(
    lab: Lab, iterations: int, trainings: int, prompts: int, images: int, seed: int = 0
) -> dict[str, str]:
    """Train every expert of the benchmark anew for its first `iterations`, so many times, each with prompts and
    noise of its own and all from the same adapter (`first_EXPERT_NUMBER`); by "EXPERT#NUMBER", its name."""
    found = {}
    for expert, recipe in alone(
        lab.benchmark, iterations * len(lab.benchmark.experts), prompts, images
    ).items():
        student = {**recipe["student"], "seed": seed}
        grpo = {**recipe["grpo"], "updates": min(2, prompts)}
        for number in range(trainings):
            found[f"{expert}#{number}"] = name = f"first_{expert}_{number}"
            lab.train(name, {**recipe, "student": student, "grpo": grpo, "seed": seed + 1 + number})
    return found


def rewards_of(recipe: Mapping[str, Any], benchmark: Benchmark) -> list[str]:
    """The rewards that are reported among those a GRPO recipe trains on; a task's own, where it is paid by
    others."""
    reported, named = [reward for reward, *_ in benchmark.home], set()
    given = recipe["grpo"].get("reward_weights", benchmark.reward_weights())
    flat = not any(isinstance(weight, Mapping) for weight in given.values())
    for task in recipe["schedule"].get("tasks", benchmark.own):
        rewards = given if flat else given.get(benchmark.tasks[task].home, {})
        named |= set(rewards) & set(reported) or {benchmark.tasks[task].reward}
    return [reward for reward in reported if reward in named]
