"""Finished trainings, found again by what they follow from: adapter (in half precision), metrics
and validation samples. So a run of several evenings, on several machines, adds up, and nothing is
trained twice.

A key is made of plain values and files, not of weights in memory: two processors round differently,
and would never find each other's.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from ..benchmarks import Benchmark
from ..files import RUNS, locked, read_lines, write_json, write_whole
from ..fingerprint import describe, sha256_of_code, sha256_of_json
from ..train import MAY_CHANGE, METRICS, STATE, VALIDATION

PLACE, RECORD = RUNS / "trainings", "training.json"
FILES = (METRICS, VALIDATION, "recipe.yaml", "precision.json")
# what a training is computed by: after a change here, but for comments and docstrings, nothing
# cached is found
CODE = ("sde", "lora", "policy", "rollout", "data", "merge", "train", "evaluate", "text")
CODE += ("losses", "rewards", "lab/recipe", "lab/jobs")


def fingerprint(config, benchmark: Benchmark, dtype: torch.dtype) -> dict[str, Any]:
    """What a training follows from, as plain values and hashes, and their hash, its `key`."""
    # where adapters come from is below, by the hashes of their files
    elsewhere = {"name", "continue_from", "benchmark", "adapters", "student"}
    recipe = config.model_dump(mode="json", exclude=elsewhere, fallback=describe)
    recipe["train"] = {
        k: v for k, v in recipe["train"].items() if k == "iterations" or k not in MAY_CHANGE
    }
    sources = {name: _source(name, benchmark, config.adapters) for name in config.adapters}
    reference = config.grpo.reference if config.grpo else None
    experts = [e for e in benchmark.experts if not config.grpo or e == reference]
    follows_from = {
        "recipe": {**recipe, "student": _source(config.student, benchmark, config.adapters)},
        "adapters": sources,
        "benchmark": _benchmark(benchmark),
        "experts": {e: [_source(e, benchmark, {}), benchmark.guidance[e]] for e in experts},
        "precision": str(dtype).removeprefix("torch."),
        "code": _code(),
    }
    follows_from = json.loads(json.dumps(follows_from, sort_keys=True, default=str))
    return {"key": sha256_of_json(follows_from)[:16], "follows_from": follows_from}


def _source(source: Any, benchmark: Benchmark, sources: Mapping[str, Any]) -> Any:
    """What an adapter comes from, with the files' hashes for the names of experts and folders.
    `sources`: of other adapters that it names."""
    if isinstance(source, str):
        if source in sources:
            others = {k: v for k, v in sources.items() if k != source}
            return _source(sources[source], benchmark, others)
        path = Path(benchmark.adapter(source) if source in benchmark.experts else source)
        record = path.parent / RECORD
        if record.is_file():  # another training, whose adapter may be there as it was cached
            return json.loads(record.read_text())["key"]
        return _file_hash(path) if path.exists() else source
    if source is None:
        return None
    plain = source.model_dump(mode="json")
    if "load" in plain:
        plain["load"] = _source(source.load, benchmark, {})
    if "adapters" in plain:
        plain["adapters"] = [_source(name, benchmark, sources) for name in source.adapters]
    return plain


def _benchmark(benchmark: Benchmark) -> dict[str, Any]:
    """What of a benchmark a training may depend on: its settings, with hashes of the files they
    name and of the code of a user's rewards. Not what is only evaluated by."""
    held_out = [name for name in benchmark.reward_configs if benchmark.reward_is(name, "held_out")]
    config = benchmark.config.model_dump(
        mode="json",
        by_alias=True,
        exclude={"about", "experts", "true_by_construction", "renderer"},
        fallback=describe,
    )
    config["rewards"] = {n: r for n, r in config["rewards"].items() if n not in held_out}
    for reward in config["rewards"].values():
        reward.pop("gold", None)
    prompts = {
        f"{task} {split}": _file_hash(benchmark.prompt_file(task, split))
        for task in benchmark.prompt_tasks
        for split in ("train", "val")
        if split in benchmark.tasks[task].splits
    }
    return {
        **_with_files(config, benchmark.folder),
        ("base"): _file_hash(Path(benchmark.base)),
        "prompts": prompts,
    }


def _with_files(node: Any, folder: Path) -> Any:
    """Settings with hashes for the files and folders that they name, and for the code of a class
    that is not among the library's own rewards."""
    if isinstance(node, dict):
        return {
            k: _class(v, folder) if k == "class" else _with_files(v, folder)
            for k, v in node.items()
            if k not in ("folder", "model", "prompts")
        }
    if isinstance(node, str) and node and (folder / node).exists():
        return [node, _file_hash(folder / node)]
    return node


