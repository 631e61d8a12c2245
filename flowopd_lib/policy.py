"""The model as a policy: a diffusers Stable Diffusion 3 pipeline that tells velocities, texts' embeddings and
pictures.

One backbone, any number of PEFT adapters by name: the student, its teachers, the anchor; `None` is the base
alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .adapters import ATTENTION, MLP, Lora, linear_places, read_adapter, write_peft
from .pipelines import load_pipeline, weights_hash
from .precision import resolve
from .prompts import Prompt
from .quiet import quiet
from .texts import Reading, TextEmbedding

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

TEXTS = 8  # encoded together
# of text embeddings kept: some 400 prompts of SD3.5 in bf16, 35,000 of a small one
CACHE_BYTES = 1 << 30


def _alone(method: Callable) -> Callable:
    """One thread at a time: which adapter is in use is a state of the whole network. JupyterLab runs widgets'
    callbacks beside the cells."""

    @wraps(method)
    def turn(self, *args, **kwargs):
        with self._turn:
            return method(self, *args, **kwargs)

    return turn


class FlowPolicy:
    """A `StableDiffusion3Pipeline` folder or hub id, taken apart into what samplers and losses need. `dtype`:
    see `precision.resolve`. `resolution`: pixels at a side, `text_length`: tokens of T5; None: the model's
    own."""

    def __init__(
        self,
        model_id: str | Path,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "auto",
        resolution: int | None = None,
        text_length: int | None = None,
    ):
        dtype = resolve(dtype, device)
        self.pipeline = load_pipeline(model_id, device, dtype)
        self.transformer, self.vae = self.pipeline.transformer, self.pipeline.vae
        self.device, self.dtype, self._turn = torch.device(device), dtype, threading.RLock()
        # T5 positions are not masked, so their number is part of the model: the tokenizer's, or the
        # pipeline's default.
        tokenizer = self.pipeline.tokenizer_3
        own = min(256, tokenizer.model_max_length) if tokenizer is not None else 256
        self.max_sequence_length = text_length or own
        side, grain = self.pipeline.default_sample_size, self.pipeline.vae_scale_factor
        if resolution is not None:
            patch = grain * self.transformer.config.patch_size
            largest = grain * self.transformer.config.pos_embed_max_size
            if resolution % patch or not 0 < resolution <= largest:
                raise ValueError(
                    f"the resolution must be a multiple of {patch} up to {largest} pixels, not {resolution}"
                )
            side = resolution // grain
        self.latent_shape = (self.transformer.config.in_channels, side, side)
        # A model with a closed vocabulary says so in its T5 tokenizer's config: a prompt it cannot read whole
        # is then an error.
        self.strict = bool(getattr(tokenizer, "init_kwargs", {}).get("strict", False))
        self._texts: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        self._reading = Reading(self.pipeline, self.max_sequence_length)
        self.peft: PeftModel | None = None
        self._used: str | None = None  # the adapter of the forward under way
        self._switched: str | None = None  # PEFT's own
        self._training: str | None = None
        self._trained: list[torch.nn.Parameter] = []
        self._starts: dict[tuple[str, str], str] = {}

    @_alone
    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> TextEmbedding:
        """Embed prompts; each different text is encoded once and kept. See `check_prompts` for texts that the
        model cannot read whole."""
        new = [t for t in dict.fromkeys(texts) if t not in self._texts]
        self._reading.check(new, "the prompts", self.strict)
        # always so many, filled up with empty ones: rounding that followed their number would differ in a
        # resumed training
        for i in range(0, len(new), TEXTS):
            part = new[i : i + TEXTS]
            with (
                quiet()
            ):  # the pipeline's own warning of what it cuts off comes after ours, once a text
                tokens, _, pooled, _ = self.pipeline.encode_prompt(
                    part + [""] * (TEXTS - len(part)),
                    None,
                    None,
                    do_classifier_free_guidance=False,
                    max_sequence_length=self.max_sequence_length,
                    device=self.device,
                )
            self._texts |= {
                text: (tokens[row].clone(), pooled[row].clone()) for row, text in enumerate(part)
            }
        rows = [self._texts[t] for t in texts]
        for text in dict.fromkeys(texts):
            self._texts.move_to_end(text)
        while len(self._texts) * sum(t.nbytes for t in rows[0]) > CACHE_BYTES:
            self._texts.popitem(last=False)
        return TextEmbedding(torch.stack([a for a, _ in rows]), torch.stack([b for _, b in rows]))

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Tell, before a training or an evaluation begins, of prompts that the model's tokenizers cannot read
        whole: a character that they do not know is lost, and so is what comes after their last token.

        A model with a closed vocabulary (`strict`) raises ValueError; any other cuts them off and warns, once
        a task.
        """
        self._reading.check_prompts(prompts, self.strict)

    @property
    def adapters(self) -> list[str]:
        return list(self.peft.peft_config) if self.peft is not None else []

    def add_adapter(
        self,
        name: str,
        rank: int = 32,
        alpha: float = 64,
        targets: Sequence[str] = ATTENTION + MLP,
        seed: int = 0,
    ) -> None:
        """A new LoRA adapter that changes nothing yet (B = 0); A is drawn from `seed`, in float32 whatever
        the model's dtype."""
        self._check_new(name)
        if rank < 1 or not alpha > 0:
            raise ValueError(
                f"an adapter needs a rank of at least 1 and a positive alpha, not {rank} and {alpha}"
            )
        from peft import LoraConfig

        config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian"
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._inject(name, config)
        self._settle()

    def load_adapter(self, name: str, path: str | Path) -> None:
        """An adapter in PEFT's or diffusers' format, from a folder, a file or the hub; `read_adapter` says
        what is accepted and what it raises. One that is refused leaves nothing behind."""
        self._check_new(name)
        self._add(name, read_adapter(path, linear_places(self.transformer)))

    def save_adapter(self, name: str, path: str | Path) -> None:
        """Write one adapter so that `load_adapter` and PEFT read it."""
        write_peft(self.adapter(name), path)

    def adapter(self, name: str) -> Lora:
        """One adapter as it stands, its tensors shared with the network."""
        self._known(name)
        layers = {
            place.removeprefix("base_model.model."): m
            for place, m in self._layers()
            if name in m.lora_A
        }
        return Lora(
            {p: m.lora_A[name].weight.detach() for p, m in layers.items()},
            {p: m.lora_B[name].weight.detach() for p, m in layers.items()},
            {p: m.scaling[name] * len(m.lora_A[name].weight) for p, m in layers.items()},
        )

    def adapter_parameters(self, name: str) -> dict[str, torch.nn.Parameter]:
        """The weights of one adapter, named without the adapter's name, so that two adapters' can be
        matched."""
        self._known(name)
        return {
            f"{place}.lora_{factor}.weight": factors[name].weight
            for place, m in self._layers()
            if name in m.lora_A
            for factor, factors in (("A", m.lora_A), ("B", m.lora_B))
        }

    def _layers(self) -> list[tuple[str, torch.nn.Module]]:
        """The linear layers that have adapters, with their places."""
        from peft.tuners.lora import Linear

        return [
            (place, m) for place, m in self.transformer.named_modules() if isinstance(m, Linear)
        ]

    def start_hash(self, name: str, folder: Path) -> str:
        """The adapter's `sha256` as it was when a training of the adapter into `folder` first asked, which is
        where that training starts."""
        return self._starts.setdefault((name, str(folder.resolve())), self.adapter(name).sha256)

    @cached_property
    def base_hash(self) -> str:
        """sha256 of the weights of transformer, VAE and text encoders, without adapters."""
        return weights_hash(self.pipeline)

    def _add(self, name: str, lora: Lora) -> None:
        """A new adapter with the places, ranks, scales and weights of `lora`."""
        self._inject(name, lora.config())
        with torch.no_grad():
            for key, p in self.adapter_parameters(name).items():
                place, factor = key.removesuffix(".weight").rsplit(".lora_", 1)
                p.copy_((lora.a if factor == "A" else lora.b)[place])
        self._settle()

    def _inject(self, name: str, config: LoraConfig) -> None:
        from peft import get_peft_model

        with torch.random.fork_rng(devices=[]):
            if self.peft is None:
                self.peft = get_peft_model(self.transformer, config, adapter_name=name)
            else:
                self.peft.add_adapter(name, config)

    def copy_adapter(self, source: str, name: str) -> None:
        """A new adapter with the rank, the places and the weights of `source`."""
        self._check_new(name)
        self._add(name, self.adapter(source))

    def combine_adapters(
        self, adapters: Sequence[str], weights: Sequence[float], name: str, **how
    ) -> None:
        """A new adapter made of others by PEFT's `add_weighted_adapter`, which says what `how` can be;
        `merge` chooses it."""
        self._check_new(name)
        self.train_adapter(None)
        self.peft.base_model.add_weighted_adapter(list(adapters), list(weights), name, **how)
        self._settle()

    @_alone
    def train_adapter(self, name: str | None) -> list[torch.nn.Parameter]:
        """Let gradients flow into one adapter and no other (None: into none); its weights."""
        self._training, self._trained = (
            name,
            list(self.adapter_parameters(name).values()) if name is not None else [],
        )
        self._settle()
        return self._trained

    @_alone
    def remove_adapters(self) -> None:
        """Leave the model as it was loaded."""
        if self.peft is not None:
            self.transformer = self.peft.unload()
        self.peft, self._training, self._trained = None, None, []
        self._starts.clear()
        self._settle()

    def _check_new(self, name: str) -> None:
        if (
            not isinstance(name, str)
            or name in self.adapters
            or not name
            or "." in name
            or hasattr(torch.nn.ModuleDict, name)
        ):
            raise ValueError(
                "an adapter needs a new name without dots (and not one of Python's dictionaries, such as "
                f"keys), not {name!r}; "
                f"there are {', '.join(self.adapters) or 'none yet'}"
            )

    @property
    def precision(self) -> str:
        """float32 or bfloat16."""
        return str(self.dtype).removeprefix("torch.")

    def check_adapters(self, names: Iterable[str]) -> None:
        """Raises ValueError for an adapter there is not."""
        for name in names:
            self._known(name)

    def _known(self, name: str) -> str:
        if name not in self.adapters:
            raise ValueError(
                f"no adapter {name!r}; there are {', '.join(self.adapters) or 'none'} (None is the base)"
            )
        return name

    @_alone
    def _settle(self) -> None:
        """After the set of adapters changed: nothing trains but what `train_adapter` named, and the base is
        in use."""
        self.transformer.eval().requires_grad_(False)
        for _, layer in self._layers():
            if "forward" not in vars(layer):
                layer.forward = partial(self._lora_forward, layer, layer.forward)
                # PEFT would cast activations up to the adapter's float32, and autocast down again: two copies
                # a layer, for nothing
                layer.cast_input_dtype_enabled = self.dtype == torch.float32
        for p in self._trained:
            p.requires_grad_(True)
        self._used, self._switched = None, None

    def _lora_forward(
        self, layer: torch.nn.Module, factored: Callable, x: torch.Tensor, *args, **kwargs
    ) -> torch.Tensor:
        """A frozen adapter is added to each layer's weight as it is asked, `(W + s B A) x`: one product over
        the tokens instead of three, and no copy of the backbone. The adapter in training takes PEFT's way,
        with gradient or without, so that ratios of its probabilities are exact."""
        name, weight = self._used, layer.base_layer.weight
        if name is None or name not in layer.lora_A:
            return layer.base_layer(x, *args, **kwargs)
        if torch.is_grad_enabled() or name == self._training or name in layer.lora_variant:
            self._switch(name)
            return factored(x, *args, **kwargs)
        return torch.nn.functional.linear(
            x, weight + layer.get_delta_weight(name).to(weight.dtype), layer.base_layer.bias
        )

    def _switch(self, name: str) -> None:
        """Let PEFT's own forward use an adapter. It walks through the whole network for that, some 20 ms:
        nothing else here asks for it."""
        if name != self._switched or not all(p.requires_grad for p in self._trained[:1]):
            self.peft.base_model.set_adapter(name, inference_mode=True)
            # PEFT switches gradients with the adapter. A graph already built must not lose them.
            for p in self._trained:
                p.requires_grad_(True)
            self._switched = name

    @_alone
    def velocity(
        self,
        x: torch.Tensor,
        sigma: float | torch.Tensor,
        text: TextEmbedding,
        guidance: float = 1.0,
        adapter: str | None = None,
    ) -> torch.Tensor:
        """`v(x, sigma)` in float32, (B, C, H, W), under one adapter; `sigma` is a number or (B,). `guidance`
        is classifier-free guidance: 1 is none, above it `v_empty + guidance (v - v_empty)`, as the pipeline
        does it."""
        self._used = None if adapter is None else self._known(adapter)
        if guidance != 1.0:
            empty = self.encode([""] * len(x))
            text = TextEmbedding(
                torch.cat([empty.tokens, text.tokens]), torch.cat([empty.pooled, text.pooled])
            )
            x = torch.cat([x, x])
        timestep = (
            torch.as_tensor(sigma, dtype=torch.float32, device=self.device)
            * self.pipeline.scheduler.config.num_train_timesteps
        ).repeat(len(x) if not torch.is_tensor(sigma) else len(x) // len(sigma))
        # Adapters are float32; under a half-precision backbone their products are taken in its dtype too.
        # On a CPU the flash kernel's backward is slow in bf16; with the plain one everywhere an update takes
        # four fifths of the time.
        plain = (
            sdpa_kernel(SDPBackend.MATH)
            if self.device.type == "cpu" and self.dtype == torch.bfloat16
            else nullcontext()
        )
        with (
            torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32),
            plain,
        ):
            v = self.transformer(
                hidden_states=x.to(self.dtype),
                timestep=timestep,
                encoder_hidden_states=text.tokens,
                pooled_projections=text.pooled,
                return_dict=False,
            )[0].float()
        if guidance != 1.0:
            unconditional, conditional = v.chunk(2)
            v = unconditional + guidance * (conditional - unconditional)
        return v

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, H, W) to images (B, 3, 8H, 8W) in [0, 1], float32. Latents that carry a graph pass
        it on: a reward's gradient finds its way back."""
        config = self.vae.config
        z = latents.to(self.dtype) / config.scaling_factor + config.shift_factor
        with torch.set_grad_enabled(latents.requires_grad and torch.is_grad_enabled()):
            return (self.vae.decode(z, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def sigmas(self, steps: int) -> list[float]:
        """The scheduler's grid for `steps` steps: `steps + 1` numbers from 1 down to 0."""
        if steps < 1:
            raise ValueError(f"a trajectory needs at least one step, not {steps}")
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(steps)
        return scheduler.sigmas.tolist()
