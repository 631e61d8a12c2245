"""PickScore (Kirstain et al. 2023): how much people would like a picture for its prompt, by a CLIP tuned on
preferences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..prompts import Prompt
from .base import as_uint8, embed_pictures, finite, load_clip, pixels_of, prepared


class PickScore:
    """`exp(logit_scale) * cos(image, text)`, undivided, as papers report it (21 to 24); divide by 26 to mix
    it with other rewards, as the paper does.

    `model_id`: a folder or hub id of a transformers `CLIPModel`, `processor_id` of its processor if that lies
    elsewhere; the published ones are `yuvalkirstain/PickScore_v1` with the processor of
    `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`.
    """

    name, scale = "PickScore", 26.0  # the paper divides by it before it adds

    def __init__(
        self,
        model_id: str | Path,
        processor_id: str | Path | None = None,
        device: str = "cpu",
        batch: int = 256,
    ):
        self.device, self.batch = device, batch
        self.model, self.processor = load_clip(model_id, self.name, device, processor_id)
        scale = self.model.logit_scale.exp().item()
        self.range = (-scale, scale)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        pixels = as_uint8(images, prompts, self.name)
        scores = []
        for i in range(0, len(pixels), self.batch):
            part = self.processor.image_processor(
                list(pixels[i : i + self.batch]), return_tensors="pt"
            )
            scores.append(self._score(part["pixel_values"], prompts[i : i + self.batch]))
        return finite(torch.cat(scores), self.name)

    def with_gradient(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,): the score of images (B, 3, H, W) in [0, 1] with the graph they carry."""
        return self._score(prepared(images, self.processor.image_processor), prompts)

    def _score(self, pixels: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        texts = self.processor.tokenizer(
            [p.text for p in prompts],
            return_tensors="pt",
            truncation=True,
            padding="max_length",
            max_length=self.model.config.text_config.max_position_embeddings,
        )
        out = self.model(pixel_values=pixels.to(self.device), **texts.to(self.device))
        return self.model.logit_scale.exp() * (out.image_embeds * out.text_embeds).sum(-1)

    @torch.no_grad()
    def embed(self, images: torch.Tensor) -> np.ndarray:
        """(B, D): the pictures' CLIP embeddings, scaled to a mean square of 1; what diversity and distances
        are measured on."""
        pixels = list(pixels_of(images, self.name))
        z = embed_pictures(self.model, self.processor, pixels, self.batch)
        return (z * z.shape[-1] ** 0.5).cpu().numpy()
