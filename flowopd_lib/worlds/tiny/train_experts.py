"""The experts of the small world: `python -m flowopd_lib.worlds.tiny.train_experts --work experts`.

Trains the recipes `papermill_runs/recipes/expert_*.yaml` one after the other (`expert_NAME_2.yaml` from where
`expert_NAME.yaml` ends), goes on where it was cut off, and puts each adapter in half precision with its
training curve and a manifest into `assets/experts/`. With `--start` an expert of two recipes or more goes on
from an earlier one, such as that of another base, by the last of them.
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

import torch
import yaml
from safetensors.torch import load_file, save

from ...files import RUNS, write_json, write_whole
from ...inputs import nearest, read_yaml
from ...jobs.recipes import build
from ...precision import decide
from ...train import train
from . import ASSETS, BASE
from .build import LIBRARIES, say

RECIPES = RUNS / "recipes"
EXPERTS = ("geneval", "ocr", "pickscore", "deqa")


def recipes_of(name: str, start: Path | None = None) -> list[Path]:
    """`expert_{name}.yaml`, and what goes on from its adapter: `expert_{name}_2.yaml`, ...; the last of these
    alone, if it has an earlier expert to go on from."""
    found = sorted(RECIPES.glob(f"expert_{name}*.yaml"), key=lambda path: (len(path.stem), path.stem))
    return found[-1:] if start and len(found) > 1 else found


def train_expert(name: str, work: Path, dtype: str | torch.dtype = "auto", start: Path | None = None) -> None:
    """Train an expert's recipes in `work/{recipe}`, each from its last checkpoint if there is one, in the
    precision `work` was begun in. `start`: the folder of earlier experts."""
    dtype, recipes = decide(work, dtype), recipes_of(name, start)
    start = start / name if start and recipes != recipes_of(name) else None
    for path in recipes:
        recipe = read_yaml(path)
        if start:
            recipe["student"] = {"load": str(start)}
        policy, objective, config = build(recipe, dtype=dtype)
        for info in train(policy, objective, work / path.stem, config):
            if info.metrics and (info.iteration + 1) % 10 == 0:
                shown = " ".join(f"{key} {value:.4g}" for key, value in info.metrics.items())
                say(f"{path.stem} {info.iteration + 1}/{config.iterations} {info.seconds:.0f} s {shown}")
        start = work / path.stem / "adapter"


def ship(name: str, work: Path, out: Path, seconds: float, start: Path | None = None) -> None:
    """`out/name`: adapter in half precision, `metrics.jsonl`, `manifest.json`."""
    target, paths = out / name, recipes_of(name, start)
    before = start / name / "adapter_model.safetensors" if paths != recipes_of(name) else None
    started = hashlib.sha256(before.read_bytes()).hexdigest() if before else None
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(work / paths[-1].stem / "adapter", target)
    weights = target / "adapter_model.safetensors"
    write_whole(weights, save({key: w.half() for key, w in load_file(weights).items()}, {"format": "pt"}))
    lines = [
        json.loads(line)
        for path in paths
        for line in (work / path.stem / "metrics.jsonl").read_text().splitlines()
    ]
    write_whole(
        target / "metrics.jsonl",
        "".join(json.dumps(line | {"iteration": i}) + "\n" for i, line in enumerate(lines, 1)),
    )
    files = {
        p.name: {"sha256": hashlib.sha256(p.read_bytes()).hexdigest(), "bytes": p.stat().st_size}
        for p in sorted(target.iterdir())
    }
    base = hashlib.sha256(
        (BASE / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    ).hexdigest()
    write_json(
        target / "manifest.json",
        {
            "command": f"python -m flowopd_lib.worlds.tiny.train_experts --work experts --only {name}",
            "recipes": [yaml.safe_load(path.read_text()) for path in paths],
            **({"start_sha256": started} if started else {}),
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
    parser.add_argument("--out", type=Path, default=ASSETS / "experts", help="where the finished experts go")
    parser.add_argument(
        "--only", nargs="+", default=list(EXPERTS), metavar="EXPERT", help=f"some of {', '.join(EXPERTS)}"
    )
    parser.add_argument("--start", type=Path, help="a folder of earlier experts to go on from")
    args = parser.parse_args()
    for name in args.only:
        if name not in EXPERTS:
            parser.error(f"no expert {name!r}{nearest(name, list(EXPERTS))}; there are {', '.join(EXPERTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    for name in args.only:
        times, began = args.work / f"{name}.json", time.time()
        seconds = json.loads(times.read_text()) if times.exists() else 0.0
        try:
            train_expert(name, args.work, start=args.start)
        finally:  # the time of a run that was stopped counts too
            seconds += time.time() - began
            times.parent.mkdir(parents=True, exist_ok=True)
            write_json(times, seconds)
        ship(name, args.work, args.out, seconds, args.start)
        say(f"{name}: done, {seconds:.0f} s in all")


if __name__ == "__main__":
    main()
