"""Arms of one recipe at equal seconds: `python -m flowopd_lib.studies.compare STUDY.yaml --out FOLDER`.

A study (`arms`) is a file: a recipe, and by arm what is changed in it; ours are in papermill_runs/studies.
An iteration of every arm is measured once, in turns, in one process of one thread, and written down
(`pace.json`); `--seconds` become iterations there, so that a training that is cut off goes on exactly, on any
machine. Then the trainings, `--jobs` of one thread each beside one another, each judged on the same prompts
and noise. What is told of them is printed and kept as a table, `val.csv` or `test.csv`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ..evaluate import evaluate
from ..files import read_lines, write_json, write_whole
from ..fit import fit
from ..inputs import check_keys
from ..jobs.recipes import build
from ..objectives import Share
from ..policy import FlowPolicy
from ..rollout import Sampler
from ..train import TrainConfig
from ..worlds import load_world
from .arms import load_study, reached, scores_of, tasks_of, teachers_of, tell, world_of

SEED = 1 << 20  # of the samples judged
SHARE = 0.9  # of the experts' gains, kept in the mean over the judges: when a look first sees it is told


def our_update(policy: FlowPolicy, objective, optimizer: torch.optim.Optimizer) -> Callable[[int], None]:
    """An iteration of the student's training without its checkpoints and logs, to be timed."""

    def update(iteration: int) -> None:
        data = objective.collect(policy, "student", iteration, Share())
        for part in range(objective.updates):
            for loss in objective.losses(policy, "student", data, part):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return update


def pace(arms: Mapping[str, Mapping], turns: int = 3) -> dict[str, float]:
    """Seconds an iteration of each arm: the median of `turns` that all take in turn, after one to warm up."""
    policy, seconds = build(next(iter(arms.values())))[0], {arm: [] for arm in arms}
    optimizer = torch.optim.AdamW(policy.train_adapter("student"), 1e-5)
    iterations = {
        arm: our_update(policy, build(recipe, policy=policy)[1], optimizer) for arm, recipe in arms.items()
    }
    for turn in range(turns + 1):
        for arm, iteration in iterations.items():
            began = time.perf_counter()
            iteration(turn)
            seconds[arm].append(time.perf_counter() - began)
    return {arm: statistics.median(values[1:]) for arm, values in seconds.items()}


def pixels(images: torch.Tensor) -> np.ndarray:
    return images.flatten(1).numpy().astype(np.float16)


def judged(
    policy: FlowPolicy,
    models: Mapping,
    tasks: list[str],
    split: str,
    n: int,
    repeats: int = 1,
    into: Path | None = None,
) -> pd.DataFrame:
    """Scores and pictures of the tasks' first `n` prompts, `repeats` of each. The tasks are neighbours in
    the world's, so that a prompt has its noise whichever others are asked with it."""
    world = load_world()
    every = world.first_prompts(split, n)
    prompts = [p for p in every if p.task in tasks]
    seed, judges = SEED + every.index(prompts[0]), world.judges()
    how = {"repeats": repeats, "embed": pixels, "progress": False, "into": into}
    return evaluate(policy, prompts, judges, seed, Sampler(20), models, **how)


def references(folder: Path, recipe: Mapping, split: str, n: int, repeats: int) -> pd.DataFrame:
    """The base, the student before it is trained, and each task's own teachers."""
    policy, tables = build(recipe)[0], []
    for task in tasks_of(recipe):
        models = {"base": None, "start": "student", **{name: name for name in teachers_of(recipe, task)}}
        tables.append(judged(policy, models, [task], split, n, repeats, folder / f"{task}.parquet"))
    return pd.concat(tables, ignore_index=True)


