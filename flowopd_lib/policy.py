"""The model as a policy: a diffusers Stable Diffusion 3 pipeline that gives velocities, text
embeddings and images.

One backbone, any number of LoRA adapters by name: the student, its teachers, the anchor; `None` is
the base alone.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .data import Prompt
from .fingerprint import sha256_of
from .loading import choose_device, dtype_name, hub_fault, quiet, resolve
from .lora import (
    ATTENTION,
    MLP,
    Lora,
    LoRALinear,
    linear_modules,
    new_lora,
    read_adapter,
    write_peft,
)

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

NETWORKS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
TEXT_BATCH = 8  # prompts encoded together
# of cached text embeddings: some 400 prompts of SD3.5 in bf16, 35,000 of a small model
CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class TextEmbedding:
    """`tokens` (B, S, D) for the joint attention and `pooled` (B, P) for the modulation."""

    tokens: torch.Tensor
    pooled: torch.Tensor

    def __getitem__(self, rows) -> TextEmbedding:
        return TextEmbedding(self.tokens[rows], self.pooled[rows])


def load_pipeline(
    model_id: str | Path, device: str | torch.device, dtype: torch.dtype
) -> StableDiffusion3Pipeline:
    """From a folder or the hub, its networks frozen. Raises FileNotFoundError for what is
    neither."""
    with quiet():
        from diffusers import StableDiffusion3Pipeline
    model_id, options = str(model_id), {"dtype": dtype, "use_safetensors": True}
    try:
        with quiet():
            pipeline = StableDiffusion3Pipeline.from_pretrained(model_id, **options).to(device)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{model_id!r} is neither a diffusers pipeline folder nor a hub id that can be loaded "
            f"with safetensors weights: {hub_fault(model_id, error)}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    for name in NETWORKS:
        if (network := getattr(pipeline, name)) is not None:
            network.eval().requires_grad_(False)
    return pipeline


def one_thread_at_a_time(method: Callable) -> Callable:
    """Which adapter is active is a state of the whole network, and JupyterLab runs widgets'
    callbacks next to the cells."""

    @wraps(method)
    def locked(self, *args, **kwargs):
        with self._lock:
            return method(self, *args, **kwargs)

    return locked


class FlowPolicy:
    """A `StableDiffusion3Pipeline` folder or hub id, taken apart into what samplers and losses
    need.

    `dtype`: see `loading.resolve`. `resolution`: pixels at a side, `text_length`: T5 tokens;
    None: the model's own.
    """

    def __init__(
        self,
        model_id: str | Path,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "auto",
        resolution: int | None = None,
        text_length: int | None = None,
    ):
        device = choose_device(device)
        dtype = resolve(dtype, device)
        self.pipeline = load_pipeline(model_id, device, dtype)
        self.transformer, self.vae = self.pipeline.transformer, self.pipeline.vae
        self.device, self.dtype, self._lock = device, dtype, threading.RLock()
        # T5 positions are not masked, so their number is part of the model: the tokenizer's, or the
        # pipeline's default
        tokenizer = self.pipeline.tokenizer_3
        own = min(256, tokenizer.model_max_length) if tokenizer is not None else 256
        self.max_sequence_length = text_length or own
        side, factor = self.pipeline.default_sample_size, self.pipeline.vae_scale_factor
        if resolution is not None:
            patch = factor * self.transformer.config.patch_size
            largest = factor * self.transformer.config.pos_embed_max_size
            if resolution % patch or not 0 < resolution <= largest:
                allowed = f"a multiple of {patch} up to {largest} pixels"
                raise ValueError(f"the resolution must be {allowed}, not {resolution}")
            side = resolution // factor
        self.latent_shape = (self.transformer.config.in_channels, side, side)
        # a model with a closed vocabulary says so in its T5 tokenizer's config
        self.closed_vocabulary = bool(getattr(tokenizer, "init_kwargs", {}).get("strict", False))
        self._checked: set[str] = set()
        self._texts: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        self._active: list[str | None] = [None]
        self._loras: dict[str, Lora] = {}
        self._start_hashes: dict[tuple[str, str], str] = {}

    # --- prompts

    @one_thread_at_a_time
    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> TextEmbedding:
        """Embed prompts; each different prompt is encoded once and cached. See `check_prompts` for
        prompts that the model cannot read whole."""
        new = [t for t in dict.fromkeys(texts) if t not in self._texts]
        self._check_texts(new)
        # always as many at once, filled up with empty prompts: rounding that followed their number
        # would differ in a resumed training
        for i in range(0, len(new), TEXT_BATCH):
            batch = new[i : i + TEXT_BATCH]
            with quiet():  # the pipeline's own warning of what it cuts off comes after ours
                padded = batch + [""] * (TEXT_BATCH - len(batch))
                length = {"max_sequence_length": self.max_sequence_length, "device": self.device}
                tokens, _, pooled, _ = self.pipeline.encode_prompt(
                    padded, None, None, do_classifier_free_guidance=False, **length
                )
            self._texts |= {t: (tokens[i].clone(), pooled[i].clone()) for i, t in enumerate(batch)}
        rows = [self._texts[t] for t in texts]
        for text in dict.fromkeys(texts):
            self._texts.move_to_end(text)
        while len(self._texts) * sum(t.nbytes for t in rows[0]) > CACHE_BYTES:
            self._texts.popitem(last=False)
        return TextEmbedding(torch.stack([a for a, _ in rows]), torch.stack([b for _, b in rows]))

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Before a training or an evaluation begins: a model with a closed vocabulary raises
        ValueError for prompts that its tokenizers cannot read whole; any other warns, once a
        task."""
        for task in dict.fromkeys(p.task for p in prompts):
            self._check_texts([p.text for p in prompts if p.task == task], f"the {task} prompts")

    def _check_texts(self, texts: Sequence[str], what: str = "the prompts") -> None:
        """A character that a tokenizer does not know is lost, and so is what comes after its last
        token. CLIP's limit is no error: T5 reads on."""
        texts = [t for t in dict.fromkeys(texts) if t not in self._checked]
        clip_length, t5_length = self.pipeline.tokenizer_max_length, self.max_sequence_length
        limits = {"tokenizer": clip_length, "tokenizer_3": t5_length}
        for name, limit in limits.items() if texts else ():
            if (tokenizer := getattr(self.pipeline, name)) is None:
                continue
            ids = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
            special, unknown = len(tokenizer("").input_ids), tokenizer.unk_token_id
            unread = [t for t, row in zip(texts, ids) if unknown in row]
            cut = [t for t, row in zip(texts, ids) if len(row) + special > limit]
            for faulty, fault in (
                (unread, f"have characters that the model's {name} does not know"),
                (cut, f"are longer than the {limit} tokens of the model's {name}"),
            ):
                message = f"{len(faulty)} of {what} {fault}, such as {(faulty or texts)[0]!r}"
                if faulty and self.closed_vocabulary and (faulty is unread or name != "tokenizer"):
                    raise ValueError(message)
                if faulty:
                    warnings.warn(f"{message}: the model does not see them", stacklevel=3)
        self._checked.update(texts)

    # --- adapters

    @property
    def adapters(self) -> list[str]:
        return list(self._loras)

    def _layers(self) -> Iterator[tuple[str, LoRALinear]]:
        return ((n, m) for n, m in self.transformer.named_modules() if isinstance(m, LoRALinear))

    def add_adapter(
        self,
        name: str,
        rank: int = 32,
        alpha: float = 64,
        targets: Sequence[str] = ATTENTION + MLP,
        seed: int = 0,
    ) -> None:
        """A new LoRA adapter that changes nothing yet."""
        modules = linear_modules(self.transformer)
        self.set_adapter(name, new_lora(modules, rank, alpha, tuple(targets), seed))

    def load_adapter(self, name: str, path: str | Path) -> None:
        """An adapter in PEFT's or diffusers' format, from a folder, a file or the hub
        (`read_adapter`). One that is refused leaves nothing behind."""
        self.set_adapter(name, read_adapter(path, linear_modules(self.transformer)))

    @one_thread_at_a_time
    def set_adapter(self, name: str, lora: Lora) -> None:
        """A new adapter with the modules, ranks, scales and weights of `lora`, which are copied."""
        if not name or "." in name or name in self._loras:
            raise ValueError(f"an adapter needs a new name without dots, not {name!r}")
        for path in lora.a:
            layer = self.transformer.get_submodule(path)
            if not isinstance(layer, LoRALinear):
                parent, _, last = path.rpartition(".")
                layer = LoRALinear.wrap(layer, self._active)
                setattr(self.transformer.get_submodule(parent), last, layer)
            layer.add(name, lora.a[path], lora.b[path], lora.alpha[path])
        factors = {p: m.factors[name] for p, m in self._layers() if name in m.factors}
        a, b = ({p: f[i].data for p, f in factors.items()} for i in (0, 1))
        self._loras[name] = Lora(a, b, {p: f[2] for p, f in factors.items()})

    def copy_adapter(self, source: str, name: str) -> None:
        self.set_adapter(name, self.adapter(source))

    def save_adapter(self, name: str, path: str | Path) -> None:
        """Write one adapter so that `load_adapter` and PEFT read it."""
        write_peft(self.adapter(name), path)

    def adapter(self, name: str) -> Lora:
        """One adapter, its tensors shared with the network."""
        return self._loras[self._known(name)]

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The weights of one adapter by module name and factor."""
        self._known(name)
        return {
            f"{path}.lora_{factor}.weight": layer.factors[name][i]
            for path, layer in self._layers()
            if name in layer.factors
            for i, factor in enumerate("AB")
        }

    @one_thread_at_a_time
    def train_adapter(self, name: str | None) -> list[nn.Parameter]:
        """Let gradients flow into one adapter and no other (None: into none); its weights."""
        for other in self.adapters:
            for p in self.adapter_parameters(other).values():
                p.requires_grad_(other == name)
        return list(self.adapter_parameters(name).values()) if name is not None else []

    @contextmanager
    def adapter_weights(self, name: str, weights: Sequence[torch.Tensor]) -> Iterator[None]:
        """The adapter with other weights for a while, such as an average; with none, as it is."""
        own = list(self.adapter_parameters(name).values()) if weights else []
        before = [p.detach().clone() for p in own]
        with torch.no_grad():
            for p, other in zip(own, weights):
                p.copy_(other)
            try:
                yield
            finally:
                for p, saved in zip(own, before):
                    p.copy_(saved)

    @one_thread_at_a_time
    def remove_adapter(self, name: str) -> None:
        for _, layer in self._layers():
            layer.factors.pop(name, None)
        del self._loras[self._known(name)]
        self._start_hashes = {k: v for k, v in self._start_hashes.items() if k[0] != name}

    def remove_adapters(self) -> None:
        """Leave the model as it was loaded."""
        for name in self.adapters:
            self.remove_adapter(name)
        self._active[0] = None

    def start_hash(self, name: str, folder: Path) -> str:
        """The adapter's hash when a training of it into `folder` first began: where that training
        starts."""
        key = name, str(folder.resolve())
        return self._start_hashes.setdefault(key, self.adapter(name).sha256)

    @cached_property
    def base_hash(self) -> str:
        """sha256 of everything but adapters that changes a velocity or an image: the weights of
        transformer, VAE and text encoders, the scheduler's and the VAE's settings, resolution and
        T5 length."""
        weights = {
            f"{name} {key}": sha256_of(w)
            for name in NETWORKS
            if (network := getattr(self.pipeline, name)) is not None
            for key, w in network.state_dict().items()
        }
        scheduler, vae = self.pipeline.scheduler.config, self.vae.config
        settings = {
            "scheduler": sorted((k, str(v)) for k, v in scheduler.items() if k[0] != "_"),
            "vae": [vae.scaling_factor, vae.shift_factor],
            "latents": self.latent_shape,
            "text length": self.max_sequence_length,
        }
        return sha256_of(weights | settings)

    @property
    def precision(self) -> str:
        """float32 or bfloat16."""
        return dtype_name(self.dtype)

    def check_adapters(self, names: Iterable[str]) -> None:
        """Raises ValueError for an adapter that does not exist."""
        for name in names:
            self._known(name)

    def _known(self, name: str) -> str:
        if name not in self._loras:
            there = ", ".join(self._loras) or "none"
            raise ValueError(f"no adapter {name!r}; there are {there} (None is the base)")
        return name

    # --- velocities and images

    @one_thread_at_a_time
    def velocity(
        self,
        x_t: torch.Tensor,
        sigma: float | torch.Tensor,
        text: TextEmbedding,
        guidance: float = 1.0,
        adapter: str | None = None,
    ) -> torch.Tensor:
        """`v(x_t, sigma)` in float32, (B, C, H, W), under one adapter; `sigma` is a number or (B,).
        `guidance` is classifier-free guidance: 1 is none, above it `v_empty + guidance (v -
        v_empty)`, as in the pipeline."""
        self._active[0] = None if adapter is None else self._known(adapter)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=self.device).expand(len(x_t))
        if guidance != 1.0:
            empty = self.encode([""] * len(x_t))
            tokens = torch.cat([empty.tokens, text.tokens])
            text = TextEmbedding(tokens, torch.cat([empty.pooled, text.pooled]))
            x_t, sigma = torch.cat([x_t, x_t]), torch.cat([sigma, sigma])
        # On a CPU the flash kernel's backward is slow in bf16; with the plain one everywhere an
        # update takes four fifths of the time.
        slow = self.device.type == "cpu" and self.dtype == torch.bfloat16
        with (
            torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32),
            sdpa_kernel(SDPBackend.MATH) if slow else nullcontext(),
        ):
            v = self.transformer(
                hidden_states=x_t.to(self.dtype),
                timestep=sigma * self.pipeline.scheduler.config.num_train_timesteps,
                encoder_hidden_states=text.tokens,
                pooled_projections=text.pooled,
                return_dict=False,
            )[0].float()
        if guidance != 1.0:
            unconditional, conditional = v.chunk(2)
            v = unconditional + guidance * (conditional - unconditional)
        return v

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, H, W) to images (B, 3, 8H, 8W) in [0, 1], float32, with the graph of the
        latents if they carry one."""
        config = self.vae.config
        z = latents.to(self.dtype) / config.scaling_factor + config.shift_factor
        with torch.set_grad_enabled(latents.requires_grad and torch.is_grad_enabled()):
            return (self.vae.decode(z, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def sigmas(self, steps: int) -> list[float]:
        """The scheduler's grid for `steps` denoising steps: `steps + 1` numbers from 1 down to
        0."""
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(steps)
        return scheduler.sigmas.tolist()
