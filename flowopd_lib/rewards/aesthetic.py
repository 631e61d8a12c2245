"""LAION's aesthetic predictor, version 2 (Schuhmann 2022): how people rate an image, from its CLIP
embedding.

The head is published as a pickle, `sac+logos+ava1-l14-linearMSE.pth`; convert it once:

    python -c "from flowopd_lib.rewards.aesthetic import convert_head
    convert_head('FILE.pth', 'head.safetensors')"
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import Dropout, Linear, Sequential

from ..data import Prompt
from .base import as_uint8, embed_images, load_clip


def load_head(state: dict[str, torch.Tensor], width: int, source: str | Path) -> torch.nn.Module:
    """The head for embeddings of `width` numbers; linear, because it has no nonlinearity. Raises
    ValueError, with the names and shapes that are wrong, unless `state` is its weights."""
    head = torch.nn.Module()
    head.layers = Sequential(
        *(Linear(width, 1024), Dropout(), Linear(1024, 128), Dropout(), Linear(128, 64)),
        *(Dropout(), Linear(64, 16), Linear(16, 1)),
    )
    try:
        head.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        fault = " ".join(str(error).split())
        raise ValueError(f"{source} is not LAION's aesthetic head: {fault}") from error
    return head.float().eval().requires_grad_(False)


def convert_head(pickled: str | Path, out: str | Path, width: int = 768) -> Path:
    """Writes the published head, a pickle of which only tensors are read, as a safetensors file."""
    state = torch.load(pickled, map_location="cpu", weights_only=True)
    save_file(load_head(state, width, pickled).state_dict(), out)
    return Path(out)


class Aesthetic:
    """About 1 to 10, whatever the prompt. Held out: it shows whether the rewards that are trained
    on are over-optimised.

    `clip_id`: a folder or hub id of a transformers `CLIPModel`, `openai/clip-vit-large-patch14`;
    `head`: the safetensors file written by `convert_head`.
    """

    name, range, held_out = "Aesthetic", (-5.0, 15.0), True  # the head is linear and has no bounds

    def __init__(self, clip_id: str | Path, head: str | Path, device: str = "cpu", batch: int = 64):
        self.batch = batch
        self.model, self.processor = load_clip(clip_id, self.name, device)
        try:
            state = load_file(head)
        except (FileNotFoundError, SafetensorError) as error:
            raise ValueError(f"cannot load {head}, made by convert_head: {error}") from error
        self.head = load_head(state, self.model.config.projection_dim, head).to(device)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        pixels = as_uint8(images, prompts, self.name)
        embeddings = embed_images(self.model, self.processor, pixels, self.batch)
        return self.head.layers(embeddings)[:, 0].cpu().numpy()
