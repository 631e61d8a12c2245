"""The learned rewards of the small benchmark: PickScore (CLIP, contrastive and then Bradley-Terry) and DeQA
(classifier).

Part of the pictures pass through the autoencoder first, so that a reward answers to the scene and not to the
decoder. Each has a gold, which nothing is trained on: another network, that has seen other pictures.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from ...checkpoint import load_state, save_state
from ...precision import in_fast_precision
from ...rewards.deqa import LEVELS
from .data import SHARPNESS, candidate, graded_picture, noisy_example, split_spec, to_tensor
from .scenes import SIZE
from .text import CLIP_TOKENS, clip_tokenizer

SCALE = 26.0  # exp(logit_scale), fixed: the paper divides PickScore by 26 in its average

# of PickScore, and of its gold reward: the towers, and the cycles (steps, learning rate) on people's preferences
WIDTHS = {
    "text": dict(
        hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=2
    ),
    "vision": dict(
        hidden_size=160, intermediate_size=480, num_hidden_layers=4, num_attention_heads=5
    ),
}
GOLD_WIDTHS = {
    "text": dict(
        hidden_size=160, intermediate_size=480, num_hidden_layers=2, num_attention_heads=5
    ),
    "vision": dict(
        hidden_size=192, intermediate_size=768, num_hidden_layers=3, num_attention_heads=6
    ),
}
CYCLES, GOLD_CYCLES = ((2700, 6e-4), (2000, 5e-4), (1500, 5e-4)), ((2000, 6e-4),)


@dataclass(frozen=True)
class _Steps:
    """What the steps of a training are made of, drawn in processes beside it."""

    of: Callable[[int], Any]
    steps: range

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: int) -> Any:
        return self.of(self.steps[i])


def pictures_of(
    images: list[Image.Image], rng: random.Random, share: float
) -> tuple[torch.Tensor, list[int]]:
    """(B, 3, 64, 64) in [-1, 1], and the rows that are to pass through the autoencoder, each with probability
    `share`."""
    return to_tensor(images), [i for i in range(len(images)) if rng.random() < share]


@torch.no_grad()
def through_vae(vae: AutoencoderKL, x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """(B, 3, 64, 64) uint8: `x`, of which these rows are reconstructed."""
    x = x.to(vae.device)
    for i in range(0, len(rows), 64):
        part = rows[i : i + 64]
        with in_fast_precision():
            x[part] = vae.decode(vae.encode(x[part]).latent_dist.mean).sample.float().clamp(-1, 1)
    return ((x + 1) * 127.5).round().byte()


def train(
    name: str,
    model: nn.Module,
    drawn: Callable,
    loss_of: Callable,
    steps: int,
    lr: float,
    work: Path,
    log,
) -> nn.Module:
    """Steps of `loss_of(drawn(step))` with AdamW and one cycle of the learning rate; restarts from
    `work/{name}.safetensors`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, steps, pct_start=0.1, cycle_momentum=False
    )
    parts, saved, first = (
        {"model": model, "optimizer": optimizer, "schedule": schedule},
        work / f"{name}.safetensors",
        0,
    )
    if saved.exists():
        state = load_state(saved)
        first = state.pop("step")
        for key, part in parts.items():
            part.load_state_dict(state[key])
    model.train()
    began, seen = time.time(), 0.0
    # two cores are as busy without them
    beside = max((os.cpu_count() or 1) - 2, 0)
    data = DataLoader(_Steps(drawn, range(first, steps)), batch_size=None, num_workers=beside)
    for step, found in enumerate(data, first):
        with in_fast_precision(), sdpa_kernel(SDPBackend.MATH):  # see train_base.py
            loss = loss_of(found)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen += loss.item()
        if (step + 1) % 100 == 0:
            log(
                f"{name} {step + 1}/{steps} loss {seen / 100:.4f} "
                f"{(time.time() - began) / (step + 1 - first):.3f} s/step"
            )
            seen = 0.0
            save_state(
                saved, {key: part.state_dict() for key, part in parts.items()} | {"step": step + 1}
            )
    return model.eval()


def normalise(pixels: torch.Tensor, processor) -> torch.Tensor:
    """What the image processor does to a picture that has the right size already."""
    mean, std = (
        torch.tensor(v, device=pixels.device)[:, None, None]
        for v in (processor.image_mean, processor.image_std)
    )
    return (pixels.float() / 255 - mean) / std


