"""The model as a policy: a diffusers Stable Diffusion 3 pipeline that tells velocities, texts' embeddings and pictures."""
from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

CACHE_BYTES = 1 << 30       # of text embeddings kept: some 400 prompts of SD3.5 in bf16, 35,000 of the small world


@dataclass(frozen=True)
class TextEmbedding:
    """`tokens` (B, S, D) for the joint attention and `pooled` (B, P) for the modulation."""
    tokens: torch.Tensor
    pooled: torch.Tensor


class FlowPolicy:
    """A `StableDiffusion3Pipeline` folder or hub id, taken apart into what samplers and losses need."""

    def __init__(self, model_id: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        if isinstance(model_id, Path) or Path(model_id).is_absolute() or str(model_id).startswith("."):
            if not (Path(model_id) / "model_index.json").is_file():
                raise FileNotFoundError(f"{model_id} is not a diffusers pipeline folder (it has no model_index.json); "
                                        "give such a folder or a hub id")
        try:
            self.pipeline = StableDiffusion3Pipeline.from_pretrained(model_id, dtype=dtype, use_safetensors=True).to(device)
        except OSError as error:
            raise FileNotFoundError(f"{str(model_id)!r} is neither a diffusers pipeline folder nor a hub id that can be "
                                    f"loaded with safetensors weights ({error})") from error
        self.pipeline.set_progress_bar_config(disable=True)
        self.transformer, self.vae = self.pipeline.transformer, self.pipeline.vae
        for module in (self.transformer, self.vae, self.pipeline.text_encoder, self.pipeline.text_encoder_2,
                       self.pipeline.text_encoder_3):
            if module is not None:
                module.eval().requires_grad_(False)
        self.device, self.dtype = torch.device(device), dtype
        # T5 positions are not masked, so their number is part of the model: the tokenizer's, or the pipeline's default.
        tokenizer = self.pipeline.tokenizer_3
        self.max_sequence_length = min(256, tokenizer.model_max_length) if tokenizer is not None else 256
        side = self.pipeline.default_sample_size
        self.latent_shape = (self.transformer.config.in_channels, side, side)
        self._texts: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> TextEmbedding:
        """Embed prompts; each different text is encoded once and kept.

        Raises ValueError for a text with a character the tokenizers do not know, or too long for T5; warns of one too long for CLIP.
        """
        new = [t for t in dict.fromkeys(texts) if t not in self._texts]
        for text in new:
            self._check(text)
        if new:
            tokens, _, pooled, _ = self.pipeline.encode_prompt(
                new, None, None, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length,
                device=self.device)
            for text, a, b in zip(new, tokens, pooled):
                self._texts[text] = (a.clone(), b.clone())
        rows = [self._texts[t] for t in texts]
        for text in dict.fromkeys(texts):
            self._texts.move_to_end(text)
        while len(self._texts) * sum(t.nbytes for t in rows[0]) > CACHE_BYTES:
            self._texts.popitem(last=False)
        return TextEmbedding(torch.stack([a for a, _ in rows]), torch.stack([b for _, b in rows]))

    def _check(self, text: str) -> None:
        """A tokenizer drops what it cannot read, in silence; the user should hear of it."""
        for name, limit in (("tokenizer", self.pipeline.tokenizer_max_length), ("tokenizer_3", self.max_sequence_length)):
            tokenizer = getattr(self.pipeline, name)
            if tokenizer is None:
                continue
            if tokenizer.unk_token_id in tokenizer(text, add_special_tokens=False).input_ids:
                raise ValueError(f"the model's {name} cannot read all of {text!r}; leave out unusual characters")
            if len(tokenizer(text).input_ids) > limit:
                message = f"the prompt {text!r} is longer than the {limit} tokens of the model's {name}"
                if name == "tokenizer_3":
                    raise ValueError(message + "; shorten it")
                warnings.warn(message + ": its CLIP encoders will not see the end", stacklevel=3)   # usual for SD3.5

    def velocity(self, x: torch.Tensor, sigma: float, text: TextEmbedding, guidance: float = 1.0) -> torch.Tensor:
        """`v(x, sigma)` in float32, (B, C, H, W). `guidance` is classifier-free guidance: 1 is none, above it
        `v_empty + guidance (v - v_empty)`, as the pipeline does it."""
        if guidance != 1.0:
            empty = self.encode([""] * len(x))
            text = TextEmbedding(torch.cat([empty.tokens, text.tokens]), torch.cat([empty.pooled, text.pooled]))
            x = torch.cat([x, x])
        timestep = torch.full((len(x),), sigma * self.pipeline.scheduler.config.num_train_timesteps, device=self.device)
        v = self.transformer(hidden_states=x.to(self.dtype), timestep=timestep, encoder_hidden_states=text.tokens,
                             pooled_projections=text.pooled, return_dict=False)[0].float()
        if guidance != 1.0:
            unconditional, conditional = v.chunk(2)
            v = unconditional + guidance * (conditional - unconditional)
        return v

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, H, W) to images (B, 3, 8H, 8W) in [0, 1], float32."""
        config = self.vae.config
        z = latents.to(self.dtype) / config.scaling_factor + config.shift_factor
        return (self.vae.decode(z, return_dict=False)[0].float() / 2 + .5).clamp(0, 1)

    def sigmas(self, steps: int) -> list[float]:
        """The scheduler's grid for `steps` steps: `steps + 1` numbers from 1 down to 0."""
        if steps < 1:
            raise ValueError(f"a trajectory needs at least one step, not {steps}")
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(steps)
        return scheduler.sigmas.tolist()
