"""Progress of a long computation: a bar in JupyterLab or a terminal; headless, a line every few
seconds with the time that is left."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

from tqdm.auto import tqdm

# How a headless line begins; the runner shows such lines and removes them from the executed copy.
MARK = "progress: "
INTERVAL = 5.0  # seconds


@contextlib.contextmanager
def progress(total: float, what: str, shown: bool = True) -> Iterator[Callable[[float], None]]:
    """A function to call with every amount that is done, in the units of `total`."""
    if not shown or not os.environ.get("FLOWOPD_HEADLESS"):
        with tqdm(
            total=total,
            desc=what,
            disable=not shown,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} < {remaining}",
        ) as bar:
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
