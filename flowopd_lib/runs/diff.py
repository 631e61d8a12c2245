"""Two runs compared: parameters and scores in tables, the notebooks' text by nbdime."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from nbdime import nbdiffapp

from .runner import read_status

VALUES = ["mean", "low", "high", "n"]  # of a score


def compare(a: Path, b: Path, notebooks: bool = False) -> None:
    """Print what differs between two runs; with `notebooks` also how the text of their notebooks
    does. Raises ValueError if a folder is no run."""
    runs = (a, b)
    for folder in runs:
        if not (status := read_status(folder)):
            raise ValueError(f"{folder} is no run: it has no status.json")
        print(f"{'A' if folder == a else 'B'}: {folder}, {len(status)} notebooks")
    common = [name for name in read_status(a) if name in read_status(b)]
    for what, table in (
        ("parameters and states", parameter_differences(runs, common)),
        ("scores", score_differences(runs, common)),
    ):
        print(f"\n{what}: {len(table)} differ")
        if len(table):
            print(table.to_string(na_rep="", float_format="{:.4g}".format))
    for name in common if notebooks else ():
        print(f"\n{name}")
        nbdiffapp.main(["--sources", *(str(folder / f"{name}.ipynb") for folder in runs)])


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
