"""Jobs outside the notebook's main thread: in a thread, in processes of their own, or in those of a
launcher.

A launcher is a command line in whose processes jobs run. `papermill_runs/launchers/NAME.yaml` has a
`command`, bash in which "$@" stands for the arguments and $PYTHON for this interpreter, and
`environment`, more variables. What the command starts runs `-m flowopd_lib job "$@"` in every
process; torch.distributed's variables say which of them it is.

Files in a folder of notes: log.txt, what they printed; job.yaml, the job; where they serve several
jobs 0.yaml, 1.yaml, ... and 0.done, 1.done, ..., and queue.json, which process was started, by
which launcher and for which process.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml
from filelock import FileLock, Timeout

from ..config import Config, choose, read_yaml, validate
from ..files import RUNS, locked, write_json, write_whole
from ..train import StepInfo
from .jobs import run_job
from .workspace import Workspace

STOPPED = "stopped after iteration"
POLL = 0.1  # seconds between two looks for what is next
# "PID FOLDER" in the kernels of a headless run: its process, and where notes of what serves them
# all are
RUN = "FLOWOPD_RUN"


class LauncherConfig(Config):
    command: str
    environment: dict[str, str] = {}


def load_launcher(name: str) -> tuple[list[str], dict[str, str]]:
    """The command before a job's arguments, and its environment. Raises ValueError for a name or a
    file that is none."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    else:
        names = {p.stem: p for p in sorted((RUNS / "launchers").glob("*.yaml"))}
        path = names[choose("launcher", name, names)]
    config = validate(LauncherConfig, read_yaml(path), str(path))
    if '"$@"' not in config.command:
        raise ValueError(f'{path} needs a command in which "$@" stands for the job\'s arguments')
    environment = {**os.environ, "PYTHON": sys.executable, "FLOWOPD_HEADLESS": "1"}
    environment["FLOWOPD_HEAD"] = platform.node()  # the host of the process that asks
    return ["bash", "-c", config.command, "job"], {**environment, **config.environment}


class ThreadJob:
    """A job in a thread of this process; the workspace's policy is the thread's until it ends. A
    kernel that goes loses what came after the last checkpoint."""

    def __init__(self, spec: Mapping[str, Any], folder: str | Path, workspace: Workspace):
        self.spec, self.folder, self.workspace = dict(spec), Path(folder), workspace
        self.iterations = (spec.get("train") or {}).get("iterations", 0)
        self.state, self.error = "waiting", ""  # waiting, running, stopped, finished, failed
        self._stop, self._thread = threading.Event(), None

    def start(self) -> None:
        """Start, or resume from the checkpoint in the folder."""
        if self.state == "running":
            raise RuntimeError(f"the job in {self.folder} is running already")
        self._stop.clear()
        self.state, self.error = "running", ""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        stopped = False

        def on_step(info: StepInfo) -> bool:
            nonlocal stopped
            stopped = self._stop.is_set()
            return stopped

        workspace, state = self.workspace, "failed"
        workspace.on_step, workspace.show_progress = on_step, False
        try:
            run_job(self.spec, self.folder, workspace)
            state = "stopped" if stopped else "finished"
        except Exception as error:  # a thread's errors are seen by nobody else
            self.error = f"{type(error).__name__}: {error}"
        finally:
            workspace.on_step, workspace.show_progress = None, True
        self.state = state

    def stop(self) -> None:
        """Ask it to end after this iteration, with a checkpoint."""
        self._stop.set()

    def wait(self) -> None:
        """Until it has ended. Raises RuntimeError with what it failed by."""
        if self._thread is not None:
            self._thread.join()
        if self.state == "failed":
            raise RuntimeError(f"the job in {self.folder} failed: {self.error}")


class Processes:
    """A launcher's command with arguments, in a session of its own: interrupting the kernel does
    not interrupt it. It is asked to stop when this process ends."""

    def __init__(self, launcher: str, arguments: list[str], notes: Path):
        command, self._environment = load_launcher(launcher)
        self.command, self.notes = [*command, *arguments], notes
        self._process: subprocess.Popen | psutil.Process | None = None
        self._log_start = 0  # where in the log the present start begins

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, outlast: bool = False) -> None:
        """`outlast`: it may outlast this process."""
        if self.state == "running":
            raise RuntimeError(f"the job of {self.notes} is running already")
        self.notes.mkdir(parents=True, exist_ok=True)
        with (self.notes / "log.txt").open("a") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        if not outlast:
            atexit.register(self.stop)

    def adopt(self, process: psutil.Process) -> None:
        """What another process started, and left running."""
        self._process, self._log_start = process, (self.notes / "log.txt").stat().st_size

    def lines(self) -> list[str]:
        """The whole lines printed since the present start."""
        with (self.notes / "log.txt").open(errors="replace") as log:
            log.seek(self._log_start)
            return [line.rstrip() for line in log.readlines() if line.endswith("\n")]

    @property
    def state(self) -> str:
        if self._process is None:
            return "waiting"
        if isinstance(self._process, subprocess.Popen):
            code = self._process.poll()
        else:  # the status of an adopted process is not known: it had no reason to end
            code = None if is_running(self._process) else 1
        if code is None:
            return "running"
        if any(STOPPED in line for line in self.lines()):
            return "stopped"
        return "failed" if code else "finished"

    @property
    def error(self) -> str:
        """What it failed by: the first process that says so, or else its last lines."""
        if self.state != "failed":
            return ""
        lines = self.lines()
        errors = [line for line in lines if line.startswith("error")]
        return errors[0] if errors else "\n".join(lines[-8:]) or "it printed nothing"

    def stop(self) -> None:
        """Ask all its processes to end, a training after this iteration with a checkpoint."""
        if self.state == "running":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)

    def raise_error(self, what: str) -> None:
        if self.state == "failed":
            raise RuntimeError(f"{what} failed: {self.error} (all of it: {self.notes / 'log.txt'})")


