"""A profile, the parameters of its notebooks, and what the commands about one have in common."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml

from ..files import ROOT, RUNS
from ..inputs import check_kinds, kinds_of, nearest, read_yaml

NOTEBOOKS = ROOT / "notebooks"


def load_profile(name: str) -> dict[str, dict]:
    """`papermill_runs/profiles/NAME.yaml`: a mapping of notebook to parameters, in the order of execution."""
    path = RUNS / "profiles" / f"{name}.yaml"
    if not path.is_file():
        names = [p.stem for p in sorted(path.parent.glob("*.yaml"))]
        raise ValueError(f"no profile {name!r}{nearest(name, names)}; there are {', '.join(names)}")
    profile = read_yaml(path)
    if not isinstance(profile, dict) or not all(
        isinstance(p, dict | None) for p in profile.values()
    ):
        raise ValueError(
            f"{path} must map notebooks to their parameters, such as `00_quickstart: {{n_test: 12}}`"
        )
    return {notebook: parameters or {} for notebook, parameters in profile.items()}


def parameters_of(notebook: Path) -> dict:
    """A notebook's parameters with their defaults."""
    return {
        name: ast.literal_eval(found["default"])
        for name, found in papermill.inspect_notebook(str(notebook)).items()
    }


def check_parameters(notebook: Path, parameters: dict) -> None:
    """papermill only warns about a parameter the notebook does not have; a misspelt one is an error here, and
    so is a value of another type than the default's."""
    if not notebook.is_file():
        raise ValueError(
            "no notebook "
            f"{notebook.stem!r}{nearest(notebook.stem, [p.stem for p in NOTEBOOKS.glob('*.ipynb')])}"
        )
    known = parameters_of(notebook)
    for name, value in parameters.items():
        if name not in known:
            raise ValueError(
                f"{notebook.name} has no parameter {name!r}{nearest(name, list(known))}; it has "
                f"{', '.join(known)}"
            )
        if name == "out_dir":
            raise ValueError(
                f"out_dir of {notebook.name} is set by the run, to a folder in the run's own (--folder)"
            )
        default = known[name]
        if type(value) is not type(default) and not (
            isinstance(default, float) and type(value) is int
        ):
            raise ValueError(
                f"{notebook.name} takes {name} as {type(default).__name__}, such as {default!r}, not "
                f"{value!r}"
            )
    kinds = kinds_of(c.source for c in nbformat.read(notebook, 4).cells if c.cell_type == "code")
    try:
        check_kinds({name: value for name, value in parameters.items() if name in kinds}, kinds)
    except ValueError as error:
        raise ValueError(f"{notebook.name}: {error}") from error


def choose(profile: str, only: str, overrides: Mapping) -> dict[str, dict]:
    """The profile's notebooks that begin with `only` and their parameters, checked. An override goes to the
    notebooks that have it.

    Raises ValueError if none has it.
    """
    every = load_profile(profile)
    chosen = {n: p for n, p in every.items() if n.startswith(only)}
    if not chosen:
        raise ValueError(
            f"profile {profile!r} has no notebook that begins with {only!r}; it has {', '.join(every)}"
        )
    for notebook, parameters in chosen.items():
        check_parameters(NOTEBOOKS / f"{notebook}.ipynb", parameters)
    known = {n: list(parameters_of(NOTEBOOKS / f"{n}.ipynb")) for n in chosen}
    for name in overrides:
        if not any(name in names for names in known.values()):
            names = list(dict.fromkeys(n for names in known.values() for n in names))
            raise ValueError(
                f"there is no parameter {name!r}{nearest(name, names)} in {', '.join(chosen)}; there are "
                f"{', '.join(names)}"
            )
    chosen = {
        n: {**p, **{k: v for k, v in overrides.items() if k in known[n]}} for n, p in chosen.items()
    }
    for notebook, parameters in chosen.items():
        check_parameters(NOTEBOOKS / f"{notebook}.ipynb", parameters)
    return chosen


def profile_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser with profile, --only, --set and --folder."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("profile", help="a file of papermill_runs/profiles, without .yaml")
    parser.add_argument("--only", default="", help="notebooks that begin with this, such as 00")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="override parameters, in the notebooks that have them",
    )
    parser.add_argument(
        "--folder", type=Path, help="where the run goes (default: papermill_runs/PROFILE)"
    )
    return parser


def overrides_of(items: list[str]) -> dict[str, Any]:
    """The values of --set by name. Raises ValueError for what is no NAME=VALUE, with a value in YAML."""
    found = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, not {item!r}")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(
                f"the value in --set {item!r} is no YAML, such as 3, [a, b] or {{a: 3}}"
            ) from error
    return found
