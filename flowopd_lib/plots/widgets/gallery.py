"""A gallery of a run's samples: search, filter, sort, compare, take away."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path

import ipywidgets as ipw
import numpy as np
from IPython.display import display

from ..figures import COLORS
from ..gallery import TEACHER, Query, Samples, code_of, contact_sheet, page_of, rows_of, select
from .common import STYLE, Guard, badge_html, headless, note_html, picture_html

# pixels, thrice; prompts listed at once, more are found by searching
TILE, COLUMN, ZOOM, PROMPTS_SHOWN = 128, 168, 320, 300
NARROW = 84  # pixels that a column shrinks to where many models stand beside the file browser
FLEX = ipw.Layout(width="auto")


class SampleGallery:
    """Models as columns, a prompt and its noise a row; every picture with each reward's score and its
    difference to the base.

    `models` are the columns to begin with (None: the first and the last three), `query` what is shown (and
    all of it, headless), `rows` a page's.
    `setup` is the code that makes `policy` for `code_of`; exports go to the folder `out`. Shown by being the
    last line of a cell.
    """

    def __init__(
        self,
        samples: Samples,
        models: Sequence[str] | None = None,
        query: Query = Query(),
        rows: int = 3,
        setup: str = "",
        out: str | Path = ".",
    ):
        self.samples, self.size, self.setup, self.out = samples, rows, setup, Path(out)
        self.models = list(models or dict.fromkeys([samples.models[0], *samples.models[-3:]]))
        self.query, self.number, self.chosen, self.pins = query, 0, -1, []
        self.grid = select(samples, query, self.models)
        if not headless():
            self._build()
            self._fill()

    @property
    def page(self) -> np.ndarray:
        return page_of(self.grid, self.number, self.size)

    def sheet(self):
        """The page as one picture (PIL)."""
        return contact_sheet(self.samples, self.page, self.models)

    def table(self):
        """Every sample that the filter lets through, in the gallery's order."""
        return rows_of(self.samples, self.grid)

    def _ipython_display_(self) -> None:
        if headless():
            display(self.sheet(), rows_of(self.samples, self.page).drop(columns="picture").round(3))
        else:
            display(self.box)

    def _build(self) -> None:
        s, q, self.guard = self.samples, self.query, Guard()

        def same(names):  # ipywidgets takes names or pairs, not both
            return [(name, name) for name in names]

        choice = partial(
            ipw.Dropdown, layout=ipw.Layout(width="210px"), style={"description_width": "70px"}
        )
        self.search = ipw.Text(
            q.search,
            description="search",
            placeholder="words of a prompt",
            layout=ipw.Layout(width="270px"),
            continuous_update=True,
            style={"description_width": "50px"},
        )
        self.prompt = ipw.Select(rows=18, layout=ipw.Layout(width="270px"))
        self.columns = ipw.SelectMultiple(
            options=s.models,
            value=self.models,
            rows=min(6, len(s.models)),
            description="models",
            layout=ipw.Layout(width="270px"),
            style={"description_width": "50px"},
        )
        self.tag = choice(
            options=[("any", ""), *same(dict.fromkeys(s.tag))], value=q.tag, description="tag"
        )
        self.of = choice(options=s.models, value=q.of or s.models[-1], description="scores of")
        self.sort = choice(
            options=[("the run's order", ""), *same(s.rewards)], value=q.sort, description="sort by"
        )
        others = [
            ("the score itself", ""),
            (f"minus {TEACHER}", TEACHER),
            *[(f"minus {m}", m) for m in s.models],
        ]
        self.against = choice(options=others, value=q.against, description="")
        self.descending = ipw.ToggleButtons(
            options=[("highest first", True), ("lowest first", False)],
            value=q.descending,
            style={"button_width": "104px"},
        )
        first = next(iter(q.ranges), "")
        self.reward = choice(
            options=[("none", ""), *same(s.rewards)], value=first, description="range of"
        )
        self.range = ipw.FloatRangeSlider(
            disabled=True,
            readout_format=".2f",
            layout=ipw.Layout(width="330px"),
            continuous_update=True,
        )
        repeats = sorted(set(s.repeat))
        self.repeat = choice(
            options=[("every seed", ""), *((f"sample {r + 1} of each prompt", r) for r in repeats)],
            description="seeds",
            value="" if q.repeat is None else q.repeat,
            disabled=len(repeats) < 2,
        )
        self.locked = ipw.Checkbox(
            q.locked,
            description="the same noise in a row",
            indent=False,
            layout=ipw.Layout(width="190px"),
        )
        self.only_pinned = ipw.Checkbox(
            False, description="pinned only", indent=False, layout=ipw.Layout(width="110px")
        )
        self.back, self.forth = (
            ipw.Button(description=d, layout=ipw.Layout(width="80px")) for d in ("◀ page", "page ▶")
        )
        self.at, self.count = (
            ipw.BoundedIntText(1, min=1, max=1, layout=ipw.Layout(width="70px")),
            ipw.HTML(),
        )
        self.cells, self.body = {}, ipw.GridBox()
        self.zoom, self.other = (
            ipw.HTML(),
            ipw.Dropdown(
                options=s.models, description="swipe to", style={"description_width": "60px"}
            ),
        )
        self.swipe = ipw.IntSlider(
            0, 0, 100, description="A | B", readout=False, style={"description_width": "40px"}
        )
        self.pin, self.code = (
            ipw.Button(description=d, layout=FLEX) for d in ("pin", "code of this sample")
        )
        self.text = ipw.Textarea(layout=ipw.Layout(width="640px", height="110px", display="none"))
        self.as_sheet, self.as_csv = (
            ipw.Button(description=d, layout=FLEX)
            for d in ("contact sheet of the page", "CSV of the filtered rows")
        )
        self.said = ipw.HTML()
        self.detail = ipw.VBox(
            [self.zoom, ipw.HBox([self.other, self.swipe, self.pin, self.code]), self.text],
            layout=ipw.Layout(display="none"),
        )
        side = ipw.VBox(
            [self.search, self.prompt, self.columns],
            layout=ipw.Layout(width="285px", flex="0 0 auto"),
        )
        main = ipw.VBox(
            [
                ipw.HBox([self.sort, self.against, self.descending]),
                ipw.HBox([self.of, self.reward, self.range]),
                ipw.HBox([self.tag, self.repeat, self.locked, self.only_pinned]),
                ipw.HBox([self.back, self.at, self.forth, self.count]),
                self.guard.box,
                self.body,
            ],
            layout=ipw.Layout(overflow="auto", flex="1 1 0", min_width="0"),
        )
        self.box = ipw.VBox(
            [
                ipw.HTML(STYLE),
                ipw.HBox([side, main]),
                self.detail,
                ipw.HBox([self.as_sheet, self.as_csv, self.said]),
            ]
        )
        self.box.add_class("fo")
        self.box.add_class("fo-gallery")
        self._list_prompts()
        self.prompt.value = next(
            (
                v
                for _, v in self.prompt.options
                if v[2] == q.prompt and q.task in ("", v[0]) and q.split in ("", v[1])
            ),
            ("", "", ""),
        )
        self._set_range(q.ranges.get(first))
        for control in (
            self.tag,
            self.repeat,
            self.of,
            self.sort,
            self.against,
            self.descending,
            self.range,
            self.locked,
            self.only_pinned,
            self.prompt,
            self.columns,
        ):
            control.observe(self.guard(self._changed), "value")
        self.search.observe(self.guard(self._searched), "value")
        self.reward.observe(self.guard(self._rewardd), "value")
        self.at.observe(self.guard(lambda: self._turn(self.at.value - 1)), "value")
        self.back.on_click(self.guard(lambda: self._turn(self.number - 1)))
        self.forth.on_click(self.guard(lambda: self._turn(self.number + 1)))
        for control in (self.other, self.swipe):
            control.observe(self.guard(self._look), "value")
        self.pin.on_click(self.guard(self._pin))
        self.code.on_click(self.guard(self._code))
        self.as_sheet.on_click(self.guard(lambda: self._export("gallery.png")))
        self.as_csv.on_click(self.guard(lambda: self._export("gallery.csv")))

    def _list_prompts(self) -> None:
        """The picker: a line that takes all of a task (and split), below it those of its prompts that have
        the words searched for."""
        words, options = self.search.value.lower().split(), [("all prompts", ("", "", ""))]
        for (task, split), prompts in self.samples.prompts.items():
            found = [p for p in prompts if all(w in p.lower() for w in words)]
            options.append(
                (f"— {task}{f', {split}' if split else ''}: {len(found)} —", (task, split, ""))
            )
            options += [(p, (task, split, p)) for p in found[:PROMPTS_SHOWN]]
            if len(found) > PROMPTS_SHOWN:
                options.append((f"… {len(found) - PROMPTS_SHOWN} more: search", (task, split, "")))
        if options != list(self.prompt.options):
            self.prompt.options = options

    def _set_range(self, value: tuple[float, float] | None = None) -> None:
        self.range.disabled, self.range.layout.visibility = (
            not self.reward.value,
            "visible" if self.reward.value else "hidden",
        )
        if not self.reward.value:
            return
        scores = self.samples.table[self.reward.value]
        low, high = (
            float(np.floor(scores.min() * 100) / 100),
            float(np.ceil(scores.max() * 100) / 100),
        )
        # ipywidgets refuses a minimum above the maximum even for a moment
        self.range.min, self.range.max = min(low, self.range.max), high
        self.range.min, self.range.step, self.range.value = (
            low,
            max((high - low) / 100, 0.01),
            value or (low, high),
        )

    def _searched(self) -> None:
        self._list_prompts()
        self.prompt.value = self.prompt.options[0][1]
        self._changed()

    def _rewardd(self) -> None:
        self._set_range()
        self._changed()

    def _changed(self) -> None:
        task, split, prompt = self.prompt.value or ("", "", "")
        if not self.columns.value:
            raise ValueError(
                "no models are chosen; choose one or more columns (Ctrl or Shift with a click or the arrows)"
            )
        self.models = list(self.columns.value)
        self.query = Query(
            self.search.value,
            task,
            self.tag.value,
            prompt,
            split,
            None if self.repeat.value == "" else self.repeat.value,
            self.of.value,
            {self.reward.value: self.range.value} if self.reward.value else {},
            self.sort.value,
            self.against.value,
            self.descending.value,
            self.locked.value,
            tuple(self.pins) if self.only_pinned.value else None,
        )
        self.grid = select(self.samples, self.query, self.models)
        self._turn(0)

    def _turn(self, number: int) -> None:
        pages = max(1, -(-len(self.grid) // self.size))
        self.number = min(max(number, 0), pages - 1)
        self.at.max, self.at.value = pages, self.number + 1
        self._fill()

    def _fill(self) -> None:
        """Write the page into its tiles; they are made once, and only shown, hidden and written anew."""
        shown, page, pages = [], self.page, max(1, -(-len(self.grid) // self.size))
        self.at.max = pages
        rows = f"{len(self.grid)} row{'s' * (len(self.grid) != 1)}"
        self.count.value = (
            f'<span class="fo-note">of {pages}; {rows}, {int((self.grid >= 0).sum())} of '
            f"{len(self.samples.table)} samples"
            f"{'' if len(self.grid) else ': nothing passes; widen the filter'}</span>"
        )
        self.back.disabled, self.forth.disabled = self.number == 0, self.number == pages - 1
        for row in range(-1, len(page)):
            for column in range(-1, len(self.models)):
                tile, button, cell = self._cell(row, column)
                shown.append(cell)
                if row < 0:
                    tile.value = (
                        ""
                        if column < 0
                        else f'<div class="fo-head">{escape(self.models[column])}</div>'
                    )
                elif column < 0:
                    tile.value = self._label(row, page[row])
                else:
                    position = int(page[row, column])
                    tile.value = self._tile(position)
                    button.disabled, button.tooltip = (
                        position < 0,
                        "" if position < 0 else f"Look at {self.samples.alt(position)}",
                    )
                    button.description = "look ★" if position in self.pins else "look"
        if tuple(shown) != self.body.children:
            self.body.layout.grid_template_columns = (
                f"minmax(90px, 150px) repeat({len(self.models)}, minmax({NARROW}px, {COLUMN}px))"
            )
            self.body.children = shown

    def _cell(self, row: int, column: int) -> tuple[ipw.HTML, ipw.Button, ipw.Widget]:
        if (row, column) not in self.cells:
            tile, button = (
                ipw.HTML(),
                ipw.Button(layout=ipw.Layout(width="95%", max_width=f"{TILE}px", height="24px")),
            )
            button.on_click(self.guard(lambda: self._choose(int(self.page[row, column]))))
            label = row < 0 or column < 0
            self.cells[row, column] = (
                tile,
                button,
                tile
                if label
                else ipw.VBox(
                    [tile, button], layout=ipw.Layout(margin="0 0 8px 0", overflow="hidden")
                ),
            )
        return self.cells[row, column]

    def _label(self, row: int, positions: np.ndarray) -> str:
        if not self.query.locked:
            return (
                f'<div class="fo-row">rank {self.number * self.size + row + 1} of each model</div>'
            )
        first = self.samples.table.iloc[positions.max()]
        return (
            f'<div class="fo-row">{escape(first["prompt"])}<br><span '
            f'class="fo-dim">{escape(first["task"])}, seed {first["seed"]}</span></div>'
        )

    def _tile(self, position: int, width: int = TILE) -> str:
        if position < 0:
            return '<div class="fo-note fo-dim">no sample</div>'
        badges = "".join(
            badge_html(reward, score, change, COLORS[reward])
            for reward, score, change in self.samples.scores(position)
        )
        picture = picture_html(
            self.samples.picture(position),
            self.samples.alt(position),
            width,
            style="box-sizing: border-box; max-width: 95%; height: auto",
        )
        return f'<figure class="fo-tile">{picture}<figcaption>{badges}</figcaption></figure>'

    def _choose(self, position: int) -> None:
        self.chosen, self.swipe.value, self.text.layout.display = position, 0, "none"
        model = self.samples.table["model"].iat[position]
        self.other.value = next((m for m in self.models if m != model), model)
        self._look()

    def _look(self) -> None:
        """The chosen sample large, and the same noise under another model laid over it as far as the slider
        says."""
        if self.chosen < 0:
            return
        s, position = self.samples, self.chosen
        pictures, other = (
            picture_html(s.picture(position), s.alt(position), ZOOM),
            s.under(position, self.other.value),
        )
        if other >= 0:
            pictures += picture_html(
                s.picture(other),
                s.alt(other),
                ZOOM,
                style=f"clip-path: inset(0 {100 - self.swipe.value}% 0 0)",
            )
        badges = [
            "".join(badge_html(j, v, c, COLORS[j]) for j, v, c in s.scores(p))
            if p >= 0
            else "no sample"
            for p in (position, other)
        ]
        row = s.table.iloc[position]
        self.zoom.value = (
            f'<div class="fo-head">{escape(row["prompt"])} <span class="fo-dim">{escape(row["tag"])}, seed '
            f"{row['seed']}</span></div>"
            f'<div style="display: flex; gap: 16px"><div class="fo-swipe">{pictures}</div>'
            f'<div class="fo-row"><b>A: {escape(row["model"])}</b>{badges[0]}<br><b>B: '
            f"{escape(self.other.value)}</b>{badges[1]}</div></div>"
        )
        self.pin.description = "unpin" if position in self.pins else "pin"
        self.detail.layout.display = "flex"

    def _pin(self) -> None:
        self.pins = (
            [p for p in self.pins if p != self.chosen]
            if self.chosen in self.pins
            else [*self.pins, self.chosen]
        )
        self._look()
        self._changed() if self.only_pinned.value else self._fill()

    def _code(self) -> None:
        self.text.value, self.text.layout.display = (
            code_of(self.samples, self.chosen, self.setup),
            "flex",
        )

    def _export(self, name: str) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        if name.endswith(".csv"):
            self.table().to_csv(self.out / name, index=False)
        else:
            self.sheet().save(self.out / name)
        self.said.value = note_html(f"written: {self.out / name}")
