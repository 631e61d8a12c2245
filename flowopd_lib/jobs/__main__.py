"""`python -m flowopd_lib.jobs SPEC.yaml --folder F`: one job, in this process or, where torchrun, accelerate
or srun started several, in all of them."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from ..inputs import read_yaml
from ..precision import NAMES, decide
from ..train import StepInfo
from ..worlds.world import DEFAULT
from . import recipes, work
from .launch import STOPPED, Look, some_prompts
from .site import Site
from .work import check_spec, run_job


def accelerator_of(spec: dict, folder: Path) -> Accelerator:
    """That of a job, with the tracker its training asks for; `build` tells of one that is not there."""
    train = spec.get("train")
    tracker = train.get("log_with") if isinstance(train, dict) else None
    tracker = tracker if tracker in map(str, get_available_trackers()) else None
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=tracker, project_dir=folder)
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed precision {accelerator.mixed_precision} is not supported; use no or bf16")
    if accelerator.device.type == "cpu" and accelerator.num_processes == 1:
        torch.set_num_threads(os.cpu_count())
    return accelerator


class Progress:
    """What a training tells of itself, and whether it is asked to stop: several processes hear of it at
    different moments, and must stop at the same iteration."""

    def __init__(self, accelerator: Accelerator, iterations: int):
        self.accelerator, self.iterations, self.asked = accelerator, iterations, threading.Event()

    def ask(self, number: int, _) -> None:
        if number == signal.SIGINT and self.asked.is_set():
            raise KeyboardInterrupt  # the second time: now, without a checkpoint
        self.asked.set()

    def __call__(self, info: StepInfo) -> bool:
        if self.accelerator.is_main_process:
            shown = " ".join(f"{name} {value:.4g}" for name, value in info.metrics.items())
            done = f"{info.iteration + 1}/{self.iterations} {info.seconds:.0f} s"
            print(f"{done} loss {info.loss:.4g} {shown}", flush=True)
        asked = torch.tensor(float(self.asked.is_set()), device=self.accelerator.device)
        stop = bool(self.accelerator.reduce(asked, "sum") > 0)
        if stop and self.accelerator.is_main_process:
            print(f"{STOPPED} {info.iteration + 1}; the same command goes on from there", flush=True)
        return stop


def looked_at(updates: Iterator[StepInfo], every: int, folder: Path, site: Site, objective) -> Iterator:
    """The updates of a training with a look between some."""
    if not site.main:
        return updates
    prompts = some_prompts(objective.schedule)
    look = Look(prompts, site.world.judges(site.device), every, site.world.sampler(20))
    return look.during(updates, site.policy, "student", folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flowopd_lib.jobs",
        description=f"{work.__doc__}\n\n{recipes.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("spec", type=Path, help="a YAML file: a recipe, or another job's specification")
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="for checkpoints, tables and adapters; the job goes on from what it holds",
    )
    parser.add_argument(
        "--look",
        type=int,
        default=0,
        help="after every so many iterations, draw and judge about six of its prompts into the folder; "
        "0: never",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", *NAMES),
        default="auto",
        help="auto: that of the folder, or of accelerate, or what is faster here",
    )
    args = parser.parse_args()
    if args.look < 0:
        parser.error(f"--look is a number of iterations, or 0, not {args.look}")
    rank = int(os.environ.get("RANK", 0))
    try:
        spec = read_yaml(args.spec)
        job = check_spec(spec)
        accelerator = accelerator_of(spec, args.folder)
        # accelerate's "no" is also what it says where nobody said anything
        said = args.precision == "auto" and accelerator.mixed_precision == "bf16"
        dtype = decide(args.folder, "bfloat16" if said else args.precision, accelerator.device, write=False)
        # all have looked before the first writes, and a fault in the specification leaves no folder
        accelerator.wait_for_everyone()
        site, how = Site(spec.get("world", DEFAULT), dtype, accelerator), {}
        if job == "train":
            progress = Progress(accelerator, (spec.get("train") or {}).get("iterations", 0))
            # to stop: by Ctrl-C, by a scheduler that wants its machine back, or by `launch`
            signal.signal(signal.SIGTERM, progress.ask)
            signal.signal(signal.SIGINT, progress.ask)
            how = {"told": progress, "shown": False}
            if args.look:
                how["during"] = lambda updates, *at: looked_at(updates, args.look, args.folder, *at)
        run_job(spec, args.folder, site, **how)
    except KeyboardInterrupt:
        sys.exit("error: interrupted; the same command goes on from the last checkpoint")
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}" if rank == 0 else f"error in process {rank}: {error}")


if __name__ == "__main__":
    main()
