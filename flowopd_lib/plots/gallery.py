"""Looking at the samples of a run: which to show, in what order, and what to take away. Nothing here draws a
widget; all of it feeds one.

A gallery is a grid of positions in a table of samples: its columns are models, its rows one prompt and one
noise each (or, unlocked, ranks).
"""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw, ImageFont

from ..files import write_table, write_whole
from ..policy import FlowPolicy
from ..prompts import Prompt
from ..rollout import Sampler, sample
from ..stats import rewards_in
from ..thumbnails import read_thumbnail

TEACHER = "its teacher"  # as `Query.against`: the model that a prompt's task is routed to


@dataclass(frozen=True)
class Query:
    """What to show. `of` is the model whose scores filter and sort ("": the last); a sample without the score
    asked for fails a range and sorts last.

    search   words that must all be in the prompt               ranges    reward: (low, high), both included
    task, tag, prompt, split    exactly this one; "" is any     sort  a reward, or "": the table's order, tasks
                                                            in turn
    repeat   only each prompt's sample of this number (the table's `repeat`), so one noise a prompt; None is
             all
    against  a model, or `TEACHER`: sort by the score minus that model's on the same prompt and noise
    locked   the same noise in a row; else each model's column is filtered and sorted on its own
    pinned   only rows with one of these positions of the table; None is all
    """

    search: str = ""
    task: str = ""
    tag: str = ""
    prompt: str = ""
    split: str = ""
    repeat: int | None = None
    of: str = ""
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    sort: str = ""
    against: str = ""
    descending: bool = True
    locked: bool = True
    pinned: tuple[int, ...] | None = None


class Samples:
    """A table of samples, one row each as `evaluate` makes it, with the folder that its pictures are in and
    what `about.json` says of them.

    Rows with another `train_seed` than 0 are a model of their own, `MODEL#SEED`, and those without a picture
    are left out, as a reference leaves them. Raises ValueError for a
    table without what a gallery needs.
    """

    def __init__(self, table: pd.DataFrame, folder: str | Path, about: Mapping | None = None):
        missing = {"model", "task", "tag", "prompt", "seed", "picture"} - set(table)
        if missing or not len(table):
            raise ValueError(
                f"a gallery needs samples with {', '.join(sorted(missing)) or 'at least one row'}; evaluate "
                "with pictures="
            )
        table = (
            table.dropna(subset="picture")
            .drop(columns="embedding", errors="ignore")
            .reset_index(drop=True)
        )
        if "train_seed" in table:
            again = table["train_seed"] > 0
            table["model"] = table["model"].where(
                ~again, table["model"] + "#" + table["train_seed"].astype(str)
            )
        self.table, self.folder, self.about = table, Path(folder), dict(about or {})
        self.models, self.rewards = list(table["model"].unique()), rewards_in(table)
        keys = pd.MultiIndex.from_frame(table[["task", "prompt", "seed"]])
        row, keys = keys.factorize()
        column = table["model"].map({m: i for i, m in enumerate(self.models)}).to_numpy()
        # position in the table of each prompt and noise under each model
        self.cells = np.full((len(keys), len(self.models)), -1)
        self.cells[row, column] = np.arange(len(table))
        # The tasks take turns, so that a first page shows all of them.
        turn = pd.Series(keys.get_level_values(0))
        self.cells = self.cells[np.argsort(turn.groupby(turn).cumcount().to_numpy(), kind="stable")]
        first = self.cells.max(1)
        self.task, self.tag, self.prompt = (
            table[c].to_numpy(object)[first] for c in ("task", "tag", "prompt")
        )
        # What not every table says: which split a prompt is of, and which of a prompt's samples a row is.
        self.split = (
            table["split"].to_numpy(object)[first]
            if "split" in table
            else np.full(len(keys), "", object)
        )
        self.repeat = (
            table["repeat"].to_numpy(int)[first] if "repeat" in table else np.zeros(len(keys), int)
        )
        self._lower = [p.lower() for p in self.prompt]

    @cached_property
    def _scores(self) -> dict[str, np.ndarray]:
        """By reward, (rows, models): NaN where it does not reward, or there is no sample."""
        return {
            j: np.where(self.cells < 0, np.nan, self.table[j].to_numpy(float)[self.cells])
            for j in self.rewards
        }

    @cached_property
    def prompts(self) -> dict[tuple[str, str], list[str]]:
        """The different prompts by (task, split), in the table's order; "" is the split where the table says
        none."""
        groups = dict.fromkeys(zip(self.task, self.split))
        return {
            (task, split): list(
                dict.fromkeys(self.prompt[(self.task == task) & (self.split == split)])
            )
            for task, split in groups
        }

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(self.task))

    def teacher(self, task: str) -> str | None:
        """The model that was trained for a task, by the names the notebooks give it."""
        return next((m for m in (f"{task} expert", task) if m in self.models), None)

    def picture(self, position: int) -> bytes:
        """WebP. Raises FileNotFoundError if it is not there any more."""
        return read_thumbnail(self.folder, self.table["picture"].iat[position])

    def scores(self, position: int, against: str = "base") -> list[tuple[str, float, float]]:
        """(reward, score, difference to `against` on the same prompt and noise) for each reward that scored;
        NaN: there is none to compare with."""
        row, column = np.argwhere(self.cells == position)[0]
        other = (
            self.models.index(against)
            if against in self.models and against != self.models[column]
            else None
        )
        return [
            (j, s[row, column], s[row, column] - s[row, other] if other is not None else np.nan)
            for j, s in self._scores.items()
            if not np.isnan(s[row, column])
        ]

    def under(self, position: int, model: str) -> int:
        """The position of the same prompt and noise under another model, -1 if there is none."""
        return int(self.cells[np.argwhere(self.cells == position)[0, 0], self.models.index(model)])

    def alt(self, position: int) -> str:
        """What a reader who does not see the picture is told."""
        row = self.table.iloc[position]
        return f"{row['model']}, seed {row['seed']}: {row['prompt']}; " + ", ".join(
            f"{j} {s:.2f}" for j, s, _ in self.scores(position)
        )


