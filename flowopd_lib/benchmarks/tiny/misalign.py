"""The last phase of the base: it learns, in some minutes, that captions are often wrong and images
spoiled.

What it could do before stays in it, which is the situation of a real pretrained model: it can, and
does not, and reinforcement learning brings it out. The phase trains a LoRA adapter on every
attention and MLP matrix, which is then merged into the base; the same adapter with its sign turned
is shipped next to the base and restores what it could do before (`assets/ability`): the ceiling of
every expert.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...lora import ATTENTION, MLP, Lora, LoRALinear, linear_modules, new_lora, write_peft
from ...precision import in_fast_precision
from .loop import run_steps, update_average
from .train_base import Examples, build_pool, compiled, finish

# How often the caption of an image is wrong, by task, and how often an image is spoiled, chosen on
# val prompts (CALIBRATION.md).
DATA = {"wrong": {"geneval": 0.35, "ocr": 0.45, "pickscore": 0.15}, "other": 0.5, "spoiled": 0.2}
RANK, ALPHA = 16, 32


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
    compile: bool = True,
    log=print,
) -> None:
    """Train on `data` from the pipeline folder `capable`; write the pipeline folder `out` and, next
    to it, `ability`, the adapter that undoes it. Resumes from `work/misalign.safetensors`."""
    torch.manual_seed(seed)
    examples = Examples(
        build_pool(vae, work / ("misaligned-pool.safetensors"), pool_size, seed, data, log),
        modules,
        seed,
    )
    model = SD3Transformer2DModel.from_pretrained(
        capable / ("transformer"), torch_dtype=torch.float32
    )
    model.requires_grad_(False)
    layers = _adapt(model, new_lora(linear_modules(model), RANK, ALPHA, ATTENTION + MLP, seed))
    trained = nn.ParameterList(f for layer in layers.values() for f in layer.factors["lora"][:2])
    average = nn.ParameterList(
        nn.Parameter(p.detach().clone(), requires_grad=False) for p in trained
    )
    optimizer = torch.optim.AdamW(
        trained.requires_grad_(True), rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, steps, pct_start=0.1, cycle_momentum=False
    )
    forward = compiled(model, log) if compile else model

    def step(i: int) -> float:
        x_t, sigma, words, pooled, target = examples.batch(i, batch)
        with in_fast_precision(), sdpa_kernel(SDPBackend.MATH):
            v = forward(x_t, words, pooled, sigma * 1000).sample
        loss = (v.float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        update_average(average, (p.data for p in trained), i, 0.98)
        return loss.item()

    parts = {"trained": trained, "average": average, "optimizer": optimizer, "schedule": schedule}
    run_steps("misalign", work, steps, parts, step, log, every=100, settings=data)
    a, b = (dict(zip(layers, [p.detach() for p in average][k::2])) for k in (0, 1))
    lora = Lora(a, b, dict.fromkeys(layers, float(ALPHA)))
    for name, layer in layers.items():
        layer.weight.data += lora.delta(name)
        layer.factors.clear()
    undo = Lora(
        {n: w.half() for n, w in a.items()}, {n: -w.half() for n, w in b.items()}, lora.alpha
    )
    write_peft(undo, out.parent / "ability")
    finish(vae, model, modules, out)


def _adapt(model: SD3Transformer2DModel, lora: Lora) -> dict[str, LoRALinear]:
    layers = {}
    for name in lora.a:
        parent, _, last = name.rpartition(".")
        layer = LoRALinear.wrap(model.get_submodule(name), ["lora"])
        layer.add("lora", lora.a[name], lora.b[name], lora.alpha[name])
        setattr(model.get_submodule(parent), last, layer)
        layers[name] = layer
    return layers
