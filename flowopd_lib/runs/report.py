"""What a run leaves to read: a manifest, which says what ran from which commit on what, and one
page with the text and outputs of its notebooks."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import torch
from latex2mathml.converter import convert
from latex2mathml.exceptions import NoAvailableTokensError
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat.v4 import new_markdown_cell, new_notebook

from ..precision import decide
from .fingerprints import file_hash, library_inputs

STYLE = """body { max-width: 62rem; margin: 2rem auto; font: 16px/1.5 system-ui, sans-serif; }
img { max-width: 100%; height: auto; } pre { overflow-x: auto; }
table { display: block; overflow-x: auto; font-size: .85rem; border-collapse: collapse; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: left; }"""


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
        "architecture": platform.machine(),
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
        "precision": str(decide(folder, write=False)).removeprefix("torch."),
        "inputs": {n: h for n, h in library_inputs().items() if not n.endswith(".py")},
        "notebooks": notebooks,
    }


class _MathML(IPythonRenderer):
    """Formulas as MathML, which browsers show without a script or a network. One that cannot be
    converted stays as it is."""

    def inline_math(self, body: str, display: str = "inline") -> str:
        try:  # without the namespace, an address that HTML knows
            return re.sub(' xmlns="[^"]*"', "", convert(body, display=display))
        except (NoAvailableTokensError, IndexError, ValueError):
            return self.escape_html(f"${body}$")

    def block_math(self, body: str) -> str:
        return self.inline_math(body, "block")


def _to_html(markdown: str) -> str:
    renderer = _MathML(escape=False, exclude_anchor_links=True)
    return MarkdownWithMath(renderer=renderer).render(markdown)


def page(manifest: Mapping[str, Any], folder: Path) -> str:
    """One HTML file: a table of the notebooks, then the text and outputs of each, figures inside,
    without code."""
    notebooks, columns = manifest["notebooks"], ["state", "seconds", "resumed", "git", "parameters"]
    table = pd.DataFrame.from_dict(notebooks, "index").reindex(columns=columns)
    about = f"{manifest['date']}; {machine_text(manifest['machine'])}; {manifest['precision']}"
    files = {name: folder / f"{name}.ipynb" for name in notebooks}
    files = {name: path for name, path in files.items() if path.is_file()}
    links = " · ".join(f"[{name}](#{name})" for name in files)
    title = f"# Flow-OPD lab: {manifest['profile']}\n\n{about}\n\n{links}\n\n"
    cells = [new_markdown_cell(title + table.to_html(na_rep=""))]
    for name, path in files.items():
        cells += [new_markdown_cell(f'<hr id="{name}">'), *nbformat.read(path, 4).cells]
    for number, cell in enumerate(cells):
        cell.id = str(number)
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    options = {"exclude_input": True, "exclude_output_prompt": True}
    exporter = HTMLExporter(template_name="basic", filters={"markdown2html": _to_html}, **options)
    body, _ = exporter.from_notebook_node(new_notebook(cells=cells))
    return f'<!DOCTYPE html>\n<meta charset="utf-8">\n<style>{STYLE}</style>\n{body}'
