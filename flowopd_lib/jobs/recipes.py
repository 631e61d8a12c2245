"""A training as data: what a YAML file or a notebook describes, built.

benchmark: tiny                     # whose model, prompts and rewards: a shipped benchmark or a YAML file
adapters: {mine: FOLDER}        # loaded beside the student and the benchmark's experts, which are there by their
                                names: teachers, anchors, references
student: {rank: 32, alpha: 64}  # a new adapter; or {load: FOLDER or expert}; or {merge: cat, adapters: [...]}
schedule: {tasks: [ocr], prompts_per_batch: 12, images_per_prompt: 12}      # tags: {color_attr: 3}: GenEval's
                                                            tags drawn so often; else once
sampler: {steps: 10, kind: sde, noise_level: 0.7}
grpo: {reward_weights: {OCR: 1.0}}     # or   opd: {teachers: {ocr: ocr}}   or   sft: {samples: 96}
train: {iterations: 100, lr: 3.0e-4}
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..benchmarks import Benchmark, load_benchmark
from ..benchmarks.benchmark import DEFAULT
from ..inputs import (
    SEED,
    Count,
    check_keys,
    check_mapping,
    check_options,
    check_value,
    list_of,
    nearest,
    one_of,
)
from ..merge import drawn_by_teachers
from ..objectives import GRPO, OPD, SFT, Objective
from ..policy import FlowPolicy
from ..prompts import Prompt
from ..rollout import Sampler
from ..schedule import Schedule
from ..train import TrainConfig
from .site import Site, check_source

OBJECTIVES = ("grpo", "opd", "sft")
# What each key of a recipe may be; the sections' own keys are the arguments of what they describe, with their
# types.
KEYS = {
    "benchmark": str,
    "adapters": dict[str, str | dict],
    "student": str | dict,
    "schedule": dict,
    "sampler": dict,
    "grpo": dict,
    "opd": dict,
    "sft": dict,
    "train": dict,
    "seed": SEED,
}
SFT_KEYS = {"samples": Count, "batch": Count, "steps": Count, "tasks": list_of(str)}


def build(
    recipe: Mapping,
    device: str | torch.device = "",
    dtype: str | torch.dtype = "auto",
    policy: FlowPolicy | None = None,
    site: Site | None = None,
    name: str = "student",
) -> tuple[FlowPolicy, Objective, TrainConfig]:
    """Everything `train` takes; the policy, of `site` or the one given, gets what it lacks of the recipe's
    adapters and, called `name`, of the student.

    Raises ValueError or FileNotFoundError, naming key and value, before anything long begins: all of the
    recipe is checked before a model is loaded.
    """
    check_mapping("the recipe", recipe, KEYS)
    kinds = [kind for kind in OBJECTIVES if kind in recipe]
    needed = ["train"] if kinds == ["sft"] else ["train", "schedule"]
    if len(kinds) != 1 or not all(key in recipe for key in needed):
        raise ValueError(
            "a recipe has a schedule, a train section, and one objective: grpo, opd or sft"
        )
    benchmark = site.benchmark if site else load_benchmark(recipe.get("benchmark", DEFAULT))
    seed = recipe.get("seed", 0)
    if "iterations" not in recipe["train"]:
        raise ValueError("train lacks iterations: how many to train for")
    config = TrainConfig(**check_options("train", recipe["train"], TrainConfig))
    student = recipe.get("student", {"rank": benchmark.rank, "alpha": benchmark.alpha})
    adapters = recipe.get("adapters", {})
    for key, source in {
        "student": student,
        **{f"adapters.{k}": v for k, v in adapters.items()},
    }.items():
        check_source(key, source)
    known = {**dict.fromkeys(benchmark.experts), **adapters}
    for other in student.get("adapters", []) if isinstance(student, Mapping) else []:
        _known("student merges", other, known)
    objective, used = None, set(benchmark.teachers.values())
    if kinds == ["sft"]:
        check_mapping("sft", recipe["sft"], SFT_KEYS, "sft.")
    else:
        objective = _objective(kinds[0], recipe, benchmark, seed, policy or site)
        used = objective.adapters
        for other in used:
            _known(f"{kinds[0]} names the adapter", other, {**known, name: None})
    if site is None:
        site = Site(benchmark, dtype, policy=policy or benchmark.policy(dtype, device))
    source = {"load": student} if isinstance(student, str) else student
    new = source if {"merge", "load"} & set(source) else {"seed": seed, **source}
    site.adapters([*sorted(used - {name}), *adapters], adapters)
    site.adapter(name, new, adapters)
    if objective is None:
        objective = _sft(recipe["sft"], site, seed)
    objective.check(site.policy, name)
    return site.policy, objective, config


def _known(where: str, name: str, known: Mapping) -> None:
    if name not in known:
        raise ValueError(
            f"{where} {name!r}{nearest(name, known)}; there are the adapters {', '.join(known) or '(none)'}"
        )


def _objective(kind: str, recipe: Mapping, benchmark: Benchmark, seed: int, where) -> GRPO | OPD:
    default = benchmark.distillation if kind == "opd" else benchmark.exploration
    given = check_options("sampler", recipe.get("sampler", {}), Sampler)
    sampler = Sampler(**{"steps": 10, "kind": "sde", **given}) if given else default
    schedule = dict(recipe["schedule"])
    tasks = check_value(
        "schedule.tasks",
        schedule.pop("tasks", list(benchmark.own)),
        list_of(one_of(*benchmark.tasks)),
    )
    tags = check_value("schedule.tags", schedule.pop("tags", {}), dict[str, int])
    options = check_options("schedule", schedule, Schedule, ("prompts", "seed"))
    if "prompts_per_batch" not in options:
        raise ValueError(
            "schedule lacks prompts_per_batch: how many prompts an iteration trains on"
        )
    prompts = Schedule(
        {task: _weighed(benchmark.prompts(task, "train"), tags) for task in tasks},
        seed=seed,
        **options,
    )
    if kind == "opd":
        given = {"teachers": {t: benchmark.teachers.get(t) for t in tasks}, **recipe["opd"]}
        own = check_options("opd", given, OPD, ("schedule", "sampler"))
        asked = {*own["teachers"].values(), own.get("anchor")}
        guidance = {n: g for n, g in benchmark.guidance.items() if n in asked}
        if None in asked and sampler.guidance != 1.0:  # the base, as the student that is guided
            guidance[None] = sampler.guidance
        return OPD(prompts, sampler=sampler, **{"guidance": guidance, **own})
    rewards = {t: benchmark.reward_weights()[benchmark.tasks[t].home] for t in tasks}
    own = check_options(
        "grpo",
        {"reward_weights": rewards, **recipe["grpo"]},
        GRPO,
        ("schedule", "rewards", "sampler"),
    )
    return GRPO(prompts, _rewards(benchmark, own["reward_weights"], where), sampler=sampler, **own)


def _rewards(benchmark: Benchmark, rewards: Mapping, where) -> dict:
    """Those that a reward may name, and the held_out ones it does name, which GRPO refuses."""
    device = str(where.device) if where is not None else ""
    named = {n for k, v in rewards.items() for n in ([k] if not isinstance(v, Mapping) else v)}
    held_out = sorted(n for n in named & set(benchmark.specs) if benchmark.reward_is(n, "held_out"))
    if held_out:
        raise ValueError(f"{held_out[0]} is an held-out reward, by which nothing may be trained")
    return benchmark.all_training_rewards(device)


def _sft(given: Mapping, site: Site, seed: int) -> SFT:
    """On samples that each prompt's own teacher draws."""
    benchmark = site.benchmark
    tasks = list(given.get("tasks", benchmark.own))
    prompts = [
        p
        for task in tasks
        for p in benchmark.prompts(task, "train")[: -(-given.get("samples", 96) // len(tasks))]
    ]
    sampler = benchmark.evaluation if "steps" not in given else benchmark.sampler(given["steps"])
    latents = drawn_by_teachers(site.policy, prompts, benchmark.teachers, sampler, share=site.share)
    return SFT(latents, prompts, batch=given.get("batch", 48), seed=seed)


def _weighed(prompts: list[Prompt], tags: Mapping[str, int]) -> list[Prompt]:
    """Every prompt as often as its tag says (once by default), as in Flow-GRPO's training set for GenEval."""
    if any(p.tag != p.task for p in prompts):
        check_keys("tags", tags, sorted({p.tag for p in prompts}))
    if not all(n >= 0 for n in tags.values()):
        raise ValueError(
            f"tags say how often their prompts are drawn, in whole numbers, not {dict(tags)}"
        )
    return [p for p in prompts for _ in range(tags.get(p.tag, 1))]


def grpo_mix(
    benchmark: Benchmark,
    iterations: int,
    prompts_per_batch: int = 12,
    images_per_prompt: int = 12,
    seed: int = 0,
    lr: float = 6e-4,
    **options,
) -> dict:
    """The recipe of the paper's baseline: the sets of prompts take turns (GenEval : OCR : PickScore = 3 : 1 :
    1), each with its own reward and a share of another (0.2 DeQA), as the benchmark says. `options` of GRPO."""
    micro_batch_size = -(-prompts_per_batch // 2) * images_per_prompt
    return {
        "benchmark": benchmark.place,
        "student": {"rank": benchmark.rank, "alpha": benchmark.alpha},
        "schedule": {
            "tasks": list(benchmark.own),
            "prompts_per_batch": prompts_per_batch,
            "images_per_prompt": images_per_prompt,
            "task_weights": dict(benchmark.task_schedule),
            "alternate": True,
        },
        "grpo": {
            "reward_weights": benchmark.reward_weights(auxiliary=True),
            "beta": 0.0,
            "clip": 2e-4,
            "micro_batch_size": micro_batch_size,
            **options,
        },
        "train": {"iterations": iterations, "lr": lr, "ema": 0.9},
        "seed": seed,
    }