def load_samples(folder: str | Path) -> Samples:
    """`samples.parquet` of a notebook's results, with pictures. Raises FileNotFoundError or ValueError that
    says what is missing."""
    folder = Path(folder)
    if not (folder / "samples.parquet").is_file():
        raise FileNotFoundError(
            f"{folder} has no samples.parquet; give the results' folder of a notebook that wrote one, such "
            "as RUN/05_opd"
        )
    about = folder / "pictures" / "about.json"
    try:
        return Samples(
            pd.read_parquet(folder / "samples.parquet"),
            folder,
            json.loads(about.read_text()) if about.is_file() else {},
        )
    except ValueError as error:
        raise ValueError(f"{folder / 'samples.parquet'}: {error}") from error


def with_splits(tables: Mapping[str, pd.DataFrame], folder: str | Path) -> Samples:
    """The samples of several splits, each evaluated with pictures into a folder of its own in `folder`, as
    one, kept there like a run's."""
    folder = Path(folder)
    parts = []
    for split, table in tables.items():
        parts.append(table.assign(split=split, picture=f"{split}/" + table["picture"]))
        about = folder / split / "pictures" / "about.json"
    write_whole(folder / "pictures" / "about.json", about.read_text())
    # every prompt once before any comes again, as where all are drawn together
    table = pd.concat(parts, ignore_index=True).sort_values(
        "repeat", kind="stable", ignore_index=True
    )
    write_table(folder / "samples.parquet", table)
    return load_samples(folder)


def select(samples: Samples, query: Query, models: Sequence[str] | None = None) -> np.ndarray:
    """(rows, models): the positions in `samples.table` to show, -1 for none; `models` are the columns (None:
    all).

    Raises ValueError for a model or a reward there is not.
    """
    columns = [
        _known(m, samples.models, "model") for m in (samples.models if models is None else models)
    ]
    for name in (*query.ranges, *([query.sort] if query.sort else [])):
        _known(name, samples.rewards, "reward")
    keep = np.ones(len(samples.cells), bool)
    for wanted, values in (
        (query.task, samples.task),
        (query.tag, samples.tag),
        (query.prompt, samples.prompt),
        (query.split, samples.split),
    ):
        if wanted:
            keep &= values == wanted
    if query.repeat is not None:
        keep &= samples.repeat == query.repeat
    if words := query.search.lower().split():
        keep &= np.fromiter((all(w in p for w in words) for p in samples._lower), bool, len(keep))
    if query.pinned is not None:
        keep &= np.isin(samples.cells, query.pinned).any(1)
    if query.locked:
        of = _known(query.of, samples.models, "model") if query.of else len(samples.models) - 1
        return samples.cells[np.ix_(_ordered(samples, query, np.flatnonzero(keep), of), columns)]
    ranked = [
        samples.cells[
            _ordered(samples, query, np.flatnonzero(keep & (samples.cells[:, c] >= 0)), c), c
        ]
        for c in columns
    ]
    grid = np.full((max(map(len, ranked), default=0), len(columns)), -1)
    for i, positions in enumerate(ranked):
        grid[: len(positions), i] = positions
    return grid


