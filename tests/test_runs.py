"""The runner, on notebooks of a few lines: what is run again, what a kill leaves, what is written, how two
runs differ."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image

from flowopd_lib import files, progress
from flowopd_lib.runs import diff, profiles, report, run
from flowopd_lib.runs import runner as runs

PNG = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(PNG, "PNG")
FIRST = """import base64, json, sys
from pathlib import Path
from IPython.display import Image, display
record = {"model": "student", "reward": "OCR", "mean": mean, "low": mean - .1, "high": mean + .1, "n": 9}
(Path(out_dir) / "results.json").write_text(json.dumps(
    {"scores": [record, {**record, "reward": "DeQA", "mean": 1, "low": None}]}))
(Path(out_dir) / "state.safetensors").write_text("weights")
print("written to", out_dir, "by", Path.cwd())
display(Image(base64.b64decode(%r)))""" % base64.b64encode(PNG.getvalue()).decode()
SECOND = """from pathlib import Path
assert (Path(run_dir) / "1_first" / "results.json").is_file()
print("read", run_dir)"""
KILLED = """import os, time
from pathlib import Path
state = Path(out_dir) / "state"
if not state.exists():
    state.write_text(str(os.getpid()))
    time.sleep(120)"""


def write(name, parameters, source, needs=()):
    first = new_code_cell(parameters + '\nout_dir = ""', metadata={"tags": ["parameters"]})
    notebook = new_notebook(
        cells=[new_markdown_cell(f"# {name}\n\nText with $x^2$."), first, new_code_cell(source)]
    )
    notebook.metadata.update(
        kernelspec={"name": "python3", "display_name": "Python 3", "language": "python"},
        flowopd={"needs": list(needs)},
    )
    nbformat.write(notebook, runs.NOTEBOOKS / f"{name}.ipynb")


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A lab of three notebooks, the second of which reads the first's results."""
    for name, path in {
        "ROOT": tmp_path,
        "NOTEBOOKS": tmp_path / "notebooks",
        "RUNS": tmp_path / "papermill_runs",
    }.items():
        for module in (runs, profiles):
            monkeypatch.setattr(module, name, path)
    for folder in (
        "notebooks",
        "papermill_runs/profiles",
        "papermill_runs/recipes",
        "flowopd_lib/assets/experts/ocr",
        "flowopd_lib/benchmarks/tiny",
    ):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "flowopd_lib" / "train.py").write_text("lr = 1")
    for manifest in (
        "flowopd_lib/assets/manifest.json",
        "flowopd_lib/assets/experts/ocr/manifest.json",
    ):
        (tmp_path / manifest).write_text("{}")
    write("1_first", "mean = .5\nseed = 0", FIRST)
    write("2_second", 'run_dir = ""', SECOND, ["1_first"])
    write("3_alone", "seed = 0", "seed")
    profile({"1_first": None, "2_second": None, "3_alone": None})
    return tmp_path


def profile(notebooks):
    (runs.RUNS / "profiles" / "tiny.yaml").write_text(yaml.safe_dump(notebooks, sort_keys=False))


@pytest.fixture
def executed(monkeypatch):
    """Notebooks are not executed but listed, with whether their folder was kept; those in `fail` fail."""

    class Executed(list):
        fail = ()

        def since(self):
            now = list(self)
            self.clear()
            return now

    done = Executed()

    def execute(name, parameters, folder, log):
        done.append(name + (" kept" if (folder / name).exists() else ""))
        (folder / name).mkdir(exist_ok=True)
        nbformat.write(new_notebook(), folder / f"{name}.ipynb")
        if name in done.fail:
            raise RuntimeError(f"{name} failed in {folder}/x")
        return 200.0

    monkeypatch.setattr(runs, "execute", execute)
    return done


def tiny(log=lambda message: None, **options):
    return runs.run_profile("tiny", log=log, **options)