class LaunchedJob(Processes):
    """One job by a launcher, in `precision`."""

    def __init__(
        self, spec: Mapping[str, Any], folder: str | Path, launcher: str, precision: str = "auto"
    ):
        self.spec, self.folder = dict(spec), Path(folder)
        self.iterations = (spec.get("train") or {}).get("iterations", 0)
        arguments = [
            str(self.folder / ("job.yaml")),
            "--folder",
            str(self.folder),
            "--precision",
            precision,
        ]
        super().__init__(launcher, arguments, self.folder)

    def start(self) -> None:
        """Start, or resume from what is in the folder."""
        if self.state == "running":
            raise RuntimeError(f"the job in {self.folder} is running already")
        with locked(self.folder, "a start of a job"):
            write_whole(self.folder / "job.yaml", yaml.safe_dump(self.spec, sort_keys=False))
        super().start()

    def wait(self) -> None:
        """Until it has ended. Raises RuntimeError with what it failed by."""
        if self._process is not None:
            self._process.wait()
        self.raise_error(f"the job in {self.folder}")


class JobQueue:
    """Jobs one after another in the same processes, which load the model once. A job that fails
    ends them, and the next one starts them anew. Those of a headless run (`RUN`) outlast the
    notebook, and another of its notebooks adopts them. `report` gets the lines they print."""

    def __init__(
        self, launcher: str, notes: Path, report: Callable[[str], Any] = partial(print, flush=True)
    ):
        pid, folder = os.environ.get(RUN, f"{os.getpid()} {notes}").split(" ", 1)
        self.launcher, self.parent, self.notes, self.report = (
            launcher,
            int(pid),
            Path(folder),
            report,
        )
        self._processes: Processes | None = None
        self._number = self._reported = 0
        self._first = True  # job of this process

    def run(self, spec: Mapping[str, Any], folder: Path) -> None:
        """One job into a folder. Raises RuntimeError with what it failed by, or where it was
        stopped."""
        what = f"the {spec.get('job', 'train')} job in {folder}"
        if self._processes is None or self._processes.state != "running":
            self._begin()
        processes = self._processes  # which another thread may stop
        number, self._number = self._number, self._number + 1
        # of the first job of a notebook: adapters of another one may have the same names
        job = {"spec": dict(spec), "folder": str(folder.resolve()), "first": self._first}
        write_whole(processes.notes / f"{number}.yaml", yaml.safe_dump(job, sort_keys=False))
        self._first, done = False, processes.notes / f"{number}.done"
        try:
            while not done.exists() and processes.state == "running":
                time.sleep(POLL)
                self._report(processes)
        except KeyboardInterrupt:  # the job is stopped, and with it the processes
            self.stop()
            raise
        self._report(processes)
        if not done.exists():
            processes.raise_error(what)
            raise RuntimeError(f"{what} was stopped; run the same cell again to resume")

    def stop(self) -> None:
        if self._processes is not None:
            (self._processes.notes / ("queue.json")).unlink(
                missing_ok=True
            )  # nobody adopts what ends
            self._processes.stop()
            self._processes = None

    def _begin(self) -> None:
        """What serves the run and is not in use, or else new processes, which look for their jobs
        in a folder of their own."""
        for number in itertools.count():
            notes = self.notes / str(number)
            notes.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(notes / ".lock", timeout=0)  # goes with this process
            with contextlib.suppress(Timeout):
                self._lock.acquire()
                process = serving(notes, launcher=self.launcher, parent=self.parent)
                if process or not (notes / "log.txt").exists():
                    break
                self._lock.release()
        arguments = ["--serve", str(notes.resolve()), "--parent", str(self.parent)]
        self._processes, self._reported = Processes(self.launcher, arguments, notes), 0
        self._first, self._number = True, len(list(notes.glob("*.yaml")))
        if process:
            self._processes.adopt(process)
        else:
            self._processes.start(outlast=self.parent != os.getpid())
            pid = self._processes.pid
            made = {"pid": pid, "since": psutil.Process(pid).create_time()}
            write_json(
                notes / ("queue.json"), {**made, "launcher": self.launcher, "parent": self.parent}
            )

    def _report(self, processes: Processes) -> None:
        lines = processes.lines()[self._reported :]
        self._reported += len(lines)
        for line in lines:
            self.report(line)


def is_running(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def serving(notes: Path, **of) -> psutil.Process | None:
    """The process that serves with these notes, if it runs and its record has these values."""
    if not (notes / "queue.json").exists():
        return None
    record = json.loads((notes / "queue.json").read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(record["pid"])
        # the number may have gone to another process
        same = process.create_time() == record["since"] and of.items() <= record.items()
        if same and is_running(process):
            return process
    return None


@contextlib.contextmanager
def shared_queue(folder: Path) -> Iterator[dict[str, str]]:
    """The variable by which kernels share what serves them, with notes in a folder; at the end it
    is stopped."""
    try:
        yield {RUN: f"{os.getpid()} {folder.resolve()}"}
    finally:
        for notes in folder.glob("[0-9]*"):
            if process := serving(notes, parent=os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
