"""A world's YAML file, read and checked: every fault one sentence with file, key and value."""

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
    "judges": dict[str, dict],
    "experts": dict[str, dict],
    "anchor": str,
    "adapters": dict,
    "mix": dict,
    "shares": SHARES,
    "sampling": dict[str, dict],
    "truth": str,
    "about": str,
    "rates": dict,
    "calibrated": dict[str, str],
}
RATES = {key: Positive for key in ("forwards", "updates")} | {"device": str}
TASK = {
    "judge": str,
    "prompts": str,
    "kind": Literal[KINDS],
    "splits": list[Literal[SPLITS]],
    "held_out": Whole,
    "expert": str,
    "rewards": dict[str, float],
    "like": str,
}
EXPERT = {"adapter": str, "guidance": NotNegative, "recipe": str}
ADAPTERS = {"rank": Count, "alpha": Positive, "targets": list[str]}
MIX = {"turns": SHARES, "beside": dict[str, float]}
JUDGE = {"class": str, "scale": Positive, "tasks": list[str], "unseen": bool, "training": bool, "gold": dict}
SAMPLING = ("evaluation", "exploration", "distillation")


def placed(path: str | Path, folder: Path, name: bool = False) -> Path | str:
    """A path of a world's file: absolute, or as seen from the world's folder. With `name` it may be a hub id,
    which is what names no file there."""
    text = expanded(str(path))
    found = folder / text
    return text if name and not found.exists() else found


def expanded(text: str) -> str:
    """With environment variables, written `${NAME}`. Raises ValueError for one that is not set."""
    for variable in re.findall(r"\$\{(\w+)\}", text):
        if variable not in os.environ:
            raise ValueError(f"{text} needs the environment variable {variable}; set it (docs/worlds.md)")
    return os.path.expandvars(text)


def read_world(path: Path) -> dict[str, Any]:
    """The arguments of `World`, tasks, judges and experts still as mappings."""
    try:
        return _fields(path, read_yaml(path))
    except ValueError as error:
        told = str(error)
        raise ValueError(told if told.startswith(str(path)) else f"{path}: {told}") from error


def _fields(path: Path, given: Any) -> dict[str, Any]:
    world = check_mapping("the world", given, KEYS, needed=("model", "tasks", "judges"))
    folder = (path.parent / expanded(world.get("folder", "."))).resolve()
    judges, experts, tasks = world["judges"], world.get("experts", {}), world["tasks"]
    for name, judge in judges.items():
        plain = {k: v for k, v in judge.items() if k in JUDGE}
        check_mapping(f"judges.{name}", plain, JUDGE, f"judges.{name}.", ("class",))
    judges |= twins(judges)
    for name, expert in experts.items():
        check_mapping(f"experts.{name}", expert, EXPERT, f"experts.{name}.", ("adapter",))
    patterns = {}
    for name, task in tasks.items():
        check_mapping(f"tasks.{name}", task, TASK, f"tasks.{name}.", ("judge",))
        like = task.get("like")
        if like is None:
            for key in ("prompts", "kind"):
                if key not in task:
                    raise ValueError(f"tasks.{name} lacks {key}, or `like`, a task whose prompts it shares")
            prompts = task["prompts"]
            if not prompts.startswith(("${", "/")):
                prompts = os.path.join(world.get("prompts", ""), prompts)
            splits = task.get("splits", list(SPLITS))
            patterns[name] = {
                "prompts": prompts,
                "kind": task["kind"],
                "splits": splits,
                "held_out": task.get("held_out", 0),
            }
        elif {"prompts", "kind", "splits", "held_out"} & set(task):
            raise ValueError(f"tasks.{name} is like {like}, whose prompts it has: leave out its own")
    for name, task in tasks.items():
        if "like" in task:
            _there(f"tasks.{name}.like", task["like"], patterns)
        for judge in (task["judge"], *task.get("rewards", {})):
            _there(f"tasks.{name}", judge, judges, "judge")
        if "expert" in task:
            _there(f"tasks.{name}.expert", task["expert"], experts)
    if "anchor" in world:
        _there("anchor", world["anchor"], experts)
    mix = check_mapping("mix", world.get("mix", {}), MIX, "mix.")
    for name in mix.get("beside", {}):
        _there("mix.beside", name, judges)
    for key, named, of in (
        ("mix.turns", mix.get("turns", {}), patterns),
        ("shares", world.get("shares", {}), tasks),
    ):
        for name in named:
            _there(key, name, of)
    if "rates" in world:
        check_mapping("rates", world["rates"], RATES, "rates.", RATES)
    check_keys("sampling", world.get("sampling", {}), SAMPLING)
    samplers = {
        key: Sampler(**check_options(f"sampling.{key}", value, Sampler))
        for key, value in world.get("sampling", {}).items()
    }
    adapters = check_mapping("adapters", world.get("adapters", {}), ADAPTERS, "adapters.")
    if "targets" in adapters:
        adapters["targets"] = tuple(adapters["targets"])
    for judge in judges.values():
        for task in judge.get("tasks", []):
            _there("judges", task, tasks, "task")
    optional = {
        k: world[k]
        for k in ("resolution", "text_length", "anchor", "about", "rates", "calibrated")
        if k in world
    }
    return {
        "name": path.parent.name if path.stem == "world" else path.stem,
        "base": str(placed(world["model"], folder, name=True)),
        "folder": folder,
        "tasks": tasks,
        "patterns": patterns,
        "experts": experts,
        "specs": judges,
        "turns": mix.get("turns", dict.fromkeys(patterns, 1)),
        "beside": mix.get("beside", {}),
        "shares": world.get("shares", {}),
        "truth_module": world.get("truth", ""),
        **optional,
        **adapters,
        **samplers,
    }


def twins(judges: Mapping[str, dict]) -> dict[str, dict]:
    """By its name, the settings of each judge's twin: it has the judge's tasks and scale, and nothing is
    trained on it."""
    found = {}
    for name, judge in judges.items():
        if "gold" in judge:
            where = f"judges.{name}.gold"
            if judge.get("unseen") or judge.get("training"):
                raise ValueError(f"{where}: only a judge that is reported and trained on has a twin")
            twin = judge["gold"]
            for key in ("tasks", "scale", "unseen", "training", "gold"):
                if key in twin:
                    raise ValueError(f"{where} has {key}, which it takes from {name}; leave it out")
            if "class" not in twin:
                raise ValueError(f"{where} lacks class")
            if name + GOLD in judges:
                raise ValueError(f"{where} is the judge {name + GOLD}, which is there already; rename that")
            shared = {k: judge[k] for k in ("tasks", "scale") if k in judge}
            found[name + GOLD] = {**shared, **twin, "unseen": True}
    return found


def _there(where: str, name: str, known: Mapping, what: str = "") -> None:
    if name not in known:
        raise ValueError(
            f"{where} names {what + ' ' if what else ''}{name!r}{nearest(name, known)}; there are "
            f"{', '.join(known) or 'none'}"
        )
