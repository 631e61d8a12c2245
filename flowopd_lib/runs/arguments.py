"""What the commands about a profile have in common."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml


def of_profile(prog: str, description: str) -> argparse.ArgumentParser:
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
    parser.add_argument("--folder", type=Path, help="where the run goes (default: papermill_runs/PROFILE)")
    return parser


def overrides_of(items: list[str]) -> dict[str, Any]:
    """The values of --set by name. Raises ValueError for what is no NAME=VALUE, with a value in YAML."""
    found = {}
    for item in items:
        name, equals, value = item.partition("=")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(
                f"the value in --set {item!r} is no YAML, such as 3, [a, b] or {{a: 3}}"
            ) from error
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, not {item!r}")
    return found
