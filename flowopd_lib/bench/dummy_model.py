"""Stable Diffusion 3.5 Medium's architecture with random weights, in its true size or tiny: for tests and
benchmarks where no weights can be had.

As in the real one: attention twice in the first 13 blocks, rms norm of queries and keys, 16 latent channels,
shift 3, three text encoders of which the third gives 128 tokens here (Flow-GRPO's length), pictures of 512
pixels at a side. The text encoders are one layer deep, whatever the size: their outputs are cached, so what
they cost is not measured, and their tokenizers are those of the shipped benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..benchmarks import load_benchmark
from ..quiet import quiet


@dataclass(frozen=True)
class Size:
    """Blocks of the transformer, those of them with attention twice, heads of 64, widths of the two CLIPs and
    of T5, tokens of T5, latents at a side, and widths of the autoencoder."""

    layers: int
    dual: int
    heads: int
    clips: tuple[int, int]
    t5: int
    tokens: int
    side: int
    vae: tuple[int, ...]


TRUE = Size(24, 13, 24, (768, 1280), 4096, 128, 64, (128, 256, 512, 512))
TINY = Size(3, 2, 1, (32, 32), 64, 128, 8, (8, 8, 8, 8))


def write_sd35(
    folder: str | Path, size: Size = TRUE, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> Path:
    """A pipeline folder that `FlowPolicy` loads. Of the true size it takes 5 GB in bfloat16."""
    with quiet():
        from diffusers import (
            AutoencoderKL,
            FlowMatchEulerDiscreteScheduler,
            SD3Transformer2DModel,
            StableDiffusion3Pipeline,
        )
        from transformers import (
            AutoTokenizer,
            CLIPTextConfig,
            CLIPTextModelWithProjection,
            T5Config,
            T5EncoderModel,
        )
    tokenizers = [
        AutoTokenizer.from_pretrained(Path(load_benchmark().base) / f"tokenizer{n}")
        for n in ("", "_2", "_3")
    ]
    for tokenizer, tokens in zip(tokenizers, (77, 77, size.tokens)):
        tokenizer.model_max_length = tokens

    def clip(width: int, tokenizer) -> CLIPTextModelWithProjection:
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,  # the last but one is what is taken
            num_attention_heads=max(1, width // 64),
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return CLIPTextModelWithProjection(config)

    with torch.random.fork_rng(devices=[device] if device != "cpu" else []), torch.device(device):
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            pipeline = StableDiffusion3Pipeline(
                transformer=SD3Transformer2DModel(
                    sample_size=size.side,
                    patch_size=2,
                    in_channels=16,
                    out_channels=16,
                    num_layers=size.layers,
                    attention_head_dim=64,
                    num_attention_heads=size.heads,
                    joint_attention_dim=size.t5,
                    caption_projection_dim=64 * size.heads,
                    pooled_projection_dim=sum(size.clips),
                    pos_embed_max_size=384,
                    dual_attention_layers=tuple(range(size.dual)),
                    qk_norm="rms_norm",
                ),
                vae=AutoencoderKL(
                    block_out_channels=size.vae,
                    down_block_types=("DownEncoderBlock2D",) * 4,
                    up_block_types=("UpDecoderBlock2D",) * 4,
                    layers_per_block=2,
                    latent_channels=16,
                    norm_num_groups=min(32, size.vae[0]),
                    sample_size=8 * size.side,
                    scaling_factor=1.5305,
                    shift_factor=0.0609,
                    use_quant_conv=False,
                    use_post_quant_conv=False,
                ),
                scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
                text_encoder=clip(size.clips[0], tokenizers[0]),
                text_encoder_2=clip(size.clips[1], tokenizers[1]),
                text_encoder_3=T5EncoderModel(
                    T5Config(
                        vocab_size=len(tokenizers[2]),
                        d_model=size.t5,
                        d_ff=size.t5,
                        d_kv=64,
                        num_heads=max(1, size.t5 // 64),
                        num_layers=1,
                        feed_forward_proj="gated-gelu",
                    )
                ),
                tokenizer=tokenizers[0],
                tokenizer_2=tokenizers[1],
                tokenizer_3=tokenizers[2],
            )
        finally:
            torch.set_default_dtype(before)
    pipeline.save_pretrained(folder, max_shard_size="20GB")
    return Path(folder)
