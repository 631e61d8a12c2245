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
from PIL import Image
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
    mean, std = torch.tensor([processor.image_mean, processor.image_std], device=x.device)
    return (((x + 1) * 127.5).round() / 255 - mean[:, None, None]) / std[:, None, None]


def train(name, model, draw, loss_of, steps, rate, work) -> None:
    """Steps of `loss_of(draw(step))`."""
    descent = Descent(model.parameters(), rate, steps, warmup=0.1, weight_decay=0.05)
    model.train()

    def step(i: int) -> float:
        with in_fast_precision(), sdpa_kernel(SDPBackend.MATH):  # see train_base.py
            loss = loss_of(draw(i))
        return descent.step(loss)

    run_steps(name, work, steps, {"model": model, **descent.parts}, step, every=100)
    model.eval()


def train_pickscore(vae: AutoencoderKL, out: Path, work: Path, gold: bool = False) -> None:
    """PickScore, or its gold reward, on the autoencoder's device."""
    seed, batch = SEED + gold, PICKSCORE_BATCH
    torch.manual_seed(seed)
    tokenizer, images = clip_tokenizer(), transformers.CLIPImageProcessorPil(**IMAGES)
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
    model = transformers.CLIPModel(config).to(vae.device)
    model.logit_scale.requires_grad_(False)

    def embed(ids, pixels):
        o = model(input_ids=ids.to(vae.device), pixel_values=through_vae(vae, *pixels, images))
        return o.text_embeds.float(), o.image_embeds.float()

    def captioned(step):
        rng = random.Random(f"clip/{seed}/{step}")
        texts, images = zip(*(noisy_example(rng, spoiled=0.3) for _ in range(batch)))
        return token_ids(tokenizer, list(texts)), to_pixels(images, rng, 0.25)

    def contrastive_loss(examples):
        t, i = embed(*examples)
        logits, same = SCALE * t @ i.T, torch.arange(batch, device=t.device)
        return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2

    first, second = torch.triu_indices(GROUP, GROUP, 1)

    def preferences(step):
        """Prompts with a group of candidates each, and who is preferred in every pair: 1 or -1."""
        rng = random.Random(f"group/{seed}/{step}")
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        specs = [split_spec(rng) for _ in range(batch // GROUP)]
        images, utility = zip(*(candidate(spec, rng) for spec in specs for _ in range(GROUP)))
        utility = torch.tensor(utility).unflatten(0, (-1, GROUP))
        p = torch.sigmoid(SHARPNESS * (utility[:, first] - utility[:, second]))
        chosen = torch.where(torch.rand(p.shape, generator=g) < p, 1.0, -1.0)
        texts = token_ids(tokenizer, [spec.text for spec in specs])
        return texts, to_pixels(images, rng, 0.25), chosen

    def preference_loss(examples):
        """Bradley-Terry on every pair of a prompt's images: P(a preferred) = sigmoid(score of a -
        score of b)."""
        *offered, chosen = examples
        t, i = embed(*offered)
        scores = SCALE * (t[:, None] * i.unflatten(0, (-1, GROUP))).sum(-1)
        return -F.logsigmoid(chosen.to(t.device) * (scores[:, first] - scores[:, second])).mean()

    train("clip", model, captioned, contrastive_loss, CONTRASTIVE_STEPS, 1e-3, work)
    train("pickscore", model, preferences, preference_loss, PREFERENCE_STEPS[gold], 6e-4, work)
    model.half().save_pretrained(out)
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(out)


def train_deqa(vae: AutoencoderKL, out: Path, work: Path, gold: bool = False) -> None:
    """DeQA, a ResNet, or its gold reward, a RegNet, on the autoencoder's device."""
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
    model.to(vae.device)
    processor = transformers.CLIPImageProcessorPil(**IMAGES)

    def graded(step):
        rng = random.Random(f"deqa/{seed}/{step}")
        images, levels = zip(*(graded_image(rng) for _ in range(DEQA_BATCH)))
        return to_pixels(images, rng, 0.5), torch.tensor(levels) - 1

    def loss_of(examples):
        pixels, levels = examples
        logits = model(pixel_values=through_vae(vae, *pixels, processor)).logits
        return F.cross_entropy(logits.float(), levels.to(vae.device), label_smoothing=0.02)

    train("deqa", model, graded, loss_of, DEQA_STEPS, 2e-3, work)
    model.half().save_pretrained(out)
    processor.save_pretrained(out)
