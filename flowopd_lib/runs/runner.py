"""The runner: a profile's notebooks executed into one folder, each again only if what its results
depend on has changed."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any
from unittest.mock import patch

import nbformat
import yaml

from ..benchmarks import load_benchmark
from ..config import choose, read_yaml, validate
from ..files import ROOT, RUNS, locked, set_aside, write_json, write_whole
from ..fingerprint import describe, file_hash, sha256_of_json
from ..lab.cache import with_files
from ..lab.notebook import NotForThisBenchmark, read_parameters
from . import report
from .execute import NOTEBOOKS, execute, kernel_environment, scrub, stop_kernels
from .report import Status, read_status

# What every notebook may depend on.
INPUTS = (
    "flowopd_lib/**/*.py",
    "flowopd_lib/**/*.yaml",
    "flowopd_lib/assets/**/manifest.json",
    "papermill_runs/recipes/*.yaml",
)


# ---- profiles: which notebooks a run executes, in this order, and with which parameters


def profile_path(name: str) -> Path:
    """A profile of papermill_runs/profiles by its name, or any YAML file."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    names = {p.stem: p for p in sorted((RUNS / "profiles").glob("*.yaml"))}
    return names[choose("profile", name, names)]


def load_profile(name: str) -> dict[str, dict[str, Any]]:
    """The parameters of a profile's notebooks: `00_quickstart: {n_test: 12}`; nothing after the
    colon: its defaults."""
    path = profile_path(name)
    chosen = validate(dict[str, dict[str, Any] | None], read_yaml(path), str(path))
    return {notebook: parameters or {} for notebook, parameters in chosen.items()}


def notebook_path(notebook: str) -> Path:
    names = {p.stem: p for p in sorted(NOTEBOOKS.glob("*.ipynb"))}
    return names[choose("notebook", notebook, names)]


def needs_of(notebook: str) -> list[str]:
    """The notebooks whose results a notebook reads, as its metadata say: `{"flowopd": {"needs":
    ["05_opd"]}}`."""
    metadata = nbformat.read(notebook_path(notebook), 4).metadata
    return metadata.get("flowopd", {}).get("needs", [])


def choose_notebooks(
    profile: str, only: str = "", overrides: Mapping[str, Any] = {}
) -> dict[str, dict[str, Any]]:
    """The notebooks of a profile that begin with `only`, with all their parameters but `out_dir`;
    an override goes to the notebooks that have it.

    Raises ValueError for a notebook or a parameter that does not exist, and for a value that the
    parameter's annotation does not allow: before any notebook starts.
    """
    every = load_profile(profile)
    models = {n: read_parameters(notebook_path(n)) for n in every if n.startswith(only)}
    if not models:
        raise ValueError(
            f"no notebook of the profile {profile} begins with {only!r}; it has {', '.join(every)}"
        )
    known = {name for model in models.values() for name in model.model_fields} - {"out_dir"}
    for name in overrides:
        choose("parameter of these notebooks", name, sorted(known))
    chosen = {}
    for notebook, model in models.items():
        own = {k: v for k, v in overrides.items() if k in model.model_fields}
        values = validate(model, every[notebook] | own, f"{notebook}.ipynb").model_dump()
        if values.pop("out_dir", ""):
            raise ValueError(f"{notebook}: out_dir is set by the run, in its own --folder")
        chosen[notebook] = {name: _absolute(value) for name, value in values.items()}
    return chosen


def _absolute(value: Any) -> Any:
    """A file, or `file.py:name`, as seen from the user's folder: notebooks run in their own."""
    file, colon, name = value.partition(":") if isinstance(value, str) else ("", "", "")
    is_file = Path(file).suffix in (".py", ".yaml", ".yml")
    return f"{Path(file).resolve()}{colon}{name}" if is_file else value


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """`NAME=VALUE` with values in YAML, by name. Raises ValueError."""
    overrides = {}
    for name, _, text in (item.partition("=") for item in items):
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"the value of {name} is not YAML: {text!r}") from error
        number = isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value)
        overrides[name] = float(value) if number else value  # YAML takes 3e-4 for a string
    return overrides


