"""Headless runs: notebooks executed by papermill with the parameters of a profile, results in one folder."""

from __future__ import annotations

import hashlib
import html
import json
import re
import time
import urllib.parse
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import nbformat
import papermill
from jupyter_client.kernelspec import NoSuchKernel
from papermill.exceptions import PapermillExecutionError

from ..files import ROOT, RUNS, locked, set_aside, write_json, write_whole
from . import report
from .kernels import Progress, environment, forget_progress, stop_kernels
from .profiles import NOTEBOOKS, choose, load_profile, parameters_of


def read_status(folder: Path) -> dict[str, dict]:
    """A run's `status.json`, by notebook; empty where there is none. Raises ValueError, naming the file, if
    it is not one."""
    path = folder / "status.json"
    try:
        status = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it to start over") from error
    if not isinstance(status, dict) or not all(
        isinstance(s, dict) and "state" in s for s in status.values()
    ):
        raise ValueError(f"{path} is not the status of a run; delete it to start over")
    return status


def inputs() -> dict[str, str]:
    """sha256 of what any notebook may read beside its own text: the library's source, its benchmarks, the assets'
    manifests, the recipes."""
    library = ROOT / "flowopd_lib"
    files = {
        p.relative_to(ROOT).as_posix(): p
        for p in (
            *library.rglob("*.py"),
            *(library / "benchmarks").rglob("*.yaml"),
            *(library / "assets").rglob("manifest.json"),
        )
    }
    files |= {f"papermill_runs/recipes/{p.name}": p for p in (RUNS / "recipes").glob("*.yaml")}
    return {name: report.sha256(files[name]) for name in sorted(files)}


def needs_of(notebook: str) -> list[str]:
    """The notebooks whose results a notebook reads, as its metadata say: `{"flowopd": {"needs":
    ["05_opd"]}}`."""
    return (
        nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", 4)
        .metadata.get("flowopd", {})
        .get("needs", [])
    )


def check_needs(chosen: Mapping[str, dict], status: Mapping[str, dict], folder: Path) -> None:
    """Raises ValueError if a notebook needs one that neither comes before it nor is done in `folder`. Given a
    `run_dir`, it reads another run."""
    there = {n for n, s in status.items() if s["state"] == "done" and (folder / n).is_dir()} - set(
        chosen
    )
    for notebook, parameters in chosen.items():
        missing = (
            [] if parameters.get("run_dir") else [n for n in needs_of(notebook) if n not in there]
        )
        if missing:
            raise ValueError(
                f"{notebook} needs {', '.join(missing)}, neither before it in this run nor done in "
                f"{folder}; run first: --only {missing[0]}"
            )
        there.add(notebook)


def fingerprints(chosen: Mapping[str, dict], status: Mapping[str, dict]) -> dict[str, str]:
    """What each notebook's results follow from, hashed: its cells, its parameters, `inputs`, and the
    fingerprints of what it needs.

    Those are `status`'s for what is not among `chosen`, for that is what lies there.
    """
    read, made = inputs(), {n: s.get("fingerprint") for n, s in status.items()}
    for notebook, parameters in chosen.items():
        cells = [
            (c.cell_type, c.source) for c in nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", 4).cells
        ]
        there = made
        if parameters.get("run_dir"):  # the results of another run
            there = {
                n: s.get("fingerprint")
                for n, s in read_status(NOTEBOOKS / parameters["run_dir"]).items()
            }
        needed = {n: there.get(n) for n in needs_of(notebook)}
        benchmark = NOTEBOOKS / str(parameters.get("benchmark", ""))
        needed["benchmark"] = (
            report.sha256(benchmark) if benchmark.is_file() else None
        )  # one of the user's own
        made[notebook] = hashlib.sha256(
            json.dumps([cells, parameters, read, needed], sort_keys=True).encode()
        ).hexdigest()
    return {n: made[n] for n in chosen}


