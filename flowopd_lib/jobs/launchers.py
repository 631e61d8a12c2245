"""A launcher by its name: the command line in whose processes a job runs.

`papermill_runs/launchers/NAME.yaml` has a `command`, a line or more of bash in which "$@" stands for the
job's arguments and $PYTHON for this interpreter, and `environment`, more variables. What the command starts
runs `-m flowopd_lib.jobs "$@"` in every process; torch.distributed's variables say which of them it is.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from ..files import RUNS
from ..inputs import check_mapping, nearest, read_yaml

KEYS = {"command": str, "environment": dict[str, str]}


def load_launcher(name: str) -> tuple[list[str], dict[str, str]]:
    """The command before a job's arguments, and its environment. Raises ValueError for a name or a file that
    is none."""
    names = {p.stem: p for p in sorted((RUNS / "launchers").glob("*.yaml"))}
    path = Path(name) if name.endswith((".yaml", ".yml")) else names.get(name)
    if path is None:
        raise ValueError(
            f"there is no launcher {name!r}{nearest(name, names)}; there are {', '.join(names)}, or give a "
            'YAML file of your own; "" computes in the notebook\'s own process'
        )
    given = read_yaml(path)
    check_mapping(str(path), given, KEYS, f"{path}: ")
    if '"$@"' not in given.get("command", ""):
        raise ValueError(f'{path} needs a command in which "$@" stands for the job\'s arguments')
    environment = {**os.environ, "PYTHON": sys.executable, "FLOWOPD_HEADLESS": "1"}
    environment["FLOWOPD_HEAD"] = platform.node()  # where the process that asks is
    return ["bash", "-c", given["command"], "job"], {**environment, **given.get("environment", {})}
