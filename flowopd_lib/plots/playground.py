"""A prompt tried on several models at once: every reward that can reward it, what the OCR engine read and what
the detector saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw, ImageFont

from ..benchmarks import Benchmark
from ..evaluate import score
from ..policy import FlowPolicy
from ..prompts import Prompt
from ..rewards import Detection, Reward, attribute, can_reward
from ..rewards.base import as_uint8
from ..rollout import Sampler, sample


@dataclass(frozen=True)
class Trial:
    """One model's picture (3, H, W) of a prompt. `scores` by reward, of those that can reward it; `read`,
    `seen` and `verdict` (GenEval's reasons) are there where OCR and GenEval are among the rewards. `region`:
    the part of the picture that was read, None for all of it."""

    model: str
    prompt: Prompt
    seed: int
    image: torch.Tensor
    scores: dict[str, float]
    read: str = ""
    region: tuple[int, int, int, int] | None = None
    seen: tuple[Detection, ...] = ()
    verdict: str = ""

    @property
    def alt(self) -> str:
        """What a reader who does not see the picture is told."""
        seen = ", ".join(f"{d.color or ''} {d.label}".strip() for d in self.seen) or "nothing"
        return (
            f"{self.model}, seed {self.seed}: {self.prompt.text}; "
            + ", ".join(f"{name} {value:.2f}" for name, value in self.scores.items())
            + f"; read: {self.read or 'nothing'}; seen: {seen}"
        )


def known_prompts(
    benchmark: Benchmark, splits: Sequence[str] = ("test", "ood", "val", "train")
) -> list[Prompt]:
    """The prompts of those of these splits that there are: what a typed prompt is looked up in."""
    return [
        p
        for task in benchmark.own
        for split in splits
        if split in benchmark.splits(task)
        for p in benchmark.prompts(task, split)
    ]


def _rewardd_by(prompt: Prompt, rewards: Mapping[str, Reward]) -> str:
    return (
        ", ".join(name for name, reward in rewards.items() if can_reward(reward, prompt))
        or "nobody"
    )


def prompt_of(
    text: str, rewards: Mapping[str, Reward], known: Sequence[Prompt] = ()
) -> tuple[Prompt, str]:
    """What a typed text is scored as, and a sentence that says so: a known prompt with its metadata; a sign,
    if there is a text in double quotes; else only a picture to be liked. Raises ValueError for an empty
    text."""
    text = " ".join(text.split())
    if not text:
        raise ValueError("there is no prompt; type one, such as: a photo of two red stars")
    for prompt in known:
        if prompt.text.lower() == text.lower():
            return (
                prompt,
                f"A known {prompt.task} prompt: scored by {_rewardd_by(prompt, rewards)}.",
            )
    quoted = text.split('"')
    reader = next((name for name, j in rewards.items() if hasattr(j, "read")), None)
    if reader and len(quoted) > 2 and quoted[1].strip():
        prompt = Prompt(text, (attribute(rewards[reader], "tasks") or ("",))[0])
        return (
            prompt,
            f"A prompt with a text in double quotes: scored by {_rewardd_by(prompt, rewards)}; "
            f"“{quoted[1]}” has to be read.",
        )
    prompt = Prompt(text, "own")
    told = f"Rewardd by {_rewardd_by(prompt, rewards)} only"
    if reader:
        told += f"; {reader} needs a text in double quotes"
    if others := [n for n, j in rewards.items() if n != reader and not can_reward(j, prompt)]:
        told += f"; {', '.join(others)} a prompt of its file"
    return prompt, told + "."


def try_prompt(
    policy: FlowPolicy,
    prompt: Prompt,
    rewards: Mapping[str, Reward],
    models: Mapping[str, str | None],
    sampler: Sampler = Sampler(20),
    seed: int = 0,
) -> list[Trial]:
    """Draw the prompt with the same noise under every model and let every reward look. Raises ValueError for
    no models."""
    if not models:
        raise ValueError("no models are chosen; choose one or more")
    images = torch.cat(
        [sample(policy, [prompt], [seed], sampler, adapter) for adapter in models.values()]
    )
    prompts = [prompt] * len(images)
    table = score(images, prompts, rewards)
    ocr = next((j for j in rewards.values() if hasattr(j, "read")), None)
    geneval = next((j for j in rewards.values() if hasattr(j, "detector")), None)
    read = ocr.read(images, prompts) if ocr else [""] * len(images)
    seen = (
        geneval.detector(as_uint8(images, prompts, "the detector", geneval.detector.size))
        if geneval
        else [()] * len(images)
    )
    verdicts = (
        [why for _, why in geneval.explain(images, prompts)]
        if geneval and can_reward(geneval, prompt)
        else [""] * len(images)
    )
    least = geneval.detector.threshold if geneval else 0.0
    return [
        Trial(
            model,
            prompt,
            seed,
            images[i],
            {
                name: float(table[name].iat[i])
                for name in rewards
                if not np.isnan(table[name].iat[i])
            },
            read[i],
            getattr(ocr, "region", None),
            tuple(d for d in seen[i] if d.score > least),
            verdicts[i],
        )
        for i, model in enumerate(models)
    ]


def table_of(trials: Sequence[Trial]) -> pd.DataFrame:
    """A row a model: its scores, what was read, what was seen, what GenEval found wrong."""
    return pd.DataFrame(
        [
            {
                "model": t.model,
                **t.scores,
                "read": t.read,
                "seen": ", ".join(
                    f"{d.color or ''} {d.label} {d.score:.2f}".strip() for d in t.seen
                ),
                "wrong": t.verdict,
            }
            for t in trials
        ]
    )


def draw_findings(trial: Trial, size: int = 320, findings: bool = True) -> Image.Image:
    """The picture, `size` pixels wide, with a box around everything the detector saw and what was read where
    it was read."""
    picture = Image.fromarray(
        (trial.image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    )
    scale = size / picture.width
    picture = picture.resize(
        (size, round(picture.height * scale)),
        Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS,
    )
    if not findings:
        return picture
    font = ImageFont.truetype(
        str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"),
        max(9, size // 26),
    )
    draw = ImageDraw.Draw(picture)

    def mark(box, text: str, color: str) -> None:
        left, top, right, bottom = (v * scale for v in box)
        # black around, to be seen on any ground
        draw.rectangle((left - 2, top - 2, right + 2, bottom + 2), outline="black", width=4)
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=color, width=2)
        _, _, width, height = draw.textbbox((0, 0), text, font)
        x, y = (
            min(max(left - 2, 0), picture.width - width - 4),
            top - height - 5 if top > height + 5 else bottom + 3,
        )
        y = min(y, picture.height - height - 3)
        draw.rectangle((x, y, x + width + 4, y + height + 3), fill="black")
        draw.text((x + 2, y), text, color, font)

    for d in trial.seen:
        mark(d.box, f"{d.color or ''} {d.label} {d.score:.2f}".strip(), "white")
    if trial.read:
        mark(
            trial.region
            or (2 / scale, 2 / scale, (picture.width - 3) / scale, (picture.height - 3) / scale),
            f"read: {trial.read}",
            "#FFD54A",
        )
    return picture
