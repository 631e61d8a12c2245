"""`python -m flowopd_lib.jobs SPEC.yaml --folder F`: one job, in this process or, where torchrun, accelerate
or srun started several, in all of them."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from ..benchmarks.benchmark import DEFAULT
from ..files import alive, write_whole
from ..inputs import read_yaml
from ..precision import NAMES, decide
from ..schedule import Schedule
from ..train import StepInfo
from . import recipes, work
from .launch import Look, some_prompts
from .processes import EVERY, STOPPED
from .site import Site
from .work import check_spec, run_job


def accelerator_of(spec: dict, folder: Path) -> Accelerator:
    """That of a job, with the tracker its training asks for; `build` tells of one that is not there."""
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


class Stopping:
    """What a training tells of itself, and whether it is asked to stop: several processes hear of it at
    different moments, and must stop at the same iteration. A job that is no training stops at once."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.asked, self.training = accelerator, threading.Event(), False
        # to stop: by Ctrl-C, by a scheduler that wants its machine back, or by `processes`
        signal.signal(signal.SIGTERM, self.ask)
        signal.signal(signal.SIGINT, self.ask)

    def ask(self, number: int, _) -> None:
        if not self.training or (number == signal.SIGINT and self.asked.is_set()):
            raise KeyboardInterrupt  # the second time: now, without a checkpoint
        self.asked.set()

    def __call__(self, info: StepInfo) -> bool:
        if self.accelerator.is_main_process:
            shown = " ".join(f"{name} {value:.4g}" for name, value in info.metrics.items())
            done = f"{info.iteration + 1}/{self.iterations} {info.seconds:.0f} s"
            print(f"{done} loss {info.loss:.4g} {shown}", flush=True)
        asked = torch.tensor(float(self.asked.is_set()), device=self.accelerator.device)
        stop = bool(self.accelerator.reduce(asked, "sum") > 0)
        if stop:
            self.asked.set()
            if self.accelerator.is_main_process:
                print(
                    f"{STOPPED} {info.iteration + 1}; the same command goes on from there",
                    flush=True,
                )
        return stop

    def run(self, spec: dict, folder: Path, site: Site, look: int = 0) -> None:
        """A job of any kind."""
        if spec.get("job", "train") != "train":
            run_job(spec, folder, site)
            return
        self.iterations, self.training = (spec.get("train") or {}).get("iterations", 0), True
        name = spec.get("name", "student")
        looks = (
            {"during": lambda updates, *at: looked_at(updates, look, folder, name, *at)}
            if look
            else {}
        )
        try:
            run_job(spec, folder, site, told=self, shown=False, **looks)
        finally:
            self.training = False


def looked_at(
    updates: Iterator[StepInfo], every: int, folder: Path, name: str, site: Site, objective
) -> Iterator:
    """The updates of a training of the adapter `name` with a look between some."""
    if not site.main:
        return updates
    schedule = getattr(objective, "schedule", None)
    if schedule is None:  # fine-tuning has examples
        by_task = {
            p.task: [q for q in objective.prompts if q.task == p.task] for p in objective.prompts
        }
        schedule = Schedule(by_task, 1)
    prompts = some_prompts(schedule)
    look = Look(prompts, site.benchmark.rewards(site.device), every, site.benchmark.sampler(20))
    return look.during(updates, site.policy, name, folder)


def serve(queue: Path, parent: int, accelerator: Accelerator, dtype: torch.dtype) -> None:
    """The jobs 0.yaml, 1.yaml, ... of a folder as they come, in all processes, until the process `parent` is
    gone. The model stays loaded, and its adapters until another notebook asks."""
    stopping, sites, host = Stopping(accelerator), {}, platform.node()
    for number in itertools.count():
        asked = queue / f"{number}.yaml"
        with contextlib.suppress(KeyboardInterrupt):  # asked to end, and there is nothing to do
            while not asked.exists():
                if os.environ.get("FLOWOPD_HEAD", host) == host and not alive(parent):
                    return
                time.sleep(EVERY)
        if not asked.exists():
            return
        job = read_yaml(asked)
        spec, folder = job["spec"], Path(job["folder"])
        check_spec(spec)
        benchmark = spec.get("benchmark", DEFAULT)
        if job["first"]:  # of another notebook, whose adapters may have the same names
            for site in sites.values():
                site.forget()
        if benchmark not in sites:
            sites[benchmark] = Site(benchmark, dtype, accelerator)
        stopping.run(spec, folder, sites[benchmark])
        if stopping.asked.is_set():
            return
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_whole(queue / f"{number}.done", "")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flowopd_lib.jobs",
        description=f"{work.__doc__}\n\n{recipes.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "spec", type=Path, nargs="?", help="a YAML file: a recipe, or another job's specification"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="for checkpoints, tables and adapters; the job goes on from what it holds",
    )
    parser.add_argument(
        "--look",
        type=int,
        default=0,
        help="after every so many iterations, draw and reward about six of its prompts into the folder; "
        "0: never",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", *NAMES),
        default="auto",
        help="auto: that of the folder, or of accelerate, or what is faster here",
    )
    parser.add_argument(
        "--serve", type=Path, metavar="QUEUE", help="for notebooks: their jobs as they come"
    )
    parser.add_argument(
        "--parent", type=int, default=0, help="with --serve: until this process is gone"
    )
    args = parser.parse_args()
    if args.look < 0:
        parser.error(f"--look is a number of iterations, or 0, not {args.look}")
    if not args.serve and not (args.spec and args.folder):
        parser.error("a job needs its specification and --folder")
    rank, place = int(os.environ.get("RANK", 0)), args.serve or args.folder
    try:
        spec = {} if args.serve else read_yaml(args.spec)
        if not args.serve:
            check_spec(spec)
        accelerator = accelerator_of(spec, place)
        # accelerate's "no" is also what it says where nobody said anything
        said = args.precision == "auto" and accelerator.mixed_precision == "bf16"
        dtype = decide(
            place, "bfloat16" if said else args.precision, accelerator.device, write=False
        )
        # all have looked before the first writes, and a fault in the specification leaves no folder
        accelerator.wait_for_everyone()
        if args.serve:
            serve(place, args.parent, accelerator, dtype)
        else:
            site = Site(spec.get("benchmark", DEFAULT), dtype, accelerator)
            Stopping(accelerator).run(spec, place, site, args.look)
    except KeyboardInterrupt:
        sys.exit("error: interrupted; the same command goes on from the last checkpoint")
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}" if rank == 0 else f"error in process {rank}: {error}")


if __name__ == "__main__":
    main()
