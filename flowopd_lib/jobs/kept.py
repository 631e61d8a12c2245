"""Trainings that are kept: adapter (in half precision), curve and probes, found again by what they follow
from. So a run of several evenings, on several machines, adds up, and is not made twice.

`python -m flowopd_lib.runs.keep RUN` puts those of a run into `papermill_runs/trainings`, where every
training looks before it begins. A key is told by plain values and files, not by weights in memory: two
processors round differently, and would never find one another's.
"""

from __future__ import annotations

import ast
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
from ..benchmarks.read import placed
from ..files import ROOT, RUNS, locked, read_lines, write_json, write_whole
from ..train import MAY_CHANGE

PLACE, RECORD, STATE = RUNS / "trainings", "training.json", "state.safetensors"
FILES = ("metrics.jsonl", "probes.jsonl", "recipe.yaml", "precision.json")
# what a training computes by: a change here, but for comments and docstrings, and nothing kept is found
CODE = (
    "sde",
    "adapters",
    "policy",
    "rollout",
    "prompts",
    "schedule",
    "merge",
    "train",
    "fit",
    "evaluate",
)
CODE += ("objectives", "rewards", "jobs/recipes", "studies/seesaw")


def record_of(spec: Mapping, benchmark: Benchmark, dtype: torch.dtype) -> dict[str, Any] | None:
    """What a training follows from, as plain values and hashes, and their hash, its `key`. None for one that
    ends by time, and follows from how fast it was, too."""
    if "max_seconds" in spec.get("train", {}):
        return None
    train = {
        k: v for k, v in spec.get("train", {}).items() if k == "iterations" or k not in MAY_CHANGE
    }
    asked = {
        k: v
        for k, v in spec.items()
        if k not in ("job", "benchmark", "name", "after", "train", "adapters")
    }
    sources = {name: _source(s, benchmark, spec) for name, s in spec.get("adapters", {}).items()}
    told = {
        "recipe": {
            **asked,
            "student": _source(spec.get("student"), benchmark, spec),
            "train": train,
        },
        "adapters": sources,
        "benchmark": _benchmark(benchmark, spec),
        "precision": str(dtype).removeprefix("torch."),
        "code": _code(),
    }
    text = json.dumps(told, sort_keys=True, default=str)
    return {"key": hashlib.sha256(text.encode()).hexdigest()[:16], "follows_from": json.loads(text)}


def fetch(record: Mapping | None, folder: Path) -> None:
    """Put the kept training of this key into `folder`, unless one of the folder's own is under way there.
    What was fetched into it of another key is cleared away."""
    if record is None or (folder / STATE).exists():
        return
    source = PLACE / record["key"]
    another = (folder / RECORD).is_file() and not fetched(record, folder)
    if not source.is_dir() and not another:
        return
    with locked(folder, "a training that was kept"):
        if source.is_dir():
            shutil.copytree(source, folder, dirs_exist_ok=True)
            seconds = read_lines(folder / "metrics.jsonl")["seconds"].iloc[-1]
            print(f"{folder.name}: trained before, in {seconds:.0f} s ({_shown(source)})")
        else:
            shutil.rmtree(folder / "adapter", ignore_errors=True)
            for name in (RECORD, *FILES):
                (folder / name).unlink(missing_ok=True)


def fetched(record: Mapping | None, folder: Path) -> bool:
    """Whether the training of this key lies in `folder` as it was kept."""
    if record is None or (folder / STATE).exists() or not (folder / RECORD).is_file():
        return False
    return json.loads((folder / RECORD).read_text())["key"] == record["key"]


def go_on_from(source: Path, folder: Path) -> None:
    """Put the state of a training into `folder`, unless there is one."""
    if (source / STATE).is_file() and not (folder / STATE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*FILES, STATE):
            if (source / name).is_file():
                shutil.copy(source / name, folder / name)


def forget(folder: Path) -> None:
    """Before a training goes on: what `tell` wrote is of a shorter one, whose curve is about to grow."""
    (folder / RECORD).unlink(missing_ok=True)


def tell(record: Mapping | None, folder: Path) -> None:
    """Write into the folder of a training that has ended what it followed from."""
    if record is not None:
        write_json(folder / RECORD, {**record, "date": datetime.date.today().isoformat()})


def keep(run: Path, place: Path | None = None) -> list[dict[str, Any]]:
    """Put every training of `run` that has ended into `place`; a row each: training, key, iterations,
    seconds, new. Raises ValueError for a run that has none."""
    rows, place = [], place or PLACE
    for told in sorted(run.rglob(RECORD)):
        folder = told.parent
        if not (folder / "adapter").is_dir() or any(
            p.startswith(".") for p in told.relative_to(run).parts
        ):
            continue
        target, curve = (
            place / json.loads(told.read_text())["key"],
            read_lines(folder / "metrics.jsonl"),
        )
        rows.append(
            {
                "training": folder.relative_to(run).as_posix(),
                "key": target.name,
                "iterations": len(curve),
                "seconds": curve["seconds"].iloc[-1],
                "new": not target.is_dir(),
            }
        )
        if not target.is_dir():
            _copy(folder, target)
    if not rows:
        raise ValueError(
            f"{run} holds no training that has ended, or none whose result can be found again"
        )
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


