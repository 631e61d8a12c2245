"""A benchmark's YAML file, read and checked: every fault one sentence with file, key and value."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..inputs import (
    SHARES,
    Count,
    NotNegative,
    Positive,
    Whole,
    check_keys,
    check_mapping,
    check_options,
    nearest,
    read_yaml,
)
from ..prompts import KINDS
from ..rollout import Sampler
from ..stats import GOLD

SPLITS = ("train", "val", "test", "ood")
KEYS = {
    "model": str,
    "folder": str,
    "resolution": Count,
    "text_length": Count,
    "prompts": str,
    "tasks": dict[str, dict],
    "rewards": dict[str, dict],
    "experts": dict[str, dict],
    "anchor": str,
    "adapters": dict,
    "mix": dict,
    "task_weights": SHARES,
    "sampling": dict[str, dict],
    "truth": str,
    "about": str,
    "rates": dict,
    "calibrated": dict[str, str],
}
RATES = {key: Positive for key in ("forwards", "updates")} | {"device": str}
TASK = {
    "reward": str,
    "prompts": str,
    "kind": Literal[KINDS],
    "splits": list[Literal[SPLITS]],
    "held_out": Whole,
    "expert": str,
    "reward_weights": dict[str, float],
    "like": str,
}
EXPERT = {"adapter": str, "guidance": NotNegative, "recipe": str}
ADAPTERS = {"rank": Count, "alpha": Positive, "targets": list[str]}
MIX = {"task_schedule": SHARES, "auxiliary_rewards": dict[str, float]}
REWARD = {
    "class": str,
    "scale": Positive,
    "tasks": list[str],
    "held_out": bool,
    "training": bool,
    "gold": dict,
}
SAMPLING = ("evaluation", "exploration", "distillation")


def placed(path: str | Path, folder: Path, name: bool = False) -> Path | str:
    """A path of a benchmark's file: absolute, or as seen from the benchmark's folder. With `name` it may be a hub id,
    which is what names no file there."""
    text = expanded(str(path))
    found = folder / text
    return text if name and not found.exists() else found


def expanded(text: str) -> str:
    """With environment variables, written `${NAME}`. Raises ValueError for one that is not set."""
    for variable in re.findall(r"\$\{(\w+)\}", text):
        if variable not in os.environ:
            raise ValueError(
                f"{text} needs the environment variable {variable}; set it (docs/benchmarks.md)"
            )
    return os.path.expandvars(text)


def read_benchmark(path: Path) -> dict[str, Any]:
    """The arguments of `Benchmark`, tasks, rewards and experts still as mappings."""
    try:
        return _fields(path, read_yaml(path))
    except ValueError as error:
        told = str(error)
        raise ValueError(told if told.startswith(str(path)) else f"{path}: {told}") from error


def _fields(path: Path, given: Any) -> dict[str, Any]:
    benchmark = check_mapping("the benchmark", given, KEYS, needed=("model", "tasks", "rewards"))
    folder = (path.parent / expanded(benchmark.get("folder", "."))).resolve()
    rewards, experts, tasks = benchmark["rewards"], benchmark.get("experts", {}), benchmark["tasks"]
    for name, reward in rewards.items():
        plain = {k: v for k, v in reward.items() if k in REWARD}
        check_mapping(f"rewards.{name}", plain, REWARD, f"rewards.{name}.", ("class",))
    rewards |= gold_rewards(rewards)
    for name, expert in experts.items():
        check_mapping(f"experts.{name}", expert, EXPERT, f"experts.{name}.", ("adapter",))
    patterns = {}
    for name, task in tasks.items():
        check_mapping(f"tasks.{name}", task, TASK, f"tasks.{name}.", ("reward",))
        like = task.get("like")
        if like is None:
            for key in ("prompts", "kind"):
                if key not in task:
                    raise ValueError(
                        f"tasks.{name} lacks {key}, or `like`, a task whose prompts it shares"
                    )
            prompts = task["prompts"]
            if not prompts.startswith(("${", "/")):
                prompts = os.path.join(benchmark.get("prompts", ""), prompts)
            splits = task.get("splits", list(SPLITS))
            patterns[name] = {
                "prompts": prompts,
                "kind": task["kind"],
                "splits": splits,
                "held_out": task.get("held_out", 0),
            }
        elif {"prompts", "kind", "splits", "held_out"} & set(task):
            raise ValueError(
                f"tasks.{name} is like {like}, whose prompts it has: leave out its own"
            )
    for name, task in tasks.items():
        if "like" in task:
            _there(f"tasks.{name}.like", task["like"], patterns)
        for reward in (task["reward"], *task.get("reward_weights", {})):
            _there(f"tasks.{name}", reward, rewards, "reward")
        if "expert" in task:
            _there(f"tasks.{name}.expert", task["expert"], experts)
    if "anchor" in benchmark:
        _there("anchor", benchmark["anchor"], experts)
    mix = check_mapping("mix", benchmark.get("mix", {}), MIX, "mix.")
    for name in mix.get("auxiliary_rewards", {}):
        _there("mix.auxiliary_rewards", name, rewards)
    for key, named, of in (
        ("mix.task_schedule", mix.get("task_schedule", {}), patterns),
        ("task_weights", benchmark.get("task_weights", {}), tasks),
    ):
        for name in named:
            _there(key, name, of)
    if "rates" in benchmark:
        check_mapping("rates", benchmark["rates"], RATES, "rates.", RATES)
    check_keys("sampling", benchmark.get("sampling", {}), SAMPLING)
    samplers = {
        key: Sampler(**check_options(f"sampling.{key}", value, Sampler))
        for key, value in benchmark.get("sampling", {}).items()
    }
    adapters = check_mapping("adapters", benchmark.get("adapters", {}), ADAPTERS, "adapters.")
    if "targets" in adapters:
        adapters["targets"] = tuple(adapters["targets"])
    for reward in rewards.values():
        for task in reward.get("tasks", []):
            _there("rewards", task, tasks, "task")
    optional = {
        k: benchmark[k]
        for k in ("resolution", "text_length", "anchor", "about", "rates", "calibrated")
        if k in benchmark
    }
    return {
        "name": path.parent.name if path.stem == "benchmark" else path.stem,
        "base": str(placed(benchmark["model"], folder, name=True)),
        "folder": folder,
        "tasks": tasks,
        "patterns": patterns,
        "experts": experts,
        "specs": rewards,
        "task_schedule": mix.get("task_schedule", dict.fromkeys(patterns, 1)),
        "auxiliary_rewards": mix.get("auxiliary_rewards", {}),
        "task_weights": benchmark.get("task_weights", {}),
        "truth_module": benchmark.get("truth", ""),
        **optional,
        **adapters,
        **samplers,
    }


def gold_rewards(rewards: Mapping[str, dict]) -> dict[str, dict]:
    """By its name, the settings of each reward's gold: it has the reward's tasks and scale, and nothing is
    trained on it."""
    found = {}
    for name, reward in rewards.items():
        if "gold" in reward:
            where = f"rewards.{name}.gold"
            if reward.get("held_out") or reward.get("training"):
                raise ValueError(
                    f"{where}: only a reward that is reported and trained on has a gold"
                )
            gold = reward["gold"]
            for key in ("tasks", "scale", "held_out", "training", "gold"):
                if key in gold:
                    raise ValueError(f"{where} has {key}, which it takes from {name}; leave it out")
            if "class" not in gold:
                raise ValueError(f"{where} lacks class")
            if name + GOLD in rewards:
                raise ValueError(
                    f"{where} is the reward {name + GOLD}, which is there already; rename that"
                )
            shared = {k: reward[k] for k in ("tasks", "scale") if k in reward}
            found[name + GOLD] = {**shared, **gold, "held_out": True}
    return found


def _there(where: str, name: str, known: Mapping, what: str = "") -> None:
    if name not in known:
        raise ValueError(
            f"{where} names {what + ' ' if what else ''}{name!r}{nearest(name, known)}; there are "
            f"{', '.join(known) or 'none'}"
        )
