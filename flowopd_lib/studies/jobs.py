"""The jobs of the studies: gradients and their interference, the readings of the OPD loss, the worth of
steps."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import Field

from ..files import set_aside, write_table
from ..identity import describe, sha256_of
from ..inputs import SEED, Count
from ..jobs.site import Site
from ..objectives import ESTIMATORS, GRPO, OPD
from ..parts import keep, read_of
from ..schedule import Schedule
from .directions import alignment
from .estimators import measure
from .interference import (
    Gradients,
    interference,
    pull_gradients,
    reward_gradients,
    taylor_check,
    walk_gradients,
)
from .steps import worth_of_steps

BRANCHES = (
    4  # the noisiest steps, at one of which walks part, where the benchmark does not say how many
)
FORWARD = 8  # images at least in a forward

SOME = {"benchmark": str, "adapters": dict[str, Any], "seed": SEED, "adapter": str, "file": str}
OF_GRADIENTS = {
    **SOME,
    "of": Literal["reward", "branch", "walk", "pull"],
    "batches": Annotated[int, Field(ge=3)],
    "prompts_per_batch": Count,
    "images_per_prompt": Annotated[int, Field(ge=2)],
    "step_size": Annotated[float, Field(gt=0)],
    "images": Count,
}


def reward_objectives(
    site: Site, prompts: int, images: int, seed: int, branch: bool = False
) -> dict[str, GRPO]:
    """By task, the plain reward of its reward on its own prompts; where a task shares another's prompts, on
    those of all. `branch`: a prompt's walks part at one of the noisiest steps, which alone has noise."""
    benchmark, rewards = site.benchmark, site.benchmark.rewards(site.device)
    found, walks = {}, benchmark.exploration
    sampler = replace(walks, noisy=None, last=None, slide=0, branch=False)
    if branch:
        last = min(walks.first + (walks.noisy or BRANCHES), walks.steps - 1) - 1
        sampler = replace(sampler, noisy=1, last=last, branch=True)
    for name, task in benchmark.tasks.items():
        on = benchmark.own if task.like else (name,)
        schedule = Schedule(
            {t: benchmark.prompts(t, "train") for t in on}, prompts, images, seed=seed
        )
        plain = {"updates": 1, "normalise": "none", "reduction": "sum", "clip": 1e9, "beta": 0.0}
        micro_batch_size = max(prompts * images, FORWARD)  # of the check's samples, too
        found[name] = GRPO(
            schedule,
            rewards,
            {task.reward: 1.0},
            sampler,
            micro_batch_size=micro_batch_size,
            **plain,
        )
    return found


def pull_objectives(site: Site, prompts: int, seed: int, but: str) -> dict[str, OPD]:
    """By expert, the distillation to it on its own prompts."""
    benchmark, found = site.benchmark, {}
    for task, expert in benchmark.teachers.items():
        if expert != but:
            site.adapter(expert)
            schedule = Schedule({task: benchmark.prompts(task, "train")}, prompts, 1, seed=seed)
            found[expert] = OPD(schedule, {task: expert}, benchmark.distillation, mar=0.0)
    return found


def _begin(target: Path, spec: Mapping, site: Site) -> tuple[bool, str, Path]:
    """Whether the table is there, made of the same specification, weights and benchmark (one that was not is
    moved into `earlier/`); the hash of all that; and a folder for what is computed on the way."""
    policy, name = site.policy, spec["adapter"]
    site.adapters([name], spec.get("adapters", {}))
    benchmark = site.benchmark
    follows_from = {
        **{k: v for k, v in spec.items() if k not in ("benchmark", "adapters")},
        "weights": policy.adapter(name).sha256,
        "base": policy.base_hash,
        "precision": policy.dtype,
        "benchmark": [
            benchmark.tasks,
            benchmark.experts,
            benchmark.specs,
            benchmark.exploration,
            benchmark.distillation,
        ],
    }
    of = sha256_of(describe(follows_from))
    there = target.is_file() and read_of(target) == of
    site.share.wait()
    if site.main and not there:
        set_aside(target.parent, target)
    site.share.wait()
    return there, of, target.parent / f".{target.stem}_{of[:12]}"


def _end(target: Path, of: str, way: Path, table: pd.DataFrame, site: Site) -> None:
    site.policy.train_adapter(None)
    site.share.wait()
    if site.main:
        keep(target, of, table)
        shutil.rmtree(way, ignore_errors=True)
    site.share.wait()


