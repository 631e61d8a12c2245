"""A gallery of a run's samples: search, filter, sort, compare, export.

`select` gives the rows to show as a grid of positions in the table of samples: a row per prompt and
noise, a column per model. The contact sheet, the HTML page, the CSV and the live widget are all
made from such a grid.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path

import ipywidgets as ipw
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from ..data import Prompt
from ..files import read_thumbnail
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
    """Which samples to show, and in what order. "" does not filter.

    search      words that must all be in the prompt
    task, tag   exactly this one
    model       whose scores sort; "" is the last
    sort, minus a reward, and a model (or `TEACHER`) whose score is subtracted. Without `sort` the
                table's order stays, the tasks alternating. Samples without the score come last.
    pinned      only these rows of `Samples.rows`
    """

    search: str = ""
    task: str = ""
    tag: str = ""
    model: str = ""
    sort: str = ""
    minus: str = ""
    descending: bool = True
    pinned: Sequence[int] | None = None


class Samples:
    """A table of samples as `evaluate` makes it with thumbnails, the `folder` that its images are
    in, and what `about.json` records of how they were sampled.

    Samples with a `train_seed` above 0 are a model of their own, `MODEL#SEED`; those without an
    image are left out. `rows` has a row per prompt and noise, and `row_of` its number for each
    sample; `grid` has the same rows and, for every model and `TEACHER`, the positions in `table`
    and `records`, -1 for none. `changes`: the scores minus those of `baseline`, the base or else
    the first model, on the same prompt and noise.
    """

    def __init__(self, table: pd.DataFrame, folder: str | Path, about: Mapping | None = None):
        table = table.dropna(subset="image").drop(columns="embedding", errors="ignore")
        table = table.reset_index(drop=True)
        if "train_seed" in table:
            names = table["model"] + "#" + table["train_seed"].astype(str)
            table["model"] = table["model"].where(table["train_seed"] == 0, names)
        self.table, self.folder, self.about = table, Path(folder), dict(about or {})
        self.models, self.rewards = list(table["model"].unique()), rewards_in(table)
        self.records = table.to_dict("records")  # faster to get than a row of a DataFrame
        rows = table.drop_duplicates(KEYS)
        turn = rows.groupby("task").cumcount()  # tasks alternate: a first page shows all of them
        self.rows = rows.loc[turn.sort_values(kind="stable").index].reset_index(drop=True)
        keys = pd.MultiIndex.from_frame(table[KEYS])
        rows = pd.MultiIndex.from_frame(self.rows[KEYS])
        self.row_of = rows.get_indexer(keys)
        grid = table.reset_index().pivot(index=KEYS, columns="model", values="index")
        grid = grid.reindex(rows).reset_index(drop=True)
        for task, numbers in self.rows.groupby("task").groups.items():
            # the model that was trained for the task, by the name the notebooks give it
            grid.loc[numbers, TEACHER] = grid.loc[numbers].get(f"{task} expert", np.nan)
        self.grid = grid[[*self.models, TEACHER]].fillna(-1).astype(int)
        self.baseline = "base" if "base" in self.models else self.models[0]
        base = table[table["model"] == self.baseline].set_index(KEYS)[self.rewards]
        self.changes = table[self.rewards] - base.reindex(keys).to_numpy()

    def scores(self, reward: str, model: str) -> np.ndarray:
        """(rows,): NaN where there is no sample or no score."""
        positions = self.grid[model].to_numpy()
        return np.where(positions < 0, np.nan, self.table[reward].to_numpy(float)[positions])

    def badges(self, position: int) -> dict[str, str]:
        """By reward the score and, but for the baseline, its difference to the baseline:
        "OCR 0.50 ▲ +0.25"."""
        row, badges = self.records[position], {}
        for reward, change in self.changes.iloc[position].items():
            if pd.notna(row[reward]):
                badges[reward] = f"{reward} {row[reward]:.2f}"
                if row["model"] != self.baseline and pd.notna(change):
                    arrow = "▲" if change > 0 else "▼" if change < 0 else "="
                    badges[reward] += f" {arrow} {change:+.2f}"
        return badges

    def describe(self, position: int) -> str:
        """The alternative text of an image."""
        row = self.records[position]
        scores = [f"{name} {row[name]:.2f}" for name in self.rewards if pd.notna(row[name])]
        return f"{row['model']}, seed {row['seed']}: {row['prompt']}; {', '.join(scores)}"

    def label(self, row: int) -> str:
        """What the samples of one of `rows` have in common: prompt, task and seed."""
        return "{prompt}\n{task}, seed {seed}".format(**self.rows.iloc[row])


def load_samples(folder: str | Path) -> Samples:
    """`samples.parquet` of a notebook's results, with images. Raises FileNotFoundError, naming the
    file, or ValueError with what is missing."""
    folder = Path(folder)
    about = json.loads((folder / "images" / "about.json").read_text())
    # the table calls training 0 of a model by the model's name
    about["adapters"] = {m.removesuffix("#0"): a for m, a in about["adapters"].items()}
    return Samples(pd.read_parquet(folder / "samples.parquet"), folder, about)


def select(samples: Samples, query: Query, models: Sequence[str] | None = None) -> np.ndarray:
    """(rows, models): the positions in `samples.table` to show, -1 for none; `models` are the
    columns (None: all)."""
    models = list(samples.models if models is None else models)
    keep = (samples.grid[models] >= 0).any(axis=1)
    for name in ("task", "tag"):
        if value := getattr(query, name):
            keep &= samples.rows[name] == value
    for word in query.search.split():
        keep &= samples.rows["prompt"].str.contains(word, case=False, regex=False)
    if query.pinned is not None:
        keep &= samples.rows.index.isin(query.pinned)
    rows = np.flatnonzero(keep)
    if query.sort:
        scores = samples.scores(query.sort, query.model or samples.models[-1])
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
    """The samples of a grid, row by row, with the difference of each score to the baseline on the
    same prompt and noise (`REWARD - base`)."""
    table = samples.table.join(samples.changes.add_suffix(f" - {samples.baseline}"))
    table = table.iloc[grid[grid >= 0]].reset_index(drop=True)
    table.insert(0, "row", np.argwhere(grid >= 0)[:, 0])
    return table


def row_labels(samples: Samples, grid: np.ndarray) -> list[str]:
    return [samples.label(samples.row_of[max(positions)]) for positions in grid]


def plot_contact_sheet(samples: Samples, grid: np.ndarray, models: Sequence[str]) -> Figure:
    """A grid as one figure: a column per model, a row per prompt and noise, with each sample's
    scores and their difference to the baseline."""
    images, captions = [None] * grid.size, ["no sample"] * grid.size
    for number, position in enumerate(grid.ravel()):
        if position >= 0:
            images[number] = load_images(samples.table.iloc[[position]], samples.folder)[0]
            captions[number] = "\n".join(samples.badges(position).values())
    return plot_image_grid(images, captions, len(models), "", models, row_labels(samples, grid))


def grid_html(samples: Samples, grid: np.ndarray, models: Sequence[str]) -> str:
    """The same as HTML, the images in it."""
    cells = [label_html(""), *map(label_html, models)]
    for label, positions in zip(row_labels(samples, grid), grid):
        cells += [label_html(label), *(sample_html(samples, p) for p in positions)]
    style = f"grid-template-columns: 150px repeat({len(models)}, minmax(84px, 168px))"
    return f'<div class="fo fo-page" style="{style}">{"".join(cells)}</div>'


def label_html(label: str) -> str:
    """The first line in bold, the rest dimmed."""
    first, _, rest = escape(label).partition("\n")
    return f'<div class="fo-row"><b>{first}</b><br><span class="fo-dim">{rest}</span></div>'


def sample_html(samples: Samples, position: int, width: int = 128) -> str:
    """An image with its scores and their differences to the baseline below."""
    if position < 0:
        return '<div class="fo-note fo-dim">no sample</div>'
    data = read_thumbnail(samples.folder, samples.records[position]["image"])
    image = image_html(data, samples.describe(position), width)
    return tile_html(image, badges_html(samples.badges(position)))


# --- reproduction


def redraw(policy: FlowPolicy, samples: Samples, position: int) -> torch.Tensor:
    """The sample (3, H, W) again, to the last bit on the machine that sampled it: in a batch with
    the samples it was sampled with, because in bfloat16 the rounding of a product depends on the
    size of its batch.

    `policy` needs the adapter and dtype that `about.json` names. Raises ValueError for another
    dtype.
    """
    model, about = samples.records[position]["model"], samples.about
    adapter = about["adapters"][model]
    if policy.precision != about["dtype"]:
        raise ValueError(f"these samples were made in {about['dtype']}; load the policy in it")
    positions, size = np.flatnonzero(samples.table["model"] == model), about["batch"]
    number = int(np.searchsorted(positions, position))
    batch = samples.table.iloc[positions[number - number % size :][:size]]
    prompts = [Prompt(r.prompt, r.task) for r in batch.itertuples()]
    guidance = about["guidance"].get(adapter, about["sampler"]["guidance"])
    sampler = Sampler(**about["sampler"] | {"guidance": guidance})
    images = sample(policy, prompts, batch["seed"].tolist(), sampler, adapter, size)
    return images[number % size]


def reproduction_code(samples: Samples, position: int, setup: str) -> str:
    """A code cell that makes a sample again. `setup` is the code that makes `policy` with the
    adapters that the run did not train itself."""
    adapter = samples.about["adapters"][samples.records[position]["model"]]
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
        self.models = list(models or dict.fromkeys([samples.models[0], *samples.models[-3:]]))
        self.grid, self.number = select(samples, query, self.models), 0
        self.chosen, self.pins = 0, []  # rows of `samples.rows`
        if not self.headless:
            self._build(query)
            self._show_page()

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

    def _build(self, query: Query) -> None:
        samples, rows, control, update = self.samples, self.samples.rows, self.control, self._update
        choices = {
            "task": ["", *rows["task"].unique()],
            "tag": ["", *rows["tag"].unique()],
            "sort": ["", *samples.rewards],
            "model": ["", *samples.models],
            "minus": ["", TEACHER, *samples.models],
            "descending": {"highest first": True, "lowest first": False},
        }
        # named by the fields of Query, whose values they hold
        c = self.controls = {
            name: control(ipw.Dropdown, name, update, options=options, value=getattr(query, name))
            for name, options in choices.items()
        }
        c["descending"].description = "order"
        prompts = {"options": [*rows["prompt"].unique()], "placeholder": "words of a prompt"}
        c["search"] = control(ipw.Combobox, "search", update, value=query.search, **prompts)
        columns = {"options": samples.models, "value": self.models}
        self.columns = control(ipw.SelectMultiple, "models", update, **columns)
        self.only_pinned = control(ipw.Checkbox, "pinned only", update, "270px")
        self.turn = control(ipw.BoundedIntText, "page", self._show_page, "150px", min=1, value=1)
        self.count, self.status, self.zoom = ipw.HTML(), ipw.HTML(), ipw.HTML()
        # made once: a page is written into them
        self.rows = [ipw.HTML() for _ in range(self.size)]
        self.enlarge = [self.button("enlarge", partial(self._choose, n)) for n in range(self.size)]
        options = {"options": samples.models, "value": self.models[-1]}
        self.model = control(ipw.ToggleButtons, "", self._show_detail, "auto", **options)
        self.pin = self.button("pin", self._toggle_pin)
        self.code = ipw.Textarea(layout=ipw.Layout(width="640px", height="110px"))
        tools = [self.model, self.zoom, self.pin, self.code]
        self.detail = ipw.VBox(tools, layout=ipw.Layout(display="none"))
        exports = {"contact sheet": "png", "HTML of the page": "html", "CSV of all pages": "csv"}
        self.exports = [self.button(k, partial(self._export, kind)) for k, kind in exports.items()]
        filters = ipw.VBox([c["search"], c["task"], c["tag"], self.only_pinned])
        order = ipw.VBox([c["sort"], c["model"], c["minus"], c["descending"]])
        body = [widget for row in zip(self.rows, self.enlarge) for widget in row]
        self.box = self.stack(
            "gallery",
            ipw.HBox([filters, order, self.columns]),
            ipw.HBox([self.turn, self.count]),
            self.guard.box,
            *body,
            self.detail,
            ipw.HBox([*self.exports, self.status]),
        )

    # --- callbacks

    def _update(self) -> None:
        """Select by the controls, and show the first page."""
        self.models = list(self.columns.value)
        pinned = self.pins if self.only_pinned.value else None
        values = {name: control.value for name, control in self.controls.items()}
        self.grid = select(self.samples, Query(**values, pinned=pinned), self.models)
        self.turn.value = 1
        self._show_page()

    def _show_page(self) -> None:
        self.turn.max = max(1, -(-len(self.grid) // self.size))
        self.number, samples = self.turn.value - 1, self.samples
        shown = f"{(self.grid >= 0).sum()} of {len(samples.table)} samples"
        self.count.value = note_html(f"of {self.turn.max}; {len(self.grid)} rows, {shown}")
        for number, (row, enlarge) in enumerate(zip(self.rows, self.enlarge)):
            grid = self.page[number : number + 1]
            row.value = grid_html(samples, grid, self.models) if len(grid) else ""
            enlarge.layout.visibility = "visible" if len(grid) else "hidden"
            pinned = len(grid) and samples.row_of[grid.max()] in self.pins
            enlarge.description = "enlarge ★" if pinned else "enlarge"

    def _choose(self, number: int) -> None:
        self.chosen = self.samples.row_of[self.page[number].max()]
        self._show_detail()

    def _show_detail(self) -> None:
        """The chosen row's sample of a model, large, and the code that samples it again."""
        samples, position = self.samples, self.samples.grid[self.model.value][self.chosen]
        label = label_html(samples.label(self.chosen))
        self.zoom.value = label + sample_html(samples, position, 320)
        self.code.value = reproduction_code(samples, position, self.setup) if position >= 0 else ""
        self.pin.description = "unpin" if self.chosen in self.pins else "pin"
        self.detail.layout.display = "flex"

    def _toggle_pin(self) -> None:
        (self.pins.remove if self.chosen in self.pins else self.pins.append)(self.chosen)
        self._show_detail()
        self._update() if self.only_pinned.value else self._show_page()

    def _export(self, kind: str) -> None:
        path = self.folder / f"gallery.{kind}"
        if kind == "csv":
            export_rows(self.samples, self.grid).to_csv(path, index=False)
        elif kind == "html":
            page = grid_html(self.samples, self.page, self.models)
            page = f'<!doctype html><meta charset="utf-8">{STYLE}{page}'
            path.write_text(page, encoding="utf-8")
        else:
            self.contact_sheet().savefig(path)
        self.status.value = note_html(f"written: {path}")
