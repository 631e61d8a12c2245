"""What all widgets share: display with or without a kernel, labelled controls, HTML, visible
errors."""

from __future__ import annotations

import base64
import io
import os
import threading
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path

import ipywidgets as ipw
import matplotlib.pyplot as plt
from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure

from ..plots.style import color_of

Adapters = Mapping[str, str | None]  # by the model's name; None is the base
STYLE = f"<style>{(Path(__file__).parent / 'style.css').read_text()}</style>"


class Guard:
    """Makes callbacks that show their errors in `box` and run one at a time, whatever threads they
    come in (JupyterLab has several). Controls that a callback sets do not trigger their own
    callbacks."""

    def __init__(self):
        self.box, self._lock, self._busy = ipw.HTML(), threading.RLock(), False

    def __call__(self, action: Callable[[], None]) -> Callable[..., None]:
        def run(*_) -> None:
            with self._lock:
                if self._busy:  # only this thread can be here: a callback has set a control
                    return
                self._busy = True
                try:
                    action()
                    self.box.value = ""
                except Exception as error:  # a widget would swallow it
                    message = escape(f"{type(error).__name__}: {error}")
                    self.box.value = f'<div class="fo-problem" role="alert">{message}</div>'
                finally:
                    self._busy = False

        return run


class Viewer:
    """A widget in `box`, shown as the last line of a cell, with the first figure of `still` for
    pages that show no widgets, such as GitHub's. Headless, or without a kernel that could drive it,
    the figures and tables of `still` are displayed instead."""

    def __init__(self):
        self.guard, self.headless = Guard(), bool(os.environ.get("FLOWOPD_HEADLESS"))

    def _ipython_display_(self) -> None:
        if not self.headless and getattr(get_ipython(), "kernel", None):
            self._display_box()
            return
        for item in self.still():
            display(item)
            if isinstance(item, Figure):
                plt.close(item)

    def _display_box(self) -> None:
        file, figure = io.BytesIO(), self.still()[0]
        figure.savefig(file, format="png")
        plt.close(figure)
        image = {"image/png": base64.b64encode(file.getvalue()).decode()}
        display(self.box._repr_mimebundle_() | image, raw=True)

    def control(self, kind: type, label="", on_change=None, width="270px", **options) -> ipw.Widget:
        """An input of a class of ipywidgets, with a label of fixed width; its changes call
        `on_change`."""
        style, layout = {"description_width": "80px"}, ipw.Layout(width=width)
        control = kind(description=label, layout=layout, style=style, **options)
        if on_change:
            control.observe(self.guard(on_change), "value")
        return control

    def button(self, label: str, on_click: Callable[[], None], tooltip: str = "") -> ipw.Button:
        button = ipw.Button(description=label, tooltip=tooltip, layout=ipw.Layout(width="auto"))
        button.on_click(self.guard(on_click))
        return button

    def stack(self, name: str, *rows: ipw.Widget) -> ipw.VBox:
        """The widget's rows, one below the other, with the style of all widgets."""
        box = ipw.VBox([ipw.HTML(STYLE), *rows])
        return box.add_class("fo").add_class(f"fo-{name}")


# --- HTML


def image_html(data: bytes, alt: str, width: int) -> str:
    """WebP or PNG bytes as an image `width` pixels wide."""
    kind = "png" if data.startswith(b"\x89PNG") else "webp"
    source, alt = f"data:image/{kind};base64,{base64.b64encode(data).decode()}", escape(alt)
    return f'<img src="{source}" alt="{alt}" title="{alt}" width="{width}">'


def tile_html(image: str, caption: str, width: str = "auto") -> str:
    tile = f"{image}<figcaption>{caption}</figcaption>"
    return f'<figure class="fo-tile" style="width: {width}">{tile}</figure>'


def note_html(text: str) -> str:
    """A line that a screen reader announces when it changes."""
    return f'<span class="fo-note" role="status">{escape(text)}</span>'


def badges_html(badges: Mapping[str, str]) -> str:
    """A line per reward, with its colour."""
    return "".join(
        f'<span class="fo-badge" style="border-color: {color_of(reward)}">'
        f"<span>{escape(text)}</span></span>"
        for reward, text in badges.items()
    )