def interference_job(spec: Mapping, folder: Path, site: Site) -> None:
    """`file` (interference.parquet): inner products and cosines of the tasks' gradients at `adapter`; with
    `step_size`, {the file's stem}_taylor.parquet: predicted and measured changes of a real step of that
    length. `of`: rewards by score functions (reward), those of walks that part at one step (branch) or
    through the reward (walk), or teachers' pulls."""
    target = folder / spec.get("file", "interference.parquet")
    check = target.with_name(f"{target.stem}_taylor.parquet")
    there, of, way = _begin(target, spec, site)
    if there:
        return
    name, seed, prompts = spec["adapter"], spec.get("seed", 0), spec["prompts_per_batch"]
    if spec.get("of", "reward") == "pull":
        if "step_size" in spec:
            raise ValueError(
                "step_size measures rewards; leave it out where the pulls of teachers are asked"
            )
        objectives = asked = pull_objectives(site, prompts, seed, name)
        how = pull_gradients
    else:
        parted = spec.get("of") == "branch"
        objectives = asked = reward_objectives(
            site, prompts, spec["images_per_prompt"], seed, parted
        )
        how = reward_gradients
    if spec.get("of") == "walk":
        passing = [
            t
            for t, task in site.benchmark.tasks.items()
            if site.benchmark.passes_gradient(task.reward)
        ]
        how, asked = walk_gradients, {task: objectives[task] for task in passing}
        if not asked:  # told by a table without rows
            return _end(target, of, way, pd.DataFrame({"task": [], "on": []}), site)
    found = interference(site.policy, asked, name, spec["batches"], how, Gradients(way), site.share)
    if "step_size" in spec:
        parts = {task: way / f"taylor_{task}.parquet" for task in found.tasks}
        mine = [
            t
            for t in found.tasks[site.share.rank :: site.share.processes]
            if not parts[t].is_file()
        ]
        if mine:
            rows = taylor_check(
                site.policy,
                objectives,
                name,
                spec["step_size"],
                found.gradients,
                spec["images"],
                mine,
            )
            for task in mine:
                write_table(parts[task], rows[rows["task"] == task])
        site.share.wait()
        if site.main:
            write_table(check, pd.concat(map(pd.read_parquet, parts.values()), ignore_index=True))
    _end(target, of, way, found.table().astype({"sigma": str}), site)


OF_VECTORS = {
    "benchmark": str,
    "adapters": dict[str, Any],
    "models": Annotated[dict[str, str], Field(min_length=1)],
    "file": str,
}


def vectors_job(spec: Mapping, folder: Path, site: Site) -> None:
    """`file` (vectors.parquet): inner products and cosines of what trainings changed, see
    `directions.alignment`. `models`: adapters by "DIRECTION#TRAINING"."""
    site.adapters(spec["models"].values(), spec.get("adapters", {}))
    trainings: dict[str, list[str]] = {}
    for model, adapter in spec["models"].items():
        trainings.setdefault(model.split("#")[0], []).append(adapter)
    table = alignment(site.policy, trainings)
    site.share.wait()
    if site.main:
        write_table(folder / spec.get("file", "vectors.parquet"), table)
    site.share.wait()


OF_ESTIMATORS = {
    **SOME,
    "batches": Annotated[int, Field(ge=3)],
    "images": Count,
    "distance": Annotated[float, Field(gt=0, le=1)],
    "estimators": list[Literal[ESTIMATORS]],
}


def estimators_job(spec: Mapping, folder: Path, site: Site) -> None:
    """`file` (estimators.parquet): the readings of the OPD loss at `adapter`, see `estimators`."""
    target = folder / spec.get("file", "estimators.parquet")
    there, of, way = _begin(target, spec, site)
    if there:
        return
    how = {k: spec[k] for k in ("batches", "images", "seed", "distance", "estimators") if k in spec}
    _end(target, of, way, measure(site, spec["adapter"], folder=way, **how), site)


OF_STEPS = {**SOME, "iterations": Count, "prompts_per_batch": Count, "n": Count, "steps": Count}


def steps_job(spec: Mapping, folder: Path, site: Site) -> None:
    """`file` (steps.parquet): what each step of a walk is worth to a student that starts at `adapter`."""
    benchmark = site.benchmark
    target = folder / spec.get("file", "steps.parquet")
    there, of, way = _begin(target, spec, site)
    if there:
        return
    teachers = {t: benchmark.teachers[t] for t in benchmark.own if t in benchmark.teachers}
    site.adapters(teachers.values())
    seed, train = spec.get("seed", 0), {t: benchmark.prompts(t, "train") for t in teachers}
    table = worth_of_steps(
        site.policy,
        spec["adapter"],
        Schedule(train, spec["prompts_per_batch"], seed=seed),
        teachers,
        [p for t in teachers for p in benchmark.prompts(t, "val")[: spec["n"]]],
        way,
        spec["iterations"],
        benchmark.sampler(spec["steps"]),
        seed,
        benchmark.distillation,
        site.accelerator,
    )
    _end(target, of, way, table, site)


JOBS = {
    "interference": (interference_job, OF_GRADIENTS),
    "estimators": (estimators_job, OF_ESTIMATORS),
    "steps": (steps_job, OF_STEPS),
    "vectors": (vectors_job, OF_VECTORS),
}
