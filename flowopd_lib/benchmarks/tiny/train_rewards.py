"""The learned rewards of the small benchmark: PickScore (CLIP, contrastive and then Bradley-Terry)
and DeQA (a classifier of five levels).

Part of the images pass through the autoencoder first, so that a reward answers to the scene and not
to the decoder. Each has a gold reward that nothing is trained on: another network, trained on other
images.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...loading import in_fast_precision
from ...rewards.deqa import LEVELS
from .data import SHARPNESS, candidate, graded_image, noisy_example, split_spec, to_tensor
from .loop import Descent, run_steps
from .scenes import SIZE
from .specs import SEED
from .text import CLIP_TOKENS, clip_tokenizer, special_tokens, token_ids

SCALE = 26.0  # exp(logit_scale), fixed: the paper divides PickScore by 26 in its average
GROUP = 8  # images of one prompt that are compared
# of PickScore and of its gold reward: width, layers and heads of the text and the image tower, and
# the steps on preferences
TOWERS = {False: ((128, 3, 2), (160, 4, 5)), True: ((160, 2, 5), (192, 3, 6))}
CONTRASTIVE_STEPS, PREFERENCE_STEPS, DEQA_STEPS = 1000, {False: 3000, True: 2000}, 1200
PICKSCORE_BATCH, DEQA_BATCH = 128, 64
IMAGES = dict(size={"shortest_edge": SIZE}, crop_size=SIZE)


@torch.no_grad()
def to_pixels(vae: AutoencoderKL, images, rng, fraction: float, processor) -> torch.Tensor:
    """(B, 3, 64, 64) as the image processor normalises them, of which this fraction passes through
    the autoencoder."""
    x, rows = to_tensor(images), [i for i in range(len(images)) if rng.random() < fraction]
    for i in range(0, len(rows), 64):
        part = rows[i : i + 64]
        with in_fast_precision():
            x[part] = vae.decode(vae.encode(x[part]).latent_dist.mean).sample.float().clamp(-1, 1)
    mean, std = torch.tensor([processor.image_mean, processor.image_std])
    return (((x + 1) * 127.5).round() / 255 - mean[:, None, None]) / std[:, None, None]


def train(name, model, loss_of, steps, rate, work) -> None:
    """Steps of `loss_of(step)`."""
    descent = Descent(model.parameters(), rate, steps, warmup=0.1, weight_decay=0.05)
    model.train()

    def step(i: int) -> float:
        with in_fast_precision(), sdpa_kernel(SDPBackend.MATH):  # see train_base.py
            loss = loss_of(i)
        return descent.step(loss)

    run_steps(name, work, steps, {"model": model, **descent.parts}, step, every=100)
    model.eval()


def train_pickscore(vae: AutoencoderKL, out: Path, work: Path, gold: bool = False) -> None:
    """PickScore, or its gold reward."""
    seed, batch = SEED + gold, PICKSCORE_BATCH
    torch.manual_seed(seed)
    tokenizer, processor = clip_tokenizer(), transformers.CLIPImageProcessorPil(**IMAGES)
    text, vision = (
        dict(hidden_size=w, intermediate_size=3 * w, num_hidden_layers=n, num_attention_heads=h)
        for w, n, h in TOWERS[gold]
    )
    text |= dict(vocab_size=len(tokenizer), max_position_embeddings=CLIP_TOKENS)
    text |= special_tokens(tokenizer)
    config = transformers.CLIPConfig(
        text_config=text,
        vision_config=dict(image_size=SIZE, patch_size=8, **vision),
        projection_dim=128,
        logit_scale_init_value=float(np.log(SCALE)),
    )
    model = transformers.CLIPModel(config)
    model.logit_scale.requires_grad_(False)

    def embed(texts, images, rng):
        pixels = to_pixels(vae, images, rng, 0.25, processor)
        o = model(input_ids=token_ids(tokenizer, list(texts)), pixel_values=pixels)
        return o.text_embeds.float(), o.image_embeds.float()

    def contrastive_loss(step):
        rng = random.Random(f"clip/{seed}/{step}")
        texts, images = zip(*(noisy_example(rng, spoiled=0.3) for _ in range(batch)))
        t, i = embed(texts, images, rng)
        logits, same = SCALE * t @ i.T, torch.arange(batch)
        return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2

    first, second = torch.triu_indices(GROUP, GROUP, 1)

    def preference_loss(step):
        """Bradley-Terry on every pair of a prompt's images: P(a preferred) = sigmoid(score of a -
        score of b)."""
        rng = random.Random(f"group/{seed}/{step}")
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        specs = [split_spec(rng) for _ in range(batch // GROUP)]
        images, utility = zip(*(candidate(spec, rng) for spec in specs for _ in range(GROUP)))
        utility = torch.tensor(utility).unflatten(0, (-1, GROUP))
        p = torch.sigmoid(SHARPNESS * (utility[:, first] - utility[:, second]))
        chosen = torch.where(torch.rand(p.shape, generator=g) < p, 1.0, -1.0)  # a, or b
        t, i = embed([spec.text for spec in specs], images, rng)
        scores = SCALE * (t[:, None] * i.unflatten(0, (-1, GROUP))).sum(-1)
        return -F.logsigmoid(chosen * (scores[:, first] - scores[:, second])).mean()

    train("clip", model, contrastive_loss, CONTRASTIVE_STEPS, 1e-3, work)
    train("pickscore", model, preference_loss, PREFERENCE_STEPS[gold], 6e-4, work)
    model.half().save_pretrained(out)
    transformers.CLIPProcessor(processor, tokenizer).save_pretrained(out)


def train_deqa(vae: AutoencoderKL, out: Path, work: Path, gold: bool = False) -> None:
    """DeQA, a ResNet, or its gold reward, a RegNet."""
    seed = SEED + gold
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
        config = transformers.RegNetConfig(groups_width=16, layer_type="y", **shape)
        model = transformers.RegNetForImageClassification(config)
    else:
        model = transformers.ResNetForImageClassification(
            transformers.ResNetConfig(layer_type="basic", **shape)
        )
    processor = transformers.CLIPImageProcessorPil(**IMAGES)

    def loss_of(step):
        rng = random.Random(f"deqa/{seed}/{step}")
        images, levels = zip(*(graded_image(rng) for _ in range(DEQA_BATCH)))
        logits = model(pixel_values=to_pixels(vae, images, rng, 0.5, processor)).logits
        levels = torch.tensor(levels) - 1
        return F.cross_entropy(logits.float(), levels, label_smoothing=0.02)

    train("deqa", model, loss_of, DEQA_STEPS, 2e-3, work)
    model.half().save_pretrained(out)
    processor.save_pretrained(out)
