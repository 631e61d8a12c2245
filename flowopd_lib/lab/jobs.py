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

import itertools
import time
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import yaml
from pydantic import Field, model_validator

from ..benchmarks import DEFAULT
from ..benchmarks.benchmark import Split
from ..config import (
    Config,
    Count,
    Index,
    NonNegative,
    Seed,
    choose,
    load_plugin,
    plugin_name,
    validate,
)
from ..evaluate import evaluate
from ..files import read_lines, write_whole
from ..losses import Shard
from ..precision import decide
from ..stats import model_scores
from ..train import VALIDATION, StepInfo, TrainConfig, check_folder, fit
from . import cache
from .recipe import Recipe, Source, build
from .workspace import Workspace

VALIDATION_SEED = 1 << 20
MEET = 0.05  # seconds between two looks for the other processes of an evaluation

JOBS = {
    "train": "flowopd_lib.lab.jobs:train_job",
    "evaluate": "flowopd_lib.lab.jobs:evaluate_job",
    "interference": "flowopd_lib.experiments.interference:interference_job",
    "estimators": "flowopd_lib.experiments.estimators:estimators_job",
    "steps": "flowopd_lib.experiments.steps:steps_job",
}


class EarlyStopping(Config):
    """Stops when the mean validation reward has not improved by `min_increase` for `patience`
    probes."""

    patience: Count
    min_increase: NonNegative = 0.0


class ValidationConfig(Config):
    """The same prompts and noise sampled and scored before a training, after every `every`
    iterations and at its end: the first `n` of each task of a split. `images`: save the samples as
    thumbnails."""

    every: Count
    n: Count = 24
    split: Split = "val"
    steps: Count | None = None
    seed: Seed = VALIDATION_SEED
    images: bool = False
    stop: EarlyStopping | None = None


