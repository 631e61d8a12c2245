"""The command line: its help, and every error in one sentence."""

import subprocess
import sys

import pytest
import yaml

from flowopd_lib import cli
from flowopd_lib.files import ROOT
from flowopd_lib.lab import launch
from flowopd_lib.runs import runner

pytestmark = pytest.mark.fast


@pytest.fixture
def worked(monkeypatch):
    """The arguments of every call of the worker, which does nothing."""
    calls = []
    monkeypatch.setattr(launch, "work", lambda *arguments: calls.append(arguments))
    return calls


def error_of(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    return stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err


def test_help_of_all_commands_needs_no_torch():
    code = "import sys; from flowopd_lib import cli\ntry: cli.main(['--help'])\n"
    code += "finally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode and all(f"    {name} " in done.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_explains_its_arguments(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    assert f"usage: python -m flowopd_lib {name}" in capsys.readouterr().out


def test_jobs_get_their_specification_folder_and_precision(tmp_path, worked):
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({"models": {"base": None}}))
    cli.main(["evaluate", str(path), "--folder", "f", "--precision", "float32"])
    cli.main(["train", str(path), "--folder", "f"])
    cli.main(["job", str(path), "--folder", "f"])
    cli.main(["job", "--serve", "queue", "--parent", "7"])
    specs = [
        {"models": {"base": None}, **job} for job in ({"job": "evaluate"}, {"job": "train"}, {})
    ]
    assert [call[0] for call in worked] == [*specs, None]
    assert worked[0][2] == "float32" and worked[1][2] == "auto"
    assert str(worked[3][1]) == "queue" and worked[3][3] == 7


def test_a_run_gets_its_overrides(monkeypatch, capsys, tmp_path):
    calls = []
    monkeypatch.setattr(
        runner, "run_profile", lambda *arguments: calls.append(arguments) or tmp_path
    )
    cli.main("run demo --only 05 --set n_test=3 --jobs 2 --set lr=3e-4 --resume".split())
    assert calls == [("demo", "05", {"n_test": 3, "lr": 3e-4}, None, True, 2)]
    assert str(tmp_path / "report.html") in capsys.readouterr().out


def test_errors_are_one_sentence_and_name_the_process(tmp_path, capsys, monkeypatch):
    (tmp_path / "list.yaml").write_text("[1]")
    cases = {
        "error: there is no nowhere.yaml": ("train", "nowhere.yaml", "--folder", tmp_path),
        "list.yaml: 0: Input should be": ("jobs", tmp_path / "list.yaml", "--processes", 2),
        "list.yaml: Input should be": ("job", tmp_path / "list.yaml", "--folder", "f"),
        "error: a job needs its specification and --folder": ("job",),
        "error: there is no profile 'dmo' (did you mean 'demo'?)": ("run", "dmo"),
        "invalid choice: 'trian'": ("trian",),
        "is no run: it has no status.json": ("diff", tmp_path, tmp_path),
        "holds no finished training": ("cache", tmp_path),
    }
    for message, words in cases.items():
        error = error_of(capsys, *words)
        assert message in error and "Traceback" not in error
    monkeypatch.setenv("RANK", "3")
    assert error_of(capsys, "run", "dmo").startswith("error in process 3: there is no profile")


def test_an_interruption_says_how_to_resume(monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_profile", interrupted)
    assert "resumes" in error_of(capsys, "run", "demo")
