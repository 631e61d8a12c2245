"""Finished trainings, found again by what they follow from: adapter (in half precision), metrics
and validation samples. So a run of several evenings, on several machines, adds up, and nothing is
trained twice.

A key is made of plain values and files, not of weights in memory: two processors round differently,
and would never find each other's.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from ..benchmarks import Benchmark
from ..files import RUNS, locked, read_lines, write_json, write_whole
from ..fingerprint import code_hashes, describe, file_hash, hub_commit, sha256_of_json
from ..train import MAY_CHANGE, METRICS, STATE, VALIDATION

PLACE, RECORD = RUNS / "trainings", "training.json"
FILES = (METRICS, VALIDATION, "recipe.yaml", "precision.json")
# what is only evaluated by, or (experts, base, prompts) described by its files
NOT_TRAINED_ON = {"about", "experts", "true_by_construction", "renderer"}
ELSEWHERE = ("folder", "model", "prompts")  # keys of settings whose files are hashed by themselves


def fingerprint(config, benchmark: Benchmark, dtype: torch.dtype) -> dict[str, Any]:
    """What a training follows from, as plain values and hashes, and their hash, its `key`."""
    # where adapters come from is below, by the hashes of their files
    elsewhere = {"name", "continue_from", "benchmark", "adapters", "student"}
    recipe = config.model_dump(mode="json", exclude=elsewhere, fallback=describe)
    for name in {*MAY_CHANGE} - {"iterations"}:
        recipe["train"].pop(name)
    reference = config.grpo.reference if config.grpo else None
    experts = [e for e in benchmark.experts if not config.grpo or e == reference]
    follows_from = {
        "recipe": {**recipe, "student": _source(config.student, benchmark, config.adapters)},
        "adapters": {n: _source(n, benchmark, config.adapters) for n in config.adapters},
        "benchmark": trained_on(benchmark),
        "experts": {e: [_source(e, benchmark, {}), benchmark.guidance[e]] for e in experts},
        "precision": str(dtype).removeprefix("torch."),
        "code": code_hashes(),
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
        return file_hash(path)
    if source is None:
        return None
    plain = source.model_dump(mode="json")
    if "load" in plain:
        plain["load"] = _source(source.load, benchmark, {})
    if "adapters" in plain:
        plain["adapters"] = [_source(name, benchmark, sources) for name in source.adapters]
    return plain


def trained_on(benchmark: Benchmark) -> dict[str, Any]:
    """What of a benchmark a training may depend on."""
    config = benchmark.config.model_dump(
        mode="json", by_alias=True, exclude=NOT_TRAINED_ON, fallback=describe
    )
    for name in [n for n in config["rewards"] if benchmark.reward_is(n, "held_out")]:
        del config["rewards"][name]
    for reward in config["rewards"].values():
        reward.pop("gold", None)
    return with_files(config, benchmark, ("train", "val"))


def with_files(config: dict, benchmark: Benchmark, splits: Iterable[str]) -> dict[str, Any]:
    """Settings of a benchmark with the hashes of the files that they name, of the base, and of the
    prompts of some splits."""

    def described(key: str, node: Any) -> Any:
        if isinstance(node, dict):
            return {k: described(k, v) for k, v in node.items() if k not in ELSEWHERE}
        if key == "class":
            return _class(node, benchmark.folder)
        if isinstance(node, str) and node and os.path.exists(benchmark.folder / node):
            return [node, file_hash(benchmark.folder / node)]
        return hub_commit(node) if isinstance(node, str) else node

    files = {
        f"{task} {split}": benchmark.prompt_file(task, split)
        for task in benchmark.prompt_tasks
        for split in splits
        if split in benchmark.tasks[task].splits
    }
    prompts = {name: file_hash(path) for name, path in files.items()}
    return {**described("", config), "base": file_hash(Path(benchmark.base)), "prompts": prompts}


def _class(name: str, folder: Path) -> list[str]:
    """`Name`, `file.py:Name` or `package.module:Name`, with the hash of its file."""
    source, _, own = name.rpartition(":")
    if not source:
        return [own]
    file = source if source.endswith(".py") else importlib.util.find_spec(source).origin
    return [own, file_hash(folder / file)]


def is_finished(fingerprint: dict[str, Any], folder: Path) -> bool:
    """Whether the training of this key lies finished in `folder`."""
    record = folder / RECORD
    if (folder / STATE).exists() or not record.is_file():
        return False
    return json.loads(record.read_text())["key"] == fingerprint["key"]


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


def continue_from(source: Path, folder: Path) -> None:
    """Copy the state of a training into `folder`, unless there is one."""
    if (source / STATE).is_file() and not (folder / STATE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        _copy_files(source, folder, (*FILES, STATE))


def write_record(fingerprint: dict[str, Any], folder: Path) -> None:
    write_json(folder / RECORD, {**fingerprint, "date": datetime.date.today().isoformat()})


def publish(run: Path, place: Path | None = None) -> list[dict[str, Any]]:
    """Copy every finished training of `run` into the cache; a row each: training, key, iterations,
    seconds, new. Raises ValueError for a run that has none."""
    rows = []
    for record in sorted(run.rglob(RECORD)):
        folder, name = record.parent, record.parent.relative_to(run)
        if not (folder / "adapter").is_dir() or any(part.startswith(".") for part in name.parts):
            continue
        key, metrics = json.loads(record.read_text())["key"], read_lines(folder / METRICS)
        target = (place or PLACE) / key
        row = {"training": name.as_posix(), "key": key, "iterations": len(metrics)}
        rows.append({**row, "seconds": metrics["seconds"].iloc[-1], "new": not target.is_dir()})
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
    _copy_files(folder, partial, (RECORD, *FILES))
    partial.rename(target)


def _copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copy(source / name, target / name)
