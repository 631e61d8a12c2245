"""DeQA-Score (You et al. 2025): picture quality as the expectation over five levels, bad (1) to excellent
(5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..prompts import Prompt
from ..quiet import quiet
from .base import as_uint8, finite, load_frozen, prepared

LEVELS = {"bad": 1, "poor": 2, "fair": 3, "good": 4, "excellent": 5}


class DeQA:
    """Expected quality level, 1 to 5. The prompt is not looked at.

    `model_id`: a folder or hub id of a transformers image classifier whose labels are the five levels.
    DeQA-Score itself (`zhiyuanyou/DeQA-Score-Mix3`) brings code of its own, which does not run with
    transformers 5: it lives behind the reward server, in an environment of its own.
    """

    name, range, scale = "DeQA", (1.0, 5.0), 5.0

    def __init__(self, model_id: str | Path, device: str = "cpu", batch: int = 256):
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

        self.device, self.batch = device, batch
        try:
            # an explicit no: transformers would ask at the terminal whether to run the model's own code
            config = AutoConfig.from_pretrained(model_id, trust_remote_code=False)
            known = any(a.endswith("ForImageClassification") for a in config.architectures or ())
        except OSError as error:
            raise FileNotFoundError(
                f"no DeQA weights at {str(model_id)!r}; give an image classifier's folder or hub id ({error})"
            ) from error
        except ValueError:  # a model transformers does not know
            known = False
        if not known:
            raise ValueError(
                f"{str(model_id)!r} is no transformers image classifier; DeQA-Score itself does not run with "
                "transformers 5: start it behind the reward server and name the server as the reward"
            )
        self.model = load_frozen(AutoModelForImageClassification, model_id, self.name, device)
        with quiet():
            self.processor = AutoImageProcessor.from_pretrained(model_id, backend="pil")
        labels = [self.model.config.id2label[i] for i in range(len(self.model.config.id2label))]
        if sorted(labels) != sorted(LEVELS):
            raise ValueError(
                f"{model_id} classifies {', '.join(labels)}; DeQA needs the levels {', '.join(LEVELS)}"
            )
        self.levels = torch.tensor([float(LEVELS[label]) for label in labels], device=device)

    @torch.no_grad()
    def distribution(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B, 5) probabilities in the classifier's own label order (`levels`)."""
        pixels, out = as_uint8(images, prompts, self.name), []
        for i in range(0, len(pixels), self.batch):
            inputs = self.processor(images=list(pixels[i : i + self.batch]), return_tensors="pt")
            out.append(self.model(**inputs.to(self.device)).logits.float().softmax(-1))
        return torch.cat(out)

    def with_gradient(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,): the score of images (B, 3, H, W) in [0, 1] with the graph they carry."""
        logits = self.model(pixel_values=prepared(images, self.processor).to(self.device)).logits
        return logits.float().softmax(-1) @ self.levels

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        return finite(self.distribution(images, prompts) @ self.levels, self.name)
