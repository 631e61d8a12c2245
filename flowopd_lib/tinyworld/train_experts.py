"""The experts of the small world: `python -m flowopd_lib.tinyworld.train_experts --work experts`.

Trains the recipes `papermill_runs/recipes/expert_*.yaml` one after the other, goes on where it was cut off, and puts each adapter in half
precision with its training curve and a manifest into `assets/experts/`.
"""
from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from ..recipes import build
from ..runs import RUNS, nearest, write_json
from ..train import train
from . import ASSETS, BASE
from .build import LIBRARIES, say

RECIPES = RUNS / "recipes"
EXPERTS = ("geneval", "ocr", "pickscore", "deqa")


def train_expert(name: str, work: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Train `expert_{name}.yaml` in `work/name`, from its last checkpoint if there is one."""
    policy, objective, config = build(yaml.safe_load((RECIPES / f"expert_{name}.yaml").read_text()), dtype=dtype)
    for info in train(policy, objective, work / name, config):
        if info.metrics and (info.iteration + 1) % 10 == 0:
            shown = " ".join(f"{key} {value:.4g}" for key, value in info.metrics.items())
            say(f"{name} {info.iteration + 1}/{config.iterations} {info.seconds:.0f} s {shown}")


def ship(name: str, work: Path, out: Path, seconds: float) -> None:
    """`out/name`: adapter in half precision, `metrics.jsonl`, `manifest.json`."""
    target = out / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(work / name / "adapter", target)
    weights = target / "adapter_model.safetensors"
    save_file({key: w.half() for key, w in load_file(weights).items()}, weights)
    shutil.copy(work / name / "metrics.jsonl", target)
    files = {p.name: {"sha256": hashlib.sha256(p.read_bytes()).hexdigest(), "bytes": p.stat().st_size} for p in sorted(target.iterdir())}
    base = hashlib.sha256((BASE / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    write_json(target / "manifest.json", {
        "command": f"python -m flowopd_lib.tinyworld.train_experts --work experts --only {name}",
        "recipe": yaml.safe_load((RECIPES / f"expert_{name}.yaml").read_text()), "seconds": round(seconds), "base_transformer_sha256": base,
        "date": datetime.date.today().isoformat(), "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), **{n: version(n) for n in LIBRARIES + ("peft", "accelerate")}}, "files": files})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--out", type=Path, default=ASSETS / "experts", help="where the finished experts go")
    parser.add_argument("--only", nargs="+", default=list(EXPERTS), metavar="EXPERT", help=f"some of {', '.join(EXPERTS)}")
    args = parser.parse_args()
    for name in args.only:
        if name not in EXPERTS:
            parser.error(f"no expert {name!r}{nearest(name, list(EXPERTS))}; there are {', '.join(EXPERTS)}")
    torch.set_num_threads(os.cpu_count())
    for name in args.only:
        times, began = args.work / name / "seconds.json", time.time()
        seconds = json.loads(times.read_text()) if times.exists() else 0.
        try:
            train_expert(name, args.work)
        finally:        # the time of a run that was stopped counts too
            seconds += time.time() - began
            times.parent.mkdir(parents=True, exist_ok=True)
            write_json(times, seconds)
        ship(name, args.work, args.out, seconds)
        say(f"{name}: done, {seconds:.0f} s in all")


if __name__ == "__main__":
    main()
