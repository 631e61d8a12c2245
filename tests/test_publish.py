"""A finished run is made small, and its page shows what the notebooks concluded."""

import json
import subprocess

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from flowopd_lib.files import ROOT, RUNS, write_json, write_whole
from flowopd_lib.runs import publish, report

NAMES = ["00_quickstart", "05_opd"]


def output(**data):
    return new_output("display_data", data=data)


def executed(name):
    figure = output(**{"image/png": "aGVsbG8="})
    conclusion = output(**{"text/markdown": f"{name} found **0.5** [0.4, 0.6]."})
    question = new_markdown_cell(f"# Notebook {name}\n\n**Question.** What\nis it?\n\nMore.")
    return new_notebook(
        cells=[
            question,
            new_code_cell("draw()", outputs=[figure]),
            new_code_cell("conclude()", outputs=[conclusion]),
        ]
    )


@pytest.fixture
def write_run(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "load_profile", lambda name: dict.fromkeys(NAMES))

    def write(folder="run", commits=("a" * 40,), dirty=False, state="done"):
        run, notebooks = tmp_path / folder, {}
        machine = {"cpus": 2, "gpu": "none"}
        for number, name in enumerate(NAMES):
            write_json(run / name / "results.json", {})
            write_whole(run / name / "scores.png", "figure")
            nbformat.write(executed(name), run / f"{name}.ipynb")
            write_whole(run / name / "variant" / "metrics.jsonl", '{"kl": 1.0}\n')
            for file in ("variant/state.safetensors", "variant/adapter/weights.safetensors"):
                write_whole(run / name / file, "weights")
            for model in ("00_base", "01_student_0", "02_student_1"):
                write_whole(run / name / "images" / f"{model}.zip", "images")
            write_whole(run / name / "validation" / "00_iteration_9.zip", "images")
            table = {"model": ["base", "student#0", "student#1"], "embedding": [[1.0]] * 3}
            files = ("00_base", "01_student_0", "02_student_1")
            table["image"] = [f"images/{file}.zip/0.webp" for file in files]
            pd.DataFrame(table).to_parquet(run / name / "samples.parquet")
            write_whole(run / name / "earlier" / "old.json", "{}")
            git = {"commit": commits[number % len(commits)], "dirty": dirty}
            notebooks[name] = {"git": git, "seconds": 200.0, "machine": machine}
        write_whole(run / "report.html", "<html>")
        status = {NAMES[0]: {"state": "done"}, NAMES[1]: {"state": state}}
        write_json(run / "status.json", status)
        manifest = {"profile": "lab", "date": "2026-01-02T03", "machine": machine}
        write_json(run / "manifest.json", {**manifest, "notebooks": notebooks})
        return run

    return write


def test_a_published_run_has_what_a_reader_needs_and_replaces_the_one_before(write_run, tmp_path):
    run, out, page = write_run(), tmp_path / "reference", tmp_path / "docs" / "results.md"
    write_whole(out / "old.json", "{}")
    size = publish.publish(run, out, page)
    kept = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert size == sum((out / name).stat().st_size for name in kept)
    each = ["results.json", "variant/metrics.jsonl", "samples.parquet", "scores.png"]
    each += ["images/00_base.zip", "images/01_student_0.zip", "validation/00_iteration_9.zip"]
    files = {f"{n}.ipynb" for n in NAMES} | {f"{n}/{file}" for n in NAMES for file in each}
    assert kept == files | {"manifest.json", "status.json"}
    table = pd.read_parquet(out / "05_opd" / "samples.parquet")
    assert list(table) == ["model", "image"] and table["image"].isna().tolist() == [
        False,
        False,
        True,
    ]
    text = page.read_text()
    assert "commit aaaaaaaaaa, 2026-01-02, 2 CPUs, GPU none" in text
    assert "## [Notebook 05_opd](../reference/05_opd.ipynb)\n\nWhat is it?" in text
    assert "![05_opd: scores](../reference/05_opd/scores.png)" in text
    assert "05_opd found **0.5** [0.4, 0.6].\n\n(3 min, 2 CPUs, GPU none)" in text


def test_only_a_finished_run_of_one_commit_is_published(write_run, tmp_path, monkeypatch):
    out, page = tmp_path / "reference", tmp_path / "results.md"
    cases = {
        "not finished: 05_opd is failed": {"state": "failed"},
        "of several commits (aaaaaaaaaa, bbbbbbbbbb)": {"commits": ("a" * 40, "b" * 40)},
        "00_quickstart ran from files that no commit has": {"dirty": True},
    }
    for message, options in cases.items():
        with pytest.raises(ValueError) as error:
            publish.publish(write_run(**options), out, page)
        assert message in str(error.value)
    monkeypatch.setattr(publish, "LIMIT", 100)
    with pytest.raises(ValueError, match="more than 0"):
        publish.publish(write_run("large"), out, page)
    assert not out.exists() and not page.exists()
    with pytest.raises(FileNotFoundError, match="manifest.json"):
        publish.publish(tmp_path, out, page)


def test_a_checkout_is_dirty_if_anything_but_the_run_differs(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True)

    assert report.checkout(tmp_path, tmp_path / "run") is None
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("{}")
    checkout = report.checkout(tmp_path, tmp_path / "run")
    assert len(checkout["commit"]) == 40 and not checkout["dirty"]
    assert report.checkout(tmp_path, tmp_path / "other")["dirty"]


def test_the_results_page_is_that_of_the_published_run():
    page, run = ROOT / "docs" / "results.md", RUNS / "reference" / "manifest.json"
    assert page.is_file() == run.is_file()
    if run.is_file():
        assert page.read_text() == publish.results_page(run.parent, page)
        assert json.loads(run.read_text())["profile"] == "lab"
