"""The full-size suite as far as it goes without weights: every notebook on the dummy, in two processes."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import dummy_model
import pandas as pd
import pytest

from flowopd_lib import load_benchmark
from flowopd_lib.check import Check
from flowopd_lib.files import ROOT
from flowopd_lib.inputs import read_yaml
from flowopd_lib.runs.cost import cost_table
from flowopd_lib.runs.profiles import NOTEBOOKS, load_profile, parameters_of
from flowopd_lib.runs.runner import run_profile


@pytest.fixture(scope="module")
def server():
    """The real reward server around a reward that needs no weights."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = ROOT / "flowopd_lib" / "rewards" / "reward_server.py"
    process = subprocess.Popen([sys.executable, str(script), "brightness", "--port", str(port)])
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2)
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.2)
    yield url
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory, server):
    return dummy_model.write_benchmark(tmp_path_factory.mktemp("dummy_model"), server)


def test_everything_of_it_is_right(benchmark):
    check = Check(load_benchmark(benchmark), "float32")
    lines = {line.what: line for line in check.run()}
    assert [line.told for line in lines.values() if not line.right] == []
    assert "by mask2former (transformers)" in lines["reward GenEval"].told
    assert (
        "(held_out)" in lines["reward Aesthetic"].told
        and "(held_out)" in lines["reward BLIP-VQA"].told
    )
    assert "rank [32]" in lines["expert geneval"].told


def test_every_notebook_in_two_processes(benchmark, tmp_path):
    settings = {
        "benchmark": str(benchmark),
        "launcher": "local2",
        "others": ["GRPO-Mix"],
        "train_seeds": 1,
    }
    settings |= {"first_iterations": 0, "branches": 0}  # the smoke profile's own benchmark has them
    run_profile("smoke", overrides=settings, folder=tmp_path, log=lambda message: None, jobs=2)
    status = json.loads((tmp_path / "status.json").read_text())
    assert {s["state"] for s in status.values()} == {"done"} and len(status) == 10
    table = pd.read_parquet(tmp_path / "05_opd" / "samples.parquet")
    assert {"GenEval", "OCR", "PickScore", "DeQA"} <= set(table)
    # of further samples (`noises`) only the task's own rewards are asked
    assert (table["DeQA"].notna() == (table["repeat"] == 0)).all() and table["repeat"].max() == 1
    # what two notebooks beside one another ask serves all of them
    assert len(list((tmp_path / ".jobs").glob("*/log.txt"))) <= 2
    assert len(list((tmp_path / ".jobs").glob("*/*.done"))) > 20
    scored = [c for c in json.loads((tmp_path / "00_quickstart.ipynb").read_text())["cells"]]
    said = "".join("".join(o.get("text", [])) for c in scored for o in c.get("outputs", []))
    assert "cannot draw right pictures of its prompts" in said
    assert "leave launcher empty to see it" in said
    # the pictures that are counted before a run are the rows of its tables
    whole = (
        parameters_of(NOTEBOOKS / "00_quickstart.ipynb") | load_profile("smoke")["00_quickstart"]
    )
    told = cost_table(
        {"00_quickstart": whole | {"benchmark": str(benchmark)}}, load_benchmark
    ).set_index("notebook")
    drawn = [tmp_path / "00_quickstart" / p for p in ("samples.parquet", "few/samples.parquet")]
    assert told.loc["00_quickstart", "pictures"] == sum(len(pd.read_parquet(p)) for p in drawn)
    guided = 2 * whole["steps"]
    assert told.loc["all", "forwards, thousands"] == told.loc["all", "pictures"] * guided / 1e3


def test_papermill_alone_runs_a_notebook(benchmark, tmp_path):
    parameters = {
        "benchmark": benchmark,
        "launcher": "local",
        "n_test": 12,
        "n_show": 1,
        "steps": 1,
    }
    given = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "00_quickstart.ipynb"]
    done = subprocess.run(
        [*command, str(tmp_path / "out.ipynb"), *given, "-p", "out_dir", str(tmp_path)],
        cwd=NOTEBOOKS,
        capture_output=True,
        text=True,
        env={**os.environ, "FLOWOPD_HEADLESS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(pd.read_parquet(tmp_path / "samples.parquet")) == 36


@pytest.mark.parametrize("profile", ["sd35_8gpu", "sd35_4x8"])
def test_the_full_profiles_name_the_benchmark_and_a_launcher(profile):
    chosen = load_profile(profile)
    assert list(chosen) == sorted(p.stem for p in NOTEBOOKS.glob("[0-9]*.ipynb"))
    launcher = {"sd35_8gpu": "gpus8", "sd35_4x8": "slurm"}[profile]
    assert {(p["benchmark"], p["launcher"]) for p in chosen.values()} == {("sd35", launcher)}


def test_hours_by_the_rates_of_the_benchmark():
    chosen = {
        n: {**parameters_of(NOTEBOOKS / f"{n}.ipynb"), **p}
        for n, p in load_profile("sd35_8gpu").items()
    }
    table = cost_table(chosen, load_benchmark).set_index("notebook")
    rates = load_benchmark("sd35").rates
    for _, row in table.drop(index="all").iterrows():
        seconds = row["forwards, thousands"] * 1e3 / rates["forwards"]
        seconds += row["with backward, thousands"] * 1e3 / rates["updates"]
        assert row["GPU hours"] == pytest.approx(seconds / 3600)
    assert table.loc["all", "GPU hours"] == pytest.approx(table["GPU hours"].iloc[:-1].sum())


def test_further_noises_are_counted():
    plain = parameters_of(NOTEBOOKS / "05_opd.ipynb") | {"n_test": 50}
    drawn = [
        cost_table({"05_opd": plain | {"noises": n}}, load_benchmark)["pictures"][0]
        for n in ({}, {"ocr": 3})
    ]
    assert (
        drawn[1] - drawn[0] == 10 * 50 * 3
    )  # the base, four experts, merged, three students and the mix


def test_the_slurm_file_runs_its_profile_and_goes_on():
    text = (ROOT / "papermill_runs" / "slurm" / "full_run.sbatch").read_text()
    assert subprocess.run(["bash", "-n", "-c", text]).returncode == 0
    assert "--resume" in text and "scontrol requeue" in text and "#SBATCH --signal=B:TERM" in text
    launcher = read_yaml(ROOT / "papermill_runs" / "launchers" / "slurm.yaml")["command"]
    assert "--rdzv_endpoint" in launcher and "SLURM_JOB_NODELIST" in launcher
