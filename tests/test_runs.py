"""The runner, on notebooks of a few lines: what is executed again, what an interruption leaves,
what is written, how two runs differ; and lists of jobs."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from flowopd_lib import files, load_benchmark
from flowopd_lib.benchmarks.benchmark import SHIPPED
from flowopd_lib.config import read_yaml
from flowopd_lib.lab.notebook import NotForThisBenchmark, open_lab
from flowopd_lib.runs import execute, jobs, report, runner

FIRST = """import json, sys
from pathlib import Path
scores = {"model": "student", "mean": mean, "low": mean - .1, "high": mean + .1, "n": 9}
(lab.out / "results.json").write_text(json.dumps({"scores": [scores]}))
(lab.out / "state.safetensors").write_text("weights")
print("progress: train 30%, about 9 s left", "a warning", sep="\\n", file=sys.stderr, flush=True)
print("written to", out_dir, "by", Path.cwd(), json.dumps(out_dir), ascii(out_dir))"""
SECOND = """import os, time
from pathlib import Path
assert (Path(run_dir) / "1_first" / "results.json").is_file()
state = Path(out_dir) / "state"
if not state.exists():
    state.write_text(str(os.getpid()))
    time.sleep(120)
print("resumed in", run_dir)"""
LIBRARY = "from flowopd_lib.lab.notebook import Folder, Number, Seed, open_lab"
NO_LIBRARY = "Folder = Number = Seed = object"  # a kernel starts faster without it


def write(name, parameters, source, needs=(), start=NO_LIBRARY):
    text = f"{start}\n{parameters}\nout_dir: Folder = ''"
    cells = [
        new_markdown_cell(f"# {name}\n\nText with $x^2$."),
        new_code_cell(text, metadata={"tags": ["parameters"]}),
        new_code_cell(source),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "flowopd": {"needs": list(needs)}}
    notebook = new_notebook(cells=cells, metadata=metadata)
    nbformat.write(notebook, runner.NOTEBOOKS / f"{name}.ipynb")


def write_profile(notebooks):
    path = runner.RUNS / "profiles" / "tiny.yaml"
    path.write_text(yaml.safe_dump(notebooks, sort_keys=False))


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A checkout with three notebooks, the second of which reads the results of the first."""
    runs = tmp_path / "papermill_runs"
    paths = {"ROOT": tmp_path, "NOTEBOOKS": tmp_path / "notebooks", "RUNS": runs}
    for module in (runner, execute):
        for name in paths.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, paths[name])
    for folder in ("notebooks", "papermill_runs/profiles", "papermill_runs/recipes"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("train.py", "benchmarks/tiny/benchmark.yaml", "assets/experts/ocr/manifest.json"):
        files.write_whole(tmp_path / "flowopd_lib" / file, "{}")
    first = "lab = open_lab(globals())\n" + FIRST
    write("1_first", "mean: Number = 0.5\nseed: Seed = 0", first, start=LIBRARY)
    write("2_second", "run_dir: Folder = ''", SECOND, ["1_first"])
    write("3_other", "seed: Seed = 0", "seed")
    write_profile({"1_first": None, "2_second": None, "3_other": None})
    return tmp_path


@pytest.fixture
def executed(monkeypatch):
    """Notebooks are not executed but listed, with whether their folder was kept; those in `fail`
    fail."""

    class Executed(list):
        fail = without = ()

        def since(self):
            names = list(self)
            self.clear()
            return names

    done = Executed()

    def execute(name, parameters, folder, log):
        done.append(name + (" kept" if (folder / name).exists() else ""))
        (folder / name).mkdir(exist_ok=True)
        nbformat.write(new_notebook(), folder / f"{name}.ipynb")
        if name in done.fail:
            raise RuntimeError(f"{name} failed in {folder}/x")
        if name in done.without:
            raise NotForThisBenchmark("this notebook needs 2 of a benchmark's experts")

    monkeypatch.setattr(runner, "execute", execute)
    return done


def run_tiny(log=lambda message: None, **options):
    return runner.run_profile("tiny", log=log, **options)


ALL = ["1_first", "2_second", "3_other"]


def test_a_resumed_run_executes_what_changed_and_what_needs_it(lab, executed):
    folder, lines = run_tiny(), []
    assert executed.since() == ALL
    run_tiny(resume=True, log=lines.append)
    assert executed.since() == [] and lines[1] == "[2/3] 2_second is done and unchanged"
    run_tiny(resume=True, overrides={"mean": 0.7})
    assert executed.since() == ["1_first", "2_second"]
    changed = {"resume": True, "overrides": {"mean": 0.7, "seed": 1}}
    run_tiny(**changed)
    assert executed.since() == ALL
    write("2_second", "run_dir: Folder = ''", SECOND + "\n", ["1_first"])
    run_tiny(**changed)
    assert executed.since() == ["2_second"]
    for file in (
        "flowopd_lib/train.py",
        "flowopd_lib/benchmarks/tiny/benchmark.yaml",
        "flowopd_lib/assets/experts/ocr/manifest.json",
        "papermill_runs/recipes/student.yaml",
    ):
        (lab / file).write_text("{1: 2}")
        run_tiny(**changed)
        assert executed.since() == ALL, file
    (lab / "flowopd_lib/train.py").write_text("{1: 2}  # a comment changes no result")
    (folder / "3_other.ipynb").unlink()
    run_tiny(**changed)
    assert executed.since() == ["3_other"]
    run_tiny()
    assert executed.since() == ALL


def test_a_benchmarks_prompts_and_files_are_part_of_the_fingerprint(tmp_path, benchmark):
    settings = read_yaml(SHIPPED / "tiny" / "benchmark.yaml")
    settings |= {"folder": str(benchmark.folder), "prompts": str(tmp_path)}
    path, hashes = tmp_path / "mine.yaml", set()

    def add(file, text):
        files.write_whole(tmp_path / file, text)
        hashes.add(runner.benchmark_hash(str(path)))
        return len(hashes)

    assert add("mine.yaml", yaml.safe_dump(settings)) == 1
    assert add("notes.txt", "of nothing") == 1
    assert add("ocr/test.txt", 'a sign that says "ON"') == 2
    assert add("mine.yaml", yaml.safe_dump({**settings, "about": "another"})) == 3
    with pytest.raises(ValueError, match="there is no benchmark 'tini' .did you mean 'tiny'"):
        runner.benchmark_hash("tini")


def test_a_notebook_that_its_benchmark_has_nothing_for_is_left_out(lab, executed):
    executed.without, printed = ["1_first"], []
    run_tiny(printed.append)
    assert executed.since() == ALL and "needs 2 of a benchmark's experts" in " ".join(printed)
    status = report.read_status(lab / "papermill_runs" / "tiny")
    assert [status[name]["state"] for name in ALL] == ["left out", "done", "done"]
    config = {**read_yaml(SHIPPED / "tiny" / "benchmark.yaml"), "experts": {}, "anchor": None}
    config["folder"] = str(load_benchmark().folder)
    files.write_json(lab / "none.yaml", config)
    names = {"benchmark": str(lab / "none.yaml"), "out_dir": str(lab / "out")}
    names["__annotations__"] = {"benchmark": str, "out_dir": str}
    assert open_lab(names).benchmark.teachers == {}
    with pytest.raises(NotForThisBenchmark, match="and none has none: train them"):
        open_lab(names, experts=1)


def test_notebooks_run_at_once_and_after_what_they_need(lab, executed, monkeypatch):
    both, listed, lines = threading.Barrier(2, timeout=30), runner.execute, []
    write_profile(dict.fromkeys(["1_first", "3_other", "2_second"]))

    def execute(name, parameters, folder, log):
        assert os.environ["OMP_NUM_THREADS"] == str(max(1, os.cpu_count() // 2))
        assert os.environ["FLOWOPD_HEADLESS"]
        if name != "2_second":
            both.wait()  # 1_first and 3_other are running
        log("    train 30%")
        return listed(name, parameters, folder, log)

    monkeypatch.setattr(runner, "execute", execute)
    folder = run_tiny(jobs=2, log=lines.append)
    first = f"[1/3] 1_first done in 0 s: {folder / '1_first.ipynb'}"
    assert lines.index(first) < lines.index("[3/3] 2_second ...")
    assert "    3_ train 30%" in lines and "FLOWOPD_HEADLESS" not in os.environ
    executed.fail = ["1_first"]
    with pytest.raises(RuntimeError, match="1_first failed"):
        run_tiny(jobs=2)
    states = {n: s["state"] for n, s in report.read_status(folder).items()}
    assert states == {"1_first": "failed", "2_second": "waiting", "3_other": "done"}
    with pytest.raises(ValueError, match="greater than 0"):
        run_tiny(jobs=0)


def test_an_unfinished_notebook_keeps_its_folder_unless_it_changed(lab, executed):
    executed.fail = ["2_second"]
    for resume in (False, True):
        with pytest.raises(RuntimeError):
            run_tiny(resume=resume)
    status = report.read_status(runner.RUNS / "tiny")
    assert [s["state"] for s in status.values()] == ["done", "failed", "waiting"]
    assert status["2_second"]["error"] == "2_second failed in ./x"
    executed.fail = []
    run_tiny(resume=True)
    assert executed.since() == ["1_first", "2_second", "2_second kept", "2_second kept", "3_other"]
    executed.fail = ["1_first"]
    with pytest.raises(RuntimeError):
        run_tiny(resume=True, overrides={"mean": 0.1})
    executed.fail = []
    run_tiny(resume=True)  # the results of 2_second depend on those of 1_first as it is again
    assert executed.since() == ["1_first", "1_first"]


def test_results_are_moved_and_never_removed_and_one_run_at_a_time_writes(
    lab, executed, monkeypatch
):
    lines, results = [], run_tiny() / "1_first" / "results.json"
    results.write_text("first")
    folder = run_tiny(log=lines.append)
    results.write_text("second")
    run_tiny(resume=True, overrides={"seed": 3})
    assert sorted(p.read_text() for p in folder.rglob("results.json")) == ["first", "second"]
    assert f"earlier results are now in {folder / 'earlier'}" in lines[1] and "--resume" in lines[1]
    executed.clear()
    monkeypatch.setattr(files, "WAIT", 0.2)
    with files.locked(folder, "a run of the profile tiny"):
        with pytest.raises(files.FolderInUse, match=f"tiny is in use by process {os.getpid()}"):
            run_tiny()
    assert executed == []


def test_only_runs_some_notebooks_and_finds_the_results_of_others(lab, executed):
    with pytest.raises(ValueError, match="2_second needs 1_first.*run first: --only 1_first"):
        run_tiny(only="2")
    assert not (runner.RUNS / "tiny").exists()
    run_tiny(only="1", overrides={"mean": 0.3})
    folder = run_tiny(only="2")
    assert list(report.read_status(folder)) == ["1_first", "2_second"]
    run_tiny(only="2", resume=True)
    assert executed.since() == ["1_first", "2_second"]
    run_tiny(only="1", overrides={"mean": 0.4})
    run_tiny(only="2", resume=True)
    assert executed.since() == ["1_first", "2_second"]
    write_profile({"2_second": None, "1_first": None})
    with pytest.raises(ValueError, match="2_second needs 1_first"):
        run_tiny()


def test_bad_profiles_and_parameters_are_found_before_anything_runs(lab, executed):
    def error(notebooks, **overrides):
        write_profile(notebooks)
        with pytest.raises(ValueError) as raised:
            run_tiny(overrides=overrides)
        return str(raised.value)

    every = dict.fromkeys(ALL)
    assert "parameter of these notebooks 'sed' (did you mean 'seed'?)" in error(every, sed=1)
    message = "1_first.ipynb: mean: Input should be a valid number, not 'much'"
    assert message in error(every, mean="much") and message in error({"1_first": {"mean": "much"}})
    assert "parameter of these notebooks 'out_dir'" in error(every, out_dir="x")
    assert "out_dir is set by the run" in error({"1_first": {"out_dir": "x"}})
    assert "no notebook '1_frist' (did you mean '1_first'?)" in error({"1_frist": None})
    assert "tiny.yaml: 1_first: Input should be a valid dictionary" in error({"1_first": ["mean"]})
    with pytest.raises(ValueError, match="no profile 'tinny' .did you mean 'tiny'"):
        runner.run_profile("tinny")
    files.write_whole(lab / "papermill_runs" / "tiny" / "status.json", "{")
    write_profile(every)
    with pytest.raises(ValueError, match="status.json.* line 1"):
        run_tiny(resume=True)
    assert executed.since() == []


def is_alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.fast
def test_notebooks_are_executed_interrupted_resumed_and_reported(lab, monkeypatch):
    folder, lines = lab / "Läufe für 学生", []
    state = folder / "2_second" / "state"

    def interrupt():
        while not (state.exists() and state.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_tiny(folder=folder, log=lines.append)
    kernel, status = int(state.read_text()), report.read_status(folder)
    assert [s["state"] for s in status.values()] == ["done", "interrupted", "waiting"]
    assert not is_alive(kernel) and "    train 30%, about 9 s left" in lines
    git = {"commit": "feed" * 10, "dirty": True}
    monkeypatch.setattr(report, "checkout", lambda root, folder: git)
    write("3_other", "seed: Seed = 0", "1 / seed")
    with pytest.raises(RuntimeError, match=r"3_other failed in cell(.|\n)*ZeroDivisionError"):
        run_tiny(folder=folder, resume=True)
    status = report.read_status(folder)
    assert [s["state"] for s in status.values()] == ["done", "done", "failed"]
    assert status["2_second"]["resumed"] and int(state.read_text()) == kernel

    manifest = json.loads((folder / "manifest.json").read_text())
    first = manifest["notebooks"]["1_first"]
    assert first["git"] is None and manifest["notebooks"]["2_second"]["git"] == git
    hashes = {"results.json": runner.file_hash(folder / "1_first" / "results.json")}
    assert first["files"] == hashes and len(first["fingerprint"]) == 64 and first["seconds"] > 0
    assert first["parameters"] == {"mean": 0.5, "seed": 0}
    assert {"torch", "papermill"} <= {*manifest["packages"]}
    page = (folder / "report.html").read_text()
    assert "written to ./1_first by flowopd-lab/notebooks" in page
    assert "import json" not in page and "feedfeed" in page
    copy = nbformat.read(folder / "1_first.ipynb", 4)
    assert 'out_dir = "./1_first"' in copy.cells[2].source
    outputs = [output.text for output in copy.cells[3].outputs]
    assert outputs[0] == "a warning\n" and outputs[1].endswith("\"./1_first\" './1_first'\n")
    for path in (p for p in folder.rglob("*") if p.is_file()):
        text = path.read_text(errors="replace")
        assert str(lab) not in text and f"{Path.home()}/" not in text, path


def test_two_runs_are_compared_by_parameters_settings_and_scores(lab, executed, capfd):
    def run(folder, mean, low, guidance):
        score = {"reward": "OCR", "mean": mean, "low": low, "high": mean + 0.1, "n": 9}
        run_tiny(only="1", folder=lab / folder, overrides={"mean": mean})
        unsure = {"reward": "DeQA", "mean": mean, "low": None, "high": None}
        files.write_json(lab / folder / "1_first" / "results.json", {"all": [score, unsure]})
        samples = {"model": ["base", "base"], "seed": [3, 4], "guidance": guidance, "steps": 8}
        samples = pd.DataFrame(samples | {"resolution": 64})
        samples.to_parquet(lab / folder / "1_first" / "samples.parquet")
        return lab / folder

    a, b = run("a", 0.5, 0.4, 1.0), run("b", 0.9, 0.8, 3.0)
    report.compare(a, b)
    printed = " ".join(capfd.readouterr().out.split())
    assert "parameters and states: 1 differ A B 1_first mean 0.5 0.9" in printed
    assert (
        "scores: 2 differ" in printed and "all OCR 0 0.5 0.4 0.6 9 0.9 0.8 1 9 disjoint" in printed
    )
    assert "settings of samples: 1 differ A B" in printed
    assert "1_first samples base guidance 1.0 3.0" in printed
    assert "guidance</th>" in report.page(report.manifest("tiny", a, report.read_status(a)), a)
    report.compare(a, a)
    assert "scores: 0 differ" in capfd.readouterr().out
    with pytest.raises(ValueError, match="notebooks is no run: it has no status.json"):
        report.compare(a, runner.NOTEBOOKS)


def test_progress_is_a_line_every_few_seconds_where_there_are_no_bars(monkeypatch, capsys):
    clock = iter(range(0, 100, 3))
    monkeypatch.setattr(files.time, "monotonic", lambda: next(clock))
    monkeypatch.setenv("FLOWOPD_HEADLESS", "1")
    with files.progress(6, "train") as advance:
        for _ in range(6):
            advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "progress: train 33%, about 12 s left",
        "progress: train 67%, about 6 s left",
    ]
    with files.progress(6, "train", shown=False) as advance:
        advance(6)
    assert capsys.readouterr().err == ""


# a launcher whose jobs start no Python: $3 is a job's folder
BRIEF = """cd "$3"
[ "${3##*/}" != bad ] || { echo error: out of memory; exit 1; }
if [ "${3##*/}" = waiting ]; then until [ -e ../bad/log.txt ]; do sleep .1; done; fi
if [ "${3##*/}" = long ]; then trap 'echo stopped after iteration 3; exit' TERM; sleep 60 & wait; fi
echo $OMP_NUM_THREADS "$@" > done"""


@pytest.fixture
def run_list(tmp_path):
    """Runs evaluations into folders of these names, two at once; the lines that are logged."""
    launcher, path = tmp_path / "brief.yaml", tmp_path / "list.yaml"
    launcher.write_text(yaml.safe_dump({"command": BRIEF}))

    def run(*names, models={"base": None}, processes=2):
        spec, lines = {"job": "evaluate", "models": models}, []
        listed = [{"folder": str(tmp_path / name), "spec": spec} for name in names]
        path.write_text(yaml.safe_dump(listed))
        try:
            jobs.run_jobs(path, processes, str(launcher), lines.append)
        finally:
            run.lines = [line.replace(f"{tmp_path}/", "") for line in lines]

    return run


def test_a_list_of_jobs_runs_to_its_end_and_reports_what_failed(tmp_path, run_list):
    with pytest.raises(RuntimeError, match="1 of 3 jobs did not finish; first .*bad failed: error"):
        run_list("waiting", "bad", "last")  # the first ends once the second has started
    assert sorted(line[5:] for line in run_list.lines) == [
        " bad failed: error: out of memory", " last finished", " waiting finished"
    ]  # fmt: skip
    threads, words = (tmp_path / "last" / "done").read_text().split(maxsplit=1)
    assert threads == str(max(1, os.cpu_count() // 2))
    assert words.split() == [str(tmp_path / "last/job.yaml"), "--folder", str(tmp_path / "last")]
    assert read_yaml(tmp_path / "last/job.yaml") == {"job": "evaluate", "models": {"base": None}}


def test_a_list_with_a_fault_starts_nothing(tmp_path, run_list):
    with pytest.raises(ValueError, match="list.yaml: 0.spec: models: Input should be a valid dict"):
        run_list("one", models=None)
    with pytest.raises(ValueError, match="processes: Input should be greater than or equal to 1"):
        run_list("one", processes=0)
    with pytest.raises(ValueError, match="list.yaml: List should have at least 1 item"):
        run_list()
    assert not (tmp_path / "one").exists()


def test_interrupted_jobs_are_stopped_and_waited_for(tmp_path, run_list):
    timer = threading.Timer(2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run_list("long", "last", processes=1)
    assert "stopped after" in (tmp_path / "long" / "log.txt").read_text()
    assert not run_list.lines and not (tmp_path / "last").exists()
