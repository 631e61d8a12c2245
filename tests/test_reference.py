"""A whole run made small, and its page."""

import json
import re

import nbformat
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from flowopd_lib.files import ROOT, RUNS, write_json
from flowopd_lib.runs import reference
from flowopd_lib.runs.profiles import NOTEBOOKS, load_profile
from flowopd_lib.runs.results import FIGURES, results_page

NAMES = sorted(p.stem for p in NOTEBOOKS.glob("[0-9]*.ipynb"))


def write_run(folder, commits=("a" * 40,), dirty=False, state="done"):
    told = {}
    for number, name in enumerate(NAMES):
        (folder / name / "variant" / "adapter").mkdir(parents=True)
        (folder / f"{name}.ipynb").write_text("{}")
        write_json(folder / name / "results.json", {})
        (folder / name / "variant" / "metrics.jsonl").write_text('{"kl": 1.0}\n')
        (folder / name / "variant" / "state.safetensors").write_bytes(b"0" * 1000)
        save_file(
            {"w": torch.ones(3)},
            folder / name / "variant" / "adapter" / "adapter_model.safetensors",
        )
        table = pd.DataFrame({"model": ["base"], "OCR": [0.5], "embedding": [[1.0, 2.0]]})
        table.to_parquet(folder / name / "samples.parquet")
        table.to_parquet(folder / name / "equal.parquet")
        told[name] = {"git": {"commit": commits[number % len(commits)], "dirty": dirty}}
    student = folder / reference.SHOWN / "student" / "adapter"
    student.mkdir(parents=True)
    save_file({"w": torch.full((3,), 0.1)}, student / "adapter_model.safetensors")
    for name in (reference.SHOWN, "06_mar"):
        (folder / name / "pictures").mkdir()
        for model in (
            "00_base",
            "01_student_0",
            "02_student_1",
        ):  # of the second training: not kept
            (folder / name / "pictures" / f"{model}.zip").write_bytes(b"pictures")
    (folder / "report.html").write_text("<html>")
    states = dict.fromkeys(NAMES, {"state": "done"}) | {NAMES[3]: {"state": state}}
    write_json(folder / "status.json", states)
    write_json(folder / "manifest.json", {"profile": "lab", "notebooks": told})
    return folder


def test_what_a_reader_needs_is_kept_and_replaces_what_was_there(tmp_path):
    run, out = write_run(tmp_path / "run"), tmp_path / "reference"
    out.mkdir()
    (out / "old.json").write_text("{}")
    size = reference.make_small(run, out)
    kept = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert size == sum((out / k).stat().st_size for k in kept)
    each = ("results.json", "variant/metrics.jsonl", "samples.parquet")
    wanted = {f"{n}.ipynb" for n in NAMES} | {f"{n}/{f}" for n in NAMES for f in each}
    wanted |= {"manifest.json", "status.json"}
    wanted |= {f"05_opd/pictures/{model}.zip" for model in ("00_base", "01_student_0")}
    assert kept == wanted | {"05_opd/student/adapter/adapter_model.safetensors"}
    assert list(pd.read_parquet(out / NAMES[0] / "samples.parquet")) == ["model", "OCR"]
    weights = load_file(out / "05_opd/student/adapter/adapter_model.safetensors")["w"]
    assert weights.dtype == torch.bfloat16 and torch.allclose(
        weights.float(), torch.tensor(0.1), atol=1e-3
    )


def test_without_a_gallery_there_are_neither_pictures_nor_adapters(tmp_path):
    run, out = write_run(tmp_path / "run"), tmp_path / "reference"
    table = pd.DataFrame({"model": ["base"], "picture": ["pictures/00_base.zip/0.png"]})
    table.to_parquet(run / "05_opd" / "samples.parquet")
    reference.make_small(run, out, gallery=False)
    assert {p.suffix for p in out.rglob("*") if p.is_file()} == {
        ".ipynb",
        ".json",
        ".jsonl",
        ".parquet",
    }
    assert pd.read_parquet(out / "05_opd" / "samples.parquet")["picture"].isna().all()
    assert (
        "pictures but those of figures" in json.loads((out / "manifest.json").read_text())["kept"]
    )


def test_a_whole_run_has_the_notebooks_of_its_profile(tmp_path):
    run = write_run(tmp_path / "run")
    others = set(NAMES) - {*load_profile("twice")}
    status = {
        n: s for n, s in json.loads((run / "status.json").read_text()).items() if n not in others
    }
    write_json(run / "status.json", status)
    with pytest.raises(ValueError, match=f"no whole run: {NAMES[0]} is not there"):
        reference.make_small(run, tmp_path / "reference")
    record = json.loads((run / "manifest.json").read_text())
    write_json(run / "manifest.json", record | {"profile": "twice"})
    assert reference.make_small(run, tmp_path / "reference")


def test_no_reference_of_a_part_of_two_commits_or_too_large(tmp_path, monkeypatch):
    out = tmp_path / "reference"
    for name, run, message in (
        ("part", {"state": "failed"}, f"no whole run: {NAMES[3]} is failed"),
        (
            "two",
            {"commits": ("a" * 40, "b" * 40)},
            r"of 2 commits \(aaaaaaa, bbbbbbb\); a reference is of one",
        ),
        ("dirty", {"dirty": True}, f"{NAMES[0]} ran from files that no commit has"),
    ):
        with pytest.raises(ValueError, match=message):
            reference.make_small(write_run(tmp_path / name, **run), out)
    monkeypatch.setattr(reference, "LARGEST", 100)
    with pytest.raises(ValueError, match="more than 0; the largest: "):
        reference.make_small(write_run(tmp_path / "large"), out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("run", "profile", "name", "least"),
    [("reference", "lab", "results", 15), ("reference_twice", "twice", "twice", 10)],
)
def test_the_page_is_what_the_notebooks_concluded(run, profile, name, least):
    place = ROOT / "docs" / f"{name}.md"
    page = results_page(RUNS / run, place)
    assert page == place.read_text()
    for notebook in load_profile(profile):
        if notebook == "09_gallery":  # it concludes nothing
            continue
        cells = nbformat.read(RUNS / run / f"{notebook}.ipynb", 4).cells
        told = [
            o["data"]["text/markdown"]
            for o in cells[-1].outputs
            if "text/markdown" in o.get("data", {})
        ]
        assert told and told[-1].strip() in page, notebook
    links = re.findall(r"\]\((\.\.[^)]+)\)", page)
    assert len(links) > least and all((place.parent / link).exists() for link in links)


def test_the_figures_of_the_page_are_those_that_notebooks_save():
    for notebook, figures in FIGURES.items():
        source = "".join(c.source for c in nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", 4).cells)
        saved = re.findall(r'out / f?"([^"]+\.png)"', source)
        every = {name.replace("{start}", start) for name in saved for start in ("base", "merged")}
        assert set(figures) <= every, notebook


def test_a_run_that_is_not_whole_has_no_page(tmp_path):
    write_json(tmp_path / "status.json", {"00_quickstart": {"state": "failed"}})
    record = {
        "profile": "lab",
        "date": "2026-01-01",
        "machine": {"cpus": 2, "gpu": "none"},
        "notebooks": {},
    }
    write_json(tmp_path / "manifest.json", record)
    with pytest.raises(ValueError, match="is no whole run: 00_quickstart is failed"):
        results_page(tmp_path, tmp_path / "results.md")
