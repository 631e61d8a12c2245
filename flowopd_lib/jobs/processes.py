"""Jobs in the processes of a launcher, started and heard of from a notebook.

log.txt     what they printed, in a folder for notes
asked.yaml  the job that was asked for; where they serve several, 0.yaml, 1.yaml, ... and 0.done, 1.done, ...
serve.json  where they serve several: which process was started, by which launcher and for which process
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml
from filelock import FileLock, Timeout

from ..files import locked, write_json, write_whole
from .launchers import load_launcher

STOPPED = "stopped after iteration"
EVERY = 0.1  # seconds between two looks for what is next
# "PID FOLDER" in the kernels of a headless run: its process, and where notes of what serves them all are
RUN = "FLOWOPD_RUN"


class Processes:
    """A launcher's command with a job's arguments, in a session of its own: interrupting the kernel does not
    interrupt it. It is asked to stop when this process ends. Several processes have the 30 s that torchrun
    gives them for the iteration they are at."""

    def __init__(self, launcher: str, arguments: list[str], notes: Path):
        launched, self._environment = load_launcher(launcher)
        self.command, self.notes = [*launched, *arguments], notes
        self._process: subprocess.Popen | psutil.Process | None = None
        self._since = 0  # where in the log the present start begins

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, leave: bool = False) -> None:
        """Begin, or go on from what is there. `leave`: it may outlast this process."""
        if self.state == "running":
            raise RuntimeError(f"the job of {self.notes} is running already")
        self.notes.mkdir(parents=True, exist_ok=True)
        with (self.notes / "log.txt").open("a") as log:
            self._since = log.tell()
            self._process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        if not leave:
            atexit.register(self.stop)

    def take_over(self, process: psutil.Process) -> None:
        """What another process started, and left running."""
        self._process, self._since = process, (self.notes / "log.txt").stat().st_size

    def lines(self) -> list[str]:
        """The whole lines it printed since the present start."""
        with (self.notes / "log.txt").open(errors="replace") as log:
            log.seek(self._since)
            return [line.rstrip() for line in log.readlines() if line.endswith("\n")]

    @property
    def state(self) -> str:
        if self._process is None:
            return "waiting"
        code = self._code()
        if code is None:
            return "running"
        if any(STOPPED in line for line in self.lines()):
            return "stopped"
        return "failed" if code else "over"

    def _code(self) -> int | None:
        """The exit status; None while it runs. That of what was taken over is not known: it had no reason to
        end."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        return None if runs(self._process) else 1

    @property
    def error(self) -> str:
        """What it failed by: the first process that says so, or else its last lines."""
        if self.state != "failed":
            return ""
        said = self.lines()
        told = [line for line in said if line.startswith("error")]
        return told[0] if told else "\n".join(said[-8:]) or "it printed nothing"

    def stop(self) -> None:
        """Ask all its processes to end, a training after this iteration with a checkpoint."""
        if self.state == "running":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)

    def fail(self, what: str) -> None:
        """Raises RuntimeError, with what it failed by, if it did."""
        if self.state == "failed":
            raise RuntimeError(f"{what} failed: {self.error} (all of it: {self.notes / 'log.txt'})")


class Launched(Processes):
    """One job (see `work`), a training with a look every `look` iterations (0: none), in `precision`."""

    def __init__(
        self,
        spec: Mapping,
        folder: str | Path,
        launcher: str,
        look: int = 0,
        precision: str = "auto",
    ):
        self.spec, self.folder = dict(spec), Path(folder)
        self.iterations = (spec.get("train") or {}).get("iterations", 0)
        asked = [str(self.folder / "asked.yaml"), "--folder", str(self.folder)]
        super().__init__(
            launcher, [*asked, "--look", str(look), "--precision", precision], self.folder
        )

    def start(self) -> None:
        """Begin, or go on from what is in the folder."""
        if self.state == "running":
            raise RuntimeError(f"the job in {self.folder} is running already")
        with locked(self.folder, "a start of a job"):
            write_whole(self.folder / "asked.yaml", yaml.safe_dump(self.spec, sort_keys=False))
        super().start()

    def wait(self) -> None:
        """Until it has ended. Raises RuntimeError with what it failed by."""
        if self._process is not None:
            self._process.wait()
        self.fail(f"the job in {self.folder}")


