"""The model as a policy: a diffusers Stable Diffusion 3 pipeline that tells velocities, texts' embeddings and pictures.

One backbone, any number of PEFT adapters by name: the student, its teachers, the anchor; `None` is the base alone.
"""
from __future__ import annotations

import copy
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

CACHE_BYTES = 1 << 30       # of text embeddings kept: some 400 prompts of SD3.5 in bf16, 35,000 of the small world

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")    # Flow-GRPO's
MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


@dataclass(frozen=True)
class TextEmbedding:
    """`tokens` (B, S, D) for the joint attention and `pooled` (B, P) for the modulation."""
    tokens: torch.Tensor
    pooled: torch.Tensor

    def __getitem__(self, rows) -> TextEmbedding:
        return TextEmbedding(self.tokens[rows], self.pooled[rows])


def _alone(method: Callable) -> Callable:
    """One thread at a time: which adapter is in use is a state of the whole network. JupyterLab runs widgets' callbacks beside the cells."""
    @wraps(method)
    def turn(self, *args, **kwargs):
        with self._turn:
            return method(self, *args, **kwargs)
    return turn


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
        self.device, self.dtype, self._turn = torch.device(device), dtype, threading.RLock()
        # T5 positions are not masked, so their number is part of the model: the tokenizer's, or the pipeline's default.
        tokenizer = self.pipeline.tokenizer_3
        self.max_sequence_length = min(256, tokenizer.model_max_length) if tokenizer is not None else 256
        side = self.pipeline.default_sample_size
        self.latent_shape = (self.transformer.config.in_channels, side, side)
        self._texts: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        self.peft: PeftModel | None = None
        self._used: str | None = None
        self._training: str | None = None
        self._trained: list[torch.nn.Parameter] = []

    @_alone
    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> TextEmbedding:
        """Embed prompts; each different text is encoded once and kept.

        Raises ValueError for a text with a character the tokenizers do not know, or too long for T5; warns of one too long for CLIP.
        """
        new = [t for t in dict.fromkeys(texts) if t not in self._texts]
        for text in new:
            self._check(text)
        for text in new:        # one by one: a rounding that depends on the texts beside it would not be the same in a resumed training
            tokens, _, pooled, _ = self.pipeline.encode_prompt([text], None, None, do_classifier_free_guidance=False,
                                                               max_sequence_length=self.max_sequence_length, device=self.device)
            self._texts[text] = (tokens[0].clone(), pooled[0].clone())
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

    @property
    def adapters(self) -> list[str]:
        return list(self.peft.peft_config) if self.peft is not None else []

    def add_adapter(self, name: str, rank: int = 32, alpha: int = 64, targets: Sequence[str] = ATTENTION + MLP, seed: int = 0) -> None:
        """A new LoRA adapter that changes nothing yet (B = 0); A is drawn from `seed`, in float32 whatever the model's dtype."""
        self._check_new(name)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.peft is None:
                self.peft = get_peft_model(self.transformer, config, adapter_name=name)
            else:
                self.peft.add_adapter(name, config)
        self._settle()

    def load_adapter(self, name: str, path: str | Path) -> None:
        """An adapter in PEFT's format (`adapter_config.json`, `adapter_model.safetensors`) from a folder or the hub."""
        self._check_new(name)
        if Path(path).is_dir() and not (Path(path) / "adapter_config.json").is_file():
            raise FileNotFoundError(f"{path} is not a PEFT adapter folder: it has no adapter_config.json")
        try:
            if self.peft is None:
                self.peft = PeftModel.from_pretrained(self.transformer, str(path), adapter_name=name, use_safetensors=True)
            else:
                self.peft.load_adapter(str(path), name, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"no adapter could be loaded from {str(path)!r}: {error}") from error
        self._settle()

    def save_adapter(self, name: str, path: str | Path) -> None:
        """Write one adapter so that `load_adapter` and PEFT read it."""
        config = self.peft.peft_config[self._known(name)]       # PEFT's own save would put it in a folder of its name
        config.inference_mode, config.base_model_name_or_path = True, None
        weights = get_peft_model_state_dict(self.peft, adapter_name=name)
        Path(path).mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(path))
        save_file({key: w.detach().cpu().contiguous() for key, w in weights.items()}, Path(path) / "adapter_model.safetensors")

    def adapter_parameters(self, name: str) -> dict[str, torch.nn.Parameter]:
        """The weights of one adapter, named without the adapter's name, so that two adapters' can be matched."""
        self._known(name)
        return {key.replace(f".{name}.", "."): p for key, p in self.transformer.named_parameters() if f".{name}." in key}

    def copy_adapter(self, source: str, name: str) -> None:
        """A new adapter with the rank, the places and the weights of `source`."""
        self._check_new(name)
        self.peft.add_adapter(name, copy.deepcopy(self.peft.peft_config[self._known(source)]))
        with torch.no_grad():
            for new, old in zip(self.adapter_parameters(name).values(), self.adapter_parameters(source).values()):
                new.copy_(old)
        self._settle()

    def combine_adapters(self, adapters: Sequence[str], weights: Sequence[float], name: str, **how) -> None:
        """A new adapter made of others by PEFT's `add_weighted_adapter`, which says what `how` can be; `merge` chooses it."""
        self._check_new(name)
        self.train_adapter(None)
        self.peft.base_model.add_weighted_adapter(list(adapters), list(weights), name, **how)
        self._settle()

    @_alone
    def train_adapter(self, name: str | None) -> list[torch.nn.Parameter]:
        """Let gradients flow into one adapter and no other (None: into none); its weights."""
        self._training, self._trained = name, list(self.adapter_parameters(name).values()) if name is not None else []
        self._settle()
        return self._trained

    def _check_new(self, name: str) -> None:
        if name in self.adapters or not name or "." in name:
            raise ValueError(f"an adapter needs a new name without dots, not {name!r}; there are {', '.join(self.adapters) or 'none yet'}")

    def _known(self, name: str) -> str:
        if name not in self.adapters:
            raise ValueError(f"no adapter {name!r}; there are {', '.join(self.adapters) or 'none'} (None is the base)")
        return name

    @_alone
    def _settle(self) -> None:
        """After the set of adapters changed: nothing trains but what `train_adapter` named, and the base is in use."""
        self.transformer.eval().requires_grad_(False)
        self._used = self.adapters[0] if self.adapters else None
        if self.peft is not None:
            self.peft.base_model.enable_adapter_layers()
        for layer in self.transformer.modules():
            if isinstance(layer, LoraLinear) and "forward" not in vars(layer):
                layer.forward = partial(self._lora_forward, layer, layer.forward)
                # PEFT would cast activations up to the adapter's float32, and autocast down again: two copies a layer, for nothing
                layer.cast_input_dtype_enabled = self.dtype == torch.float32
        self._use(None)

    def _lora_forward(self, layer: LoraLinear, factored: Callable, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """A frozen adapter is added to each layer's weight as it is asked, `(W + s B A) x`: one product over the tokens instead of three, and no copy of
        the backbone. The adapter in training takes PEFT's way, with gradient or without, so that ratios of its probabilities are exact."""
        name, weight = self._used, layer.base_layer.weight
        if torch.is_grad_enabled() or layer.disable_adapters or name == self._training or name not in layer.lora_A or name in layer.lora_variant:
            return factored(x, *args, **kwargs)
        return torch.nn.functional.linear(x, weight + layer.get_delta_weight(name).to(weight.dtype), layer.base_layer.bias)

    def _use(self, name: str | None) -> None:
        if name is not None:
            self._known(name)
        if name == self._used and all(p.requires_grad for p in self._trained[:1]):
            return
        if self.peft is not None:
            if name is None:
                self.peft.base_model.disable_adapter_layers()
            else:
                if self._used is None:
                    self.peft.base_model.enable_adapter_layers()
                self.peft.base_model.set_adapter(name, inference_mode=True)
            # PEFT switches gradients with the adapter. A graph already built must not lose them when a teacher is asked.
            for p in self._trained:
                p.requires_grad_(True)
        self._used = name

    @_alone
    def velocity(self, x: torch.Tensor, sigma: float | torch.Tensor, text: TextEmbedding, guidance: float = 1.0,
                 adapter: str | None = None) -> torch.Tensor:
        """`v(x, sigma)` in float32, (B, C, H, W), under one adapter; `sigma` is a number or (B,). `guidance` is classifier-free guidance: 1 is none,
        above it `v_empty + guidance (v - v_empty)`, as the pipeline does it."""
        self._use(adapter)
        if guidance != 1.0:
            empty = self.encode([""] * len(x))
            text = TextEmbedding(torch.cat([empty.tokens, text.tokens]), torch.cat([empty.pooled, text.pooled]))
            x = torch.cat([x, x])
        timestep = (torch.as_tensor(sigma, dtype=torch.float32, device=self.device)
                    * self.pipeline.scheduler.config.num_train_timesteps).repeat(len(x) if not torch.is_tensor(sigma) else len(x) // len(sigma))
        # Adapters are float32; under a half-precision backbone their products are taken in its dtype too.
        # On a CPU the flash kernel's backward is slow in bf16; with the plain one everywhere an update takes four fifths of the time.
        plain = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" and self.dtype == torch.bfloat16 else nullcontext()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32), plain:
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