def scrub(node, folder: Path):
    """No path of this machine, for runs are published: `folder` becomes ".", the repository and the home a
    name, however they are written: as they are, escaped as Python or JSON do it (papermill's parameters), or
    as in a web address. Pictures stay as they are."""
    if isinstance(node, dict):
        return {k: v if k.startswith("image/") else scrub(v, folder) for k, v in node.items()}
    if isinstance(node, list):
        return [scrub(v, folder) for v in node]
    if isinstance(node, str):
        for path, name in ((folder, "."), (ROOT, "flowopd-lab"), (Path.home(), "~")):
            if len(path.parts) > 1:  # a home of "/" is no home
                text = str(path)
                ways = {
                    text,
                    text.encode("unicode_escape").decode(),
                    json.dumps(text)[1:-1],
                    urllib.parse.quote(text),
                    html.escape(text),
                }
                for way in sorted(ways, key=len, reverse=True):
                    node = re.sub(re.escape(way) + r"(?![\w.-])", name, node)
    return node


def execute(name: str, parameters: dict, folder: Path, log=print) -> float:
    """Run one notebook into `folder` and return its seconds. Raises RuntimeError that shows the failing cell.

    The notebook must take `out_dir`, `folder/name` here, and writes its results there. Where it takes
    `run_dir` and is given none, that is
    `folder`, with the results of others. While it runs, its executed copy is saved every few seconds and
    `log` is told how far it is; widget state, paths and those lines are then dropped from the copy.
    """
    source, target, out = NOTEBOOKS / f"{name}.ipynb", folder / f"{name}.ipynb", folder / name
    out.mkdir(parents=True, exist_ok=True)
    places = {"out_dir": str(out)}
    if "run_dir" in parameters_of(source) and not parameters.get("run_dir"):
        places["run_dir"] = str(folder)
    began = time.time()
    try:
        papermill.execute_notebook(
            str(source),
            str(target),
            {**parameters, **places},
            cwd=str(NOTEBOOKS),
            progress_bar=False,
            log_output=False,
            stderr_file=Progress(log),
            autosave_cell_every=5,
            # it warns of TCP each time, and of its own end
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        )
    except PapermillExecutionError as error:
        raise RuntimeError(
            f"{name} failed in cell {error.exec_count}:\n\n{error.source}\n\n{error.ename}: {error.evalue}\n"
            f"(executed up to there: {target})"
        ) from error
    except NoSuchKernel as error:
        raise ValueError(
            f"{source.name} asks for the kernel {error.name!r}, which is not installed here; the notebooks "
            "of this project ask for python3"
        ) from error
    except RuntimeError as error:  # of nbclient: the kernel died
        raise RuntimeError(f"{name} was not executed to its end: {error}") from error
    finally:
        if target.exists():
            executed = nbformat.read(target, 4)
            executed.metadata.pop("widgets", None)
            for cell in executed.cells:
                forget_progress(cell.get("outputs", []))
            for key in ("input_path", "output_path"):
                executed.metadata.get("papermill", {}).pop(key, None)
            write_whole(target, nbformat.writes(nbformat.from_dict(scrub(executed, folder))) + "\n")
    return time.time() - began


def run_profile(
    name: str,
    only: str = "",
    overrides: Mapping | None = None,
    folder: Path | None = None,
    log=print,
    resume: bool = False,
    jobs: int = 1,
) -> Path:
    """Execute a profile's notebooks in order into `folder` (default `papermill_runs/NAME`), with
    `status.json`, `manifest.json`, `report.html`.

    Every parameter and every need is checked before the first notebook starts. `resume` leaves out what is
    done with the same fingerprint, and keeps the folder of what was cut off with the same, so that trainings
    go on in it. What lies there of anything else is moved into
    `folder/earlier/`, never removed. With `jobs`, so many notebooks run beside one another, each with its
    share of the cores and after what it needs. Raises FolderInUse while another run writes to the folder.
    """
    if jobs < 1:
        raise ValueError(
            f"jobs, the notebooks that run beside one another, must be at least 1, not {jobs}"
        )
    chosen = choose(name, only, overrides or {})
    folder = (folder or RUNS / name).resolve()
    if folder.is_file() or folder == NOTEBOOKS.resolve():
        raise ValueError(f"{folder} is no folder for a run")
    # before the folder is made
    check_needs(chosen, read_status(folder) if only or resume else {}, folder)
    with locked(folder, f"a run of the profile {name}"):
        return _run(name, only, chosen, folder, log, resume, jobs)


