"""One sample's walk, step by step: the picture predicted, the KL to each teacher, where their velocities
differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import ipywidgets as ipw
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display

from ...policy import FlowPolicy
from ...prompts import Prompt
from ...rollout import Sampler
from ...thumbnails import webp
from ..figures import model_colors
from ..study_figures import walk_figure
from ..trajectories import Walk, heat, walk_through
from .common import STYLE, Guard, headless, note_html, picture_html, png

LARGE, SMALL = 224, 128  # pixels


class TrajectoryExplorer:
    """`models` maps names to adapters (None: the base). `model` walks ("": the last one), `teachers` are
    asked at every state it visits (None: the others).

    `prompts` are offered for choice, the first walked at once. Headless: the walk's figure and its KL as a
    table.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        models: Mapping[str, str | None],
        prompts: Sequence[Prompt],
        seed: int = 0,
        sampler: Sampler = Sampler(20, "sde"),
        model: str = "",
        teachers: Sequence[str] | None = None,
    ):
        if not prompts:
            raise ValueError("there is no prompt to walk; give one or more")
        self.policy, self.models, self.prompts = policy, dict(models), list(prompts)
        model = model or list(models)[-1]
        teachers = [m for m in models if m != model] if teachers is None else list(teachers)
        self.walk: Walk = walk_through(
            policy, self.prompts[0], seed, sampler, self.models, model, teachers
        )
        if not headless():
            self._build()
            self._walked()

    def figure(self):
        """The walk as a still picture (matplotlib)."""
        w = self.walk
        how = w.sampler.kind.upper() + (
            "" if w.sampler.kind == "ode" else f", noise level {w.sampler.noise_level:g}"
        )
        return walk_figure(w, f"{w.model}, seed {w.seed}, {how}: {w.prompt.text}")

    def table(self):
        """Sigma and KL to each teacher, a row a step."""
        return self.walk.kl.assign(sigma=self.walk.sigmas)[["sigma", *self.walk.kl]]

    def _ipython_display_(self) -> None:
        if headless():
            figure = self.figure()
            display(figure, self.table().round(4))
            plt.close(figure)
        else:
            display(self.box)

    def _build(self) -> None:
        w, self.guard = self.walk, Guard()
        wide, texts = (
            {"description_width": "80px"},
            [(p.text, i) for i, p in enumerate(self.prompts)],
        )
        self.prompt = ipw.Dropdown(
            options=texts, description="prompt", style=wide, layout=ipw.Layout(width="420px")
        )
        self.seed = ipw.BoundedIntText(
            w.seed, 0, 1 << 30, description="seed", style=wide, layout=ipw.Layout(width="170px")
        )
        self.model = ipw.Dropdown(
            options=list(self.models),
            value=w.model,
            description="who walks",
            style=wide,
            layout=ipw.Layout(width="270px"),
        )
        self.teachers = ipw.SelectMultiple(
            options=list(self.models),
            value=list(w.difference),
            rows=min(5, len(self.models)),
            description="teachers",
            style=wide,
            layout=ipw.Layout(width="270px"),
        )
        self.kind = ipw.ToggleButtons(
            options=[("SDE", "sde"), ("ODE", "ode"), ("CPS", "cps")],
            value=w.sampler.kind,
            style={"button_width": "60px"},
        )
        self.noise = ipw.FloatSlider(
            w.sampler.noise_level,
            min=0.1,
            max=1.2,
            step=0.1,
            description="noise level",
            continuous_update=False,
            style=wide,
            layout=ipw.Layout(width="320px"),
        )
        self.steps = ipw.BoundedIntText(
            w.sampler.steps,
            2,
            100,
            description="steps",
            style=wide,
            layout=ipw.Layout(width="170px"),
        )
        self.step = ipw.IntSlider(
            0,
            0,
            len(w.sigmas) - 1,
            description="step",
            readout=False,
            style=wide,
            layout=ipw.Layout(width="420px"),
        )
        self.play = ipw.Play(min=0, max=len(w.sigmas) - 1, interval=250)
        ipw.jslink((self.play, "value"), (self.step, "value"))
        ipw.jslink((self.play, "max"), (self.step, "max"))
        self.pictures, self.bars, self.said = ipw.HTML(), ipw.HTML(), ipw.HTML()
        # Beside each other where there is room, below each other where there is none.
        below = ipw.Layout(flex_flow="row wrap", align_items="flex-start")
        how = ipw.VBox(
            [
                ipw.HBox([self.prompt, self.seed, self.steps]),
                ipw.HBox([self.model, self.kind, self.noise]),
            ]
        )
        self.box = ipw.VBox(
            [
                ipw.HTML(STYLE),
                ipw.HBox([how, self.teachers]),
                self.guard.box,
                ipw.HBox([self.play, self.step, self.said]),
                ipw.HBox([self.pictures, self.bars], layout=below),
            ]
        )
        self.box.add_class("fo")
        self.box.add_class("fo-explorer")
        for control in (
            self.prompt,
            self.seed,
            self.model,
            self.teachers,
            self.kind,
            self.noise,
            self.steps,
        ):
            control.observe(self.guard(self._again), "value")
        self.step.observe(self.guard(self._look), "value")

    def _again(self) -> None:
        self.said.value = note_html("walking …")
        sampler = Sampler(
            self.steps.value, self.kind.value, self.noise.value, self.walk.sampler.guidance
        )
        prompt, teachers = self.prompts[self.prompt.value], list(self.teachers.value)
        self.walk = walk_through(
            self.policy, prompt, self.seed.value, sampler, self.models, self.model.value, teachers
        )
        self._walked()

    def _walked(self) -> None:
        last = len(self.walk.sigmas) - 1
        self.step.value = min(self.step.value, last)
        self.play.max = self.step.max = last
        self._look()

    def _look(self) -> None:
        """Write the step at the scrubber: pictures are there already, nothing is drawn anew."""
        w, at = self.walk, self.step.value
        top = max((field.max() for field in w.difference.values()), default=1.0)
        figures = [
            (
                picture_html(webp(w.clean[at]), f"Predicted clean picture. {w.alt(at)}", LARGE),
                "predicted clean picture",
            ),
            (
                picture_html(webp(w.noisy[at]), f"Noisy latent, decoded. {w.alt(at)}", SMALL),
                "noisy latent, decoded",
            ),
        ]
        for name, field in w.difference.items():
            rms = (field[at] ** 2).mean() ** 0.5
            figures.append(
                (
                    picture_html(
                        png(heat(field[at], top)),
                        f"Difference of velocities to {name}, root mean square {rms:.3f}",
                        SMALL,
                        "png",
                    ),
                    f"Δv to {escape(name)}, rms {rms:.2f}",
                )
            )
        scale = (
            f'<div class="fo-note fo-dim">Δv: black is 0, the brightest {top:.2f}, over all steps</div>'
            if w.difference
            else ""
        )
        tiles = [
            '<figure class="fo-tile" style="width: '
            f'{SMALL if i else LARGE}px">{picture}<figcaption>{caption}</figcaption></figure>'
            for i, (picture, caption) in enumerate(figures)
        ]
        self.pictures.value = (
            f'<div class="fo-pictures" style="max-width: 560px">{"".join(tiles)}</div>{scale}'
        )
        self.bars.value = self._bars(at) if w.difference else ""
        self.said.value = note_html(f"step {at + 1} of {len(w.sigmas)}, σ {w.sigmas[at]:.2f}")

    def _bars(self, at: int) -> str:
        w, colors = self.walk, model_colors(self.walk.kl)
        positive = w.kl.to_numpy()[w.kl.to_numpy() > 0]
        low, high = (positive.min() / 2, positive.max()) if len(positive) else (1.0, 2.0)

        def cell(name, value):  # on a log scale: the KL of the steps differs by orders of magnitude
            wide = 70 * np.log(value / low) / np.log(high / low) if value > 0 else 0.0
            bar = (
                f'<span class="fo-bar" style="width: {wide:.0f}px; background: '
                f'{colors[name]}"></span>{value:.3g}'
            )
            return f"<td>{bar if value == value else 'no noise'}</td>"

        rows = "".join(
            f"<tr{' aria-current=step' if k == at else ''}><td>{k + 1}</td><td>{sigma:.2f}</td>"
            f"{''.join(cell(*c) for c in w.kl.iloc[k].items())}</tr>"
            for k, sigma in enumerate(w.sigmas)
        )
        note = ", as if with the SDE's noise" if w.sampler.kind == "ode" else ""
        return (
            f'<table class="fo-bars"><caption>KL of a step to each teacher, nats{note} (bars: log '
            "scale)</caption>"
            f"<tr><th>step</th><th>σ</th>{''.join(f'<th>{escape(n)}</th>' for n in w.kl)}</tr>{rows}</table>"
        )
