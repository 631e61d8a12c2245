"""The experts of the small benchmark: `python -m flowopd_lib experts --work experts`."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save

from ...config import choose, read_yaml, validate
from ...evaluate import evaluate
from ...files import RUNS, write_json, write_whole
from ...lab.recipe import Recipe, build
from ...lab.workspace import Workspace
from ...precision import decide
from ...stats import GOLD, rewards_in, summary
from ...train import METRICS, train
from .. import load_benchmark
from . import ASSETS, BASE
from .build import count_seconds, describe_files, describe_machine, read_seconds, say

EXPERTS = ("geneval", "ocr", "pickscore", "deqa")
PERCENTS = (25, 50)  # of the iterations after which an adapter is shipped too
VAL_SEED = 1 << 20


def recipe_file(name: str) -> Path:
    return RUNS / "recipes" / f"expert_{name}.yaml"


def train_expert(name: str, work: Path, dtype: str | torch.dtype = "auto") -> None:
    """Train an expert in `work/expert_NAME`, from its last checkpoint if there is one, in the
    precision in which it began."""
    folder = work / f"expert_{name}"
    workspace = Workspace(load_benchmark(), dtype=decide(folder, dtype))
    recipe = validate(Recipe, read_yaml(recipe_file(name)), str(recipe_file(name)))
    objective, config = build(recipe, workspace)
    at = {round(config.iterations * percent / 100): percent for percent in PERCENTS}
    for info in train(workspace.policy, objective, folder, config):
        done = info.iteration + 1
        if info.metrics and done in at:
            with workspace.policy.adapter_weights("student", info.average):
                workspace.policy.save_adapter("student", folder / str(at[done]))
        if info.metrics and done % 10 == 0:
            shown = " ".join(f"{key} {value:.4g}" for key, value in info.metrics.items())
            say(f"expert_{name} {done}/{config.iterations} {info.seconds:.0f} s {shown}")


def measure_curve(folder: Path) -> pd.DataFrame:
    """Every reward and gold reward of the base and of the adapters of a training, on val prompts:
    task, percent of the iterations, reward, mean, low, high (95 %), n."""
    benchmark = load_benchmark()
    policy, models = benchmark.policy(), {"0": None}
    for percent in (*PERCENTS, 100):
        models[str(percent)] = f"at{percent}"
        source = folder / (str(percent) if percent < 100 else "adapter")
        policy.load_adapter(f"at{percent}", source)
    prompts, sampler = benchmark.first_prompts("val", 120), benchmark.sampler(16)
    table = evaluate(policy, prompts, benchmark.all_rewards(), VAL_SEED, sampler, models)
    golds = [reward + GOLD for reward in rewards_in(table) if reward + GOLD in table]
    scores = summary(table, ["task", "model"], [*rewards_in(table), *golds])
    return scores.rename(columns={"model": "percent"})


def ship(name: str, work: Path, out: Path) -> None:
    """`out/name`: adapters in half precision, `metrics.jsonl`, `curve.csv`, `manifest.json`."""
    target, folder = out / name, work / f"expert_{name}"
    shutil.rmtree(target, ignore_errors=True)
    for percent in (100, *PERCENTS):
        source = folder / (str(percent) if percent < 100 else "adapter")
        into = target / str(percent) if percent < 100 else target
        shutil.copytree(source, into)
        weights = into / "adapter_model.safetensors"
        halves = {key: weight.half() for key, weight in load_file(weights).items()}
        write_whole(weights, save(halves, {"format": "pt"}))
    shutil.copy(folder / METRICS, target)
    measure_curve(folder).round(4).to_csv(target / "curve.csv", index=False)
    base = BASE / "transformer" / "diffusion_pytorch_model.safetensors"
    record = {
        "command": f"python -m flowopd_lib experts --work experts --only {name}",
        "recipe": read_yaml(recipe_file(name)),
        "seconds": round(read_seconds(work / f"{name}.seconds.json")),
        "base_transformer_sha256": hashlib.sha256(base.read_bytes()).hexdigest(),
    }
    write_json(
        target / "manifest.json", {**record, **describe_machine(), "files": describe_files(target)}
    )


def train_experts(work: Path, only: Sequence[str] = (), out: Path = ASSETS / "experts") -> None:
    """Train the recipes `papermill_runs/recipes/expert_*.yaml` one after the other in `work`, with
    checkpoints from which they resume, and ship each: the adapter in half precision with those
    after a quarter and a half of the iterations (`25`, `50`), its training curve, the rewards and
    gold rewards of all of them on val prompts, and a manifest."""
    for name in only:
        choose("expert", name, EXPERTS)
    work.mkdir(parents=True, exist_ok=True)
    for name in only or EXPERTS:
        with count_seconds(work / f"{name}.seconds.json"):
            train_expert(name, work)
        ship(name, work, out)
        say(f"{name}: finished, {read_seconds(work / f'{name}.seconds.json'):.0f} s")
