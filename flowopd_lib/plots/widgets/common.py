"""What all widgets share: their look, which takes the colours of JupyterLab's theme, pictures as HTML, and
errors that are seen."""

from __future__ import annotations

import base64
import io
import os
import threading
from collections.abc import Callable
from html import escape

import ipywidgets as ipw
from PIL import Image

STYLE = """<style>
.fo-tile { margin: 0; line-height: 1.35; }
.fo img { display: block; image-rendering: pixelated; background: var(--jp-layout-color2);
  border: 1px solid var(--jp-border-color1); border-radius: 3px; }
.fo-tile figcaption, .fo-row, .fo-note { color: var(--jp-ui-font-color1); font-size: 12px; }
.fo-badge { display: block; padding-left: 5px; border-left: 4px solid; margin: 2px 0; }
.fo-badge span + span { white-space: nowrap; }
.fo-badge > span { color: var(--jp-ui-font-color1); }
.fo-row { line-height: 1.35; overflow-wrap: anywhere; padding-right: 6px; }
.fo-dim { color: var(--jp-ui-font-color2); }
.fo-head { font-weight: 600; color: var(--jp-ui-font-color0); }
.fo-problem { color: var(--jp-ui-font-color0);
  border-left: 4px solid var(--jp-error-color1); padding: 4px 8px; background: var(--jp-layout-color2); }
.fo .jupyter-button:focus-visible { outline: 2px solid var(--jp-brand-color1); }
.fo-swipe { position: relative; width: max-content; }
.fo-swipe img + img { position: absolute; top: 0; left: 0; }
.fo-pictures { display: flex; flex-wrap: wrap; gap: 14px; }
.fo .fo-bars { border-collapse: collapse; font-size: 12px; color: var(--jp-ui-font-color1);
  max-height: 480px; overflow-y: auto; display: block; margin: 0; }
.fo .fo-bars caption { text-align: left; padding: 0 8px 4px; }
.fo .fo-bars th, .fo .fo-bars td { padding: 1px 10px; text-align: left; white-space: nowrap;
  line-height: 1.35; }
.fo .fo-bars td:has(.fo-bar) { min-width: 130px; }
.fo .fo-bars tr[aria-current] { background: var(--jp-layout-color3); font-weight: 600; }
.fo-bar { display: inline-block; height: 10px; margin-right: 5px; }
.fo select option { color: var(--jp-ui-font-color1); }
</style>"""


def headless() -> bool:
    return bool(os.environ.get("FLOWOPD_HEADLESS"))


def picture_html(picture: bytes, alt: str, width: int, kind: str = "webp", style: str = "") -> str:
    data = base64.b64encode(picture).decode()
    return (
        f'<img src="data:image/{kind};base64,{data}" alt="{escape(alt)}" title="{escape(alt)}" '
        f'width="{width}" style="{style}">'
    )


def png(picture: Image.Image) -> bytes:
    """For pictures that are drawn upon: lossless."""
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


def note_html(text: str) -> str:
    """A line that a screen reader reads out when it changes."""
    return f'<span class="fo-note" role="status">{escape(text)}</span>'


def badge_html(reward: str, score: float, change: float, color: str) -> str:
    """A score and, where there is one, its difference to the base; the sign and an arrow say what a colour
    alone would not."""
    arrow = (
        ""
        if change != change
        else f" <span>{'▲' if change > 0 else '▼' if change < 0 else '='} {change:+.2f}</span>"
    )
    return (
        f'<span class="fo-badge" style="border-color: {color}"><span>{escape(reward)} '
        f"{score:.2f}</span>{arrow}</span>"
    )


class Guard:
    """Callbacks whose errors are shown in `box`, one at a time whatever threads they come in (JupyterLab has
    several). One that sets other controls does not set off their callbacks too."""

    def __init__(self):
        self.box, self._turn, self._owner = ipw.HTML(), threading.Lock(), None

    def __call__(self, act: Callable[[], None]) -> Callable[..., None]:
        def run(*_) -> None:
            if self._owner == threading.get_ident():
                return
            with self._turn:
                self._owner = threading.get_ident()
                try:
                    self.box.value = ""
                    act()
                except Exception as error:  # whatever it is, a widget would swallow it
                    self.box.value = (
                        f'<div class="fo-problem" role="alert">{escape(type(error).__name__)}: '
                        f"{escape(str(error))}</div>"
                    )
                finally:
                    self._owner = None

        return run