class TrainJob(Recipe):
    """`continue_from`: the folder of the same training for fewer iterations, from whose state it
    continues."""

    name: str = "student"
    validation: ValidationConfig | None = None
    continue_from: str | None = None

    @model_validator(mode="after")
    def _can_stop(self):
        stop = self.validation and self.validation.stop
        if stop and self.train.cooldown:
            raise ValueError(
                "validation.stop ends a training at an iteration that is not known before, so it "
                "needs train.cooldown 0"
            )
        if stop and stop.patience * self.validation.every >= self.train.iterations:
            raise ValueError(
                f"validation.stop ends no training of {self.train.iterations} iterations with a "
                f"patience of {stop.patience} probes, one every {self.validation.every} iterations"
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
    objective, train = build(config, workspace, config.name)
    validation, every = config.validation, config.validation.every if config.validation else 0
    started = stopped = False

    def on_step(info: StepInfo) -> bool:
        nonlocal started, stopped
        # only now: a recipe that the folder's training refused must not take the place of its own
        if workspace.main and not started:
            write_whole(
                folder / ("recipe.yaml"), yaml.safe_dump(recipe_dict(config), sort_keys=False)
            )
            decide(folder, workspace.policy.dtype, workspace.policy.device)
        started = True
        stopped = bool(workspace.on_step and workspace.on_step(info))
        return stopped or should_stop(info.iteration + 1)

    def should_stop(iteration: int) -> bool:
        if (
            not validation
            or not validation.stop
            or iteration % every
            or iteration >= train.iterations
        ):
            return False
        workspace.shard.wait()
        return plateaued(read_lines(folder / VALIDATION), iteration, validation, config, workspace)

    check_folder(workspace.policy, objective, folder, train, config.name)
    workspace.shard.wait()  # all have read the state before the first changes the folder
    if workspace.main:
        cache.forget(folder)
    # a training that early stopping has ended is finished in a second call, with so many iterations
    already = sorted(set(read_lines(folder / VALIDATION).get("iteration", [])))
    end = next((int(i) for i in already if i and should_stop(int(i))), train.iterations)
    for _ in range(2):
        metrics, _ = fit(
            workspace.policy,
            objective,
            folder,
            _with_iterations(train, end),
            config.name,
            validator(validation, folder, workspace) if validation else None,
            every,
            on_step,
            workspace.show_progress,
            workspace.accelerator,
        )
        if stopped or len(metrics) == end:
            break
        end = len(metrics)
    if workspace.main and not stopped:
        cache.write_record(key, folder)


def _with_iterations(train: TrainConfig, iterations: int) -> TrainConfig:
    from dataclasses import replace

    return train if iterations == train.iterations else replace(train, iterations=iterations)


def recipe_dict(config: Recipe) -> dict[str, Any]:
    """The recipe as YAML can hold it: functions by their names, sections as they were given."""
    sections = config.model_dump(mode="json", exclude_unset=True, fallback=plugin_name)
    return {k: v for k, v in sections.items() if k in Recipe.model_fields}


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
            validation.seed,
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


def plateaued(
    samples: pd.DataFrame,
    iteration: int,
    validation: ValidationConfig,
    config: Recipe,
    workspace: Workspace,
) -> bool:
    """Whether the mean of the rewards that are trained on, over their scales, has not improved for
    `patience` probes up to an iteration."""
    benchmark = workspace.benchmark
    tasks = (config.schedule or config.sft).tasks or benchmark.prompt_tasks
    weights = config.grpo.reward_weights if config.grpo else {}
    weights = weights or benchmark.reward_weights(tasks=tasks)
    names = {n for v in weights.values() if isinstance(v, Mapping) for n in v} or set(weights)
    names &= set(samples)  # what is for training only is not reported
    names = names or {benchmark.tasks[t].reward for t in tasks}
    tasks = [d for d in benchmark.domains if d[0] in names]
    means = []
    for i in sorted(set(samples["iteration"])):
        if i <= iteration:
            rows = samples[samples["iteration"] == i]
            means.append(np.mean([rows.loc[rows["task"] == t, r].mean() / s for r, t, s in tasks]))
    stop = validation.stop
    if len(means) <= stop.patience:
        return False
    return max(means[-stop.patience :]) < max(means[: -stop.patience]) + max(
        stop.min_increase, 1e-9
    )


def validation_scores(folder: Path, benchmark) -> pd.DataFrame:
    """What a training's validation samples come to: `model_scores` with the iteration and the
    seconds."""
    samples = read_lines(folder / VALIDATION)
    rows = [
        model_scores(group, benchmark.domains).assign(iteration=i, seconds=group["seconds"].iloc[0])
        for i, group in (samples.groupby("iteration", sort=True) if len(samples) else ())
    ]
    return pd.concat(rows, ignore_index=True).drop(columns="model") if rows else pd.DataFrame()


class EvaluateJob(Config):
    """`models`: name -> adapter (null: the base). The first `n` prompts of each task of a split, or
    of some `tasks`, scored by the rewards and held-out rewards, or by some `rewards`. `shard`: [r,
    n], the part of process r of n that meet in files alone."""

    benchmark: str = DEFAULT
    models: Annotated[dict[str, str | None], Field(min_length=1)]
    adapters: dict[str, Source] = {}
    split: Split = "test"
    n: Count = 60
    tasks: list[str] | None = None
    rewards: list[str] | None = None
    steps: Count | None = None
    repeats: Count = 1
    embed: bool = False
    images: bool = False
    file: str = "samples.parquet"
    batch: Count = 64
    seed: Index = 0
    shard: tuple[Index, Count] | None = None


def evaluate_job(config: EvaluateJob, folder: Path, workspace: Workspace) -> None:
    benchmark, device = workspace.benchmark, workspace.device
    for task in config.tasks or ():
        choose("task with prompts", task, benchmark.prompt_tasks)
    workspace.load_adapters([a for a in config.models.values() if a], config.adapters)
    prompts = benchmark.first_prompts(config.split, config.n)
    prompts = [p for p in prompts if p.task in (config.tasks or benchmark.prompt_tasks)]
    named = config.rewards
    rewards = benchmark.rewards_named(named, device) if named else benchmark.all_rewards(device)
    evaluate(
        workspace.policy,
        prompts,
        rewards,
        config.seed,
        benchmark.sampler(config.steps) if config.steps else benchmark.sampling.evaluation,
        config.models,
        config.repeats,
        benchmark.embedder(device) if config.embed else None,
        config.batch,
        images=folder / "images" if config.images else None,
        into=folder / config.file,
        guidance=benchmark.guidance,
        show_progress=workspace.show_progress,
        shard=_meeting_in(folder / (f".{config.file}.meet"), *config.shard)
        if config.shard
        else workspace.shard,
    )


def _meeting_in(folder: Path, rank: int, processes: int) -> Shard:
    """The shard of processes that meet in a folder: each leaves a file there at every wait."""
    passed = itertools.count()
    folder.mkdir(parents=True, exist_ok=True)

    def wait() -> None:
        number = next(passed)
        write_whole(folder / f"{number}_{rank}", "")
        while len(list(folder.glob(f"{number}_*"))) < processes:
            time.sleep(MEET)

    return Shard(rank, processes, wait=wait)


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
