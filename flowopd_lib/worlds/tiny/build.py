"""Build the small world's assets from nothing: `python -m flowopd_lib.worlds.tiny.build --work build`.

Stages: prompts, vae, base, guidance, pickscore, deqa, and the twins pickscore_gold and deqa_gold, these on a
GPU where there is one. Each checkpoints into `--work` and goes on from there when started again; a finished
stage is not run twice. After changing a recipe, start with an empty folder.
With `--start` autoencoder, base, DeQA and its twin are those of earlier assets, and PickScore goes on from
there; its twin is trained anew. The results and a manifest are written to `--out`.
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
from diffusers import AutoencoderKL

from ...files import write_json
from ...prompts import Prompt, write_prompts
from . import ASSETS
from .specs import PROMPT_TASKS, sample_specs
from .train_base import train_base
from .train_guidance import distil_guidance
from .train_judges import train_deqa, train_pickscore
from .train_vae import train_vae

SEED = 0
PROMPT_COUNTS = {"train": 1200, "val": 120, "test": 300, "ood": 240}
LIBRARIES = ("torch", "diffusers", "transformers", "rapidocr", "numpy", "pillow", "matplotlib")


def say(message: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {message}", flush=True)


def write_files(out: Path) -> None:
    """The prompts of all tasks and splits, under Flow-GRPO's names."""
    for task in PROMPT_TASKS:
        for split, n in PROMPT_COUNTS.items():
            specs = sample_specs(task, split, n, SEED)
            prompts = [Prompt(s.text, task, s.metadata if task == "geneval" else {}) for s in specs]
            write_prompts(
                out / task / (f"{split}_metadata.jsonl" if task == "geneval" else f"{split}.txt"), prompts
            )


def stages(work: Path, start: Path | None = None) -> dict:
    def vae(device: str = "cpu") -> AutoencoderKL:
        return AutoencoderKL.from_pretrained(work / "vae").eval().requires_grad_(False).to(device)

    def taken(place: str, name: str):
        return lambda: shutil.copytree(start / place, work / name, dirs_exist_ok=True)

    common, state = dict(seed=SEED, log=say), work / "state"
    device, twins = "cuda" if torch.cuda.is_available() else "cpu", state / "gold"
    twin = dict(seed=SEED + 1, twin=True, log=say)
    pickscore = start and start / "pickscore"
    found = {
        "prompts": lambda: write_files(work / "prompts"),
        "vae": lambda: train_vae(work / "vae", state, **common),
        "base": lambda: train_base(vae(), work / "unguided", state, **common),
        "guidance": lambda: distil_guidance(vae(), work / "unguided", work / "tiny-sd3", state, **common),
        "pickscore": lambda: train_pickscore(vae(), work / "pickscore", state, start=pickscore, **common),
        "deqa": lambda: train_deqa(vae(), work / "deqa", state, **common),
        "pickscore_gold": lambda: train_pickscore(vae(device), work / "pickscore_gold", twins, **twin),
        "deqa_gold": lambda: train_deqa(vae(device), work / "deqa_gold", twins, **twin),
    }
    if start:
        kept = {
            "vae": taken("tiny-sd3/vae", "vae"),
            "guidance": taken("tiny-sd3", "tiny-sd3"),
            "deqa": taken("deqa", "deqa"),
            "deqa_gold": taken("deqa_gold", "deqa_gold"),
        }
        return {name: kept.get(name, run) for name, run in found.items() if name != "base"}
    return found


def write_manifest(out: Path, seconds: dict[str, float]) -> None:
    files = {
        str(p.relative_to(out)): {
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
            "bytes": p.stat().st_size,
        }
        for p in sorted(out.rglob("*"))
        if p.is_file() and p != out / "manifest.json" and out / "experts" not in p.parents
    }
    record = {
        "command": "python -m flowopd_lib.worlds.tiny.build --work build",
        "seed": SEED,
        "date": datetime.date.today().isoformat(),
        "seconds": {k: round(v) for k, v in seconds.items()},
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "files": files,
    }
    write_json(out / "manifest.json", record)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints; about 1.5 GB")
    parser.add_argument("--out", type=Path, default=ASSETS, help="where the finished assets go")
    parser.add_argument("--only", nargs="+", help="run these stages only")
    parser.add_argument(
        "--start", type=Path, help="assets to go on from: all is kept but PickScore, trained on, and its twin"
    )
    args = parser.parse_args()
    if args.start and not (args.start / "tiny-sd3").is_dir():
        parser.error(f"--start {args.start} holds no tiny-sd3; name a folder of assets such as {ASSETS}")
    work, todo = args.work, stages(args.work, args.start)
    unknown = set(args.only or ()) - set(todo)
    if unknown:
        parser.error(f"no stage called {', '.join(sorted(unknown))}; there are {', '.join(todo)}")
    missing = [
        n
        for n in args.only or ()
        if n not in ("prompts", "vae") and not (work / "vae.done").exists() and "vae" not in args.only
    ]
    if missing:
        parser.error(
            f"{', '.join(missing)} needs the autoencoder, which {work} does not have; add vae to --only"
        )
    work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    times_file = work / "seconds.json"
    for name, run in todo.items():
        times = json.loads(times_file.read_text()) if times_file.exists() else {}
        done = work / f"{name}.done"
        if done.exists() or (args.only and name not in args.only):
            continue
        began = time.time()
        try:
            run()
            done.touch()
        finally:  # the time of a run that was stopped counts too
            times[name] = times.get(name, 0) + time.time() - began
            write_json(times_file, times)
        say(f"{name}: done, {times[name]:.0f} s in all")
    if all((work / f"{name}.done").exists() for name in todo):
        for name in ("prompts", "tiny-sd3", "pickscore", "deqa", "pickscore_gold", "deqa_gold"):
            shutil.rmtree(args.out / name, ignore_errors=True)
            shutil.copytree(work / name, args.out / name)
        write_manifest(args.out, json.loads(times_file.read_text()))
        say(f"assets written to {args.out}")


if __name__ == "__main__":
    main()
