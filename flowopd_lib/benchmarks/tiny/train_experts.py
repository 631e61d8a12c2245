"""The experts of the small benchmark: `python -m flowopd_lib.benchmarks.tiny.train_experts --work
experts`.

Trains the recipes `papermill_runs/recipes/expert_*.yaml` one after the other, resumes where it was
cut off, and puts each adapter in half precision, with its training curve and a manifest, into
`assets/experts/`. The adapters after a quarter and a half of the iterations are shipped beside it
(`25`, `50`), and `curve.csv` has the rewards and gold rewards of all three on val prompts.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import shutil
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
import yaml
from safetensors.torch import load_file, save

from ...evaluate import evaluate
from ...files import RUNS, write_json, write_whole
from ...fit import weights_of
from ...inputs import nearest, read_yaml
from ...jobs.recipes import build
from ...precision import decide
from ...stats import summary
from ...train import train
from .. import load_benchmark
from . import ASSETS, BASE
from .build import LIBRARIES, say

RECIPES = RUNS / "recipes"
EXPERTS = ("geneval", "ocr", "pickscore", "deqa")


SHARES = (25, 50)  # per cent of the iterations after which an adapter is shipped too
VAL_SEED = 1 << 20


def recipe_of(name: str) -> Path:
    return RECIPES / f"expert_{name}.yaml"


def train_expert(name: str, work: Path, dtype: str | torch.dtype = "auto") -> None:
    """Train an expert in `work/expert_NAME`, from its last checkpoint if there is one, in the
    precision `work` was begun in."""
    folder = work / f"expert_{name}"
    policy, objective, config = build(read_yaml(recipe_of(name)), dtype=decide(work, dtype))
    at = {round(config.iterations * share / 100): share for share in SHARES}
    for info in train(policy, objective, folder, config):
        done = info.iteration + 1
        if info.metrics and done in at:
            with weights_of(policy, "student", info.average):
                policy.save_adapter("student", folder / str(at[done]))
        if info.metrics and done % 10 == 0:
            shown = " ".join(f"{key} {value:.4g}" for key, value in info.metrics.items())
            say(f"expert_{name} {done}/{config.iterations} {info.seconds:.0f} s {shown}")


def curve_of(folder: Path) -> pd.DataFrame:
    """Every reward and gold reward of the base and of the adapters of a training, on val prompts:
    task, reward, percent of the iterations, mean, low, high (95 %), n."""
    benchmark = load_benchmark()
    policy, models = benchmark.policy(), {0: None}
    for share in (*SHARES, 100):
        models[share] = f"at{share}"
        policy.load_adapter(models[share], folder / (str(share) if share < 100 else "adapter"))
    rewards = {**benchmark.rewards(), **benchmark.held_out_rewards()}
    prompts = [p for task in benchmark.own for p in benchmark.prompts(task, "val")]
    names = {str(k): adapter for k, adapter in models.items()}
    table = evaluate(policy, prompts, rewards, VAL_SEED, benchmark.sampler(16), names)
    found = summary(table, ["task", "model"], list(rewards)).dropna(subset="mean")
    return found.rename(columns={"model": "percent", "reward": "reward"})


def ship(name: str, work: Path, out: Path, seconds: float) -> None:
    """`out/name`: adapters in half precision, `metrics.jsonl`, `curve.csv`, `manifest.json`."""
    target, folder = out / name, work / f"expert_{name}"
    shutil.rmtree(target, ignore_errors=True)
    for share in (*SHARES, 100):
        source, place = (
            (folder / str(share), target / str(share))
            if share < 100
            else (folder / "adapter", target)
        )
        shutil.copytree(source, place, dirs_exist_ok=True)
        weights = place / "adapter_model.safetensors"
        write_whole(
            weights, save({k: w.half() for k, w in load_file(weights).items()}, {"format": "pt"})
        )
    shutil.copy(folder / "metrics.jsonl", target)
    curve_of(folder).round(4).to_csv(target / "curve.csv", index=False)
    files = {
        str(p.relative_to(target)): {
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
            "bytes": p.stat().st_size,
        }
        for p in sorted(target.rglob("*"))
        if p.is_file()
    }
    base = hashlib.sha256(
        (BASE / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    ).hexdigest()
    write_json(
        target / "manifest.json",
        {
            "command": (
                f"python -m flowopd_lib.benchmarks.tiny.train_experts --work experts --only {name}"
            ),
            "recipe": yaml.safe_load(recipe_of(name).read_text()),
            "seconds": round(seconds),
            "base_transformer_sha256": base,
            "date": datetime.date.today().isoformat(),
            "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
            "versions": {
                "python": platform.python_version(),
                **{n: version(n) for n in LIBRARIES + ("peft", "accelerate")},
            },
            "files": files,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument(
        "--out", type=Path, default=ASSETS / "experts", help="where the finished experts go"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=list(EXPERTS),
        metavar="EXPERT",
        help=f"some of {', '.join(EXPERTS)}",
    )
    args = parser.parse_args()
    for name in args.only:
        if name not in EXPERTS:
            parser.error(
                f"no expert {name!r}{nearest(name, list(EXPERTS))}; there are {', '.join(EXPERTS)}"
            )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    for name in args.only:
        times, began = args.work / f"{name}.json", time.time()
        seconds = json.loads(times.read_text()) if times.exists() else 0.0
        try:
            train_expert(name, args.work)
        finally:  # the time of a run that was stopped counts too
            seconds += time.time() - began
            times.parent.mkdir(parents=True, exist_ok=True)
            write_json(times, seconds)
        ship(name, args.work, args.out, seconds)
        say(f"{name}: done, {seconds:.0f} s in all")


if __name__ == "__main__":
    main()
