"""Notebooks run headlessly, are stripped and tagged, and do not take a parameter they do not have."""

import json

import nbformat
import pytest

from flowopd_lib.files import ROOT, RUNS, read_lines, write_json
from flowopd_lib.inputs import read_yaml
from flowopd_lib.runs.ahead import plan, run_ahead
from flowopd_lib.runs.profiles import (
    NOTEBOOKS,
    check_parameters,
    load_profile,
    overrides_of,
    parameters_of,
)
from flowopd_lib.runs.runner import run_profile

ALL = sorted(NOTEBOOKS.glob("*.ipynb"))


@pytest.fixture
def short_walks(tmp_path, benchmark):
    """The small benchmark, but for its walks, which have three steps: a YAML file."""
    told = read_yaml(ROOT / "flowopd_lib" / "benchmarks" / "tiny" / "benchmark.yaml") | {
        "folder": str(benchmark.folder)
    }
    for walk in ("exploration", "distillation"):
        told["sampling"][walk] |= {"steps": 3}
    told["sampling"]["exploration"] |= {"noisy": 2}
    path = tmp_path / "short_walks.yaml"
    write_json(path, told)
    return str(path)


def test_smoke_profile_runs_every_notebook(tmp_path, short_walks):
    tmp_path, quiet = tmp_path / "run", lambda message: None
    assert not run_ahead("smoke", 2, "06", {"benchmark": short_walks}, tmp_path, log=quiet)
    before = {p: p.read_text() for p in tmp_path.glob("06_mar/*/metrics.jsonl")}  # with seconds
    run_profile("smoke", "", {"benchmark": short_walks}, tmp_path, log=quiet, resume=True, jobs=2)
    assert len(before) == 2 and all(p.read_text() == told for p, told in before.items())
    for notebook, parameters in load_profile("smoke").items():
        whole = (
            parameters_of(NOTEBOOKS / f"{notebook}.ipynb") | parameters | {"benchmark": short_walks}
        )
        if "run_dir" not in whole:
            jobs = plan(notebook, whole, tmp_path / notebook)
            trained = {job.folder for job in jobs if job.spec["job"] == "train"}
            there = {p.parent for p in (tmp_path / notebook).rglob("adapter")}
            # 03 trains where it can be watched, and 07 goes on at the rate that val chose
            assert trained == there or notebook[:2] in ("03", "07") and trained < there
            files = {job.folder / job.spec["file"] for job in jobs if "file" in job.spec}
            assert files and all(file.is_file() for file in files)
    status = json.loads((tmp_path / "status.json").read_text())
    assert list(status) == [p.stem for p in ALL] and all(
        s["state"] == "done" for s in status.values()
    )
    results = json.loads((tmp_path / "00_quickstart" / "results.json").read_text())
    assert {(r["prompts"], r["reward"]) for r in results["scores"]} >= {
        ("geneval", "GenEval"),
        ("ocr", "OCR"),
        ("pickscore", "PickScore"),
        ("geneval", "DeQA"),
    }
    assert all(r["low"] <= r["mean"] <= r["high"] and r["n"] == 12 for r in results["scores"])
    executed = nbformat.read(tmp_path / "00_quickstart.ipynb", 4)
    assert "widgets" not in executed.metadata
    pictures = sum(
        "image/png" in o.get("data", {})
        for c in executed.cells
        if c.cell_type == "code"
        for o in c.outputs
    )
    assert pictures == 6
    rows = json.loads((tmp_path / "07_opd_estimators" / "results.json").read_text())["estimators"]
    along = {(r["estimator"], r["distance"]): r["mean along pathwise"] for r in rows}
    assert abs(along["paper", 0.1]) < 1e-3 and abs(along["as_coded", 0.1] - 1) < 0.2
    assert along["return_to_go", 0.1] != 0  # which has no mirror image
    seesaw = json.loads((tmp_path / "02_mixed_reward_seesaw" / "results.json").read_text())
    assert (seesaw["iterations"]["Mix total"], seesaw["iterations"]["Mix twice"]) == (1, 2)
    assert (
        len(read_lines(tmp_path / "02_mixed_reward_seesaw" / "mix_twice_0" / "metrics.jsonl")) == 1
    )


def test_a_failing_cell_is_shown(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"00_quickstart failed in cell(.|\n)*Lab(.|\n)*there is no nowhere"
    ):
        run_profile(
            "smoke", "00", {"benchmark": "nowhere.yaml"}, folder=tmp_path, log=lambda message: None
        )
    assert json.loads((tmp_path / "status.json").read_text())["00_quickstart"]["state"] == "failed"


def test_a_misspelt_parameter_is_an_error_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="no parameter 'n_tset' .did you mean 'n_test'"):
        run_profile("smoke", overrides={"n_tset": 3}, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="takes n_test as int, such as 300, not 'many'"):
        run_profile("smoke", overrides={"n_test": "many"}, folder=tmp_path / "run")
    with pytest.raises(
        ValueError, match="no notebook '00_quikstart' .did you mean '00_quickstart'"
    ):
        check_parameters(NOTEBOOKS / "00_quikstart.ipynb", {})
    with pytest.raises(ValueError, match="05_opd.ipynb: n_test must be at least 2, not 1"):
        run_profile("smoke", "05", {"n_test": 1}, folder=tmp_path / "run")
    with pytest.raises(
        ValueError,
        match=r"05_opd.ipynb: others\[0\] must be one of sft, base, GRPO-Mix, not 'stf' \(did you mean 'sft'",
    ):
        run_profile("smoke", "05", {"others": ["stf"]}, folder=tmp_path / "run")
    with pytest.raises(ValueError, match="no profile 'smok' .did you mean 'smoke'"):
        load_profile("smok")
    with pytest.raises(ValueError, match="no notebook that begins with '77'"):
        run_profile("smoke", only="77", folder=tmp_path / "run")


def test_parameters_are_set_in_yaml():
    assert overrides_of(["n=3", "noises={geneval: 3}", "variants=[a, b=c]", "out_dir="]) == {
        "n": 3,
        "noises": {"geneval": 3},
        "variants": ["a", "b=c"],
        "out_dir": None,
    }
    with pytest.raises(ValueError, match="--set takes NAME=VALUE, not 'n'"):
        overrides_of(["n"])
    with pytest.raises(ValueError, match=r"the value in --set 'variants=\[a' is no YAML, such as"):
        overrides_of(["variants=[a"])


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_a_notebook_is_stripped_tagged_and_short(path):
    notebook = nbformat.read(path, 4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert all(not c.outputs and c.execution_count is None for c in code)
    assert [c.id for c in notebook.cells] == [str(i) for i in range(len(notebook.cells))], (
        "run nbstripout, as git's filter does"
    )
    assert sum("parameters" in c.metadata.get("tags", []) for c in code) == 1 and code[
        0
    ].metadata.tags == ["parameters"]
    assert all("#" in line for line in code[0].source.splitlines()), (
        "every parameter has its comment"
    )
    assert notebook.metadata.kernelspec.name == "python3" and "widgets" not in notebook.metadata
    assert sum(bool(line.strip()) for c in code[1:] for line in c.source.splitlines()) <= 80, (
        "beside the parameters"
    )


def test_every_profile_names_parameters_the_notebooks_have():
    profiles = [path.stem for path in (RUNS / "profiles").glob("*.yaml")]
    assert len(profiles) > 5
    for profile in profiles:
        for notebook, parameters in load_profile(profile).items():
            check_parameters(NOTEBOOKS / f"{notebook}.ipynb", parameters)
