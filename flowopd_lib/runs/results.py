"""What a run found, as one page: `python -m flowopd_lib.runs.results papermill_runs/reference PAGE.md`.

Of each notebook its question, its figures and its own conclusion, as they came out of the run: no number is
typed. The page says which run and commit that was, and links to the executed notebooks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

import nbformat

from ..files import write_whole
from .report import duration
from .runner import read_status

# in this order; those that a run has
FIGURES = {
    "00_quickstart": ("samples.png",),
    "01_gradient_interference": ("along_base.png", "along_merged.png", "ways.png"),
    "02_mixed_reward_seesaw": ("scores.png", "paths.png", "seesaw.png", "short.png", "gold.png"),
    "03_expert_training": ("gains.png", "gold.png"),
    "04_cold_start": ("scores.png", "between.png"),
    "05_opd": ("scores.png", "curves.png", "gold.png", "gallery.png"),
    "06_mar": ("change.png", "gold.png", "hacking.png"),
    "07_opd_estimators": ("scores.png", "steps.png"),
    "08_results": ("claims.png", "surpassing.png"),
}


def results_page(run: Path, place: Path) -> str:
    """The page in Markdown, with links as seen from `place`, where it will lie. Raises ValueError for a run
    with a notebook that has not been run to its end."""
    status, record = read_status(run), json.loads((run / "manifest.json").read_text())
    machine = record["machine"]
    commits = {
        told["git"]["commit"][:10] for told in record["notebooks"].values() if told.get("git")
    }
    about = ", ".join(
        [f"commit {', '.join(sorted(commits)) or 'unknown'}", record["date"][:10], _told(machine)]
    )
    lines = [
        f"# Results of the profile {record['profile']}",
        "",
        f"Written by `python -m flowopd_lib.runs.results` from the run [{run.name}]({_link(run, place)}): "
        f"{about}. Intervals are 95 %.",
    ]
    for name, told in status.items():
        executed = run / f"{name}.ipynb"
        if told["state"] != "done" or not executed.is_file():
            raise ValueError(
                f"{run} is no whole run: {name} is {told['state']}; go on with it (--resume)"
            )
        notebook = nbformat.read(executed, 4)
        texts = [c.source for c in notebook.cells if c.cell_type == "markdown"]
        found = [_markdown(c) for c in notebook.cells if c.cell_type == "code" and _markdown(c)]
        if not found:
            continue  # it shows and concludes nothing
        title = re.search(r"^# (.+)$", texts[0], re.M)
        question = re.search(r"\*\*Question\.\*\* (.+?)(?:\n\n|$)", texts[0], re.S)
        lines += ["", f"## [{title[1] if title else name}]({_link(executed, place)})", ""]
        lines += [" ".join(question[1].split()), ""] if question else []
        for figure in FIGURES.get(name, ()):
            if (run / name / figure).is_file():
                lines += [
                    f"![{name}: {Path(figure).stem}]({_link(run / name / figure, place)})",
                    "",
                ]
        lines.append(found[-1].strip())
        if told.get("seconds"):
            other = told.get("machine", machine)
            lines += [
                "",
                f"({duration(told['seconds'])}{f', {_told(other)}' if other != machine else ''})",
            ]
    return "\n".join(lines) + "\n"


def _told(machine: dict) -> str:
    return f"{machine['cpus']} CPUs, GPU {machine['gpu']}"


def _markdown(cell) -> str:
    """What a cell put out as Markdown."""
    told = [o.get("data", {}).get("text/markdown", "") for o in cell.get("outputs", [])]
    return "\n".join("".join(part) for part in told if part)


def _link(path: Path, place: Path) -> str:
    return os.path.relpath(path.resolve(), place.resolve().parent)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flowopd_lib.runs.results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a run's folder, such as papermill_runs/reference")
    parser.add_argument("page", type=Path, help="the page to write, such as docs/results.md")
    args = parser.parse_args()
    try:
        write_whole(args.page, results_page(args.run, args.page))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
