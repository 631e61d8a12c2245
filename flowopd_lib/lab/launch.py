"""Jobs in processes of their own.

A launcher is a command line in whose processes jobs run. `papermill_runs/launchers/NAME.yaml` has a
`command`, bash in which "$@" stands for the arguments and $PYTHON for this interpreter, and
`environment`, more variables. What the command starts runs `-m flowopd_lib job "$@"` in every
process, which is `work`; torch.distributed's variables say which of them it is.

Files in a folder of notes: log.txt, what they printed; job.yaml, the job; where they serve several
jobs 0.yaml, 1.yaml, ... and 0.done, 1.done, ...
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from ..benchmarks import DEFAULT
from ..config import Config, choose, read_yaml, validate
from ..files import RUNS, write_whole
from ..loading import choose_device, decide
from ..rewards.remote import PATIENCE
from ..train import StepInfo
from .jobs import job_of, run_job
from .workspace import Workspace

STOPPED = "stopped after iteration"
POLL = 0.1  # seconds between two looks for what is next


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


class Processes:
    """A launcher's command with arguments, in a session of its own: interrupting the kernel does
    not interrupt it. It is asked to stop when this process ends."""

    def __init__(self, launcher: str, arguments: list[str], notes: Path):
        command, self._environment = load_launcher(launcher)
        self.command, self.notes = [*command, *arguments], notes
        self.process: subprocess.Popen | None = None
        self._log_start = 0  # where in the log the present start begins

    def start(self) -> None:
        if self.state == "running":
            raise RuntimeError(f"the job of {self.notes} is running already")
        self.notes.mkdir(parents=True, exist_ok=True)
        how = {"env": self._environment, "start_new_session": True}
        with (self.notes / "log.txt").open("a") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, **how
            )
        atexit.register(self.stop)

    def lines(self) -> list[str]:
        """The whole lines printed since the present start."""
        with (self.notes / "log.txt").open(errors="replace") as log:
            log.seek(self._log_start)
            return [line.rstrip() for line in log.readlines() if line.endswith("\n")]

    @property
    def state(self) -> str:
        """waiting, running, stopped, finished or failed."""
        if self.process is None:
            return "waiting"
        code = self.process.poll()
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
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)

    def raise_error(self, what: str) -> None:
        if self.state == "failed":
            raise RuntimeError(f"{what} failed: {self.error} (all of it: {self.notes / 'log.txt'})")


class LaunchedJob(Processes):
    """One job by a launcher."""

    def __init__(self, spec: Mapping[str, Any], folder: str | Path, launcher: str):
        self.spec, self.folder = dict(spec), Path(folder)
        self.iterations = (spec.get("train") or {}).get("iterations", 0)
        arguments = [str(self.folder / "job.yaml"), "--folder", str(self.folder)]
        super().__init__(launcher, arguments, self.folder)

    def start(self) -> None:
        """Start, or resume from what is in the folder."""
        write_whole(self.folder / "job.yaml", yaml.safe_dump(self.spec, sort_keys=False))
        super().start()

    def wait(self) -> None:
        """Until it has ended. Raises RuntimeError with what it failed by."""
        self.process.wait()
        self.raise_error(f"the job in {self.folder}")


class JobQueue:
    """Jobs one after another in the same processes, which load the model once. A job that fails
    ends them, and the next one starts them anew. What they print is printed here."""

    def __init__(self, launcher: str, notes: Path):
        self.launcher, self.notes = launcher, notes
        self._processes: Processes | None = None

    def run(self, spec: Mapping[str, Any], folder: Path) -> None:
        """One job into a folder. Raises RuntimeError with what it failed by, or where it was
        stopped."""
        what = f"the {spec.get('job', 'train')} job in {folder}"
        if self._processes is None or self._processes.state != "running":
            self._start()
        processes = self._processes  # which another thread may stop
        number, self._number = self._number, self._number + 1
        job = {"spec": dict(spec), "folder": str(folder.resolve())}
        write_whole(processes.notes / f"{number}.yaml", yaml.safe_dump(job, sort_keys=False))
        done = processes.notes / f"{number}.done"
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
            self._processes.stop()
            self._processes = None

    def _start(self) -> None:
        """New processes, which look for their jobs in a folder of their own."""
        folders = (self.notes / str(number) for number in itertools.count())
        notes = next(folder for folder in folders if not folder.exists())
        arguments = ["--serve", str(notes.resolve()), "--parent", str(os.getpid())]
        self._processes = Processes(self.launcher, arguments, notes)
        self._number = self._reported = 0
        self._processes.start()

    def _report(self, processes: Processes) -> None:
        lines = processes.lines()[self._reported :]
        self._reported += len(lines)
        for line in lines:
            print(line, flush=True)


# ---- in the processes that were started


def make_accelerator(spec: Mapping[str, Any], folder: Path) -> Accelerator:
    """That of a job, with the tracker that its training asks for."""
    train = spec.get("train")
    tracker = train.get("log_with") if isinstance(train, dict) else None
    on_cpu = choose_device().type == "cpu"
    wait = InitProcessGroupKwargs(timeout=timedelta(seconds=PATIENCE))
    options = {"log_with": tracker, "project_dir": folder, "kwargs_handlers": [wait]}
    accelerator = Accelerator(cpu=on_cpu, **options)
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed precision {accelerator.mixed_precision} is not supported; use no or bf16"
        )
    alone = accelerator.device.type == "cpu" and accelerator.num_processes == 1
    if alone and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count())
    return accelerator


class Worker:
    """Runs jobs and stops them: several processes get a signal at different moments, and must stop
    a training at the same iteration. A job that is no training stops at once."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.stopping, self.training = accelerator, threading.Event(), False
        # by Ctrl-C, by a scheduler that wants its machine back, or by `Processes.stop`
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, _) -> None:
        if not self.training or (number == signal.SIGINT and self.stopping.is_set()):
            raise KeyboardInterrupt  # the second time: now, without a checkpoint
        self.stopping.set()

    def on_step(self, info: StepInfo) -> bool:
        done, main = info.iteration + 1, self.accelerator.is_main_process
        if main:
            shown = " ".join(f"{name} {value:.4g}" for name, value in info.metrics.items())
            progress = f"{done}/{self.iterations} {info.seconds:.0f} s"
            print(f"{progress} loss {info.loss:.4g} {shown}", flush=True)
        anybody = torch.tensor(float(self.stopping.is_set()), device=self.accelerator.device)
        stop = bool(self.accelerator.reduce(anybody, "sum") > 0)
        if stop:
            self.stopping.set()
            if main:
                print(f"{STOPPED} {done}; the same command resumes there", flush=True)
        return stop

    def run(self, spec: Mapping[str, Any], folder: Path, workspace: Workspace) -> None:
        self.training = spec.get("job", "train") == "train"
        self.iterations = (spec.get("train") or {}).get("iterations", 0) if self.training else 0
        workspace.on_step, workspace.show_progress = self.on_step, not self.training
        try:
            run_job(spec, folder, workspace)
        finally:
            self.training = False

    def serve(self, queue: Path, parent: int, dtype: torch.dtype) -> None:
        """The jobs 0.yaml, 1.yaml, ... of a folder as they come, in all processes, until the
        process `parent` is gone. The model stays loaded."""
        workspaces, here = {}, os.environ.get("FLOWOPD_HEAD") == platform.node()
        for number in itertools.count():
            file = queue / f"{number}.yaml"
            with contextlib.suppress(KeyboardInterrupt):  # asked to end, and there is nothing to do
                while not file.exists():
                    if here and not psutil.pid_exists(parent):
                        return
                    time.sleep(POLL)
            if not file.exists():
                return
            job = read_yaml(file)
            benchmark = job["spec"].get("benchmark", DEFAULT)
            if benchmark not in workspaces:
                workspaces[benchmark] = Workspace(benchmark, dtype, self.accelerator)
            self.run(job["spec"], Path(job["folder"]), workspaces[benchmark])
            if self.stopping.is_set():
                return
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                write_whole(queue / f"{number}.done", "")


def work(
    spec: Mapping[str, Any] | None, folder: Path, precision: str = "auto", parent: int = 0
) -> None:
    """One job into `folder`, or with no `spec` the jobs that come into it."""
    if spec is not None:
        job_of(spec)
    accelerator = make_accelerator(spec or {}, folder)
    # accelerate's "no" is also what it says where nothing was configured
    if precision == "auto" and accelerator.mixed_precision == "bf16":
        precision = "bfloat16"
    dtype = decide(folder, precision, accelerator.device, write=False)
    # all have looked before the first writes, and a fault in the specification leaves no folder
    accelerator.wait_for_everyone()
    worker = Worker(accelerator)
    if spec is None:
        worker.serve(folder, parent, dtype)
    else:
        worker.run(spec, folder, Workspace(spec.get("benchmark", DEFAULT), dtype, accelerator))
