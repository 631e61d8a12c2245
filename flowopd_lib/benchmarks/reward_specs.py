"""A reward out of a benchmark's file: its class by name, and its settings, which may be objects of their own."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import rewards
from ..inputs import check_keys, check_options, nearest
from .read import REWARD, expanded

VALUES = (str, int, float, bool, list, type(None))


def build_reward(name: str, spec: Mapping[str, Any], folder: Path, device: str) -> rewards.Reward:
    """The reward, and what the file says of it beside its settings (`rewards.base.PLAIN`) as attributes."""
    settings = {k: v for k, v in spec.items() if k in ("class",) or k not in REWARD}
    reward = _build(f"rewards.{name}", settings, folder, device)
    for key in ("tasks", "held_out", "training", "scale"):
        if key in spec:
            setattr(reward, key, spec[key])
    return reward


def _build(where: str, spec: Mapping[str, Any], folder: Path, device: str) -> Any:
    kind = reward_class(where, spec["class"], folder)
    if "token" in spec:
        raise ValueError(
            f"{where}.token: a secret is not written in a file; set FLOWOPD_REWARD_TOKEN"
        )
    known = inspect.signature(kind).parameters
    settings = {}
    check_keys(where, {k: None for k in spec if k != "class"}, known)
    for key, value in spec.items():
        if isinstance(value, Mapping) and "class" in value:
            settings[key] = _build(f"{where}.{key}", value, folder, device)
        elif key != "class":
            settings[key] = _placed(value, folder)
    plain = {k: v for k, v in settings.items() if isinstance(v, VALUES)}
    settings |= check_options(where, plain, kind)
    if "device" in known:
        settings.setdefault("device", device)
    lacking = [k for k, p in known.items() if p.default is p.empty and k not in settings]
    if lacking:
        raise ValueError(f"{where} lacks {lacking[0]}, which {spec['class']} needs")
    return kind(**settings)


def _placed(value: Any, folder: Path) -> Any:
    if not isinstance(value, str):
        return value
    text = expanded(value)
    return str(folder / text) if text and (folder / text).exists() else text


def reward_class(where: str, name: str, folder: Path) -> type:
    """`Name` is one of ours, `package.module:Name` and `file.py:Name` (as seen from the benchmark's folder)
    anybody's."""
    source, _, own = name.rpartition(":")
    if not source:
        if not hasattr(rewards, name):
            raise ValueError(
                f"{where}.class {name!r} is none of ours{nearest(name, rewards.__all__)}: "
                f"{', '.join(rewards.__all__)}; another's is written module:Name or file.py:Name"
            )
        return getattr(rewards, name)
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(source).stem, folder / source)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
        return getattr(module, own)
    except (OSError, ImportError, AttributeError) as error:
        raise ValueError(f"{where}.class {name!r} cannot be loaded: {error}") from error
