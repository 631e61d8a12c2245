"""How quickly the gallery answers: `python -m flowopd_lib.bench.gallery [--samples 5000]`.

Made-up samples, 64x64, five models; milliseconds of a page change and of each kind of filter change,
selection, reading and writing of the tiles included, without the browser's own time. The aim is 200 ms.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ..plots.gallery import TEACHER, Samples
from ..plots.widgets import SampleGallery
from ..thumbnails import webp, write_thumbnails

MODELS = ("base", "geneval expert", "ocr expert", "merged", "student")


def made_up_samples(folder: str | Path, n: int, seed: int = 0) -> Samples:
    """`n` samples of noise with random scores, and their thumbnails in `folder`."""
    rng, tables = np.random.default_rng(seed), []
    count = n // len(MODELS)
    prompts = [
        f'a sign that says "{i:04d}"' if i % 3 == 0 else f"a photo of {i} red stars"
        for i in range(count)
    ]
    for number, model in enumerate(MODELS):
        pictures = torch.from_numpy(rng.random((count, 3, 64, 64), np.float32))
        tables.append(
            pd.DataFrame(
                {
                    "model": model,
                    "task": np.where(np.arange(count) % 3 == 0, "ocr", "geneval"),
                    "tag": np.where(np.arange(count) % 3 == 0, "ocr", "counting"),
                    "prompt": prompts,
                    "seed": np.arange(count),
                    "picture": write_thumbnails(
                        Path(folder) / "pictures", number, model, [webp(p) for p in pictures]
                    ),
                    "GenEval": np.where(
                        np.arange(count) % 3 == 0, np.nan, rng.integers(0, 2, count)
                    ),
                    "OCR": np.where(np.arange(count) % 3 == 0, rng.random(count), np.nan),
                    "PickScore": rng.normal(11, 3, count),
                    "DeQA": rng.uniform(1, 5, count),
                }
            )
        )
    return Samples(pd.concat(tables, ignore_index=True), folder)


def measure(samples: Samples, repeats: int = 10) -> pd.DataFrame:
    """Milliseconds of each change of a gallery with all models as columns: median and largest of
    `repeats`."""
    gallery = SampleGallery(samples, samples.models)
    words, tags = ["sign", "stars 1", "", "red 7", "99"], list(dict.fromkeys(samples.tag))
    changes = {
        "page": lambda i: gallery.forth.click(),
        "search": lambda i: setattr(gallery.search, "value", words[i % len(words)]),
        "tag": lambda i: setattr(gallery.tag, "value", ["", *tags][i % (len(tags) + 1)]),
        "sort by a score": lambda i: setattr(
            gallery.sort, "value", samples.rewards[i % len(samples.rewards)]
        ),
        "sort by disagreement": lambda i: setattr(
            gallery.against, "value", ["", TEACHER, "base"][i % 3]
        ),
        "range": lambda i: (
            setattr(gallery.reward, "value", "DeQA"),
            setattr(gallery.range, "value", (2.0, 3.0 + i / 10)),
        ),
        "same noise off and on": lambda i: setattr(gallery.locked, "value", bool(i % 2)),
    }
    rows = []
    for name, change in changes.items():
        spent = []
        for i in range(repeats):
            began = time.perf_counter()
            change(i + 1)
            spent.append((time.perf_counter() - began) * 1e3)
        if gallery.guard.box.value:
            raise RuntimeError(f"{name}: {gallery.guard.box.value}")
        rows.append({"change": name, "median ms": np.median(spent), "largest ms": max(spent)})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=5000, help="how many samples to make up")
    with tempfile.TemporaryDirectory() as place:
        print(
            measure(made_up_samples(place, parser.parse_args().samples))
            .round(1)
            .to_string(index=False)
        )
