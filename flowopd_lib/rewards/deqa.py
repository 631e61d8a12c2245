"""DeQA-Score (You et al. 2025): picture quality as the expectation over five levels, bad (1) to excellent
(5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..prompts import Prompt
from ..quiet import quiet
from .base import as_uint8

LEVELS = {"bad": 1, "poor": 2, "fair": 3, "good": 4, "excellent": 5}


class DeQA:
    """Expected quality level, 1 to 5. The prompt is not looked at.

    `model_id`: a folder or hub id of a transformers image classifier whose labels are the five levels, or of
    DeQA-Score itself (`zhiyuanyou/DeQA-Score-Mix3`), whose own code is run only with
    `trust_remote_code=True`.
    """

    name, range, scale = "DeQA", (1.0, 5.0), 5.0

    def __init__(
        self, model_id: str | Path, device: str = "cpu", batch: int = 256, trust_remote_code: bool = False
    ):
        from transformers import (
            AutoConfig,
            AutoImageProcessor,
            AutoModelForCausalLM,
            AutoModelForImageClassification,
        )

        self.device, self.batch = device, batch
        try:
            config = AutoConfig.from_pretrained(model_id, trust_remote_code=trust_remote_code)
        except OSError as error:
            raise FileNotFoundError(
                f"no DeQA weights at {str(model_id)!r}; give an image classifier's folder or hub id ({error})"
            ) from error
        self.classifier = any(a.endswith("ForImageClassification") for a in config.architectures or ())
        if self.classifier:
            with quiet():
                self.model = AutoModelForImageClassification.from_pretrained(
                    model_id, dtype=torch.float32, use_safetensors=True
                )
                self.processor = AutoImageProcessor.from_pretrained(model_id)
            labels = [self.model.config.id2label[i] for i in range(len(self.model.config.id2label))]
            if sorted(labels) != sorted(LEVELS):
                raise ValueError(
                    f"{model_id} classifies {', '.join(labels)}; DeQA needs the levels {', '.join(LEVELS)}"
                )
            self.levels = torch.tensor([float(LEVELS[label]) for label in labels], device=device)
        else:
            self.model = AutoModelForCausalLM.from_pretrained(
                model_id,
                trust_remote_code=trust_remote_code,
                attn_implementation="eager",
                dtype=torch.float16,
                use_safetensors=True,
            )
        self.model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def distribution(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B, 5) probabilities in the classifier's own label order (`levels`)."""
        if not self.classifier:
            raise TypeError("DeQA-Score's own code gives the expectation only; call the judge itself")
        pixels, out = as_uint8(images, prompts, self.name), []
        for i in range(0, len(pixels), self.batch):
            inputs = self.processor(images=list(pixels[i : i + self.batch]), return_tensors="pt").to(
                self.device
            )
            out.append(self.model(**inputs).logits.float().softmax(-1))
        return torch.cat(out)

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        if self.classifier:
            return (self.distribution(images, prompts) @ self.levels).cpu().numpy()
        pictures, scores = [Image.fromarray(p) for p in as_uint8(images, prompts, self.name)], []
        with torch.no_grad():
            for i in range(0, len(pictures), self.batch):
                scores.append(torch.as_tensor(self.model.score(pictures[i : i + self.batch])).float().cpu())
        return torch.cat(scores).numpy()
