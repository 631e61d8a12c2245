"""The jobs: everything that takes long, as functions of a configuration and a folder, that leave
tables there and resume where they were cut off. They run in a notebook's own process or in those of
a launcher.

    train         a recipe (see `recipe`), with validation samples on the way
    evaluate      models on the first prompts of each task of a split -> samples.parquet

The jobs of the experiments stand next to what they compute. A job is a function (config, folder,
workspace) whose config is a `Config`; besides these names, a specification's `job` can be a user's
own (`file.py:name`).
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import yaml
from pydantic import Field, model_validator

from ..benchmarks import DEFAULT, Benchmark
from ..benchmarks.benchmark import Split
from ..config import Config, Count, Index, choose, load_plugin, plugin_name, validate
from ..evaluate import evaluate
from ..files import read_lines, write_whole
from ..loading import decide
from ..stats import model_scores
from ..train import VALIDATION, StepInfo, check_folder, fit
from . import cache
from .recipe import Recipe, Source, build, guidance_of, rewards_in
from .workspace import Workspace

VALIDATION_SEED = 1 << 20

JOBS = {
    "train": "flowopd_lib.lab.jobs:train_job",
    "evaluate": "flowopd_lib.lab.jobs:evaluate_job",
    "interference": "flowopd_lib.experiments.interference:interference_job",
    "estimators": "flowopd_lib.experiments.estimators:estimators_job",
    "steps": "flowopd_lib.experiments.estimators:steps_job",
}


class ValidationConfig(Config):
    """The same prompts and noise sampled and scored before a training, after every `every`
    iterations and at its end: the first `n` of each task of a split. `images`: save the samples as
    thumbnails. `patience`: the training stops when the mean validation reward has not improved for
    so many probes (0: never)."""

    every: Count
    n: Count = 24
    split: Split = "val"
    steps: Count | None = None
    images: bool = False
    patience: Index = 0


class TrainJob(Recipe):
    """`continue_from`: the folder of the same training for fewer iterations, from whose state it
    continues."""

    name: str = "student"
    validation: ValidationConfig | None = None
    continue_from: str | None = None

    @model_validator(mode="after")
    def _no_cooldown(self):
        if self.validation and self.validation.patience and self.train.cooldown:
            raise ValueError(
                "validation.patience ends a training at an iteration that is not known before, so "
                "it needs train.cooldown 0"
            )
        return self


def train_job(config: TrainJob, folder: Path, workspace: Workspace) -> None:
    """The adapter `name` trained by a recipe into a folder, or copied there from the cache."""
    key = cache.fingerprint(config, workspace.benchmark, workspace.dtype)
    if workspace.main:
        cache.fetch(key, folder)
        if config.continue_from and not cache.is_finished(key, folder):
            cache.continue_from(Path(config.continue_from), folder)
    workspace.shard.wait()
    if cache.is_finished(key, folder):
        return
    policy, validation = workspace.policy, config.validation
    objective, train = build(config, workspace, config.name)
    started = stopped = False

    def end() -> int:
        return last_iteration(read_lines(folder / VALIDATION), config, workspace.benchmark)

    def on_step(info: StepInfo) -> bool:
        nonlocal started, stopped
        # only now: a recipe that the folder's training refused must not take the place of its own
        if workspace.main and not started:
            names = {*Recipe.model_fields}
            recipe = config.model_dump(
                mode="json", include=names, exclude_unset=True, fallback=plugin_name
            )
            write_whole(folder / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
            decide(folder, policy.dtype, policy.device)
        started, stopped = True, bool(workspace.on_step and workspace.on_step(info))
        done = info.iteration + 1
        if validation and validation.patience and done % validation.every == 0:
            workspace.shard.wait()  # until the first process has written its samples
            return stopped or end() <= done < iterations
        return stopped

    check_folder(policy, objective, folder, train, config.name)
    workspace.shard.wait()  # all have read the state before the first changes the folder
    if workspace.main:
        (folder / cache.RECORD).unlink(missing_ok=True)  # of a shorter training
    while True:  # a training that early stopping ends is finished by a second call
        iterations = end()
        metrics, _ = fit(
            policy,
            objective,
            folder,
            replace(train, iterations=iterations),
            config.name,
            validator(validation, folder, workspace) if validation else None,
            validation.every if validation else 0,
            on_step,
            workspace.show_progress,
            workspace.accelerator,
        )
        if stopped or len(metrics) == iterations:
            break
    if workspace.main and not stopped:
        cache.write_record(key, folder)


def validator(
    validation: ValidationConfig, folder: Path, workspace: Workspace
) -> Callable[[str, int], pd.DataFrame]:
    """For `fit`: the validation samples of an adapter. Several processes meet in a file in the
    folder, which is then removed."""
    benchmark, shard = workspace.benchmark, workspace.shard
    prompts = benchmark.first_prompts(validation.split, validation.n)
    rewards = benchmark.rewards(workspace.device)
    sampler = benchmark.sampler(validation.steps or benchmark.sampling.evaluation.steps)

    def validate(adapter: str, iteration: int) -> pd.DataFrame:
        into = folder / "validation.parquet" if shard.processes > 1 else None
        rows = evaluate(
            workspace.policy,
            prompts,
            rewards,
            VALIDATION_SEED,
            sampler,
            {f"iteration {iteration}": adapter},
            show_progress=False,
            images=folder / "validation" if validation.images else None,
            into=into,
            shard=shard,
        )
        shard.wait()
        if into and shard.rank == 0:
            into.unlink()
        return rows

    return validate


def last_iteration(samples: pd.DataFrame, config: TrainJob, benchmark: Benchmark) -> int:
    """Where a training ends, by its validation samples so far: at the probe after which the mean of
    the rewards that it is trained on, over their scales, has not improved for `patience` probes."""
    patience = config.validation.patience if config.validation else 0
    if not patience or not len(samples):
        return config.train.iterations
    tasks = (config.schedule or config.sft).tasks or benchmark.prompt_tasks
    weights = config.grpo.reward_weights if config.grpo else {}
    names = rewards_in(weights or benchmark.reward_weights(tasks=tasks)) & {*samples}
    domains = [domain for domain in benchmark.domains if domain[0] in names]

    def mean_reward(rows: pd.DataFrame) -> float:
        return np.mean([rows.loc[rows["task"] == t, r].mean() / scale for r, t, scale in domains])

    best = pd.Series({i: mean_reward(rows) for i, rows in samples.groupby("iteration")}).cummax()
    plateaus = best.index[best <= best.shift(patience)]
    return min([config.train.iterations, *map(int, plateaus)])


def validation_scores(folder: Path, benchmark: Benchmark) -> pd.DataFrame:
    """What a training's validation samples come to: `model_scores` with the iteration and the
    seconds."""
    samples = read_lines(folder / VALIDATION)
    if not len(samples):
        return samples
    rows = [
        model_scores(group, benchmark.domains).assign(iteration=i, seconds=group["seconds"].iloc[0])
        for i, group in samples.groupby("iteration")
    ]
    return pd.concat(rows, ignore_index=True).drop(columns="model")


class EvaluateJob(Config):
    """`models`: name -> adapter (null: the base). The first `n` prompts of each task of a split, or
    of some `tasks`, scored by the rewards and held-out rewards, or by some `rewards`."""

    benchmark: str = DEFAULT
    models: Annotated[dict[str, str | None], Field(min_length=1)]
    adapters: dict[str, Source] = {}
    split: Split = "test"
    n: Count = 60
    tasks: list[str] | None = None
    rewards: list[str] | None = None
    steps: Count | None = None
    repeats: Count = 1
    first_repeat: Index = 0
    embed: bool = False
    images: bool = False
    file: str = "samples.parquet"
    batch: Count = 64
    seed: Index = 0


def evaluate_job(config: EvaluateJob, folder: Path, workspace: Workspace) -> None:
    benchmark, device, named = workspace.benchmark, workspace.device, config.rewards
    for task in config.tasks or ():
        choose("task with prompts", task, benchmark.prompt_tasks)
    workspace.load_adapters([a for a in config.models.values() if a], config.adapters)
    prompts = benchmark.first_prompts(config.split, config.n)
    evaluate(
        workspace.policy,
        [p for p in prompts if p.task in (config.tasks or benchmark.prompt_tasks)],
        benchmark.rewards_named(named, device) if named else benchmark.all_rewards(device),
        config.seed,
        benchmark.sampler(config.steps) if config.steps else benchmark.sampling.evaluation,
        config.models,
        config.repeats,
        config.first_repeat,
        benchmark.embedder(device) if config.embed else None,
        config.batch,
        images=folder / "images" if config.images else None,
        into=folder / config.file,
        guidance=guidance_of(benchmark, config.adapters),
        show_progress=workspace.show_progress,
        shard=workspace.shard,
    )


def job_of(spec: Mapping[str, Any]) -> tuple[Callable, Config]:
    """The function of a job and its checked configuration. Raises ValueError for a specification
    that is none."""
    spec = dict(validate(dict[str, Any], spec, "a job"))
    name = spec.pop("job", "train")
    if ":" not in name:
        name = JOBS[choose("job", name, JOBS)]
    function = load_plugin(name)
    kind = typing.get_type_hints(function)["config"]
    return function, validate(kind, spec)


def run_job(spec: Mapping[str, Any], folder: str | Path, workspace: Workspace) -> None:
    """Do what a specification says, into a folder."""
    function, config = job_of(spec)
    function(config, Path(folder), workspace)
