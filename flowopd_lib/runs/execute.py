"""One notebook executed by papermill, and what its kernel runs with."""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import papermill
import psutil
from jupyter_client.kernelspec import NoSuchKernel
from papermill.exceptions import PapermillExecutionError

from ..files import MARK, ROOT, write_whole
from ..lab.notebook import NotForThisBenchmark
from ..loading import VARIABLE, decide, dtype_name

NOTEBOOKS = ROOT / "notebooks"


def execute(name: str, parameters: Mapping[str, Any], folder: Path, log: Callable = print) -> None:
    """Execute a notebook into `folder/NAME.ipynb`; its results go to `folder/NAME`, its parameter
    `out_dir`, and it finds those of others in `run_dir`, which is `folder` where it is empty.

    While it runs, the executed copy is saved every few seconds and `log` gets its progress lines;
    widget states, paths of this machine and those lines are then removed from the copy. Raises
    RuntimeError with the cell that failed.
    """
    source, target = NOTEBOOKS / f"{name}.ipynb", folder / f"{name}.ipynb"
    parameters = {**parameters, "out_dir": str(folder / name)}
    if parameters.get("run_dir") == "":
        parameters["run_dir"] = str(folder)
    (folder / name).mkdir(parents=True, exist_ok=True)

    def log_progress(text: str) -> None:
        for line in text.splitlines():
            if line.startswith(MARK):
                log(f"    {line.removeprefix(MARK)}")

    try:
        papermill.execute_notebook(
            str(source),
            str(target),
            parameters,
            cwd=str(NOTEBOOKS),
            progress_bar=False,
            log_output=False,
            stderr_file=SimpleNamespace(write=log_progress, flush=lambda: None),
            autosave_cell_every=5,
            # the kernel warns of TCP at each start, and of its own end
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        )
    except PapermillExecutionError as error:
        if error.ename == NotForThisBenchmark.__name__:
            raise NotForThisBenchmark(error.evalue) from error
        raise RuntimeError(
            f"{name} failed in cell {error.exec_count}:\n\n{error.source}\n\n{error.ename}: "
            f"{error.evalue}\n(executed up to there: {target})"
        ) from error
    except (NoSuchKernel, RuntimeError) as error:  # the latter where the kernel died
        raise RuntimeError(f"{name} was not executed to its end: {error}") from error
    finally:
        if target.exists():
            write_whole(target, nbformat.writes(cleaned(nbformat.read(target, 4), folder)) + "\n")


def cleaned(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """An executed notebook without widget states, progress lines and paths of this machine."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                lines = output.text.splitlines(keepends=True)
                output.text = "".join(line for line in lines if not line.startswith(MARK))
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("text") != ""]
    return nbformat.from_dict(scrub(notebook, folder))


def scrub(node: Any, folder: Path) -> Any:
    """`node` without paths of this machine, for runs are published: `folder` becomes ".", the
    repository and the home folder a name, whether plain, escaped as in Python or JSON, or as in a
    web address. Images stay as they are."""
    if isinstance(node, Mapping):
        return {k: v if k.startswith("image/") else scrub(v, folder) for k, v in node.items()}
    if isinstance(node, list):
        return [scrub(value, folder) for value in node]
    if not isinstance(node, str):
        return node
    for path, name in ((folder, "."), (ROOT, "flowopd-lab"), (Path.home(), "~")):
        plain = str(path)
        forms = {plain, plain.encode("unicode_escape").decode(), json.dumps(plain)[1:-1]}
        forms |= {urllib.parse.quote(plain), html.escape(plain)}
        for form in sorted(forms - {"/"}, key=len, reverse=True):  # a home folder of / is none
            node = re.sub(re.escape(form) + r"(?![\w.-])", name, node)
    return node


def kernel_environment(folder: Path, jobs: int) -> dict[str, str]:
    """For the kernels of a run: no progress bars and widgets, the precision of the folder, their
    number of cores."""
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))} if jobs > 1 else {}
    return {"FLOWOPD_HEADLESS": "1", VARIABLE: dtype_name(decide(folder)), **threads}


def stop_kernels() -> None:
    """Kill the kernels that this process started."""
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ipykernel_launcher" in process.cmdline():
                process.kill()
