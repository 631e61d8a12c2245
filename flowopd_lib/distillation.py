"""Which states are worth learning from? `python -m flowopd_lib.distillation --out FOLDER`.

Students of one recipe (`papermill_runs/recipes/student_opd.yaml`) that differ in what they learn from: which steps of a walk, how they are weighed, SDE or ODE
walks, images an update, rate. All train for equal seconds: an iteration of every arm is measured once, in turns, in one process of one thread, written to
`pace.json`, and `--seconds` become iterations there. Then the trainings, `--jobs` of one thread each beside one another.

Two measures, on the same prompts and noise: the paper's Average, and how far a picture lies from the one that the prompt's teacher draws from the same noise
(root mean square over the pixels), which needs far fewer prompts to tell two students apart. An arm is a name in CHANGES or several joined by `+`.
"""
from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from . import tinyworld
from .evaluate import evaluate, gain_kept, mean_interval, model_scores
from .files import read_lines, write_json, write_table
from .inputs import read_yaml
from .objectives import Share
from .policy import FlowPolicy
from .prompts import TASKS
from .recipes import build
from .rollout import Sampler
from .runs import RUNS
from .train import fit

RECIPE = RUNS / "recipes" / "student_opd.yaml"
TODAY = "all steps"         # what the students of the reference run were trained with
CHANGES = {
    TODAY: {"opd": {"steps": None, "weighting": "kl"}, "train": {"lr": 1e-3}},
    **{f"{k} of a walk": {"opd": {"steps": k}} for k in (1, 2, 3)},
    **{f"{k} of an iteration": {"opd": {"steps": k, "draw": "iteration"}} for k in (1, 3)},
    "early five": {"opd": {"steps": [0, 1, 2, 3, 4]}}, "late four": {"opd": {"steps": [5, 6, 7, 8]}},
    **{name: {"opd": {"weighting": name}} for name in ("uniform_v", "x0", "ode")},
    "clamped": {"opd": {"max_weight": .035}},
    "ode walks": {"sampler": {"kind": "ode"}},
    **{f"{n} images": {"schedule": {"prompts_per_batch": n}} for n in (12, 48)},
    **{f"rate {rate}": {"train": {"lr": rate}} for rate in (5e-4, 2e-3, 4e-3)},
}
# One factor at a time, about three steps of a walk.
FACTORS = (TODAY, "1 of a walk", "2 of a walk", "3 of a walk", "1 of an iteration", "3 of an iteration", "early five", "late four",
           *(f"3 of a walk+{change}" for change in ("uniform_v", "x0", "ode", "clamped", "ode walks", "12 images", "48 images", "rate 0.0005", "rate 0.002")))
TEACHERS = {"geneval": ("geneval",), "ocr": ("ocr",), "pickscore": ("pickscore", "deqa")}      # of a task's prompts
EXPERTS = {"GenEval": "geneval", "OCR": "ocr", "PickScore": "pickscore", "DeQA": "deqa"}


def recipe_of(arm: str, seed: int = 0, iterations: int = 1) -> dict:
    """The recipe with an arm's changes. Raises ValueError for a name that is none."""
    recipe = {**read_yaml(RECIPE), "seed": seed}
    for change in (TODAY, *arm.split("+")):
        if change not in CHANGES:
            raise ValueError(f"unknown arm {change!r}: an arm is one of {', '.join(CHANGES)}, or several joined by +")
        for section, values in CHANGES[change].items():
            recipe[section] = {**recipe[section], **values}
    recipe["train"] = {**recipe["train"], "iterations": iterations}
    return recipe


def pace(arms: Sequence[str], turns: int = 3) -> dict[str, float]:
    """Seconds an iteration of each arm, the median of `turns` in which all arms take turns, after one to warm up."""
    ready, seconds = {}, {arm: [] for arm in arms}
    policy, _, _ = build(recipe_of(TODAY))
    optimizer = torch.optim.AdamW(policy.train_adapter("student"), 1e-5)
    for arm in arms:
        ready[arm] = build(recipe_of(arm), policy=policy)[1]
    for turn in range(turns + 1):
        for arm, objective in ready.items():
            began = time.perf_counter()
            data = objective.collect(policy, "student", turn, Share())
            for loss in objective.losses(policy, "student", data, 0):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[arm].append(time.perf_counter() - began)
    return {arm: statistics.median(values[1:]) for arm, values in seconds.items()}


def pixels(images: torch.Tensor) -> np.ndarray:
    return images.flatten(1).numpy().astype(np.float16)


def judged(policy: FlowPolicy, models: Mapping[str, str | None], tasks: Sequence[str], split: str, n: int, into: Path) -> pd.DataFrame:
    prompts = [p for p in tinyworld.first_prompts(split, n) if p.task in tasks]
    return evaluate(policy, prompts, tinyworld.judges(), 1 << 20, Sampler(20), models, embed=pixels, progress=False, into=into)


