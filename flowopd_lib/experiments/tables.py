"""Jobs that leave one table: computed once, resumed after a stop, shared by several processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..benchmarks import DEFAULT
from ..checkpoint import load_state, save_state
from ..config import Config, Seed
from ..evaluate import read_fingerprint, write_with_fingerprint
from ..files import set_aside
from ..fingerprint import describe, sha256_of_json
from ..lab.recipe import Source
from ..lab.workspace import Workspace
from ..losses import Shard
from ..progress import progress


class TableJob(Config):
    """`adapter`: the one that is examined, an expert of the benchmark or one of `adapters` (name ->
    source). `file`: of the table, in the job's folder."""

    benchmark: str = DEFAULT
    adapters: dict[str, Source] = {}
    adapter: str
    seed: Seed = 0
    file: str


def run_table_job(
    config: TableJob,
    folder: Path,
    workspace: Workspace,
    adapters: Iterable[str],
    compute: Callable[[Path], pd.DataFrame],
) -> None:
    """Write `compute(partial)` to `folder/file`, where `partial` is a folder for partial results.

    Nothing is computed where the table is there already and follows from the same configuration,
    model and adapters (`adapters`: those used besides `config.adapter`); a table of something else
    is moved into `earlier/`.
    """
    policy, shard, path = workspace.policy, workspace.shard, folder / config.file
    names = sorted({config.adapter, *adapters})
    workspace.load_adapters(names, config.adapters)
    benchmark = workspace.benchmark.config.model_dump(
        mode="json", include={"tasks", "rewards", "sampling"}, fallback=describe
    )
    follows_from = {
        "config": config.model_dump(mode="json", exclude={"benchmark", "adapters"}),
        "adapters": {name: policy.adapter(name).sha256 for name in names},
        "base": policy.base_hash,
        "precision": policy.precision,
        "benchmark": benchmark,
    }
    fingerprint = sha256_of_json(follows_from)
    finished = path.is_file() and read_fingerprint(path) == fingerprint
    shard.wait()  # all processes have checked before the first one moves anything
    if finished:
        return
    if workspace.main:
        set_aside(folder, path)
    partial = folder / f".{path.stem}_{fingerprint[:12]}"
    table = compute(partial)
    policy.train_adapter(None)
    shard.wait()
    if workspace.main:
        write_with_fingerprint(path, fingerprint, table)
        shutil.rmtree(partial, ignore_errors=True)
    shard.wait()


def compute_shared(
    keys: Sequence[tuple],
    compute: Callable[..., Any],
    folder: Path,
    shard: Shard = Shard(),
    what: str = "gradients",
    show_progress: bool = True,
) -> dict[tuple, Any]:
    """`compute(*key)` (tensors and JSON values) for every key. Each result is saved in `folder`
    when it is there, so a second call resumes; several processes share the keys."""
    files = {key: folder / f"{'_'.join(map(str, key))}.safetensors" for key in keys}
    mine = keys[shard.rank :: shard.processes]
    with progress(len(mine), what, show_progress and shard.rank == 0) as advance:
        for key in mine:
            if not files[key].is_file():
                save_state(files[key], compute(*key))
            advance(1)
    shard.wait()
    return {key: load_state(file) for key, file in files.items()}
