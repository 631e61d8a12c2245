"""From models and prompts to one tidy table of scores."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import pyarrow.parquet
import torch

from .data import Prompt
from .files import locked, set_aside, write_json, write_table, write_whole
from .fingerprint import describe, sha256_of_json
from .losses import Shard
from .policy import FlowPolicy
from .progress import progress
from .rewards import Reward, applies_to, score_images
from .rollout import Sampler, sample
from .thumbnails import encode_webp, write_thumbnails


def score(
    images: torch.Tensor, prompts: Sequence[Prompt], rewards: Mapping[str, Reward]
) -> pd.DataFrame:
    """One row an image: task, tag, prompt and a column per reward, NaN where a reward does not
    apply."""
    table = pd.DataFrame(
        {
            "task": [p.task for p in prompts],
            "tag": [p.tag for p in prompts],
            "prompt": [p.text for p in prompts],
        }
    )
    for name, reward in rewards.items():
        rows = [i for i, p in enumerate(prompts) if applies_to(reward, p)]
        table[name] = np.nan
        if rows:
            table.loc[rows, name] = score_images(reward, images[rows], [prompts[i] for i in rows])
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
    show_progress: bool = True,
    images: str | Path | None = None,
    into: str | Path | None = None,
    guidance: Mapping[str, float] = MappingProxyType({}),
    shard: Shard = Shard(),
) -> pd.DataFrame:
    """Sample every prompt `repeats` times under every model and score it: one row an image.

    `models` maps a name to an adapter (None: the base). Image j of prompt i has seed `seed + j *
    len(prompts) + i` under every model: the same noise, so that models can be compared prompt by
    prompt. Columns: model, task, tag, prompt, repeat, seed, one per reward, and `embedding` if
    `embed` (images to (B, D), such as `PickScore.embed`) is given. `guidance`: of an adapter, where
    it is not the sampler's.

    With `images`, a folder, every sample is saved there as a thumbnail and the column `image` says
    where, seen from the folder's parent, where the table belongs; `about.json` there says how they
    were sampled.

    With `into`, a parquet file, the table is saved there, and while it grows its finished batches
    next to it: the same call resumes where it was cut off, and only reads a finished table. A table
    of other models, prompts, rewards or settings that lies there is moved into `earlier/`. Several
    processes (`shard`) share the batches by way of `into`; which samples are one batch does not
    depend on how many processes there are.
    """
    if not len(prompts):
        raise ValueError("nothing to evaluate: the list of prompts is empty")
    if seed < 0 or repeats < 1 or batch < 1:
        raise ValueError(
            f"seed must be at least 0, repeats and batch at least 1, not {seed}, {repeats}, {batch}"
        )
    if shard.processes > 1 and into is None:
        raise ValueError("several processes share an evaluation by way of a file: give into")
    policy.check_adapters(a for a in models.values() if a is not None)
    policy.check_prompts(prompts)
    main, all_prompts = shard.rank == 0, list(prompts) * repeats

    def sample_batch(adapter: str | None, i: int) -> pd.DataFrame:
        """The batch that begins at sample i."""
        here = all_prompts[i : i + batch]
        seeds = list(range(seed + i, seed + i + len(here)))
        own = replace(sampler, guidance=guidance.get(adapter, sampler.guidance))
        pixels = sample(policy, here, seeds, own, adapter, batch)
        repeat = [j // len(prompts) for j in range(i, i + len(here))]
        rows = score(pixels, here, rewards).assign(repeat=repeat, seed=seeds)
        if images is not None:
            rows["thumbnail"] = [encode_webp(image) for image in pixels]
        if embed is not None:
            rows["embedding"] = list(embed(pixels))
        return rows

    follows_from = {
        "sampler": sampler,
        "seed": seed,
        "batch size": batch,
        "repeats": repeats,
        "precision": policy.precision,
        "base": policy.base_hash,
        "models": {m: a and policy.adapter(a).sha256 for m, a in models.items()},
        "guidance": {a: g for a, g in guidance.items() if a in models.values()},
        "prompts": list(prompts),
        "rewards": dict(rewards),
        "embedded": embed is not None,
        "images": images is not None,
    }
    with contextlib.ExitStack() as stack:
        partial = None
        if into is not None:
            partial = PartialTable(Path(into), sha256_of_json(describe(follows_from)))
            if main:
                stack.enter_context(locked(partial.folder, f"an evaluation into {into}"))
                partial.prepare()
            shard.wait()
            if partial.finished:
                stack.close()
                return partial.table(main)
        if images is not None and main:
            about = {
                "sampler": {k: v for k, v in asdict(sampler).items() if k != "noise_scale"},
                "batch": batch,
                "dtype": policy.precision,
                "adapters": dict(models),
                "guidance": dict(guidance),
            }
            write_json(Path(images) / "about.json", about)
        starts = [(m, i) for m in range(len(models)) for i in range(0, len(all_prompts), batch)]
        mine, adapters, tables = starts[shard.rank :: shard.processes], list(models.values()), {}
        what = f"evaluate {len(models)} models on {len(all_prompts)} prompts"
        with progress(len(mine) * batch, what, show_progress and main) as advance:
            for m, i in mine:
                rows = partial.read(m, i) if partial else None
                if rows is None:
                    rows = sample_batch(adapters[m], i)
                    rows = partial.write(m, i, rows) if partial else rows
                tables[m, i] = rows
                advance(batch)
        shard.wait()
        if main:
            whole = []
            for number, model in enumerate(models):
                own = [
                    tables[s] if s in tables else partial.read(*s) for s in starts if s[0] == number
                ]
                rows = pd.concat(own, ignore_index=True).assign(model=model)
                if images is not None:
                    paths = write_thumbnails(images, number, model, rows.pop("thumbnail"))
                    rows.insert(rows.columns.get_loc("seed") + 1, "image", paths)
                whole.append(rows)
            table = pd.concat(whole, ignore_index=True)
            if partial is None:
                return table
            partial.finish(table)
        shard.wait()
    return partial.table(main)


class PartialTable:
    """The finished batches of an evaluation next to the table they become, and what both follow
    from (a hash)."""

    def __init__(self, path: Path, fingerprint: str):
        self.path, self.folder = path, path.parent / f".{path.name}.partial"
        self.fingerprint = fingerprint

    def prepare(self) -> None:
        """Move what lies there of something else aside. For one process of several."""
        about = self.folder / "fingerprint.txt"
        other = self.path.is_file() and read_fingerprint(self.path) != self.fingerprint
        begun = about.read_text() if about.is_file() else ""
        if other or (begun and begun != self.fingerprint):
            batches = list(self.folder.glob("*.parquet"))
            set_aside(self.path.parent, self.path, *batches)
        if not self.finished:
            write_whole(about, self.fingerprint)

    @property
    def finished(self) -> bool:
        return self.path.is_file()

    def read(self, model: int, start: int) -> pd.DataFrame | None:
        file = self.folder / f"{model}_{start}.parquet"
        return pd.read_parquet(file) if file.is_file() else None

    def write(self, model: int, start: int, rows: pd.DataFrame) -> pd.DataFrame:
        """Save a batch; the batch as it will be read again."""
        write_table(self.folder / f"{model}_{start}.parquet", rows)
        return self.read(model, start)

    def finish(self, table: pd.DataFrame) -> None:
        write_with_fingerprint(self.path, self.fingerprint, table)

    def table(self, main: bool) -> pd.DataFrame:
        """The finished table; `main` removes the batches, which are in it."""
        if main:
            shutil.rmtree(self.folder, ignore_errors=True)
        table = pd.read_parquet(self.path)
        table.attrs.clear()  # a table made of this one follows from something else
        return table


def read_fingerprint(path: Path) -> str | None:
    """What a table follows from, as `write_with_fingerprint` noted it."""
    about = (pyarrow.parquet.read_schema(path).metadata or {}).get(b"PANDAS_ATTRS", b"{}")
    return json.loads(about).get("fingerprint")


def write_with_fingerprint(path: Path, fingerprint: str, table: pd.DataFrame) -> None:
    table.attrs["fingerprint"] = fingerprint
    write_table(path, table)
