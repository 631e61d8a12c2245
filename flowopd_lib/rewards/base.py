"""What a judge is, and the one check all of them make before they look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from ..prompts import Prompt


class Reward(Protocol):
    """Scores pictures for prompts: images (B, 3, H, W) in [0, 1] and B prompts give (B,) float32, higher is
    better. What a judge may have beside is told by `attribute`."""

    name: str
    range: tuple[float, float]

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray: ...


# What a judge that does not say it otherwise is: `tasks` whose prompts it can judge (None: all), `scale` that
# its scores are divided by where rewards are added up, `unseen` by every training, or for `training` only.
PLAIN = {"tasks": None, "scale": 1.0, "unseen": False, "training": False}


def attribute(judge: Reward, name: str):
    """One of `PLAIN`."""
    return getattr(judge, name, PLAIN[name])


def can_judge(judge: Reward, prompt: Prompt) -> bool:
    tasks = attribute(judge, "tasks")
    return tasks is None or prompt.task in tasks


def as_uint8(
    images: torch.Tensor, prompts: Sequence[Prompt], judge: str, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Check a batch and give it as (B, H, W, 3) uint8. A judge that cannot judge raises; it never returns a
    score."""
    pixels = pixels_of(images, judge, size)
    if len(images) != len(prompts):
        raise ValueError(
            f"{judge} got {len(images)} images for {len(prompts)} prompts; it needs one prompt an image"
        )
    for prompt in prompts:
        if not prompt.text.strip():
            raise ValueError(f"{judge} got an empty prompt; every image needs the text it was made for")
    return pixels


def pixels_of(images: torch.Tensor, judge: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """Check images (B, 3, H, W), of `size` (H, W) if that is given, and give them as (B, H, W, 3) uint8."""
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] != 3:
        got = tuple(images.shape) if hasattr(images, "shape") else type(images).__name__
        raise ValueError(f"{judge} takes images as a (B, 3, H, W) tensor in [0, 1], not {got}")
    if not len(images):
        raise ValueError(f"{judge} got no images to judge")
    if size and tuple(images.shape[2:]) != tuple(size):
        raise ValueError(
            f"{judge} judges {size[0]}x{size[1]} images, not {images.shape[2]}x{images.shape[3]}"
        )
    if not torch.isfinite(images).all():
        raise ValueError(f"{judge} got images with NaN or infinite pixels; the sampler has diverged")
    low, high = images.min().item(), images.max().item()
    if low < -0.01 or high > 1.01:
        raise ValueError(
            f"{judge} takes pixels in [0, 1], not [{low:.2f}, {high:.2f}]; map [-1, 1] with x / 2 + 0.5"
        )
    return (images.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
