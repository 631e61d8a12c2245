"""Files written whole, lines added whole, types kept, folders locked."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from flowopd_lib import files
from flowopd_lib.files import (
    FolderInUse,
    append_lines,
    locked,
    plain,
    read_lines,
    set_aside,
    write_json,
    write_table,
    write_whole,
)


def test_results_are_json_whatever_numpy_and_pandas_hand_in(tmp_path):
    record = {
        "a": [1.0, float("nan")],
        "b": {"c": (float("nan"), "x")},
        np.int64(3): np.int64(4),
        "f": np.float32(0.5),
        "t": np.bool_(True),
        "n": pd.NA,
        "z": pd.NaT,
        "arr": np.arange(3),
        "day": pd.Timestamp("2026-01-02"),
        "s": pd.Series([1, 2]),
        "set": {1},
        "rows": pd.DataFrame({"m": ["x"], "v": [np.float64(1)]}),
        "inf": [float("inf"), -np.inf],
    }
    write_json(tmp_path / "r.json", record)
    again = json.loads((tmp_path / "r.json").read_text())
    assert again == {
        "a": [1.0, None],
        "b": {"c": [None, "x"]},
        "3": 4,
        "f": 0.5,
        "t": True,
        "n": None,
        "z": None,
        "arr": [0, 1, 2],
        "day": "2026-01-02 00:00:00",
        "s": [1, 2],
        "set": [1],
        "rows": [{"m": "x", "v": 1.0}],
        "inf": ["Infinity", "-Infinity"],
    }
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"] and plain("x") == "x"


def test_whole_seconds_stay_floats(tmp_path):
    append_lines(
        tmp_path / "metrics.jsonl",
        '{"iteration": 0, "seconds": 1.0}\n{"iteration": 1, "seconds": 2.0}\n',
    )
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert rows["seconds"].dtype == float and rows["iteration"].dtype == int
    write_json(
        tmp_path / "r.json",
        {"seconds": rows["seconds"].iloc[-1], "iteration": rows["iteration"].iloc[-1]},
    )
    assert json.loads((tmp_path / "r.json").read_text()) == {"seconds": 2.0, "iteration": 1}


def test_a_file_is_as_open_to_others_as_any_and_no_less_than_whole(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    before = os.umask(0o022)
    try:
        write_whole(path, "old")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(
            OSError,
            match=r"No space left on device; what was there before is left as it was.*x\.json",
        ):
            write_whole(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_what_dead_writers_left_is_cleared_by_the_next(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    node = files.platform.node().replace(".", "-")
    left = {who: tmp_path / f".x.json.{node}.{who}.partial" for who in (dead.pid, os.getppid())}
    other_host = tmp_path / ".x.json.elsewhere.1.partial"
    for path in (*left.values(), other_host):
        path.write_text("half")
    write_whole(tmp_path / "x.json", "new")
    assert not left[dead.pid].exists() and left[os.getppid()].exists() and other_host.exists()


def test_lines_are_added_whole_or_not_at_all(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_lines(path, '{"a": 1}\n')
    with path.open("a") as file:
        file.write('{"a": 2')  # a kill in the middle
    assert read_lines(path).to_dict("records") == [{"a": 1}]
    append_lines(path, '{"a": 3}\n')
    assert read_lines(path).to_dict("records") == [{"a": 1}, {"a": 3}]
    assert read_lines(tmp_path / "none").empty


def test_a_table_is_written_as_it_is_read(tmp_path):
    table = pd.DataFrame({"x": [1.0, 2.0], "z": [np.ones(2, np.float32)] * 2, "n": ["a", "b"]})
    write_table(tmp_path / "t.parquet", table)
    again = pd.read_parquet(tmp_path / "t.parquet")
    assert again["x"].tolist() == [1.0, 2.0] and again["z"][0].dtype == np.float32


HOLD = (
    "import sys, time\nsys.path.insert(0, {path!r})\nimport files\n"
    "with files.locked({folder!r}, 'a test'):\n    print('held', flush=True)\n    time.sleep(100)"
)


def test_a_folder_has_one_writer_and_a_killed_one_blocks_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WAIT", 0.2)
    other = subprocess.Popen(
        [
            sys.executable,
            "-c",
            HOLD.format(path=os.path.dirname(files.__file__), folder=str(tmp_path)),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(
        FolderInUse,
        match=rf"is in use by process {other.pid} \(a test, since 20.*\); wait for it, stop it, or give "
        r"another folder",
    ):
        with locked(tmp_path, "mine"):
            pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    began = time.time()
    with locked(tmp_path, "mine"):
        with pytest.raises(FolderInUse, match=f"process {os.getpid()} "):
            with locked(tmp_path, "mine again"):
                pass
    assert time.time() - began < 5 and not (tmp_path / ".owner.json").exists()


def test_set_aside_moves_and_never_removes(tmp_path):
    for text in ("first", "second"):
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / "x").write_text(text)
        assert (
            set_aside(tmp_path, tmp_path / "work", tmp_path / "none") is not None
            and not (tmp_path / "work").exists()
        )
    assert sorted(p.read_text() for p in tmp_path.rglob("x")) == ["first", "second"]
    assert set_aside(tmp_path, tmp_path / "none") is None
