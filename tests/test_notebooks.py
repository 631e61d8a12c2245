"""A notebook's parameters are checked before it runs; the notebooks are stripped, short and run."""

import json
import re
import runpy
import shutil

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from flowopd_lib import load_benchmark
from flowopd_lib.benchmarks.benchmark import SHIPPED
from flowopd_lib.config import read_yaml, validate
from flowopd_lib.files import RUNS, write_json
from flowopd_lib.lab.notebook import TYPES, open_lab, read_parameters
from flowopd_lib.runs.execute import NOTEBOOKS
from flowopd_lib.runs.runner import choose_notebooks, load_profile, parse_overrides, run_profile

ALL = sorted(NOTEBOOKS.glob("*.ipynb"))
PARAMETERS = """from flowopd_lib.lab.notebook import (
    Flag, Folder, Int, List, Loss, Rate, Seed, String, TaskCounts, Weighting, open_lab
)

benchmark: String = "tiny"  # a shipped benchmark, or a YAML file
iterations: Int[1, 5_000] = 200  # OPD updates
rates: List[Rate] = [1e-3, 1e-4]  # learning rates
samples: TaskCounts = {}  # further samples of each prompt, such as {"geneval": 3}
losses: list[Loss] = ["pathwise", "paper+log_ratio"]  # gradient estimators
weighting: Weighting = "ode"  # of the steps
singles: Flag = True  # train one expert per reward too
seed: Seed = 0
out_dir: Folder = ""  # folder for results; empty: a temporary one
"""
WRONG = {  # value, message
    "iterations": [(0, "greater than or equal to 1, not 0"), ("3", "valid integer, not '3'")],
    "rates": [([], "at least 1 item"), ([2.0], "0: .*less than or equal to 1"), (0.1, "list")],
    "samples": [({"ocr": 0}, "ocr: .*greater than or equal to 1"), (["ocr"], "dictionary")],
    "losses": [(["papr"], r"0: there is no loss 'papr' \(did you mean 'paper'\?\)")],
    "weighting": [("kll", r"weighting 'kll' \(did you mean 'kl'\?\)")],
    "singles": [(1, "valid boolean, not 1")],
    "seed": [(-1, "greater than or equal to 0"), (True, "valid integer, not True")],
}


@pytest.fixture
def notebook(tmp_path):
    cell = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = tmp_path / "mine.ipynb"
    nbformat.write(new_notebook(cells=[cell], metadata={"kernelspec": kernel}), path)
    return path


@pytest.fixture
def names(tmp_path):
    """The names of a kernel in which the tagged cell ran."""
    (tmp_path / "cell.py").write_text(PARAMETERS)
    return runpy.run_path(str(tmp_path / "cell.py"))


@pytest.mark.fast
def test_parameters_are_read_from_a_notebook_without_executing_it(notebook):
    model = read_parameters(notebook)
    assert [*model.model_fields] == [*papermill.inspect_notebook(str(notebook))]
    assert validate(model, {"iterations": 5000, "rates": [1]}).model_dump() == {
        "benchmark": "tiny",
        "iterations": 5000,
        "rates": [1.0],
        "samples": {},
        "losses": ["pathwise", "paper+log_ratio"],
        "weighting": "ode",
        "singles": True,
        "seed": 0,
        "out_dir": "",
    }
    with pytest.raises(ValueError, match="no such setting .did you mean 'iterations'"):
        validate(model, {"iteration": 3})
    notebook.write_text(notebook.read_text().replace("Seed = 0", "Sed = 0"))
    with pytest.raises(ValueError, match="no type of a parameter 'Sed' .did you mean 'Seed'"):
        read_parameters(notebook)


@pytest.mark.fast
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_parameter_is_named_in_a_file_and_in_a_kernel(notebook, names, name):
    for value, message in WRONG[name]:
        with pytest.raises(ValueError, match=f"mine.ipynb: {name}.*{message}"):
            validate(read_parameters(notebook), {name: value}, "mine.ipynb")
        with pytest.raises(ValueError, match=f"this notebook: {name}.*{message}"):
            open_lab({**names, name: value})


def test_a_lab_has_the_benchmark_and_an_output_folder(tmp_path, names):
    assert open_lab(names).out.is_dir() and open_lab(names).benchmark.name == "tiny"
    assert open_lab(names | {"out_dir": str(tmp_path / "a" / "b")}).out == tmp_path / "a" / "b"
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file"):
        open_lab(names | {"out_dir": str(tmp_path / "file")})
    with pytest.raises(ValueError, match="no benchmark 'tini' .did you mean 'tiny'"):
        open_lab(names | {"benchmark": "tini"})


def test_every_type_can_be_imported_by_its_name():
    from flowopd_lib.lab import notebook

    assert all(getattr(notebook, name) is kind for name, kind in TYPES.items() if name.istitle())


def test_overrides_are_yaml():
    items = ["n=3", "noises={geneval: 3}", "variants=[a, b=c]", "lr=3e-4", "name=3e-4 or less"]
    assert parse_overrides(items) == {
        "n": 3,
        "noises": {"geneval": 3},
        "variants": ["a", "b=c"],
        "lr": 3e-4,
        "name": "3e-4 or less",
    }
    with pytest.raises(ValueError, match=r"the value of variants is not YAML: '\[a'"):
        parse_overrides(["variants=[a"])


