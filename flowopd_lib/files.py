"""Files and folders of runs: written whole or not at all, read with the types they were written
with, filled by one process at a time."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

ROOT = Path(__file__).parent.parent  # of the checkout
RUNS = ROOT / "papermill_runs"
WAIT = 5.0  # seconds for a process that is just ending, such as the kernel of a killed run


class FolderInUse(RuntimeError):
    """Another process is writing to the folder."""


def write_whole(path: str | Path, data: bytes | str) -> None:
    """Write a file so that a kill or a full disk leaves the old one or the new one, whole; clear
    what dead writers of it left.

    Raises OSError, naming the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    here = platform.node().replace(".", "-")
    for left in path.parent.glob(f".{path.name}.*.partial"):
        *_, host, pid, _ = left.name.rsplit(".", 3)
        if host == here and pid.isdigit() and int(pid) != os.getpid() and not alive(int(pid)):
            left.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{here}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name with nothing in it
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno or 0)}; what was there before is left as it was",
            str(path),
        ) from error


def alive(pid: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def append_lines(path: str | Path, lines: str) -> None:
    """Add whole lines to a file of lines: all of them or, where the disk is full, none. Half a line
    that a kill left is cut off first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(max(0, end - (1 << 20)))
            tail = file.read()
            if not tail.endswith(b"\n"):
                end -= len(tail) - (tail.rfind(b"\n") + 1)
                file.truncate(end)
        try:
            file.write(lines.encode())
            file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error


def read_lines(path: str | Path) -> pd.DataFrame:
    """A file of JSON lines, which another may be writing to: its whole lines, a row each; empty
    where there is none.

    A number is what it was written as: `2.0` stays a float, where pandas' own reader makes it an
    integer if all others are whole too.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return pd.DataFrame(
        [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line.strip()]
    )


def plain(node: Any) -> Any:
    """What JSON can say of `node`: numbers, lists and texts for numpy's and pandas' kinds; null for
    NaN, "Infinity" for what is infinite."""
    if isinstance(node, Mapping):
        return {str(plain(key)): plain(value) for key, value in node.items()}
    if isinstance(node, (pd.DataFrame, pd.Series)):
        return plain(node.to_dict("records") if isinstance(node, pd.DataFrame) else node.tolist())
    if isinstance(node, (list, tuple, set, frozenset, np.ndarray, pd.Index)):
        return [
            plain(value)
            for value in (node.tolist() if isinstance(node, (np.ndarray, pd.Index)) else node)
        ]
    if isinstance(node, np.generic):
        node = node.item()
    if node is None or node is pd.NA or node is pd.NaT:
        return None
    if isinstance(node, float) and not math.isfinite(node):
        return None if math.isnan(node) else "Infinity" if node > 0 else "-Infinity"
    return node if isinstance(node, (bool, int, float, str)) else str(node)


def write_json(path: str | Path, record: Any) -> None:
    """Write a record as JSON, whole or not at all. It takes everything: a result is not lost
    because writing it comes last."""
    write_whole(path, json.dumps(plain(record), indent=1, allow_nan=False) + "\n")


def write_table(path: str | Path, table: pd.DataFrame) -> None:
    """Write a table as parquet, whole or not at all."""
    file = io.BytesIO()
    table.to_parquet(file)
    write_whole(path, file.getvalue())


@contextlib.contextmanager
def locked(folder: str | Path, what: str) -> Iterator[None]:
    """Keep other processes from writing to a folder. The lock is the operating system's and goes
    with its process, however that ends.

    Raises FolderInUse, naming the other process, if it does not end within `WAIT` seconds.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / ".lock", timeout=WAIT), folder / ".owner.json"
    try:
        lock.acquire()
    except Timeout as error:
        raise FolderInUse(
            f"{folder} is in use by {_told(owner)}; wait for it, stop it, or give another folder"
        ) from error
    try:
        write_json(
            owner,
            {
                "pid": os.getpid(),
                "host": platform.node(),
                "what": what,
                "command": " ".join(sys.argv),
                "since": datetime.now().isoformat(sep=" ", timespec="seconds"),
            },
        )
        yield
    finally:
        # the lock is what counts, and what went wrong before is what is told
        with contextlib.suppress(OSError):
            owner.unlink(missing_ok=True)
        lock.release()


def _told(owner: Path) -> str:
    try:
        record = json.loads(owner.read_text())
        where = "" if record["host"] == platform.node() else f" on {record['host']}"
        return f"process {record['pid']}{where} ({record['what']}, since {record['since']}: {record['command']})"
    except (OSError, ValueError, KeyError):
        return "another process"


def set_aside(folder: Path, *paths: Path) -> Path | None:
    """Move what there is of `paths` into a new folder `folder/earlier/TIME`; that folder, None if
    there was nothing."""
    there = [p for p in paths if p.exists()]
    if not there:
        return None
    when = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in range(1000):
        aside = folder / "earlier" / (when + (f"_{number}" if number else ""))
        with contextlib.suppress(FileExistsError):
            aside.mkdir(parents=True)
            break
    for path in there:
        os.replace(path, aside / path.name)
    return aside