def train_and_judge(
    arm: str, recipe: Mapping, folder: Path, split: str, n: int, repeats: int, looks: int
) -> None:
    """One training into a folder, or on from where it was cut off."""
    policy, objective, config = build(recipe)

    def look(adapter: str) -> pd.DataFrame:
        return scores_of(judged(policy, {adapter: adapter}, tasks_of(recipe), split, n))

    every = max(1, config.iterations // max(looks, 1))
    fit(policy, objective, folder, config, probe=look if looks else None, every=every, shown=False)
    judged(policy, {arm: "student"}, tasks_of(recipe), split, n, repeats, folder / f"{split}.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flowopd_lib.studies.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("study", type=Path, help="a YAML file")
    add("--out", type=Path, required=True, help="a folder; the same command goes on where it was cut off")
    add("--arms", nargs="+", help="some of the study's, the first of them to compare with (default: all)")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--seconds", type=float, default=240.0, help="of training, of one thread of this machine")
    add("--split", choices=("val", "test"), default="val")
    add("--n", type=int, default=40, help="prompts a task")
    add("--repeats", type=int, default=1, help="pictures a prompt, at the end")
    add("--looks", type=int, default=0, help="looks at the scores while it trains; 0: none")
    add("--jobs", type=int, default=os.cpu_count(), help="trainings beside one another, a thread each")
    args = parser.parse_args()
    least = {"seconds": 1e-9, "n": 12, "repeats": 1, "jobs": 1, "looks": 0}
    for name, value in [
        *((name, getattr(args, name)) for name in least),
        *(("seeds", s) for s in args.seeds),
    ]:
        if not value >= least.get(name, 0):
            parser.error(f"--{name} must be at least {least.get(name, 0):g}, not {value}")
    try:
        study = load_study(args.study)
        check_keys("the study", dict.fromkeys(args.arms or study), study)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    arms = {arm: study[arm] for arm in args.arms or study}
    torch.set_num_threads(1)
    file = args.out / "pace.json"
    paces = json.loads(file.read_text()) if file.is_file() else {}
    new = {arm: recipe for arm, recipe in study.items() if arm not in paces}
    if new:  # all arms of the study in one run, whichever are asked for
        paces |= pace(
            {arm: {**recipe, "train": {**recipe["train"], "iterations": 1}} for arm, recipe in new.items()}
        )
        write_json(file, paces)

    def training(arm: str, seed: int) -> dict:
        return {
            **arms[arm],
            "seed": seed,
            "train": {**arms[arm]["train"], "iterations": max(1, round(args.seconds / paces[arm]))},
        }

    folders = {
        (arm, seed): args.out / f"{arm} {args.seconds:g} s" / f"seed {seed}"
        for seed in args.seeds
        for arm in arms
    }
    with ProcessPoolExecutor(
        args.jobs, multiprocessing.get_context("spawn"), partial(torch.set_num_threads, 1)
    ) as pool:
        waiting = {
            run: pool.submit(
                train_and_judge, run[0], training(*run), folder, args.split, args.n, args.repeats, args.looks
            )
            for run, folder in folders.items()
        }
        reference = pool.submit(
            references,
            args.out / f"reference {args.split} {args.n}",
            next(iter(arms.values())),
            args.split,
            args.n,
            args.repeats,
        )
        for (arm, seed), job in waiting.items():
            job.result()
            print(f"{arm}, seed {seed}: done", flush=True)
        others = reference.result()
        told = tell(
            {run: pd.read_parquet(folder / f"{args.split}.parquet") for run, folder in folders.items()},
            arms,
            others,
        )
    logs = {run: read_lines(folder / "metrics.jsonl") for run, folder in folders.items()}
    teachers = any(" kept" in what for what in told["what"])
    limit = {arm: recipe["train"].get("clip_norm", TrainConfig.clip_norm) for arm, recipe in arms.items()}
    clipped = {run: (log["grad_norm"] > limit[run[0]]).mean() for run, log in logs.items()}
    for arm in arms:
        told.loc[told["arm"] == arm, "updates"] = len(logs[arm, args.seeds[0]])
        told.loc[told["arm"] == arm, "clipped"] = np.mean(
            [share for (a, _), share in clipped.items() if a == arm]
        )
        told.loc[told["arm"] == arm, "seconds an iteration"] = paces[arm]
        if args.looks and teachers:
            looked = others[others["repeat"] == 0]
            experts = world_of(arms[arm]).experts_of
            first = [
                reached(read_lines(folders[arm, s] / "probes.jsonl"), looked, SHARE, experts)
                for s in args.seeds
            ]
            told.loc[told["arm"] == arm, f"seconds to {SHARE:.0%}"] = np.mean(first) * paces[arm]
    cells = [f"{r.mean:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in told.itertuples()]
    table = (
        told.assign(cell=cells).pivot(index="arm", columns="what", values="cell").reindex(["start", *arms])
    )
    table = table[[c for c in told["what"].unique() if " minus " not in c or c.startswith("distance")]]
    columns = [c for c in told if c in ("updates", "clipped", f"seconds to {SHARE:.0%}")]
    print(table.join(told.groupby("arm")[columns].first().round(2)).to_string())
    told["by seed"] = [" ".join(f"{value:.4f}" for value in seeds) for seeds in told["by seed"]]
    write_whole(args.out / f"{args.split}.csv", told.round(4).to_csv(index=False))


if __name__ == "__main__":
    main()
