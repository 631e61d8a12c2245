"""Headless runs: notebooks executed by papermill with the parameters of a profile, results in one folder."""
from __future__ import annotations

import ast
import difflib
import json
import math
import os
import shutil
import time
from pathlib import Path

import nbformat
import papermill
import yaml
from papermill.exceptions import PapermillExecutionError

ROOT = Path(__file__).parent.parent
NOTEBOOKS, RUNS = ROOT / "notebooks", ROOT / "papermill_runs"


def load_profile(name: str) -> dict[str, dict]:
    """`papermill_runs/profiles/NAME.yaml`: a mapping of notebook to parameters, in the order of execution."""
    path = RUNS / "profiles" / f"{name}.yaml"
    if not path.is_file():
        names = [p.stem for p in sorted(path.parent.glob("*.yaml"))]
        raise ValueError(f"no profile {name!r}{nearest(name, names)}; there are {', '.join(names)}")
    profile = yaml.safe_load(path.read_text())
    if not isinstance(profile, dict):
        raise ValueError(f"{path} must map notebooks to their parameters, such as `00_quickstart: {{n_test: 12}}`")
    return {notebook: parameters or {} for notebook, parameters in profile.items()}


def nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def check_parameters(notebook: Path, parameters: dict) -> None:
    """papermill only warns about a parameter the notebook does not have; a misspelt one is an error here, and so is a
    value of another type than the default's."""
    if not notebook.is_file():
        raise ValueError(f"no notebook {notebook.stem!r}{nearest(notebook.stem, [p.stem for p in NOTEBOOKS.glob('*.ipynb')])}")
    known = papermill.inspect_notebook(str(notebook))
    for name, value in parameters.items():
        if name not in known:
            raise ValueError(f"{notebook.name} has no parameter {name!r}{nearest(name, list(known))}; it has {', '.join(known)}")
        default = ast.literal_eval(known[name]["default"])
        if type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
            raise ValueError(f"{notebook.name} takes {name} as {type(default).__name__}, such as {default!r}, not {value!r}")


def check_range(low: float, high: float, **parameters: float) -> None:
    """For a notebook's first cell: every parameter given by name must lie in [low, high]."""
    for name, value in parameters.items():
        if not low <= value <= high:
            raise ValueError(f"{name} must be between {low} and {high}, not {value}")


def write_json(path: Path, record) -> None:
    """Write whole or not at all; NaN, which JSON does not have, becomes null."""
    def plain(node):
        if isinstance(node, dict):
            return {key: plain(value) for key, value in node.items()}
        if isinstance(node, (list, tuple)):
            return [plain(value) for value in node]
        return None if isinstance(node, float) and math.isnan(node) else node
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(plain(record), indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


def execute(name: str, parameters: dict, folder: Path) -> float:
    """Run one notebook into `folder` and return its seconds. Raises RuntimeError that shows the failing cell.

    The notebook must take `out_dir`, `folder/name` here, and writes its results there. Widget state is dropped from the executed copy.
    """
    source, target, out = NOTEBOOKS / f"{name}.ipynb", folder / f"{name}.ipynb", folder / name
    os.environ["FLOWOPD_HEADLESS"] = "1"        # no bars in the executed copy
    target.unlink(missing_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    began = time.time()
    try:
        papermill.execute_notebook(str(source), str(target), {**parameters, "out_dir": str(out.resolve())},
                                   cwd=str(NOTEBOOKS), progress_bar=False, log_output=False)
    except PapermillExecutionError as error:
        raise RuntimeError(f"{name} failed in cell {error.exec_count}:\n\n{error.source}\n\n{error.ename}: {error.evalue}\n"
                           f"(executed up to there: {target})") from error
    finally:
        if target.exists():
            executed = nbformat.read(target, 4)
            executed.metadata.pop("widgets", None)
            nbformat.write(executed, target)
    return time.time() - began


def run_profile(name: str, only: str = "", overrides: dict | None = None, folder: Path | None = None, log=print) -> Path:
    """Execute a profile's notebooks in order into `folder` (default `papermill_runs/NAME`), with a `status.json`.

    Every parameter is checked before the first notebook starts.
    """
    chosen = {n: {**p, **(overrides or {})} for n, p in load_profile(name).items() if n.startswith(only)}
    if not chosen:
        raise ValueError(f"profile {name!r} has no notebook that begins with {only!r}; it has {', '.join(load_profile(name))}")
    for notebook, parameters in chosen.items():
        check_parameters(NOTEBOOKS / f"{notebook}.ipynb", parameters)
    folder = folder or RUNS / name
    folder.mkdir(parents=True, exist_ok=True)
    status = {n: {"state": "waiting"} for n in chosen}
    for i, (notebook, parameters) in enumerate(chosen.items(), 1):
        status[notebook] = {"state": "running", "parameters": parameters}
        write_json(folder / "status.json", status)
        log(f"[{i}/{len(chosen)}] {notebook} ...")
        try:
            seconds = execute(notebook, parameters, folder)
        except BaseException as error:
            status[notebook].update(state="failed", error=str(error) or type(error).__name__)
            write_json(folder / "status.json", status)
            raise
        status[notebook].update(state="done", seconds=round(seconds, 1))
        write_json(folder / "status.json", status)
        log(f"[{i}/{len(chosen)}] {notebook} done in {seconds:.0f} s: {folder / notebook}.ipynb")
    return folder
