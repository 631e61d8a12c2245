"""A list of jobs, several at once: the trainings of an experiment, without its notebook."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

from pydantic import Field

from ..config import Config, validate
from ..files import locked
from ..lab.jobs import job_of
from ..lab.launch import JobQueue
from .execute import threads_each


class Job(Config):
    """`spec`: as `python -m flowopd_lib job` takes it; `folder`: where it leaves its results."""

    spec: dict[str, Any]
    folder: str


def run_jobs(
    jobs: Sequence[Any], processes: int, notes: Path, launcher: str = "local", log: Callable = print
) -> None:
    """Run a list of jobs (see `Job`) in its order, as many at once as there are worker processes,
    each with its part of the cores. `notes`: a folder for their logs. Finished jobs are found done,
    interrupted ones resume.

    Raises ValueError for a specification that is none, before any starts, and RuntimeError, after
    all others, if some failed.
    """
    jobs = validate(Annotated[list[Job], Field(min_length=1)], jobs, "the list of jobs")
    for job in jobs:
        job_of(job.spec)
    left, failed = list(reversed(jobs)), []

    def work(queue: JobQueue) -> None:
        while left:
            job = left.pop()
            try:
                queue.run(job.spec, Path(job.folder))
                log(f"{job.folder}: done, {len(left)} jobs left to start")
            except RuntimeError as error:
                failed.append(f"{job.folder}: {error}")
                log(f"{job.folder} failed: {error}")

    environment = patch.dict(os.environ, {"OMP_NUM_THREADS": threads_each(processes)})
    with locked(notes, "a list of jobs"), environment, ThreadPoolExecutor(processes) as pool:
        count = min(processes, len(jobs))
        queues = [JobQueue(launcher, notes / str(n), lambda line: None) for n in range(count)]
        try:
            list(pool.map(work, queues))
        finally:
            left.clear()
            for queue in queues:
                queue.stop()
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(jobs)} jobs failed; the first: {failed[0]}")
