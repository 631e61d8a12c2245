"""Arms of one recipe at equal seconds: `python -m flowopd_lib.compare papermill_runs/studies/STUDY.yaml --out FOLDER`.

A study is a file: a recipe, and by arm what is changed in it. An iteration of every arm is measured once, in turns, in one process of one thread, and written
down (`pace.json`); `--seconds` become iterations there, so that a training that is cut off goes on exactly, on any machine. Then the trainings, `--jobs` of one
thread each beside one another, each judged on the same prompts and noise.

Where students have teachers there is a second measure, which tells two students apart on far fewer prompts than scores do: how far a picture lies from the
one that the prompt's teacher draws from the same noise, the root mean square over the pixels.
"""
from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from . import tinyworld
from .bench import our_update
from .evaluate import evaluate, gain_kept, home_scores, mean_interval, paired_differences, paper_average, summary
from .files import read_lines, write_json, write_table
from .inputs import check_keys, read_yaml
from .policy import FlowPolicy
from .prompts import FILES, TASKS
from .recipes import build
from .rollout import Sampler
from .runs import RUNS
from .train import fit

EXPERTS = {"GenEval": "geneval", "OCR": "ocr", "PickScore": "pickscore", "DeQA": "deqa"}      # the judge that each was trained for
SEED = 1 << 20          # of the samples judged


def load_study(path: Path) -> dict[str, dict]:
    """By arm, its recipe. Raises ValueError for what is none."""
    study = read_yaml(path)
    if not isinstance(study, dict) or not isinstance(study.get("arms"), dict) or len(study["arms"]) < 2:
        raise ValueError(f"{path} is no study: it has a recipe, the name of a file in papermill_runs/recipes, and at least two arms")
    check_keys("the study", study, ("recipe", "arms"))
    base, arms = read_yaml(RUNS / "recipes" / f"{study.get('recipe')}.yaml"), {}
    for arm, changes in study["arms"].items():
        check_keys(f"the arm {arm}", changes, list(base))
        arms[arm] = {**base, **{section: {**base[section], **values} for section, values in changes.items()}}
    return arms


def tasks_of(recipe: Mapping) -> list[str]:
    """Whose prompts students of it are judged on."""
    return [task for task in TASKS if FILES[task] in [FILES[t] for t in recipe["schedule"]["tasks"]]]


def teachers_of(recipe: Mapping, task: str) -> list[str]:
    return [name for t, name in recipe.get("opd", {}).get("teachers", {}).items() if FILES[t] == FILES[task]]


def pace(arms: Mapping[str, Mapping], turns: int = 3) -> dict[str, float]:
    """Seconds an iteration of each arm: the median of `turns` in which all take turns, after one to warm up."""
    policy, seconds = build(next(iter(arms.values())))[0], {arm: [] for arm in arms}
    optimizer = torch.optim.AdamW(policy.train_adapter("student"), 1e-5)
    iterations = {arm: our_update(policy, build(recipe, policy=policy)[1], optimizer) for arm, recipe in arms.items()}
    for turn in range(turns + 1):
        for arm, iteration in iterations.items():
            began = time.perf_counter()
            iteration(turn)
            seconds[arm].append(time.perf_counter() - began)
    return {arm: statistics.median(values[1:]) for arm, values in seconds.items()}


def pixels(images: torch.Tensor) -> np.ndarray:
    return images.flatten(1).numpy().astype(np.float16)


def judged(policy: FlowPolicy, models: Mapping[str, str | None], tasks: list[str], split: str, n: int, into: Path | None = None) -> pd.DataFrame:
    """Scores and pictures of the tasks' first `n` prompts, in neighbouring tasks' order: a prompt has its noise whichever tasks are asked with it."""
    every = tinyworld.first_prompts(split, n)
    prompts = [p for p in every if p.task in tasks]
    return evaluate(policy, prompts, tinyworld.judges(), SEED + every.index(prompts[0]), Sampler(20), models, embed=pixels, progress=False, into=into)


