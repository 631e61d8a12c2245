"""The learned rewards of the small benchmark: PickScore (CLIP, contrastive and then Bradley-Terry)
and DeQA (a classifier of five levels).

Part of the images pass through the autoencoder first, so that a reward answers to the scene and not
to the decoder. Each has a gold reward that nothing is trained on: another network, trained on other
images.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
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

from ...precision import in_fast_precision
from ...rewards.deqa import LEVELS
from .data import SHARPNESS, candidate, graded_image, noisy_example, split_spec, to_tensor
from .loop import run_steps
from .scenes import SIZE
from .text import CLIP_TOKENS, clip_tokenizer

SCALE = 26.0  # exp(logit_scale), fixed: the paper divides PickScore by 26 in its average
GROUP = 8  # images of one prompt that are compared
# of PickScore and of its gold reward: width, layers and heads of the text and the image tower, and
# the steps on preferences
TOWERS = {False: ((128, 3, 2), (160, 4, 5)), True: ((160, 2, 5), (192, 3, 6))}
PREFERENCE_STEPS = {False: 3000, True: 2000}


class _Batches(Dataset):
    """The batch of each step, drawn in processes next to the training."""

    def __init__(self, draw: Callable, steps: int):
        self.draw, self.steps = draw, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i: int):
        return i, self.draw(i)


def to_pixels(images: list[Image.Image], rng: random.Random, fraction: float):
    """(B, 3, 64, 64) in [-1, 1], and the rows that pass through the autoencoder, each with this
    probability."""
    return to_tensor(images), [i for i in range(len(images)) if rng.random() < fraction]


@torch.no_grad()
def through_vae(vae: AutoencoderKL, x: torch.Tensor, rows: list[int], processor) -> torch.Tensor:
    """(B, 3, 64, 64) as the image processor normalises them, of which `rows` are reconstructed."""
    x = x.to(vae.device)
    for i in range(0, len(rows), 64):
        part = rows[i : i + 64]
        with in_fast_precision():
            x[part] = vae.decode(vae.encode(x[part]).latent_dist.mean).sample.float().clamp(-1, 1)
    mean, std = (
        torch.tensor(v, device=x.device)[:, None, None]
        for v in (processor.image_mean, processor.image_std)
    )
    return (((x + 1) * 127.5).round() / 255 - mean) / std


def train(
    name: str,
    model: nn.Module,
    draw: Callable,
    loss_of: Callable,
    steps: int,
    lr: float,
    work: Path,
    log,
) -> None:
    """Steps of `loss_of(draw(step))` with AdamW and one cycle of the learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, steps, pct_start=0.1, cycle_momentum=False
    )
    workers = max((os.cpu_count() or 1) - 2, 0)  # two cores are as busy without them
    batches = None
    model.train()

    def step(i: int) -> float:
        nonlocal batches
        if batches is None:
            data = _Batches(lambda k, first=i: draw(first + k), steps - i)
            batches = iter(DataLoader(data, batch_size=None, num_workers=workers))
        with in_fast_precision(), sdpa_kernel(SDPBackend.MATH):  # see train_base.py
            loss = loss_of(next(batches)[1])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        return loss.item()

    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    run_steps(name, work, steps, parts, step, log, every=100)
    model.eval()


def train_pickscore(
    vae: AutoencoderKL,
    out: Path,
    work: Path,
    contrastive: int = 1000,
    batch: int = 128,
    seed: int = 0,
    gold: bool = False,
    log=print,
) -> None:
    """PickScore, or its gold reward, on the autoencoder's device."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    text, vision = (
        dict(hidden_size=w, intermediate_size=3 * w, num_hidden_layers=n, num_attention_heads=h)
        for w, n, h in TOWERS[gold]
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
    special = {
        (f"{name}_token_id"): getattr(tokenizer, f"{name}_token_id")
        for name in ("bos", "eos", "pad")
    }
    config = CLIPConfig(
        text_config=dict(
            vocab_size=len(tokenizer), max_position_embeddings=CLIP_TOKENS, **special, **text
        ),
        vision_config=dict(image_size=SIZE, patch_size=8, **vision),
        projection_dim=128,
        logit_scale_init_value=float(np.log(SCALE)),
    )
    model = CLIPModel(config).to(vae.device)
    model.logit_scale.requires_grad_(False)

    def tokens(texts):
        padded = tokenizer(
            list(texts), padding=("max_length"), max_length=CLIP_TOKENS, truncation=True
        )
        return torch.tensor(padded.input_ids)

    def embed(ids, pixels):
        o = model(input_ids=ids.to(vae.device), pixel_values=through_vae(vae, *pixels, images))
        return o.text_embeds.float(), o.image_embeds.float()

    def captioned(step):
        rng = random.Random(f"clip/{seed}/{step}")
        texts, images = zip(*(noisy_example(rng, spoiled=0.3) for _ in range(batch)))
        return tokens(texts), to_pixels(list(images), rng, 0.25)

    def contrastive_loss(examples):
        t, i = embed(*examples)
        logits, same = SCALE * t @ i.T, torch.arange(batch, device=t.device)
        return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2

    first, second = torch.triu_indices(GROUP, GROUP, 1)

    def preferences(step):
        """Prompts with a group of candidates each, and who is preferred in every pair: 1 or -1."""
        rng, g = (
            random.Random(f"group/{seed}/{step}"),
            torch.Generator().manual_seed(seed * 1_000_003 + step),
        )
        specs = [split_spec(rng) for _ in range(batch // GROUP)]
        candidates = [candidate(spec, rng) for spec in specs for _ in range(GROUP)]
        utility = torch.tensor([c.utility for c in candidates]).unflatten(0, (-1, GROUP))
        p = torch.sigmoid(SHARPNESS * (utility[:, first] - utility[:, second]))
        chosen = torch.where(torch.rand(p.shape, generator=g) < p, 1.0, -1.0)
        pixels = to_pixels([c.image for c in candidates], rng, 0.25)
        return tokens(spec.text for spec in specs), pixels, chosen

    # Bradley-Terry: P(a preferred) = sigmoid(score of a - score of b), on every pair of a prompt's
    # images
    def preference_loss(examples):
        *offered, chosen = examples
        t, i = embed(*offered)
        scores = SCALE * (t[:, None] * i.unflatten(0, (-1, GROUP))).sum(-1)
        return -F.logsigmoid(chosen.to(t.device) * (scores[:, first] - scores[:, second])).mean()

    train("clip", model, captioned, contrastive_loss, contrastive, 1e-3, work, log)
    train(
        ("pickscore"), model, preferences, preference_loss, PREFERENCE_STEPS[gold], 6e-4, work, log
    )
    model.half().save_pretrained(out)
    CLIPProcessor(images, tokenizer).save_pretrained(out)


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
        model = RegNetForImageClassification(
            RegNetConfig(groups_width=16, layer_type=("y"), **shape)
        )
    else:
        model = ResNetForImageClassification(ResNetConfig(layer_type="basic", **shape))
    model.to(vae.device)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)

    def graded(step):
        rng = random.Random(f"deqa/{seed}/{step}")
        images, levels = zip(*(graded_image(rng) for _ in range(batch)))
        return to_pixels(list(images), rng, 0.5), torch.tensor(levels) - 1

    def loss_of(examples):
        pixels, levels = examples
        logits = model(pixel_values=through_vae(vae, *pixels, processor)).logits
        return F.cross_entropy(logits.float(), levels.to(vae.device), label_smoothing=0.02)

    train("deqa", model, graded, loss_of, steps, 2e-3, work, log)
    model.half().save_pretrained(out)
    processor.save_pretrained(out)
