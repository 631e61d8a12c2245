"""What a run leaves to read: the status of its notebooks, a manifest, which says what ran from
which commit on what, one page with their text and outputs; and two runs compared."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import torch
from nbconvert import HTMLExporter
from nbformat.v4 import new_markdown_cell, new_notebook

from ..config import read_yaml, validate
from ..fingerprint import file_hash, sha256_of
from ..loading import decide, dtype_name

Status = dict[str, dict[str, Any]]  # by notebook: state, parameters, fingerprint, seconds, ...
VALUES = ["mean", "low", "high", "n"]  # of a score
SETTINGS = ["guidance", "steps", "resolution"]  # of a sample


def read_status(folder: Path) -> Status:
    """A run's `status.json`; empty where there is none. Raises ValueError, naming the file, if it
    is not one."""
    path = folder / "status.json"  # JSON is YAML
    return validate(Status, read_yaml(path), str(path)) if path.is_file() else {}


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def checkout(root: Path, folder: Path) -> dict | None:
    """The commit of `root`, and whether anything but `folder` differs from it; None if `root` is no
    git checkout."""
    if not (root / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "-C", root, "status", "--porcelain=v2", "--branch"]
    if folder.is_relative_to(root):
        command += ["--", ".", f":(exclude){folder.relative_to(root)}"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    first, *lines = result.stdout.splitlines()
    dirty = any(not line.startswith("#") for line in lines)
    return {"commit": first.removeprefix("# branch.oid "), "dirty": dirty}


def machine() -> dict[str, Any]:
    """What this is, without its name."""
    return {
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def machine_text(machine: Mapping[str, Any]) -> str:
    return f"{machine['cpus']} CPUs, GPU {machine['gpu']}"


def manifest(profile: str, folder: Path, status: Mapping[str, dict]) -> dict[str, Any]:
    """What was run, from which commit, on what, and the hashes of its results, but for the states
    of trainings (safetensors)."""
    notebooks = {}
    for name, entry in status.items():
        paths = [p for p in sorted((folder / name).rglob("*")) if p.is_file()]
        hashes = {
            p.relative_to(folder / name).as_posix(): file_hash(p)
            for p in paths
            if p.suffix != ".safetensors" and "/." not in p.relative_to(folder).as_posix()
        }
        notebooks[name] = {**entry, "files": hashes}
    return {
        "profile": profile,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {d.name: d.version for d in sorted(distributions(), key=lambda d: d.name)},
        "machine": machine(),
        "precision": dtype_name(decide(folder, write=False)),
        "notebooks": notebooks,
    }


def page(manifest: Mapping[str, Any], folder: Path) -> str:
    """One HTML file: a table of the notebooks, then the text and outputs of each, figures inside,
    without code; a browser needs a network only for its formulas."""
    notebooks, columns = manifest["notebooks"], ["state", "seconds", "resumed", "git", "parameters"]
    table = pd.DataFrame.from_dict(notebooks, "index").reindex(columns=columns)
    about = f"{manifest['date']}; {machine_text(manifest['machine'])}; {manifest['precision']}"
    files = {name: folder / f"{name}.ipynb" for name in notebooks}
    files = {name: path for name, path in files.items() if path.is_file()}
    links = " · ".join(f"[{name}](#{name})" for name in files)
    title = f"# Flow-OPD lab: {manifest['profile']}\n\n{about}\n\n{links}\n\n"
    cells = [new_markdown_cell(title + table.to_html(na_rep=""))]
    if len(settings := sampling_settings(folder, list(files))):
        cells.append(new_markdown_cell("## How samples were drawn\n\n" + settings.to_html()))
    for name, path in files.items():
        cells += [new_markdown_cell(f'<hr id="{name}">'), *nbformat.read(path, 4).cells]
    for number, cell in enumerate(cells):
        cell.id = str(number)
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    exporter = HTMLExporter(exclude_input=True, exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(new_notebook(cells=cells))
    return body


def sampling_settings(run: Path, notebooks: Sequence[str]) -> pd.DataFrame:
    """How the samples of a run's tables were drawn, by notebook, table and model: guidance, steps,
    resolution, number of images, and a hash of their seeds, the same for the same noise."""
    rows = []
    for notebook in notebooks:
        for path in sorted((run / notebook).rglob("*.parquet")):
            table = pd.read_parquet(path)
            if not {*SETTINGS, "seed"} <= {*table} or "/." in path.relative_to(run).as_posix():
                continue
            name = path.relative_to(run / notebook).with_suffix("").as_posix()
            for (model, *values), samples in table.groupby(["model", *SETTINGS], sort=False):
                noise = sha256_of(samples["seed"].tolist())[:8]
                rows.append((notebook, name, model, *values, len(samples), noise))
    index = ["notebook", "table", "model"]
    return pd.DataFrame(rows, columns=[*index, *SETTINGS, "images", "noise"]).set_index(index)


# ---- two runs compared


def compare(a: Path, b: Path) -> None:
    """Print what differs between two runs. Raises ValueError if a folder is no run."""
    runs = (a, b)
    for folder in runs:
        if not (status := read_status(folder)):
            raise ValueError(f"{folder} is no run: it has no status.json")
        print(f"{'A' if folder == a else 'B'}: {folder}, {len(status)} notebooks")
    common = [name for name in read_status(a) if name in read_status(b)]
    for what, table in (
        ("parameters and states", parameter_differences(runs, common)),
        ("settings of samples", setting_differences(runs, common)),
        ("scores", score_differences(runs, common)),
    ):
        print(f"\n{what}: {len(table)} differ")
        if len(table):
            print(table.to_string(na_rep="", float_format="{:.4g}".format))


def parameter_differences(runs: Sequence[Path], notebooks: Sequence[str]) -> pd.DataFrame:
    """The parameters and states in which two runs differ, A and B by notebook and name."""
    columns = {}
    for column, folder in zip("AB", runs):
        entries = {name: read_status(folder)[name] for name in notebooks}
        states = {(n, "state"): e["state"] for n, e in entries.items()}
        given = ((n, *item) for n, e in entries.items() for item in e.get("parameters", {}).items())
        columns[column] = pd.Series(states | {(n, k): repr(value) for n, k, value in given})
    table = pd.DataFrame(columns).drop(index="run_dir", level=1, errors="ignore")
    return table[table["A"].fillna("") != table["B"].fillna("")]


def setting_differences(runs: Sequence[Path], notebooks: Sequence[str]) -> pd.DataFrame:
    """The settings in which the samples of two runs differ, A and B by notebook, table, model and
    setting."""
    columns = {
        c: sampling_settings(run, notebooks).stack().groupby(level=[0, 1, 2, 3]).agg(tuple)
        for c, run in zip("AB", runs)
    }
    table = pd.DataFrame(columns).map(lambda v: v if isinstance(v, tuple) else ())
    return table[table["A"] != table["B"]].map(lambda v: ", ".join(map(str, v)))


def score_differences(runs: Sequence[Path], notebooks: Sequence[str]) -> pd.DataFrame:
    """The scores in which two runs differ, with mean, low, high (95 %) and n of A and B, and
    whether the intervals overlap."""
    columns = {c: pd.concat([_scores(f, n) for n in notebooks]) for c, f in zip("AB", runs)}
    table = pd.concat(columns, axis=1)
    a, b = table["A"], table["B"]
    overlap = (a["low"] <= b["high"]) & (b["low"] <= a["high"])
    overlap = overlap.map({True: "overlap", False: "disjoint"})
    table["intervals", ""] = overlap.where(a["low"].notna() & b["low"].notna(), "")
    return table[~((a == b) | (a.isna() & b.isna())).all(axis=1)]


def _scores(run: Path, notebook: str) -> pd.DataFrame:
    """The records with a mean in a notebook's results, by notebook, their list's key and strings,
    and their number among those that differ by numbers only, such as points of a curve."""
    path = run / notebook / "results.json"
    lists = json.loads(path.read_text()).items() if path.is_file() else ()
    rows = [
        {"score": " ".join([key, *(v for v in record.values() if isinstance(v, str))]), **record}
        for key, records in lists
        for record in (records if isinstance(records, list) else ())
        if isinstance(record, dict) and "mean" in record
    ]
    table = pd.DataFrame(rows, columns=["score", *VALUES]).assign(notebook=notebook)
    table[VALUES] = table[VALUES].astype(float)
    return table.set_index(["notebook", "score", table.groupby("score").cumcount().rename("#")])
