"""Widgets that sample with the model in this process: `TrajectoryPlayer`, one sample step by step
with its distance to each teacher, and `Playground`, a prompt of one's own on several models, with
every reward's score, the text that OCR read and the objects that GenEval's detector found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

import ipywidgets as ipw
import matplotlib
import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw, ImageFont

from ..benchmarks import Benchmark
from ..data import Prompt
from ..evaluate import score
from ..files import encode_webp
from ..plots.scores import plot_image_grid
from ..policy import FlowPolicy
from ..rewards import Reward
from ..rollout import Sampler, sample, trajectory
from .common import Adapters, Viewer, badges_html, image_html, note_html, tile_html

# --- the trajectory player


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
    policy: FlowPolicy, prompt: Prompt, seed: int, sampler: Sampler, models: Adapters, model: str
) -> Trajectory:
    """Sample a trajectory of `model` and evaluate the others of `models`, as teachers, at every
    state it visits.

    The KL is what OPD trains on; for an ODE trajectory that of the SDE with the same noise level.
    """
    teachers = [name for name in models if name != model]
    text, guidance = policy.encode([prompt.text]), sampler.guidance
    steps, rows, differences = [], [], {name: [] for name in teachers}
    for step in trajectory(policy, [prompt], [seed], sampler, models[model]):
        weight, row = np.nan, {"sigma": step.sigma}
        if step.sigma_next > 0 and sampler.noise_level > 0:
            weight = float(sampler.step_weights(step.sigma, step.sigma_next, "kl"))
        for name in teachers:
            v_teacher = policy.velocity(step.x_t, step.sigma, text, guidance, models[name])
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
    """`models` maps names to adapters (None: the base); `model` ("": the last one) samples, and the
    others are evaluated at every state it visits.

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
    ):
        super().__init__()
        self.policy, self.models, self.prompts = policy, dict(models), list(prompts)
        self._record(self.prompts[0], seed, sampler, model or list(models)[-1])
        if not self.headless:
            self._build()
            self._show_step()

    def _record(self, prompt: Prompt, seed: int, sampler: Sampler, model: str) -> None:
        self.trajectory = record_trajectory(self.policy, prompt, seed, sampler, self.models, model)

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
        prompts = [(prompt.text, i) for i, prompt in enumerate(self.prompts)]
        kinds = [("SDE", "sde"), ("ODE", "ode"), ("CPS", "cps")]
        noise = {"min": 0.1, "max": 1.2, "value": t.sampler.noise_level, "continuous_update": False}
        seed = {"max": 1 << 30, "value": t.seed}
        self.prompt = self.control(ipw.Dropdown, "prompt", again, "420px", options=prompts)
        self.seed = self.control(ipw.BoundedIntText, "seed", again, "170px", **seed)
        self.model = self.control(ipw.Dropdown, "model", again, options=list(self.models))
        self.kind = self.control(ipw.ToggleButtons, "", again, "auto", options=kinds)
        self.noise = self.control(ipw.FloatSlider, "noise level", again, **noise)
        self.model.value, self.kind.value = t.model, t.sampler.kind
        self.step = self.control(ipw.IntSlider, "step", self._show_step, max=last, readout=False)
        self.play = ipw.Play(max=last, interval=250)
        ipw.jslink((self.play, "value"), (self.step, "value"))
        self.images, self.table, self.status = ipw.HTML(), ipw.HTML(), ipw.HTML()
        self.box = self.stack(
            "player",
            ipw.HBox([self.prompt, self.seed]),
            ipw.HBox([self.model, self.kind, self.noise]),
            self.guard.box,
            ipw.HBox([self.play, self.step, self.status]),
            ipw.HBox([self.images, self.table], layout=ipw.Layout(flex_flow="row wrap")),
        )

    def _sample_again(self) -> None:
        self.status.value = note_html("sampling …")
        noise = {"kind": self.kind.value, "noise_level": self.noise.value}
        sampler = replace(self.trajectory.sampler, **noise)
        self._record(self.prompts[self.prompt.value], self.seed.value, sampler, self.model.value)
        self._show_step()

    def _show_step(self) -> None:
        """Show the step at the slider: the images are there already, nothing is sampled."""
        t, step, tiles = self.trajectory, self.step.value, ""
        for name, images in t.images.items():
            width = 224 if name == "predicted clean image" else 128
            image = image_html(encode_webp(images[step]), f"{name}. {t.describe(step)}", width)
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
    which GenEval cannot score and OCR only with words in double quotes. Raises ValueError for an
    empty text."""
    text = " ".join(text.split())
    if not text:
        raise ValueError("the prompt is empty; type one, such as: a photo of two red stars")
    same = (prompt for prompt in known if prompt.text.lower() == text.lower())
    return next(same, Prompt(text, "own"))


@dataclass(frozen=True)
class Trial:
    """One model's image (3, H, W) of a prompt, with the scores of the rewards that apply, what OCR
    and GenEval found in it, and the boxes to draw: (left, top, right, bottom), label, colour."""

    model: str
    prompt: Prompt
    seed: int
    image: torch.Tensor
    scores: dict[str, float]
    findings: list[str]
    boxes: list[tuple[tuple, str, str]]

    @property
    def badges(self) -> dict[str, str]:
        return {name: f"{name} {value:.2f}" for name, value in self.scores.items()}

    def describe(self) -> str:
        """The alternative text of the image."""
        findings = "; ".join([", ".join(self.badges.values()), *self.findings])
        return f"{self.model}, seed {self.seed}: {self.prompt.text}; {findings}"


def try_prompt(
    policy: FlowPolicy,
    prompt: Prompt,
    rewards: Mapping[str, Reward],
    models: Adapters,
    sampler: Sampler,
    seed: int = 0,
) -> list[Trial]:
    """Sample the prompt with the same noise under every model and score it. Raises ValueError
    without models."""
    if not models:
        raise ValueError("no models are chosen; choose one or more")
    ocr = next((reward for reward in rewards.values() if hasattr(reward, "read")), None)
    geneval = next((reward for reward in rewards.values() if hasattr(reward, "detector")), None)
    trials = []
    for model, adapter in models.items():
        images = sample(policy, [prompt], [seed], sampler, adapter)
        scores = score(images, [prompt], rewards)[list(rewards)].iloc[0].dropna().to_dict()
        findings, boxes = [], []
        if ocr:
            (text,) = ocr.read(images, [prompt])
            findings.append(f"read: {text or 'nothing'}")
            height, width = images.shape[2:]
            region = getattr(ocr, "region", None) or (0, 0, width, height)
            boxes += [(region, findings[0], "#FFD54A")] * bool(text)
        if geneval:
            pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
            objects = geneval.detector(pixels)[0]
            objects = [d for d in objects if d.score > geneval.detector.threshold]
            names = [f"{d.color or ''} {d.label}".strip() for d in objects]
            boxes += [(d.box, f"{n} {d.score:.2f}", "white") for n, d in zip(names, objects)]
            findings.append(f"detected: {', '.join(names) or 'nothing'}")
            if prompt.metadata:
                findings += [why for _, why in geneval.explain(images, [prompt]) if why]
        trials.append(Trial(model, prompt, seed, images[0], scores, findings, boxes))
    return trials


def draw_findings(trial: Trial, size: int = 256, marks: bool = True) -> torch.Tensor:
    """The image (3, H, W), `size` pixels wide, with its boxes and their labels."""
    pixels = (trial.image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(pixels)
    scale = size / image.width
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    image = image.resize((size, round(image.height * scale)), method)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(max(10, size // 18))
    for box, label, color in trial.boxes if marks else ():
        left, top, right, bottom = (value * scale for value in box)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=color, width=3)
        at, anchor = ((left, top - 4), "ls") if top > 20 else ((left + 4, bottom + 3), "lt")
        draw.text(at, label, color, font, anchor, stroke_width=2, stroke_fill="black")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


class Playground(Viewer):
    """`models` maps names to adapters (None: the base); `known` are the prompts whose metadata a
    typed one takes, `text` is tried at once. Headless: the images with what was found on them, and
    a table."""

    def __init__(
        self,
        policy: FlowPolicy,
        models: Adapters,
        rewards: Mapping[str, Reward],
        text: str,
        known: Sequence[Prompt] = (),
        seed: int = 0,
        sampler: Sampler = Sampler(20),
    ):
        super().__init__()
        self.policy, self.models, self.rewards = policy, dict(models), dict(rewards)
        self.known, self.sampler = list(known), sampler
        self._try(text, seed, list(models))
        if not self.headless:
            self._build(text, seed)
            self._show()

    def _try(self, text: str, seed: int, models: Sequence[str]) -> None:
        prompt, adapters = parse_prompt(text, self.known), {m: self.models[m] for m in models}
        self.trials = try_prompt(self.policy, prompt, self.rewards, adapters, self.sampler, seed)

    def still(self) -> list:
        trials, prompt = self.trials, self.trials[0].prompt.text
        images = [draw_findings(trial) for trial in trials]
        captions = ["\n".join([t.model, *t.badges.values()]) for t in trials]
        figure = plot_image_grid(images, captions, 6, f"{prompt} (seed {trials[0].seed})")
        rows = [{"model": t.model, **t.scores, "findings": "; ".join(t.findings)} for t in trials]
        return [figure, pd.DataFrame(rows).round(3)]

    def _build(self, text: str, seed: int) -> None:
        # the end of typing is Enter or leaving the field; every key would sample anew
        typed, models = {"value": text, "continuous_update": False}, list(self.models)
        self.text = self.control(ipw.Text, "prompt", self._run, "560px", **typed)
        number = {"max": 1 << 30, "value": seed}
        self.seed = self.control(ipw.BoundedIntText, "seed", self._run, "170px", **number)
        models = {"options": models, "value": models}
        self.chosen = self.control(ipw.SelectMultiple, "models", self._run, **models)
        self.marks = self.control(ipw.Checkbox, "mark findings", self._show, value=True)
        self.next = self.button("another seed", self._next_seed)
        self.status, self.body = ipw.HTML(), ipw.HTML()
        inputs = ipw.HBox([self.text, self.seed])
        choices = ipw.HBox([self.chosen, ipw.VBox([self.marks, self.next])])
        self.box = self.stack("playground", inputs, choices, self.status, self.guard.box, self.body)

    def _next_seed(self) -> None:
        self.seed.value += 1
        self._run()

    def _run(self) -> None:
        self.status.value = note_html("sampling …")
        try:
            self._try(self.text.value, self.seed.value, self.chosen.value)
        finally:
            self.status.value = ""
        self._show()

    def _show(self) -> None:
        prompt, scores = self.trials[0].prompt, self.trials[0].scores
        others = ", ".join(name for name in self.rewards if name not in scores)
        hint = f"; not by {others} (OCR needs words in double quotes, GenEval a known prompt)"
        text = f"Scored as {prompt.task} prompt by {', '.join(scores)}{hint if others else ''}."
        self.status.value = note_html(text)
        tiles = ""
        for trial in self.trials:
            drawn = draw_findings(trial, marks=self.marks.value)
            image = image_html(encode_webp(drawn), trial.describe(), 256)
            findings = "<br>".join(map(escape, trial.findings))
            caption = f'{badges_html(trial.badges)}<div class="fo-row fo-dim">{findings}</div>'
            head = f'<div class="fo-head">{escape(trial.model)}</div>'
            tiles += tile_html(head + image, caption, "256px")
        self.body.value = f'<div class="fo-images">{tiles}</div>'
