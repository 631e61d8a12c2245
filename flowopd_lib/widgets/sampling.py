"""Widgets that sample with the model in this process: `TrajectoryPlayer`, one sample step by step
with its distance to each teacher, and `Playground`, a prompt of one's own on several models, with
every reward's score, the text that OCR read and the objects that GenEval's detector found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from types import MappingProxyType

import ipywidgets as ipw
import matplotlib
import numpy as np
import pandas as pd
import torch

from ..benchmarks import Benchmark
from ..data import Prompt
from ..evaluate import score
from ..files import encode_webp
from ..plots.scores import format_captions, plot_image_grid
from ..policy import FlowPolicy
from ..rewards import Reward
from ..rollout import Sampler, sample, trajectory
from .common import Adapters, Viewer, badges_html, image_html, note_html, tile_html


def _guided(sampler: Sampler, adapter: str | None, guidance: Mapping[str, float]) -> Sampler:
    return replace(sampler, guidance=guidance.get(adapter, sampler.guidance))


# --- the trajectory player


@torch.no_grad()
def record_trajectory(
    policy: FlowPolicy,
    prompt: Prompt,
    seed: int,
    sampler: Sampler,
    models: Adapters,
    model: str,
    guidance: Mapping[str, float] = MappingProxyType({}),
) -> tuple[dict[str, torch.Tensor], pd.DataFrame]:
    """Sample a trajectory of `model` in K steps and evaluate the others of `models`, as teachers,
    at every state it visits. `guidance`: of an adapter, where it is not the sampler's.

    Returns images, (K, 3, H, W) in [0, 1] by what they show: the predicted clean latent and the
    noisy latent, decoded, and for each teacher the difference of its velocity (root mean square
    over the latent's channels; black is 0, the brightest the largest of all). And a table with a
    row per step, from 1: sigma and, by teacher, the KL of the step in nats, NaN for a step without
    noise. The KL is what OPD trains on; for an ODE trajectory that of the SDE with the same noise
    level.
    """
    teachers = [name for name in models if name != model]
    text, own = policy.encode([prompt.text]), _guided(sampler, models[model], guidance)
    steps, rows, differences = [], [], {name: [] for name in teachers}
    for step in trajectory(policy, [prompt], [seed], own, models[model]):
        weight, row = np.nan, {"sigma": step.sigma}
        if step.sigma_next > 0 and sampler.noise_level > 0:
            weight = float(sampler.step_weights(step.sigma, step.sigma_next, "kl"))
        for name in teachers:
            scale = guidance.get(models[name], sampler.guidance)
            v_teacher = policy.velocity(step.x_t, step.sigma, text, scale, models[name])
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
    return images, pd.DataFrame(rows, index=range(1, len(rows) + 1))


class TrajectoryPlayer(Viewer):
    """`models` maps names to adapters (None: the base); `model` ("": the last one) samples, and the
    others are evaluated at every state it visits. `guidance`: of an adapter, where it is not the
    sampler's.

    `prompts` are offered for choice, the first sampled at once. Headless: eight steps as a figure,
    and the KL as a table.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        models: Adapters,
        prompts: Sequence[Prompt],
        seed: int = 0,
        sampler: Sampler = Sampler(20, "sde"),
        model: str = "",
        guidance: Mapping[str, float] = MappingProxyType({}),
    ):
        super().__init__()
        self.guidance = dict(guidance)
        self.policy, self.models, self.model = policy, dict(models), model or list(models)[-1]
        self._record(prompts[0], seed, sampler)
        if not self.headless:
            self._build(prompts)
            self._show_step()

    def _record(self, prompt: Prompt, seed: int, sampler: Sampler) -> None:
        self.sampled = prompt, seed, sampler
        how = self.models, self.model, self.guidance
        self.images, self.steps = record_trajectory(self.policy, *self.sampled, *how)
        self.title = f"{self.model}, seed {seed}, {sampler.kind.upper()}: {prompt.text}"

    def still(self) -> list:
        shown = np.unique(np.linspace(0, len(self.steps) - 1, 8).round().astype(int))
        images = [row[step] for row in self.images.values() for step in shown]
        sigmas = [f"σ {sigma:.2f}" for sigma in self.steps["sigma"].iloc[shown]]
        captions, rows = [""] * len(images), list(self.images)
        figure = plot_image_grid(images, captions, len(shown), self.title, sigmas, rows)
        return [figure, self.steps.round(4)]

    def _build(self, prompts: Sequence[Prompt]) -> None:
        prompt, seed, sampler = self.sampled
        again, last = self._sample_again, len(self.steps)
        options = [(prompt.text, prompt) for prompt in prompts]
        kinds = {"options": {"SDE": "sde", "ODE": "ode", "CPS": "cps"}, "value": sampler.kind}
        noise = {"min": 0.1, "max": 1.2, "value": sampler.noise_level, "continuous_update": False}
        self.prompt = self.control(ipw.Dropdown, "prompt", again, "420px", options=options)
        number = {"max": 1 << 30, "value": seed}
        self.seed = self.control(ipw.BoundedIntText, "seed", again, "170px", **number)
        self.kind = self.control(ipw.ToggleButtons, "", again, "auto", **kinds)
        self.noise = self.control(ipw.FloatSlider, "noise level", again, **noise)
        self.step = self.control(ipw.IntSlider, "step", self._show_step, min=1, max=last)
        self.shown, self.table = ipw.HTML(), ipw.HTML()
        self.box = self.stack(
            "player",
            ipw.HBox([self.prompt, self.seed]),
            ipw.HBox([self.kind, self.noise]),
            self.guard.box,
            self.step,
            ipw.HBox([self.shown, self.table], layout=ipw.Layout(flex_flow="row wrap")),
        )

    def _sample_again(self) -> None:
        self.guard.box.value = note_html("sampling …")
        noise = {"kind": self.kind.value, "noise_level": self.noise.value}
        self._record(self.prompt.value, self.seed.value, replace(self.sampled[2], **noise))
        self._show_step()

    def _show_step(self) -> None:
        """Show the step at the slider: the images are there already, nothing is sampled."""
        step, tiles = self.step.value, ""
        at = f"step {step} of {len(self.steps)}, σ {self.steps['sigma'][step]:.2f}"
        for name, images in self.images.items():
            width = 224 if name == "predicted clean image" else 128
            image = image_html(encode_webp(images[step - 1]), f"{name}, {at}. {self.title}", width)
            tiles += tile_html(image, escape(name), f"{width}px")
        self.shown.value = f'{note_html(at)}<div class="fo-images">{tiles}</div>'
        note = ", as if with the SDE's noise" if self.kind.value == "ode" else ""
        table = self.steps.rename_axis(columns="step").to_html(
            float_format="{:.3g}".format, classes="fo-table", border=0, na_rep="no noise"
        )
        self.table.value = f'<div class="fo-note">KL of a step, nats{note}</div>{table}'


