"""The jobs: everything that takes long, as functions of a plain specification and a folder, that leave tables
there and go on where they were cut off. They run in a notebook's own process or in those of a launcher.

    train         a recipe (see `recipes`); beside it `probe`: {every, n, split, steps}, scores on the way,
                  and in that `until`: {patience, rise}, a `seesaw.Plateau` that ends a GRPO training
    evaluate      models: {label: adapter or null}, split and n (prompts a task), ... -> samples.parquet
    interference  gradients of every task, of the reward or of distillation, and Taylor's check -> *.parquet
    estimators    the readings of the OPD loss compared -> estimators.parquet
    steps         what each step of a walk is worth -> steps.parquet
    vectors       inner products of what trainings changed -> vectors.parquet

`adapters` says what those that are named and are not the benchmark's experts come from: see `site.SOURCES`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import yaml
from pydantic import Field

from ..benchmarks import Benchmark
from ..evaluate import evaluate, probe_of
from ..files import read_lines, write_whole
from ..fit import fit
from ..inputs import SEED, Count, NotNegative, check_mapping, nearest
from ..objectives import Share
from ..precision import decide
from ..studies.jobs import JOBS as STUDIES
from ..studies.seesaw import Plateau, rewards_of
from ..train import StepInfo
from .kept import fetch, fetched, forget, go_on_from, record_of, tell
from .recipes import KEYS, build
from .site import Site

SOME = {"benchmark": str, "adapters": dict[str, Any], "seed": SEED}
SPLIT = Literal["train", "val", "test", "ood"]
PROBE = {"every": Count, "n": Count, "split": SPLIT, "steps": Count, "seed": SEED, "until": dict}
UNTIL = {"patience": Count, "rise": NotNegative}
PROBE_SEED = 1 << 20
MEET = 0.05  # seconds between two looks for the others


def train_job(
    spec: Mapping,
    folder: Path,
    site: Site,
    told: Callable[[StepInfo], bool | None] | None = None,
    during: Callable | None = None,
    shown: bool = True,
) -> None:
    """The adapter `name` (student) trained by a recipe into a folder, or put there as `kept` has it. `after`:
    the folder of the same training for fewer iterations, from whose state it goes on."""
    recipe = {k: v for k, v in spec.items() if k in KEYS}
    asked, probe = spec.get("probe"), None
    if asked is not None:  # before the model is loaded
        check_mapping("probe", asked, PROBE, "probe.")
    record = record_of(spec, site.benchmark, site.dtype)
    if site.main:
        fetch(record, folder)
        if "after" in spec and not fetched(record, folder):
            go_on_from(Path(spec["after"]), folder)
    site.share.wait()
    if fetched(record, folder):
        return
    rule = rule_of(spec, site.benchmark) if asked else None
    policy, objective, config = build(recipe, site=site, name=spec.get("name", "student"))
    if asked is not None:
        benchmark = site.benchmark
        prompts = benchmark.first_prompts(asked.get("split", "val"), asked.get("n", 24))
        sampler = benchmark.sampler(asked.get("steps", benchmark.evaluation.steps))
        rewards, seed = benchmark.rewards(site.device), asked.get("seed", PROBE_SEED)
        probe = probe_of(
            policy, prompts, rewards, sampler, seed, benchmark.home, folder, site.share
        )

    def stands(upto: int) -> bool:
        """Whether the looks up to an iteration end it."""
        site.share.wait()
        looks = read_lines(folder / "probes.jsonl")
        return rule(looks[looks["iteration"] <= upto])

    def heard(info: StepInfo) -> bool:
        # only now: a recipe that the folder's training refused must not take the place of its own
        if site.main and not heard.kept:
            write_whole(folder / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
            decide(folder, policy.dtype, policy.device)
            heard.kept = True
        done = info.iteration + 1
        if rule and done % asked["every"] == 0 and done < heard.config.iterations and stands(done):
            heard.config = replace(config, iterations=done)
            return True
        heard.stopped = bool(told and told(info))
        return heard.stopped

    heard.kept, heard.stopped, heard.config = False, False, config
    how = {"accelerator": site.accelerator, "told": heard, "shown": shown}
    every = asked.get("every", 0) if asked else 0
    start = {"during": lambda updates: during(updates, site, objective)} if during else {}
    before = sorted(set(read_lines(folder / "probes.jsonl").get("iteration", []))) if rule else []
    heard.config = next(
        (replace(config, iterations=int(k)) for k in before if k and stands(k)), config
    )
    if site.main:
        forget(folder)
    for _ in range(2):  # the second time, where the rule has ended it, writes what it came to
        ends = heard.config
        fit(
            policy,
            objective,
            folder,
            ends,
            spec.get("name", "student"),
            probe,
            every,
            **how,
            **start,
        )
        if ends == heard.config:
            break
    if site.main and not heard.stopped:
        tell(record, folder)


def rule_of(spec: Mapping, benchmark: Benchmark) -> Callable[[pd.DataFrame], bool] | None:
    """`probe.until` as what is asked of the looks so far. Raises ValueError for a rule that never ends it."""
    until, train = spec["probe"].get("until"), spec.get("train", {})
    if until is None:
        return None
    check_mapping("probe.until", until, UNTIL, "probe.until.")
    asked = spec["probe"]
    if (
        not asked.get("every")
        or asked.get("n", 2) < 2
        or "grpo" not in spec
        or train.get("cooldown")
    ):
        raise ValueError(
            "probe.until ends a GRPO training between two looks: it needs probe.every, probe.n of at least "
            "2, and no cooldown"
        )
    rule = Plateau(asked["every"], train.get("iterations", 0), **until)
    rewards = rewards_of(spec, benchmark)
    return lambda looks: rule.reached(looks, rewards, benchmark.home)


EVALUATE = {
    **SOME,
    "models": Annotated[dict[str, str | None], Field(min_length=1)],
    "split": SPLIT,
    "n": Count,
    "tasks": list[str],
    "rewards": list[str],
    "steps": Count,
    "repeats": Count,
    "embed": bool,
    "pictures": bool,
    "file": str,
    "batch": Count,
    "share": list[int],
}


def evaluate_job(spec: Mapping, folder: Path, site: Site) -> None:
    """`file` (samples.parquet): the first `n` prompts of each task of a split, or of some `tasks`, sampled
    under every model and scored. `share`: [r, n], the part of process r of n that know of one another by
    files alone (see `share_by_files`)."""
    benchmark, policy = site.benchmark, site.policy
    site.adapters([a for a in spec["models"].values() if a], spec.get("adapters", {}))
    prompts = benchmark.first_prompts(spec.get("split", "test"), spec.get("n", 60))
    prompts = [p for p in prompts if p.task in spec.get("tasks", benchmark.own)]
    device = site.device
    if "rewards" in spec:
        rewards = benchmark.rewards_named(spec["rewards"], device)
    else:
        rewards = benchmark.rewards(device) | benchmark.held_out_rewards(device)
    evaluate(
        policy,
        prompts,
        rewards,
        spec.get("seed", 0),
        benchmark.sampler(spec["steps"]) if "steps" in spec else benchmark.evaluation,
        spec["models"],
        spec.get("repeats", 1),
        benchmark.embedder(site.device) if spec.get("embed") else None,
        spec.get("batch", 64),
        pictures=folder / "pictures" if spec.get("pictures") else None,
        into=folder / spec.get("file", "samples.parquet"),
        guidance=benchmark.guidance,
        share=share_by_files(*spec["share"], folder / shared_place(spec))
        if "share" in spec
        else site.share,
    )


def shared_place(spec: Mapping) -> str:
    """Where, in the job's folder, the processes that share an evaluation meet; empty at their start."""
    return f".{spec.get('file', 'samples.parquet')}.share"


