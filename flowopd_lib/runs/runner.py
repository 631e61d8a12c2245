"""The runner: a profile's notebooks executed into one folder, each again only if what its results
depend on has changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

import nbformat

from ..config import read_yaml, validate
from ..files import ROOT, RUNS, locked, set_aside, write_json, write_whole
from ..fingerprint import sha256_of_json
from . import report
from .execute import execute, kernel_environment, scrub, stop_kernels
from .fingerprints import benchmark_hash, library_inputs
from .profiles import NOTEBOOKS, choose_notebooks, notebook_path, profile_path

Status = dict[str, dict[str, Any]]  # by notebook: state, parameters, fingerprint, seconds, ...


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
    if jobs < 1:
        raise ValueError(f"jobs, the number of notebooks at once, must be at least 1, not {jobs}")
    chosen, name = choose_notebooks(profile, only, overrides), profile_path(profile).stem
    folder = (folder or RUNS / name).resolve()
    if folder.is_file() or folder == NOTEBOOKS.resolve():
        raise ValueError(f"{folder} cannot be the folder of a run; give another --folder")
    check_needs(chosen, read_status(folder) if only or resume else {}, folder)
    for benchmark in {p["benchmark"] for p in chosen.values() if "benchmark" in p}:
        benchmark_hash(benchmark)
    with locked(folder, f"a run of the profile {name}"):
        before = read_status(folder)
        # seconds of other parameters, or of the rest of a notebook, predict nothing
        seconds = {
            n: s["seconds"]
            for status in (read_status(RUNS / "reference"), before)
            for n, s in status.items()
            if s["state"] == "done" and s["parameters"] == chosen.get(n) and not s.get("resumed")
        }
        status = before if only or resume else {}
        for notebook in chosen:
            if not resume or notebook not in status:
                status[notebook] = {"state": "waiting"}
        run = _Run(name, chosen, folder, resume, jobs, log, dict(sorted(status.items())), seconds)
        try:
            run.execute_all()
        finally:
            run.write_report()
    return folder


def read_status(folder: Path) -> Status:
    """A run's `status.json`; empty where there is none. Raises ValueError, naming the file, if it
    is not one."""
    path = folder / "status.json"  # JSON is YAML
    return validate(Status, read_yaml(path), str(path)) if path.is_file() else {}


def needs_of(notebook: str) -> list[str]:
    """The notebooks whose results a notebook reads, as its metadata say: `{"flowopd": {"needs":
    ["05_opd"]}}`."""
    metadata = nbformat.read(notebook_path(notebook), 4).metadata
    return metadata.get("flowopd", {}).get("needs", [])


def check_needs(chosen: Mapping[str, dict], status: Status, folder: Path) -> None:
    """Raises ValueError if a notebook needs one that neither comes before it nor is done in
    `folder`. With a `run_dir` it reads another run."""
    done = {n for n, s in status.items() if s["state"] == "done" and (folder / n).is_dir()}
    done -= set(chosen)
    for notebook, parameters in chosen.items():
        missing = [n for n in needs_of(notebook) if n not in done]
        if missing and not parameters.get("run_dir"):
            raise ValueError(
                f"{notebook} needs {', '.join(missing)}, neither before it in this run nor done in "
                f"{folder}; run first: --only {missing[0]}"
            )
        done.add(notebook)


@dataclass
class _Run:
    profile: str
    chosen: Mapping[str, dict]
    folder: Path
    resume: bool
    jobs: int
    log: Callable
    status: Status
    seconds: Mapping[str, float]  # of earlier runs, by notebook

    def __post_init__(self):
        self.waiting, self.git = list(self.chosen), report.checkout(ROOT, self.folder)
        self.label = {n: f"[{i}/{len(self.chosen)}] {n}" for i, n in enumerate(self.chosen, 1)}
        self.futures: dict[str, Future] = {}
        self.lock, self.stopping, self.interrupted = RLock(), False, False

    def execute_all(self) -> None:
        """Raises what the first notebook failed by, once those running have ended."""
        with kernel_environment(self.folder, self.jobs), ThreadPoolExecutor(self.jobs) as pool:
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
        left = [n for n in self.waiting if not self.is_done(n)]
        self.waiting.remove(notebook)
        if notebook not in left:
            self.log(f"{self.label[notebook]} is done and unchanged")
            return False
        before, fingerprint = self.status[notebook], self.fingerprint(notebook)
        unfinished = self.resume and before["state"] not in ("done", "waiting")
        resumed, time_left = unfinished and before["fingerprint"] == fingerprint, ""
        if set(left) <= set(self.seconds):
            seconds = sum(self.seconds[n] for n in left) / self.jobs
            time_left = f" (about {report.duration(seconds)} left)"
        self.log(f"{self.label[notebook]} ...{time_left}")
        if not resumed:  # before the status is written, which says whose checkpoints lie there
            files = (self.folder / notebook, self.folder / f"{notebook}.ipynb")
            if moved := set_aside(self.folder, *files):
                self.log(
                    f"    earlier results are now in {moved}; --resume keeps what is unchanged"
                )
        self.status[notebook] = {"resumed": True} if resumed else {}
        about = {"git": self.git, "machine": report.machine(), "fingerprint": fingerprint}
        self.update(notebook, state="running", parameters=self.chosen[notebook], **about)
        return True

    def is_done(self, notebook: str) -> bool:
        """Whether there are results of the same fingerprint, which a resumed run leaves as they
        are."""
        status, files = self.status[notebook], (notebook, f"{notebook}.ipynb")
        return (
            self.resume
            and status["state"] == "done"
            and all((self.folder / name).exists() for name in files)
            and status["fingerprint"] == self.fingerprint(notebook)
        )

    def fingerprint(self, notebook: str) -> str:
        """The hash of what a notebook's results depend on: its cells, its parameters, the library,
        the benchmark, and the fingerprints of what it needs."""
        parameters, cells = self.chosen[notebook], nbformat.read(notebook_path(notebook), 4).cells
        other, benchmark = parameters.get("run_dir"), parameters.get("benchmark")
        status = read_status(NOTEBOOKS / other) if other else self.status
        parts = {
            "cells": [(cell.cell_type, cell.source) for cell in cells],
            "parameters": parameters,
            "library": library_inputs(),
            "benchmark": benchmark_hash(benchmark) if benchmark else None,
            "needs": {n: status.get(n, {}).get("fingerprint") for n in needs_of(notebook)},
        }
        return sha256_of_json(parts)

    def update(self, notebook: str, **values: Any) -> None:
        with self.lock:
            self.status[notebook] |= values
            write_json(self.folder / "status.json", self.status)

    def write_report(self) -> None:
        manifest = scrub(report.manifest(self.profile, self.folder, self.status), self.folder)
        write_json(self.folder / "manifest.json", manifest)
        write_whole(self.folder / "report.html", report.page(manifest, self.folder))
