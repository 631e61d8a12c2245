"""A prompt of one's own on several models, with the scores of every reward, the text that OCR read
and the objects that GenEval's detector found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

import ipywidgets as ipw
import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw, ImageFont

from ..benchmarks import Benchmark
from ..data import Prompt
from ..evaluate import score
from ..plots.scores import plot_image_grid
from ..policy import FlowPolicy
from ..rewards import Reward
from ..rollout import Sampler, sample
from ..thumbnails import encode_webp
from .common import Adapters, Viewer, badges_html, image_html, note_html, tile_html

Rewards = Mapping[str, Reward]  # by name


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
    for prompt in known:
        if prompt.text.lower() == text.lower():
            return prompt
    return Prompt(text, "own")


def _find(rewards: Rewards, attribute: str) -> Reward | None:
    """The first reward that has an attribute."""
    return next((reward for reward in rewards.values() if hasattr(reward, attribute)), None)


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
    policy: FlowPolicy, prompt: Prompt, rewards: Rewards, models: Adapters, sampler: Sampler, seed=0
) -> list[Trial]:
    """Sample the prompt with the same noise under every model and score it. Raises ValueError
    without models."""
    if not models:
        raise ValueError("no models are chosen; choose one or more")
    trials = []
    for model, adapter in models.items():
        images = sample(policy, [prompt], [seed], sampler, adapter)
        scores = score(images, [prompt], rewards)[list(rewards)].iloc[0].dropna().to_dict()
        findings, boxes = [], []
        if ocr := _find(rewards, "read"):
            (text,) = ocr.read(images, [prompt])
            findings.append(f"read: {text or 'nothing'}")
            height, width = images.shape[2:]
            region = getattr(ocr, "region", None) or (0, 0, width, height)
            boxes += [(region, findings[0], "#FFD54A")] * bool(text)
        if geneval := _find(rewards, "detector"):
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
        for outline, width in (("black", 4), (color, 2)):
            draw.rectangle((left, top, right - 1, bottom - 1), outline=outline, width=width)
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
        rewards: Rewards,
        text: str,
        known: Sequence[Prompt] = (),
        seed: int = 0,
        sampler: Sampler = Sampler(20),
    ):
        super().__init__()
        self.policy, self.models, self.rewards = policy, dict(models), dict(rewards)
        self.known, self.sampler = list(known), sampler
        self._try(text, seed, list(models), sampler.steps)
        if not self.headless:
            self._build(text, seed)
            self._show()

    def _try(self, text: str, seed: int, models: Sequence[str], steps: int) -> None:
        prompt = parse_prompt(text, self.known)
        adapters = {model: self.models[model] for model in models}
        sampler = replace(self.sampler, steps=steps)
        self.trials = try_prompt(self.policy, prompt, self.rewards, adapters, sampler, seed)

    def still(self) -> list:
        trials, prompt = self.trials, self.trials[0].prompt.text
        images = [draw_findings(trial) for trial in trials]
        captions = ["\n".join([t.model, *t.badges.values()]) for t in trials]
        figure = plot_image_grid(images, captions, 6, f"{prompt} (seed {trials[0].seed})")
        rows = [{"model": t.model, **t.scores, "findings": "; ".join(t.findings)} for t in trials]
        return [figure, pd.DataFrame(rows).round(3)]

    def _build(self, text: str, seed: int) -> None:
        run, number, names = self._run, ipw.BoundedIntText, list(self.models)
        # the end of typing is Enter or leaving the field; every key would sample anew
        typed = {"value": text, "continuous_update": False}
        self.text = self.control(ipw.Text, "prompt", "560px", run, **typed)
        self.seed = self.control(number, "seed", "160px", run, max=1 << 30, value=seed)
        self.steps = self.control(number, "steps", "160px", run, min=1, value=self.sampler.steps)
        models = {"options": names, "value": names}
        self.chosen = self.control(ipw.SelectMultiple, "models", "270px", run, **models)
        self.marks = self.control(ipw.Checkbox, "mark findings", "270px", self._show, value=True)
        self.next = self.button("another seed", self._next_seed)
        self.status, self.body = ipw.HTML(), ipw.HTML()
        inputs = ipw.HBox([self.text, self.seed, self.steps])
        choices = ipw.HBox([self.chosen, ipw.VBox([self.marks, self.next])])
        self.box = self.stack("playground", inputs, choices, self.status, self.guard.box, self.body)

    def _next_seed(self) -> None:
        self.seed.value += 1
        self._run()

    def _run(self) -> None:
        self.status.value = note_html("sampling …")
        try:
            self._try(self.text.value, self.seed.value, self.chosen.value, self.steps.value)
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
