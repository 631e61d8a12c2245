"""How fast the gallery of samples responds: selecting, reading and writing thumbnails and HTML,
without the browser's own time. The aim is 200 ms for every change."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ..thumbnails import encode_webp, write_thumbnails
from ..widgets.gallery import TEACHER, SampleGallery, Samples

MODELS = ("base", "geneval expert", "ocr expert", "merged", "student")


def random_samples(folder: str | Path, n: int, seed: int = 0) -> Samples:
    """`n` samples of noise, 64x64, with random scores of five models, their thumbnails in
    `folder`."""
    rng, g = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    numbers, tables = np.arange(n // len(MODELS)), []
    task = np.where(numbers % 3 == 0, "ocr", "geneval")
    prompts = [f"a photo of {i} red {'signs' if i % 3 == 0 else 'stars'}" for i in numbers]
    shared = pd.DataFrame({"task": task, "tag": task, "prompt": prompts, "seed": numbers})
    for number, model in enumerate(MODELS):
        images = [encode_webp(torch.rand(3, 64, 64, generator=g)) for _ in numbers]
        table = shared.assign(
            model=model,
            image=write_thumbnails(Path(folder) / "images", number, model, images),
            OCR=np.where(task == "ocr", rng.random(len(numbers)), np.nan),
            DeQA=rng.uniform(1, 5, len(numbers)),
        )
        tables.append(table)
    return Samples(pd.concat(tables, ignore_index=True), folder)


def measure_gallery(samples: Samples, repeats: int = 10) -> list[dict[str, float]]:
    """Milliseconds, median and largest of `repeats`, of a page change and of a change of each
    control (by the names of `Query`'s fields), with all models as columns."""
    gallery = SampleGallery(samples, samples.models)
    values = {
        "search": ["signs", "stars 1", "", "red", "99"],
        "tag": ["", *samples.rows["tag"].unique()],
        "sort": samples.rewards,
        "minus": ["", TEACHER, "base"],
        "range_of": ["DeQA", ""],
        "same_noise": [False, True],
    }
    rows = []
    for change in ("page", *values):
        times = []
        for i in range(repeats):
            start = time.perf_counter()
            if change == "page":
                gallery.next.click()
            else:
                gallery.controls[change].value = values[change][i % len(values[change])]
            times.append(1e3 * (time.perf_counter() - start))
        if gallery.guard.box.value:
            raise RuntimeError(f"the gallery failed at {change}: {gallery.guard.box.value}")
        median = float(np.median(times))
        rows.append({"change": change, "median_ms": median, "max_ms": max(times)})
    return rows
