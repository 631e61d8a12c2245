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
from matplotlib.figure import Figure

from ..files import read_lines
from ..plots.training import plot_training_curves
from ..train import METRICS, VALIDATION
from .common import Guard, Viewer, image_html, note_html
from .gallery import Query, Samples, plot_contact_sheet, sample_html, select

POLL_SECONDS = 1.0


def load_validation_samples(folder: str | Path) -> Samples | None:
    """The validation samples of a training, a model per probe called `iteration N`; None: there are
    none with images."""
    rows = read_lines(Path(folder) / VALIDATION)
    if "image" not in rows:
        return None
    rows = rows.sort_values("iteration", kind="stable")
    return Samples(rows.drop(columns=["iteration", "seconds"]), folder)


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
        metrics, samples = self.wait(), load_validation_samples(self.training.folder)
        shown = [self._plot(metrics), metrics.tail(5).round(4)]
        if samples:
            models = list(dict.fromkeys([samples.models[0], *samples.models[-5:]]))
            shown.append(plot_contact_sheet(samples, select(samples, Query(), models), models))
        return shown

    def _plot(self, metrics: pd.DataFrame) -> Figure:
        return plot_training_curves({self.title: metrics}, self.columns, self._progress(metrics))

    def _progress(self, metrics: pd.DataFrame) -> str:
        seconds = f", {metrics['seconds'].iloc[-1]:.0f} s" if len(metrics) else ""
        return f"{self.title}: {len(metrics)} of {self.training.iterations} iterations{seconds}"

    def _build(self) -> None:
        # one guard for the buttons, one for the thread: no click is lost while the thread draws
        self.follow_guard = Guard()
        self.stop = self.button("■ stop", self._stop, "after this iteration")
        self.resume = self.button("▶ resume", self._start, "from the checkpoint")
        self.bar = ipw.IntProgress(max=self.training.iterations)
        self.status, self.curves, self.samples = ipw.HTML(), ipw.HTML(), ipw.HTML()
        controls = ipw.HBox([self.stop, self.resume, self.bar, self.status])
        errors = [self.guard.box, self.follow_guard.box]
        self.box = self.stack("monitor", controls, *errors, self.curves, self.samples)

    def _stop(self) -> None:
        self.training.stop()
        self.stop.disabled = True

    def _start(self) -> None:
        self.training.start()
        self.stop.disabled, self.resume.disabled = False, True
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        refresh = self.follow_guard(self._refresh)
        while self.training.state == "running":
            refresh()
            time.sleep(POLL_SECONDS)
        refresh()  # what was written after the last time
        self.stop.disabled = True
        self.resume.disabled = self.training.state not in ("stopped", "failed")

    def _refresh(self) -> None:
        state, metrics = self.training.state, self.metrics()
        progress = self._progress(metrics)
        self.bar.value, self.status.value = len(metrics), note_html(f"{state}: {progress}")
        if len(metrics) and (len(metrics), state) != self._drawn:
            self._drawn = len(metrics), state
            file = io.BytesIO()
            self._plot(metrics).savefig(file, format="png")
            self.curves.value = image_html(file.getvalue(), f"Curves of {progress}", 900)
        if samples := load_validation_samples(self.training.folder):
            html = ""
            for model in dict.fromkeys([samples.models[0], *samples.models[-2:]]):
                positions = select(samples, Query(), [model])[:, 0]
                tiles = "".join(sample_html(samples, p, samples.models[0]) for p in positions)
                html += f'<div class="fo-head">{model}</div><div class="fo-images">{tiles}</div>'
            self.samples.value = html
        if state == "failed":
            raise RuntimeError(self.training.error)
