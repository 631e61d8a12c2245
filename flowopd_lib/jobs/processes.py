"""Jobs in the processes of a launcher, started and heard of from a notebook.

log.txt     what they printed, in a folder for notes
asked.yaml  the job that was asked for; where they serve several, 0.yaml, 1.yaml, ... and 0.done, 1.done, ...
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import yaml

from ..files import locked, write_whole
from .launchers import load_launcher

STOPPED = "stopped after iteration"
EVERY = 0.1  # seconds between two looks for what is next


class Processes:
    """A launcher's command with a job's arguments, in a session of its own: interrupting the kernel does not
    interrupt it. It is asked to stop when this process ends. Several processes have the 30 s that torchrun
    gives them for the iteration they are at."""

    def __init__(self, launcher: str, arguments: list[str], notes: Path):
        launched, self._environment = load_launcher(launcher)
        self.command, self.notes = [*launched, *arguments], notes
        self._process: subprocess.Popen | None = None
        self._since = 0  # where in the log the present start begins

    def start(self) -> None:
        """Begin, or go on from what is there."""
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
        atexit.register(self.stop)

    def lines(self) -> list[str]:
        """The whole lines it printed since the present start."""
        with (self.notes / "log.txt").open(errors="replace") as log:
            log.seek(self._since)
            return [line.rstrip() for line in log.readlines() if line.endswith("\n")]

    @property
    def state(self) -> str:
        if self._process is None:
            return "waiting"
        if self._process.poll() is None:
            return "running"
        if any(STOPPED in line for line in self.lines()):
            return "stopped"
        return "failed" if self._process.returncode else "over"

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
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)

    def fail(self, what: str) -> None:
        """Raises RuntimeError, with what it failed by, if it did."""
        if self.state == "failed":
            raise RuntimeError(f"{what} failed: {self.error} (all of it: {self.notes / 'log.txt'})")


class Launched(Processes):
    """One job (see `work`), a training with a look every `look` iterations (0: none), in `precision`."""

    def __init__(
        self, spec: Mapping, folder: str | Path, launcher: str, look: int = 0, precision: str = "auto"
    ):
        self.spec, self.folder = dict(spec), Path(folder)
        self.iterations = (spec.get("train") or {}).get("iterations", 0)
        asked = [str(self.folder / "asked.yaml"), "--folder", str(self.folder)]
        super().__init__(launcher, [*asked, "--look", str(look), "--precision", precision], self.folder)

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
    and the next one starts them anew."""

    def __init__(self, launcher: str, notes: Path):
        self.launcher, self.notes = launcher, Path(notes)
        self._processes: Processes | None = None
        self._number = self._told = 0

    def do(self, spec: Mapping, folder: Path) -> None:
        """One job into a folder; its lines are printed as they come. Raises RuntimeError with what it failed
        by, or where it was stopped."""
        what = f"the {spec.get('job', 'train')} job in {folder}"
        if self._processes is None or self._processes.state != "running":
            self._begin()
        number, self._number = self._number, self._number + 1
        asked = {"spec": dict(spec), "folder": str(folder.resolve())}
        write_whole(self._processes.notes / f"{number}.yaml", yaml.safe_dump(asked, sort_keys=False))
        done = self._processes.notes / f"{number}.done"
        try:
            while not done.exists() and self._processes.state == "running":
                time.sleep(EVERY)
                self._tell()
        except KeyboardInterrupt:  # the job is stopped, and with it the processes
            self._processes.stop()
            raise
        self._tell()
        if not done.exists():
            self._processes.fail(what)
            raise RuntimeError(f"{what} was stopped; the same cell goes on from there")

    def stop(self) -> None:
        if self._processes is not None:
            self._processes.stop()

    def _begin(self) -> None:
        """New processes, which look for their jobs in a folder of their own."""
        numbers = [int(p.name) for p in self.notes.glob("[0-9]*") if p.name.isdigit()]
        notes = self.notes / str(max(numbers, default=-1) + 1)
        arguments = ["--serve", str(notes.resolve()), "--parent", str(os.getpid())]
        self._processes, self._number, self._told = Processes(self.launcher, arguments, notes), 0, 0
        self._processes.start()

    def _tell(self) -> None:
        lines = self._processes.lines()[self._told :]
        self._told += len(lines)
        for line in lines:
            print(line, flush=True)
