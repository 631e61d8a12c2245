"""The base model of the small world: an SD3 transformer and its text encoders, trained together by flow
matching.

The captions are wrong and the pictures spoiled at the rates of `DATA`, like web data: the base learns both
the right picture and how often the web is wrong, which is what reinforcement learning has to mend.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ...checkpoint import load_state, save_state
from ...precision import in_fast_precision
from .data import noisy_example, to_tensor
from .text import CLIP_TOKENS, WIDTH, encode, new_text_modules

# `max_sequence_length` of every call: five letters, </s>, and room to spare
T5_TOKENS = 8
# Two sets, because the alphabet is learned faster from cleaner captions. The second is used in the last
# eighth of the training; its rates, chosen on val prompts, decide how often the base is right.
DATA = (
    {"wrong": {"geneval": 0.12, "ocr": 0.15, "pickscore": 0.15}, "spoiled": 0.22},
    {"wrong": {"geneval": 0.05, "ocr": 0.45, "pickscore": 0.15}, "spoiled": 0.15},
)
LAST = 1 / 8  # of the steps, with the second set
# SD3's shift of sigma, in sampling and in training: what a picture shows is decided above sigma .8, where the
# plain logit-normal hardly looks.
SHIFT = 3.0
SAVE_EVERY = 500  # steps
CAPTION_DROPPED = 0.1  # trains the empty prompt, for classifier-free guidance


def new_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=4,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
    )


def build_pool(vae: AutoencoderKL, path: Path, modules: dict, n: int, seed: int, rates: dict, log) -> dict:
    """`n` captions and latents, encoded once: {"z": (n, 16, 8, 8) fp16 normalised, "clip": ids, "t5":
    ids}."""
    settings = {"n": n, "seed": seed, **rates}
    if path.exists():
        pool = load_state(path)
        if pool["settings"] != settings:
            raise ValueError(
                f"{path} was made with {pool['settings']}, not {settings}; delete it, and what was "
                "trained on it"
            )
        return pool
    began, z, texts, chunk = time.time(), [], [], 250
    examples = partial(_examples, seed=seed, n=chunk, rates=rates)
    # drawn ahead, for drawing takes longer than encoding
    with torch.no_grad(), in_fast_precision(), ProcessPoolExecutor(os.cpu_count()) as drawers:
        for captions, images in drawers.map(examples, range(0, n, chunk)):
            mean = vae.encode(to_tensor(list(images))).latent_dist.mean.float()
            z.append(((mean - vae.config.shift_factor) * vae.config.scaling_factor).half())
            texts += captions
    # laid out as a file gives them back: a convolution rounds otherwise over channels that come last
    z = torch.cat(z)[:n].contiguous()
    pool = {"z": z, **tokenize(modules, texts[:n]), "settings": settings}
    save_state(path, pool)
    log(f"pool of {n}: {time.time() - began:.0f} s")
    return pool


def _examples(first: int, seed: int, n: int, rates: dict) -> tuple:
    """`n` captions and their pictures, the same for the same `first` and `seed`."""
    rng = random.Random(f"pool/{seed}/{first}")
    return tuple(zip(*(noisy_example(rng, **rates) for _ in range(n))))


def tokenize(modules: dict, texts: list[str]) -> dict[str, torch.Tensor]:
    def ids(name, length):
        return torch.tensor(
            modules[name](texts, padding="max_length", max_length=length, truncation=True).input_ids
        )

    return {"clip": ids("tokenizer", CLIP_TOKENS), "t5": ids("tokenizer_3", T5_TOKENS)}


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon on the matrices of attention and MLP, AdamW on everything else."""
    blocks = {
        id(p)
        for name, p in model.named_parameters()
        if "transformer_blocks" in name and "norm" not in name and p.ndim == 2
    }
    muon = [p for p in model.parameters() if id(p) in blocks]
    adam = [p for p in model.parameters() if id(p) not in blocks]
    return [
        torch.optim.Muon(muon, lr=0.02, weight_decay=0.01, momentum=0.95, ns_steps=5),
        torch.optim.AdamW(adam, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def assemble(
    vae: AutoencoderKL, transformer: SD3Transformer2DModel, modules: dict
) -> StableDiffusion3Pipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)
    return StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=vae, **modules)


class MuonInFloat32(TorchFunctionMode):
    """torch's Muon orthogonalises in bfloat16, which a processor that has none does on one thread: nearly all
    of a step's time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0].clone() if func is torch.Tensor.bfloat16 else func(*args, **(kwargs or {}))


def update(model: nn.Module, opts: list[torch.optim.Optimizer], loss: torch.Tensor, rate: float) -> None:
    """One step at `rate` of each group's peak."""
    for optimizer in opts:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with MuonInFloat32():
        for optimizer in opts:
            optimizer.step()


def velocity(model: nn.ModuleDict, compiled: bool):
    """The trained function, (x, sigma, clip_ids, t5_ids) -> v: text encoders and transformer in one, fused if
    compiled."""

    def v(x, sigma, clip_ids, t5_ids):
        words, pooled = encode(model, clip_ids, t5_ids)
        return model["transformer"](x, words, pooled, sigma.flatten() * 1000).sample

    return torch.compile(v) if compiled else v


