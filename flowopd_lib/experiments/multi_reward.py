"""One model, several rewards (Flow-OPD 4.3): the variants as recipes, GRPO-Mix with larger budgets,
and what single rewards come to at equal cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..benchmarks import Benchmark
from ..lab import Lab, Training, grpo_mix

# Adam's state is not part of an adapter, so the updates of a later stage are warmed up.
STAGE_WARMUP = 20


def _on_prompts(recipe: Mapping[str, Any], weights: Mapping[str, Mapping[str, float]]) -> dict:
    """The recipe of GRPO-Mix on the prompts of some tasks, in mixed batches, by their rewards."""
    size = {k: recipe["schedule"][k] for k in ("prompts_per_batch", "images_per_prompt")}
    grpo = {**recipe["grpo"], "reward_weights": dict(weights)}
    return {**recipe, "schedule": {"tasks": list(weights), **size}, "grpo": grpo}


def mix_name(benchmark: Benchmark) -> str:
    """Of GRPO-Mix there, by how often each task's prompts come: `Mix 3:1:1`."""
    counts = [benchmark.task_schedule.get(task, 1) for task in benchmark.prompt_tasks]
    return "Mix " + ":".join(map(str, counts))


def variant_recipes(benchmark: Benchmark, *size: Any) -> dict[str, dict]:
    """The paper's variants by name: rewards stacked one after the other, GRPO-Mix, and GRPO-Mix
    with advantages normalised by reward (GDPO). `size`: see `grpo_mix`."""
    mix, name = grpo_mix(benchmark, *size), mix_name(benchmark)
    recipes, weights, own = {}, benchmark.reward_weights(), benchmark.prompt_tasks
    for n, task in enumerate(own, 1):
        first = {t: weights[t] for t in own[:n]}
        recipes[f"+{benchmark.tasks[task].reward}"] = _on_prompts(mix, first)
    if auxiliary := benchmark.config.grpo_mix.auxiliary_rewards:
        with_auxiliary = benchmark.reward_weights(auxiliary=True)
        recipes[f"+{'+'.join(auxiliary)}"] = _on_prompts(mix, with_auxiliary)
    gdpo = grpo_mix(benchmark, *size, normalise="gdpo")
    return recipes | {name: mix, f"{name}, GDPO": gdpo}


def single_reward_recipes(benchmark: Benchmark, *size: Any) -> dict[str, dict]:
    """A recipe for each expert of the benchmark alone, all of them together for as many iterations
    as one variant of `variant_recipes`."""
    mix, recipes = grpo_mix(benchmark, *size), {}
    each = max(1, mix["train"]["iterations"] // max(1, len(benchmark.teachers)))
    for task, expert in benchmark.teachers.items():
        config = benchmark.tasks[task]
        weights = {config.prompts_of or task: config.reward_weights or {config.reward: 1.0}}
        train = {**mix["train"], "iterations": each}
        recipes[expert] = {**_on_prompts(mix, weights), "train": train}
    return recipes


def continue_recipe(
    recipe: Mapping[str, Any], adapter: str, start_iteration: int
) -> dict[str, Any]:
    """The recipe of a later stage: from an adapter's folder to the iteration where `recipe` ends,
    with prompts and noise that were not there before."""
    left = recipe["train"]["iterations"] - start_iteration
    train = {**recipe["train"], "iterations": left, "warmup": STAGE_WARMUP}
    seed = recipe.get("seed", 0) + start_iteration
    return {**recipe, "student": {"load": adapter}, "seed": seed, "train": train}


def train_in_stages(
    lab: Lab,
    name: str,
    recipe: Mapping[str, Any],
    budgets: Mapping[str, int],
    continue_from: str = "",
) -> dict[str, Training]:
    """Train one recipe to several budgets, in iterations by name: the adapter `NAME_BUDGET` for
    each. A finished training keeps its adapter and not its optimizer's state, so a later stage is a
    training of its own from the adapter of the stage before, and can be cached. The first stage
    continues the training `continue_from` of the same recipe, if given. Raises ValueError for two
    budgets of the same length: the later one would have nothing to do."""
    if len({*budgets.values()}) < len(budgets):
        raise ValueError(
            f"budgets has one number of iterations twice, {dict(budgets)}, but each continues the "
            "one before it; leave one out or give it more"
        )
    trainings, done, start = {}, None, 0
    for budget, iterations in sorted(budgets.items(), key=lambda item: item[1]):
        stage = {**recipe, "train": {**recipe["train"], "iterations": iterations}}
        if done:
            stage, continue_from = continue_recipe(stage, done.adapter, start), ""
        earlier, start = done.seconds if done else 0.0, iterations
        done = lab.train(f"{name}_{budget}", stage, continue_from=continue_from)
        trainings[budget] = done = replace(done, earlier_seconds=earlier)
    return trainings
