"""A whole run made small enough to be committed: `python -m flowopd_lib.runs.reference RUN FOLDER`.

Notebooks as they were run, their results, figures (of 256 colours), scores and curves (of five digits); of
the adapters those that the gallery shows, in half precision, and of the pictures those of their first
trainings, or none (--no-gallery). States and embeddings are left out.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import shutil
import tempfile
from pathlib import Path

import pandas as pd
import torch
from PIL import Image
from safetensors.torch import load_file, save

from ..files import write_json
from .profiles import load_profile
from .runner import read_status

LARGEST = 25_000_000  # bytes
SHOWN = "05_opd"  # whose students and pictures the gallery shows
ADAPTERS = ("student", "GRPO-Mix")
LEFT_OUT = (
    "Left out to stay small: states, embeddings, report.html, digits of curves after the fifth, colours of "
    "figures but 256, "
)
GALLERY = (
    f"adapters but those of {SHOWN}/{{{','.join(ADAPTERS)}}} (kept in bfloat16), pictures but those of "
    f"{SHOWN} and of the first training of each model."
)
NO_GALLERY = "adapters, pictures but those of figures."
DIGITS, COLOURS = 5, 256


def make_small(run: str | Path, out: str | Path, gallery: bool = True) -> int:
    """Copy what a reader needs of `run` into `out`, in place of what lies there; its bytes. Without `gallery`
    the pictures and adapters that notebook 09 shows are left out too.

    Raises ValueError for a run that is not whole, is of several commits or of changed files, or is too large.
    """
    run, out = Path(run), Path(out)
    status, record = read_status(run), json.loads((run / "manifest.json").read_text())
    for notebook in load_profile(record["profile"]):
        state = status.get(notebook, {}).get("state", "not there")
        if state != "done":
            raise ValueError(
                f"{run} is no whole run: {notebook} is {state}; go on with it (--resume)"
            )
    commits = {name: told["git"] for name, told in record["notebooks"].items()}
    different = {git["commit"] for git in commits.values()}
    if len(different) > 1:
        raise ValueError(
            f"{run} is of {len(different)} commits ({', '.join(sorted(c[:7] for c in different))}); a "
            "reference is of one: run anew what is of another"
        )
    changed = [name for name, git in commits.items() if git["dirty"]]
    if changed:
        raise ValueError(
            f"{changed[0]} ran from files that no commit has; commit them and run it anew"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        small = Path(folder) / "reference"
        for source in sorted(p for p in run.rglob("*") if p.is_file()):
            data = _kept(source, source.relative_to(run), gallery)
            if data is not None:
                target = small / source.relative_to(run)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
        write_json(
            small / "manifest.json",
            record | {"kept": LEFT_OUT + (GALLERY if gallery else NO_GALLERY)},
        )
        sizes = {p.relative_to(small): p.stat().st_size for p in small.rglob("*") if p.is_file()}
        if sum(sizes.values()) > LARGEST:
            most = sorted(sizes, key=sizes.get, reverse=True)[:3]
            told = ", ".join(f"{p} {sizes[p] / 1e6:.1f}" for p in most)
            raise ValueError(
                f"the reference would have {sum(sizes.values()) / 1e6:.0f} MB, more than "
                f"{LARGEST / 1e6:.0f}; the largest: {told} MB"
            )
        shutil.rmtree(out, ignore_errors=True)
        small.rename(out)
    return sum(sizes.values())


def _kept(source: Path, place: Path, gallery: bool) -> bytes | None:
    """What is kept of a file of the run at `place`."""
    if any(part.startswith(".") or part in ("earlier", "parts") for part in place.parts):
        return None
    if len(place.parts) == 1:
        if place.suffix == ".ipynb":
            return _notebook(source.read_text())
        return source.read_bytes() if place.name == "status.json" else None
    if place.suffix == ".parquet":
        if place.name not in ("samples.parquet", "ood.parquet") or len(place.parts) != 2:
            return None
        table, packed = pd.read_parquet(source), io.BytesIO()
        if "picture" in table:
            kept = [gallery and _pictured(str(p), source.parent) for p in table["picture"]]
            table["picture"] = table["picture"].where(kept)
        table.drop(columns=["embedding"], errors="ignore").to_parquet(packed, index=False)
        return packed.getvalue()
    if "adapter" in place.parts:
        if not gallery or place.parts[:2] not in [(SHOWN, name) for name in ADAPTERS]:
            return None
        if place.suffix == ".safetensors":
            return save(
                {key: w.to(torch.bfloat16) for key, w in load_file(source).items()},
                {"format": "pt"},
            )
        return source.read_bytes()
    if place.suffix == ".zip" or place.name == "about.json":
        kept = "looks" in place.parts or _pictured("/".join(place.parts[1:]), source.parents[1])
        return source.read_bytes() if gallery and kept else None
    if place.suffix == ".jsonl":
        rows = [json.loads(line, parse_float=_short) for line in source.read_text().splitlines()]
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if place.suffix == ".png":
        return _few_colours(source.read_bytes())
    return source.read_bytes() if place.suffix in (".json", ".csv") else None


def _pictured(place: str, notebook: Path) -> bool:
    """Whether the pictures at `place` in a notebook's folder are kept: those of the first training of each
    model of the gallery's."""
    return notebook.name == SHOWN and not re.search(r"_[1-9]\d*\.zip", place)


def _short(number: str) -> float:
    return float(f"{float(number):.{DIGITS}g}")


def _few_colours(png: bytes) -> bytes:
    """A picture with a palette, where that is smaller."""
    packed = io.BytesIO()
    few = Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    few.save(packed, "PNG", optimize=True)
    return min(packed.getvalue(), png, key=len)


def _notebook(text: str) -> bytes:
    notebook = json.loads(text)
    for cell in notebook.get("cells", []):
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                png = base64.b64decode("".join(data["image/png"]))
                data["image/png"] = base64.b64encode(_few_colours(png)).decode()
    return (json.dumps(notebook, indent=1, ensure_ascii=False) + "\n").encode()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flowopd_lib.runs.reference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a run's folder, such as papermill_runs/lab")
    parser.add_argument("out", type=Path, help="such as papermill_runs/reference")
    parser.add_argument(
        "--no-gallery", dest="gallery", action="store_false", help="without pictures and adapters"
    )
    args = parser.parse_args()
    try:
        size = make_small(args.run, args.out, args.gallery)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
