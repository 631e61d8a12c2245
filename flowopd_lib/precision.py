"""In which precision a model is computed: by measurement, once, unless it is said.

bfloat16 is some four times faster than float32 on a CPU with matrix units for it (AMX), slower on
one without, and on older ones a hundred times slower.
"""

from __future__ import annotations

import json
import os
import time
from functools import cache
from pathlib import Path

import torch

from .files import write_json

NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VARIABLE, FILE = "FLOWOPD_PRECISION", "precision.json"
ROWS, WIDTH = 64, 512  # a product small enough that the slowest way we know takes .1 s


def resolve(dtype: str | torch.dtype, device: str | torch.device = "cpu") -> torch.dtype:
    """float32 or bfloat16: as it is said, by name or as torch's own; for "auto" what the
    environment says (`FLOWOPD_PRECISION`), else what is faster.

    Raises ValueError for another precision, or for bfloat16 on a GPU that cannot compute in it.
    """
    if dtype == "auto":
        dtype = os.environ.get(VARIABLE) or fastest(torch.device(device).type)
    found = NAMES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(
            f"the precision must be auto or one of {', '.join(NAMES)}, not "
            f"{str(dtype).removeprefix('torch.')}"
        )
    if (
        found == torch.bfloat16
        and torch.device(device).type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ValueError(
            f"{torch.cuda.get_device_name()} cannot compute in bfloat16; take auto or float32"
        )
    return found


@cache
def fastest(device: str = "cpu") -> str:
    """The faster of the two for a matrix product of the small backbone's width, timed once, under
    .3 s; on a GPU bfloat16, where it has that."""
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    seconds = {}
    for name, dtype in NAMES.items():
        a, b = (
            torch.ones(ROWS, WIDTH, dtype=dtype, device=device),
            torch.ones(WIDTH, WIDTH, dtype=dtype, device=device),
        )
        times = []
        for _ in range(5):
            began = time.perf_counter()
            (a @ b).sum().item()  # waits for the result, on any device
            times.append(time.perf_counter() - began)
            if sum(times) > 0.1:  # slow enough to know
                break
        seconds[name] = min(times)
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
    `resolve`'s, which is then kept there: a resume on another machine goes on in the same. Of
    several processes the first writes. Raises ValueError if it is said otherwise than it was
    begun."""
    file = Path(folder) / FILE
    kept = json.loads(file.read_text())["precision"] if file.is_file() else None
    if kept and str(dtype).removeprefix("torch.") not in ("auto", kept):
        raise ValueError(
            f"{folder} was begun in {kept}, not in {str(dtype).removeprefix('torch.')}; leave the precision "
            "out, or give a new folder"
        )
    found = resolve(kept or dtype, device)
    if write and not kept:
        write_json(
            file,
            {"precision": str(found).removeprefix("torch."), "device": torch.device(device).type},
        )
    return found
