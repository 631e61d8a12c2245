"""Speed and memory of what long runs spend their time on: `python -m flowopd_lib bench`.

By batch size: a rollout, an update of GRPO, an update of OPD with all teachers and the anchor, and
an evaluation, each as images a second, seconds of its phases and peak memory. Besides: seconds of
imports, milliseconds of the gallery, requests a second of the reward server.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..benchmarks import DEFAULT, load_benchmark
from ..config import choose, validate
from ..data import Schedule
from ..evaluate import evaluate
from ..files import write_json
from ..lab.recipe import Recipe, build
from ..lab.workspace import Workspace
from ..losses import Objective, Shard
from ..policy import FlowPolicy
from ..precision import resolve
from ..rollout import sample
from .dummy_model import write_random_sd35
from .gallery import measure_gallery, random_samples
from .reward_server import measure_server

RANDOM_SD35 = "sd35-random"  # Stable Diffusion 3.5 Medium with random weights
PARTS = ("model", "imports", "gallery", "reward_server")
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
MODULES = ("flowopd_lib", "flowopd_lib.policy", "flowopd_lib.lab.lab")  # whose imports are timed
GROUP, SAMPLES = 4, 5000  # images per prompt in GRPO; in the gallery
Phases = Mapping[str, Callable[[int], Any]]  # what one iteration does, in order, by name


def run(
    model: str = DEFAULT,
    batch_sizes: Sequence[int] = (8, 32),
    parts: Sequence[str] = PARTS,
    repeats: int = 3,
    precision: str = "auto",
    out: str | Path | None = None,
) -> dict[str, Any]:
    """All measurements, also written to the file `out` as JSON.

    `model`: a benchmark by its name or file, or `sd35-random`. `batch_sizes`: images per batch,
    multiples of 4. `parts`: some of PARTS. `repeats`: of every measurement, after a warm-up; the
    median counts. Raises ValueError for arguments that do not fit.
    """
    for part in parts:
        choose("part of the benchmark", part, PARTS)
    if repeats < 1 or not batch_sizes or any(n < GROUP or n % GROUP for n in batch_sizes):
        raise ValueError(
            f"batch sizes must be multiples of {GROUP} and repeats at least 1, not "
            f"{list(batch_sizes)} and {repeats}"
        )
    result = {"model": model, "repeats": repeats, **machine()}
    with tempfile.TemporaryDirectory() as folder:
        if "model" in parts:
            dtype = resolve(precision, "cuda" if torch.cuda.is_available() else "cpu")
            file = write_random_sd35(folder, dtype=dtype) if model == RANDOM_SD35 else model
            workspace = Workspace(load_benchmark(file), dtype)
            result |= {"precision": workspace.policy.precision, "cases": []}
            for batch in batch_sizes:
                for row in measure_model(workspace, batch, repeats):
                    print(row, file=sys.stderr, flush=True)
                    result["cases"].append(row)
        if "imports" in parts:
            result["import_seconds"] = {m: import_seconds(m, repeats) for m in MODULES}
        if "gallery" in parts:
            result["gallery"] = measure_gallery(random_samples(folder, SAMPLES))
        if "reward_server" in parts:
            result["reward_server"] = measure_server()
    if out:
        write_json(out, result)
    return result


def machine() -> dict[str, Any]:
    """Device, cores and versions."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.is_file() else []
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "".join(names[:1])
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    versions["python"] = platform.python_version()
    return {"device": device or platform.machine(), "cores": os.cpu_count(), "versions": versions}


def measure_model(workspace: Workspace, batch: int, repeats: int) -> Iterator[dict[str, Any]]:
    """A row per case at one batch size. OPD is left out for a benchmark without experts."""
    benchmark, policy = workspace.benchmark, workspace.policy
    grpo = {"prompts_per_batch": batch // GROUP, "images_per_prompt": GROUP}
    opd = {"prompts_per_batch": batch, "tasks": list(benchmark.teachers)}
    options = {"micro_batch_size": batch}
    recipes = {"GRPO update": {"schedule": grpo, "grpo": {"updates": 1, "beta": 0.0, **options}}}
    if benchmark.teachers:
        recipes["OPD update"] = {"schedule": opd, "opd": {"anchor": benchmark.anchor, **options}}
    for case, sections in recipes.items():
        recipe = validate(Recipe, {**sections, "train": {"iterations": 1}})
        objective, _ = build(recipe, workspace)
        yield {"case": case, **measure(update_phases(policy, objective), batch, repeats)}
    policy.train_adapter(None)
    prompts = {task: benchmark.prompts(task, "train") for task in benchmark.prompt_tasks}
    drawn, rewards = Schedule(prompts, batch).draw(0), benchmark.rewards(workspace.device)

    def rollout(iteration: int) -> None:
        sampler = benchmark.sampling.grpo
        sample(policy, drawn.prompts, drawn.seeds, sampler, "student", batch)

    def evaluation(iteration: int) -> None:
        sampler, models = benchmark.sampling.evaluation, {"student": "student"}
        evaluate(
            policy, drawn.prompts, rewards, 0, sampler, models, batch=batch, show_progress=False
        )

    for phase in (rollout, evaluation):
        yield {"case": phase.__name__, **measure({"sampling": phase}, batch, repeats)}


def update_phases(policy: FlowPolicy, objective: Objective) -> Phases:
    """An iteration of a training: `collect` (rollout, rewards or teachers), then `update` (forward,
    backward, optimizer)."""
    optimizer = torch.optim.AdamW(policy.train_adapter("student"), 1e-5)
    collected = {}

    def collect(iteration: int) -> None:
        collected["data"], _ = objective.collect(policy, "student", iteration, Shard())

    def update(iteration: int) -> None:
        for number in range(objective.updates):
            for loss, _ in objective.losses(policy, "student", collected["data"], number):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return {"collect": collect, "update": update}


def measure(phases: Phases, batch: int, repeats: int) -> dict[str, Any]:
    """Seconds of each phase and of all (medians, after a warm-up), images per second, peak memory
    in GiB; `error` in place of them where a GPU has too little memory."""
    seconds = {name: [] for name in phases}
    try:
        for iteration in range(repeats + 1):
            if iteration == 1:
                peak_memory(reset=True)
            for name, phase in phases.items():
                start = time.perf_counter()
                phase(iteration)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"batch": batch, "error": "out of GPU memory"}
    medians = {name: float(np.median(times[1:])) for name, times in seconds.items()}
    total = sum(medians.values())
    return {
        "batch": batch,
        "seconds": total,
        **{f"{name}_seconds": median for name, median in medians.items()},
        "images_per_second": batch / total,
        "peak_memory_gib": peak_memory(),
    }


def peak_memory(reset: bool = False) -> float:
    """GiB since the last reset: of the GPU's allocations or, on Linux without a GPU, of the
    process's resident memory."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**30
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def import_seconds(module: str, repeats: int) -> float:
    """Of a module in a new process, the median."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    command = [sys.executable, "-c", code]
    times = [float(subprocess.check_output(command, text=True)) for _ in range(repeats)]
    return float(np.median(times))
