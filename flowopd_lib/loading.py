"""Loading models: in which precision, from a folder or the Hugging Face hub, and why it failed.

bfloat16 is some four times faster than float32 on a CPU with matrix units for it (AMX), slower on
one without, and on older ones a hundred times slower. So it is measured, once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import timeit
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from .files import write_json

# --- precision

NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VARIABLE, FILE = "FLOWOPD_PRECISION", "precision.json"
DEVICE = "FLOWOPD_DEVICE"
ROWS, WIDTH = 64, 512  # a product small enough that the slowest way we know takes .1 s


def choose_device(device: str | torch.device = "") -> torch.device:
    """`device`, else what the environment says (`FLOWOPD_DEVICE`), else a GPU where there is one.
    Raises ValueError for a GPU that is not there."""
    there = torch.cuda.is_available()
    chosen = torch.device(device or os.environ.get(DEVICE) or ("cuda" if there else "cpu"))
    if chosen.type == "cuda" and not there:
        raise ValueError(
            f"the device is to be {chosen}, but torch sees no GPU on this machine; use cpu, or a "
            "launcher that needs no GPU"
        )
    return chosen


def dtype_name(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def resolve(dtype: str | torch.dtype, device: str | torch.device = "cpu") -> torch.dtype:
    """float32 or bfloat16, by name or as torch's own; for "auto" what the environment says
    (`FLOWOPD_PRECISION`), else what is faster. Raises ValueError for another precision."""
    if dtype == "auto":
        dtype = os.environ.get(VARIABLE) or fastest(torch.device(device).type)
    if (name := dtype_name(dtype)) not in NAMES:
        raise ValueError(f"the precision must be auto or one of {', '.join(NAMES)}, not {name}")
    return NAMES[name]


@cache
def fastest(device: str = "cpu") -> str:
    """The faster of the two for a matrix product of the small backbone's width, timed once, under
    .6 s; on a GPU bfloat16, where it has that."""
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    seconds = {}
    for name, dtype in NAMES.items():
        a = torch.ones(ROWS, WIDTH, dtype=dtype, device=device)
        b = torch.ones(WIDTH, WIDTH, dtype=dtype, device=device)
        # .item() waits for the result, on any device
        seconds[name] = min(timeit.repeat(lambda: (a @ b).sum().item(), number=1, repeat=5))
    return min(seconds, key=seconds.get)


def in_fast_precision() -> torch.autocast:
    """Autocast on the CPU to bfloat16, where that is the faster."""
    return torch.autocast("cpu", torch.bfloat16, enabled=resolve("auto") == torch.bfloat16)


def decide(
    folder: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    write: bool = True,
) -> torch.dtype:
    """The precision of all that is computed into a folder: what `precision.json` there says, else
    `resolve`'s, which is then written there: a resume on another machine goes on in the same.
    Raises ValueError for another precision than the folder's."""
    file = Path(folder) / FILE
    recorded = json.loads(file.read_text())["precision"] if file.is_file() else None
    if recorded and dtype_name(dtype) not in ("auto", recorded):
        raise ValueError(
            f"{folder} was started in {recorded}, not in {dtype_name(dtype)}; leave the precision "
            "out, or give a new folder"
        )
    decided = resolve(recorded or dtype, device)
    if write and not recorded:
        record = {"precision": dtype_name(decided), "device": torch.device(device).type}
        write_json(file, record)
    return decided


# --- the hub

# Loading a model changes states of the whole process, such as the device of new tensors.
LOADING = threading.RLock()
# What to do, by what the hub's clients write.
OFFLINE = "connecterror|connecttimeout|localentrynotfound|offlinemode|cannot load|couldn't connect"
ADVICE = {
    "gatedrepo|gated repo": "is gated: accept its licence on its page, then `hf auth login`",
    "repositorynotfound|not a valid model": "is not on the hub, or private: try `hf auth login`",
    OFFLINE: "is not on this machine and the hub cannot be reached: connect, or give a folder",
}


def hub_fault(name: str, error: BaseException) -> str:
    """Why `name` could not be loaded, and what to do; the error's own message where it is none of
    the hub's."""
    causes = "".join(traceback.format_exception(error, limit=0)).lower()
    advice = next((text for signs, text in ADVICE.items() if re.search(signs, causes)), None)
    return f"{name} {advice}" if advice else " ".join(str(error).split())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bar for each file loaded and no advice about torchvision, which is not used here:
    notebooks and logs are for results. One thread at a time.

    Wherever a model is loaded, diffusers, transformers and PEFT are imported by the function that
    needs them: importing them takes longer than everything else."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    with LOADING, contextlib.ExitStack() as restore:
        for library in (diffusers_logging, transformers_logging):
            restore.callback(library.set_verbosity, library.get_verbosity())
            if library.is_progress_bar_enabled():
                restore.callback(library.enable_progress_bar)
            library.set_verbosity_error()
            library.disable_progress_bar()
        yield
