"""What a reward is, the function that scores images with it, and what the reward models share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from ..data import Prompt
from ..loading import hub_fault, quiet


class Reward(Protocol):
    """Scores images (B, 3, H, W) in [0, 1] for B prompts: (B,) float32, higher is better.

    An attribute that has a value here may be left out: read it with `attribute`. A reward may also
    have `applies(prompt)`, whether it can score images of a prompt, and one that is a network
    `with_gradient(images, prompts)`, whose scores (B,) are differentiable in the images.
    """

    name: str
    range: tuple[float, float]
    tasks: Sequence[str] | None = None  # whose prompts it can score; None: of every task
    scale: float = 1.0  # scores are divided by it before rewards are added up
    held_out: bool = False  # reported, never trained on
    training_only: bool = False  # trained on, never reported

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray: ...


class FunctionReward:
    """A plain function `f(images, prompts)` as a reward, with the function's attributes."""

    range = (-math.inf, math.inf)

    def __init__(self, function: Callable):
        self.function, self.name = function, getattr(function, "__name__", type(function).__name__)
        vars(self).update(getattr(function, "__dict__", {}))

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> Any:
        return self.function(images, prompts)


def as_reward(reward: Reward | Callable) -> Reward:
    """`reward` itself, or a plain function wrapped as one."""
    complete = hasattr(reward, "name") and hasattr(reward, "range")
    return reward if complete else FunctionReward(reward)


def attribute(reward: Reward | Callable, name: str) -> Any:
    """An attribute of a reward, or its default in `Reward`."""
    return getattr(reward, name, getattr(Reward, name))


def applies_to(reward: Reward | Callable, prompt: Prompt) -> bool:
    """Whether the reward can score images of this prompt."""
    tasks, applies = attribute(reward, "tasks"), getattr(reward, "applies", None)
    return (tasks is None or prompt.task in tasks) and (applies is None or applies(prompt))


def score_images(reward: Reward | Callable, images: torch.Tensor, prompts: Sequence) -> np.ndarray:
    """Scores (B,) float32 of images (B, 3, H, W) in [0, 1] for B prompts: what every caller uses.

    `reward` may be a plain function `f(images, prompts)`, and may return a tensor or a list. Raises
    ValueError as `check_scores` does.
    """
    return check_scores(reward, as_reward(reward)(images, prompts), images, prompts)


def check_scores(reward: Reward | Callable, scores, images, prompts: Sequence) -> np.ndarray:
    """What `reward` returned for these images, as (B,) float32. Raises ValueError unless it is one
    finite score per image, inside the reward's range up to a thousandth of its width."""
    reward = as_reward(reward)
    if isinstance(scores, torch.Tensor):
        scores = scores.detach().float().cpu()
    scores = np.asarray(scores, np.float32)
    if scores.shape != (len(images),) or len(images) != len(prompts):
        raise ValueError(
            f"{reward.name} gave scores of shape {scores.shape} for {len(images)} images and "
            f"{len(prompts)} prompts; it must give one score per image"
        )
    low, high = reward.range
    tolerance = 1e-3 * (high - low) if math.isfinite(high - low) else 0.0
    valid = np.isfinite(scores) & (scores >= low - tolerance) & (scores <= high + tolerance)
    if not valid.all():
        first = int(valid.argmin())
        raise ValueError(
            f"{reward.name} gave {scores[first]:g} for {prompts[first].text!r}, not a number in "
            f"its range [{low:g}, {high:g}]; check its weights, its precision and its range"
        )
    return scores


