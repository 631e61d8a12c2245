"""A list of jobs, several at once: the trainings of an experiment, without its notebook."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

from pydantic import Field, field_validator

from ..config import Config, Count, read_yaml, validate
from ..lab.jobs import job_of
from ..lab.launch import POLL, LaunchedJob


class ListedJob(Config):
    """`spec`: as `python -m flowopd_lib job` takes it; `folder`: for its results and its log."""

    folder: str
    spec: dict[str, Any]

    @field_validator("spec")
    def _is_a_job(spec: dict[str, Any]):
        job_of(spec)
        return spec


def run_jobs(path: Path, processes: int, launcher: str = "local", log: Callable = print) -> None:
    """Start the jobs of a YAML file in its order, `processes` at once, each with its part of the
    cores, and wait for them. Finished jobs find their results, interrupted ones resume.

    Raises ValueError, before any starts, for a list with a fault, and at the end RuntimeError if
    some jobs failed. When this process is interrupted, so are the jobs.
    """
    jobs = validate(Annotated[list[ListedJob], Field(min_length=1)], read_yaml(path), str(path))
    processes = min(validate(Count, processes, "processes"), len(jobs))
    with patch.dict(os.environ, {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // processes))}):
        waiting = [LaunchedJob(job.spec, job.folder, launcher) for job in jobs]
    running, failed = [], []
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                running.append(waiting.pop(0))
                running[-1].start()
            time.sleep(POLL)
            for job in [job for job in running if job.state != "running"]:
                running.remove(job)
                result = f"{job.folder} {job.state}" + (f": {job.error}" if job.error else "")
                failed += [result] if job.state != "finished" else []
                log(f"[{len(jobs) - len(waiting) - len(running)}/{len(jobs)}] {result}")
    finally:
        for job in running:
            job.stop()
        for job in running:
            job.process.wait()
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(jobs)} jobs did not finish; first {failed[0]}")