def _run(
    name: str, only: str, chosen: dict[str, dict], folder: Path, log, resume: bool, jobs: int
) -> Path:
    old = read_status(folder)
    kept = old if only or resume else {}
    earlier = [
        (n, s)
        for record in (read_status(RUNS / "reference"), read_status(RUNS / name), old)
        for n, s in record.items()
    ]
    # Seconds of other parameters, or of the rest of a notebook, say nothing.
    seconds = {
        n: s["seconds"]
        for n, s in earlier
        if s["state"] == "done" and s["parameters"] == chosen.get(n) and not s.get("resumed")
    }
    order = dict.fromkeys([n for n in load_profile(name) if n in chosen or n in kept] + list(kept))
    status = {
        n: kept[n] if n in kept and (resume or n not in chosen) else {"state": "waiting"}
        for n in order
    }

    def finished(notebook: str, fingerprint: str) -> bool:
        return (
            resume
            and status[notebook]["state"] == "done"
            and status[notebook].get("fingerprint") == fingerprint
            and (folder / notebook).is_dir()
            and (folder / f"{notebook}.ipynb").is_file()
        )

    commit, waiting, running = report.checkout(ROOT, folder), list(chosen), {}
    place = {notebook: f"[{i + 1}/{len(chosen)}] {notebook}" for i, notebook in enumerate(chosen)}

    def start(notebook: str, pool: ThreadPoolExecutor) -> None:
        now = fingerprints({n: chosen[n] for n in waiting}, status)
        waiting.remove(notebook)
        if finished(notebook, now[notebook]):
            log(f"{place[notebook]} is done and unchanged")
            return
        left = [n for n in now if not finished(n, now[n])]
        rest = (
            f" (about {report.duration(sum(seconds[n] for n in left) / jobs)} left)"
            if set(left) <= set(seconds)
            else ""
        )
        keep = (
            resume
            and status[notebook]["state"] != "done"
            and status[notebook].get("fingerprint") == now[notebook]
        )
        # First this, so that a kill in between leaves no checkpoints of something else under the new
        # fingerprint.
        aside = None if keep else set_aside(folder, folder / notebook, folder / f"{notebook}.ipynb")
        status[notebook] = {
            "state": "running",
            "parameters": chosen[notebook],
            "fingerprint": now[notebook],
            "git": commit,
            "machine": report.machine(),
            **({"resumed": True} if keep else {}),
        }
        write_json(folder / "status.json", status)
        moved = (
            f"; what was there is now in {aside}"
            + ("" if resume else ", --resume goes on with what is unchanged")
            if aside
            else ""
        )
        log(f"{place[notebook]} ...{rest}{moved}")
        running[
            pool.submit(
                execute,
                notebook,
                chosen[notebook],
                folder,
                log if jobs == 1 else lambda line: log(f"    {notebook[:2]} {line.strip()}"),
            )
        ] = notebook

    def ended(notebook: str, **how) -> None:
        status[notebook].update(how)
        write_json(folder / "status.json", status)

    try:
        with environment(folder, jobs), ThreadPoolExecutor(jobs) as pool:
            failed = None
            while running or (waiting and not failed):
                try:
                    while (
                        not failed
                        and len(running) < jobs
                        and (
                            ready := [
                                n
                                for n in waiting
                                if not {*needs_of(n)} & {*waiting, *running.values()}
                            ]
                        )
                    ):
                        start(ready[0], pool)
                    done = wait(running, return_when=FIRST_COMPLETED).done
                except BaseException as error:
                    stop_kernels()
                    wait(running)
                    for notebook in running.values():
                        ended(
                            notebook,
                            state="interrupted",
                            error=scrub(str(error), folder) or type(error).__name__,
                        )
                    raise
                for future in done:
                    notebook, error = running.pop(future), future.exception()
                    if error:
                        failed = failed or error
                        ended(
                            notebook,
                            state="failed",
                            error=scrub(str(error), folder) or type(error).__name__,
                        )
                    else:
                        ended(notebook, state="done", seconds=round(future.result(), 1))
                        log(
                            f"{place[notebook]} done in {report.duration(future.result())}: "
                            f"{folder / notebook}.ipynb"
                        )
            if failed:
                raise failed
    finally:
        read = {n: digest for n, digest in inputs().items() if not n.endswith(".py")}
        manifest = scrub(report.manifest(name, folder, status, read), folder)
        write_json(folder / "manifest.json", manifest)
        write_whole(folder / "report.html", report.page(manifest, folder))
    return folder
