"""Stable Diffusion 3 pipelines: found and loaded, and the hash of what they hold."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .hub import hub_fault
from .identity import sha256_of
from .quiet import quiet

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

PARTS = ("vae", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def load_pipeline(
    model_id: str | Path, device: str | torch.device, dtype: torch.dtype
) -> StableDiffusion3Pipeline:
    """From a folder or the hub, its networks frozen. Raises FileNotFoundError for what is neither."""
    with quiet():  # on import transformers recommends torchvision, which we do not use
        from diffusers import StableDiffusion3Pipeline
    if isinstance(model_id, Path) or Path(model_id).is_absolute() or str(model_id).startswith("."):
        if not (Path(model_id) / "model_index.json").is_file():
            raise FileNotFoundError(
                f"{model_id} is not a diffusers pipeline folder (it has no model_index.json); "
                "give such a folder or a hub id"
            )
    try:
        with quiet():
            pipeline = StableDiffusion3Pipeline.from_pretrained(
                model_id, dtype=dtype, use_safetensors=True
            ).to(device)
    except OSError as error:
        raise FileNotFoundError(
            f"{str(model_id)!r} is neither a diffusers pipeline folder nor a hub id that can be "
            f"loaded with safetensors weights: {hub_fault(str(model_id), error)}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    for part in PARTS:
        if (module := getattr(pipeline, part)) is not None:
            module.eval().requires_grad_(False)
    return pipeline


def weights_hash(pipeline: StableDiffusion3Pipeline) -> str:
    """sha256 of the weights of transformer, VAE and text encoders, without adapters."""
    digest = hashlib.sha256()
    for part in PARTS:
        module = getattr(pipeline, part)
        for key, weight in (module.state_dict() if module is not None else {}).items():
            if ".lora_" not in key:
                digest.update(
                    f"{part} {key.removeprefix('base_model.model.').replace('.base_layer.', '.')} "
                    f"{sha256_of(weight)}".encode()
                )
    return digest.hexdigest()
