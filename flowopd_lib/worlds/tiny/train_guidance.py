"""Guidance distilled into the base of the small world: it then draws in one forward what else takes two.

    v_student(x, sigma, c) = v(x, sigma, "") + w (v(x, sigma, c) - v(x, sigma, ""))

What the benchmarks say of real models is said of them with classifier-free guidance (Flow-GRPO asks SD3.5 at
4.5), and published ones have it distilled in (FLUX.1-dev; Meng et al., 2210.03142). Without it the small base
knows what a caption asks for and draws it too seldom. CALIBRATION.md says how `w` was found.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...checkpoint import load_state, save_state
from ...precision import in_fast_precision
from .text import encode, new_text_modules
from .train_base import CAPTION_DROPPED, SHIFT, T5_TOKENS, finish, optimizers, tokenize, update

GUIDANCE = {"things": 1.5, "sign": 1.0}  # w, of captions without and with a word in quotes
RATE = 0.1  # of the base's own
SAVE_EVERY = 100  # steps


def distil_guidance(
    vae: AutoencoderKL,
    start: Path,
    out: Path,
    work: Path,
    steps: int = 400,
    batch: int = 64,
    seed: int = 0,
    log=print,
) -> None:
    """Train the transformer of the pipeline in `start`, on the pool of its last captions and pictures in
    `work`, and write `out`; restarts from `work/guidance.safetensors`."""
    torch.manual_seed(seed)
    pipeline = StableDiffusion3Pipeline.from_pretrained(start)
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer")
    teacher = nn.ModuleDict({name: getattr(pipeline, name).float() for name in names}).requires_grad_(False)
    # not the pipeline's, which note how they were used
    tokenizers = {n: m for n, m in new_text_modules(T5_TOKENS).items() if not isinstance(m, nn.Module)}
    empty, pool = tokenize(tokenizers, [""]), load_state(work / "pool-1.safetensors")
    student = copy.deepcopy(teacher["transformer"]).requires_grad_(True)
    average, opts = copy.deepcopy(student).requires_grad_(False), optimizers(nn.ModuleDict({"t": student}))
    for group in (g for o in opts for g in o.param_groups):
        group["peak"] = group["lr"] * RATE
    saved, first = work / "guidance.safetensors", 0
    if saved.exists():
        state = load_state(saved)
        first = state["step"]
        student.load_state_dict(state["student"])
        average.load_state_dict(state["average"])
        for optimizer, old in zip(opts, state["optimizers"]):
            optimizer.load_state_dict(old)
    began, seen = time.time(), torch.zeros(2)
    for step in range(first, steps):
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(pool["z"]), (batch,), generator=g)
        x0, clip_ids, t5_ids = pool["z"][rows].float(), pool["clip"][rows], pool["t5"][rows]
        sign = (t5_ids != empty["t5"]).any(1)
        dropped = torch.rand(batch, generator=g) < CAPTION_DROPPED
        clip_ids = torch.where(dropped[:, None], empty["clip"], clip_ids)
        t5_ids = torch.where(dropped[:, None], empty["t5"], t5_ids)
        w = torch.where(sign, GUIDANCE["sign"], GUIDANCE["things"])
        w = torch.where(dropped, 1.0, w)[:, None, None, None]
        sigma = torch.sigmoid(torch.randn(batch, generator=g))[:, None, None, None]
        sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
        x = (1 - sigma) * x0 + sigma * torch.randn(x0.shape, generator=g)
        told = sigma.flatten() * 1000
        with in_fast_precision(), sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():
                words, pooled = encode(teacher, clip_ids, t5_ids)
                none, nothing = encode(teacher, empty["clip"], empty["t5"])
                none, nothing = none.expand(batch, -1, -1), nothing.expand(batch, -1)
                asked = teacher["transformer"](x, words, pooled, told).sample.float()
                unasked = teacher["transformer"](x, none, nothing, told).sample.float()
                target = unasked + w * (asked - unasked)
            v = student(x, words, pooled, told).sample.float()
        loss = (v - target).square().mean()
        # warm up, hold, decay to 0 in the second half
        rate = min(1.0, (step + 1) / 20, 2 * (steps - step) / steps)
        update(student, opts, loss, rate)
        with torch.no_grad():
            decay = 1 - min(0.98, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), decay)
        seen += torch.tensor([loss.item(), (asked - target).square().mean().item()])
        if (step + 1) % 50 == 0:
            log(
                f"guidance {step + 1}/{steps} loss {seen[0] / 50:.5f}, {seen[1] / 50:.5f} without training "
                f"{(time.time() - began) / (step + 1 - first):.3f} s/step"
            )
            seen.zero_()
        if (step + 1) % SAVE_EVERY == 0:
            state = {"student": student.state_dict(), "average": average.state_dict(), "step": step + 1}
            save_state(saved, state | {"optimizers": [o.state_dict() for o in opts]})
    ema = nn.ModuleDict({**dict(teacher.items()), "transformer": average})
    finish(vae, ema, tokenizers, out)
