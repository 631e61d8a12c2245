"""PickScore (Kirstain et al. 2023): which image people prefer for a prompt, by a CLIP model trained
on preferences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..data import Prompt
from .base import as_uint8, batches, embed_images, load_clip, preprocess_with_gradient


class PickScore:
    """`exp(logit_scale) * cos(image, text)`, undivided, as papers report it (21 to 24).

    `model_id`: a folder or hub id of a transformers `CLIPModel`; `processor_id`: of its processor,
    if that is elsewhere. The published ones are `yuvalkirstain/PickScore_v1` and
    `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`.
    """

    name, scale = "PickScore", 26.0  # the paper divides by it before rewards are added up

    def __init__(
        self,
        model_id: str | Path,
        processor_id: str | Path = "",
        device: str = "cpu",
        batch: int = 256,
    ):
        self.batch = batch
        self.model, self.processor = load_clip(model_id, self.name, device, processor_id)
        scale = self.model.logit_scale.exp().item()
        self.range = (-scale, scale)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        pixels, process = as_uint8(images, prompts, self.name), self.processor.image_processor
        scores = [
            self._score(process(list(some), return_tensors="pt")["pixel_values"], own)
            for some, own in batches(self.batch, pixels, prompts)
        ]
        return torch.cat(scores).cpu().numpy()

    def with_gradient(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,): the scores of images (B, 3, H, W) in [0, 1], differentiable in them."""
        pixels = preprocess_with_gradient(images, self.processor.image_processor)
        return self._score(pixels, prompts)

    def _score(self, pixels: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        options["max_length"] = self.model.config.text_config.max_position_embeddings
        inputs = self.processor.tokenizer([p.text for p in prompts], **options)
        inputs["pixel_values"] = pixels
        out = self.model(**inputs.to(self.model.device))
        return self.model.logit_scale.exp() * (out.image_embeds * out.text_embeds).sum(-1)

    @torch.no_grad()
    def embed(self, images: torch.Tensor) -> np.ndarray:
        """(B, D): CLIP embeddings of the images with a mean square of 1, on which diversity and
        distances are measured."""
        z = embed_images(self.model, self.processor, as_uint8(images, None, self.name), self.batch)
        return (z * z.shape[-1] ** 0.5).cpu().numpy()
