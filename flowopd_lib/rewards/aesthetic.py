"""LAION's aesthetic predictor, version 2 (Schuhmann 2022): how people rate a picture, by its CLIP embedding.

The head is published as a pickle, `sac+logos+ava1-l14-linearMSE.pth`; make it a safetensors file once:

    python -c "from flowopd_lib.rewards.aesthetic import convert_head as c; c('FILE.pth', 'head.safetensors')"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..prompts import Prompt
from .base import as_uint8, embed_pictures, finite, load_clip

LAYERS = (
    0,
    2,
    4,
    6,
    7,
)  # the linear ones among layers.N; dropout lies between, and no nonlinearity
KEYS = [f"layers.{n}.{part}" for n in LAYERS for part in ("weight", "bias")]


def check_head(state: Mapping[str, torch.Tensor], where: str | Path) -> None:
    """Raises ValueError for what is not the head: five linear layers, each as wide as the one before gives,
    the last one wide."""
    if set(state) != set(KEYS):
        wrong = sorted(set(state) ^ set(KEYS))
        raise ValueError(
            f"{where} is not LAION's aesthetic head: it differs in {', '.join(map(str, wrong[:3]))}; the "
            f"head has {KEYS[0]}, {KEYS[1]} to {KEYS[-1]}"
        )
    weights = [state[f"layers.{n}.weight"] for n in LAYERS]
    widths = [tuple(w.shape) for w in weights]
    if any(w.ndim != 2 for w in weights) or [w[1] for w in widths[1:]] + [1] != [
        w[0] for w in widths
    ]:
        raise ValueError(
            f"{where} is not LAION's aesthetic head: its layers, {widths}, do not fit together"
        )


def convert_head(pickled: str | Path, out: str | Path) -> Path:
    """The published head, a pickle of tensors (nothing else in it is read), as a safetensors file."""
    state = torch.load(pickled, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{pickled} holds no weights by name; give LAION's sac+logos+ava1-l14-linearMSE.pth"
        )
    check_head(state, pickled)
    save_file({key: state[key].float().contiguous() for key in KEYS}, out)
    return Path(out)


class Aesthetic:
    """About 1 to 10, whatever the prompt. Never trained on: it tells whether what is trained on is hacked.

    `clip_id`: a folder or hub id of a transformers `CLIPModel`, `openai/clip-vit-large-patch14`; `head`: the
    safetensors file `convert_head` makes. The score is linear in the unit embedding of the picture: the
    head's layers, 768-1024-128-64-16-1, have no nonlinearity between them.
    """

    name, range, held_out = "Aesthetic", (1.0, 10.0), True

    def __init__(self, clip_id: str | Path, head: str | Path, device: str = "cpu", batch: int = 64):
        self.batch = batch
        self.model, self.processor = load_clip(clip_id, self.name, device)
        if not Path(head).is_file():
            raise FileNotFoundError(
                f"no aesthetic head at {head}; make one with convert_head from LAION's file"
            )
        try:
            state = {
                name: w.to(device) for name, w in load_file(head).items()
            }  # which knows no cpu:0
        except SafetensorError as error:
            raise ValueError(
                f"{head} is no safetensors file ({error}); make one with convert_head"
            ) from error
        check_head(state, head)
        self.layers = [(state[f"layers.{n}.weight"], state[f"layers.{n}.bias"]) for n in LAYERS]
        if self.layers[0][0].shape[1] != self.model.config.projection_dim:
            raise ValueError(
                f"the aesthetic head at {head} takes embeddings of {self.layers[0][0].shape[1]} numbers, and "
                f"{clip_id} gives {self.model.config.projection_dim}; LAION's belongs to "
                "openai/clip-vit-large-patch14"
            )

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        z = embed_pictures(
            self.model, self.processor, list(as_uint8(images, prompts, self.name)), self.batch
        )
        for weight, bias in self.layers:
            z = torch.nn.functional.linear(z, weight, bias)
        return finite(z[:, 0], self.name)