@pytest.mark.fast
def test_a_runs_files_are_named_as_seen_from_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(SHIPPED / "sd35.yaml", "mine.yaml")
    (tmp_path / "mine.py").write_text("def loss(batch):\n    return batch.weight\n")
    own = {"benchmark": "mine.yaml", "loss": "mine.py:loss", "weighting": "ode"}
    for given in ({}, own):
        (tmp_path / "profile.yaml").write_text(json.dumps({"05_opd": given}))
        chosen = choose_notebooks("profile.yaml", "", {} if given else own)["05_opd"]
        assert chosen["benchmark"] == str(tmp_path / "mine.yaml") and chosen["weighting"] == "ode"
        assert chosen["loss"] == f"{tmp_path / 'mine.py'}:loss"


BEFORE_A_RUN = {
    "01: {adapter: merge}": r"adapter: there is no .* 'merge' \(did you mean 'merged'",
    "02: {samples_per_prompt: {deqa: 2}}": "samples_per_prompt: there is no .* 'deqa'",
    "05: {others: [stf]}": r"others.0: .*'sft'",
    "05: {task_weights: {orc: 2}}": r"task_weights: .* 'orc' \(did you mean 'ocr'",
    "05: {trained_steps: 10}": "trained_steps: .* or how many of these, not 10",
    "05: {loss: log_ratio}": "log_ratio estimates the KL, so weighting must be kl",
    "05: {loss: 'none.py:loss'}": "loss: 'none.py:loss' cannot be loaded",
    "05: {loss: pathwize}": r"loss: .*\(did you mean 'pathwise'",
}


@pytest.mark.fast
@pytest.mark.parametrize("change", BEFORE_A_RUN)
def test_names_and_counts_are_checked_before_a_run(change, tmp_path):
    start, _, values = change.partition(": ")
    [name] = [path.stem for path in ALL if path.stem.startswith(start)]
    (tmp_path / "mine.yaml").write_text(f"{name}: {values}")
    with pytest.raises(ValueError, match=f"{name}.*{BEFORE_A_RUN[change]}"):
        choose_notebooks(str(tmp_path / "mine.yaml"))


# --- the notebooks of this repository


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_notebook_is_stripped_and_annotates_its_parameters(path):
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert [cell.id for cell in notebook.cells] == [str(i) for i in range(len(notebook.cells))]
    assert code[0].metadata.tags == ["parameters"]
    assert sum("parameters" in cell.metadata.get("tags", ()) for cell in code) == 1
    assert notebook.metadata.kernelspec.name == "python3" and "widgets" not in notebook.metadata
    parameters = papermill.inspect_notebook(str(path))
    assert {"benchmark", "launcher", "seed", "out_dir"} <= {*parameters}
    assert [*parameters] == [*read_parameters(path).model_fields]
    assert all(parameter["help"] for parameter in parameters.values())


@pytest.mark.parametrize("path", sorted((RUNS / "profiles").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_profile_has_parameters_that_its_notebooks_take(path):
    assert choose_notebooks(path.stem).keys() == load_profile(path.stem).keys()


def test_the_smoke_profile_runs_every_notebook(tmp_path):
    run_profile("smoke", "", {}, tmp_path, jobs=2, log=lambda line: None)
    status = json.loads((tmp_path / "status.json").read_text())
    assert [*status] == [path.stem for path in ALL]
    assert all(entry["state"] == "done" for entry in status.values())
    for path in ALL:
        assert "widgets" not in nbformat.read(tmp_path / path.name, 4).metadata
    scores = json.loads((tmp_path / "00_quickstart" / "results.json").read_text())["scores"]
    assert all(row["low"] <= row["mean"] <= row["high"] for row in scores)
    # the twenty updates written out in 05: every fourth is of the same step
    of_step = [values.split(", ") for values in printed(tmp_path / "05_opd.ipynb", "teachers: ")]
    left = [float(kl[-1]) / float(kl[0]) for kl in of_step]
    assert len(left) == 4 and sum(left) / 4 < 0.9


def test_the_notebooks_of_a_benchmark_without_experts_run_or_are_left_out(tmp_path):
    config = {**read_yaml(SHIPPED / "tiny" / "benchmark.yaml"), "experts": {}, "anchor": None}
    config["folder"] = str(load_benchmark().folder)
    files = {"none.yaml": config, "profile.yaml": {"05_opd": {}, "09_gallery": {"steps": 2}}}
    for name, content in files.items():
        write_json(tmp_path / name, content)
    benchmark, profile = {"benchmark": str(tmp_path / "none.yaml")}, str(tmp_path / "profile.yaml")
    run_profile(profile, "", benchmark, tmp_path / "run", log=lambda line: None)
    states = json.loads((tmp_path / "run" / "status.json").read_text())
    assert [entry["state"] for entry in states.values()] == ["left out", "done"]


def printed(path, after):
    """What a notebook printed after these words, by line."""
    cells = nbformat.read(path, 4).cells
    texts = [o.text for c in cells for o in c.get("outputs", ()) if o.output_type == "stream"]
    return re.findall(f"{after}(.*)", "".join(texts))