def train_base(
    vae: AutoencoderKL,
    out: Path,
    work: Path,
    steps: int = 24_000,
    batch: int = 64,
    pool_size: int = 120_000,
    decay: float = 0.35,
    seed: int = 0,
    compiled: bool = True,
    log=print,
) -> StableDiffusion3Pipeline:
    """Train and save a pipeline folder; restarts from `work/base.safetensors` if a run was cut off.

    `compiled`: two minutes of compiling, then steps 1.5 times as fast; not done where there is no C++
    compiler.
    """
    torch.manual_seed(seed)
    modules = new_text_modules(T5_TOKENS)
    model = nn.ModuleDict(
        {"transformer": new_transformer(), **{k: m for k, m in modules.items() if isinstance(m, nn.Module)}}
    )
    empty = tokenize(modules, [""])
    ema = copy.deepcopy(model).requires_grad_(False)
    opts = optimizers(model)
    for group in (g for o in opts for g in o.param_groups):
        group["peak"] = group["lr"]
    saved, first = work / "base.safetensors", 0
    if saved.exists():
        state = load_state(saved)
        first = state["step"]
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optimizer, old in zip(opts, state["optimizers"]):
            optimizer.load_state_dict(old)
        log(f"base: going on from step {first}")
    model.train()
    if compiled and not (shutil.which("g++") or shutil.which("clang++")):
        log(
            "base: no C++ compiler (g++ or clang++) found, so the steps are not compiled and take 1.5 times "
            "as long"
        )
        compiled = False
    forward = velocity(model, compiled)
    pool, phase, began, seen = {}, None, time.time(), 0.0
    for step in range(first, steps):
        if phase != (step >= (1 - LAST) * steps):
            phase = step >= (1 - LAST) * steps
            pool = build_pool(
                vae,
                work / f"pool-{int(phase)}.safetensors",
                modules,
                pool_size,
                seed + int(phase),
                DATA[phase],
                log,
            )
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(pool["z"]), (batch,), generator=g)
        x0, clip_ids, t5_ids = pool["z"][rows].float(), pool["clip"][rows], pool["t5"][rows]
        dropped = torch.rand(batch, 1, generator=g) < CAPTION_DROPPED
        clip_ids, t5_ids = (
            torch.where(dropped, empty["clip"], clip_ids),
            torch.where(dropped, empty["t5"], t5_ids),
        )
        sigma = torch.sigmoid(torch.randn(batch, generator=g))[:, None, None, None]  # SD3's logit-normal
        sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
        eps = torch.randn(x0.shape, generator=g)
        # The flash kernel's backward is slow on a CPU at 44 tokens: with the plain one a step takes two
        # thirds of the time.
        with in_fast_precision(), sdpa_kernel(SDPBackend.MATH):
            v = forward((1 - sigma) * x0 + sigma * eps, sigma, clip_ids, t5_ids)
        loss = (v.float() - (eps - x0)).square().mean()
        # warm up, hold, decay to 0
        rate = min(1.0, (step + 1) / 100, max(steps - step, 1) / (decay * steps))
        update(model, opts, loss, rate)
        with torch.no_grad():
            torch._foreach_lerp_(
                list(ema.parameters()), list(model.parameters()), 1 - min(0.999, (step + 1) / (step + 10))
            )
        seen += loss.item()
        if (step + 1) % 100 == 0:
            log(
                f"base {step + 1}/{steps} loss {seen / 100:.4f} "
                f"{(time.time() - began) / (step + 1 - first):.3f} s/step"
            )
            seen = 0.0
        if (step + 1) % SAVE_EVERY == 0:
            save_state(
                saved,
                {
                    "model": model.state_dict(),
                    "ema": ema.state_dict(),
                    "step": step + 1,
                    "optimizers": [o.state_dict() for o in opts],
                },
            )
            finish(vae, ema, modules, out)
    return finish(vae, ema, modules, out)


def finish(vae: AutoencoderKL, ema: nn.ModuleDict, modules: dict, out: Path) -> StableDiffusion3Pipeline:
    """The averaged weights as a pipeline folder in half precision."""
    halves = {name: copy.deepcopy(m).half().eval() for name, m in ema.items()}
    pipeline = assemble(copy.deepcopy(vae).half(), halves.pop("transformer"), {**modules, **halves})
    pipeline.save_pretrained(out)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        # transformers loads in the dtype its config names, diffusers in float32: name float32, so that the
        # two agree.
        config = out / name / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    for name in ("vae", "transformer"):
        # diffusers notes the folder a model was loaded from: no part of it
        config = out / name / "config.json"
        kept = {k: value for k, value in json.loads(config.read_text()).items() if k != "_name_or_path"}
        config.write_text(json.dumps(kept, indent=2) + "\n")
    return pipeline.to(torch.float32)