def share_by_files(rank: int, processes: int, place: Path) -> Share:
    """The part of process `rank` of `processes` that meet in a folder, `place`: each leaves a file there at every
    wait, and goes on when all have."""
    passed = itertools.count()

    def wait() -> None:
        number = next(passed)
        write_whole(place / f"{number}_{rank}", "")
        while len(list(place.glob(f"{number}_*"))) < processes:
            time.sleep(MEET)

    return Share(rank, processes, wait=wait)


def check_spec(spec: Any) -> str:
    """The job's name. Raises ValueError for a specification that is none."""
    if not isinstance(spec, Mapping):
        raise ValueError(f"a job is a mapping of names to values, not {spec!r}")
    job = spec.get("job", "train")
    if job not in JOBS:
        raise ValueError(
            f"there is no job {job!r}{nearest(str(job), JOBS)}; there are {', '.join(JOBS)}"
        )
    check_mapping(f"the {job} job", spec, {"job": str, **JOBS[job][1]})
    return job


def run_job(spec: Mapping, folder: str | Path, site: Site, **how) -> None:
    """Do what a specification says, into a folder."""
    job = check_spec(spec)
    JOBS[job][0](spec, Path(folder), site, **how)


JOBS: dict[str, tuple[Callable, dict]] = {
    "train": (train_job, {**KEYS, "name": str, "probe": dict, "after": str}),
    "evaluate": (evaluate_job, EVALUATE),
    **STUDIES,
}
