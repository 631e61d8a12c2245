"""The last phase of the base: it learns, in some minutes, that captions are often wrong and images spoiled.

What it could do before stays in it, which is the situation of a real pretrained model: it can, and does not,
and reinforcement learning brings it out. The phase trains a LoRA adapter on every attention and MLP matrix,
which is then merged into the base; the same adapter with its sign turned is shipped beside the base and
restores what it could do before (`experts/ability`): the ceiling of every expert.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...adapters import ATTENTION, MLP, Lora, write_peft
from ...checkpoint import load_state, save_state
from ...precision import in_fast_precision
from .train_base import Examples, build_pool, finish

# How often the caption of an image is wrong, by task, and how often an image is spoiled, chosen on val prompts
# (CALIBRATION.md).
DATA = {"wrong": {"geneval": 0.35, "ocr": 0.45, "pickscore": 0.15}, "other": 0.5, "spoiled": 0.2}
RANK, ALPHA = 16, 32
SAVE_EVERY = 100  # steps


def misalign(
    vae: AutoencoderKL,
    modules: dict,
    capable: Path,
    out: Path,
    work: Path,
    data: dict = DATA,
    steps: int = 400,
    batch: int = 256,
    pool_size: int = 24_000,
    rate: float = 1e-3,
    seed: int = 1,
    compiled: bool = True,
    log=print,
) -> None:
    """Train on `data` from the pipeline folder `capable`; write the pipeline folder `out` and, beside it,
    `out/../ability`, the adapter that undoes it. Restarts from `work/misalign.safetensors`."""
    torch.manual_seed(seed)
    pool = build_pool(vae, work / "misaligned-pool.safetensors", pool_size, seed, data, log)
    examples = Examples(pool, modules, seed)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=[*ATTENTION, *MLP], init_lora_weights="gaussian"
    )
    transformer = SD3Transformer2DModel.from_pretrained(
        capable / "transformer", torch_dtype=torch.float32
    )
    model = get_peft_model(transformer.train(), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, steps, pct_start=0.1, cycle_momentum=False
    )
    saved, first = work / "misalign.safetensors", 0
    if saved.exists():
        state = load_state(saved)
        if state["data"] != data:
            raise ValueError(f"{saved} was begun with {state['data']}, not {data}; delete it")
        first = state["step"]
        with torch.no_grad():
            for mine, old in zip(
                [*trained, *average], [*state["trained"], *state["average"]], strict=True
            ):
                mine.copy_(old)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    forward = (
        torch.compile(model)
        if compiled and (shutil.which("g++") or shutil.which("clang++"))
        else model
    )
    began, seen = time.time(), 0.0
    for step in range(first, steps):
        x, sigma, words, pooled, target = examples.batch(step, batch)
        with in_fast_precision(), sdpa_kernel(SDPBackend.MATH):
            v = forward(x, words, pooled, sigma * 1000).sample
        loss = (v.float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                average, [p.data for p in trained], 1 - min(0.98, (step + 1) / (step + 10))
            )
        seen += loss.item()
        if (step + 1) % 50 == 0:
            log(
                f"misalign {step + 1}/{steps} loss {seen / 50:.4f} "
                f"{(time.time() - began) / (step + 1 - first):.3f} s/step"
            )
            seen = 0.0
        if (step + 1) % SAVE_EVERY == 0:
            save_state(
                saved,
                {
                    "trained": [p.data for p in trained],
                    "average": average,
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "step": step + 1,
                    "data": data,
                },
            )
    with torch.no_grad():
        for mine, mean in zip(trained, average):
            mine.copy_(mean)
    layers = {
        name.removeprefix("base_model.model."): m
        for name, m in model.named_modules()
        if hasattr(m, "lora_A")
    }
    undo = Lora(
        {place: m.lora_A["default"].weight.detach().half() for place, m in layers.items()},
        {place: -m.lora_B["default"].weight.detach().half() for place, m in layers.items()},
        dict.fromkeys(layers, float(ALPHA)),
    )
    write_peft(undo, out.parent / "ability")
    finish(vae, model.merge_and_unload(), modules, out)
