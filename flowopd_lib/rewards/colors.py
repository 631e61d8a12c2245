"""GenEval's colour rule (Ghosh et al. 2023, evaluation/evaluate_images.py): CLIP names the colour of an
object cut out of its picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .base import embed_pictures, load_clip

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
GRAY = (0x99, 0x99, 0x99)  # GenEval's #999: none of the ten
TEXTS = ("a photo of a {} {label}", "a photo of a {}-colored {label}", "a photo of a {} object")


def cut_out(image: np.ndarray, mask: np.ndarray, box: Sequence[float]) -> Image.Image:
    """The object alone: picture (H, W, 3) uint8 where mask (H, W) is true and #999 elsewhere, cropped to its
    box (left, top, right, bottom; pixels, the last two exclusive)."""
    left, top, right, bottom = (int(edge) for edge in box)
    inside = mask[top:bottom, left:right, None]
    return Image.fromarray(np.where(inside, image[top:bottom, left:right], np.uint8(GRAY)))


class ColorNamer:
    """The nearest of ten colours to each cut-out object, by cosine to the mean of three unit text embeddings
    a colour, which name the object's class.

    `clip_id`: a folder or hub id of a transformers `CLIPModel`; GenEval's is `openai/clip-vit-large-patch14`.
    """

    def __init__(self, clip_id: str | Path, device: str = "cpu", batch: int = 64):
        self.batch = batch
        self.model, self.processor = load_clip(clip_id, "GenEval's colours", device)
        self._texts: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def texts(self, label: str) -> torch.Tensor:
        """(10, D): what the colours of this class look like; computed once a class."""
        if label not in self._texts:
            asked = [text.format(color, label=label) for color in COLORS for text in TEXTS]
            inputs = self.processor.tokenizer(
                asked,
                return_tensors="pt",
                padding="max_length",
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
            )
            z = self.model.get_text_features(**inputs.to(self.model.device))
            z = torch.nn.functional.normalize(getattr(z, "pooler_output", z), dim=-1)
            means = z.reshape(len(COLORS), len(TEXTS), -1).mean(1)
            self._texts[label] = torch.nn.functional.normalize(means, dim=-1)
        return self._texts[label]

    @torch.no_grad()
    def __call__(self, objects: Sequence[Image.Image], labels: Sequence[str]) -> list[str]:
        """One colour an object, of any size; `labels` are their classes."""
        if not objects:
            return []
        z = embed_pictures(self.model, self.processor, list(objects), self.batch)
        cosines = torch.stack([self.texts(label) @ one for label, one in zip(labels, z)])
        if not torch.isfinite(cosines).all():
            raise ValueError(
                "GenEval's CLIP gave NaN embeddings; its weights are damaged: load them anew"
            )
        return [COLORS[i] for i in cosines.argmax(1).tolist()]
