"""What a run will cost, told before it starts: pictures, forwards of the transformer, and hours of a GPU at
the rate that was measured for its benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..benchmarks import Benchmark
from ..rollout import Sampler
from ..studies.stages import stages_of


@dataclass(frozen=True)
class Work:
    """Pictures that are drawn, forwards of one latent without gradient, and with it and its backward.
    Guidance counts twice: it asks for the empty prompt too."""

    images: float = 0.0
    forwards: float = 0.0
    updates: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.images + other.images, self.forwards + other.forwards, self.updates + other.updates
        )

    def __mul__(self, times: float) -> Work:
        return Work(self.images * times, self.forwards * times, self.updates * times)


def _passes(guidance: float) -> int:
    return 1 if guidance == 1.0 else 2


class Costs:
    """The parts that notebooks are made of, in one benchmark."""

    def __init__(self, benchmark: Benchmark, parameters: Mapping[str, Any]):
        self.benchmark, self.p = benchmark, parameters

    def evaluation(
        self, models: int, split: str = "test", n: str = "n_test", tasks: int | None = None
    ) -> Work:
        """`n` prompts a task, or as many as there are, under every model, and the further `noises`."""
        more = self.p.get("noises", {}) if n == "n_test" else {}
        each = {
            task: self.p.get("repeats", 1) + more.get(task, 0)
            for task in list(self.benchmark.own)[:tasks]
        }
        images = models * sum(
            min(self.p[n], self._there(task, split)) * k for task, k in each.items()
        )
        passes = _passes(self.benchmark.evaluation.guidance)
        return Work(images, images * self.p.get("steps", self.benchmark.evaluation.steps) * passes)

    def _there(self, task: str, split: str) -> int:
        try:
            return len(self.benchmark.prompts(task, split))
        except (OSError, ValueError):  # the files come later: as many as are asked for
            return 1 << 30

    def grpo(self, iterations: int, images: int, sampler: Sampler | None = None) -> Work:
        s = sampler or self.benchmark.exploration
        each = iterations * images * _passes(s.guidance)
        return Work(iterations * images, each * s.steps, each * len(s.window))

    def opd(self, updates: int, prompts: int, steps: int = 0, anchor: bool = True) -> Work:
        """`steps` of a walk are learned from (0: all), each asked of its teacher and the anchor; a walk ends
        at the last of them."""
        s = self.benchmark.distillation
        states = steps or len(s.window)
        walked = s.steps * (states / (states + 1) if steps else 1.0)
        each = updates * prompts * _passes(s.guidance)
        return Work(updates * prompts, each * (walked + states * (1 + anchor)), each * states)

    def sft(self, samples: int, updates: int) -> Work:
        passes = _passes(self.benchmark.evaluation.guidance)
        return Work(samples, samples * self.p["steps"] * passes, updates * 48)


def _interference(c: Costs) -> Work:
    p, tasks = c.p, len(c.benchmark.tasks)
    size = p["prompts_per_batch"] * p["images_per_prompt"]
    of_rewards = c.grpo(p["batches"], size) * tasks
    through = sum(c.benchmark.passes_gradient(task.reward) for task in c.benchmark.tasks.values())
    moved = c.grpo(1, p["images"]) * (tasks * (tasks + 1 + through + bool(through)))
    steps, walked = c.benchmark.exploration.steps, c.grpo(p["batches"], size)
    # on the way back every step is made once more
    walks = Work(walked.images, walked.forwards, walked.images * steps) * through
    pulls = c.opd(p["batches"], p["prompts_per_batch"], anchor=False) * (
        2 * len(c.benchmark.experts)
    )
    along = c.evaluation(2 + 2 * len(c.benchmark.experts) * len(p["sizes"]))
    begun = len(c.benchmark.experts) * p["first_seeds"] * (p["first_iterations"] > 0)
    first = c.grpo(p["first_iterations"], size) * begun + c.evaluation(begun + (begun > 0))
    branches = c.grpo(p["branches"], size) * tasks
    return (
        along + first + of_rewards + branches + walks + Work(moved.images, moved.forwards) + pulls
    )


def _seesaw(c: Costs) -> Work:
    p = c.p
    variants = len(p["variants"]) or len(c.benchmark.own) + bool(c.benchmark.auxiliary_rewards) + 2
    size, seeds = p["prompts_per_batch"] * p["images_per_prompt"], p["train_seeds"]

    def one(iterations: int, every: int = p["every"]) -> Work:
        looks = c.evaluation(1, "val", "n_probe") * (-(-iterations // every) + 1)
        return c.grpo(iterations, size) + looks

    # an variant that still rises at the end takes all it may
    found = one(max(p["iterations"], p["most"])) * variants
    for _, upto, _, begun in stages_of(p["budgets"]):
        found += one(upto - begun, max(p["every"], upto // 20))
    experts = len(c.benchmark.experts) if p["singles"] else 0
    found += c.grpo(max(1, p["iterations"] // max(experts, 1)), size) * experts
    models = variants * (1 + (p["most"] > 0)) + bool(experts) + len(p["budgets"])
    return (found + c.evaluation(models)) * seeds + c.evaluation(1 + len(c.benchmark.experts))


def _distillation(c: Costs) -> Work:
    p = c.p
    starts = len([o for o in p["others"] if o != "GRPO-Mix"])
    found = c.opd(p["iterations"], p["prompts_per_batch"], p["opd_steps"], p["mar"] > 0)
    found = found * (p["train_seeds"] * (1 + starts)) + c.evaluation(1, "val", "n_probe") * (
        5 * (1 + starts)
    )
    if "sft" in p["others"]:
        found += c.sft(p["sft_samples"], p["sft_iterations"])
    mixes = p["train_seeds"] if "GRPO-Mix" in p["others"] else 0
    found += c.grpo(p["mix_iterations"], 144) * mixes
    return found + c.evaluation(
        2 + len(c.benchmark.experts) + p["train_seeds"] * (1 + starts) + mixes
    )


def _readings(c: Costs) -> Work:
    p, readings = c.p, 5
    compared = c.opd(p["batches"], p["images"], anchor=False)
    # three of them at the mirror images of the actions too
    compared = Work(compared.images, compared.forwards, compared.updates * (readings + 3)) * 2
    trainings = readings * (len(p["rates"]) + p["train_seeds"] - 1)
    trained = c.opd(p["iterations"], p["prompts_per_batch"], anchor=False) * trainings
    alone = c.opd(p["step_iterations"], p["prompts_per_batch"], 1, False) * len(
        c.benchmark.distillation.window
    )
    looks = c.evaluation(
        readings * len(p["rates"]) + len(c.benchmark.distillation.window) + 2, "val", "n_val"
    )
    return compared + trained + alone + looks + c.evaluation(1 + readings * p["train_seeds"])


NOTEBOOKS: dict[str, Callable[[Costs], Work]] = {
    "00_quickstart": lambda c: c.evaluation(1) + c.evaluation(1, n="n_show"),
    "01_gradient_interference": _interference,
    "02_mixed_reward_seesaw": _seesaw,
    "03_expert_training": lambda c: (
        c.grpo(c.p["iterations"], 144) + c.evaluation(1 + len(c.benchmark.experts))
    ),
    "04_cold_start": lambda c: (
        c.sft(c.p["sft_samples"], c.p["sft_iterations"])
        + c.evaluation(7)
        + c.evaluation(c.p["points"], tasks=2)
    ),
    "05_opd": _distillation,
    "06_mar": lambda c: (
        c.opd(c.p["iterations"], c.p["prompts_per_batch"], 1)
        * len(c.p["variants"])
        * c.p["train_seeds"]
        + c.evaluation(2 + len(c.p["variants"]) * c.p["train_seeds"])
    ),
    "07_opd_estimators": _readings,
    # where 05 has one training of each
    "08_results": lambda c: c.evaluation(4, "ood"),
}


def cost_table(
    chosen: Mapping[str, Mapping[str, Any]], benchmark_of: Callable[[str], Benchmark]
) -> pd.DataFrame:
    """A row a notebook, and their sum: pictures, thousands of forwards, without gradient and with, and hours
    of a GPU where the benchmark says at which rates. `chosen`: all parameters by notebook."""
    rows = []
    for notebook, parameters in chosen.items():
        benchmark = benchmark_of(parameters["benchmark"])
        work = (
            NOTEBOOKS[notebook](Costs(benchmark, parameters)) if notebook in NOTEBOOKS else Work()
        )
        rates = benchmark.rates
        seconds = (
            work.forwards / rates["forwards"] + work.updates / rates["updates"] if rates else np.nan
        )
        rows.append(
            {
                "notebook": notebook,
                "pictures": round(work.images),
                "forwards, thousands": work.forwards / 1e3,
                "with backward, thousands": work.updates / 1e3,
                "GPU hours": seconds / 3600,
            }
        )
    table = pd.DataFrame(rows)
    total = table.drop(columns="notebook").sum(min_count=1)
    return pd.concat([table, pd.DataFrame([{"notebook": "all", **total}])], ignore_index=True)
