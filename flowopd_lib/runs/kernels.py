"""The kernels of a headless run: what they are told, the lines they say of how far they are, their end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

from ..jobs.processes import shared
from ..precision import VARIABLE, decide
from ..progress import MARK


@contextlib.contextmanager
def environment(folder: Path, jobs: int) -> Iterator[None]:
    """For the kernels: no bars in the executed copies, sheets instead of widgets, the precision decided for
    the folder, their share of the cores, a launcher's processes that serve one after another."""
    ours = {"FLOWOPD_HEADLESS": "1", VARIABLE: str(decide(folder)).removeprefix("torch.")}
    if jobs > 1:
        ours["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    with shared(folder / ".jobs") as variable:
        ours |= variable
        before = {name: os.environ.get(name) for name in ours}
        os.environ.update(ours)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def stop_kernels() -> None:
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # one that ended meanwhile
            if "ipykernel_launcher" in process.cmdline():
                process.kill()


class Progress:
    """In the place of a file that a notebook's stderr goes to: tells `log` the lines that say how far it
    is."""

    def __init__(self, log):
        self.log = log

    def write(self, text: str) -> None:
        for line in text.splitlines():
            if line.startswith(MARK):
                self.log(f"    {line.removeprefix(MARK)}")

    def flush(self) -> None:
        """papermill calls it."""


def forget_progress(outputs: list) -> None:
    for output in list(outputs):
        if output.get("name") == "stderr":
            output.text = "".join(
                line for line in output.text.splitlines(keepends=True) if not line.startswith(MARK)
            )
            if not output.text:
                outputs.remove(output)