def test_resume_runs_again_what_changed_and_what_needs_it(lab, executed):
    folder, said = tiny(), []
    assert executed.since() == ["1_first", "2_second", "3_alone"]
    tiny(resume=True, log=said.append)
    assert executed.since() == [] and said[1] == "[2/3] 2_second is done and unchanged"
    tiny(resume=True, overrides={"mean": 0.7})
    assert executed.since() == ["1_first", "2_second"]
    tiny(resume=True, overrides={"mean": 0.7, "seed": 1})
    assert executed.since() == ["1_first", "2_second", "3_alone"]
    write("2_second", 'run_dir = ""', SECOND + "\n", ["1_first"])
    tiny(resume=True, overrides={"mean": 0.7, "seed": 1})
    assert executed.since() == ["2_second"]
    for file in (
        "flowopd_lib/train.py",
        "flowopd_lib/benchmarks/tiny/benchmark.yaml",
        "flowopd_lib/assets/experts/ocr/manifest.json",
        "papermill_runs/recipes/student.yaml",
    ):
        (lab / file).write_text("{1: 2}")
        tiny(resume=True, overrides={"mean": 0.7, "seed": 1})
        assert executed.since() == ["1_first", "2_second", "3_alone"], file
    (folder / "3_alone.ipynb").unlink()
    tiny(resume=True, overrides={"mean": 0.7, "seed": 1})
    assert executed.since() == ["3_alone"]
    tiny()
    assert executed.since() == ["1_first", "2_second", "3_alone"]