def references(folder: Path, split: str, n: int) -> pd.DataFrame:
    """The base, the merged experts, and each task's own teachers."""
    policy, tables = tinyworld.merged_policy(), []
    for task, teachers in TEACHERS.items():
        models = {"base": None, "merged": "merged", **{name: name for name in teachers}}
        tables.append(judged(policy, models, [task], split, n, folder / f"{task}.parquet"))
    return pd.concat(tables, ignore_index=True)


def distances(table: pd.DataFrame, reference: pd.DataFrame) -> pd.Series:
    """By task and prompt: how far a model's pictures lie from those of the prompt's teachers."""
    told, pictures = {}, {(r.model, r.task, r.prompt): r.embedding for r in reference.itertuples()}
    for r in table.itertuples():
        away = [np.sqrt(np.mean((r.embedding.astype(np.float32) - pictures[teacher, r.task, r.prompt].astype(np.float32)) ** 2)) for teacher in TEACHERS[r.task]]
        told[r.task, r.prompt] = float(np.mean(away))
    return pd.Series(told)


def student(arm: str, seed: int, iterations: int, folder: Path, split: str, n: int, threads: int) -> None:
    """Train and judge one student into a folder, or go on there."""
    torch.set_num_threads(threads)
    policy, objective, config = build(recipe_of(arm, seed, iterations))
    fit(policy, objective, folder, config, shown=False)
    judged(policy, {arm: "student"}, TASKS, split, n, folder / f"{split}.parquet")


def tell(runs: Mapping[tuple[str, int], Path], paces: Mapping[str, float], reference: pd.DataFrame, split: str) -> pd.DataFrame:
    """A row an arm: its scores (several seeds averaged prompt by prompt), the picture distance, shares of the experts' gains, and its difference to the first arm."""
    arms = list(dict.fromkeys(arm for arm, _ in runs))
    tables = {arm: [pd.read_parquet(folder / f"{split}.parquet") for (a, _), folder in runs.items() if a == arm] for arm in arms}
    away = {arm: pd.concat([distances(t, reference) for t in of], axis=1).mean(1) for arm, of in tables.items()}
    average = {arm: [model_scores(t).set_index("judge").loc["Average", "mean"] for t in of] for arm, of in tables.items()}
    rows = []
    for arm, of in tables.items():
        logs = [read_lines(folder / "metrics.jsonl") for (a, _), folder in runs.items() if a == arm]
        scores = model_scores(pd.concat(of)).set_index("judge")
        kept = gain_kept(pd.concat([reference, *of]), arm, EXPERTS).set_index("judge")
        near, low, high = mean_interval((away[arm] - away[arms[0]]).to_numpy()) if arm != arms[0] else (0., 0., 0.)
        rows.append({"arm": arm, "seeds": len(of), "iterations": len(logs[0]), "seconds an iteration": paces[arm],
                     **{judge: scores.loc[judge, "mean"] for judge in (*EXPERTS, "Average")}, "Average low": scores.loc["Average", "low"],
                     "Average high": scores.loc["Average", "high"], "Average by seed": average[arm], "distance": away[arm].mean(), "nearer than the first": -near,
                     "nearer low": -high, "nearer high": -low, **{f"{judge} kept": kept.loc[judge, "mean"] for judge in EXPERTS},
                     "clipped": float(np.mean([(log["grad_norm"] > 1).mean() for log in logs]))})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flowopd_lib.distillation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder; the same command goes on where it was cut off")
    parser.add_argument("--arms", nargs="+", default=list(FACTORS), help="default: one factor at a time")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--seconds", type=float, default=150., help="of training, of one thread of this machine")
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--n", type=int, default=40, help="prompts a task")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings beside one another, a thread each")
    args = parser.parse_args()
    if args.seconds <= 0 or args.n < 12 or args.jobs < 1:
        parser.error(f"--seconds must be positive, --n at least 12 and --jobs at least 1, not {args.seconds}, {args.n} and {args.jobs}")
    try:
        for arm in args.arms:
            recipe_of(arm)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    file = args.out / "pace.json"
    paces = json.loads(file.read_text()) if file.is_file() else {}
    if set(args.arms) - set(paces):
        paces |= pace(list(dict.fromkeys([TODAY, *args.arms])))
        write_json(file, paces)
    runs = {(arm, seed): args.out / f"{arm} {args.seconds:g} s" / f"seed {seed}" for seed in args.seeds for arm in args.arms}
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = {run: pool.submit(student, *run, max(1, round(args.seconds / paces[run[0]])), folder, args.split, args.n, 1) for run, folder in runs.items()}
        reference = pool.submit(references, args.out / f"reference {args.split} {args.n}", args.split, args.n)
        for (arm, seed), job in waiting.items():
            job.result()
            print(f"{arm}, seed {seed}: done", flush=True)
        table = tell(runs, paces, reference.result(), args.split)
    print(table.drop(columns="Average by seed").round(3).to_string(index=False))
    write_table(args.out / f"{args.split}.parquet", table)


if __name__ == "__main__":
    main()
