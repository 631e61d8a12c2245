"""Build the small benchmark's assets from nothing: `python -m flowopd_lib build --work build`.

Steps: prompts, vae, text (encoders), base (to capability), misalign, pickscore, deqa, and the gold
rewards pickscore_gold and deqa_gold, these on a GPU where there is one.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from ...config import choose
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


def describe_files(folder: Path, without: Sequence[str] = ()) -> dict[str, dict]:
    """sha256 and size of the files in a folder, but of manifests and some of its folders."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p != folder / "manifest.json"]
    return {
        str(p.relative_to(folder)): {
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
            "bytes": p.stat().st_size,
        }
        for p in files
        if p.relative_to(folder).parts[0] not in without
    }


def describe_machine() -> dict:
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {"python": platform.python_version()} | {n: version(n) for n in LIBRARIES},
    }


@contextlib.contextmanager
def count_seconds(file: Path) -> Iterator[None]:
    """Add the time inside to the seconds in `file`, that of a run which is stopped as well."""
    before, start = read_seconds(file), time.time()
    try:
        yield
    finally:
        write_json(file, before + time.time() - start)


def read_seconds(file: Path) -> float:
    return json.loads(file.read_text()) if file.exists() else 0.0


def build(work: Path, only: Sequence[str] = (), out: Path = ASSETS) -> None:
    """Run the steps (`only` some of them) in `work`, with checkpoints from which they resume; a
    finished one is not run again. Once all are finished, the results and a manifest are written to
    `out`.

    Raises ValueError for a step whose inputs are missing, or are not those it began with.
    """
    todo = steps(work)
    for name in only:
        choose("step", name, todo)
    chosen = [name for name in todo if not only or name in only]
    for name in chosen:
        for i in INPUTS[name]:
            if i not in chosen and not (work / f"{i}.done").exists():
                raise ValueError(f"{name} needs {i}, which {work} does not have; run {i} too")
    work.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        done = work / f"{name}.done"
        if done.exists():
            continue
        check_inputs(work, name)
        with count_seconds(work / f"{name}.seconds.json"):
            todo[name]()
        done.touch()
        say(f"{name}: finished")
    if all((work / f"{name}.done").exists() for name in todo):
        for name in SHIPPED:
            shutil.rmtree(out / name, ignore_errors=True)
            shutil.copytree(work / name, out / name)
        seconds = {name: round(read_seconds(work / f"{name}.seconds.json")) for name in todo}
        record = {"command": "python -m flowopd_lib build --work build", "seed": SEED}
        record |= {"seconds": seconds, **describe_machine()}
        write_json(out / "manifest.json", {**record, "files": describe_files(out, ["experts"])})
        say(f"assets written to {out}")
