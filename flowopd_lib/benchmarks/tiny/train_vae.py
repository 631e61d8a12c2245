"""The autoencoder of the small benchmark: 64x64 RGB to 8x8x16 latents and back, colours kept."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from ...precision import in_fast_precision
from .data import noisy_example, to_tensor
from .loop import run_steps, update_average

# (name, steps, learning rate, weight of fine detail): the whole image, then what that leaves soft
PHASES = (("vae", 5000, 2e-3, 0.0), ("vae-detail", 1500, 1e-3, 4.0))


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def reconstruction_loss(y: torch.Tensor, x: torch.Tensor, detail: float = 0.0) -> torch.Tensor:
    """L1 on pixels, on opponent colours (yellow must not come back orange) and on edges (letters
    must stay sharp).

    `detail` adds to the weight of pixels next to an edge of `x`: the points of a small star are few
    pixels.
    """

    def opponent(z):
        return torch.stack((z[:, 0] - z[:, 1], z[:, 2] - (z[:, 0] + z[:, 1]) / 2), 1)

    weight = 1.0
    if detail:
        high, low = F.max_pool2d(x, 3, 1, 1), -F.max_pool2d(-x, 3, 1, 1)
        weight = 1 + detail * ((high - low).amax(1, keepdim=True) > 0.3).float()
        weight = weight / weight.mean()
    pixels = (weight * ((y - x).abs() + 0.5 * (y - x).square())).mean()
    colors = (weight * (opponent(y) - opponent(x)).abs()).mean()
    edges = sum((torch.diff(y, dim=d) - torch.diff(x, dim=d)).abs().mean() for d in (2, 3))
    return pixels + 0.5 * colors + 0.5 * edges


def train_vae(out: Path, work: Path, batch: int = 32, seed: int = 0, log=print) -> None:
    """Train and save to `out`; resumes from `work/vae*.safetensors`."""
    torch.manual_seed(seed)
    vae = new_vae()
    for name, steps, lr, detail in PHASES:
        vae = _phase(name, vae, steps, lr, detail, work, batch, seed, log)
    # One number each: diffusers' pipeline scales all latent channels alike.
    rng = random.Random(f"vae-scale/{seed}")
    with torch.no_grad():
        images = to_tensor([noisy_example(rng, spoiled=0.25)[1] for _ in range(512)])
        z = vae.encode(images).latent_dist.mean
    scale, shift = round(1 / z.std().item(), 6), round(z.mean().item(), 6)
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    vae.save_pretrained(out)


def _phase(name, vae, steps, lr, detail, work, batch, seed, log) -> AutoencoderKL:
    """Train `vae` for `steps` more; the averaged weights."""
    ema = copy.deepcopy(vae).eval().requires_grad_(False)
    vae.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr, betas=(0.9, 0.98), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, steps, pct_start=0.05, cycle_momentum=False
    )

    def step(i: int) -> float:
        rng = random.Random(f"{name}/{seed}/{i}")
        torch.manual_seed(seed * 1_000_003 + i)
        x = to_tensor([noisy_example(rng, spoiled=0.25)[1] for _ in range(batch)])
        with in_fast_precision():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction_loss(y.float(), x, detail) + 3e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        update_average(ema.parameters(), vae.parameters(), i, 0.999)
        return loss.item()

    parts = {"vae": vae, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    run_steps(name, work, steps, parts, step, log)
    return ema