def check_needs(chosen: Mapping[str, dict], status: Status, folder: Path) -> None:
    """Raises ValueError if a notebook needs one that neither comes before it nor is done in
    `folder`. With a `run_dir` it reads another run."""
    ended = {n for n, s in status.items() if s["state"] in ("done", "left out")}
    done = {n for n in ended if (folder / n).is_dir()}
    done -= set(chosen)
    for notebook, parameters in chosen.items():
        missing = [n for n in needs_of(notebook) if n not in done]
        if missing and not parameters.get("run_dir"):
            raise ValueError(
                f"{notebook} needs {', '.join(missing)}, neither before it in this run nor done in "
                f"{folder}; run first: --only {missing[0]}"
            )
        done.add(notebook)


# ---- what a notebook's results depend on


def library_hash() -> str:
    """Of the library's code and settings, the manifests of its assets, the recipes."""
    files = (path for pattern in INPUTS for path in ROOT.glob(pattern))
    return sha256_of_json({p.relative_to(ROOT).as_posix(): file_hash(p) for p in files})


def benchmark_hash(name: str) -> str:
    """The hash of a benchmark's settings, its prompts and the files and folders that it names.
    Raises ValueError or FileNotFoundError for a benchmark that cannot be loaded."""
    benchmark = load_benchmark(name)
    settings = benchmark.config.model_dump(mode="json", by_alias=True, fallback=describe)
    return sha256_of_json(with_files(settings, benchmark, ("train", "val", "test", "ood")))


# ---- the run


def run_profile(
    profile: str,
    only: str = "",
    overrides: Mapping[str, Any] = {},
    folder: Path | None = None,
    resume: bool = False,
    jobs: int = 1,
    log: Callable = print,
) -> Path:
    """Execute a profile's notebooks in order into `folder` (default `papermill_runs/PROFILE`), with
    `status.json`, `manifest.json` and `report.html`; the folder.

    Every parameter, benchmark and need is checked before the first notebook starts. `resume` leaves
    out notebooks that are done with the same fingerprint, and keeps the folders of interrupted
    ones, so that their trainings resume. What lies there of anything else is moved into
    `folder/earlier/`, never removed. `jobs`: notebooks at once, each with its part of the cores and
    after those it needs. Raises FolderInUse while another run writes to the folder.
    """
    chosen, name = choose_notebooks(profile, only, overrides), profile_path(profile).stem
    folder = (folder or RUNS / name).resolve()
    if folder == NOTEBOOKS.resolve():
        raise ValueError(f"{folder} cannot be the folder of a run; give another --folder")
    check_needs(chosen, read_status(folder) if only or resume else {}, folder)
    for benchmark in {p["benchmark"] for p in chosen.values() if "benchmark" in p}:
        benchmark_hash(benchmark)
    with locked(folder, f"a run of the profile {name}"):
        status = read_status(folder) if only or resume else {}
        for notebook in chosen:
            if not resume or notebook not in status:
                status[notebook] = {"state": "waiting"}
        run = _Run(chosen, folder, resume, jobs, log, dict(sorted(status.items())))
        try:
            run.execute_all()
        finally:
            manifest = scrub(report.manifest(name, folder, run.status), folder)
            write_json(folder / "manifest.json", manifest)
            write_whole(folder / "report.html", report.page(manifest, folder))
    return folder


