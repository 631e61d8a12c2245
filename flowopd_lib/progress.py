"""How far a long computation is: a bar in JupyterLab or a terminal; headless, a line every few
seconds with the time that is left."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

from tqdm.auto import tqdm

# What a headless line begins with; the runner shows such lines and leaves them out of the finished
# copy.
MARK = "progress: "
EVERY = 5.0  # seconds


@contextlib.contextmanager
def progress(total: float, what: str, shown: bool = True) -> Iterator[Callable[[float], None]]:
    """Give a function to be told of every part that is done, in the units of `total`."""
    if not shown or not os.environ.get("FLOWOPD_HEADLESS"):
        with tqdm(
            total=total,
            desc=what,
            disable=not shown,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} < {remaining}",
        ) as bar:
            yield bar.update
        return
    began = said = time.monotonic()
    done = 0.0

    def advance(n: float = 1.0) -> None:
        nonlocal done, said
        done, now = done + n, time.monotonic()
        if now - said >= EVERY and done < total:
            said = now
            print(
                f"{MARK}{what} {done / total:.0%}, about {(now - began) * (total - done) / done:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    yield advance