def references(folder: Path, recipe: Mapping, split: str, n: int) -> pd.DataFrame:
    """The base, the student before it is trained, and each task's own teachers."""
    policy, tables = build(recipe)[0], []
    for task in tasks_of(recipe):
        models = {"base": None, "start": "student", **{name: name for name in teachers_of(recipe, task)}}
        tables.append(judged(policy, models, [task], split, n, folder / f"{task}.parquet"))
    return pd.concat(tables, ignore_index=True)


def train_and_judge(arm: str, recipe: Mapping, folder: Path, split: str, n: int, looks: int) -> None:
    """One training into a folder, or on from where it was cut off."""
    torch.set_num_threads(1)
    policy, objective, config = build(recipe)

    def look(adapter: str) -> pd.DataFrame:
        return scores_of(judged(policy, {adapter: adapter}, tasks_of(recipe), split, n))
    fit(policy, objective, folder, config, probe=look if looks else None, every=max(1, config.iterations // max(looks, 1)), shown=False)
    judged(policy, {arm: "student"}, tasks_of(recipe), split, n, folder / f"{split}.parquet")


def scores_of(table: pd.DataFrame) -> pd.DataFrame:
    """Each score on its own prompts and, where all of them are there, the paper's Average: model, judge, mean, low, high, n."""
    own = home_scores(table)
    rows = summary(own, ["model"])
    return pd.concat([rows, paper_average(table)], ignore_index=True) if set(TASKS) <= set(table["task"]) else rows


def distances(table: pd.DataFrame, reference: pd.DataFrame, recipe: Mapping) -> pd.Series:
    """By task and prompt: how far the pictures lie from those of the prompt's teachers."""
    pictures = {(r.model, r.task, r.prompt): r.embedding.astype(np.float32) for r in reference.itertuples()}
    return pd.Series({(r.task, r.prompt): float(np.mean([np.sqrt(np.mean((r.embedding - pictures[name, r.task, r.prompt]) ** 2))
                                                         for name in teachers_of(recipe, r.task)])) for r in table.itertuples()})


def tell(tables: Mapping[tuple[str, int], pd.DataFrame], arms: Mapping[str, Mapping], reference: pd.DataFrame) -> pd.DataFrame:
    """What the trainings came to, in long form: arm, what, mean, low, high (95 % over prompts, of which several seeds are no more), n, and the mean of each seed.

    `what` is a score, its difference to the first arm's, the share of an expert's gain that is kept, or the distance to the teachers' pictures."""
    first, rows = next(iter(arms)), []
    every = pd.concat([table.assign(model=arm) for (arm, _), table in tables.items()], ignore_index=True)
    by_prompt = every.groupby(["model", "task", "prompt"], sort=False)[[j for j in EXPERTS if j in every]].mean().reset_index()
    each = {arm: [scores_of(t.assign(model=arm)).set_index("judge")["mean"] for (a, _), t in tables.items() if a == arm] for arm in arms}
    for r in scores_of(by_prompt).itertuples():
        rows.append({"arm": r.model, "what": r.judge, "mean": r.mean, "low": r.low, "high": r.high, "n": r.n, "by seed": [float(s[r.judge]) for s in each[r.model]]})
    for r in paired_differences(home_scores(by_prompt), first, by=()).itertuples():
        rows.append({"arm": r.model, "what": f"{r.judge} minus that of {first}", "mean": r.mean, "low": r.low, "high": r.high, "n": r.n,
                     "by seed": [float(a[r.judge] - b[r.judge]) for a, b in zip(each[r.model], each[first])]})
    taught = {judge: name for judge, name in EXPERTS.items() if name in set(reference["model"])}
    away = {}
    for arm, recipe in arms.items() if taught else ():
        of = [table for (a, _), table in tables.items() if a == arm]
        kept = [gain_kept(pd.concat([reference, t.assign(model=arm)]), arm, taught).set_index("judge")["mean"] for t in of]
        for r in gain_kept(pd.concat([reference, *(t.assign(model=arm) for t in of)]), arm, taught).itertuples():
            rows.append({"arm": arm, "what": f"{r.judge} kept", "mean": r.mean, "low": r.low, "high": r.high, "n": r.n, "by seed": [float(k[r.judge]) for k in kept]})
        apart = [distances(t, reference, recipe) for t in of]
        away[arm] = pd.concat(apart, axis=1).mean(axis=1)
        difference = away[arm] - away[first]
        for what, values, seeds in (("distance", away[arm], apart), (f"distance minus that of {first}", difference, [])):
            mean, low, high = mean_interval(values.to_numpy()) if arm != first or what == "distance" else (0., 0., 0.)
            rows.append({"arm": arm, "what": what, "mean": mean, "low": low, "high": high, "n": len(values), "by seed": [float(s.mean()) for s in seeds]})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flowopd_lib.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a YAML file")
    parser.add_argument("--out", type=Path, required=True, help="a folder; the same command goes on where it was cut off")
    parser.add_argument("--arms", nargs="+", help="some of the study's, the first of them to compare with (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--seconds", type=float, default=240., help="of training, of one thread of this machine")
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--n", type=int, default=40, help="prompts a task")
    parser.add_argument("--looks", type=int, default=0, help="looks at the scores while it trains; 0: none")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings beside one another, a thread each")
    args = parser.parse_args()
    if not args.seconds > 0 or args.n < 12 or args.jobs < 1 or args.looks < 0 or min(args.seeds) < 0:
        parser.error(f"--seconds and --jobs must be positive, --n at least 12, --looks and --seeds at least 0, not {args.seconds}, {args.jobs}, {args.n}, "
                     f"{args.looks} and {args.seeds}")
    try:
        study = load_study(args.study)
        check_keys("the study", dict.fromkeys(args.arms or study), study)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    arms = {arm: study[arm] for arm in args.arms or study}
    torch.set_num_threads(1)
    file = args.out / "pace.json"
    paces = json.loads(file.read_text()) if file.is_file() else {}
    if set(arms) - set(paces):
        paces = pace({arm: {**recipe, "train": {**recipe["train"], "iterations": 1}} for arm, recipe in arms.items()})
        write_json(file, paces)

    def training(arm: str, seed: int) -> dict:
        return {**arms[arm], "seed": seed, "train": {**arms[arm]["train"], "iterations": max(1, round(args.seconds / paces[arm]))}}
    folders = {(arm, seed): args.out / f"{arm} {args.seconds:g} s" / f"seed {seed}" for seed in args.seeds for arm in arms}
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), partial(torch.set_num_threads, 1)) as pool:
        waiting = {run: pool.submit(train_and_judge, run[0], training(*run), folder, args.split, args.n, args.looks) for run, folder in folders.items()}
        reference = pool.submit(references, args.out / f"reference {args.split} {args.n}", next(iter(arms.values())), args.split, args.n)
        for (arm, seed), job in waiting.items():
            job.result()
            print(f"{arm}, seed {seed}: done", flush=True)
        told = tell({run: pd.read_parquet(folder / f"{args.split}.parquet") for run, folder in folders.items()}, arms, reference.result())
    iterations = {arm: len(read_lines(folders[arm, args.seeds[0]] / "metrics.jsonl")) for arm in arms}
    clipped = {arm: float(np.mean([(read_lines(f / "metrics.jsonl")["grad_norm"] > study[arm]["train"].get("clip_norm", 1.)).mean()
                                   for (a, _), f in folders.items() if a == arm])) for arm in arms}
    cells = told.assign(cell=[f"{r.mean:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in told.itertuples()]).pivot(index="arm", columns="what", values="cell").reindex(arms)
    wanted = [c for c in (*told["what"].unique(),) if not c.endswith(f"minus that of {next(iter(arms))}") or c.startswith("distance")]
    print(cells[wanted].assign(iterations=iterations, clipped={arm: f"{share:.2f}" for arm, share in clipped.items()}).to_string())
    write_table(args.out / f"{args.split}.parquet", told)
    write_json(args.out / f"{args.split}.json", {"seconds": args.seconds, "pace": paces, "iterations": iterations, "updates clipped": clipped})


if __name__ == "__main__":
    main()
