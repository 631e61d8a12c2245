"""What a notebook's results depend on, as hashes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..benchmarks import load_benchmark
from ..files import ROOT
from ..fingerprint import describe, sha256_of_code, sha256_of_json

# What every notebook may depend on.
INPUTS = (
    "flowopd_lib/**/*.py",
    "flowopd_lib/**/*.yaml",
    "flowopd_lib/assets/**/manifest.json",
    "papermill_runs/recipes/*.yaml",
)


def library_inputs() -> dict[str, str]:
    """The hashes of the library's code and settings, the manifests of its assets, the recipes."""
    files = (path for pattern in INPUTS for path in ROOT.glob(pattern))
    return {p.relative_to(ROOT).as_posix(): file_hash(p) for p in sorted(files)}


def benchmark_hash(name: str) -> str:
    """The hash of a benchmark's settings, its prompts and the files and folders that it names.
    Raises ValueError or FileNotFoundError for a benchmark that cannot be loaded."""
    benchmark = load_benchmark(name)
    settings = benchmark.config.model_dump(mode="json", fallback=describe)
    named = {k: v for k, v in settings.items() if k not in ("about", "folder", "prompts")}
    paths = {benchmark.folder / os.path.expandvars(text) for text in _strings(named)}
    paths |= {Path(str(path).partition(".py:")[0] + ".py") for path in paths}
    for task in benchmark.prompt_tasks:
        paths |= {benchmark.prompt_file(task, split) for split in benchmark.splits(task)}
    files = set()
    for path in paths - {benchmark.folder}:
        files |= {*path.rglob("*")} if os.path.isdir(path) else {path}
    hashes = {
        os.path.relpath(p, benchmark.folder): file_hash(p) for p in files if os.path.isfile(p)
    }
    return sha256_of_json([settings, hashes])


def _strings(node: Any) -> list[str]:
    if isinstance(node, str):
        return [node]
    nodes = node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    return [text for child in nodes for text in _strings(child)]


def file_hash(path: Path) -> str:
    """Of a file's bytes, of Python code without comments and docstrings; computed again only if the
    file has changed."""
    return _file_hash(path, path.stat().st_mtime_ns)


@cache
def _file_hash(path: Path, changed: int) -> str:
    if path.suffix == ".py":
        return sha256_of_code(path.read_text(encoding="utf-8"))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
