"""`python -m flowopd_lib.runs.ahead PROFILE --processes 12`: the jobs of a profile's notebooks beside one
another, before the notebooks. For a machine on which one job leaves most of a GPU or of the cores idle.

Then `python -m flowopd_lib.runs PROFILE --resume` finds them done. A notebook's cells are run once with a lab
that notes what it is asked for and gives tables without numbers; what cannot be foreseen so is left to the
notebook itself.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any
from unittest.mock import patch

import nbformat
import numpy as np
import pandas as pd

from ..files import ROOT, RUNS, locked, set_aside, write_json
from ..jobs.lab import Lab
from ..jobs.launchers import load_launcher
from ..jobs.processes import Served
from ..jobs.work import shared_place
from . import report
from .profiles import NOTEBOOKS, choose, overrides_of, parameters_of, profile_parser
from .runner import fingerprints, read_status

TRAINED = {"iteration": [0.0], "seconds": [0.0]}


@dataclass
class Job:
    """What is to be done in a folder, after those of the numbers `needs`; `long`: the iterations of the
    longest chain of trainings that begins with it."""

    notebook: str
    folder: Path
    spec: dict[str, Any]
    needs: set[int] = field(default_factory=set)
    long: int = 0

    def __str__(self) -> str:
        return f"{self.notebook[:2]} {self.spec['job']} {self.spec.get('name') or self.spec.get('file', '')}"


class Noting(Lab):
    """A lab that does nothing but note what it is asked for."""

    noted: list[tuple[Path, dict]]  # of all there are: a notebook makes its own

    def __init__(self, benchmark: str, launcher: str, out: Path):
        super().__init__(benchmark, launcher, out)
        self.site = Nowhere()

    def run(self, job: str, folder: str = "", **spec: Any) -> Path:
        self.noted.append((self.out / folder, self.spec_of(job, **spec)))
        return self.out / folder

    def train(self, name, recipe, probe=None, after=""):
        super().train(name, recipe, probe, after)
        return pd.DataFrame(TRAINED), pd.DataFrame(TRAINED)

    def table(self, job, file, **spec):
        self.run(job, file=file, **spec)
        if job != "evaluate":
            return pd.DataFrame()
        rewards = dict.fromkeys(self.benchmark.specs, np.nan)
        about = {"tag": "", "prompt": "", "repeat": 0, "seed": 0}
        return pd.DataFrame(
            [
                {"model": m, "task": t, **about, **rewards}
                for m in spec["models"]
                for t in self.benchmark.own
            ]
        )

    def live(self, make):
        return None


class Nowhere:
    """The site of a lab that only notes: there is no model."""

    def __getattr__(self, name):
        raise RuntimeError("what is only noted loads no model")


def plan(notebook: str, parameters: Mapping[str, Any], out: Path) -> list[Job]:
    """The jobs of a notebook that would write to `out`, in its order, each but once. A cell that cannot go on
    with tables without numbers ends there: it makes figures."""
    Noting.noted = []
    with tempfile.TemporaryDirectory() as folder:
        names = {"display": lambda *shown: None}
        with patch("flowopd_lib.Lab", Noting):
            for cell in nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", 4).cells:
                if cell.cell_type != "code":
                    continue
                first = "parameters" in cell.metadata.get("tags", [])
                try:
                    exec(compile(cell.source, f"{notebook} [{cell.id}]", "exec"), names)
                except Exception:  # noqa: S110  what wants numbers, as said above
                    continue
                finally:
                    if first:
                        names |= {**parameters, "out_dir": folder}
        if "lab" not in names:
            raise ValueError(f"{notebook} has no `lab` whose jobs could be done ahead")
        place, jobs = str(Path(folder).resolve()), {}
        for where, spec in Noting.noted:
            where = out / Path(where).resolve().relative_to(place)
            spec = json.loads(
                json.dumps(spec).replace(json.dumps(place)[1:-1], json.dumps(str(out))[1:-1])
            )
            jobs[str(where), json.dumps(spec, sort_keys=True)] = Job(notebook, where, spec)
    return list(jobs.values())


def in_order(jobs: list[Job]) -> list[Job]:
    """With what each needs, told by the folders that it names, and the trainings that wait for it."""
    numbers = {str(job.folder): n for n, job in enumerate(jobs) if job.spec["job"] == "train"}
    for number, job in enumerate(jobs):
        text = json.dumps(job.spec)
        named = {
            n
            for f, n in numbers.items()
            if any(json.dumps(f + end) in text for end in ("", "/adapter"))
        }
        job.needs = {n for n in named if n < number}
    for job in reversed(jobs):
        job.long += (job.spec.get("train") or {}).get("iterations", 0)
        for needed in job.needs:
            jobs[needed].long = max(jobs[needed].long, job.long)
    return jobs


def do_all(
    jobs: list[Job], processes: int, launcher: str, notes: Path, log: Callable = print
) -> list[int]:
    """All of them, so many beside one another, each in the processes of a launcher, those with the most
    training after them first, an evaluation in all that are free, once these are half of them or nothing else
    is left to begin; the numbers of those that failed, or that wait for one that did."""
    began, left, done, failed = time.time(), set(range(len(jobs))), set(), set()
    running: dict[int, list[Served]] = {}
    ended: Queue = Queue()
    every = [Served(launcher, notes / str(k), tell=lambda line: None) for k in range(processes)]
    free = list(every)

    def work(number: int, served: Served, spec: dict) -> None:
        error = None
        try:
            served.do(spec, jobs[number].folder, first=True)
        except Exception as caught:  # told below, in the thread that hears of all
            error = caught
        ended.put((number, served, error))

    def start(number: int, width: int) -> None:
        job, running[number] = jobs[number], []
        shutil.rmtree(job.folder / shared_place(job.spec), ignore_errors=True)
        for rank in range(width):
            spec = {**job.spec, "share": [rank, width]} if width > 1 else job.spec
            running[number].append(free.pop())
            Thread(target=work, args=(number, running[number][-1], spec), daemon=True).start()

    try:
        while left or running:
            ready = sorted(
                (n for n in left if jobs[n].needs <= done), key=lambda n: (-jobs[n].long, n)
            )
            alone, there = [n for n in ready if jobs[n].spec["job"] != "evaluate"], len(free)
            for number in alone[:there]:
                start(number, 1)
            shared = [n for n in ready if n not in alone]
            if shared and len(alone) < there and (2 * len(free) >= processes or not running):
                start(shared[0], len(free))
            left -= {*running}
            if not running:
                return sorted(left | failed)
            try:
                number, served, error = ended.get(timeout=1)
            except Empty:  # so that Ctrl-C is heard
                continue
            running[number].remove(served)
            free.append(served)
            if error and number not in failed:
                failed.add(number)
                log(f"{jobs[number]} failed: {error}")
                for other in running[number]:  # they wait for it
                    other.stop()
            if not running[number]:
                del running[number]
                shutil.rmtree(
                    jobs[number].folder / shared_place(jobs[number].spec), ignore_errors=True
                )
                if number not in failed:
                    done.add(number)
                    log(
                        f"{report.duration(time.time() - began)}: {jobs[number]}, {len(done)} of {len(jobs)}"
                    )
        return sorted(failed)
    finally:
        for served in every:
            served.stop()


@contextmanager
def begun(chosen: Mapping[str, dict], profile: str, folder: Path) -> Iterator[list[str]]:
    """The folder of a run in which these notebooks are as if they had been cut off, so that `--resume` goes
    on with what will be there; those that are not done. What lies there of anything else is set aside."""
    with locked(folder, f"the jobs of the profile {profile}"):
        status, left = read_status(folder), []
        now = fingerprints(chosen, status)
        for notebook, parameters in chosen.items():
            there = status.get(notebook, {})
            if there.get("fingerprint") != now[notebook]:
                set_aside(folder, folder / notebook, folder / f"{notebook}.ipynb")
            elif there["state"] == "done":
                continue
            left.append(notebook)
            status[notebook] = {
                "state": "interrupted",
                "parameters": parameters,
                "fingerprint": now[notebook],
                "git": report.checkout(ROOT, folder),
                "resumed": True,
            }
        write_json(folder / "status.json", status)
        yield left


def run_ahead(
    profile: str,
    processes: int,
    only: str = "",
    overrides: Mapping | None = None,
    folder: Path | None = None,
    launcher: str = "local",
    log: Callable = print,
) -> list[Job]:
    """Do the jobs of a profile's notebooks ahead; those that were not done. Raises ValueError for a profile
    that has none, and FolderInUse while a run writes to the folder."""
    if processes < 1:
        raise ValueError(
            f"processes, the jobs beside one another, must be at least 1, not {processes}"
        )
    load_launcher(launcher)
    chosen = choose(profile, only, overrides or {})
    folder = (folder or RUNS / profile).resolve()
    notes = folder / ".ahead"
    with begun(chosen, profile, folder) as left:
        jobs = []
        for notebook in left:
            parameters = {**parameters_of(NOTEBOOKS / f"{notebook}.ipynb"), **chosen[notebook]}
            if "run_dir" in parameters and not parameters["run_dir"]:
                continue  # of what others came to, and they are not there yet
            found = plan(notebook, parameters, folder / notebook)
            log(f"{notebook}: {len(found)} jobs")
            jobs += found
        shutil.rmtree(notes, ignore_errors=True)
        failed = do_all(in_order(jobs), processes, launcher, notes, log)
    return [jobs[number] for number in failed]


def main() -> None:
    parser = profile_parser("python -m flowopd_lib.runs.ahead", __doc__)
    parser.add_argument("--processes", type=int, required=True, help="jobs beside one another")
    args = parser.parse_args()
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(1, args.processes)))
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        left = run_ahead(
            args.profile, args.processes, args.only, overrides_of(args.set), args.folder
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; the same command goes on from there")
    if left:
        sys.exit(
            f"error: {len(left)} jobs were not done, {left[0]} the first; the notebooks ask for them again"
        )
    print(f"python -m flowopd_lib.runs {args.profile} --resume makes the notebooks of them")


if __name__ == "__main__":
    main()
