"""Full-size runs as far as they go without weights: every notebook on the dummy benchmark, in two
processes."""

import json
import subprocess
import sys

import dummy_model
import pandas as pd
import pytest
from dummy_rewards import reward_server

from flowopd_lib.check import Row, check, print_rows
from flowopd_lib.files import ROOT
from flowopd_lib.lab.launch import load_launcher
from flowopd_lib.runs.execute import NOTEBOOKS
from flowopd_lib.runs.runner import load_profile, run_profile


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """The dummy benchmark's file, one of its rewards behind a real reward server."""
    with reward_server() as (url, _):
        yield str(dummy_model.write_benchmark(tmp_path_factory.mktemp("dummy"), url))


def test_the_dummy_passes_every_check(benchmark, capsys):
    rows = list(check(benchmark, "float32"))
    assert print_rows(rows), capsys.readouterr().out
    messages = {row.check: row.message for row in rows}
    assert "objects detected by mask2former (transformers)" in messages["reward GenEval"]
    assert "no known answer: the detector's classes are not checked" in messages["reward GenEval"]
    assert "held out" in messages["reward Aesthetic"] and "held out" in messages["reward BLIP-VQA"]
    assert "rank [32]" in messages["expert geneval"]
    assert {"one update of OPD", "one batch of an evaluation"} <= set(messages)


def test_a_failed_check_is_printed_and_fails_the_table(capsys):
    rows = [Row("memory", True, "enough", 0.0), Row("reward OCR", False, "no weights", 1.0)]
    assert not print_rows(rows)
    assert "FAILED  reward OCR: no weights (1.0 s)" in capsys.readouterr().out


def test_every_notebook_runs_in_two_processes(benchmark, tmp_path):
    overrides = {"benchmark": benchmark, "launcher": "local2"}
    run_profile("smoke", overrides=overrides, folder=tmp_path, log=lambda message: None, jobs=2)
    status = json.loads((tmp_path / "status.json").read_text())
    assert set(status) == set(load_profile("smoke"))
    assert {s["state"] for s in status.values()} == {"done"}
    table = pd.read_parquet(tmp_path / "05_opd" / "samples.parquet")
    assert {"GenEval", "OCR", "PickScore", "DeQA"} <= set(table)
    # further samples of a prompt are scored by the task's own rewards only
    assert (table["DeQA"].notna() == (table["repeat"] == 0)).all() and table["repeat"].max() == 1
    # the jobs of a notebook run in the same processes
    assert len(list(tmp_path.glob("*/.jobs/*/log.txt"))) <= len(status)
    assert len(list(tmp_path.glob("*/.jobs/*/*.done"))) > 20
    cells = json.loads((tmp_path / "00_quickstart.ipynb").read_text())["cells"]
    text = "".join("".join(o.get("text", [])) for c in cells for o in c.get("outputs", []))
    assert "leave launcher empty to see it" in text


def test_papermill_alone_runs_a_notebook(benchmark, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWOPD_HEADLESS", "1")
    values = {"benchmark": benchmark, "launcher": "local", "n_test": 12, "n_show": 1, "steps": 1}
    values["out_dir"] = str(tmp_path)
    options = [word for name, value in values.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "00_quickstart.ipynb"]
    command += [str(tmp_path / "out.ipynb"), *options]
    process = subprocess.run(command, cwd=NOTEBOOKS, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    assert len(pd.read_parquet(tmp_path / "samples.parquet")) == 36


@pytest.mark.parametrize("profile, launcher", [("sd35_8gpu", "gpus8"), ("sd35_4x8", "slurm")])
def test_a_full_profile_has_every_notebook_with_benchmark_and_launcher(profile, launcher):
    chosen = load_profile(profile)
    assert list(chosen) == sorted(p.stem for p in NOTEBOOKS.glob("[0-9]*.ipynb"))
    assert {(p["benchmark"], p["launcher"]) for p in chosen.values()} == {("sd35", launcher)}


def test_the_slurm_job_runs_its_profile_and_resumes_when_it_is_queued_again():
    text = (ROOT / "papermill_runs" / "slurm" / "full_run.sbatch").read_text()
    assert subprocess.run(["bash", "-n", "-c", text]).returncode == 0
    assert "--resume" in text and "scontrol requeue" in text and "#SBATCH --signal=B:TERM" in text
    (*_, command, _), _ = load_launcher("slurm")
    assert "--rdzv_endpoint" in command and "SLURM_JOB_NODELIST" in command
