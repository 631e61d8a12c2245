"""DeQA-Score (You et al. 2025): image quality, the expectation over five levels from bad (1) to
excellent (5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..data import Prompt
from .base import as_uint8, batches, load_frozen, loading, preprocess_with_gradient

LEVELS = {"bad": 1, "poor": 2, "fair": 3, "good": 4, "excellent": 5}


class DeQA:
    """Expected quality level, 1 to 5, whatever the prompt.

    `model_id`: a folder or hub id of a transformers image classifier whose labels are the five
    levels. DeQA-Score itself (`zhiyuanyou/DeQA-Score-Mix3`) needs an older transformers and runs in
    the reward server.
    """

    name, range, scale = "DeQA", (1.0, 5.0), 5.0

    def __init__(self, model_id: str | Path, device: str = "cpu", batch: int = 256):
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self.batch = batch
        try:
            self.model = load_frozen(AutoModelForImageClassification, model_id, self.name, device)
        except ValueError as error:
            raise ValueError(
                f"{model_id} is no transformers image classifier; DeQA-Score itself runs in the "
                f"reward server (docs/reward-server.md): {error}"
            ) from error
        with loading(f"processor of {self.name}", model_id):
            self.processor = AutoImageProcessor.from_pretrained(model_id, backend="pil")
        labels = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        if sorted(labels) != sorted(LEVELS):
            raise ValueError(f"{model_id} has the labels {labels}; DeQA needs {list(LEVELS)}")
        self.levels = torch.tensor([float(LEVELS[label]) for label in labels], device=device)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        pixels, process = as_uint8(images, prompts, self.name), self.processor
        scores = [
            self._score(process(list(some), return_tensors="pt")["pixel_values"])
            for (some,) in batches(self.batch, pixels)
        ]
        return torch.cat(scores).cpu().numpy()

    def with_gradient(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,): the scores of images (B, 3, H, W) in [0, 1], differentiable in them."""
        return self._score(preprocess_with_gradient(images, self.processor))

    def _score(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B,): the expectation over the classifier's labels, in its order (`levels`)."""
        return self.model(pixels.to(self.model.device)).logits.float().softmax(-1) @ self.levels
