"""Profiles: which notebooks a run executes, in this order, and with which parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, RootModel

from ..config import choose, read_yaml, validate
from ..files import ROOT, RUNS
from ..lab.notebook import read_parameters

NOTEBOOKS = ROOT / "notebooks"


class Profile(RootModel):
    """A profile's file: `00_quickstart: {n_test: 12}`; nothing after the colon: its defaults."""

    root: dict[str, Annotated[dict[str, Any], BeforeValidator(lambda value: value or {})]]


def profile_path(name: str) -> Path:
    """A profile of papermill_runs/profiles by its name, or any YAML file."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    names = {p.stem: p for p in sorted((RUNS / "profiles").glob("*.yaml"))}
    return names[choose("profile", name, names)]


def load_profile(name: str) -> dict[str, dict[str, Any]]:
    """The parameters of a profile's notebooks."""
    path = profile_path(name)
    return validate(Profile, read_yaml(path), str(path)).root


def notebook_path(notebook: str) -> Path:
    names = {p.stem: p for p in sorted(NOTEBOOKS.glob("*.ipynb"))}
    return names[choose("notebook", notebook, names)]


def choose_notebooks(
    profile: str, only: str = "", overrides: Mapping[str, Any] = {}
) -> dict[str, dict[str, Any]]:
    """The notebooks of a profile that begin with `only`, with all their parameters but `out_dir`;
    an override goes to the notebooks that have it.

    Raises ValueError for a notebook or a parameter that does not exist, and for a value that the
    parameter's annotation does not allow: before any notebook starts.
    """
    every = load_profile(profile)
    models = {n: read_parameters(notebook_path(n)) for n in every if n.startswith(only)}
    if not models:
        raise ValueError(
            f"no notebook of the profile {profile} begins with {only!r}; it has {', '.join(every)}"
        )
    known = {name for model in models.values() for name in model.model_fields} - {"out_dir"}
    for name in overrides:
        choose("parameter of these notebooks", name, sorted(known))
    chosen = {}
    for notebook, model in models.items():
        own = {k: v for k, v in overrides.items() if k in model.model_fields}
        values = validate(model, every[notebook] | own, f"{notebook}.ipynb").model_dump()
        if values.pop("out_dir", ""):
            raise ValueError(f"{notebook}: out_dir is set by the run, in its own --folder")
        chosen[notebook] = values
    return chosen


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """`NAME=VALUE` with values in YAML, by name. Raises ValueError."""
    overrides = {}
    for name, _, text in (item.partition("=") for item in items):
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"the value of {name} is not YAML: {text!r}") from error
        number = isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value)
        overrides[name] = float(value) if number else value  # YAML takes 3e-4 for a string
    return overrides