class Served:
    """Jobs one after another in the same processes, which load the model once. A job that fails ends them,
    and the next one starts them anew. Those of a headless run (`RUN`) outlast the notebook, and another of
    its notebooks takes them over. `tell` gets the lines they print."""

    def __init__(
        self, launcher: str, notes: Path, tell: Callable[[str], Any] = partial(print, flush=True)
    ):
        pid, folder = os.environ.get(RUN, f"{os.getpid()} {notes}").split(" ", 1)
        self.launcher, self.parent, self.notes, self.tell = launcher, int(pid), Path(folder), tell
        self._processes: Processes | None = None
        self._number = self._told = 0
        self._first = True  # of this process, that what serves is asked

    def do(self, spec: Mapping, folder: Path, first: bool = False) -> None:
        """One job into a folder; its lines are told as they come. `first`: what was loaded for the one before
        is dropped. Raises RuntimeError with what it failed by, or where it was stopped."""
        what = f"the {spec.get('job', 'train')} job in {folder}"
        if self._processes is None or self._processes.state != "running":
            self._begin()
        processes = self._processes  # which another thread may stop
        number, self._number = self._number, self._number + 1
        asked = {"spec": dict(spec), "folder": str(folder.resolve()), "first": first or self._first}
        write_whole(processes.notes / f"{number}.yaml", yaml.safe_dump(asked, sort_keys=False))
        self._first, done = False, processes.notes / f"{number}.done"
        try:
            while not done.exists() and processes.state == "running":
                time.sleep(EVERY)
                self._tell(processes)
        except KeyboardInterrupt:  # the job is stopped, and with it the processes
            self.stop()
            raise
        self._tell(processes)
        if not done.exists():
            processes.fail(what)
            raise RuntimeError(f"{what} was stopped; the same cell goes on from there")

    def stop(self) -> None:
        if self._processes is not None:
            (self._processes.notes / "serve.json").unlink(
                missing_ok=True
            )  # nobody takes over what ends
            self._processes.stop()
            self._processes = None

    def _begin(self) -> None:
        """What serves the run and is not in use, or else new processes, which look for their jobs in a folder
        of their own."""
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
        self._processes, self._told, self._first = (
            Processes(self.launcher, arguments, notes),
            0,
            True,
        )
        self._number = len(list(notes.glob("*.yaml")))
        if process:
            self._processes.take_over(process)
        else:
            self._processes.start(leave=self.parent != os.getpid())
            pid = self._processes.pid
            made = {"pid": pid, "since": psutil.Process(pid).create_time()}
            write_json(
                notes / "serve.json", {**made, "launcher": self.launcher, "parent": self.parent}
            )

    def _tell(self, processes: Processes) -> None:
        lines = processes.lines()[self._told :]
        self._told += len(lines)
        for line in lines:
            self.tell(line)


def runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def serving(notes: Path, **how) -> psutil.Process | None:
    """The process that serves with these notes, if it runs and its record says `how`."""
    if not (notes / "serve.json").exists():
        return None
    record = json.loads((notes / "serve.json").read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(record["pid"])
        # the number may have gone to another one
        if (
            process.create_time() == record["since"]
            and runs(process)
            and how.items() <= record.items()
        ):
            return process
    return None


@contextlib.contextmanager
def shared(folder: Path) -> Iterator[dict[str, str]]:
    """The variable by which kernels share what serves them, with notes in a folder; at the end it is
    stopped."""
    try:
        yield {RUN: f"{os.getpid()} {folder.resolve()}"}
    finally:
        for notes in folder.glob("[0-9]*"):
            if process := serving(notes, parent=os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