def as_uint8(images: torch.Tensor, prompts: Sequence | None, reward: str, size=None) -> np.ndarray:
    """Images (B, 3, H, W) in [0, 1] as (B, H, W, 3) uint8.

    Raises ValueError for what the reward of this name cannot score: images of another size than
    `size` (H, W), pixels outside [0, 1], and, unless `prompts` is None, not one prompt per image.
    """
    if prompts is not None and len(images) != len(prompts):
        raise ValueError(f"{reward} got {len(images)} images for {len(prompts)} prompts")
    height, width = images.shape[2:]
    if size and (height, width) != tuple(size):
        raise ValueError(f"{reward} scores {size[0]}x{size[1]} images, not {height}x{width}")
    low, high = images.min().item(), images.max().item()
    if not -0.01 <= low <= high <= 1.01:  # nor NaN
        raise ValueError(
            f"{reward} takes pixels in [0, 1], not [{low:.2f}, {high:.2f}]: map [-1, 1] with "
            "x / 2 + 0.5; NaN means that the sampler has diverged"
        )
    return (images.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def batches(size: int, *sequences: Sequence) -> Iterator[tuple]:
    """Slices of at most `size` elements of sequences of one length, side by side."""
    for i in range(0, len(sequences[0]), size):
        yield tuple(sequence[i : i + size] for sequence in sequences)


@contextlib.contextmanager
def loading(what: str, source: str | Path) -> Iterator[None]:
    """Load quietly. Raises FileNotFoundError, in one sentence, if `source` does not hold `what`."""
    try:
        with quiet():
            yield
    except OSError as error:
        fault = hub_fault(str(source), error)
        raise FileNotFoundError(f"no {what} at {str(source)!r}: {fault}") from error


def load_frozen(kind: type, model_id: str | Path, reward: str, device: str) -> torch.nn.Module:
    """A transformers model of class `kind` from a folder or hub id, in float32, without gradients.

    Raises FileNotFoundError without safetensors, and ValueError if a parameter has no weights:
    transformers would only warn, and draw them at random.
    """
    options = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
    with loading(f"{reward} weights", model_id):
        model, info = kind.from_pretrained(model_id, output_loading_info=True, **options)
    missing = sorted(set(info["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if missing:
        raise ValueError(
            f"{reward}: {str(model_id)!r} lacks the weights of {len(missing)} parameters of a "
            f"{kind.__name__}, such as {missing[0]}; give a folder or hub id of that class"
        )
    return model.to(device).eval().requires_grad_(False)


def load_clip(model_id: str | Path, reward: str, device: str, processor_id: str | Path = ""):
    """A CLIPModel and its CLIPProcessor (of `processor_id`, if given), which prepares images with
    PIL even where torchvision is installed, so that every machine gives the same scores."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    model, source = load_frozen(CLIPModel, model_id, reward, device), processor_id or model_id
    with loading(f"processor of {reward}", source):
        image_processor = CLIPImageProcessorPil.from_pretrained(source)
        return model, CLIPProcessor(image_processor, AutoTokenizer.from_pretrained(source))


def embed_images(model, processor, images: Sequence, batch: int) -> torch.Tensor:
    """(N, D): unit embeddings by a CLIPModel of PIL images or (H, W, 3) uint8."""
    embeddings = []
    for (some,) in batches(batch, images):
        inputs = processor.image_processor(list(some), return_tensors="pt").to(model.device)
        embeddings.append(model.get_image_features(**inputs).pooler_output)
    return F.normalize(torch.cat(embeddings), dim=-1)


def preprocess_with_gradient(images: torch.Tensor, processor) -> torch.Tensor:
    """What a PIL image processor does to images (B, 3, H, W) in [0, 1], differentiable: resize (to
    a size, or by the shorter edge), crop the centre, normalise the channels."""
    height, width = images.shape[2:]
    if edge := processor.size.get("shortest_edge"):
        size = tuple(int(side * edge / min(height, width)) for side in (height, width))
    else:
        size = processor.size["height"], processor.size["width"]
    if size != (height, width):
        images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    if getattr(processor, "do_center_crop", False):
        height, width = processor.crop_size["height"], processor.crop_size["width"]
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        images = images[..., top : top + height, left : left + width]
    mean, std = torch.tensor([processor.image_mean, processor.image_std], device=images.device)
    return (images - mean[:, None, None]) / std[:, None, None]
