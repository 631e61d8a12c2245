"""From models and prompts to one tidy table of scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import torch

from .files import write_json
from .identity import describe, sha256_of
from .parts import Parts
from .policy import FlowPolicy
from .progress import progress as told
from .prompts import Prompt
from .rewards import Reward
from .rollout import Sampler, sample
from .stats import model_scores
from .thumbnails import webp, write_thumbnails

JUDGES = ("GenEval", "OCR", "PickScore", "DeQA")
# Which judges can judge a task's prompts: the others need something the prompt does not have.
JUDGES_OF_TASK = {
    "geneval": ("GenEval", "PickScore", "DeQA"),
    "ocr": ("OCR", "PickScore", "DeQA"),
    "pickscore": ("PickScore", "DeQA"),
    "deqa": ("PickScore", "DeQA"),
}


def _check_judges(judges: Iterable[str]) -> None:
    unknown = set(judges) - {name for names in JUDGES_OF_TASK.values() for name in names}
    if unknown:
        raise ValueError(f"no task has a judge called {', '.join(sorted(unknown))}; see JUDGES_OF_TASK")


def score(images, prompts: Sequence[Prompt], judges: Mapping[str, Reward]) -> pd.DataFrame:
    """One row an image: task, tag, prompt and a column per judge, NaN where a judge does not apply."""
    _check_judges(judges)
    table = pd.DataFrame(
        {
            "task": [p.task for p in prompts],
            "tag": [p.tag for p in prompts],
            "prompt": [p.text for p in prompts],
        }
    )
    for name, judge in judges.items():
        rows = [i for i, p in enumerate(prompts) if name in JUDGES_OF_TASK[p.task]]
        table[name] = np.nan
        if rows:
            table.loc[rows, name] = judge(images[rows], [prompts[i] for i in rows])
    return table


def evaluate(
    policy: FlowPolicy,
    prompts: Sequence[Prompt],
    judges: Mapping[str, Reward],
    seed: int = 0,
    sampler: Sampler = Sampler(),
    models: Mapping[str, str | None] = MappingProxyType({"base": None}),
    repeats: int = 1,
    embed: Callable[[torch.Tensor], np.ndarray] | None = None,
    batch: int = 64,
    progress: bool = True,
    pictures: str | Path | None = None,
    into: str | Path | None = None,
) -> pd.DataFrame:
    """Sample every prompt `repeats` times under every model and score it: one row an image.

    `models` maps a name to an adapter (None: the base). Image j of prompt i has seed `seed + j * len(prompts)
    + i` under every model: the same noise, so that models can be compared prompt by prompt. Columns: model,
    task, tag, prompt, repeat, seed, one per judge, and `embedding` if `embed` (images to (B, D), such as
    `PickScore.embed`) is given.

    With `pictures`, a folder, every sample is kept there as a thumbnail and `picture` says where, seen from
    the folder's parent, where the table belongs;
    `about.json` beside them says how they were drawn (see `gallery`).

    With `into`, a parquet file, the table is kept there, and while it grows its finished batches beside it:
    the same call goes on where it was cut off, and only reads what is whole. Where the models, prompts,
    judges or settings are others, what lies there is moved into `earlier/`.
    """
    if not len(prompts):
        raise ValueError("nothing to evaluate: the list of prompts is empty")
    if seed < 0 or repeats < 1 or batch < 1:
        raise ValueError(
            f"seed must be at least 0, repeats and batch at least 1, not {seed}, {repeats} and {batch}"
        )
    _check_judges(judges)
    policy.check_adapters(a for a in models.values() if a is not None)
    policy.check_prompts(prompts)
    parts = None
    if into is not None:
        of = {
            "sampler": sampler,
            "seed": seed,
            "batch size": batch,
            "repeats": repeats,
            "precision": policy.dtype,
            "base": policy.base_hash,
            "models": {m: a and policy.adapter(a).sha256 for m, a in models.items()},
            "prompts": list(prompts),
            "judges": judges,
            "embedded": embed is not None,
            "pictures": pictures is not None,
        }
        parts = Parts(Path(into), sha256_of(describe(of)))
        if parts.whole:
            return parts.table()
    every, tables = list(prompts) * repeats, []
    if pictures is not None:
        write_json(
            Path(pictures) / "about.json",
            {
                "sampler": asdict(sampler),
                "batch": batch,
                "dtype": str(policy.dtype),
                "adapters": dict(models),
            },
        )
    with told(
        len(models) * len(every), f"evaluate {len(models)} models on {len(every)} prompts", progress
    ) as advance:
        for number, (model, adapter) in enumerate(models.items()):
            done = []
            for i in range(0, len(every), batch):
                part = every[i : i + batch]
                rows = parts.get(number, i) if parts else None
                if rows is None:
                    seeds = list(range(seed + i, seed + i + len(part)))
                    images = sample(policy, part, seeds, sampler, adapter, batch)
                    repeat = [j // len(prompts) for j in range(i, i + len(part))]
                    rows = score(images, part, judges).assign(model=model, repeat=repeat, seed=seeds)
                    if pictures is not None:
                        rows["thumbnail"] = [webp(image) for image in images]
                    if embed is not None:
                        rows["embedding"] = list(embed(images))
                    if parts:
                        rows = parts.put(number, i, rows)
                done.append(rows)
                advance(len(part))
            rows = pd.concat(done, ignore_index=True)
            if pictures is not None:
                places = write_thumbnails(pictures, number, model, rows.pop("thumbnail"))
                rows.insert(rows.columns.get_loc("seed") + 1, "picture", places)
            tables.append(rows)
    table = pd.concat(tables, ignore_index=True)
    return parts.finish(table) if parts else table


def probe_of(
    policy: FlowPolicy,
    prompts: Sequence[Prompt],
    judges: Mapping[str, Reward],
    sampler: Sampler,
    seed: int = 1 << 20,
) -> Callable[[str], pd.DataFrame]:
    """For `fit`: what tells an adapter's `model_scores` on these prompts, with the same noise every time and
    none of the test's."""
    return lambda adapter: model_scores(
        evaluate(policy, prompts, judges, seed, sampler, {adapter: adapter}, progress=False)
    )
