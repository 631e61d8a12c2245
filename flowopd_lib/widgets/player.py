"""A trajectory of one sample, step by step: the predicted clean image, and how far each teacher's
velocity is from the model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

import ipywidgets as ipw
import matplotlib
import numpy as np
import pandas as pd
import torch

from ..config import choose
from ..data import Prompt
from ..plots.scores import plot_image_grid
from ..policy import FlowPolicy
from ..rollout import Sampler, trajectory
from ..thumbnails import encode_webp
from .common import Adapters, Viewer, image_html, note_html, tile_html


@dataclass(frozen=True)
class Trajectory:
    """One sample from noise to image in K steps.

    `images`, (K, 3, H, W) in [0, 1] by what they show: the predicted clean latent and the noisy
    latent, decoded, and for each teacher the difference of its velocity (root mean square over the
    latent's channels; black is 0, the brightest the largest of all). `table`, a row per step: sigma
    and, by teacher, the KL of the step in nats, NaN for a step without noise.
    """

    prompt: Prompt
    seed: int
    model: str
    sampler: Sampler
    images: dict[str, torch.Tensor]
    table: pd.DataFrame

    def describe(self, step: int) -> str:
        """The alternative text of the images of a step."""
        values = ", ".join(f"{name} {value:.3g}" for name, value in self.table.iloc[step].items())
        at = f"{self.model}, seed {self.seed}, step {step + 1} of {len(self.table)}"
        return f"{at}: {self.prompt.text}; KL by teacher, {values}"


@torch.no_grad()
def record_trajectory(
    policy: FlowPolicy,
    prompt: Prompt,
    seed: int,
    sampler: Sampler,
    models: Adapters,
    model: str,
    teachers: Sequence[str],
) -> Trajectory:
    """Sample a trajectory of `model` and evaluate each of `teachers` at every state it visits, all
    of them of `models`. Raises ValueError for an unknown model.

    The KL is what OPD trains on; for an ODE trajectory that of the SDE with the same noise level.
    """
    adapters = {name: models[choose("model", name, models)] for name in (model, *teachers)}
    text, guidance = policy.encode([prompt.text]), sampler.guidance
    steps, rows, differences = [], [], {name: [] for name in teachers}
    for step in trajectory(policy, [prompt], [seed], sampler, adapters[model]):
        weight, row = np.nan, {"sigma": step.sigma}
        if step.sigma_next > 0 and sampler.noise_level > 0:
            weight = float(sampler.step_weights(step.sigma, step.sigma_next, "kl"))
        for name in teachers:
            v_teacher = policy.velocity(step.x_t, step.sigma, text, guidance, adapters[name])
            difference = step.v - v_teacher
            row[name] = weight * difference.square().sum().item()
            differences[name].append(difference[0].square().mean(0).sqrt().cpu().numpy())
        steps.append(step)
        rows.append(row)
    images = {
        "predicted clean image": policy.decode(torch.cat([step.x0_pred for step in steps])).cpu(),
        "noisy latent, decoded": policy.decode(torch.cat([step.x_t for step in steps])).cpu(),
    }
    largest = max((np.max(maps) for maps in differences.values()), default=0.0) or 1.0
    for name, maps in differences.items():
        colors = matplotlib.colormaps["magma"](np.stack(maps) / largest)[..., :3]
        name = f"Δv to {name}, 0 to {largest:.2f}"
        images[name] = torch.from_numpy(colors).permute(0, 3, 1, 2)
    return Trajectory(prompt, seed, model, sampler, images, pd.DataFrame(rows))


class TrajectoryPlayer(Viewer):
    """Of the adapters `models` (name to adapter, None: the base), `model` ("": the last one)
    samples, and `teachers` (None: the others) are evaluated at every state it visits.

    `prompts` are offered for choice, the first sampled at once. Headless:
    eight steps as a figure, and the KL as a table.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        models: Adapters,
        prompts: Sequence[Prompt],
        seed: int = 0,
        sampler: Sampler = Sampler(20, "sde"),
        model: str = "",
        teachers: Sequence[str] | None = None,
    ):
        super().__init__()
        if not prompts:
            raise ValueError("there is no prompt to sample; give one or more")
        self.policy, self.models, self.prompts = policy, dict(models), list(prompts)
        self.teachers = teachers
        self._record(self.prompts[0], seed, model or list(models)[-1], sampler)
        if not self.headless:
            self._build()
            self._show_step()

    def _record(self, prompt: Prompt, seed: int, model: str, sampler: Sampler) -> None:
        others = [name for name in self.models if name != model]
        models = self.models, model, others if self.teachers is None else self.teachers
        self.trajectory = record_trajectory(self.policy, prompt, seed, sampler, *models)

    def still(self) -> list:
        t = self.trajectory
        steps = np.unique(np.linspace(0, len(t.table) - 1, 8).round().astype(int))
        images = [row[step] for row in t.images.values() for step in steps]
        sigmas = [f"σ {sigma:.2f}" for sigma in t.table["sigma"].iloc[steps]]
        title = f"{t.model}, seed {t.seed}, {t.sampler.kind.upper()}: {t.prompt.text}"
        captions = [""] * len(images)
        figure = plot_image_grid(images, captions, len(steps), title, sigmas, list(t.images))
        return [figure, t.table.round(4)]

    def _build(self) -> None:
        t, again, last = self.trajectory, self._sample_again, len(self.trajectory.table) - 1
        number = ipw.BoundedIntText
        prompts = [(prompt.text, i) for i, prompt in enumerate(self.prompts)]
        models = {"options": list(self.models), "value": t.model}
        kinds = {"options": [("SDE", "sde"), ("ODE", "ode"), ("CPS", "cps")]}
        noise = {"min": 0.1, "max": 1.2, "value": t.sampler.noise_level, "continuous_update": False}
        self.prompt = self.control(ipw.Dropdown, "prompt", "420px", again, options=prompts)
        self.seed = self.control(number, "seed", "170px", again, max=1 << 30, value=t.seed)
        self.steps = self.control(number, "steps", "170px", again, min=2, value=t.sampler.steps)
        self.model = self.control(ipw.Dropdown, "model", "270px", again, **models)
        self.kind = self.control(ipw.ToggleButtons, on_change=again, value=t.sampler.kind, **kinds)
        self.noise = self.control(ipw.FloatSlider, "noise level", "320px", again, **noise)
        slider = {"max": last, "readout": False}
        self.step = self.control(ipw.IntSlider, "step", "420px", self._show_step, **slider)
        self.play = ipw.Play(max=last, interval=250)
        for name in ("value", "max"):
            ipw.jslink((self.play, name), (self.step, name))
        self.images, self.table, self.status = ipw.HTML(), ipw.HTML(), ipw.HTML()
        self.box = self.stack(
            "player",
            ipw.HBox([self.prompt, self.seed, self.steps]),
            ipw.HBox([self.model, self.kind, self.noise]),
            self.guard.box,
            ipw.HBox([self.play, self.step, self.status]),
            ipw.HBox([self.images, self.table], layout=ipw.Layout(flex_flow="row wrap")),
        )

    def _sample_again(self) -> None:
        self.status.value = note_html("sampling …")
        values = {"steps": self.steps.value, "kind": self.kind.value}
        sampler = replace(self.trajectory.sampler, noise_level=self.noise.value, **values)
        self._record(self.prompts[self.prompt.value], self.seed.value, self.model.value, sampler)
        last = len(self.trajectory.table) - 1
        self.step.value = min(self.step.value, last)
        self.play.max = self.step.max = last
        self._show_step()

    def _show_step(self) -> None:
        """Show the step at the slider: the images are there already, nothing is sampled."""
        t, step = self.trajectory, self.step.value
        tiles = ""
        for name, images in t.images.items():
            alt = f"{name}. {t.describe(step)}"
            width = 224 if name == "predicted clean image" else 128
            image = image_html(encode_webp(images[step]), alt, width)
            tiles += tile_html(image, escape(name), f"{width}px")
        self.images.value = f'<div class="fo-images">{tiles}</div>'
        sigma = t.table["sigma"].iloc[step]
        self.status.value = note_html(f"step {step + 1} of {len(t.table)}, σ {sigma:.2f}")
        rows = [f"▶ {k + 1}" if k == step else f"{k + 1}" for k in range(len(t.table))]
        table = t.table.set_axis(rows).rename_axis(columns="step").rename(columns={"sigma": "σ"})
        note = ", as if with the SDE's noise" if t.sampler.kind == "ode" else ""
        style = {"classes": "fo-table", "border": 0, "na_rep": "no noise"}
        html = table.to_html(float_format="{:.3g}".format, **style)
        self.table.value = f'<div class="fo-note">KL of a step, nats{note}</div>{html}'
