"""A training followed from the notebook by what it writes to its folder: curves of its metrics, the
newest validation samples, and buttons that stop and resume it.

metrics.jsonl               a line per iteration
validation_samples.jsonl    a line per validation sample, as `evaluate` makes it, with the model
                            `iteration N`, the iteration and the seconds of training
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import ipywidgets as ipw
import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure

from ..files import read_lines
from ..plots.training import plot_training_curves
from ..train import METRICS, VALIDATION
from .common import Viewer, image_html, note_html
from .gallery import Query, Samples, grid_html, plot_contact_sheet, select

POLL_SECONDS = 1.0


def load_validation_samples(folder: Path, probes: int) -> tuple | None:
    """The validation samples of a training, a model per probe called `iteration N`, and the grid
    and the models of the first probe and the last ones; None: there are none with images."""
    rows = read_lines(folder / VALIDATION)
    if "image" not in rows:
        return None
    samples = Samples(rows.drop(columns=["iteration", "seconds"]), folder)
    models = list(dict.fromkeys([samples.models[0], *samples.models[-probes:]]))
    return samples, select(samples, Query(), models), models


class TrainingMonitor(Viewer):
    """Starts a training and follows it: curves of the metrics `columns`, and validation samples
    before and now, the same noise in a column. Headless: the training runs to its end, then the
    curves and a contact sheet of its validation samples are shown. `wait` waits for the end
    anywhere.

    `training` has `folder`, `iterations`, `start()` (which resumes from the checkpoint in the
    folder), `stop()`, `state` (waiting, running, stopped, failed, or another name for its regular
    end) and `error` (why it failed).
    """

    def __init__(self, training, columns: Sequence[str] = ("loss",), title: str = ""):
        super().__init__()
        self.training, self.columns = training, list(columns)
        self.title, self._drawn = title or training.folder.name, None
        if not self.headless:
            self._build()
            self._start()

    def metrics(self) -> pd.DataFrame:
        """A row per iteration so far."""
        return read_lines(self.training.folder / METRICS)

    def wait(self) -> pd.DataFrame:
        """Wait for the end: the metrics. Raises RuntimeError if the training failed."""
        training = self.training
        if training.state == "waiting":
            training.start()
        while training.state == "running":
            time.sleep(0.1)
        if training.state == "failed":
            raise RuntimeError(f"the training in {training.folder} failed: {training.error}")
        return self.metrics()

    def still(self) -> list:
        metrics = self.wait()
        shown = [self._plot(metrics), metrics.tail(5).round(4)]
        if probes := load_validation_samples(self.training.folder, 5):
            shown.append(plot_contact_sheet(*probes))
        return shown

    def _display_box(self) -> None:
        display(self.box)  # a still image would wait for the end

    def _plot(self, metrics: pd.DataFrame) -> Figure:
        return plot_training_curves({self.title: metrics}, self.columns, self._progress(metrics))

    def _progress(self, metrics: pd.DataFrame) -> str:
        seconds = f", {metrics['seconds'].iloc[-1]:.0f} s" if len(metrics) else ""
        return f"{self.title}: {len(metrics)} of {self.training.iterations} iterations{seconds}"

    def _build(self) -> None:
        self.stop = self.button("■ stop", self._stop, "after this iteration")
        self.resume = self.button("▶ resume", self._start, "from the checkpoint")
        self.status, self.curves, self.samples = ipw.HTML(), ipw.HTML(), ipw.HTML()
        controls = ipw.HBox([self.stop, self.resume, self.status])
        self.box = self.stack("monitor", controls, self.guard.box, self.curves, self.samples)

    def _stop(self) -> None:
        self.training.stop()
        self.stop.disabled = True

    def _start(self) -> None:
        self.training.start()
        self.stop.disabled, self.resume.disabled = False, True
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        refresh = self.guard(self._refresh)
        while self.training.state == "running":
            refresh()
            time.sleep(POLL_SECONDS)
        refresh()  # what was written after the last time
        self.stop.disabled = True
        self.resume.disabled = self.training.state not in ("stopped", "failed")

    def _refresh(self) -> None:
        state, metrics = self.training.state, self.metrics()
        progress = self._progress(metrics)
        self.status.value = note_html(f"{state}: {progress}")
        if len(metrics) and (len(metrics), state) != self._drawn:
            self._drawn = len(metrics), state
            file = io.BytesIO()
            self._plot(metrics).savefig(file, format="png")
            self.curves.value = image_html(file.getvalue(), f"Curves of {progress}", 900)
        if probes := load_validation_samples(self.training.folder, 2):
            self.samples.value = grid_html(*probes)
        if state == "failed":
            raise RuntimeError(self.training.error)
