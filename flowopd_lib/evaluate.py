"""From models and prompts to one tidy table of scores."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import pyarrow.parquet
import torch

from .data import Prompt, Shard, slices
from .files import (
    encode_webp,
    locked,
    progress,
    set_aside,
    write_json,
    write_table,
    write_thumbnails,
    write_whole,
)
from .fingerprint import SAMPLING_CODE, code_hashes, describe, sha256_of, sha256_of_json
from .policy import FlowPolicy
from .rewards import Reward, applies_to, score_images
from .rollout import Sampler, sample


def score(
    images: torch.Tensor, prompts: Sequence[Prompt], rewards: Mapping[str, Reward]
) -> pd.DataFrame:
    """One row an image: task, tag, prompt and a column per reward, NaN where a reward does not
    apply."""
    columns = {"task": [p.task for p in prompts], "tag": [p.tag for p in prompts]}
    table = pd.DataFrame({**columns, "prompt": [p.text for p in prompts]})
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
    first_repeat: int = 0,
    embed: Callable[[torch.Tensor], np.ndarray] | None = None,
    batch: int = 64,
    show_progress: bool = True,
    images: str | Path | None = None,
    into: str | Path | None = None,
    guidance: Mapping[str, float] = MappingProxyType({}),
    shard: Shard = Shard(),
) -> pd.DataFrame:
    """Sample every prompt `repeats` times (from `first_repeat`) under every model and score it: one
    row an image.

    `models` maps a name to an adapter (None: the base). The seed of an image follows from its
    prompt's text, its repeat and `seed`: the same noise under every model, so that models can be
    compared prompt by prompt, and in every list of prompts. Columns: model, task, tag, prompt,
    repeat, seed, guidance, steps, resolution, one per reward, and `embedding` if `embed` (images to
    (B, D), such as `PickScore.embed`) is given. `guidance`: of an adapter, where it is not the
    sampler's.

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
    policy.check_adapters(a for a in models.values() if a is not None)
    policy.check_prompts(prompts)
    samples = [(p, first_repeat + j) for j in range(repeats) for p in prompts]
    main = shard.rank == 0

    def sample_batch(adapter: str | None, rows: slice) -> pd.DataFrame:
        here, repeat = ([sample[i] for sample in samples[rows]] for i in (0, 1))
        seeds = [noise_seed(prompt.text, j, seed) for prompt, j in samples[rows]]
        own = replace(sampler, guidance=guidance.get(adapter, sampler.guidance))
        pixels = sample(policy, here, seeds, own, adapter, batch)
        settings = {"guidance": own.guidance, "steps": own.steps, "resolution": pixels.shape[-1]}
        table = score(pixels, here, rewards).assign(repeat=repeat, seed=seeds, **settings)
        if images is not None:
            table["thumbnail"] = [encode_webp(image) for image in pixels]
        if embed is not None:
            table["embedding"] = list(embed(pixels))
        return table

    follows_from = {
        "sampler": sampler,
        "seed": seed,
        "batch size": batch,
        "repeats": [first_repeat, repeats],
        "precision": policy.precision,
        "base": policy.base_hash,
        "models": {m: a and policy.adapter(a).sha256 for m, a in models.items()},
        "guidance": {a: g for a, g in guidance.items() if a in models.values()},
        "prompts": list(prompts),
        "rewards": dict(rewards),
        "embedded": embed is not None,
        "images": images is not None,
        "code": code_hashes(SAMPLING_CODE),
    }
    fingerprint = sha256_of_json(describe(follows_from))
    batches = [(m, rows) for m in range(len(models)) for rows in slices(len(samples), batch)]
    mine, adapters = batches[shard.rank :: shard.processes], list(models.values())
    with contextlib.ExitStack() as stack:
        if into is None:
            into = f"{stack.enter_context(tempfile.TemporaryDirectory())}/samples.parquet"
        into = Path(into)
        partial = into.parent / f".{into.name}.partial"
        files = {(m, rows.start): partial / f"{m}_{rows.start}.parquet" for m, rows in batches}
        if main:
            stack.enter_context(locked(partial, f"an evaluation into {into}"))
            _set_aside_other(into, partial, images, fingerprint)
        shard.wait()
        if finished := into.is_file():
            mine = []
        what = f"evaluate {len(models)} models on {len(samples)} prompts"
        with progress(len(mine) * batch, what, show_progress and main) as advance:
            for m, rows in mine:
                if not files[m, rows.start].is_file():
                    write_table(files[m, rows.start], sample_batch(adapters[m], rows))
                advance(batch)
        shard.wait()
        if main and not finished:
            tables = []
            for number, model in enumerate(models):
                own = [pd.read_parquet(file) for (m, _), file in files.items() if m == number]
                table = pd.concat(own, ignore_index=True).assign(model=model)
                if images is not None:
                    paths = write_thumbnails(images, number, model, table.pop("thumbnail"))
                    table.insert(table.columns.get_loc("seed") + 1, "image", paths)
                tables.append(table)
            if images is not None:
                settings = {k: v for k, v in asdict(sampler).items() if k != "noise_scale"}
                about = {"sampler": settings, "batch": batch, "dtype": policy.precision}
                about |= {"adapters": dict(models), "guidance": dict(guidance), "table": into.name}
                write_json(Path(images) / "about.json", about)
            write_with_fingerprint(into, fingerprint, pd.concat(tables, ignore_index=True))
        shard.wait()
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        table = pd.read_parquet(into)
    table.attrs.clear()  # a table made of this one follows from something else
    return table


def noise_seed(text: str, repeat: int, seed: int = 0) -> int:
    """Of a sample in an evaluation, below 2^30."""
    return int(sha256_of([text, repeat, seed])[:8], 16) >> 2


def _set_aside_other(into: Path, partial: Path, images, fingerprint: str) -> None:
    """Move a table with its images, or batches of one, that follow from something else into
    `earlier/`. Raises ValueError where the images are another table's."""
    thumbnails = [Path(images)] if images is not None else []
    for file in (p / "about.json" for p in thumbnails if (p / "about.json").is_file()):
        if (table := json.loads(file.read_text())["table"]) != into.name:
            raise ValueError(
                f"{images} holds the images of another table, {table}; save those of {into.name} "
                "in another folder"
            )
    about = partial / "fingerprint.txt"
    before = about.read_text() if about.is_file() else fingerprint
    if before != fingerprint or (into.is_file() and read_fingerprint(into) != fingerprint):
        set_aside(into.parent, into, *thumbnails, *partial.glob("*.parquet"))
    write_whole(about, fingerprint)


def read_fingerprint(path: Path) -> str | None:
    """What a table follows from, as `write_with_fingerprint` noted it."""
    about = (pyarrow.parquet.read_schema(path).metadata or {}).get(b"PANDAS_ATTRS", b"{}")
    return json.loads(about).get("fingerprint")


def write_with_fingerprint(path: Path, fingerprint: str, table: pd.DataFrame) -> None:
    table.attrs["fingerprint"] = fingerprint
    write_table(path, table)