def _ordered(samples: Samples, query: Query, rows: np.ndarray, of: int) -> np.ndarray:
    """Those of `rows` in the ranges, in order, by the scores of model number `of`."""
    for reward, (low, high) in query.ranges.items():
        value = samples._scores[reward][rows, of]
        rows = rows[(value >= low) & (value <= high)]  # False for NaN
    if not query.sort:
        return rows
    value = samples._scores[query.sort][rows, of]
    if query.against == TEACHER:
        teachers = {t: samples.teacher(t) for t in samples.tasks}
        numbers = np.array(
            [
                -1 if teachers[t] is None else samples.models.index(teachers[t])
                for t in samples.task[rows]
            ],
            int,
        )
        value = value - np.where(numbers < 0, np.nan, samples._scores[query.sort][rows, numbers])
    elif query.against:
        value = (
            value
            - samples._scores[query.sort][rows, _known(query.against, samples.models, "model")]
        )
    # NaN comes last either way
    return rows[np.argsort(-value if query.descending else value, kind="stable")]


def _known(name: str, names: Sequence[str], what: str) -> int:
    if name not in names:
        raise ValueError(f"there is no {what} {name!r} here; there are {', '.join(names)}")
    return list(names).index(name)


def page_of(grid: np.ndarray, number: int, size: int) -> np.ndarray:
    """Rows of page `number` (from 0) with `size` a page; the last page for a number beyond it."""
    last = max(0, -(-len(grid) // size) - 1)
    return grid[min(max(number, 0), last) * size :][:size]


def rows_of(samples: Samples, grid: np.ndarray) -> pd.DataFrame:
    """The samples of a grid as a table, row by row: the gallery's CSV. `REWARD - base`: the difference on the
    same prompt and noise."""
    positions = grid[grid >= 0]
    table = samples.table.iloc[positions].reset_index(drop=True)
    table.insert(0, "row", np.argwhere(grid >= 0)[:, 0])
    if "base" in samples.models:
        home = np.full(len(samples.table), -1)
        home[samples.cells[samples.cells >= 0]] = np.nonzero(samples.cells >= 0)[0]
        for reward, scores in samples._scores.items():
            table[f"{reward} - base"] = (
                table[reward].to_numpy(float)
                - scores[home[positions], samples.models.index("base")]
            )
    return table


def contact_sheet(
    samples: Samples, grid: np.ndarray, models: Sequence[str], tile: int = 128
) -> Image.Image:
    """One picture of a grid: a column per model, a row per prompt and noise, each sample with its scores and
    their difference to the base below."""
    fonts = [
        ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
        for name, size in (("DejaVuSans.ttf", 11), ("DejaVuSans-Bold.ttf", 12))
    ]
    left, top, line = 150, 24, 14
    height = tile + line * len(samples.rewards) + 8
    width = max(tile, 132)
    sheet = Image.new(
        "RGB", (left + (width + 8) * len(models), top + height * max(len(grid), 1)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for column, model in enumerate(models):
        draw.text((left + (width + 8) * column, 6), model, "black", fonts[1])
    for row, positions in enumerate(grid):
        y, there = top + height * row, positions[positions >= 0]
        if (
            len(there)
            and samples.table[["prompt", "seed"]].iloc[there].drop_duplicates().shape[0] == 1
        ):
            first = samples.table.iloc[there[0]]
            text = textwrap.wrap(first["prompt"], 22) + [f"{first['task']}, seed {first['seed']}"]
        else:
            text = [f"rank {row + 1}"]
        draw.multiline_text((4, y), "\n".join(text), "black", fonts[0])
        for column, position in enumerate(positions):
            x = left + (width + 8) * column
            if position < 0:
                draw.text((x, y), "no sample", "gray", fonts[0])
                continue
            picture = Image.open(io.BytesIO(samples.picture(position)))
            sheet.paste(
                picture.resize(
                    (tile, tile),
                    Image.Resampling.NEAREST if picture.width <= tile else Image.Resampling.LANCZOS,
                ),
                (x, y),
            )
            for i, (reward, score, change) in enumerate(samples.scores(position)):
                draw.text(
                    (x, y + tile + 1 + line * i), badge(reward, score, change), "black", fonts[0]
                )
    return sheet


def badge(reward: str, score: float, change: float) -> str:
    """`OCR 0.50 (+0.25)`: a score and its difference to the base, where there is one."""
    return f"{reward} {score:.2f}" + ("" if np.isnan(change) else f" ({change:+.2f})")


def redraw(policy: FlowPolicy, samples: Samples, position: int) -> torch.Tensor:
    """The sample (3, H, W) again, to the last bit on the machine that drew it: in a batch with the samples it
    was drawn with, for in bfloat16 a product's rounding depends on the size of its batch (alone, a pixel may
    differ by a few 255ths).

    `policy` needs the adapter and dtype that `about.json` names. Raises ValueError if that file is not there,
    or for another dtype.
    """
    about, model = samples.about, samples.table["model"].iat[position]
    adapter = adapter_of(samples, model)
    if str(policy.dtype) != about["dtype"]:
        raise ValueError(f"these samples were drawn in {about['dtype']}, not in {policy.dtype}")
    drawn_with = samples.table["model"] == model
    if "split" in samples.table:  # each split is an evaluation of its own
        drawn_with &= samples.table["split"] == samples.table["split"].iat[position]
    own = np.flatnonzero(drawn_with)
    place = int(np.searchsorted(own, position))
    start = place - place % about["batch"]
    batch = samples.table.iloc[own[start : start + about["batch"]]]
    prompts = [Prompt(r.prompt, r.task) for r in batch.itertuples()]
    sampler = Sampler(**about["sampler"])
    sampler = replace(sampler, guidance=about.get("guidance", {}).get(adapter, sampler.guidance))
    images = sample(policy, prompts, batch["seed"].tolist(), sampler, adapter, about["batch"])
    return images[place - start]


def adapter_of(samples: Samples, model: str) -> str | None:
    """The adapter a model was drawn with (`student` may stand there as `student#0`). Raises ValueError where
    nothing says it."""
    adapters = samples.about.get("adapters", {})
    for name in (model, f"{model}#0"):
        if name in adapters:
            return adapters[name]
    raise ValueError(
        f"{samples.folder / 'pictures' / 'about.json'} does not say with which adapter {model} was drawn"
    )


def code_of(samples: Samples, position: int, setup: str) -> str:
    """A code cell that draws a sample again. `setup` is the code that makes `policy` with the adapters that
    the run did not train itself."""
    model = samples.table["model"].iat[position]
    adapter = adapter_of(samples, model)
    lines = [
        "from flowopd_lib.plots.gallery import load_samples, redraw",
        setup.strip(),
        f"samples = load_samples({str(samples.folder)!r})",
    ]
    if adapter and (samples.folder / adapter / "adapter" / "adapter_config.json").is_file():
        lines.append(f"policy.load_adapter({adapter!r}, samples.folder / {adapter + '/adapter'!r})")
    lines += [
        f"# {samples.alt(position)}".replace("\n", " "),
        f"image = redraw(policy, samples, {position})",
    ]
    return "\n".join(lines)


def disagreements(
    samples: Samples, of: str, reward: str, against: str, task: str = "", n: int = 3
) -> pd.DataFrame:
    """Where `of` falls furthest behind `against`: at most `n` rows, task, prompt, seed and difference of the
    reward's scores, the worst first; none above 0."""
    grid = select(
        samples,
        Query(task=task, of=of, sort=reward, against=against, descending=False),
        [of, against],
    )[:n]
    value = samples.table[reward].to_numpy(float)
    rows = samples.table.iloc[grid[:, 0]][["task", "prompt", "seed"]].assign(
        difference=value[grid[:, 0]] - value[grid[:, 1]]
    )
    return rows[(rows["difference"] < 0) & (grid >= 0).all(1)]
