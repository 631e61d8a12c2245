"""How fast and how large: `python -m flowopd_lib.bench [--out bench.json]`.

Ours against the pattern of the public Flow-OPD code, written out: a rollout that is decoded and scored, then
a second forward of the student with gradient at every state, and a whole copy of the backbone for every
teacher and for the anchor. Same model, same batch, same adapters. `ours` learns from all steps too, `recipe`
from the one that student_opd.yaml draws for an update (a median over draws: a late step is walked to for
longer). Each case runs in a process of its own, so that peaks of memory do not mix; ratios are of medians.

`opd_operations_ours_over_public` counts floating-point operations. We leave out the rollout's own forwards,
decoding and rewards; the student's forward and backward, the teachers' forward and the anchor's are in both.
At the same speed per operation time cannot fall below that ratio.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ..benchmarks import load_benchmark
from ..files import RUNS, write_json
from ..inputs import read_yaml
from ..objectives import GRPO, OPD
from ..policy import FlowPolicy
from ..precision import NAMES, resolve
from ..rollout import Sampler, sample, trajectory
from ..schedule import Schedule
from ..sde import velocity_weight
from ..studies.compare import our_update
from .dummy_model import write_sd35

# Three teachers; the anchor is a fourth adapter, which no prompt is routed to.
BENCHMARK = load_benchmark()
TASKS, TEACHERS = BENCHMARK.own, {task: task for task in BENCHMARK.own}
SAMPLER = Sampler(10, "sde")
MAR = 0.04
CASES = ("student", "ours", "recipe", "public", "grpo", "rollout")
RATIOS = (
    ("opd_time_ours_over_public", "seconds", "ours", "public"),
    ("opd_time_recipe_over_public", "seconds", "recipe", "public"),
    ("opd_operations_ours_over_public", "flop", "ours", "public"),
    ("opd_memory_ours_over_public", "memory_mib", "ours", "public"),
    ("opd_memory_teachers_over_student_alone", "memory_mib", "ours", "student"),
)
RANDOM = (
    "sd35-random"  # Stable Diffusion 3.5 Medium's architecture with random weights (`dummy_model`)
)


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak of allocations, or the process's peak of resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def brightness(images: torch.Tensor, prompts: Sequence) -> np.ndarray:
    """In a reward's place where there is none: the pictures of random weights show nothing, and it costs
    nothing."""
    return images.flatten(1).mean(1).numpy()


def add_random_adapter(policy: FlowPolicy, name: str) -> None:
    """An adapter that changes the model a little, by its name."""
    policy.add_adapter(name)
    with torch.no_grad():
        for p in policy.adapter_parameters(name).values():
            p.add_(
                torch.randn(
                    p.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))
                ).to(p)
                * 0.01
            )


def setting(
    model: str, device: str, dtype: torch.dtype, images: int, adapters: Sequence[str]
) -> tuple[FlowPolicy, Schedule]:
    """A policy with a student and `adapters` beside it, and a schedule of mixed prompts."""
    policy = FlowPolicy(model or BENCHMARK.base, device, dtype)
    for name in ("student", *adapters):
        add_random_adapter(policy, name)
    return policy, Schedule({t: BENCHMARK.prompts(t, "train") for t in TASKS}, images)


def whole_copy(model: str, device: str, dtype: torch.dtype, name: str) -> torch.nn.Module:
    """A backbone of its own with one adapter merged into the weights."""
    policy = FlowPolicy(model or BENCHMARK.base, device, dtype)
    add_random_adapter(policy, name)
    return policy.peft.merge_and_unload(adapter_names=[name]).requires_grad_(False)


def public_update(
    policy: FlowPolicy,
    copies: dict[str, torch.nn.Module],
    schedule: Schedule,
    rewards: dict,
    optimizer: torch.optim.Optimizer,
) -> Callable[[int], None]:
    """One update of the public pattern."""

    def of_copy(name, x, sigma, text):
        t = torch.full((len(x),), sigma * 1000.0, device=x.device)
        with (
            torch.no_grad(),
            torch.autocast(policy.device.type, policy.dtype, enabled=policy.dtype != torch.float32),
        ):
            return copies[name](
                hidden_states=x.to(policy.dtype),
                timestep=t,
                encoder_hidden_states=text.tokens,
                pooled_projections=text.pooled,
                return_dict=False,
            )[0].float()

    def update(iteration: int) -> None:
        batch = schedule.draw(iteration)
        steps = list(trajectory(policy, batch.prompts, batch.seeds, SAMPLER, "student"))
        images = policy.decode(steps[-1].x_next).cpu()
        for name, reward in rewards.items():  # computed, and not used by the distillation
            rows = [
                i
                for i, p in enumerate(batch.prompts)
                if name not in ("GenEval", "OCR") or p.task == name.lower()
            ]
            reward(images[rows], [batch.prompts[i] for i in rows])
        text = policy.encode([p.text for p in batch.prompts])
        for step in steps[:-1]:
            v, target = (
                policy.velocity(step.x, step.sigma, text, adapter="student"),
                torch.empty_like(step.x),
            )
            for task in TASKS:
                rows = [i for i, p in enumerate(batch.prompts) if p.task == task]
                target[rows] = of_copy(task, step.x[rows], step.sigma, text[rows])
            anchor = of_copy("deqa", step.x, step.sigma, text)
            weight = velocity_weight(
                step.sigma, step.sigma_next, "kl", SAMPLER.kind, SAMPLER.noise_level
            )
            loss = (
                weight
                * ((v - target).square() + MAR * (v - anchor).square()).flatten(1).sum(1).mean()
            )
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def run_case(case: str, model: str, device: str, dtype: torch.dtype, images: int, pipe) -> None:
    """In a process of its own: get ready, then one repetition for every message; at the end, memory and
    operations."""
    torch.set_num_threads(os.cpu_count())
    where = torch.device(device)
    before = peak_memory(where)
    policy, schedule = setting(
        model, device, dtype, images, (*TASKS, "deqa") if case in ("ours", "recipe") else ()
    )
    optimizer = torch.optim.AdamW(policy.train_adapter("student"), 1e-5)
    if case in ("ours", "recipe"):
        asked = read_yaml(RUNS / "recipes" / "student_opd.yaml")["opd"] if case == "recipe" else {}
        steps = {key: asked[key] for key in ("steps", "draw", "weighting") if asked}
        step = our_update(
            policy,
            OPD(
                schedule,
                TEACHERS,
                SAMPLER,
                mar=MAR,
                anchor="deqa",
                micro_batch_size=images,
                **steps,
            ),
            optimizer,
        )
    elif case == "student":  # alone: pulled to the base, which it carries anyway, and no anchor
        step = our_update(
            policy,
            OPD(schedule, dict.fromkeys(TASKS), SAMPLER, mar=0.0, micro_batch_size=images),
            optimizer,
        )
    elif case == "public":
        copies = {name: whole_copy(model, device, dtype, name) for name in (*TASKS, "deqa")}
        step = public_update(
            policy, copies, schedule, {} if model else BENCHMARK.rewards(), optimizer
        )
    elif case == "grpo":
        grouped = Schedule({"ocr": schedule.prompts["ocr"]}, images // 8, 8)
        step = our_update(
            policy,
            GRPO(
                grouped,
                {"OCR": brightness} if model else BENCHMARK.rewards(),
                {"OCR": 1.0},
                SAMPLER,
                updates=1,
                micro_batch_size=images,
            ),
            optimizer,
        )
    else:

        def step(iteration: int) -> None:
            batch = schedule.draw(iteration)
            sample(policy, batch.prompts, batch.seeds, SAMPLER, "student", images)

    step(0)  # warm-up: caches, first allocations
    with FlopCounterMode(display=False) as counter:
        step(1)
    pipe.send("ready")
    while (iteration := pipe.recv()) is not None:
        if where.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        step(iteration)
        if where.type == "cuda":
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - began)
    pipe.send(
        {"memory_mib": (peak_memory(where) - before) / 2**20, "flop": counter.get_total_flops()}
    )


def matmul_peak(device: str, dtype: torch.dtype, repeats: int = 12) -> float:
    """FLOP/s of the best of a few large square matrix products."""
    size = 2048 if device == "cpu" else 8192
    torch.set_num_threads(os.cpu_count())
    a, b, best = (
        torch.randn(size, size, device=device, dtype=dtype),
        torch.randn(size, size, device=device, dtype=dtype),
        0.0,
    )
    for _ in range(repeats):
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        began = time.perf_counter()
        a @ b
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def heard(case: str, pipe) -> Any:
    """What a case's process says. Raises RuntimeError where it has ended."""
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError(
            f"the case {case} ended before its time, as its own words above say; where memory was too "
            "little, lower --images"
        ) from None


