"""The samples that a training drew on the way."""

from __future__ import annotations

from pathlib import Path

from ..files import read_lines
from .gallery import Samples


def looks_of(folder: str | Path) -> Samples | None:
    """The samples drawn on the way, a model per look called `iteration N`; None: there are none yet."""
    rows = read_lines(Path(folder) / "looks.jsonl")
    if not len(rows):
        return None
    rows["number"] = rows["model"].str.removeprefix("iteration ").astype(int)
    return Samples(rows.sort_values("number", kind="stable").drop(columns="number"), folder)
