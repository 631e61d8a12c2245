"""Stable Diffusion 3.5's architecture with random weights, in the size of Medium or tiny: for tests
and benchmarks, where no weights can be downloaded.

As in the real model: dual attention in the first blocks, RMS norm of queries and keys, 16 latent
channels, shift 3, and three text encoders, the third with 128 tokens (Flow-GRPO's length). The text
encoders are shallow in every size, because their outputs are cached and their cost is not measured.
Their tokenizers are those of the default benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from ..benchmarks import load_benchmark
from ..benchmarks.benchmark import SHIPPED
from ..config import read_yaml
from ..files import write_whole
from ..hub import quiet
from ..lora import Lora, linear_modules, new_lora, write_peft


@dataclass(frozen=True)
class Size:
    """Blocks of the transformer, how many of them have dual attention, heads of width 64, widths of
    the two CLIP encoders and of T5, T5 tokens, latent height and width, and VAE channels."""

    layers: int
    dual_layers: int
    heads: int
    clip_widths: tuple[int, int]
    t5_width: int
    tokens: int
    latent_size: int
    vae_channels: tuple[int, ...]


MEDIUM = Size(24, 13, 24, (768, 1280), 4096, 128, 64, (128, 256, 512, 512))
TINY = Size(3, 2, 1, (32, 32), 64, 128, 8, (8, 8, 8, 8))


def special_tokens(tokenizer) -> dict[str, int]:
    """What a CLIP text encoder's config says of its tokenizer."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}


def write_pipeline(folder: Path, size: Size, dtype: torch.dtype):
    """A `StableDiffusion3Pipeline` with random weights, always the same, saved in `folder`."""
    base = Path(load_benchmark().base)
    with quiet():
        import diffusers
        import transformers

        load = transformers.AutoTokenizer.from_pretrained
        tokenizers = [load(base / f"tokenizer{n}") for n in ("", "_2", "_3")]
    for tokenizer, tokens in zip(tokenizers, (77, 77, size.tokens)):
        tokenizer.model_max_length = tokens

    def clip(width: int, tokenizer):
        config = transformers.CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,  # the pipeline takes the last but one
            num_attention_heads=max(1, width // 64),
            **special_tokens(tokenizer),
        )
        return transformers.CLIPTextModelWithProjection(config)

    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=size.latent_size,
            num_layers=size.layers,
            num_attention_heads=size.heads,
            joint_attention_dim=size.t5_width,
            caption_projection_dim=64 * size.heads,
            pooled_projection_dim=sum(size.clip_widths),
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(size.dual_layers)),
            qk_norm="rms_norm",
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=size.vae_channels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=16,
            norm_num_groups=min(32, size.vae_channels[0]),
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        t5 = transformers.T5Config(
            vocab_size=len(tokenizers[2]),
            d_model=size.t5_width,
            d_ff=size.t5_width,
            num_heads=max(1, size.t5_width // 64),
            num_layers=1,
            feed_forward_proj="gated-gelu",
        )
        pipeline = diffusers.StableDiffusion3Pipeline(
            transformer,
            diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae,
            clip(size.clip_widths[0], tokenizers[0]),
            tokenizers[0],
            clip(size.clip_widths[1], tokenizers[1]),
            tokenizers[1],
            transformers.T5EncoderModel(t5),
            tokenizers[2],
        )
        pipeline.to(dtype).save_pretrained(folder)
    return pipeline


def write_sd35(
    folder: str | Path, size: Size = MEDIUM, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """A pipeline folder that `FlowPolicy` loads. MEDIUM takes 5 GB on disk in bfloat16, and 10 GB
    of memory while it is written."""
    write_pipeline(Path(folder), size, dtype)
    return Path(folder)


def mean_brightness(images: torch.Tensor, prompts) -> np.ndarray:
    """A reward that costs nothing: images of random weights show nothing."""
    return images.flatten(1).mean(1).float().cpu().numpy()


def write_random_sd35(
    folder: str | Path, size: Size = MEDIUM, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """The file of a benchmark as sd35.yaml describes it, with random weights for model and experts,
    the prompts of the default benchmark, and `mean_brightness` for every reward."""
    folder, default = Path(folder).resolve(), load_benchmark()
    modules = linear_modules(write_pipeline(folder / "model", size, dtype).transformer)
    config = read_yaml(SHIPPED / "sd35.yaml")
    adapter = config["adapters"]
    for seed, (name, expert) in enumerate(config["experts"].items()):
        lora = new_lora(modules, adapter["rank"], adapter["alpha"], tuple(adapter["targets"]), seed)
        g = torch.Generator().manual_seed(seed)
        b = {n: 0.01 * torch.randn(w.shape, generator=g) for n, w in lora.b.items()}
        write_peft(Lora(lora.a, b, lora.alpha), folder / name)
        expert["adapter"] = name
    reward = {"class": f"{__name__}:{mean_brightness.__name__}"}
    config |= {
        "model": "model",
        "resolution": 8 * size.latent_size,
        "text_length": size.tokens,
        "prompts": str((default.folder / default.config.prompts).resolve()),
        "tasks": {name: task.model_dump() for name, task in default.tasks.items()},
        "rewards": dict.fromkeys(default.config.rewards, reward),
    }
    write_whole(folder / "sd35-random.yaml", yaml.safe_dump(config, sort_keys=False))
    return folder / "sd35-random.yaml"
