"""A training as data: what a YAML file or a notebook describes, checked and built.

benchmark: tiny                 # whose model, prompts and rewards: shipped, or a YAML file
adapters: {mine: FOLDER}        # besides the benchmark's experts, which are there by their names
student: {rank: 32, alpha: 64}  # a new adapter; {load: FOLDER}; or {merge: cat, adapters: [...]}
schedule: {tasks: [ocr], prompts_per_batch: 12, images_per_prompt: 12}
sampler: {steps: 10, noise_level: 0.7}      # what is left out is the benchmark's
grpo: {reward_weights: {OCR: 1.0}}          # or opd: {teachers: ...}, or sft: {samples: 96}
train: {iterations: 100, lr: 3.0e-4}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import torch
from pydantic import Discriminator, Tag, model_validator

from ..benchmarks import DEFAULT, Benchmark
from ..config import Config, Count, Positive, Seed, choose, validate
from ..data import Schedule, ScheduleConfig
from ..losses import GRPO, OPD, SFT, GRPOConfig, Objective, OPDConfig, SFTConfig, sample_teachers
from ..merge import MergeConfig
from ..rollout import Sampler
from ..train import TrainConfig

SFT_SEED = (1 << 41) + (1 << 32)  # of the samples that a supervised start learns from


class NewAdapter(Config):
    rank: Count
    alpha: Positive | None = None  # None: twice the rank
    seed: Seed | None = None


class LoadAdapter(Config):
    load: str


def _kind_of_source(value: Any) -> str:
    keys = type(value).model_fields if isinstance(value, Config) else value
    if not isinstance(keys, Mapping):
        return "a name"
    return "a merge" if "merge" in keys else "a copy" if "load" in keys else "a new one"


# Where an adapter comes from: an expert of the benchmark, another adapter of the recipe, a folder
# or a hub id by its name, or one of these.
Source = Annotated[
    Annotated[str, Tag("a name")]
    | Annotated[NewAdapter, Tag("a new one")]
    | Annotated[LoadAdapter, Tag("a copy")]
    | Annotated[MergeConfig, Tag("a merge")],
    Discriminator(_kind_of_source),
]


class Recipe(Config):
    benchmark: str = DEFAULT
    adapters: dict[str, Source] = {}
    student: Source | None = None
    schedule: ScheduleConfig | None = None
    sampler: dict[str, Any] = {}
    grpo: GRPOConfig | None = None
    opd: OPDConfig | None = None
    sft: SFTConfig | None = None
    train: TrainConfig
    seed: Seed = 0

    @model_validator(mode="after")
    def _one_objective(self):
        given = [k for k in ("grpo", "opd", "sft") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError("a recipe has one objective: grpo, opd or sft")
        if given != ["sft"] and self.schedule is None:
            raise ValueError("a recipe of grpo or opd has a schedule")
        if given == ["sft"] and (self.schedule or self.sampler):
            raise ValueError(
                "a recipe of sft has neither schedule nor sampler: see sft.tasks, steps"
            )
        return self


def rewards_in(weights: Mapping[str, Any]) -> set[str]:
    """The names in `reward_weights`, which are by reward, or by task and then by reward."""
    groups = (w if isinstance(w, Mapping) else {name: w} for name, w in weights.items())
    return {name for group in groups for name in group}


def made_from(name: str, sources: Mapping[str, Any]) -> str | NewAdapter | MergeConfig:
    """What an adapter is made from, where `sources` may name each other: an expert, a folder or a
    hub id by its name, a new adapter or a merge."""
    source, others = name, dict(sources)
    while isinstance(source, str) and source in others:
        source = others.pop(source)
    source = validate(Source, source, f"the adapter {name}")
    return source.load if isinstance(source, LoadAdapter) else source


def guidance_of(benchmark: Benchmark, sources: Mapping[str, Any]) -> dict[str, float]:
    """By adapter: what the benchmark says of an expert, under any name that `sources` give it."""
    known = benchmark.guidance
    ends = {name: made_from(name, sources) for name in (*known, *sources)}
    return {name: known[e] for name, e in ends.items() if isinstance(e, str) and e in known}


def build_objective(recipe: Recipe, benchmark: Benchmark, device: str = "") -> GRPO | OPD | None:
    """The objective of a recipe, without loading the model; None for sft, which samples first.
    Raises ValueError for names that the benchmark does not have."""
    if recipe.sft is not None:
        return None
    default = benchmark.sampling.opd if recipe.opd else benchmark.sampling.grpo
    sampler = validate(Sampler, {**asdict(default), **recipe.sampler}, "sampler")
    config = recipe.schedule
    every = benchmark.distilled_tasks if recipe.opd and not recipe.opd.teachers else ()
    tasks = list(config.tasks or every or benchmark.prompt_tasks)
    for task in (*tasks, *config.task_weights):
        choose("task (schedule)", task, benchmark.tasks)
    prompts = {task: benchmark.prompts(task, "train") for task in tasks}
    tags = {p.tag for of_task in prompts.values() for p in of_task}
    for tag in config.tag_weights:
        choose("tag (schedule.tag_weights)", tag, sorted(tags))
    repeats = config.tag_weights.get  # as in Flow-GRPO's training set for GenEval; 1 by default
    schedule = Schedule(
        {t: [p for p in of_t for _ in range(repeats(p.tag, 1))] for t, of_t in prompts.items()},
        config.prompts_per_batch,
        config.images_per_prompt,
        config.task_weights or None,
        config.alternate,
        recipe.seed,
    )
    if opd := recipe.opd:
        teachers = opd.teachers or {t: e for t, e in benchmark.teachers.items() if t in tasks}
        used = {*teachers.values()} | ({opd.anchor} if opd.mar else set())
        # an expert's is the benchmark's; the base and other adapters are guided as the student
        known = guidance_of(benchmark, recipe.adapters)
        guidance = {name: known.get(name, sampler.guidance) for name in used}
        guidance = {name: g for name, g in guidance.items() if g != 1.0} | dict(opd.guidance)
        config = opd.model_copy(update={"teachers": teachers, "guidance": guidance})
        return OPD(schedule, config, sampler)
    weights = recipe.grpo.reward_weights or benchmark.reward_weights(tasks=tasks)
    names = rewards_in(weights)
    config = recipe.grpo.model_copy(update={"reward_weights": weights})
    return GRPO(schedule, benchmark.rewards_named(names, device), config, sampler)


def build(recipe: Recipe, workspace, name: str = "student") -> tuple[Objective, TrainConfig]:
    """What `train` takes besides the policy. The workspace's policy gets the recipe's adapters and,
    called `name`, the student.

    Raises ValueError or FileNotFoundError, naming key and value, before anything long begins: all
    of the recipe is checked before a model is loaded.
    """
    benchmark = workspace.benchmark
    objective = build_objective(recipe, benchmark, workspace.device)
    student = recipe.student or NewAdapter(rank=benchmark.rank, alpha=benchmark.alpha)
    known = {*benchmark.experts, *recipe.adapters, name}
    used = objective.adapters if objective else {*benchmark.teachers.values()}
    for other in used:
        choose("adapter", other, known)
    for other in student.adapters if isinstance(student, MergeConfig) else ():
        choose("adapter (student.adapters)", other, known - {name})
    if isinstance(student, NewAdapter) and student.seed is None:
        student = student.model_copy(update={"seed": recipe.seed})
    workspace.load_adapters({*used, *recipe.adapters} - {name}, recipe.adapters)
    workspace.load_adapter(name, student, recipe.adapters)
    objective = objective or _sft(recipe, workspace)
    objective.check(workspace.policy, name)
    return objective, recipe.train


def _sft(recipe: Recipe, workspace) -> SFT:
    """On samples of each prompt's own teacher."""
    benchmark, config = workspace.benchmark, recipe.sft
    tasks = list(config.tasks or benchmark.distilled_tasks or benchmark.prompt_tasks)
    each = -(-config.samples // len(tasks))
    prompts = [p for task in tasks for p in benchmark.prompts(task, "train")[:each]]
    sampler = benchmark.sampler(config.steps) if config.steps else benchmark.sampling.evaluation
    seeds = [SFT_SEED + i for i in range(len(prompts))]
    how = {"guidance": guidance_of(benchmark, recipe.adapters), "shard": workspace.shard}
    latents = sample_teachers(workspace.policy, prompts, seeds, benchmark.teachers, sampler, **how)
    return SFT(latents.to(torch.float32), prompts, config, recipe.seed)


def grpo_mix(
    benchmark: Benchmark,
    iterations: int,
    prompts_per_batch: int = 12,
    images_per_prompt: int = 12,
    seed: int = 0,
    lr: float = 6e-4,
    **options,
) -> dict[str, Any]:
    """The recipe of the paper's baseline: the sets of prompts take turns (GenEval : OCR : PickScore
    = 3 : 1 : 1), each with its own reward and a fraction of another (0.2 DeQA), as the benchmark
    says. `options` of GRPO."""
    return {
        "benchmark": benchmark.source,
        "student": {"rank": benchmark.rank, "alpha": benchmark.alpha},
        "schedule": {
            "tasks": list(benchmark.prompt_tasks),
            "prompts_per_batch": prompts_per_batch,
            "images_per_prompt": images_per_prompt,
            "task_weights": dict(benchmark.task_schedule),
            "alternate": True,
        },
        "grpo": {
            "reward_weights": benchmark.reward_weights(auxiliary=True),
            "beta": 0.0,
            "clip": 2e-4,
            "micro_batch_size": -(-prompts_per_batch // 2) * images_per_prompt,
            **options,
        },
        "train": {"iterations": iterations, "lr": lr, "ema": 0.9},
        "seed": seed,
    }
