"""A job in this process or, where torchrun, accelerate or srun started several, in all of them:
what `python -m flowopd_lib job` runs."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from ..benchmarks import DEFAULT
from ..config import read_yaml
from ..files import alive, write_whole
from ..precision import decide
from ..train import StepInfo
from .jobs import job_of, run_job
from .launch import POLL, STOPPED
from .workspace import Workspace


def make_accelerator(spec: Mapping[str, Any], folder: Path) -> Accelerator:
    """That of a job, with the tracker its training asks for (one that is not installed is an error
    later)."""
    train = spec.get("train")
    tracker = train.get("log_with") if isinstance(train, dict) else None
    tracker = tracker if tracker in map(str, get_available_trackers()) else None
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), log_with=tracker, project_dir=folder
    )
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
        main = self.accelerator.is_main_process
        if main:
            shown = " ".join(f"{name} {value:.4g}" for name, value in info.metrics.items())
            done = f"{info.iteration + 1}/{self.iterations} {info.seconds:.0f} s"
            print(f"{done} loss {info.loss:.4g} {shown}", flush=True)
        anybody = torch.tensor(float(self.stopping.is_set()), device=self.accelerator.device)
        stop = bool(self.accelerator.reduce(anybody, "sum") > 0)
        if stop:
            self.stopping.set()
            if main:
                print(
                    (f"{STOPPED} {info.iteration + 1}; the same command resumes there"), flush=True
                )
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
        process `parent` is gone. The model stays loaded, and its adapters until another notebook's
        first job."""
        workspaces, host = {}, platform.node()
        for number in itertools.count():
            file = queue / f"{number}.yaml"
            with contextlib.suppress(KeyboardInterrupt):  # asked to end, and there is nothing to do
                while not file.exists():
                    if os.environ.get("FLOWOPD_HEAD", host) == host and not alive(parent):
                        return
                    time.sleep(POLL)
            if not file.exists():
                return
            job = read_yaml(file)
            spec, folder = job["spec"], Path(job["folder"])
            job_of(spec)
            benchmark = spec.get("benchmark", DEFAULT)
            if job["first"]:
                for workspace in workspaces.values():
                    workspace.remove_adapters()
            if benchmark not in workspaces:
                workspaces[benchmark] = Workspace(benchmark, dtype, self.accelerator)
            self.run(spec, folder, workspaces[benchmark])
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
    configured = precision == "auto" and accelerator.mixed_precision == "bf16"
    dtype = decide(
        folder, ("bfloat16") if configured else precision, accelerator.device, write=False
    )
    # all have looked before the first writes, and a fault in the specification leaves no folder
    accelerator.wait_for_everyone()
    worker = Worker(accelerator)
    if spec is None:
        worker.serve(folder, parent, dtype)
    else:
        worker.run(spec, folder, Workspace(spec.get("benchmark", DEFAULT), dtype, accelerator))
