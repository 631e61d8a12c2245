"""An evaluation that can be cut off: its finished batches beside the table they become."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet

from .files import set_aside, write_table, write_whole


class Parts:
    """The finished batches of an evaluation beside the table they become, and what they are `of` (a hash).
    Of several processes `main` is the one that clears what lies there of something else."""

    def __init__(self, path: Path, of: str, main: bool = True):
        self.path, self.folder, self.of = path, path.parent / f".{path.name}.parts", of
        if not main:
            return
        about = self.folder / "of.txt"
        if (
            self.path.is_file()
            and read_of(self.path) != of
            or self.folder.is_dir()
            and (about.read_text() if about.is_file() else "") != of
        ):
            set_aside(path.parent, self.path, self.folder)
        if self.whole:
            # of a process that ended between the table and this
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            write_whole(about, of)

    @property
    def whole(self) -> bool:
        return self.path.is_file()

    def get(self, model: int, start: int) -> pd.DataFrame | None:
        file = self.folder / f"{model}_{start}.parquet"
        return pd.read_parquet(file) if file.is_file() else None

    def put(self, model: int, start: int, rows: pd.DataFrame) -> pd.DataFrame:
        """Keep a batch; it as it will be read again."""
        write_table(self.folder / f"{model}_{start}.parquet", rows)
        return self.get(model, start)

    def finish(self, table: pd.DataFrame) -> pd.DataFrame:
        keep(self.path, self.of, table)
        shutil.rmtree(self.folder)  # all of it is in the table, and in the thumbnails' files
        return self.table()

    def table(self) -> pd.DataFrame:
        table = pd.read_parquet(self.path)
        table.attrs.clear()  # a table made of this one is of something else
        return table


def read_of(path: Path) -> str | None:
    """What a table was made of, as `keep` wrote it."""
    about = (pyarrow.parquet.read_schema(path).metadata or {}).get(b"PANDAS_ATTRS", b"{}")
    return json.loads(about).get("of")


def keep(path: Path, of: str, table: pd.DataFrame) -> None:
    """Write a table with what it was made of."""
    table.attrs["of"] = of
    write_table(path, table)
