"""A world's YAML file, read and checked: every fault one sentence with file, key and value."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ..inputs import check_keys, check_options, check_value, nearest, read_yaml
from ..prompts import KINDS
from ..rollout import Sampler

SPLITS = ("train", "val", "test", "ood")
WHOLE = Annotated[int, Field(ge=1)]
KEYS = {
    "model": str,
    "folder": str,
    "resolution": WHOLE,
    "text_length": WHOLE,
    "prompts": str,
    "tasks": dict[str, dict],
    "judges": dict[str, dict],
    "experts": dict[str, dict],
    "anchor": str,
    "adapters": dict,
    "mix": dict,
    "shares": dict[str, WHOLE],
    "sampling": dict[str, dict],
    "truth": str,
    "about": str,
    "rates": dict,
}
RATES = {key: Annotated[float, Field(gt=0)] for key in ("forwards", "updates")} | {"device": str}
TASK = {
    "judge": str,
    "prompts": str,
    "kind": Literal[KINDS],
    "splits": list[Literal[SPLITS]],
    "held_out": Annotated[int, Field(ge=0)],
    "expert": str,
    "rewards": dict[str, float],
    "like": str,
}
EXPERT = {"adapter": str, "guidance": Annotated[float, Field(ge=0)], "recipe": str}
ADAPTERS = {"rank": WHOLE, "alpha": Annotated[float, Field(gt=0)], "targets": list[str]}
MIX = {"turns": dict[str, WHOLE], "beside": dict[str, float]}
JUDGE = {"class": str, "scale": Annotated[float, Field(gt=0)], "tasks": list[str]}
JUDGE |= {"unseen": bool, "training": bool}
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


def _checked(where: str, given: Any, kinds: Mapping[str, Any], needed: tuple[str, ...] = ()) -> dict:
    check_keys(where, given, kinds)
    for key, value in given.items():
        check_value(f"{where}.{key}" if where != "the world" else key, value, kinds[key])
    for key in needed:
        if key not in given:
            raise ValueError(f"{where} lacks {key}")
    return dict(given)


def _fields(path: Path, given: Any) -> dict[str, Any]:
    world = _checked("the world", given, KEYS, ("model", "tasks", "judges"))
    folder = (path.parent / expanded(world.get("folder", "."))).resolve()
    judges, experts, tasks = world["judges"], world.get("experts", {}), world["tasks"]
    for name, judge in judges.items():
        plain = {k: v for k, v in judge.items() if k in JUDGE}
        _checked(f"judges.{name}", plain, JUDGE, ("class",))
    for name, expert in experts.items():
        _checked(f"experts.{name}", expert, EXPERT, ("adapter",))
    patterns = {}
    for name, task in tasks.items():
        _checked(f"tasks.{name}", task, TASK, ("judge",))
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
    mix = _checked("mix", world.get("mix", {}), MIX)
    for name in mix.get("beside", {}):
        _there("mix.beside", name, judges)
    for key, named, of in (
        ("mix.turns", mix.get("turns", {}), patterns),
        ("shares", world.get("shares", {}), tasks),
    ):
        for name in named:
            _there(key, name, of)
    if "rates" in world:
        _checked("rates", world["rates"], RATES, ("forwards", "updates", "device"))
    check_keys("sampling", world.get("sampling", {}), SAMPLING)
    samplers = {
        key: Sampler(**check_options(f"sampling.{key}", value, Sampler))
        for key, value in world.get("sampling", {}).items()
    }
    adapters = _checked("adapters", world.get("adapters", {}), ADAPTERS)
    if "targets" in adapters:
        adapters["targets"] = tuple(adapters["targets"])
    for judge in judges.values():
        for task in judge.get("tasks", []):
            _there("judges", task, tasks, "task")
    optional = {k: world[k] for k in ("resolution", "text_length", "anchor", "about", "rates") if k in world}
    return {
        "name": path.parent.name if path.stem == "world" else path.stem,
        "base": str(placed(world["model"], folder, name=True)),
        "folder": folder,
        "tasks": tasks,
        "patterns": patterns,
        "experts": experts,
        "specs": judges,
        "scales": {name: float(judge.get("scale", 1.0)) for name, judge in judges.items()},
        "turns": mix.get("turns", dict.fromkeys(patterns, 1)),
        "beside": mix.get("beside", {}),
        "shares": world.get("shares", {}),
        "truth_module": world.get("truth", ""),
        **optional,
        **adapters,
        **samplers,
    }


def _there(where: str, name: str, known: Mapping, what: str = "") -> None:
    if name not in known:
        raise ValueError(
            f"{where} names {what + ' ' if what else ''}{name!r}{nearest(name, known)}; there are "
            f"{', '.join(known) or 'none'}"
        )