@dataclass
class _Run:
    chosen: Mapping[str, dict]
    folder: Path
    resume: bool
    jobs: int
    log: Callable
    status: Status

    def __post_init__(self):
        self.git = report.checkout(ROOT, self.folder)
        self.label = {n: f"[{i}/{len(self.chosen)}] {n}" for i, n in enumerate(self.chosen, 1)}
        self.futures: dict[str, Future] = {}
        self.lock, self.stopping, self.interrupted = RLock(), False, False

    def execute_all(self) -> None:
        """Raises what the first notebook failed by, once those running have ended."""
        environment = patch.dict(os.environ, kernel_environment(self.folder, self.jobs))
        with environment, ThreadPoolExecutor(self.jobs) as pool:
            for notebook in self.chosen:  # those it needs have been submitted before it
                self.futures[notebook] = pool.submit(self.run, notebook)
            try:
                for future in as_completed(self.futures.values()):
                    future.result()
            except BaseException as error:
                self.stopping, self.interrupted = True, isinstance(error, KeyboardInterrupt)
                while self.interrupted and wait(self.futures.values(), timeout=0.5).not_done:
                    stop_kernels()  # also those that were just starting
                raise

    def run(self, notebook: str) -> None:
        for needed in needs_of(notebook):
            if needed in self.futures:
                self.futures[needed].result()
        with self.lock:
            if self.stopping or not self.prepare(notebook):
                return

        def log(line: str) -> None:
            self.log(line if self.jobs == 1 else f"    {notebook[:2]}{line[3:]}")

        start = time.monotonic()
        try:
            execute(notebook, self.chosen[notebook], self.folder, log)
        except NotForThisBenchmark as error:
            self.update(notebook, state="left out", error=str(error))
            self.log(f"{self.label[notebook]} left out: {error}")
            return
        except Exception as error:
            self.stopping, state = True, "interrupted" if self.interrupted else "failed"
            message = scrub(str(error), self.folder) or type(error).__name__
            self.update(notebook, state=state, error=message)
            raise
        seconds = time.monotonic() - start
        self.update(notebook, state="done", seconds=round(seconds, 1))
        path = self.folder / f"{notebook}.ipynb"
        self.log(f"{self.label[notebook]} done in {report.duration(seconds)}: {path}")

    def prepare(self, notebook: str) -> bool:
        """Whether to execute it; then its status says so, and its folder holds nothing else."""
        before, fingerprint = self.status[notebook], self.fingerprint(notebook)
        files = (self.folder / notebook, self.folder / f"{notebook}.ipynb")
        same = self.resume and before.get("fingerprint") == fingerprint
        if same and before["state"] == "done" and all(file.exists() for file in files):
            self.log(f"{self.label[notebook]} is done and unchanged")
            return False
        self.log(f"{self.label[notebook]} ...")
        resumed = same and before["state"] != "done"
        if not resumed:  # before the status is written, which says whose checkpoints lie there
            if any(file.exists() for file in files):
                self.log(
                    f"    earlier results are now in {self.folder / 'earlier'}; --resume keeps "
                    "what is unchanged"
                )
            set_aside(self.folder, *files)
        self.status[notebook] = {"resumed": True} if resumed else {}
        about = {"git": self.git, "machine": report.machine(), "fingerprint": fingerprint}
        self.update(notebook, state="running", parameters=self.chosen[notebook], **about)
        return True

    def fingerprint(self, notebook: str) -> str:
        """The hash of what a notebook's results depend on: its cells, its parameters, the library,
        the benchmark, and the fingerprints of what it needs."""
        parameters, cells = self.chosen[notebook], nbformat.read(notebook_path(notebook), 4).cells
        other, benchmark = parameters.get("run_dir"), parameters.get("benchmark")
        status = read_status(ROOT / other) if other else self.status
        parts = {
            "cells": [(cell.cell_type, cell.source) for cell in cells],
            "parameters": parameters,
            "library": library_hash(),
            "benchmark": benchmark_hash(benchmark) if benchmark else None,
            "needs": {n: status.get(n, {}).get("fingerprint") for n in needs_of(notebook)},
        }
        return sha256_of_json(parts)

    def update(self, notebook: str, **values: Any) -> None:
        with self.lock:
            self.status[notebook] |= values
            write_json(self.folder / "status.json", self.status)
