"""What a run leaves to read: a manifest, which says what was run on what, and one page with the text and
outputs of its notebooks."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import torch
from PIL import Image

from ..precision import decide

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "rapidocr",
    "onnxruntime",
    "numpy",
    "scipy",
    "pandas",
    "papermill",
)
FORMULA = re.compile(
    r"(?P<code>(`+)[^`]*\2)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\s](?:[^$]*[^$\s])?)\$(?!\d)",
    re.S,
)
STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif;
  color: #222; }
img { max-width: 100%; height: auto; }
pre { overflow-x: auto; font-size: .85rem; }
table { border-collapse: collapse; font-size: .85rem; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
section { border-top: 3px solid #222; margin-top: 4rem; }
"""


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def checkout(root: Path, besides: Path) -> dict | None:
    """The commit of `root` and whether anything differs from it, `besides` left aside; None if `root` is no
    git checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *words],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    root = root.resolve()
    aside = [f":(exclude){besides.relative_to(root)}"] if besides.is_relative_to(root) else []
    try:
        if (
            Path(git("rev-parse", "--show-toplevel")).resolve() != root
        ):  # somebody else's, around ours
            return None
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--", ".", *aside)),
        }
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """What this is, without its name."""
    return {
        "cpus": os.cpu_count(),
        "architecture": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def manifest(
    profile: str, folder: Path, status: Mapping[str, dict], inputs: Mapping[str, str]
) -> dict:
    """What was run, from which commit, on what, and the hashes of what came out, but for the states of
    trainings (safetensors). No host name."""

    def files(notebook: str) -> dict:
        paths = sorted(
            p
            for p in (folder / notebook).rglob("*")
            if p.is_file()
            and p.suffix != ".safetensors"
            # locks, unfinished parts
            and not any(part.startswith(".") for part in p.relative_to(folder).parts)
        )
        return {
            p.relative_to(folder / notebook).as_posix(): {
                "sha256": sha256(p),
                "bytes": p.stat().st_size,
            }
            for p in paths
        }

    return {
        "profile": profile,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "machine": machine(),
        "precision": str(decide(folder, write=False)).removeprefix("torch."),
        "inputs": dict(inputs),
        "notebooks": {
            n: {
                **{k: s.get(k) for k in ("state", "parameters", "seconds", "fingerprint", "git")},
                **{k: s[k] for k in ("resumed", "machine") if s.get(k)},
                "files": {} if s["state"] == "waiting" else files(n),
            }
            for n, s in status.items()
        },
    }


def page(manifest: Mapping, folder: Path) -> str:
    """One HTML file: a table of the notebooks, then each one's text and outputs, figures inside, without
    code."""
    rows, sections = [], []
    for name, entry in manifest["notebooks"].items():
        executed, label = folder / f"{name}.ipynb", html.escape(name)
        if entry["state"] != "waiting" and executed.is_file():
            sections.append(f'<section id="{label}">\n{_body(executed)}\n</section>')
            label = f'<a href="#{label}">{label}</a>'
        parameters = ", ".join(f"{k} = {v!r}" for k, v in (entry["parameters"] or {}).items())
        seconds = (
            ""
            if entry["seconds"] is None
            else f"{entry['seconds']:.0f}" + (" (after a resume)" if entry.get("resumed") else "")
        )
        git = entry["git"] and entry["git"]["commit"][:10] + (
            " with changes" if entry["git"]["dirty"] else ""
        )
        cells = (label, entry["state"], seconds, git or "", html.escape(parameters))
        rows.append(f"<tr>{''.join(f'<td>{c}</td>' for c in cells)}</tr>")
    machine, title = manifest["machine"], html.escape(f"Flow-OPD lab: {manifest['profile']}")
    about = (
        f"{manifest['date']}; {machine['cpus']} CPUs ({machine['architecture']}), GPU {machine['gpu']}; "
        f"{manifest['precision']}"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta '
        f'charset="utf-8">\n<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n'
        f"<h1>{title}</h1>\n<p>{html.escape(about)}</p>\n"
        "<table>\n<tr><th>notebook</th><th>state</th><th>seconds</th><th>commit</th>"
        f"<th>parameters</th></tr>\n{chr(10).join(rows)}\n</table>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _body(path: Path) -> str:
    """An executed notebook's text and outputs as HTML without head."""
    from nbconvert import (
        HTMLExporter,  # here, because every notebook imports this package and none needs it
    )

    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_formulas(cell.source)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/markdown" in data:
                data["text/markdown"] = with_formulas(data["text/markdown"])
            data.pop("application/vnd.jupyter.widget-view+json", None)
            if "image/png" in data:
                width = output.metadata.get("image/png", {}).get("width")
                output.data = nbformat.from_dict(
                    {"text/html": _figure(base64.b64decode(data["image/png"]), width)}
                )
    exporter = HTMLExporter(
        template_name="basic",
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
    )
    return exporter.from_notebook_node(notebook)[0]


def with_formulas(markdown: str) -> str:
    """The same text, its LaTeX formulas as MathML, which browsers show without a script or a network. One
    that cannot be read stays as it is."""
    from latex2mathml.converter import convert
    from latex2mathml.exceptions import NoAvailableTokensError

    def shown(found: re.Match) -> str:
        if found["code"]:
            return found["code"]
        try:
            told = convert(
                found["block"] or found["inline"], display="block" if found["block"] else "inline"
            )
            return told.replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "")  # HTML knows
        except (NoAvailableTokensError, IndexError, ValueError):
            return found[0]

    return FORMULA.sub(shown, markdown)


def _figure(png: bytes, width: int | None) -> str:
    """An <img> that holds the picture, as WebP where that is smaller."""
    image, buffer = Image.open(io.BytesIO(png)), io.BytesIO()
    kind, data = "png", png
    if max(image.size) < 16384:  # WebP's limit
        image.save(buffer, "WEBP", quality=85, method=4)
        if len(buffer.getvalue()) < len(png):
            kind, data = "webp", buffer.getvalue()
    return (
        f'<img alt="figure" width="{width or image.width}" '
        f'src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
    )
