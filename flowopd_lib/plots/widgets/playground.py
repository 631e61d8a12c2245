"""A prompt of one's own on several models, with every reward's eyes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import ipywidgets as ipw
import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import display

from ...policy import FlowPolicy
from ...prompts import Prompt
from ...rewards import Reward
from ...rollout import Sampler
from ..figures import COLORS, image_grid
from ..playground import Trial, draw_findings, prompt_of, table_of, try_prompt
from .common import STYLE, Guard, badge_html, headless, note_html, picture_html, png

SIZE = 256  # pixels


class Playground:
    """`models` maps names to adapters (None: the base); `known` are the prompts whose metadata a typed one
    takes, `text` is tried at once.

    Headless: the pictures with what was found on them, and a table.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        models: Mapping[str, str | None],
        rewards: Mapping[str, Reward],
        text: str,
        known: Sequence[Prompt] = (),
        seed: int = 0,
        sampler: Sampler = Sampler(20),
    ):
        self.policy, self.models, self.rewards, self.known, self.sampler = (
            policy,
            dict(models),
            dict(rewards),
            list(known),
            sampler,
        )
        self._try(text, seed, list(models), sampler.steps)
        if not headless():
            self._build(text, seed)
            self._show()

    def _try(self, text: str, seed: int, models: Sequence[str], steps: int) -> None:
        prompt, self.scored = prompt_of(text, self.rewards, self.known)
        s = self.sampler
        self.trials: list[Trial] = try_prompt(
            self.policy,
            prompt,
            self.rewards,
            {m: self.models[m] for m in models},
            Sampler(steps, s.kind, s.noise_level, s.guidance),
            seed,
        )

    def figure(self):
        """The trials as a still picture (matplotlib)."""
        images = [
            torch.from_numpy(np.asarray(draw_findings(t)) / 255.0).permute(2, 0, 1)
            for t in self.trials
        ]
        captions = [
            t.model + "\n" + "\n".join(f"{name} {value:.2f}" for name, value in t.scores.items())
            for t in self.trials
        ]
        return image_grid(
            torch.stack(images),
            captions,
            min(6, len(images)),
            f"{self.trials[0].prompt.text} (seed {self.trials[0].seed})",
        )

    def table(self):
        """A row a model: scores, what was read, what was seen, what GenEval found wrong."""
        return table_of(self.trials)

    def _ipython_display_(self) -> None:
        if headless():
            figure = self.figure()
            display(figure, self.table().round(3))
            plt.close(figure)
        else:
            display(self.box)

    def _build(self, text: str, seed: int) -> None:
        self.guard, narrow = Guard(), {"description_width": "60px"}
        # Enter or leaving the field is the end of typing; every key would draw anew
        self.text = ipw.Text(
            text,
            description="prompt",
            continuous_update=False,
            style=narrow,
            layout=ipw.Layout(width="560px"),
        )
        self.seed = ipw.BoundedIntText(
            seed, 0, 1 << 30, description="seed", style=narrow, layout=ipw.Layout(width="160px")
        )
        self.steps = ipw.BoundedIntText(
            self.sampler.steps,
            1,
            100,
            description="steps",
            style=narrow,
            layout=ipw.Layout(width="160px"),
        )
        self.chosen = ipw.SelectMultiple(
            options=list(self.models),
            value=list(self.models),
            rows=min(6, len(self.models)),
            description="models",
            style=narrow,
            layout=ipw.Layout(width="270px"),
        )
        self.marks = ipw.Checkbox(True, description="draw what was read and seen", indent=False)
        self.again = ipw.Button(
            description="try it", button_style="primary", layout=ipw.Layout(width="100px")
        )
        self.next = ipw.Button(description="another seed", layout=ipw.Layout(width="110px"))
        self.said, self.body = ipw.HTML(), ipw.HTML()
        controls = ipw.VBox([self.marks, ipw.HBox([self.again, self.next])])
        self.box = ipw.VBox(
            [
                ipw.HTML(STYLE),
                ipw.HBox([self.text, self.seed, self.steps]),
                ipw.HBox([self.chosen, controls]),
                self.said,
                self.guard.box,
                self.body,
            ]
        )
        self.box.add_class("fo")
        self.box.add_class("fo-playground")
        for control in (self.text, self.seed, self.steps, self.chosen):
            control.observe(self.guard(self._run), "value")
        self.again.on_click(self.guard(self._run))
        self.next.on_click(self.guard(self._next))
        self.marks.observe(self.guard(self._show), "value")

    def _next(self) -> None:
        self.seed.value += 1
        self._run()

    def _run(self) -> None:
        self.said.value = note_html("drawing …")
        try:
            self._try(self.text.value, self.seed.value, self.chosen.value, self.steps.value)
        finally:
            self.said.value = ""
        self._show()

    def _show(self) -> None:
        self.said.value = note_html(self.scored)
        self.body.value = (
            '<div class="fo-pictures">' + "".join(self._tile(t) for t in self.trials) + "</div>"
        )

    def _tile(self, trial: Trial) -> str:
        scores = "".join(
            badge_html(name, value, float("nan"), COLORS[name])
            for name, value in trial.scores.items()
        )
        seen = ", ".join(f"{d.color or ''} {d.label}".strip() for d in trial.seen) or "nothing"
        told = [
            f"read: {trial.read or 'nothing'}",
            f"seen: {seen}",
            *([trial.verdict] if trial.verdict else []),
        ]
        return (
            f'<figure class="fo-tile" style="width: {SIZE}px"><div '
            f'class="fo-head">{escape(trial.model)}</div>'
            f"{picture_html(png(draw_findings(trial, SIZE, self.marks.value)), trial.alt, SIZE, 'png')}"
            f'<figcaption>{scores}<div class="fo-row '
            f'fo-dim">{"<br>".join(map(escape, told))}</div></figcaption></figure>'
        )
