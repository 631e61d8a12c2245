"""From models and prompts to one tidy table of scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import torch

from .files import write_json
from .identity import describe, sha256_of
from .objectives import Share
from .parts import Parts
from .policy import FlowPolicy
from .progress import progress as told
from .prompts import Prompt
from .rewards import Reward, can_reward
from .rollout import Sampler, sample
from .stats import AVERAGE, Home, model_scores
from .thumbnails import webp, write_thumbnails


def score(images, prompts: Sequence[Prompt], rewards: Mapping[str, Reward]) -> pd.DataFrame:
    """One row an image: task, tag, prompt and a column per reward, NaN where a reward does not apply."""
    table = pd.DataFrame(
        {
            "task": [p.task for p in prompts],
            "tag": [p.tag for p in prompts],
            "prompt": [p.text for p in prompts],
        }
    )
    for name, reward in rewards.items():
        rows = [i for i, p in enumerate(prompts) if can_reward(reward, p)]
        table[name] = np.nan
        if rows:
            table.loc[rows, name] = reward(images[rows], [prompts[i] for i in rows])
    return table


def evaluate(
    policy: FlowPolicy,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    seed: int = 0,
    sampler: Sampler = Sampler(),
    models: Mapping[str, str | None] = MappingProxyType({"base": None}),
    repeats: int = 1,
    embed: Callable[[torch.Tensor], np.ndarray] | None = None,
    batch: int = 64,
    progress: bool = True,
    pictures: str | Path | None = None,
    into: str | Path | None = None,
    guidance: Mapping[str, float] = MappingProxyType({}),
    share: Share = Share(),
) -> pd.DataFrame:
    """Sample every prompt `repeats` times under every model and score it: one row an image.

    `models` maps a name to an adapter (None: the base). Image j of prompt i has seed `seed + j * len(prompts)
    + i` under every model: the same noise, so that models can be compared prompt by prompt. Columns: model,
    task, tag, prompt, repeat, seed, one per reward, and `embedding` if `embed` (images to (B, D), such as
    `PickScore.embed`) is given. `guidance`: of an adapter, where it is not the sampler's.

    With `pictures`, a folder, every sample is kept there as a thumbnail and `picture` says where, seen from
    the folder's parent, where the table belongs;
    `about.json` beside them says how they were drawn (see `gallery`).

    With `into`, a parquet file, the table is kept there, and while it grows its finished batches beside it:
    the same call goes on where it was cut off, and only reads what is whole. Where the models, prompts,
    rewards or settings are others, what lies there is moved into `earlier/`.

    Several processes (`share`) deal the batches out among themselves by way of `into`, which all must see;
    which samples are one batch does not depend on how many there are.
    """
    if not len(prompts):
        raise ValueError("nothing to evaluate: the list of prompts is empty")
    if seed < 0 or repeats < 1 or batch < 1:
        raise ValueError(
            f"seed must be at least 0, repeats and batch at least 1, not {seed}, {repeats} and {batch}"
        )
    if share.processes > 1 and into is None:
        raise ValueError("several processes share an evaluation by way of a file: give into")
    policy.check_adapters(a for a in models.values() if a is not None)
    policy.check_prompts(prompts)
    main, parts = share.rank == 0, None
    if into is not None:
        of = {
            "sampler": sampler,
            "seed": seed,
            "batch size": batch,
            "repeats": repeats,
            "precision": policy.dtype,
            "base": policy.base_hash,
            "models": {m: a and policy.adapter(a).sha256 for m, a in models.items()},
            "guidance": {a: g for a, g in guidance.items() if a in models.values()},
            "prompts": list(prompts),
            "rewards": rewards,
            "embedded": embed is not None,
            "pictures": pictures is not None,
        }
        parts = Parts(Path(into), sha256_of(describe(of)), main)
        share.wait()
        if parts.whole:
            return parts.table()
    every = list(prompts) * repeats
    if pictures is not None and main:
        write_json(
            Path(pictures) / "about.json",
            {
                "sampler": asdict(sampler),
                "batch": batch,
                "dtype": str(policy.dtype),
                "adapters": dict(models),
                "guidance": dict(guidance),
            },
        )

    def drawn(adapter: str | None, i: int) -> pd.DataFrame:
        """The batch that begins at sample i."""
        part = every[i : i + batch]
        seeds = list(range(seed + i, seed + i + len(part)))
        own = replace(sampler, guidance=guidance.get(adapter, sampler.guidance))
        images = sample(policy, part, seeds, own, adapter, batch)
        repeat = [j // len(prompts) for j in range(i, i + len(part))]
        rows = score(images, part, rewards).assign(repeat=repeat, seed=seeds)
        if pictures is not None:
            rows["thumbnail"] = [webp(image) for image in images]
        if embed is not None:
            rows["embedding"] = list(embed(images))
        return rows

    starts = [(number, i) for number in range(len(models)) for i in range(0, len(every), batch)]
    adapters, found = list(models.values()), {}
    mine = [start for n, start in enumerate(starts) if n % share.processes == share.rank]
    with told(
        len(mine) * batch,
        f"evaluate {len(models)} models on {len(every)} prompts",
        progress and main,
    ) as advance:
        for number, i in mine:
            rows = parts.get(number, i) if parts else None
            if rows is None:
                rows = drawn(adapters[number], i)
                rows = parts.put(number, i, rows) if parts else rows
            found[number, i] = rows
            advance(batch)
    share.wait()
    if main:
        tables = []
        for number, model in enumerate(models):
            own = [found[s] if s in found else parts.get(*s) for s in starts if s[0] == number]
            rows = pd.concat(own, ignore_index=True).assign(model=model)
            if pictures is not None:
                places = write_thumbnails(pictures, number, model, rows.pop("thumbnail"))
                rows.insert(rows.columns.get_loc("seed") + 1, "picture", places)
            tables.append(rows)
        table = pd.concat(tables, ignore_index=True)
        if parts is None:
            return table
        parts.finish(table)
    share.wait()
    return parts.table()


def probe_of(
    policy: FlowPolicy,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    sampler: Sampler,
    seed: int = 1 << 20,
    home: Home = AVERAGE,
    folder: Path | None = None,
    share: Share = Share(),
) -> Callable[[str], pd.DataFrame]:
    """For `fit`: what tells an adapter's `model_scores` on these prompts, with the same noise every time and
    none of the test's. Several processes (`share`) meet in a file in `folder`, which is then removed."""

    def probe(adapter: str) -> pd.DataFrame:
        models, into = {adapter: adapter}, folder / "probe.parquet" if share.processes > 1 else None
        how = {"progress": False, "into": into, "share": share}
        table = evaluate(policy, prompts, rewards, seed, sampler, models, **how)
        share.wait()
        if into and share.rank == 0:
            into.unlink()
        return model_scores(table, home)

    return probe