# --- the playground


def list_prompts(benchmark: Benchmark) -> list[Prompt]:
    """All prompts of a benchmark, those of test first: where a typed prompt is looked up."""
    return [
        prompt
        for split in ("test", "ood", "val", "train")
        for task in benchmark.prompt_tasks
        if split in benchmark.splits(task)
        for prompt in benchmark.prompts(task, split)
    ]


def parse_prompt(text: str, known: Sequence[Prompt] = ()) -> Prompt:
    """A typed text as a prompt: one of `known` with its metadata, or else one of the task "own",
    which GenEval cannot score and OCR only with words in double quotes."""
    text = " ".join(text.split())
    same = (prompt for prompt in known if prompt.text.lower() == text.lower())
    return next(same, Prompt(text, "own"))


def try_prompt(
    policy: FlowPolicy,
    prompt: Prompt,
    rewards: Mapping[str, Reward],
    models: Adapters,
    sampler: Sampler,
    seed: int = 0,
    guidance: Mapping[str, float] = MappingProxyType({}),
) -> tuple[torch.Tensor, pd.DataFrame]:
    """Sample the prompt with the same noise under every model: the images (M, 3, H, W), and a table
    with a row per model: model, prompt, the scores of the rewards that apply, and `findings`, what
    OCR read and GenEval's detector found. `guidance`: of an adapter, where it is not the
    sampler's."""
    own = [(_guided(sampler, name, guidance), name) for name in models.values()]
    images = torch.cat([sample(policy, [prompt], [seed], *how) for how in own])
    prompts = [prompt] * len(models)
    table = score(images, prompts, rewards).dropna(axis=1, how="all")
    findings = [[] for _ in prompts]
    ocr = next((reward for reward in rewards.values() if hasattr(reward, "read")), None)
    geneval = next((reward for reward in rewards.values() if hasattr(reward, "detector")), None)
    if ocr:
        for found, text in zip(findings, ocr.read(images, prompts)):
            found.append(f"read: {text or 'nothing'}")
    if geneval:
        pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for found, objects in zip(findings, geneval.detector(pixels)):
            objects = [d for d in objects if d.score > geneval.detector.threshold]
            names = [f"{d.color or ''} {d.label}".strip() for d in objects]
            found.append(f"detected: {', '.join(names) or 'nothing'}")
    if geneval and prompt.metadata:
        for found, (_, why) in zip(findings, geneval.explain(images, prompts)):
            found.append(why or "correct")
    return images, table.assign(model=list(models), findings=[*map("; ".join, findings)])


