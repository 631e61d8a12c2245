"""Build the small benchmark's assets from nothing: `python -m flowopd_lib.benchmarks.tiny.build
--work build`.

Steps: prompts, vae, text (encoders), base (to capability), misalign, pickscore, deqa, and the gold
rewards pickscore_gold and deqa_gold, these on a GPU where there is one. Each saves checkpoints in
`--work` and resumes from there; a finished step is not run again. The results and a manifest are
written to `--out`.
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

from ...data import Prompt, write_prompts
from ...files import write_json
from . import ASSETS
from .misalign import misalign
from .specs import PROMPT_TASKS, sample_specs
from .train_base import train_base
from .train_rewards import train_deqa, train_pickscore
from .train_text import load_text, pretrain_text
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
            prompts = [
                Prompt(s.text, task, s.metadata if task == ("geneval") else {}) for s in specs
            ]
            write_prompts(
                out / task / (f"{split}_metadata.jsonl" if task == "geneval" else f"{split}.txt"),
                prompts,
            )


# what each step is made from, and the folders it makes
INPUTS = {
    "prompts": (),
    "vae": (),
    "text": (),
    "base": ("vae", "text"),
    "misalign": ("vae", "text", "base"),
    "pickscore": ("vae",),
    "deqa": ("vae",),
    "pickscore_gold": ("vae",),
    "deqa_gold": ("vae",),
}
SHIPPED = ("prompts", "tiny-sd3", "ability", "pickscore", "deqa", "pickscore_gold", "deqa_gold")


def steps(work: Path) -> dict:
    def vae(device: str = "cpu") -> AutoencoderKL:
        return AutoencoderKL.from_pretrained(work / "vae").eval().requires_grad_(False).to(device)

    def text() -> dict:
        return load_text(work / "text")

    common, state = dict(seed=SEED, log=say), work / "state"
    device, golds = "cuda" if torch.cuda.is_available() else "cpu", state / "gold"
    gold = dict(seed=SEED + 1, gold=True, log=say)
    return {
        "prompts": lambda: write_files(work / "prompts"),
        "vae": lambda: train_vae(work / "vae", state, **common),
        "text": lambda: pretrain_text(work / "text", **common),
        "base": lambda: train_base(vae(), text(), work / "base", state, **common),
        "misalign": lambda: misalign(
            vae(), text(), work / "base", work / "tiny-sd3", state, log=say
        ),
        "pickscore": lambda: train_pickscore(vae(), work / "pickscore", state, **common),
        "deqa": lambda: train_deqa(vae(), work / "deqa", state, **common),
        "pickscore_gold": lambda: train_pickscore(
            vae(device), work / "pickscore_gold", golds, **gold
        ),
        "deqa_gold": lambda: train_deqa(vae(device), work / "deqa_gold", golds, **gold),
    }


def check_inputs(work: Path, name: str) -> None:
    """Raises ValueError if a step was begun from other inputs than those there are now."""
    inputs = {i: folder_hash(work / i) for i in INPUTS[name]}
    record = work / f"{name}.inputs.json"
    for i, found in json.loads(record.read_text()).items() if record.exists() else ():
        if inputs[i] != found:
            raise ValueError(
                f"{name} was begun from another {i} than {work / i} now is; delete {record} and "
                f"what {name} left in {work / 'state'}, or put {i} back"
            )
    write_json(record, inputs)


def folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)}".encode() + path.read_bytes())
    return digest.hexdigest()


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
        "command": "python -m flowopd_lib.benchmarks.tiny.build --work build",
        "seed": SEED,
        "date": datetime.date.today().isoformat(),
        "seconds": {k: round(v) for k, v in seconds.items()},
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in LIBRARIES},
        },
        "files": files,
    }
    write_json(out / "manifest.json", record)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for checkpoints; about 1.5 GB"
    )
    parser.add_argument("--out", type=Path, default=ASSETS, help="where the finished assets go")
    parser.add_argument("--only", nargs="+", help="run these steps only")
    args = parser.parse_args()
    work, todo = args.work, steps(args.work)
    unknown = set(args.only or ()) - set(todo)
    if unknown:
        parser.error(f"no step called {', '.join(sorted(unknown))}; there are {', '.join(todo)}")
    chosen = [name for name in todo if not args.only or name in args.only]
    for name in chosen:
        missing = [
            i for i in INPUTS[name] if i not in chosen and not (work / (f"{i}.done")).exists()
        ]
        if missing:
            parser.error(
                f"{name} needs {missing[0]}, which {work} does not have; add {missing[0]} to --only"
            )
    work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    for name in chosen:
        done, times_file = work / f"{name}.done", work / f"{name}.seconds.json"
        if done.exists():
            continue
        try:
            check_inputs(work, name)
        except ValueError as error:
            parser.error(str(error))
        seconds, began = (
            json.loads(times_file.read_text()) if times_file.exists() else 0.0,
            time.time(),
        )
        try:
            todo[name]()
            done.touch()
        finally:  # the time of a run that was stopped counts too
            seconds += time.time() - began
            write_json(times_file, seconds)
        say(f"{name}: done, {seconds:.0f} s in all")
    if all((work / f"{name}.done").exists() for name in todo):
        for name in SHIPPED:
            shutil.rmtree(args.out / name, ignore_errors=True)
            shutil.copytree(work / name, args.out / name)
        write_manifest(
            args.out,
            {name: json.loads((work / f"{name}.seconds.json").read_text()) for name in todo},
        )
        say(f"assets written to {args.out}")


if __name__ == "__main__":
    main()
