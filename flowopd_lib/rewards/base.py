"""What a reward is, the checks all of them make before they look and before they answer, and how they load
models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ..hub import hub_fault
from ..prompts import Prompt
from ..quiet import quiet


class Reward(Protocol):
    """Scores pictures for prompts: images (B, 3, H, W) in [0, 1] and B prompts give (B,) float32, higher is
    better. What a reward may have beside is told by `attribute`; one that is a network may have
    `with_gradient(images, prompts)`, which gives (B,) with the graph of the images."""

    name: str
    range: tuple[float, float]

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray: ...


# What a reward that does not say it otherwise is: `tasks` whose prompts it can reward (None: all), `scale` that
# its scores are divided by where rewards are added up, `held_out` by every training, or for `training` only.
PLAIN = {"tasks": None, "scale": 1.0, "held_out": False, "training": False}


def attribute(reward: Reward, name: str):
    """One of `PLAIN`."""
    return getattr(reward, name, PLAIN[name])


def can_reward(reward: Reward, prompt: Prompt) -> bool:
    tasks = attribute(reward, "tasks")
    return tasks is None or prompt.task in tasks


def as_uint8(
    images: torch.Tensor,
    prompts: Sequence[Prompt],
    reward: str,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Check a batch and give it as (B, H, W, 3) uint8. A reward that cannot reward raises; it never returns a
    score."""
    pixels = pixels_of(images, reward, size)
    if len(images) != len(prompts):
        raise ValueError(
            f"{reward} got {len(images)} images for {len(prompts)} prompts; it needs one prompt an image"
        )
    for prompt in prompts:
        if not prompt.text.strip():
            raise ValueError(
                f"{reward} got an empty prompt; every image needs the text it was made for"
            )
    return pixels


def pixels_of(images: torch.Tensor, reward: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """Check images (B, 3, H, W), of `size` (H, W) if that is given, and give them as (B, H, W, 3) uint8."""
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] != 3:
        got = tuple(images.shape) if hasattr(images, "shape") else type(images).__name__
        raise ValueError(f"{reward} takes images as a (B, 3, H, W) tensor in [0, 1], not {got}")
    if not len(images):
        raise ValueError(f"{reward} got no images to reward")
    if size and tuple(images.shape[2:]) != tuple(size):
        raise ValueError(
            f"{reward} rewards {size[0]}x{size[1]} images, not {images.shape[2]}x{images.shape[3]}"
        )
    if not torch.isfinite(images).all():
        raise ValueError(
            f"{reward} got images with NaN or infinite pixels; the sampler has diverged"
        )
    low, high = images.min().item(), images.max().item()
    if low < -0.01 or high > 1.01:
        raise ValueError(
            f"{reward} takes pixels in [0, 1], not [{low:.2f}, {high:.2f}]; map [-1, 1] with x / 2 + 0.5"
        )
    return (images.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def finite(scores: torch.Tensor, reward: str) -> np.ndarray:
    """Scores (B,) as float32 numpy; ValueError if one is NaN or infinite, which would pass for a score."""
    out = scores.detach().float().cpu().numpy()
    if not np.isfinite(out).all():
        raise ValueError(
            f"{reward} gave NaN or infinite scores for {int((~np.isfinite(out)).sum())} of {len(out)} images; "
            "its weights are damaged or overflow on this device: load them anew and keep them in float32"
        )
    return out


def load_frozen(
    kind: type, model_id: str | Path, reward: str, device: str = "cpu"
) -> torch.nn.Module:
    """A transformers model of class `kind` from a folder or hub id, in float32, on `device`, never trained.

    Raises FileNotFoundError where there are no safetensors, and ValueError where a parameter has no weights:
    transformers would fill it with random numbers and only warn.
    """
    try:
        with quiet():
            model, told = kind.from_pretrained(
                model_id, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
    except OSError as error:
        raise FileNotFoundError(
            f"no {reward} weights at {str(model_id)!r}; give a {kind.__name__} folder or hub id: "
            f"{hub_fault(str(model_id), error)}"
        ) from error
    missing = sorted(set(told["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if missing:
        raise ValueError(
            f"{reward}: {str(model_id)!r} holds no weights for {len(missing)} parameters of a "
            f"{kind.__name__}, {missing[0]} the first; give a folder or hub id of that class"
        )
    return model.to(device).eval().requires_grad_(False)


def load_clip(
    model_id: str | Path, reward: str, device: str = "cpu", processor_id: str | Path | None = None
):
    """A CLIPModel and its CLIPProcessor (from `processor_id`, if that is given), which prepares pictures with
    PIL even where torchvision is installed: scores are the same on every machine."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    model, source = load_frozen(CLIPModel, model_id, reward, device), processor_id or model_id
    try:
        with quiet():
            pictures = CLIPImageProcessorPil.from_pretrained(source)
            texts = AutoTokenizer.from_pretrained(source)
    except OSError as error:
        raise FileNotFoundError(
            f"no processor of {reward} at {str(source)!r}; give a folder or hub id with a CLIP's image "
            f"processor and tokenizer: {hub_fault(str(source), error)}"
        ) from error
    return model, CLIPProcessor(pictures, texts)


def embed_pictures(model, processor, pictures: list, batch: int) -> torch.Tensor:
    """(N, D): unit image embeddings of a CLIPModel, for pictures given as PIL images or (H, W, 3) uint8."""
    found = []
    for i in range(0, len(pictures), batch):
        inputs = processor.image_processor(pictures[i : i + batch], return_tensors="pt").to(
            model.device
        )
        # an object in transformers 5, a tensor before
        z = model.get_image_features(**inputs)
        found.append(torch.nn.functional.normalize(getattr(z, "pooler_output", z), dim=-1))
    return torch.cat(found)


def prepared(images: torch.Tensor, processor) -> torch.Tensor:
    """What an image processor does to (B, 3, H, W) in [0, 1], with gradient: resized, to a size or by the
    shorter side, the middle cut out, channels normalised."""
    height, width = images.shape[2:]
    if shorter := processor.size.get("shortest_edge"):
        to = tuple(int(side * shorter / min(height, width)) for side in (height, width))
    else:
        to = processor.size["height"], processor.size["width"]
    if to != (height, width):
        images = torch.nn.functional.interpolate(images, to, mode="bicubic", antialias=True).clamp(
            0, 1
        )
    if getattr(processor, "do_center_crop", False):
        crop = processor.crop_size["height"], processor.crop_size["width"]
        top, left = ((side - of) // 2 for side, of in zip(images.shape[2:], crop))
        images = images[..., top : top + crop[0], left : left + crop[1]]
    mean, std = (
        torch.tensor(v, device=images.device)[:, None, None]
        for v in (processor.image_mean, processor.image_std)
    )
    return (images - mean) / std
