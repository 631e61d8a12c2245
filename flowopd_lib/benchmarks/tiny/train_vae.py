"""The autoencoder of the small benchmark: 64x64 RGB to 8x8x16 latents and back, colours kept."""

from __future__ import annotations

import copy
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from ...checkpoint import load_state, save_state
from ...precision import in_fast_precision
from .data import noisy_example, to_tensor

# (name, steps, learning rate, weight of fine detail): the whole picture, then what that leaves soft
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
    """L1 on pixels, on opponent colours (yellow must not come back orange) and on edges (letters must stay
    sharp).

    `detail` adds to the weight of pixels beside an edge of `x`: the points of a small star are few pixels.
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


def train_vae(out: Path, work: Path, batch: int = 32, seed: int = 0, log=print) -> AutoencoderKL:
    """Train and save to `out`; restarts from `work/vae-*.safetensors` if a run was cut off."""
    torch.manual_seed(seed)
    vae = new_vae()
    for name, steps, lr, detail in PHASES:
        vae = _phase(name, vae, steps, lr, detail, work, batch, seed, log)
    # One number each: diffusers' pipeline scales all latent channels alike.
    rng = random.Random(f"vae-scale/{seed}")
    with torch.no_grad():
        z = vae.encode(
            to_tensor([noisy_example(rng, spoiled=0.25)[1] for _ in range(512)])
        ).latent_dist.mean
    vae.register_to_config(
        scaling_factor=round(1 / z.std().item(), 6), shift_factor=round(z.mean().item(), 6)
    )
    vae.save_pretrained(out)
    return vae


def _phase(
    name: str,
    vae: AutoencoderKL,
    steps: int,
    lr: float,
    detail: float,
    work: Path,
    batch: int,
    seed: int,
    log,
) -> AutoencoderKL:
    """Go on training `vae` for `steps`; the averaged weights."""
    ema = copy.deepcopy(vae).eval().requires_grad_(False)
    vae.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr, betas=(0.9, 0.98), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, steps, pct_start=0.05, cycle_momentum=False
    )
    parts = {"vae": vae, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    saved, first = work / f"{name}.safetensors", 0
    if saved.exists():
        state = load_state(saved)
        first = state.pop("step")
        for key, part in parts.items():
            part.load_state_dict(state[key])
        log(f"{name}: going on from step {first}")
    began, seen = time.time(), 0.0
    for step in range(first, steps):
        rng = random.Random(f"{name}/{seed}/{step}")
        torch.manual_seed(seed * 1_000_003 + step)
        x = to_tensor([noisy_example(rng, spoiled=0.25)[1] for _ in range(batch)])
        with in_fast_precision():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        loss = (
            reconstruction_loss(y.float(), x, detail)
            + 3e-4 * 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(ema.parameters()),
                list(vae.parameters()),
                1 - min(0.999, (step + 1) / (step + 10)),
            )
        seen += loss.item()
        if (step + 1) % 100 == 0:
            log(
                f"{name} {step + 1}/{steps} loss {seen / 100:.4f} std {posterior.std.float().mean():.3f} "
                f"{(time.time() - began) / (step + 1 - first):.3f} s/step"
            )
            seen = 0.0
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_state(
                saved, {key: part.state_dict() for key, part in parts.items()} | {"step": step + 1}
            )
    return ema
