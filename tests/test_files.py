"""Files written whole, lines appended whole, types preserved, folders locked."""

import errno
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from flowopd_lib import files
from flowopd_lib.files import (
    FolderInUse,
    append_lines,
    locked,
    read_lines,
    set_aside,
    write_json,
    write_whole,
)

pytestmark = pytest.mark.fast


def test_json_holds_the_types_of_numpy_and_pandas(tmp_path):
    values = {  # value: as it is read again
        "mapping": ({"c": (float("nan"), "x")}, {"c": [None, "x"]}),
        "integer": (np.int64(4), 4),
        "float": (np.float32(0.5), 0.5),
        "bool": (np.bool_(True), True),
        "missing": ([pd.NA, np.nan, None], [None] * 3),
        "array": (np.arange(3), [0, 1, 2]),
        "date": (pd.Timestamp("2026-01-02"), "2026-01-02T00:00:00"),
        "series": (pd.Series([1, 2]), [1, 2]),
        "set": ({1}, [1]),
        "table": (pd.DataFrame({"m": ["x"], "v": [np.float64(1)]}), [{"m": "x", "v": 1.0}]),
        "infinite": ([float("inf"), -np.inf], [None, None]),
    }
    record = {name: value for name, (value, _) in values.items()}
    write_json(tmp_path / "r.json", {**record, np.int64(3): 1})
    expected = {name: read for name, (_, read) in values.items()}
    assert json.loads((tmp_path / "r.json").read_text()) == {**expected, "3": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_whole_seconds_stay_floats(tmp_path):
    lines = '{"iteration": 0, "seconds": 1.0}\n{"iteration": 1, "seconds": 2.0}\n'
    append_lines(tmp_path / "metrics.jsonl", lines)
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert rows["seconds"].dtype == float and rows["iteration"].dtype == int


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    before = os.umask(0o022)
    try:
        write_whole(path, "old")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644  # as readable as any file

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = r"No space left on device: '.*x\.json'"
    with pytest.raises(OSError, match=message):
        write_whole(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_partial_files_of_dead_writers_are_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    node = files.platform.node()
    of_dead, of_living, of_other_host = (
        tmp_path / f".x.json.{who}.partial"
        for who in (f"{node}.{dead.pid}", f"{node}.{os.getppid()}", "elsewhere.1")
    )
    for path in (of_dead, of_living, of_other_host):
        path.write_text("half")
    write_whole(tmp_path / "x.json", "new")
    assert not of_dead.exists() and of_living.exists() and of_other_host.exists()


def test_lines_are_appended_whole_and_half_a_line_is_cut_off(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert read_lines(path).empty
    append_lines(path, '{"a": 1}\n')
    with path.open("a") as file:
        file.write('{"a": 2')  # a kill in the middle
    assert read_lines(path).to_dict("records") == [{"a": 1}]
    append_lines(path, '{"a": 3}\n')
    assert read_lines(path).to_dict("records") == [{"a": 1}, {"a": 3}]


HOLD = (
    "import sys, time\nsys.path.insert(0, {path!r})\nimport files\n"
    "with files.locked({folder!r}, 'a test'):\n    print('held', flush=True)\n    time.sleep(100)"
)


def test_a_folder_has_one_writer_and_a_killed_writer_blocks_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WAIT", 0.2)
    code = HOLD.format(path=os.path.dirname(files.__file__), folder=str(tmp_path))
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    message = rf"is in use by process {other.pid} \(a test, since 20.*\); wait for it, stop it, or"
    with pytest.raises(FolderInUse, match=message), locked(tmp_path, "mine"):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with locked(tmp_path, "mine"):
        with pytest.raises(FolderInUse, match=f"process {os.getpid()} "):
            with locked(tmp_path, "mine again"):
                pass
    assert not (tmp_path / ".owner").exists()


def test_set_aside_moves_files_and_never_removes_them(tmp_path):
    for content in ("first", "second"):
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / "x").write_text(content)
        set_aside(tmp_path, tmp_path / "work", tmp_path / "none")
        assert not (tmp_path / "work").exists()
    assert sorted(p.read_text() for p in tmp_path.rglob("x")) == ["first", "second"]