class Playground(Viewer):
    """`models` maps names to adapters (None: the base); `known` are the prompts whose metadata a
    typed one takes, `text` is tried at once. Headless: the images with their scores, and a table
    with what was found on them."""

    def __init__(
        self,
        policy: FlowPolicy,
        models: Adapters,
        rewards: Mapping[str, Reward],
        text: str,
        known: Sequence[Prompt] = (),
        seed: int = 0,
        sampler: Sampler = Sampler(20),
        guidance: Mapping[str, float] = MappingProxyType({}),
    ):
        super().__init__()
        self.guidance = dict(guidance)
        self.policy, self.models, self.rewards = policy, dict(models), dict(rewards)
        self.known, self.sampler = list(known), sampler
        self._try(text, seed)
        if not self.headless:
            # the end of typing is Enter or leaving the field; every key would sample anew
            typed = {"value": text, "continuous_update": False}
            self.text = self.control(ipw.Text, "prompt", self._run, "560px", **typed)
            number = {"max": 1 << 30, "value": seed}
            self.seed = self.control(ipw.BoundedIntText, "seed", self._run, "170px", **number)
            self.body, inputs = ipw.HTML(), ipw.HBox([self.text, self.seed])
            self.box = self.stack("playground", inputs, self.guard.box, self.body)
            self._show()

    def _try(self, text: str, seed: int) -> None:
        prompt, how = parse_prompt(text, self.known), (self.sampler, seed, self.guidance)
        tried = try_prompt(self.policy, prompt, self.rewards, self.models, *how)
        self.prompt, (self.images, self.table) = prompt, tried
        self.title = f"{prompt.text} (seed {seed})"

    def still(self) -> list:
        captions = [*map("\n".join, zip(self.table["model"], format_captions(self.table)))]
        figure = plot_image_grid(self.images, captions, 6, self.title)
        return [figure, self.table.round(3)]

    def _run(self) -> None:
        self.guard.box.value = note_html("sampling …")
        self._try(self.text.value, self.seed.value)
        self._show()

    def _show(self) -> None:
        applied = [name for name in self.rewards if name in self.table]
        scored = f"Scored as {self.prompt.task} prompt by {', '.join(applied)}"
        note = note_html(f"{scored}. OCR needs words in double quotes, GenEval a known prompt.")
        tiles = ""
        for image, row in zip(self.images, self.table.to_dict("records")):
            badges = {name: f"{name} {row[name]:.2f}" for name in applied}
            alt = f"{row['model']}: {self.title}; {', '.join(badges.values())}; {row['findings']}"
            image = image_html(encode_webp(image), alt, 256)
            findings = f'<div class="fo-row fo-dim">{escape(row["findings"])}</div>'
            caption = f"<b>{escape(row['model'])}</b>{badges_html(badges)}{findings}"
            tiles += tile_html(image, caption, "256px")
        self.body.value = f'{note}<div class="fo-images">{tiles}</div>'
