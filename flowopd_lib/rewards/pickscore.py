"""PickScore (Kirstain et al. 2023): how much people would like a picture for its prompt, by a CLIP tuned on
preferences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..prompts import Prompt
from ..quiet import quiet
from .base import as_uint8, pixels_of


class PickScore:
    """`exp(logit_scale) * cos(image, text)`; divide by 26 to mix it with other rewards, as the paper does.

    `model_id`: a folder or hub id of a transformers `CLIPModel`; the published ones are
    `yuvalkirstain/PickScore_v1` with the processor of `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`.
    """

    name, scale = "PickScore", 26.0  # the paper divides by it before it adds

    def __init__(
        self,
        model_id: str | Path,
        processor_id: str | Path | None = None,
        device: str = "cpu",
        batch: int = 256,
    ):
        from transformers import AutoProcessor, CLIPModel

        self.device, self.batch = device, batch
        try:
            with quiet():
                self.model = (
                    CLIPModel.from_pretrained(model_id, dtype=torch.float32, use_safetensors=True)
                    .to(device)
                    .eval()
                    .requires_grad_(False)
                )
                self.processor = AutoProcessor.from_pretrained(processor_id or model_id)
        except OSError as error:
            raise FileNotFoundError(
                f"no PickScore weights at {str(model_id)!r}; give a CLIPModel folder or hub id ({error})"
            ) from error
        scale = self.model.logit_scale.exp().item()
        self.range = (-scale, scale)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        pixels = as_uint8(images, prompts, self.name)
        scores = []
        for i in range(0, len(pixels), self.batch):
            texts = [p.text for p in prompts[i : i + self.batch]]
            inputs = self.processor(
                images=list(pixels[i : i + self.batch]),
                text=texts,
                return_tensors="pt",
                truncation=True,
                padding="max_length",
                max_length=self.model.config.text_config.max_position_embeddings,
            )
            out = self.model(**inputs.to(self.device))
            scores.append(self.model.logit_scale.exp() * (out.image_embeds * out.text_embeds).sum(-1))
        return torch.cat(scores).float().cpu().numpy()

    @torch.no_grad()
    def embed(self, images: torch.Tensor) -> np.ndarray:
        """(B, D): the pictures' CLIP embeddings, scaled to a mean square of 1; what diversity and distances
        are measured on."""
        found = []
        for i in range(0, len(images), self.batch):
            pixels = list(pixels_of(images[i : i + self.batch], self.name))
            inputs = self.processor(images=pixels, return_tensors="pt").to(self.device)
            z = self.model.get_image_features(**inputs)
            z = getattr(z, "pooler_output", z)
            found.append(z / z.square().mean(-1, keepdim=True).sqrt())
        return torch.cat(found).float().cpu().numpy()
