"""`python -m flowopd_lib.runs.diff RUN_A RUN_B`: what differs between two runs: parameters, scores, the
notebooks' text."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import nbdime
import nbformat
from nbdime.prettyprint import PrettyPrintConfig, pretty_print_diff

from .profiles import parameters_of
from .runner import read_status


def parameters(folder: Path, notebook: str, given: dict) -> dict:
    """Every parameter a notebook ran with, its defaults included, but for where its results went."""
    executed = folder / f"{notebook}.ipynb"
    return {
        k: v
        for k, v in {**(parameters_of(executed) if executed.is_file() else {}), **given}.items()
        if k not in ("out_dir", "run_dir")
    }


def scores(folder: Path, notebook: str) -> dict[str, dict]:
    """The records with a mean in a notebook's `results.json`, by what identifies them: the key of their list
    and their text fields."""
    path, found = folder / notebook / "results.json", {}
    results = json.loads(path.read_text()) if path.is_file() else {}
    for key, records in results.items():
        for record in records if isinstance(records, list) else []:
            if isinstance(record, dict) and "mean" in record:
                label = base = " ".join(
                    [key, *(f"{k}={v}" for k, v in sorted(record.items()) if isinstance(v, str))]
                )
                count = 1
                # records that differ by numbers only, such as points on a curve, match by their order
                while label in found:
                    count += 1
                    label = f"{base} #{count}"
                found[label] = record
    return found


def told(record: dict | None) -> str:
    if record is None or record["mean"] is None:
        return "none"
    interval = (
        f" [{record['low']:.4g}, {record['high']:.4g}]"
        if record.get("low") is not None and record.get("high") is not None
        else ""
    )
    return f"{record['mean']:.4g}{interval}" + (f" n={record['n']}" if "n" in record else "")


def verdict(a: dict | None, b: dict | None) -> str:
    """Whether the intervals of two scores overlap."""
    ends = [r.get(k) if r else None for r in (a, b) for k in ("low", "high")]
    if None in ends:
        return "no intervals"
    return "apart" if ends[0] > ends[3] or ends[2] > ends[1] else "overlap"


def source(folder: Path, notebook: str) -> nbformat.NotebookNode | None:
    """The executed copy's own cells, without outputs, metadata and ids; None where there is none."""
    path = folder / f"{notebook}.ipynb"
    if not path.is_file():
        return None
    cells = [
        c
        for c in nbformat.read(path, 4).cells
        if not {"injected-parameters", "papermill-error-cell-tag"} & set(c.metadata.get("tags", []))
    ]
    bare = [
        {
            "cell_type": c.cell_type,
            "metadata": {},
            "source": c.source,
            **({"outputs": [], "execution_count": None} if c.cell_type == "code" else {}),
        }
        for c in cells
    ]
    return nbformat.from_dict({"cells": bare, "metadata": {}, "nbformat": 4, "nbformat_minor": 4})


def _table(rows: list[tuple[str, str, str, str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(3)] if rows else []
    for name, a, b, remark in rows:
        yield f"  {name:{widths[0]}}   {a:{widths[1]}} | {b:{widths[2]}}   {remark}".rstrip()


def compare(a: Path, b: Path, notebooks: bool = False) -> Iterator[str]:
    """Lines that say what differs, notebook by notebook; with `notebooks` also how their text does. Raises
    ValueError if a folder is no run."""
    runs = {folder: read_status(folder) for folder in (a, b)}
    for folder, status in runs.items():
        if not status:
            raise ValueError(f"{folder} is no run: it has no status.json")
    yield f"A: {a}\nB: {b}"
    for side, there, here in (("A", runs[a], runs[b]), ("B", runs[b], runs[a])):
        missing = [n for n in there if n not in here]
        if missing:
            yield f"only in {side}: {', '.join(missing)}"
    for notebook in (n for n in runs[a] if n in runs[b]):
        yield f"\n{notebook}"
        entries = [runs[folder][notebook] for folder in (a, b)]
        if any(e["state"] != "done" for e in entries):
            yield f"  state: {entries[0]['state']} | {entries[1]['state']}"
        ours, theirs = (
            parameters(folder, notebook, e.get("parameters", {}))
            for folder, e in zip((a, b), entries)
        )
        changed = [
            (k, *(repr(p[k]) if k in p else "none" for p in (ours, theirs)), "")
            for k in ours | theirs
            if k not in ours or k not in theirs or ours[k] != theirs[k]
        ]
        yield "  parameters: " + (f"{len(changed)} differ" if changed else "the same")
        yield from _table(changed)
        ours, theirs = scores(a, notebook), scores(b, notebook)
        pairs = {k: (ours.get(k), theirs.get(k)) for k in ours | theirs}
        changed = [
            (k, told(x), told(y), verdict(x, y))
            for k, (x, y) in pairs.items()
            if x is None
            or y is None
            or any(x.get(f) != y.get(f) for f in ("mean", "low", "high", "n"))
        ]
        if pairs:
            yield (
                f"  scores: {len(changed)} of {len(pairs)} differ, "
                f"{sum(row[3] == 'apart' for row in changed)} with intervals apart"
            )
        yield from _table(changed)
        texts = [source(folder, notebook) for folder in (a, b)]
        if None in texts:
            yield (
                "  text: no executed copy in "
                f"{' and '.join(side for side, text in zip('AB', texts) if text is None)}"
            )
            continue
        difference = nbdime.diff_notebooks(*texts)
        yield "  text: " + (
            "the same"
            if not difference
            else "differs" + ("" if notebooks else " (--notebooks shows it)")
        )
        if difference and notebooks:
            out = io.StringIO()
            pretty_print_diff(
                texts[0],
                difference,
                "",
                PrettyPrintConfig(
                    out, use_git=False, use_diff=False, use_color=sys.stdout.isatty()
                ),
            )
            yield out.getvalue().rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flowopd_lib.runs.diff", description=__doc__)
    parser.add_argument(
        "a",
        type=Path,
        metavar="RUN_A",
        help="a folder that flowopd_lib.runs.run wrote, such as papermill_runs/demo",
    )
    parser.add_argument("b", type=Path, metavar="RUN_B")
    parser.add_argument(
        "--notebooks", action="store_true", help="also show how the notebooks' text differs"
    )
    args = parser.parse_args()
    try:
        for line in compare(args.a, args.b, args.notebooks):
            print(line)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