def train_pickscore(
    vae: AutoencoderKL,
    out: Path,
    work: Path,
    contrastive: int = 1000,
    batch: int = 128,
    group: int = 8,
    seed: int = 0,
    gold: bool = False,
    log=print,
) -> None:
    """PickScore, or its gold reward, on the autoencoder's device."""
    widths, preference = (GOLD_WIDTHS, GOLD_CYCLES) if gold else (WIDTHS, CYCLES)
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    processor = CLIPProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE), tokenizer
    )
    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    text = dict(
        vocab_size=len(tokenizer), max_position_embeddings=CLIP_TOKENS, **special, **widths["text"]
    )
    model = CLIPModel(
        CLIPConfig(
            text_config=text,
            vision_config=dict(image_size=SIZE, patch_size=8, **widths["vision"]),
            projection_dim=128,
            logit_scale_init_value=float(np.log(SCALE)),
        )
    )
    model.logit_scale.requires_grad_(False)
    model.to(vae.device)

    def tokens(texts):
        padded = tokenizer(
            list(texts), padding="max_length", max_length=CLIP_TOKENS, truncation=True
        )
        return torch.tensor(padded.input_ids)

    def embed(ids, pixels):
        pixels = normalise(through_vae(vae, *pixels), processor.image_processor)
        o = model(input_ids=ids.to(vae.device), pixel_values=pixels)
        return o.text_embeds.float(), o.image_embeds.float()

    def captioned(step):
        rng = random.Random(f"clip/{seed}/{step}")
        texts, images = zip(*(noisy_example(rng, spoiled=0.3) for _ in range(batch)))
        return tokens(texts), pictures_of(list(images), rng, 0.25)

    def contrastive_loss(found):
        t, i = embed(*found)
        logits, same = SCALE * t @ i.T, torch.arange(batch, device=t.device)
        return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2

    train("clip", model, captioned, contrastive_loss, contrastive, 1e-3, work, log)
    first, second = torch.triu_indices(group, group, 1)

    def offers(step):
        rng = random.Random(f"group/{seed}/{step}")
        specs = [split_spec(rng) for _ in range(batch // group)]
        offered = [candidate(spec, rng) for spec in specs for _ in range(group)]
        utility = torch.tensor([c.utility for c in offered]).unflatten(0, (-1, group))
        p = torch.sigmoid(SHARPNESS * (utility[:, first] - utility[:, second]))
        chosen = torch.where(
            torch.rand(p.shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
            < p,
            1.0,
            -1.0,
        )
        return (
            tokens(spec.text for spec in specs),
            pictures_of([c.image for c in offered], rng, 0.25),
            chosen,
        )

    # Bradley-Terry: P(a preferred) = sigmoid(score of a - score of b), on every pair of a prompt's pictures
    def preference_loss(found):
        *offered, chosen = found
        t, i = embed(*offered)
        scores = SCALE * (t[:, None] * i.unflatten(0, (-1, group))).sum(-1)
        return -F.logsigmoid(chosen.to(t.device) * (scores[:, first] - scores[:, second])).mean()

    before = 0
    # each a cycle of the learning rate, all on new pictures
    for cycle, (steps, lr) in enumerate(preference):
        train(
            f"pickscore-{cycle}",
            model,
            lambda step, before=before: offers(before + step),
            preference_loss,
            steps,
            lr,
            work,
            log,
        )
        before += steps
    model.half().save_pretrained(out)
    processor.save_pretrained(out)


def train_deqa(
    vae: AutoencoderKL,
    out: Path,
    work: Path,
    steps: int = 1200,
    batch: int = 64,
    seed: int = 0,
    gold: bool = False,
    log=print,
) -> None:
    """DeQA, a ResNet, or its gold reward, a RegNet, on the autoencoder's device."""
    torch.manual_seed(seed)
    shape = dict(
        embedding_size=32,
        hidden_sizes=[48, 96, 192] if gold else [32, 64, 128],
        depths=[1, 2, 2],
        num_labels=len(LEVELS),
        id2label=dict(enumerate(LEVELS)),
        label2id={v: k for k, v in enumerate(LEVELS)},
    )
    if gold:
        model = RegNetForImageClassification(RegNetConfig(groups_width=16, layer_type="y", **shape))
    else:
        model = ResNetForImageClassification(ResNetConfig(layer_type="basic", **shape))
    model.to(vae.device)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)

    def graded(step):
        rng = random.Random(f"deqa/{seed}/{step}")
        images, levels = zip(*(graded_picture(rng) for _ in range(batch)))
        return pictures_of(list(images), rng, 0.5), torch.tensor(levels) - 1

    def loss_of(found):
        pixels, levels = found
        logits = model(pixel_values=normalise(through_vae(vae, *pixels), processor)).logits
        return F.cross_entropy(logits.float(), levels.to(vae.device), label_smoothing=0.02)

    train("deqa", model, graded, loss_of, steps, 2e-3, work, log)
    model.half().save_pretrained(out)
    processor.save_pretrained(out)