def bench(
    model: str,
    device: str,
    dtype: torch.dtype,
    images: int,
    repeats: int,
    cases: Sequence[str] = CASES,
) -> dict:
    """Seconds (median over `repeats`), MiB above the idle process, and operations of every case; the ratios;
    the matrix products' peak. On a CPU, whose speed varies, the cases take turns; on a GPU, whose memory they
    would have to share, they come one after another."""
    context, peak, found = multiprocessing.get_context("spawn"), matmul_peak(device, dtype), {}
    for together in [cases] if device == "cpu" else [[case] for case in cases]:
        running = {}
        for case in together:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=run_case, args=(case, model, device, dtype, images, theirs), daemon=True
            )
            process.start()
            theirs.close()
            heard(case, ours)
            running[case] = (process, ours)
        seconds = {case: [] for case in together}
        for iteration in range(repeats):
            for case, (_, pipe) in running.items():
                pipe.send(2 + iteration)
                seconds[case].append(heard(case, pipe))
        for case, (process, pipe) in running.items():
            pipe.send(None)
            end, median = heard(case, pipe), float(np.median(seconds[case]))
            found[case] = {
                "seconds": median,
                "fastest": min(seconds[case]),
                "slowest": max(seconds[case]),
                **end,
                "share_of_matmul_peak": end["flop"] / median / peak,
            }
            process.join()
    told = {
        "model": model or BENCHMARK.base_name,
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "dtype": str(dtype).removeprefix("torch."),
        "images": images,
        "repeats": repeats,
        "steps": SAMPLER.steps,
        "matmul_peak_gflops": peak / 1e9,
    }
    if "rollout" in found:
        told["rollout_images_per_second"] = images / found["rollout"]["seconds"]
    for name, what, case, other in RATIOS:
        if case in found and other in found:
            told[name] = found[case][what] / found[other][what]
    return {**told, "cases": found}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flowopd_lib.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        default="",
        help="a Stable Diffusion 3 folder or hub id (default: the shipped benchmark's), or sd35-random: Stable "
        "Diffusion "
        "3.5 Medium's architecture with random weights at 512 px",
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("auto", *NAMES), default="auto", help="auto: what is faster here"
    )
    parser.add_argument("--images", type=int, default=64, help="a batch; a multiple of 8")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    args = parser.parse_args()
    if args.images < 8 or args.images % 8 or args.repeats < 1:
        parser.error(
            f"--images must be a positive multiple of 8 and --repeats positive, not {args.images} and "
            f"{args.repeats}"
        )
    with tempfile.TemporaryDirectory() as folder:
        dtype, model = resolve(args.dtype, args.device), args.model
        if model == RANDOM:
            model = str(write_sd35(folder, dtype=dtype, device=args.device))
        try:
            found = bench(model, args.device, dtype, args.images, args.repeats, args.cases)
        except RuntimeError as error:
            sys.exit(f"error: {error}")
        result = {**found, "model": args.model or BENCHMARK.base_name}
    print(f"{'case':10} {'seconds':>8} {'MiB':>8} {'GFLOP':>8} {'of matmul peak':>15}")
    for case, row in result["cases"].items():
        print(
            f"{case:10} {row['seconds']:8.3f} {row['memory_mib']:8.0f} {row['flop'] / 1e9:8.0f} "
            f"{row['share_of_matmul_peak']:15.2f}"
        )
    for key, value in result.items():
        if key != "cases":
            print(f"{key}: {value:.3f}" if isinstance(value, float) else f"{key}: {value}")
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
