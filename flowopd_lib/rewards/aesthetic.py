"""LAION's aesthetic predictor, version 2 (Schuhmann 2022): how people rate an image, from its CLIP
embedding.

The head is published as a pickle, `sac+logos+ava1-l14-linearMSE.pth`; docs/reward-server.md has the
command that converts it to safetensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import Dropout, Linear, Sequential

from ..data import Prompt
from .base import as_uint8, embed_images, load_clip


def load_head(path: str | Path, width: int) -> torch.nn.Module:
    """The head for embeddings of `width` numbers; linear, because it has no nonlinearity. Raises
    ValueError for a file without its weights."""
    head = torch.nn.Module()
    head.layers = Sequential(
        *(Linear(width, 1024), Dropout(), Linear(1024, 128), Dropout(), Linear(128, 64)),
        *(Dropout(), Linear(64, 16), Linear(16, 1)),
    )
    try:
        head.load_state_dict(load_file(path))
    except (FileNotFoundError, SafetensorError, RuntimeError) as error:
        fault = " ".join(str(error).split())
        raise ValueError(f"{path} is not LAION's aesthetic head as safetensors: {fault}") from error
    return head.float().eval().requires_grad_(False)


class Aesthetic:
    """About 1 to 10, whatever the prompt. Held out: it shows whether the rewards that are trained
    on are over-optimised.

    `clip_id`: a folder or hub id of a transformers `CLIPModel`, `openai/clip-vit-large-patch14`;
    `head`: the safetensors file.
    """

    name, range, held_out = "Aesthetic", (-5.0, 15.0), True  # the head is linear and has no bounds

    def __init__(self, clip_id: str | Path, head: str | Path, device: str = "cpu", batch: int = 64):
        self.batch = batch
        self.model, self.processor = load_clip(clip_id, self.name, device)
        self.head = load_head(head, self.model.config.projection_dim).to(device)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        pixels = as_uint8(images, prompts, self.name)
        embeddings = embed_images(self.model, self.processor, pixels, self.batch)
        return self.head.layers(embeddings)[:, 0].cpu().numpy()