def _source(source: Any, benchmark: Benchmark, spec: Mapping) -> Any:
    """What an adapter comes from, with the files' hashes for the names of experts and folders."""
    if isinstance(source, str):
        named = spec.get("adapters", {}).get(source)
        if named is not None:
            return _source(named, benchmark, spec)
        place = Path(benchmark.adapter(source) if source in benchmark.experts else source)
        told = place.parent / RECORD
        if told.is_file():  # another training, whose adapter may be there as it was kept
            return json.loads(told.read_text())["key"]
        return _hashes(place) if place.exists() else source
    if isinstance(source, Mapping):
        plain = {k: v for k, v in source.items() if k not in ("load", "adapters")}
        if "load" in source:
            plain["load"] = _source(source["load"], benchmark, spec)
        if "adapters" in source:
            plain["adapters"] = [_source(name, benchmark, spec) for name in source["adapters"]]
        return plain
    return source


def _benchmark(benchmark: Benchmark, spec: Mapping) -> dict[str, Any]:
    """What of a benchmark a training may depend on: its settings, and hashes of its files and rewards' code. Not
    held-out reward, by which nothing is trained, nor for GRPO the experts, but for its reference."""
    prompts = {
        f"{name} {split}": _hashes(placed(path, benchmark.folder))
        for name, task in benchmark.tasks.items()
        for split, path in task.files.items()
        if split in ("train", "val")
    }
    tasks = {
        name: [t.reward, t.kind, t.expert, dict(t.reward_weights), t.like, t.held_out]
        for name, t in benchmark.tasks.items()
    }
    used = {spec["grpo"].get("reference")} if "grpo" in spec else set(benchmark.experts)
    experts = {
        name: [_source(name, benchmark, {}), e.guidance]
        for name, e in benchmark.experts.items()
        if name in used
    }
    rewards = {
        name: reward
        for name, reward in benchmark.specs.items()
        if not benchmark.reward_is(name, "held_out")
    }
    return {
        "base": _hashes(Path(benchmark.base)),
        "tasks": tasks,
        "prompts": prompts,
        "experts": experts,
        "rewards": _placed(rewards, benchmark.folder),
        "adapters": [benchmark.rank, benchmark.alpha, list(benchmark.targets)],
        "sizes": [benchmark.resolution, benchmark.text_length],
        "mix": [dict(benchmark.task_schedule), dict(benchmark.auxiliary_rewards)],
        "samplers": [
            str(s) for s in (benchmark.evaluation, benchmark.exploration, benchmark.distillation)
        ],
    }


def _placed(node: Any, folder: Path) -> Any:
    """A reward's settings with hashes for the files that they name and for the code of a class that is not the
    library's own, which is among `CODE`."""
    if isinstance(node, Mapping):
        return {
            k: _class(v, folder) if k == "class" else _placed(v, folder) for k, v in node.items()
        }
    return (
        _hashes(folder / node)
        if isinstance(node, str) and node and (folder / node).exists()
        else node
    )


def _class(name: str, folder: Path) -> Any:
    source, _, own = name.rpartition(":")
    if not source:
        return name
    if source.endswith(".py"):
        return [own, _ast(folder / source)]
    return [own, _ast(Path(importlib.util.find_spec(source).origin))]


def _hashes(path: Path) -> str:
    """sha256 of a file, or of a folder's weights and settings by their places; a hub id is its name."""
    if path.is_dir():
        files = sorted(
            p
            for p in path.rglob("*")
            if p.suffix in (".safetensors", ".json") and p.name != "manifest.json"
        )
        told = {p.relative_to(path).as_posix(): _sha256(p, p.stat().st_mtime_ns) for p in files}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return _sha256(path, path.stat().st_mtime_ns) if path.is_file() else str(path)


@cache
def _sha256(path: Path, _) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _code() -> str:
    found = [ROOT / "flowopd_lib" / f"{name}.py" for name in CODE]
    found += [p for name in CODE for p in (ROOT / "flowopd_lib" / name).glob("*.py")]
    return hashlib.sha256(
        "".join(_ast(p) for p in sorted(found) if p.is_file()).encode()
    ).hexdigest()


def _ast(path: Path) -> str:
    """The hash of what a file does: comments, docstrings and layout left out, in any version of Python."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(getattr(body[0].value, "value", None), str):
                body[0] = ast.Pass()
    return hashlib.sha256(repr(_plain(tree)).encode()).hexdigest()


def _plain(node: Any) -> Any:
    """A syntax tree as lists. What a node leaves empty is left out, for later versions have more to leave
    empty."""
    if isinstance(node, ast.AST):
        told = [
            (name, _plain(value))
            for name, value in ast.iter_fields(node)
            if value not in (None, [])
        ]
        return [type(node).__name__, *told]
    return [_plain(item) for item in node] if isinstance(node, list) else repr(node)


def _shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