def _class(name: str, folder: Path) -> list[str]:
    """`Name`, `file.py:Name` or `package.module:Name`, with the hash of its file."""
    source, _, own = name.rpartition(":")
    if not source:
        return [own]
    file = source if source.endswith(".py") else importlib.util.find_spec(source).origin
    return [own, _code_hash(folder / file)]


def _file_hash(path: Path) -> str:
    """sha256 of a file, or of a folder's weights and settings by their paths; a hub id is its
    name."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".json"))
        return sha256_of_json(
            {
                p.relative_to(path).as_posix(): _sha256(p, p.stat().st_mtime_ns)
                for p in files
                if p.name != ("manifest.json")
            }
        )
    return _sha256(path, path.stat().st_mtime_ns) if path.is_file() else str(path)


@cache
def _sha256(path: Path, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _code() -> str:
    """Of what `CODE` does."""
    library = Path(__file__).parents[1]
    files = sorted(
        p
        for name in CODE
        for p in (
            [library / (f"{name}.py")]
            if (library / f"{name}.py").is_file()
            else (library / name).rglob("*.py")
        )
        if p.name != "server.py"
    )
    return sha256_of_json({p.relative_to(library).as_posix(): _code_hash(p) for p in files})


def _code_hash(path: Path) -> str:
    return sha256_of_code(path.read_text(encoding="utf-8"))


def fetch(fingerprint: dict[str, Any], folder: Path) -> None:
    """Copy the cached training of this key into `folder`, unless one of the folder's own is under
    way there. What was copied into it under another key is removed."""
    if (folder / STATE).exists() or is_finished(fingerprint, folder):
        return
    source, other = PLACE / fingerprint["key"], (folder / RECORD).is_file()
    if not source.is_dir() and not other:
        return
    with locked(folder, "a cached training"):
        if source.is_dir():
            shutil.copytree(source, folder, dirs_exist_ok=True)
            seconds = read_lines(folder / METRICS)["seconds"].iloc[-1]
            print(f"{folder.name}: found in the cache ({source.name}), trained in {seconds:.0f} s")
        else:
            shutil.rmtree(folder / "adapter", ignore_errors=True)
            for name in (RECORD, *FILES):
                (folder / name).unlink(missing_ok=True)


def is_finished(fingerprint: dict[str, Any], folder: Path) -> bool:
    """Whether the training of this key lies finished in `folder`."""
    if (folder / STATE).exists() or not (folder / RECORD).is_file():
        return False
    return json.loads((folder / RECORD).read_text())["key"] == fingerprint["key"]


def continue_from(source: Path, folder: Path) -> None:
    """Copy the state of a training into `folder`, unless there is one."""
    if (source / STATE).is_file() and not (folder / STATE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*FILES, STATE):
            if (source / name).is_file():
                shutil.copy(source / name, folder / name)


def forget(folder: Path) -> None:
    """Before a training continues: the record there is of a shorter one."""
    (folder / RECORD).unlink(missing_ok=True)


def write_record(fingerprint: dict[str, Any], folder: Path) -> None:
    write_json(folder / RECORD, {**fingerprint, "date": datetime.date.today().isoformat()})


def publish(run: Path, place: Path | None = None) -> list[dict[str, Any]]:
    """Copy every finished training of `run` into the cache; a row each: training, key, iterations,
    seconds, new. Raises ValueError for a run that has none."""
    rows, place = [], place or PLACE
    for record in sorted(run.rglob(RECORD)):
        folder = record.parent
        hidden = any(p.startswith(".") for p in record.relative_to(run).parts)
        if hidden or not (folder / "adapter").is_dir():
            continue
        target, metrics = (
            place / json.loads(record.read_text())[("key")],
            read_lines(folder / METRICS),
        )
        rows.append(
            {
                "training": folder.relative_to(run).as_posix(),
                "key": target.name,
                "iterations": len(metrics),
                "seconds": metrics["seconds"].iloc[-1],
                "new": not target.is_dir(),
            }
        )
        if not target.is_dir():
            _copy(folder, target)
    if not rows:
        raise ValueError(f"{run} holds no finished training")
    return rows


def _copy(folder: Path, target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder / "adapter", partial / "adapter")
    for weights in (partial / "adapter").glob("*.safetensors"):
        halves = {key: w.half() for key, w in load_file(weights).items()}
        write_whole(weights, save(halves, {"format": "pt"}))
    for name in (RECORD, *FILES):
        if (folder / name).is_file():
            shutil.copy(folder / name, partial / name)
    partial.rename(target)
