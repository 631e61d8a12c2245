"""The base of the small benchmark: an autoencoder, and an SD3 transformer trained by flow matching
on frozen text embeddings.

Two steps make a base that can draw what a prompt describes and often does not. `train_base` trains
on right captions and clean images, to capability. `misalign` then teaches it for some minutes that
captions are often wrong and images spoiled, which is what reinforcement learning has to mend.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ...files import load_state, save_state
from ...loading import in_fast_precision, resolve
from ...lora import ATTENTION, MLP, Lora, LoRALinear, linear_modules, new_lora, write_peft
from .data import noisy_example, to_tensor
from .loop import Descent, run_steps, say, update_average
from .specs import SEED
from .text import WIDTH, encode, tokenize

# --- the autoencoder: 64x64 RGB to 8x8x16 latents and back, colours kept

# (name, steps, learning rate, weight of fine detail): the whole image, then what that leaves soft
PHASES = (("vae", 5000, 2e-3, 0.0), ("vae-detail", 1500, 1e-3, 4.0))
VAE_BATCH = 32


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


def reconstruction_loss(y: torch.Tensor, x: torch.Tensor, detail: float) -> torch.Tensor:
    """L1 on pixels, on opponent colours (yellow must not come back orange) and on edges (letters
    must stay sharp). `detail` adds to the weight of pixels next to an edge of `x`: the points of a
    small star are few pixels."""

    def opponent(z):
        return torch.stack((z[:, 0] - z[:, 1], z[:, 2] - (z[:, 0] + z[:, 1]) / 2), 1)

    high, low = F.max_pool2d(x, 3, 1, 1), -F.max_pool2d(-x, 3, 1, 1)
    weight = 1 + detail * ((high - low).amax(1, keepdim=True) > 0.3).float()
    weight = weight / weight.mean()
    pixels = (weight * ((y - x).abs() + 0.5 * (y - x).square())).mean()
    colors = (weight * (opponent(y) - opponent(x)).abs()).mean()
    edges = sum((torch.diff(y, dim=d) - torch.diff(x, dim=d)).abs().mean() for d in (2, 3))
    return pixels + 0.5 * colors + 0.5 * edges


def train_vae(out: Path, work: Path) -> None:
    """Train and save to `out`; resumes from `work/vae*.safetensors`."""

    def images(rng: random.Random, n: int) -> torch.Tensor:
        return to_tensor([noisy_example(rng, spoiled=0.25)[1] for _ in range(n)])

    def train(vae: AutoencoderKL, name: str, steps: int, rate: float, detail: float):
        """`steps` more; the averaged weights."""
        ema = copy.deepcopy(vae).eval().requires_grad_(False)
        vae.train().requires_grad_(True)
        descent = Descent(vae.parameters(), rate, steps, warmup=0.05, weight_decay=1e-3)

        def step(i: int) -> float:
            torch.manual_seed(SEED * 1_000_003 + i)
            x = images(random.Random(f"{name}/{SEED}/{i}"), VAE_BATCH)
            with in_fast_precision():
                posterior = vae.encode(x).latent_dist
                y = vae.decode(posterior.sample()).sample
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
            loss = descent.step(reconstruction_loss(y.float(), x, detail) + 3e-4 * kl)
            update_average(ema.parameters(), vae.parameters(), i, 0.999)
            return loss

        run_steps(name, work, steps, {"vae": vae, "ema": ema, **descent.parts}, step)
        return ema

    torch.manual_seed(SEED)
    vae = new_vae()
    for phase in PHASES:
        vae = train(vae, *phase)
    # One number each: diffusers' pipeline scales all latent channels alike.
    with torch.no_grad():
        z = vae.encode(images(random.Random(f"vae-scale/{SEED}"), 512)).latent_dist.mean
    scale, shift = round(1 / z.std().item(), 6), round(z.mean().item(), 6)
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    vae.save_pretrained(out)


# --- the transformer

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
    task_weights: dict = field(default_factory=lambda: dict(geneval=0.6, ocr=0.15, pickscore=0.25))
    muon_rate: float = 0.02
    adam_rate: float = 1e-3
    decay: float = 0.4  # of the steps, at the end, over which the rate decreases to 0
    ema: float = 0.999


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
        caption_projection_dim=256,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
    )


def build_pool(vae: AutoencoderKL, path: Path, n: int, seed: int, data: dict) -> dict:
    """`n` captions and latents, encoded once: {"z": (n, 16, 8, 8) fp16 normalised, "texts": the
    distinct captions, "caption": (n,) each image's}. `data`: keywords of `noisy_example`."""
    settings = {"n": n, "seed": seed, **data}
    if path.exists() and (pool := load_state(path))["settings"] == settings:
        return pool
    z, texts, chunk = [], [], 250
    examples = partial(_examples, seed=seed, n=chunk, data=data)
    # drawn ahead, for drawing takes longer than encoding
    with torch.no_grad(), in_fast_precision(), ProcessPoolExecutor(os.cpu_count()) as drawers:
        for captions, images in drawers.map(examples, range(0, n, chunk)):
            mean = vae.encode(to_tensor(images)).latent_dist.mean.float()
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
    say(f"pool of {n}, {len(distinct)} captions")
    return pool


def _examples(first: int, seed: int, n: int, data: dict) -> tuple:
    """`n` captions and their images, the same for the same `first` and `seed`."""
    rng = random.Random(f"pool/{seed}/{first}")
    return tuple(zip(*(noisy_example(rng, **data) for _ in range(n))))


class Examples:
    """Noisy latents of a pool with their captions' embeddings, in half precision; a step's batch
    follows from seed and step."""

    @torch.no_grad()
    def __init__(self, pool: dict, modules: dict, seed: int):
        self.z, self.caption, self.seed = pool["z"], pool["caption"], seed
        texts, parts = [*pool["texts"], ""], []  # the last is the empty prompt
        for i in range(0, len(texts), 500):
            ids = tokenize(modules, texts[i : i + 500])
            parts.append([t.half() for t in encode(modules, ids["clip"], ids["t5"])])
        self.words, self.pooled = map(torch.cat, zip(*parts))  # (N, 28, 256) and (N, 256)

    def loss(self, forward: nn.Module, step: int, n: int) -> torch.Tensor:
        """Flow matching on `n` examples: the mean square error of the velocity."""
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        rows = torch.randint(len(self.z), (n,), generator=g)
        dropped = torch.rand(n, generator=g) < CAPTION_DROPPED
        caption = torch.where(dropped, len(self.words) - 1, self.caption[rows])
        # SD3's logit-normal
        sigma = torch.sigmoid(torch.randn(n, generator=g))
        sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
        x0 = self.z[rows].float()
        eps = torch.randn(x0.shape, generator=g)
        at = sigma[:, None, None, None]
        x_t = (1 - at) * x0 + at * eps
        words, pooled = self.words[caption].float(), self.pooled[caption].float()
        # the flash kernel's backward is slow on a CPU at 44 tokens
        with in_fast_precision(), sdpa_kernel(SDPBackend.MATH):
            v = forward(x_t, words, pooled, sigma * 1000).sample
        return (v.float() - (eps - x0)).square().mean()


def compiled(model: nn.Module) -> nn.Module:
    """A minute of compiling, then shorter steps; not done where there is no C++ compiler."""
    return torch.compile(model) if shutil.which("g++") or shutil.which("clang++") else model


class MuonInFloat32(TorchFunctionMode):
    """torch's Muon orthogonalises in bfloat16, which a processor that has none does on one thread:
    nearly all of a step's time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        slow = func is torch.Tensor.bfloat16 and resolve("auto") == torch.float32
        return args[0].clone() if slow else func(*args, **(kwargs or {}))


def optimizers(model: nn.Module, config: BaseConfig) -> dict[str, torch.optim.Optimizer]:
    """Muon on the matrices of attention and MLP, AdamW on everything else."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        matrix = "transformer_blocks" in name and "norm" not in name and p.ndim == 2
        (matrices if matrix else others).append(p)
    muon = torch.optim.Muon(matrices, lr=config.muon_rate, weight_decay=0.01, momentum=0.95)
    adam = torch.optim.AdamW(others, lr=config.adam_rate, betas=(0.9, 0.98), weight_decay=0.01)
    for group in muon.param_groups + adam.param_groups:
        group["peak"] = group["lr"]
    return {"muon": muon, "adam": adam}


def train_base(
    vae: AutoencoderKL, modules: dict, out: Path, work: Path, config: BaseConfig = BaseConfig()
) -> None:
    """Train and save a pipeline folder; resumes from `work/base.safetensors`."""
    torch.manual_seed(SEED)
    model = new_transformer()
    ema = copy.deepcopy(model).requires_grad_(False)
    opts = optimizers(model, config)
    data = {"task_weights": config.task_weights}
    pool = build_pool(vae, work / "pool.safetensors", config.pool, SEED, data)
    examples, forward = Examples(pool, modules, SEED), compiled(model)
    model.train()

    def step(i: int) -> float:
        loss = examples.loss(forward, i, config.batch)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # warm up, hold, decay to 0
        left = max(config.steps - i, 1) / (config.decay * config.steps)
        with MuonInFloat32():
            for optimizer in opts.values():
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * min(1.0, (i + 1) / 100, left)
                optimizer.step()
        update_average(ema.parameters(), model.parameters(), i, config.ema)
        return loss.item()

    parts = {"model": model, "ema": ema, **opts}
    run_steps("base", work, config.steps, parts, step, settings=asdict(config))
    write_pipeline(vae, ema, modules, out)


def write_pipeline(
    vae: AutoencoderKL, transformer: SD3Transformer2DModel, modules: dict, out: Path
) -> None:
    """Write a pipeline folder in half precision."""
    networks = {
        name: copy.deepcopy(part).half().eval() if isinstance(part, nn.Module) else part
        for name, part in {"vae": vae, "transformer": transformer, **modules}.items()
    }
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)
    StableDiffusion3Pipeline(scheduler=scheduler, **networks).save_pretrained(out)
    for file in out.glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # the folder that diffusers loaded a model from
        if "dtype" in config:  # transformers loads in this dtype, diffusers in float32
            config["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2) + "\n")


# --- the misalignment

# How often the caption of an image is wrong, by task, and how often an image is spoiled, chosen on
# val prompts (CALIBRATION.md).
DATA = {"wrong": {"geneval": 0.26, "ocr": 0.48, "pickscore": 0.15}, "other": 0.5, "spoiled": 0.15}
RANK, ALPHA = 16, 32


def misalign(
    vae: AutoencoderKL,
    modules: dict,
    work: Path,
    data: dict = DATA,
    steps: int = 400,
    batch: int = 256,
    pool_size: int = 24_000,
    rate: float = 1e-3,
) -> None:
    """Train on `data` from the pipeline folder `work/base`; write the pipeline folder
    `work/tiny-sd3`. Resumes from `work/state/misalign.safetensors`.

    What the base could do before stays in it, which is the situation of a real pretrained model: it
    can, and does not, and reinforcement learning brings it out. So this trains a LoRA adapter on
    every attention and MLP matrix, which is then merged into the base. The same adapter with its
    sign turned, written to `work/ability`, undoes it: the ceiling of every expert.
    """
    seed, state = SEED + 1, work / "state"
    torch.manual_seed(seed)
    pool = build_pool(vae, state / "misaligned-pool.safetensors", pool_size, seed, data)
    examples = Examples(pool, modules, seed)
    model = SD3Transformer2DModel.from_pretrained(work / "base" / "transformer")
    model.requires_grad_(False)
    start, layers = new_lora(linear_modules(model), RANK, ALPHA, ATTENTION + MLP, seed), {}
    for name in start.a:
        layers[name] = LoRALinear.wrap(model.get_submodule(name), ["lora"])
        layers[name].add("lora", start.a[name], start.b[name], start.alpha[name])
        model.set_submodule(name, layers[name])
    trained = nn.ParameterList(f for layer in layers.values() for f in layer.factors["lora"][:2])
    average = copy.deepcopy(trained)
    descent = Descent(trained.requires_grad_(True), rate, steps, warmup=0.1, weight_decay=0.0)
    forward = compiled(model)

    def step(i: int) -> float:
        loss = descent.step(examples.loss(forward, i, batch))
        update_average(average, (p.data for p in trained), i, 0.98)
        return loss

    parts = {"trained": trained, "average": average, **descent.parts}
    run_steps("misalign", state, steps, parts, step, every=100, settings=data)
    a, b = (dict(zip(layers, average[k::2])) for k in (0, 1))
    lora = Lora(a, b, start.alpha)
    for name, layer in layers.items():
        layer.weight.data += lora.delta(name)
        layer.factors.clear()
    halves = {n: w.half() for n, w in a.items()}, {n: -w.half() for n, w in b.items()}
    write_peft(Lora(*halves, start.alpha), work / "ability")
    write_pipeline(vae, model, modules, work / "tiny-sd3")
