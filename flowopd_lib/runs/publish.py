"""A finished run made small enough to commit, and a page of its results.

What stays: the executed notebooks, tables, figures and the thumbnails of each model's first
training; adapters are for `python -m flowopd_lib cache`. The page has the question, the figures and
the conclusion of every notebook, as they came out of the run: no number is typed.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import nbformat
import pandas as pd

from ..files import write_whole
from .report import duration, machine_text, read_status
from .runner import load_profile

LIMIT = 30_000_000  # bytes
KEPT = (".ipynb", ".png", ".json", ".jsonl", ".csv", ".yaml")


def publish(run: Path, out: Path, page: Path) -> int:
    """Copy what a reader needs of `run` into `out`, in place of what lies there, and write the page
    of its results; the bytes of `out`.

    Raises ValueError for a run that is not finished, is of several commits or of files that no
    commit has, or is too large.
    """
    check_finished(run)
    kept = first_thumbnails(run)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        small = Path(folder) / out.name
        for path in (p for p in run.rglob("*") if p.is_file()):
            data = _small(path, path.relative_to(run), kept)
            if data is not None:
                write_whole(small / path.relative_to(run), data)
        size = sum(p.stat().st_size for p in small.rglob("*") if p.is_file())
        if size > LIMIT:
            raise ValueError(f"{run} would have {size / 1e6:.0f} MB, more than {LIMIT / 1e6:.0f}")
        shutil.rmtree(out, ignore_errors=True)
        small.rename(out)
    write_whole(page, results_page(out, page))
    return size


def check_finished(run: Path) -> None:
    """Raises ValueError unless every notebook of the run's profile is done, all at one commit."""
    status, manifest = read_status(run), json.loads((run / "manifest.json").read_text())
    for notebook in load_profile(manifest["profile"]):
        state = status.get(notebook, {}).get("state", "missing")
        if state != "done":
            raise ValueError(f"{run} is not finished: {notebook} is {state}; --resume the run")
    commits = set()
    for name, entry in manifest["notebooks"].items():
        if not entry["git"] or entry["git"]["dirty"]:
            raise ValueError(f"{name} ran from files that no commit has; commit them and run again")
        commits.add(entry["git"]["commit"][:10])
    if len(commits) > 1:
        raise ValueError(
            f"{run} is of several commits ({', '.join(sorted(commits))}); run again at one"
        )


def first_thumbnails(run: Path) -> set[Path]:
    """The files of the thumbnails of each model's first training (training K of NAME is the model
    NAME#K), and of validation samples."""
    kept = {*run.rglob("validation/*.zip")}
    for path in run.rglob("*.parquet"):
        table = pd.read_parquet(path)
        if "image" in table:
            later = table["model"].str.contains(r"#[1-9]\d*$") | (table.get("train_seed", 0) != 0)
            kept |= {_archive(path, image) for image in table.loc[~later, "image"].dropna()}
    return kept


def _archive(table: Path, image: str) -> Path:
    return table.parent / image.rpartition("/")[0]


def _small(path: Path, name: Path, kept: set[Path]) -> bytes | None:
    """What stays of a file of the run, called `name` in it; None: nothing."""
    parts = name.parts
    if {"earlier", "adapter"} & {*parts} or any(part.startswith(".") for part in parts):
        return None
    if path.suffix == ".parquet":
        return _small_table(path, kept)
    return path.read_bytes() if path in kept or path.suffix in KEPT else None


def _small_table(path: Path, kept: set[Path]) -> bytes:
    table, file = pd.read_parquet(path).drop(columns="embedding", errors="ignore"), io.BytesIO()
    if "image" in table:
        there = [_archive(path, str(image)) in kept for image in table["image"]]
        table["image"] = table["image"].where(there)
    table.to_parquet(file)
    return file.getvalue()


def results_page(run: Path, page: Path) -> str:
    """The page in Markdown, with links as seen from `page`: of each notebook its question, its
    figures, and the last cell's output in Markdown, its conclusion."""
    manifest = json.loads((run / "manifest.json").read_text())
    commit = next(iter(manifest["notebooks"].values()))["git"]["commit"][:10]

    def link(path: Path) -> str:
        return os.path.relpath(path.resolve(), page.resolve().parent)

    lines = [
        f"# Results of the profile {manifest['profile']}",
        f"Written by `python -m flowopd_lib publish` from [the run]({link(run)}): commit {commit}, "
        f"{manifest['date'][:10]}, {machine_text(manifest['machine'])}. Intervals are 95 %.",
    ]
    for name, entry in manifest["notebooks"].items():
        cells = nbformat.read(run / f"{name}.ipynb", 4).cells
        outputs = [o.get("data", {}) for c in cells for o in c.get("outputs", ())]
        conclusions = [data["text/markdown"] for data in outputs if "text/markdown" in data]
        if not conclusions:
            continue
        text = next(c.source for c in cells if c.cell_type == "markdown")
        question = re.search(r"\*\*Question\.?\*\*\.? (.+?)(?:\n\n|$)", text, re.S)
        lines.append(f"## [{text.splitlines()[0].lstrip('# ')}]({link(run / f'{name}.ipynb')})")
        lines += [" ".join(question[1].split())] if question else []
        figures = sorted((run / name).glob("*.png"))
        lines += [f"![{name}: {figure.stem}]({link(figure)})" for figure in figures]
        machine = machine_text(entry.get("machine", manifest["machine"]))
        lines += [conclusions[-1].strip(), f"({duration(entry['seconds'])}, {machine})"]
    return "\n\n".join(lines) + "\n"
