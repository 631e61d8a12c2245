"""A gallery of a run's samples: search, filter, sort, compare, export.

`select` gives the rows to show as a grid of positions in the table of samples: a row per prompt and
noise, a column per model. The contact sheet, the HTML page, the CSV and the live widget are all
made from such a grid.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from pathlib import Path

import ipywidgets as ipw
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from ..config import choose
from ..data import Prompt
from ..files import read_thumbnail, write_table, write_whole
from ..plots.scores import load_images, plot_image_grid
from ..policy import FlowPolicy
from ..rollout import Sampler, sample
from ..stats import rewards_in
from .common import STYLE, Viewer, badges_html, image_html, note_html, tile_html

TEACHER = "its teacher"  # as `Query.minus`: the expert of a prompt's task
KEYS = ["task", "prompt", "seed"]  # the same prompt and noise under every model

# --- samples and queries


@dataclass(frozen=True)
class Query:
    """Which samples to show, and in what order. "" does not filter, nor does a `repeat` of -1.

    search      words that must all be in the prompt
    task, tag, split, prompt, repeat    exactly this one (`repeat`: the number of a prompt's sample)
    model       whose scores sort and filter; "" is the last
    sort, minus a reward, and a model (or `TEACHER`) whose score is subtracted. Without `sort` the
                table's order stays, the tasks alternating. Samples without the score come last.
    range_of, range     a reward, and its lowest and highest score
    pinned      only rows with one of these positions of the table
    """

    search: str = ""
    task: str = ""
    tag: str = ""
    split: str = ""
    prompt: str = ""
    repeat: int = -1
    model: str = ""
    sort: str = ""
    minus: str = ""
    descending: bool = True
    range_of: str = ""
    range: tuple[float, float] = (-np.inf, np.inf)
    pinned: Sequence[int] | None = None


class Samples:
    """A table of samples as `evaluate` makes it with thumbnails, the `folder` that its images are
    in, and what `about.json` records of how they were sampled.

    Rows with a `train_seed` above 0 are a model of their own, `MODEL#SEED`; rows without an image
    are left out. `rows` has a row per prompt and noise, and `row_of` its number for each sample;
    `grid` has the same rows and, for every model and `TEACHER`, the positions in `table` and
    `records`, -1 for none. Raises ValueError for a table
    without the columns a gallery needs.
    """

    def __init__(self, table: pd.DataFrame, folder: str | Path, about: Mapping | None = None):
        missing = {"model", "tag", "image", *KEYS} - set(table)
        if missing or not len(table):
            what = ", ".join(sorted(missing)) or "rows"
            raise ValueError(f"{folder}: samples without {what}; evaluate with images=")
        table = table.dropna(subset="image").drop(columns="embedding", errors="ignore")
        table = table.reset_index(drop=True)
        if "train_seed" in table:
            names = table["model"] + "#" + table["train_seed"].astype(str)
            table["model"] = table["model"].where(table["train_seed"] == 0, names)
        self.table, self.folder, self.about = table, Path(folder), dict(about or {})
        self.models, self.rewards = list(table["model"].unique()), rewards_in(table)
        rows = table.drop_duplicates(KEYS)
        turn = rows.groupby("task").cumcount()  # tasks alternate: a first page shows all of them
        self.rows = rows.loc[turn.sort_values(kind="stable").index].reset_index(drop=True)
        for column, value in (("split", ""), ("repeat", 0)):
            self.rows[column] = self.rows.get(column, value)
        keys = pd.MultiIndex.from_frame(self.rows[KEYS])
        self.row_of = keys.get_indexer(pd.MultiIndex.from_frame(table[KEYS]))
        self.records = table.to_dict("records")  # faster to get than a row of a DataFrame
        grid = table.reset_index().pivot(index=KEYS, columns="model", values="index")
        grid = grid.reindex(keys).reset_index(drop=True)
        grid[TEACHER] = np.nan
        for task, row in self.rows.groupby("task").groups.items():
            # the model that was trained for the task, by the names the notebooks give it
            if names := [m for m in (f"{task} expert", task) if m in self.models]:
                grid.loc[row, TEACHER] = grid.loc[row, names[0]]
        self.grid = grid[[*self.models, TEACHER]].fillna(-1).astype(int)

    def scores(self, reward: str, model: str) -> np.ndarray:
        """(rows,): NaN where there is no sample or no score."""
        positions = self.grid[model].to_numpy()
        return np.where(positions < 0, np.nan, self.table[reward].to_numpy(float)[positions])

    def image(self, position: int) -> bytes:
        """WebP."""
        return read_thumbnail(self.folder, self.records[position]["image"])

    def counterpart(self, position: int, model: str) -> int:
        """The position of the same prompt and noise under another model, -1 if there is none."""
        return self.grid[model].iat[self.row_of[position]]

    def badges(self, position: int, baseline: str = "base") -> dict[str, str]:
        """By reward the score and, where there is one to compare with, its difference to `baseline`
        on the same prompt and noise: "OCR 0.50 ▲ +0.25"."""
        row, badges = self.records[position], {}
        other = self.counterpart(position, baseline) if baseline in self.models else -1
        before = self.records[other] if other not in (-1, position) else {}
        for reward in self.rewards:
            change = row[reward] - before.get(reward, np.nan)
            arrow = "▲" if change > 0 else "▼" if change < 0 else "="
            difference = "" if np.isnan(change) else f" {arrow} {change:+.2f}"
            if pd.notna(row[reward]):
                badges[reward] = f"{reward} {row[reward]:.2f}{difference}"
        return badges

    def describe(self, position: int) -> str:
        """The alternative text of an image."""
        row, scores = self.records[position], ", ".join(self.badges(position, "").values())
        return f"{row['model']}, seed {row['seed']}: {row['prompt']}; {scores}"

    def label(self, positions: np.ndarray) -> str:
        """What the samples in a row of a page have in common: prompt, task and seed."""
        return "{prompt}\n{task}, seed {seed}".format(**self.records[max(positions)])


def load_samples(folder: str | Path) -> Samples:
    """`samples.parquet` of a notebook's results, with images. Raises FileNotFoundError, naming the
    file, or ValueError with what is missing."""
    folder = Path(folder)
    about = json.loads((folder / "images" / "about.json").read_text())
    return Samples(pd.read_parquet(folder / "samples.parquet"), folder, about)


def merge_splits(tables: Mapping[str, pd.DataFrame], folder: str | Path) -> Samples:
    """The samples of several splits, each evaluated with images into `folder`/SPLIT, as one
    gallery, saved in `folder` like a run's."""
    folder = Path(folder)
    parts = [t.assign(split=split, image=f"{split}/" + t["image"]) for split, t in tables.items()]
    about = folder / next(iter(tables)) / "images" / "about.json"
    write_whole(folder / "images" / "about.json", about.read_text())
    # every prompt once before any is repeated, as in one evaluation
    table = pd.concat(parts).sort_values("repeat", kind="stable", ignore_index=True)
    write_table(folder / "samples.parquet", table)
    return load_samples(folder)


def select(samples: Samples, query: Query, models: Sequence[str] | None = None) -> np.ndarray:
    """(rows, models): the positions in `samples.table` to show, -1 for none; `models` are the
    columns (None: all). Raises ValueError for an unknown model or reward."""
    models = list(samples.models if models is None else models)
    for model in (*models, query.model, query.minus):
        choose("model", model, [*samples.models, TEACHER, ""])
    for reward in (query.sort, query.range_of):
        choose("reward", reward, [*samples.rewards, ""])
    keep = (samples.grid[models] >= 0).any(axis=1)
    for name in ("task", "tag", "split", "prompt", "repeat"):
        if (value := getattr(query, name)) not in ("", -1):
            keep &= samples.rows[name] == value
    for word in query.search.split():
        keep &= samples.rows["prompt"].str.contains(word, case=False, regex=False)
    if query.pinned is not None:
        keep &= samples.grid.isin(query.pinned).any(axis=1)
    model = query.model or samples.models[-1]
    if query.range_of:
        scores, (low, high) = samples.scores(query.range_of, model), query.range
        keep &= (scores >= low) & (scores <= high)  # False for NaN
    rows = np.flatnonzero(keep)
    if query.sort:
        scores = samples.scores(query.sort, model)
        if query.minus:
            scores = scores - samples.scores(query.sort, query.minus)
        rows = rows[np.argsort(-scores[rows] if query.descending else scores[rows], kind="stable")]
    return samples.grid[models].to_numpy()[rows]


def find_regressions(
    samples: Samples, model: str, baseline: str, reward: str, task: str = "", n: int = 3
) -> pd.DataFrame:
    """Where `model` scores furthest below `baseline`: at most `n` rows, task, prompt, seed,
    difference, the worst first."""
    query = Query(task=task, model=model, sort=reward, minus=baseline, descending=False)
    grid = select(samples, query, [model, baseline])[:n]
    ours, theirs = (samples.table[reward].to_numpy(float)[column] for column in grid.T)
    rows = samples.table.iloc[grid[:, 0]][KEYS].assign(difference=ours - theirs)
    return rows[(rows["difference"] < 0) & (grid >= 0).all(axis=1)]


# --- exports of a grid


def export_rows(samples: Samples, grid: np.ndarray) -> pd.DataFrame:
    """The samples of a grid, row by row, with the difference of each score to the base on the same
    prompt and noise (`REWARD - base`)."""
    table = samples.table.iloc[grid[grid >= 0]].reset_index(drop=True)
    table.insert(0, "row", np.argwhere(grid >= 0)[:, 0])
    base = samples.table[samples.table["model"] == "base"].set_index(KEYS)[samples.rewards]
    if len(base):
        base = base.reindex(pd.MultiIndex.from_frame(table[KEYS])).reset_index(drop=True)
        table = table.join((table[samples.rewards] - base).add_suffix(" - base"))
    return table


def plot_contact_sheet(samples: Samples, grid: np.ndarray, models: Sequence[str]) -> Figure:
    """A grid as one figure: a column per model, a row per prompt and noise, with each sample's
    scores and their difference to the base."""
    images, captions = [None] * grid.size, ["no sample"] * grid.size
    for number, position in enumerate(grid.ravel()):
        if position >= 0:
            images[number] = load_images(samples.table.iloc[[position]], samples.folder)[0]
            captions[number] = "\n".join(samples.badges(position).values())
    labels = [*map(samples.label, grid)]
    return plot_image_grid(images, captions, len(models), "", models, labels)


def export_html(samples: Samples, grid: np.ndarray, models: Sequence[str]) -> str:
    """A grid as an HTML page that needs no other file."""
    cells = [label_html(""), *map(label_html, models)]
    for row in grid:
        cells += [label_html(samples.label(row)), *(sample_html(samples, p) for p in row)]
    columns = f"grid-template-columns: 150px repeat({len(models)}, 168px)"
    page = f'<div class="fo fo-page" style="{columns}">{"".join(cells)}</div>'
    return f'<!doctype html><meta charset="utf-8">{STYLE}{page}'


def label_html(label: str) -> str:
    """The first line in bold, the rest dimmed."""
    first, _, rest = escape(label).partition("\n")
    return f'<div class="fo-row"><b>{first}</b><br><span class="fo-dim">{rest}</span></div>'


def sample_html(samples: Samples, position: int, baseline: str = "base") -> str:
    """An image with its scores and their differences to the baseline below."""
    if position < 0:
        return '<div class="fo-note fo-dim">no sample</div>'
    image = image_html(samples.image(position), samples.describe(position), 128)
    return tile_html(image, badges_html(samples.badges(position, baseline)))


# --- reproduction


def redraw(policy: FlowPolicy, samples: Samples, position: int) -> torch.Tensor:
    """The sample (3, H, W) again, to the last bit on the machine that sampled it: in a batch with
    the samples it was sampled with, because in bfloat16 the rounding of a product depends on the
    size of its batch.

    `policy` needs the adapter and dtype that `about.json` names. Raises ValueError for another
    dtype.
    """
    row, about = samples.table.iloc[position], samples.about
    adapter = find_adapter(samples, row["model"])
    if policy.precision != about["dtype"]:
        raise ValueError(f"these samples were made in {about['dtype']}; load the policy in it")
    together = samples.table["model"] == row["model"]
    if "split" in samples.table:  # each split is an evaluation of its own
        together &= samples.table["split"] == row["split"]
    positions, size = np.flatnonzero(together), about["batch"]
    number = int(np.searchsorted(positions, position))
    batch = samples.table.iloc[positions[number - number % size :][:size]]
    prompts = [Prompt(r.prompt, r.task) for r in batch.itertuples()]
    guidance = about["guidance"].get(adapter, about["sampler"]["guidance"])
    sampler = Sampler(**about["sampler"] | {"guidance": guidance})
    images = sample(policy, prompts, batch["seed"].tolist(), sampler, adapter, size)
    return images[number % size]


def find_adapter(samples: Samples, model: str) -> str | None:
    """The adapter a model was sampled with (`student` may be recorded as `student#0`)."""
    adapters = samples.about["adapters"]
    return adapters[model if model in adapters else f"{model}#0"]


def reproduction_code(samples: Samples, position: int, setup: str) -> str:
    """A code cell that makes a sample again. `setup` is the code that makes `policy` with the
    adapters that the run did not train itself."""
    adapter = find_adapter(samples, samples.records[position]["model"])
    own = f"policy.load_adapter({adapter!r}, samples.folder / {f'{adapter}/adapter'!r})\n"
    trained = adapter and (samples.folder / adapter / "adapter").is_dir()
    return (
        "from flowopd_lib.widgets.gallery import load_samples, redraw\n"
        f"{setup.strip()}\n"
        f"samples = load_samples({str(samples.folder)!r})\n"
        f"{own if trained else ''}"
        f"image = redraw(policy, samples, {position})  # {samples.describe(position)}"
    )


# --- the widget


class SampleGallery(Viewer):
    """Models as columns, a prompt and its noise as a row; below every image its scores and their
    differences to the base. Headless: a contact sheet of the first page and a table.

    `models` are the names of the columns at the start (None: the first and the last three),
    `query` what is shown, `rows` the number of rows of a page. `setup` is the code that makes
    `policy` (see `reproduction_code`); exports go to `folder`.
    """

    def __init__(
        self,
        samples: Samples,
        models: Sequence[str] | None = None,
        query: Query = Query(),
        rows: int = 3,
        setup: str = "",
        folder: str | Path = ".",
    ):
        super().__init__()
        self.samples, self.size, self.setup, self.folder = samples, rows, setup, Path(folder)
        self.query = replace(query, model=query.model or samples.models[-1])
        self.models = list(models or dict.fromkeys([samples.models[0], *samples.models[-3:]]))
        self.grid = select(samples, query, self.models)
        self.number, self.chosen, self.pins = 0, -1, []
        if not self.headless:
            self._build()
            self._show_page(0)

    @property
    def page(self) -> np.ndarray:
        return self.grid[self.number * self.size :][: self.size]

    def contact_sheet(self) -> Figure:
        """The page as a figure, which a cell shows only as its last line."""
        figure = plot_contact_sheet(self.samples, self.page, self.models)
        plt.close(figure)  # an open one would be shown below every cell that saves it
        return figure

    def still(self) -> list:
        rows = export_rows(self.samples, self.page).drop(columns="image")
        return [self.contact_sheet(), rows.round(3)]

    def _build(self) -> None:
        samples, query, update, control = self.samples, self.query, self._update, self.control
        rewards, models = _pairs(samples.rewards), _pairs(samples.models)
        seeds = [(f"sample {n + 1} of each prompt", n) for n in sorted(set(samples.rows["repeat"]))]
        minus = [(f"minus {name}", name) for name in (TEACHER, *samples.models)]
        choices = {
            "tag": ("tag", [("any", ""), *_pairs(samples.rows["tag"].unique())]),
            "repeat": ("seeds", [("every seed", -1), *seeds]),
            "model": ("scores of", models),
            "sort": ("sort by", [("the run's order", ""), *rewards]),
            "minus": ("", [("the score itself", ""), *minus]),
            "range_of": ("range of", [("none", ""), *rewards]),
        }
        # named by the fields of Query, whose values they hold
        c = self.controls = {}
        for name, (label, options) in choices.items():
            value = {"options": options, "value": getattr(query, name)}
            c[name] = control(ipw.Dropdown, label, update, "210px", **value)
        order = [("highest first", True), ("lowest first", False)]
        order = {"options": order, "value": query.descending}
        words = {"value": query.search, "placeholder": "words of a prompt"}
        c["descending"] = control(ipw.ToggleButtons, "", update, "auto", **order)
        c["search"] = control(ipw.Text, "search", update, **words)
        c["range"] = control(ipw.FloatRangeSlider, "", None, "330px")
        self.prompt = control(ipw.Select, rows=18)
        self._set_range(query.range)
        self._list_prompts((query.task, query.split, query.prompt))
        for widget in (c["range"], self.prompt):
            widget.observe(self.guard(update), "value")
        columns = {"options": samples.models, "value": self.models}
        self.columns = control(ipw.SelectMultiple, "models", update, **columns)
        self.only_pinned = control(ipw.Checkbox, "pinned only", update, "180px")
        self.previous = self.button("◀ page", lambda: self._show_page(self.number - 1))
        self.next = self.button("page ▶", lambda: self._show_page(self.number + 1))
        self.cells, self.body, self.count = {}, ipw.GridBox(), ipw.HTML()
        self.status, self.zoom = ipw.HTML(), ipw.HTML()
        self.other = control(ipw.Dropdown, "swipe to", self._show_detail, "210px", options=models)
        self.swipe = control(ipw.IntSlider, "A | B", self._show_detail, "auto", readout=False)
        self.pin = self.button("pin", self._toggle_pin)
        show_code = self.button("code of this sample", self._show_code)
        self.code = ipw.Textarea(layout=ipw.Layout(width="640px", height="110px"))
        tools = ipw.HBox([self.other, self.swipe, self.pin, show_code])
        self.detail = ipw.VBox([self.zoom, tools, self.code], layout=ipw.Layout(display="none"))
        exports = {"contact sheet": "png", "HTML of the page": "html", "CSV of all pages": "csv"}
        self.exports = [self.button(k, partial(self._export, kind)) for k, kind in exports.items()]
        main = [
            ipw.HBox([c["sort"], c["minus"], c["descending"]]),
            ipw.HBox([c["model"], c["range_of"], c["range"]]),
            ipw.HBox([c["tag"], c["repeat"], self.only_pinned]),
            ipw.HBox([self.previous, self.next, self.count]),
            self.guard.box,
            self.body,
        ]
        side = ipw.VBox([c["search"], self.prompt, self.columns])
        top, foot = ipw.HBox([side, ipw.VBox(main)]), ipw.HBox([*self.exports, self.status])
        self.box = self.stack("gallery", top, self.detail, foot)

    # --- callbacks

    def _update(self) -> None:
        """Select by the controls, and show the first page."""
        if not self.columns.value:
            raise ValueError("no models are chosen; choose one or more (hold Ctrl or Shift)")
        if self.controls["search"].value != self.query.search:
            self._list_prompts()
        if self.controls["range_of"].value != self.query.range_of:
            self._set_range()
        self.models = list(self.columns.value)
        task, split, prompt = self.prompt.value or ("", "", "")
        pinned = tuple(self.pins) if self.only_pinned.value else None
        values = {name: control.value for name, control in self.controls.items()}
        self.query = Query(**values, task=task, split=split, prompt=prompt, pinned=pinned)
        self.grid = select(self.samples, self.query, self.models)
        self._show_page(0)

    def _list_prompts(self, chosen: tuple[str, str, str] = ("", "", "")) -> None:
        """The prompts with the words searched for, below a line for all of their task and split."""
        words = self.controls["search"].value.lower().split()
        options = {"all prompts": ("", "", "")}
        for (task, split), rows in self.samples.rows.groupby(["task", "split"], sort=False):
            prompts = [p for p in rows["prompt"].unique() if all(w in p.lower() for w in words)]
            name = f"{task}, {split}" if split else task
            options[f"— {name}: {len(prompts)} —"] = (task, split, "")
            options |= {prompt: (task, split, prompt) for prompt in prompts}
        self.prompt.options = list(options.items())
        self.prompt.value = chosen if chosen in options.values() else ("", "", "")

    def _set_range(self, value: tuple[float, float] = (-np.inf, np.inf)) -> None:
        """Set the slider to the scores of the reward chosen, or hide it."""
        slider, reward = self.controls["range"], self.controls["range_of"].value
        slider.layout.visibility = "visible" if reward else "hidden"
        if reward:
            scores = self.samples.table[reward]
            low, high = np.floor(scores.min() * 100) / 100, np.ceil(scores.max() * 100) / 100
            slider.min, slider.max = min(low, slider.max), high  # never a minimum above the maximum
            slider.min, slider.step = low, max((high - low) / 100, 0.01)
            slider.value = np.clip(value, low, high).tolist()

    def _show_page(self, number: int) -> None:
        """Write a page into its cells, which are made once and then reused."""
        last = max(0, -(-len(self.grid) // self.size) - 1)
        self.number = min(max(number, 0), last)
        self.previous.disabled, self.next.disabled = self.number == 0, self.number == last
        shown, total = int((self.grid >= 0).sum()), len(self.samples.table)
        hint = "" if shown else ": nothing passes; widen the filter"
        page = f"page {self.number + 1} of {last + 1}"
        text = f"{page}; {len(self.grid)} rows, {shown} of {total} samples{hint}"
        self.count.value = note_html(text)
        cells = [self._cell(-1, i, label_html(m)) for i, m in enumerate(["", *self.models], -1)]
        for row, positions in enumerate(self.page):
            cells.append(self._cell(row, -1, label_html(self.samples.label(positions))))
            for column, position in enumerate(positions.tolist()):
                html = sample_html(self.samples, position)
                cells.append(self._cell(row, column, html, position))
        if tuple(cells) != self.body.children:
            columns = f"minmax(90px, 150px) repeat({len(self.models)}, minmax(84px, 168px))"
            self.body.layout.grid_template_columns = columns
            self.body.children = cells

    def _cell(self, row: int, column: int, html: str, position: int | None = None) -> ipw.VBox:
        """A cell of the page: HTML and, for a sample, the button that enlarges it."""
        if (row, column) not in self.cells:
            enlarge = self.button("enlarge", lambda: self._choose(int(self.page[row, column])))
            children = [ipw.HTML(), enlarge] if position is not None else [ipw.HTML()]
            self.cells[row, column] = ipw.VBox(children)
        cell = self.cells[row, column]
        cell.children[0].value = html
        if position is not None:
            enlarge = cell.children[1]
            enlarge.disabled = position < 0
            enlarge.description = "enlarge ★" if position in self.pins else "enlarge"
        return cell

    def _choose(self, position: int) -> None:
        model = self.samples.table["model"].iat[position]
        self.chosen, self.swipe.value, self.code.value = position, 0, ""
        self.other.value = next((m for m in self.models if m != model), model)
        self._show_detail()

    def _show_detail(self) -> None:
        """The chosen sample enlarged; over it, as far as the slider says, the same noise under
        another model."""
        if self.chosen < 0:
            return
        samples, label = self.samples, self.samples.label([self.chosen])
        other = samples.counterpart(self.chosen, self.other.value)
        clip = f"clip-path: inset(0 {100 - self.swipe.value}% 0 0)"
        images = captions = ""
        for name, position, style in (("A", self.chosen, ""), ("B", other, clip)):
            if position >= 0:
                text = samples.describe(position)
                images += image_html(samples.image(position), text, 320, style)
                model = escape(samples.table["model"].iat[position])
                captions += f"<b>{name}: {model}</b>{badges_html(samples.badges(position))}<br>"
        self.zoom.value = (
            f'{label_html(label)}<div class="fo-images"><div class="fo-swipe">{images}</div>'
            f'<div class="fo-row">{captions}</div></div>'
        )
        self.pin.description = "unpin" if self.chosen in self.pins else "pin"
        self.detail.layout.display = "flex"

    def _toggle_pin(self) -> None:
        (self.pins.remove if self.chosen in self.pins else self.pins.append)(self.chosen)
        self._show_detail()
        self._update() if self.only_pinned.value else self._show_page(self.number)

    def _show_code(self) -> None:
        self.code.value = reproduction_code(self.samples, self.chosen, self.setup)

    def _export(self, kind: str) -> None:
        path = self.folder / f"gallery.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "csv":
            export_rows(self.samples, self.grid).to_csv(path, index=False)
        elif kind == "html":
            path.write_text(export_html(self.samples, self.page, self.models), encoding="utf-8")
        else:
            self.contact_sheet().savefig(path)
        self.status.value = note_html(f"written: {path}")


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Options of a control: ipywidgets takes names or (label, value) pairs, not both."""
    return [(name, name) for name in names]
