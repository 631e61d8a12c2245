"""A training watched from beside it: curves, the newest samples, and a button that stops it with a
checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import ipywidgets as ipw
import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ...files import read_lines
from ...jobs.launch import InProcess
from ...jobs.processes import Launched
from ..figures import COLORS, training_curves
from ..gallery import Query, Samples, contact_sheet, select
from ..looks import looks_of
from .common import STYLE, Guard, badge_html, headless, note_html, picture_html, png

# seconds between two looks into the folder; pixels of a picture, and of its column
EVERY, TILE, WIDTH = 1.0, 96, 168
_ALL = Query()


class TrainingMonitor:
    """Starts a training (see `launch`) and follows its folder: curves of the metrics `columns`, and samples
    before and now, the same noise in a column.

    Headless: it is trained to its end when the monitor is shown, then the curves and a sheet of all looks.
    `wait` waits for it anywhere.
    """

    def __init__(
        self, training: InProcess | Launched, columns: Sequence[str] = ("loss",), title: str = ""
    ):
        if not columns:
            raise ValueError("a monitor needs at least one metric to draw, such as loss")
        self.training, self.columns, self.title, self._drawn = (
            training,
            list(columns),
            title or training.folder.name,
            None,
        )
        if not headless():
            self._build()
            self._start()

    def table(self) -> pd.DataFrame:
        """The metrics so far, a row an iteration."""
        return read_lines(self.training.folder / "metrics.jsonl")

    def sheet(self) -> Image.Image | None:
        """All looks so far as one picture: a column each, a row per prompt and noise. None: there are
        none."""
        looks = looks_of(self.training.folder)
        if looks is None:
            return None
        shown = looks.models if len(looks.models) < 7 else [*looks.models[:1], *looks.models[-5:]]
        return contact_sheet(looks, select(looks, _ALL, shown), shown, TILE)

    def wait(self) -> pd.DataFrame:
        """Wait for its end: the metrics. Raises RuntimeError with what it failed by."""
        if self.training.state == "waiting":
            self.training.start()
        self.training.wait()
        return self.table()

    def _ipython_display_(self) -> None:
        if not headless():
            display(self.box)
            return
        rows, sheet = self.wait(), self.sheet()
        figure = training_curves({self.title: rows}, self.columns, self._told(rows))
        display(figure, *([sheet] if sheet else []), rows.tail(5).round(4))
        plt.close(figure)

    def _told(self, rows: pd.DataFrame) -> str:
        spent = f", {rows['seconds'].iloc[-1]:.0f} s" if len(rows) else ""
        return f"{self.title}: {len(rows)} of {self.training.iterations} iterations{spent}"

    def _build(self) -> None:
        # One guard for the buttons and one for the follower: a click is never lost because the follower is
        # drawing.
        self.guard, self.following = Guard(), Guard()
        self.stop = ipw.Button(
            description="■ stop",
            tooltip="end after this iteration, with a checkpoint",
            layout=ipw.Layout(width="90px"),
        )
        self.go_on = ipw.Button(
            description="▶ go on", tooltip="from the checkpoint", layout=ipw.Layout(width="90px")
        )
        self.bar, self.said = (
            ipw.IntProgress(0, 0, self.training.iterations, layout=ipw.Layout(width="240px")),
            ipw.HTML(),
        )
        self.curves, self.samples = ipw.HTML(), ipw.HTML()
        self.box = ipw.VBox(
            [
                ipw.HTML(STYLE),
                ipw.HBox([self.stop, self.go_on, self.bar, self.said]),
                self.guard.box,
                self.following.box,
                self.curves,
                self.samples,
            ]
        )
        self.box.add_class("fo")
        self.box.add_class("fo-monitor")
        self.stop.on_click(self.guard(self._stop))
        self.go_on.on_click(self.guard(self._start))

    def _stop(self) -> None:
        self.training.stop()
        self.stop.disabled, self.stop.description = True, "stopping …"

    def _start(self) -> None:
        self.training.start()
        self.stop.disabled, self.stop.description, self.go_on.disabled = False, "■ stop", True
        self._follower = threading.Thread(target=self._follow, daemon=True)
        self._follower.start()

    def _follow(self) -> None:
        look, pause = self.following(self._refresh), threading.Event()
        while self.training.state == "running":
            look()
            pause.wait(EVERY)
        look()  # what came after the last look
        self.stop.disabled, self.stop.description, self.go_on.disabled = (
            True,
            "■ stop",
            self.training.state not in ("stopped", "failed"),
        )

    def _refresh(self) -> None:
        state, rows, looks = self.training.state, self.table(), looks_of(self.training.folder)
        self.bar.value = len(rows)
        self.said.value = note_html(f"{state}: {self._told(rows)}")
        if len(rows) and (len(rows), state) != self._drawn:
            there = [c for c in self.columns if c in rows] or ["loss"]
            figure = Figure(layout="constrained")  # not pyplot's: this is a thread
            FigureCanvasAgg(figure)
            training_curves({self.title: rows}, there, self._told(rows), figure)
            width, height = figure.canvas.get_width_height()
            figure.canvas.draw()
            picture = Image.frombuffer(
                "RGBA", (width, height), figure.canvas.buffer_rgba()
            ).convert("RGB")
            told = ", ".join(f"{c} {rows[c].iloc[-1]:.3g}" for c in there)
            self.curves.value = picture_html(
                png(picture), f"Curves of {self._told(rows)}; last {told}", min(width, 1000), "png"
            )
            self._drawn = len(rows), state
        if looks is not None:
            self.samples.value = "".join(
                self._row(looks, model)
                for model in dict.fromkeys([looks.models[0], *looks.models[-2:]])
            )
        if state == "failed":
            raise RuntimeError(self.training.error)

    def _row(self, looks: Samples, model: str) -> str:
        tiles = []
        for position in select(looks, _ALL, [model])[:, 0].tolist():
            if position >= 0:
                badges = "".join(
                    badge_html(j, v, c, COLORS[j])
                    for j, v, c in looks.scores(position, looks.models[0])
                )
                picture = picture_html(looks.picture(position), looks.alt(position), TILE)
                tiles.append(
                    '<figure class="fo-tile" style="width: '
                    f'{WIDTH}px">{picture}<figcaption>{badges}</figcaption></figure>'
                )
        return f'<div class="fo-head">{model}</div><div class="fo-pictures">{"".join(tiles)}</div>'
