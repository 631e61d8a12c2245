"""Files and folders of runs: written whole or not at all, read with the types they were written
with, filled by one process at a time. Checkpoints, thumbnails, progress bars."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from psutil import pid_exists
from pydantic import TypeAdapter

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parent.parent  # of the checkout
RUNS = ROOT / "papermill_runs"
WAIT = 5.0  # seconds for a process that is just ending, such as the kernel of a killed run


class FolderInUse(RuntimeError):
    """Another process is writing to the folder."""


# --- writing


def write_whole(path: str | Path, data: bytes | str) -> None:
    """Write a file so that a kill or a full disk leaves the old one or the new one, whole; clear
    what dead writers of it left.

    Raises OSError, naming the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f".{path.name}.{platform.node()}"
    for left in path.parent.glob(f"{own}.*.partial"):
        if not pid_exists(int(left.name.split(".")[-2])):
            left.unlink(missing_ok=True)
    partial = path.with_name(f"{own}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name with nothing in it
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        error.filename = str(path)
        raise


def append_lines(path: str | Path, lines: str) -> None:
    """Add whole lines to a file of lines: all of them or, where the disk is full, none. Half a line
    that a kill left is cut off first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - (1 << 20)))
        tail = file.read()
        end -= len(tail) - (tail.rfind(b"\n") + 1)
        file.truncate(end)
        try:
            file.write(lines.encode())
            file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(end)
            error.filename = str(path)
            raise


def read_lines(path: str | Path) -> pd.DataFrame:
    """A file of JSON lines, which another may be writing to: its whole lines, a row each; empty
    where there is none.

    A number is what it was written as: `2.0` stays a float, where pandas' own reader makes it an
    integer if all others are whole too.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    return pd.DataFrame([json.loads(line) for line in whole.splitlines() if line.strip()])


def write_json(path: str | Path, record: Any) -> None:
    """Write a record as JSON, whole or not at all: numbers, lists and strings for numpy's and
    pandas' kinds, null for what is not finite, a string for what JSON does not have."""

    def plain(node: Any) -> Any:
        if isinstance(node, pd.DataFrame):
            return node.to_dict("records")
        if isinstance(node, (np.generic, np.ndarray, pd.Series, pd.Index)):
            return node.tolist()
        return None if node is pd.NA else str(node)

    record = TypeAdapter(Any).dump_python(record, mode="json", fallback=plain)
    write_whole(path, json.dumps(record, indent=1) + "\n")


def write_table(path: str | Path, table: pd.DataFrame) -> None:
    """Write a table as parquet, whole or not at all."""
    file = io.BytesIO()
    table.to_parquet(file)
    write_whole(path, file.getvalue())


# --- folders


@contextlib.contextmanager
def locked(folder: str | Path, what: str) -> Iterator[None]:
    """Keep other processes from writing to a folder. The lock is the operating system's and goes
    with its process, however that ends.

    Raises FolderInUse, naming the other process, if it does not end within `WAIT` seconds.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / ".lock", timeout=WAIT), folder / ".owner"
    try:
        lock.acquire()
    except Timeout as error:
        who = owner.read_text() if owner.is_file() else "another process"
        message = f"{folder} is in use by {who}; wait for it, stop it, or give another folder"
        raise FolderInUse(message) from error
    try:
        about = f"{what}, since {datetime.now():%Y-%m-%d %H:%M:%S} on {platform.node()}"
        write_whole(owner, f"process {os.getpid()} ({about}: {' '.join(sys.argv)})")
        yield
    finally:
        # the lock is what counts, and what went wrong before is the error to raise
        with contextlib.suppress(OSError):
            owner.unlink(missing_ok=True)
        lock.release()


def set_aside(folder: Path, *paths: Path) -> None:
    """Move what there is of `paths` into a new folder `folder/earlier/TIME`."""
    there = [p for p in paths if p.exists()]
    if there:
        aside = folder / "earlier" / f"{datetime.now():%Y-%m-%d_%H-%M-%S_%f}"
        aside.mkdir(parents=True)
        for path in there:
            os.replace(path, aside / path.name)


# --- checkpoints, without pickle: a nested state is one safetensors file


def save_state(path: str | Path, state: Any) -> None:
    """Write nested dicts and lists of tensors and JSON values; a kill leaves the old file or the
    new one, whole."""
    import torch
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}

    def strip(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            key = f"t{len(tensors)}"
            tensors[key] = node.detach().cpu().contiguous().clone()
            return {"__tensor__": key}
        if isinstance(node, dict):  # pairs keep the integer keys of optimizers
            return {"__dict__": [[k, strip(v)] for k, v in node.items()]}
        return [strip(v) for v in node] if isinstance(node, (list, tuple)) else node

    skeleton = json.dumps(strip(state))
    write_whole(path, save(tensors, {"skeleton": skeleton}))


def load_state(path: str | Path) -> Any:
    """Read what `save_state` wrote. Raises ValueError, naming the file, if it is not such a
    file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            skeleton = json.loads(file.metadata()["skeleton"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, KeyError, TypeError) as error:
        message = f"{path} is not a checkpoint of this library ({error}); delete it to start over"
        raise ValueError(message) from error

    def fill(node: Any) -> Any:
        if isinstance(node, list):
            return [fill(v) for v in node]
        if not isinstance(node, dict):
            return node
        key = node.get("__tensor__")
        return tensors[key] if key else {k: fill(v) for k, v in node["__dict__"]}

    return fill(skeleton)


# --- samples as thumbnails: one uncompressed zip of WebP files a model, so that a run of thousands
# stays a handful of files

LARGEST = 256  # pixels at a side; larger samples are scaled down
QUALITY = 85  # a 64x64 scene takes some 600 bytes, a fifth of what lossless takes


def encode_webp(image: torch.Tensor) -> bytes:
    """One image (3, H, W) in [0, 1]."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    thumbnail, file = Image.fromarray(pixels), io.BytesIO()
    thumbnail.thumbnail((LARGEST, LARGEST))
    thumbnail.save(file, "webp", quality=QUALITY)
    return file.getvalue()


def write_thumbnails(
    folder: str | Path, number: int, model: str, thumbnails: Sequence[bytes]
) -> list[str]:
    """Write `folder/NUMBER_MODEL.zip` of `0.webp`, `1.webp`, ...; the path of each, seen from the
    folder's parent."""
    path = Path(folder) / f"{number:02d}_{re.sub(r'[^A-Za-z0-9.+-]', '_', model)}.zip"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for n, data in enumerate(thumbnails):  # a fixed date: the same samples make the same file
            archive.writestr(zipfile.ZipInfo(f"{n}.webp", (1980, 1, 1, 0, 0, 0)), data)
    write_whole(path, file.getvalue())
    return [f"{path.parent.name}/{path.name}/{n}.webp" for n in range(len(thumbnails))]


def read_thumbnail(folder: str | Path, image: str) -> bytes:
    """The WebP of one `image` of a table in `folder`. Raises FileNotFoundError, naming the file,
    where there is none."""
    archive, _, name = image.rpartition("/")
    try:
        with zipfile.ZipFile(Path(folder) / archive) as file:
            return file.read(name)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise FileNotFoundError(f"no image {image} in {folder} ({error})") from error


# --- progress

# How a headless line begins; the runner shows such lines and removes them from the executed copy.
MARK = "progress: "
INTERVAL = 5.0  # seconds


@contextlib.contextmanager
def progress(total: float, what: str, shown: bool = True) -> Iterator[Callable[[float], None]]:
    """A function to call with every amount that is done, in the units of `total`: a bar in
    JupyterLab or a terminal; headless a line every few seconds with the time that is left."""
    if not shown or not os.environ.get("FLOWOPD_HEADLESS"):
        from tqdm.auto import tqdm

        bar_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} < {remaining}"
        with tqdm(total=total, desc=what, disable=not shown, bar_format=bar_format) as bar:
            yield bar.update
        return
    start = last_line = time.monotonic()
    done = 0.0

    def advance(n: float = 1.0) -> None:
        nonlocal done, last_line
        done, now = done + n, time.monotonic()
        if now - last_line >= INTERVAL and done < total:
            last_line, seconds = now, (now - start) * (total - done) / done
            line = f"{MARK}{what} {done / total:.0%}, about {seconds:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    yield advance