def test_notebooks_run_beside_one_another_and_after_what_they_need(lab, executed, monkeypatch):
    met, listed = threading.Barrier(2, timeout=30), runs.execute

    def execute(name, parameters, folder, log):
        assert (
            os.environ["OMP_NUM_THREADS"] == str(max(1, os.cpu_count() // 2))
            and os.environ["FLOWOPD_HEADLESS"]
        )
        if name != "2_second":
            met.wait()  # 1_first and 3_alone, both at work
        log("progress")
        return listed(name, parameters, folder, log)

    monkeypatch.setattr(runs, "execute", execute)
    said = []
    folder = tiny(jobs=2, log=said.append)
    assert sorted(executed.since()) == ["1_first", "2_second", "3_alone"] and said.index(
        "[2/3] 2_second ..."
    ) > said.index(f"[1/3] 1_first done in 3 min: {folder / '1_first'}.ipynb")
    assert "    3_ progress" in said and "FLOWOPD_HEADLESS" not in os.environ
    assert [s["state"] for s in runs.read_status(folder).values()] == ["done"] * 3
    executed.fail = ["1_first"]
    with pytest.raises(RuntimeError, match="1_first failed"):
        tiny(jobs=2)
    assert {n: s["state"] for n, s in runs.read_status(folder).items()} == {
        "1_first": "failed",
        "2_second": "waiting",
        "3_alone": "done",
    }
    with pytest.raises(ValueError, match="at least 1, not 0"):
        tiny(jobs=0)


def test_what_was_cut_off_keeps_its_folder_unless_it_changed(lab, executed):
    executed.fail = ["2_second"]
    with pytest.raises(RuntimeError):
        tiny()
    status = json.loads((runs.RUNS / "tiny" / "status.json").read_text())
    assert [s["state"] for s in status.values()] == ["done", "failed", "waiting"] and status[
        "2_second"
    ]["error"] == "2_second failed in ./x"
    with pytest.raises(RuntimeError):
        tiny(resume=True)
    executed.fail = []
    tiny(resume=True)
    assert executed.since() == ["1_first", "2_second", "2_second kept", "2_second kept", "3_alone"]
    executed.fail = ["1_first"]
    with pytest.raises(RuntimeError):
        tiny(resume=True, overrides={"mean": 0.1})
    executed.fail = []
    tiny(resume=True)
    # 2_second's results are of the first's as it is again
    assert executed.since() == ["1_first", "1_first"]


def test_nothing_computed_is_removed(lab, executed):
    def results(text):
        (runs.RUNS / "tiny" / "1_first" / "results.json").write_text(text)

    folder, said = tiny(), []
    results("first")
    executed.fail = ["2_second"]
    with pytest.raises(RuntimeError):
        tiny(log=said.append)  # started again without --resume
    results("second")
    with pytest.raises(RuntimeError):
        tiny(only="2", overrides={"run_dir": ""}, resume=True)
    executed.fail = []
    tiny(resume=True, overrides={"seed": 3})  # what changed is run anew
    assert sorted(p.read_text() for p in folder.rglob("results.json")) == ["first", "second"]
    assert (
        said[0].startswith("[1/3] 1_first ...")
        and f"; what was there is now in {folder / 'earlier'}" in said[0]
        and "--resume" in said[0]
    )
    assert not list(folder.rglob("*.partial")) and "earlier" not in json.loads(
        (folder / "status.json").read_text()
    )


def test_two_runs_into_one_folder_take_no_turns(lab, executed, monkeypatch):
    monkeypatch.setattr(files, "WAIT", 0.2)
    with files.locked(runs.RUNS / "tiny", "a run of the profile tiny"):
        with pytest.raises(
            files.FolderInUse,
            match=f"tiny is in use by process {os.getpid()} .a run of the profile tiny, since",
        ):
            tiny()
    assert executed.since() == []
    tiny()


def test_an_unknown_kernel_is_one_sentence(lab):
    path = runs.NOTEBOOKS / "3_alone.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.metadata.kernelspec.name = "julia-9"
    nbformat.write(notebook, path)
    with pytest.raises(
        ValueError, match="3_alone.ipynb asks for the kernel 'julia-9', which is not installed here"
    ):
        tiny(only="3")


def test_a_folder_with_letters_of_any_language_leaks_no_path(lab, tmp_path):
    write(
        "3_alone",
        "seed = 0",
        "import json, urllib.parse\nprint(out_dir)\nprint(json.dumps(out_dir), urllib.parse.quote(out_dir), "
        "ascii(out_dir))\nout_dir",
    )
    folder = tiny(only="3", folder=tmp_path / "Läufe für 学生")
    for path in (p for p in folder.rglob("*") if p.is_file()):
        text = path.read_text(errors="replace")
        assert str(tmp_path) not in text and tmp_path.name not in text, path
    executed = nbformat.read(folder / "3_alone.ipynb", 4)
    assert 'out_dir = "./3_alone"' in executed.cells[2].source
    assert executed.cells[3].outputs[0].text == "./3_alone\n\"./3_alone\" ./3_alone './3_alone'\n"


def test_only_keeps_the_others_and_reads_them(lab, executed):
    with pytest.raises(
        ValueError,
        match="2_second needs 1_first, neither before it in this run nor done in .*tiny; run first: --only "
        "1_first",
    ):
        tiny(only="2")
    assert not (runs.RUNS / "tiny").exists()
    tiny(only="1", overrides={"mean": 0.3})
    folder = tiny(only="2")
    assert list(json.loads((folder / "status.json").read_text())) == ["1_first", "2_second"]
    tiny(only="2", resume=True)
    assert executed.since() == ["1_first", "2_second"]
    tiny(only="1", overrides={"mean": 0.4})
    tiny(only="2", resume=True)
    assert executed.since() == ["1_first", "2_second"]
    profile({"2_second": None, "1_first": None})
    with pytest.raises(ValueError, match="2_second needs 1_first"):
        tiny()


def test_the_time_left_is_that_of_the_same_parameters(lab, executed):
    said = []
    tiny(log=said.append)
    assert said[0] == "[1/3] 1_first ..."
    tiny(log=said.append)
    assert said[6].startswith("[1/3] 1_first ... (about 10 min left);") and said[10].startswith(
        "[3/3] 3_alone ... (about 3 min left);"
    )
    tiny(log=said.append, overrides={"mean": 0.2})
    assert said[12].startswith("[1/3] 1_first ...;") and said[14].startswith(
        "[2/3] 2_second ... (about 7 min left);"
    )


def test_bad_input_gets_one_sentence(lab, monkeypatch, capsys, tmp_path):
    cases = {
        "--set sed=1": "there is no parameter 'sed' (did you mean 'seed'?) in 1_first, 2_second, 3_alone; "
        "there are mean, seed, out_dir, run_dir",
        "--set mean=much": "takes mean as float, such as 0.5, not 'much'",
        "--set mean=[": "the value in --set 'mean=[' is no YAML, such as",
        "--set out_dir=x": "is set by the run",
        "--folder notebooks": "is no folder for a run",
    }
    monkeypatch.chdir(tmp_path)
    for words, message in cases.items():
        monkeypatch.setattr(sys, "argv", ["run", "tiny", *words.split()])
        with pytest.raises(SystemExit) as stop:
            run.main()
        assert stop.value.code.startswith("error: ") and message in stop.value.code
    profile({"1_first": ["mean"]})
    with pytest.raises(ValueError, match="must map notebooks to their parameters"):
        tiny()
    (tmp_path / "status.json").write_text("{")
    with pytest.raises(ValueError, match="status.json is not JSON"):
        runs.read_status(tmp_path)
    monkeypatch.setattr(sys, "argv", ["diff", "papermill_runs", "notebooks"])
    with pytest.raises(SystemExit, match="papermill_runs is no run: it has no status.json"):
        diff.main()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_resume_finishes_what_a_kill_left(lab, how):
    write("1_first", "", KILLED)
    # The package without its __init__, which imports everything.
    script = (
        "import sys, types; from pathlib import Path; p = types.ModuleType('flowopd_lib'); p.__path__ = "
        f"[{str(files.ROOT / 'flowopd_lib')!r}]\n"
        "sys.modules['flowopd_lib'] = p; from flowopd_lib.runs import profiles, run, runner\nroot = "
        f"Path({str(lab)!r})\n"
        "for m in (profiles, runner): m.ROOT, m.NOTEBOOKS, m.RUNS = ("
        "root, root / 'notebooks', root / 'papermill_runs')\nsys.argv = ['run', "
        "'tiny', '--only', '1', '--jobs', '2']\nrun.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    state = runs.RUNS / "tiny" / "1_first" / "state"
    wait(lambda: state.exists() and state.read_text() or process.poll() is not None)
    assert process.poll() is None, process.stderr.read()
    process.send_signal(how)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == (-9 if how == signal.SIGKILL else 1) and (
        "with --resume goes on" in said
    ) == (how == signal.SIGTERM)
    assert runs.read_status(runs.RUNS / "tiny")["1_first"]["state"] == (
        "running" if how == signal.SIGKILL else "interrupted"
    )
    kernel = int(state.read_text())
    wait(lambda: not alive(kernel))
    folder = tiny(only="1", resume=True)
    entry = runs.read_status(folder)["1_first"]
    assert entry["state"] == "done" and entry["resumed"] and int(state.read_text()) == kernel


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return (
        "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
        if Path(f"/proc/{pid}").exists()
        else True
    )


def wait(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "nothing happened"
        time.sleep(0.05)


def test_what_is_written_says_all_and_no_path_and_two_runs_compare(lab, capsys, monkeypatch):
    folder = tiny(only="1")
    monkeypatch.setattr(
        report, "checkout", lambda root, besides: {"commit": "feed" * 10, "dirty": True}
    )
    tiny(only="2")
    manifest = json.loads((folder / "manifest.json").read_text())
    entry, later = manifest["notebooks"]["1_first"], manifest["notebooks"]["2_second"]
    # what ran where, if not all at once
    assert entry["git"] is None and later["git"] == {"commit": "feed" * 10, "dirty": True}
    assert list(entry["files"]) == ["results.json"] and entry["files"]["results.json"][
        "sha256"
    ] == report.sha256(folder / "1_first" / "results.json")
    assert entry["state"] == "done" and entry["seconds"] > 0 and len(entry["fingerprint"]) == 64
    assert (
        manifest["versions"].keys() > {"python", "torch"}
        and manifest["machine"]["cpus"] == os.cpu_count()
    )
    assert set(manifest["inputs"]) == {
        "flowopd_lib/assets/manifest.json",
        "flowopd_lib/assets/experts/ocr/manifest.json",
    }
    page = (folder / "report.html").read_text()
    assert (
        page.count('src="data:image/webp;base64,') == 1
        and '<section id="2_second">' in page
        and page.count("feedfeedfe with changes") == 1
    )
    assert (
        "written to ./1_first by flowopd-lab/notebooks" in page
        and "import base64" not in page
        and "http" not in page
    )
    first = nbformat.read(folder / "1_first.ipynb", 4)
    assert (
        'out_dir = "./1_first"' in first.cells[2].source
        and "image/png" in first.cells[3].outputs[1].data
    )
    assert base64.b64decode(first.cells[3].outputs[1].data["image/png"]) == PNG.getvalue()
    assert 'run_dir = "."' in nbformat.read(folder / "2_second.ipynb", 4).cells[2].source
    for path in folder.rglob("*"):
        assert (
            path.is_dir()
            or str(lab) not in path.read_text()
            and str(Path.home()) + "/" not in path.read_text()
        ), path

    write("1_first", "mean = .5\nseed = 1", FIRST.replace("written", "wrote"))
    other = tiny(only="1", overrides={"mean": 0.9}, folder=lab / "other")
    monkeypatch.setattr(sys, "argv", ["diff", str(folder), str(other), "--notebooks"])
    diff.main()
    said = capsys.readouterr().out
    assert (
        "only in A: 2_second" in said
        and "parameters: 2 differ\n  mean   0.5 | 0.9\n  seed   0   | 1\n" in said
    )
    assert "scores: 2 of 2 differ, 1 with intervals apart" in said
    assert (
        "scores reward=OCR model=student    0.5 [0.4, 0.6] n=9 | 0.9 [0.8, 1] n=9   apart\n" in said
    )
    assert 'print("written to"' in said and 'print("wrote to"' in said and "injected" not in said
    assert list(diff.compare(folder, folder))[1:] == [
        "\n1_first",
        "  parameters: the same",
        "  scores: 0 of 2 differ, 0 with intervals apart",
        "  text: the same",
        "\n2_second",
        "  parameters: the same",
        "  text: the same",
    ]


def test_a_reports_formulas_are_mathml_and_what_is_none_stays():
    text = report.with_formulas(
        "Let $\\sigma = 1$ be noise:\n\n$$w_k = \\frac{\\Delta t}{2}$$\n\n`$HOME` and `a $b$`; it costs $5 "
        "or $6; a $\\broken{$ one."
    )
    assert (
        text.count("<math") == text.count("</math>") >= 2
        and 'display="block"' in text
        and "<mfrac>" in text
        and "\\sigma" not in text
    )
    assert "`$HOME` and `a $b$`" in text and "$5 or $6" in text
    # every formula that there is
    for path in (Path(__file__).parent.parent / "notebooks").glob("*.ipynb"):
        source = "\n\n".join(
            c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"
        )
        assert "\\" not in re.sub("`[^`]*`", "", report.with_formulas(source)), path


def test_a_long_cell_says_how_far_it_is_while_it_runs_and_the_finished_copy_does_not(lab):
    write(
        "3_alone",
        "seed = 0",
        """import sys
from pathlib import Path
for part in (30, 60):
    print(f"progress: train {part}%, about 9 s left", file=sys.stderr, flush=True)
print("a warning", file=sys.stderr)""",
    )
    said = []
    folder = tiny(only="3", log=said.append)
    assert [line for line in said if line.startswith("    ")] == [
        "    train 30%, about 9 s left",
        "    train 60%, about 9 s left",
    ]
    assert [o.text for o in nbformat.read(folder / "3_alone.ipynb", 4).cells[-1].outputs] == [
        "a warning\n"
    ]


def test_progress_is_a_line_every_few_seconds_where_nobody_sees_bars(monkeypatch, capsys):
    clock = iter(range(0, 100, 3))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setenv("FLOWOPD_HEADLESS", "1")
    with progress.progress(6, "train") as advance:
        for _ in range(6):
            advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "progress: train 33%, about 12 s left",
        "progress: train 67%, about 6 s left",
    ]
    with progress.progress(6, "train", shown=False) as advance:
        advance(6)
    assert capsys.readouterr().err == ""
