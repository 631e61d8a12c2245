"""Settings from files, notebooks and Python, checked by pydantic before anything long begins."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from .fingerprint import PLUGIN

T = TypeVar("T")
# pydantic's kinds of fault
UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
MISSING_KEY = ("missing", "missing_argument")
CONFIG = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 31)]


class Config(BaseModel):
    """A section of a YAML file: unknown keys are errors."""

    model_config = CONFIG


def refuse_unused(config: Config, **unused: str) -> None:
    """Raises ValueError for a setting that was given and has no effect; `unused`: why, by name."""
    for name, why in unused.items():
        if name in config.model_fields_set and getattr(config, name) is not None:
            raise ValueError(f"{name} has no effect {why}; leave it out")


# Settings that are given by position too, such as `Sampler(10, "sde")`.
settings = dataclass(frozen=True, config=CONFIG)


def validate(kind: type[T], value: Any, where: str = "") -> T:
    """`value` as `kind` (a Config, a settings class or any annotation). Raises ValueError: one
    sentence with file or name (`where`), key, pydantic's message and the value."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise ValueError(sentence(error, where, kind, value)) from None


def sentence(error: ValidationError, where: str = "", kind: Any = None, value: Any = None) -> str:
    """One fault of a ValidationError in one line: of a union, that of the alternative that matched
    best, and a misspelt key before the one that is missing for it. `value`: what was validated."""
    faults = error.errors(include_url=False)
    fault = max(faults, key=lambda e: (len(e["loc"]), e["type"] in UNKNOWN_KEY))
    keys, message = _keys(fault, value), fault["msg"].removeprefix("Value error, ")
    if fault["type"] in UNKNOWN_KEY:
        message = f"no such setting{nearest(keys[-1], fields_at(kind, keys[:-1]))}"
    elif fault["type"] not in ("value_error", *MISSING_KEY):
        message += f", not {fault['input']!r}"
    return ": ".join(part for part in (where, ".".join(keys), message) if part)


def _keys(fault: Mapping, value: Any) -> list[str]:
    """Where a fault is: without pydantic's names for the alternatives of a union, which are no keys
    of the value."""
    if value is None:
        return [str(key) for key in fault["loc"]]
    keys = []
    for key in fault["loc"]:
        with contextlib.suppress(LookupError, TypeError):
            value = value[key]
            keys.append(str(key))
    return [*keys, str(fault["loc"][-1])] if fault["type"] in MISSING_KEY else keys


def fields_at(kind: Any, keys: Sequence[str]) -> list[str]:
    """The names of the settings of `kind`, or of the section of it under `keys`; of a union, those
    of all its alternatives."""
    if fields := getattr(kind, "__pydantic_fields__", {}):
        if not keys:
            return list(fields)
        return fields_at(fields[keys[0]].annotation, keys[1:]) if keys[0] in fields else []
    below = keys[1:] if get_origin(kind) in (dict, Mapping) else keys
    return [name for part in get_args(kind) for name in fields_at(part, below)]


def nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def choose(what: str, name: str, known: Iterable[str]) -> str:
    """`name`, if it is one of `known`. Raises ValueError with the nearest one."""
    known = list(known)
    if name not in known:
        there = ", ".join(known) or "none"
        raise ValueError(
            f"there is no {what} {name!r}{nearest(str(name), known)}; there are {there}"
        )
    return name


class _Loader(yaml.SafeLoader):
    """Keys are strings as they are written (`no` and `on` too), and so are dates."""

    yaml_implicit_resolvers = {
        first: [one for one in found if one[0] != "tag:yaml.org,2002:timestamp"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                key.tag = "tag:yaml.org,2002:str"


def read_yaml(path: str | Path) -> Any:
    """A YAML file. Raises ValueError with file and line for what is not YAML, FileNotFoundError
    where there is none."""
    path = Path(path)
    if not path.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise FileNotFoundError(f"there is no {path}{nearest(path.stem, there)}")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def load_plugin(name: str, folder: str | Path = ".") -> Any:
    """A user's function or class: `file.py:name` (as seen from `folder`) or `package.module:name`.
    Raises ValueError with the reason if it cannot be loaded."""
    source, _, attribute = name.rpartition(":")
    try:
        if source.endswith(".py"):
            path = (Path(folder) / source).resolve()
            module = _module_of(path, hashlib.sha256(path.read_bytes()).hexdigest())
        else:
            module = importlib.import_module(source)
        return getattr(module, attribute)
    except Exception as error:  # whatever the user's code raises
        raise ValueError(
            f"{name!r} cannot be loaded ({error}); write file.py:name or package.module:name"
        ) from error


class _PluginLoader(SourceFileLoader):
    """Without Python's cache of bytecode, which takes two versions of one second for the same."""

    def get_code(self, fullname: str):
        return self.source_to_code(self.get_data(self.path), self.path)


@cache
def _module_of(path: Path, sha256: str) -> ModuleType:
    """Each version of a file is run once. It is among Python's modules, for `inspect` finds the
    source of a class by its module alone."""
    name = f"{PLUGIN}{hashlib.sha256(str(path).encode()).hexdigest()[:8]}_{path.stem}"
    loader = _PluginLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plugin_name(plugin: Callable) -> str:
    """What `load_plugin` loads a function or class by; the name alone of one of a notebook."""
    module = sys.modules.get(plugin.__module__)
    if plugin.__module__ == "__main__" or module is None:
        return plugin.__qualname__
    of_file = plugin.__module__.startswith(PLUGIN)
    return f"{module.__file__ if of_file else plugin.__module__}:{plugin.__qualname__}"


def _plugin(value: Any) -> Any:
    return load_plugin(value) if isinstance(value, str) and ":" in value else value


# A setting that names a function: one of ours by its name, or a user's own (see `load_plugin`).
Plugin = Annotated[str | Callable, BeforeValidator(_plugin)]
