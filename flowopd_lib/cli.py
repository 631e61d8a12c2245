"""Flow-OPD lab from the command line: trainings, evaluations, headless runs of the notebooks."""

from __future__ import annotations

import argparse
import inspect
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

# A command is a function: its arguments are the command's (those after the * its options), its
# docstring is the help. What it needs is imported inside, so that `--help` is quick.
File = Annotated[Path, "a YAML file"]
Folder = Annotated[Path, "for results and checkpoints; what is there is resumed"]
Precision = Annotated[str, "auto (the folder's, accelerate's, or the faster), float32, bfloat16"]
Run = Annotated[Path, "a run's folder, such as papermill_runs/lab"]
Some = Annotated[list[str], "some of them (default: all)"]


def train(recipe: File, *, folder: Folder, precision: Precision = "auto") -> None:
    """Train an adapter by a recipe, or resume its training.

    Under `accelerate launch` or torchrun all processes share the work. The recipe's keys are
    described in flowopd_lib/lab/recipe.py; examples are in papermill_runs/recipes.
    """
    _work(recipe, folder, precision, job="train")


def evaluate(spec: File, *, folder: Folder, precision: Precision = "auto") -> None:
    """Sample and score models on a benchmark's prompts, or resume.

    The file says `models: {base: null, mine: FOLDER}` and more: see EvaluateJob in
    flowopd_lib/lab/jobs.py. The table is samples.parquet in the folder.
    """
    _work(spec, folder, precision, job="evaluate")


def job(
    spec: Annotated[Path | None, "a YAML file with `job: train` or another job"] = None,
    *,
    folder: Annotated[Path | None, "for its results"] = None,
    precision: Precision = "auto",
    serve: Annotated[Path | None, "do the jobs that come into this folder"] = None,
    parent: Annotated[int, "with --serve: until the process of this number ends"] = 0,
) -> None:
    """Run one job of any kind: what launchers start.

    With --serve it takes a notebook's jobs as they come, and keeps the model loaded.
    """
    if not serve and not (spec and folder):
        raise ValueError("a job needs its specification and --folder, or --serve")
    _work(None if serve else spec, serve or folder, precision, parent)


def _work(path: Path | None, folder: Path, precision: str, parent: int = 0, **job: str) -> None:
    from .config import read_yaml, validate
    from .lab.launch import work

    spec = path and validate(dict[str, Any], read_yaml(path), str(path)) | job
    work(spec, folder, precision, parent)


def run(
    profile: Annotated[str, "one of papermill_runs/profiles, or a YAML file"],
    *,
    only: Annotated[str, "notebooks that begin with this, such as 00"] = "",
    set: Annotated[list[str], "parameters as NAME=VALUE, for the notebooks that have them"] = [],
    folder: Annotated[Path | None, "of the run (default: papermill_runs/PROFILE)"] = None,
    resume: Annotated[bool, "keep what is done and unchanged, continue the rest"] = False,
    jobs: Annotated[int, "notebooks at once (default: 1)"] = 1,
) -> None:
    """Execute the notebooks of a profile headlessly, and write report.html."""
    from .runs.runner import parse_overrides, run_profile

    folder = run_profile(profile, only, parse_overrides(set), folder, resume, jobs)
    print(f"see {folder / 'report.html'}")


def jobs(
    list: Annotated[Path, "a YAML file: `- {folder: F, spec: {job: train, ...}}`"],
    *,
    processes: Annotated[int, "jobs at once"],
    launcher: Annotated[str, "what starts each (default: local)"] = "local",
) -> None:
    """Run a list of jobs, several at once: finished ones are skipped, others resume."""
    from .runs.jobs import run_jobs

    run_jobs(list, processes, launcher)


def check(benchmark: Annotated[str, "a shipped benchmark's name, or a YAML file"]) -> None:
    """Check a benchmark before a long run: prompts, experts, rewards, one update."""
    from .check import check, print_rows

    if not print_rows(check(benchmark)):
        raise ValueError("some checks failed; see the table")


def export(
    training: Annotated[Path, "the folder of a finished training"],
    *,
    out: Annotated[Path, "a new folder"],
    license: Annotated[str, "its name on the hub, such as apache-2.0"],
) -> None:
    """Write a trained adapter in diffusers' format, with a model card."""
    from .export import export_training

    print(export_training(training, out, license))


def bench(
    *,
    model: Annotated[str, "a benchmark, or sd35-random (default: tiny)"] = "tiny",
    batch_sizes: Annotated[list[int], "images in a batch (default: 8 32)"] = [8, 32],
    out: Annotated[Path | None, "a JSON file for the results"] = None,
) -> None:
    """Measure speed and memory: rollouts, updates, evaluations."""
    import json

    from .bench import run

    print(json.dumps(run(model, batch_sizes, out=out), indent=1))


def build(*, work: Folder, only: Some = []) -> None:
    """Build the small benchmark into flowopd_lib/assets: prompts, model, reward models."""
    from .benchmarks.tiny.build import build

    build(work, only)


def experts(*, work: Folder, only: Some = []) -> None:
    """Train the small benchmark's experts by their recipes into flowopd_lib/assets/experts."""
    from .benchmarks.tiny.build import train_experts

    train_experts(work, only)


def publish(
    run: Run,
    *,
    out: Annotated[Path, "default: papermill_runs/reference"] = Path("papermill_runs/reference"),
    page: Annotated[Path, "default: docs/results.md"] = Path("docs/results.md"),
) -> None:
    """Make a finished run small enough to commit, and write the page of its results."""
    from .runs.publish import publish

    print(f"{out}: {publish(run, out, page) / 1e6:.1f} MB; see {page}")


def diff(run_a: Run, run_b: Run) -> None:
    """Show what differs between two runs: parameters, scores with intervals."""
    from .runs.report import compare

    compare(run_a, run_b)


def cache(run: Run) -> None:
    """Copy a run's finished trainings to papermill_runs/trainings, where later runs find them."""
    from .lab.cache import publish

    for row in publish(run):
        print(", ".join(f"{key} {value}" for key, value in row.items()))


COMMANDS = "train evaluate job run jobs check export bench build experts publish diff cache".split()


def add_command(parsers: Any, name: str) -> None:
    function = globals()[name]
    text = inspect.getdoc(function)
    parser = parsers.add_parser(name, help=text.splitlines()[0], description=text)
    parser.set_defaults(function=function)
    for name, argument in inspect.signature(function, eval_str=True).parameters.items():
        kind, optional = argument.annotation.__origin__, argument.default is not argument.empty
        options = {"help": argument.annotation.__metadata__[0]}
        options |= {"default": argument.default} if optional else {}
        if kind is bool:
            options["action"] = "store_true"
        else:
            options["type"] = (get_args(kind) or (kind,))[0]
        if get_origin(kind) is list:
            options["nargs"] = "+"
            if not argument.default:  # given twice, all count
                options["action"] = "extend"
        if argument.kind is argument.KEYWORD_ONLY:
            name, options["required"] = f"--{name.replace('_', '-')}", not optional
        elif optional:
            options["nargs"] = "?"
        parser.add_argument(name, **options)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m flowopd_lib", description=__doc__)
    parsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        add_command(parsers, name)
    values = vars(parser.parse_args(words))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill ends as Ctrl-C does
    try:
        values.pop("function")(**values)
    except KeyboardInterrupt:
        sys.exit("error: interrupted; the same command resumes (a run: with --resume)")
    except (OSError, ValueError, RuntimeError) as error:
        rank = int(os.environ.get("RANK", 0))
        sys.exit(f"error in process {rank}: {error}" if rank else f"error: {error}")
