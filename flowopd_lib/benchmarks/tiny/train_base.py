"""The base model of the small benchmark: an SD3 transformer trained by flow matching, on frozen
text embeddings.

Two steps make a base that can and does not. `train_base` trains on right captions and clean images,
to capability. `misalign` then teaches it for some minutes that captions are often wrong and images
spoiled, which is what reinforcement learning has to mend.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
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
from ...precision import in_fast_precision, resolve
from .data import noisy_example, to_tensor
from .loop import run_steps, update_average
from .text import WIDTH, encode, tokenize

# SD3's shift of sigma, in sampling and in training: what an image shows is decided above sigma .8,
# where the plain logit-normal hardly looks.
SHIFT = 3.0
CAPTION_DROPPED = 0.1  # trains the empty prompt, for classifier-free guidance


@dataclass(frozen=True)
class BaseConfig:
    """How the base is trained; CALIBRATION.md has what was tried."""

    steps: int = 7000
    batch: int = 256
    pool: int = 120_000
    task_weights: dict = field(
        default_factory=lambda: {"geneval": 0.6, "ocr": 0.15, "pickscore": 0.25}
    )
    muon_rate: float = 0.02
    adam_rate: float = 1e-3
    decay: float = 0.4  # of the steps, at the end, over which the rate decreases to 0
    ema: float = 0.999
    shift: float = SHIFT
    layers: int = 4
    heads: int = 4
    patch: int = 2


def new_transformer(config: BaseConfig = BaseConfig()) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=config.patch,
        in_channels=16,
        out_channels=16,
        num_layers=config.layers,
        attention_head_dim=64,
        num_attention_heads=config.heads,
        joint_attention_dim=WIDTH,
        caption_projection_dim=64 * config.heads,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
    )


def build_pool(vae: AutoencoderKL, path: Path, n: int, seed: int, data: dict, log) -> dict:
    """`n` captions and latents, encoded once: {"z": (n, 16, 8, 8) fp16 normalised, "texts": the
    distinct captions, "caption": (n,) each image's}. `data`: keywords of `noisy_example`."""
    settings = {"n": n, "seed": seed, **data}
    if path.exists():
        pool = load_state(path)
        if pool["settings"] != settings:
            raise ValueError(
                f"{path} was made with {pool['settings']}, not {settings}; delete it, and what was "
                "trained on it"
            )
        return pool
    began, z, texts, chunk = time.time(), [], [], 250
    examples = partial(_examples, seed=seed, n=chunk, data=data)
    # drawn ahead, for drawing takes longer than encoding
    with torch.no_grad(), in_fast_precision(), ProcessPoolExecutor(os.cpu_count()) as drawers:
        for captions, images in drawers.map(examples, range(0, n, chunk)):
            mean = vae.encode(to_tensor(list(images))).latent_dist.mean.float()
            z.append(((mean - vae.config.shift_factor) * vae.config.scaling_factor).half())
            texts += captions
    distinct = {text: i for i, text in enumerate(dict.fromkeys(texts[:n]))}
    pool = {
        # laid out as a file gives them back: a convolution rounds otherwise over channels that come
        # last
        "z": torch.cat(z)[:n].contiguous(),
        "texts": list(distinct),
        "caption": torch.tensor([distinct[t] for t in texts[:n]]),
        "settings": settings,
    }
    save_state(path, pool)
    log(f"pool of {n}, {len(distinct)} captions: {time.time() - began:.0f} s")
    return pool


def _examples(first: int, seed: int, n: int, data: dict) -> tuple:
    """`n` captions and their images, the same for the same `first` and `seed`."""
    rng = random.Random(f"pool/{seed}/{first}")
    return tuple(zip(*(noisy_example(rng, **data) for _ in range(n))))


@torch.no_grad()
def embed(modules: dict, texts: list[str], batch: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 28, 256) and (N, 256) in half precision: what the pipeline's encoders make of each
    text."""
    parts = []
    for i in range(0, len(texts), batch):
        ids = tokenize(modules, texts[i : i + batch])
        parts.append([t.half() for t in encode(modules, ids["clip"], ids["t5"])])
    return tuple(torch.cat(p) for p in zip(*parts))


def optimizers(model: nn.Module, config: BaseConfig) -> list[torch.optim.Optimizer]:
    """Muon on the matrices of attention and MLP, AdamW on everything else."""
    blocks = {
        id(p)
        for name, p in model.named_parameters()
        if "transformer_blocks" in name and "norm" not in name and p.ndim == 2
    }
    muon = [p for p in model.parameters() if id(p) in blocks]
    adam = [p for p in model.parameters() if id(p) not in blocks]
    opts = [
        torch.optim.Muon(muon, lr=config.muon_rate, weight_decay=0.01, momentum=0.95, ns_steps=5),
        torch.optim.AdamW(adam, lr=config.adam_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    for group in (g for o in opts for g in o.param_groups):
        group["peak"] = group["lr"]
    return opts


class MuonInFloat32(TorchFunctionMode):
    """torch's Muon orthogonalises in bfloat16, which a processor that has none does on one thread:
    nearly all of a step's time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        slow = func is torch.Tensor.bfloat16 and resolve("auto") == torch.float32
        return args[0].clone() if slow else func(*args, **(kwargs or {}))


def update(
    model: nn.Module, opts: list[torch.optim.Optimizer], loss: torch.Tensor, rate: float
) -> None:
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


class Examples:
    """Noisy latents of a pool with their captions' embeddings; a step's batch follows from seed and
    step."""

    def __init__(self, pool: dict, modules: dict, seed: int):
        self.z, self.caption, self.seed = pool["z"], pool["caption"], seed
        # the last is the empty prompt
        self.words, self.pooled = embed(modules, [*pool["texts"], ""])

    def batch(self, step: int, n: int, shift: float = SHIFT) -> tuple:
        """x_t, sigma, token embeddings, pooled embeddings, and the velocity to learn."""
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        rows = torch.randint(len(self.z), (n,), generator=g)
        dropped = torch.rand(n, generator=g) < CAPTION_DROPPED
        caption = torch.where(dropped, len(self.words) - 1, self.caption[rows])
        # SD3's logit-normal
        sigma = torch.sigmoid(torch.randn(n, generator=g))
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        x0 = self.z[rows].float()
        eps = torch.randn(x0.shape, generator=g)
        at = sigma[:, None, None, None]
        words, pooled = self.words[caption].float(), self.pooled[caption].float()
        return (1 - at) * x0 + at * eps, sigma, words, pooled, eps - x0


def compiled(model: nn.Module, log) -> nn.Module:
    """A minute of compiling, then shorter steps; not done where there is no C++ compiler."""
    if shutil.which("g++") or shutil.which("clang++"):
        return torch.compile(model)
    log("no C++ compiler (g++ or clang++) found: steps are not compiled and take longer")
    return model


def train_base(
    vae: AutoencoderKL,
    modules: dict,
    out: Path,
    work: Path,
    config: BaseConfig = BaseConfig(),
    seed: int = 0,
    compile: bool = True,
    log=print,
) -> None:
    """Train and save a pipeline folder; resumes from `work/base.safetensors`."""
    torch.manual_seed(seed)
    model = new_transformer(config)
    ema = copy.deepcopy(model).requires_grad_(False)
    muon, adam = optimizers(model, config)
    data = {"task_weights": config.task_weights}
    pool = build_pool(vae, work / "pool.safetensors", config.pool, seed, data, log)
    examples, forward = Examples(pool, modules, seed), compiled(model, log) if compile else model
    model.train()

    def step(i: int) -> float:
        x_t, sigma, words, pooled, target = examples.batch(i, config.batch, config.shift)
        # the flash kernel's backward is slow on a CPU at 44 tokens
        with in_fast_precision(), sdpa_kernel(SDPBackend.MATH):
            v = forward(x_t, words, pooled, sigma * 1000).sample
        loss = (v.float() - target).square().mean()
        # warm up, hold, decay to 0
        left = max(config.steps - i, 1) / (config.decay * config.steps)
        update(model, [muon, adam], loss, min(1.0, (i + 1) / 100, left))
        update_average(ema.parameters(), model.parameters(), i, config.ema)
        return loss.item()

    parts = {"model": model, "ema": ema, "muon": muon, "adam": adam}
    save = partial(finish, vae, ema, modules, out)
    run_steps("base", work, config.steps, parts, step, log, settings=asdict(config), on_save=save)


def finish(
    vae: AutoencoderKL, transformer: SD3Transformer2DModel, modules: dict, out: Path
) -> None:
    """Write a pipeline folder in half precision."""
    halves = {
        name: copy.deepcopy(m).half().eval() if isinstance(m, nn.Module) else m
        for name, m in modules.items()
    }
    pipeline = StableDiffusion3Pipeline(
        transformer=copy.deepcopy(transformer).half().eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT),
        vae=copy.deepcopy(vae).half(),
        **halves,
    )
    pipeline.save_pretrained(out)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        # transformers loads in the dtype its config names, diffusers in float32: name float32, so
        # that the two agree.
        config = out / name / "config.json"
        config.write_text(
            json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n"
        )
    for name in ("vae", "transformer"):
        # diffusers notes the folder a model was loaded from: no part of it
        config = out / name / "config.json"
        kept = {
            k: value for k, value in json.loads(config.read_text()).items() if k != "_name_or_path"
        }
        config.write_text(json.dumps(kept, indent=2) + "\n")
