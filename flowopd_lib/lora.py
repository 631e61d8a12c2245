"""LoRA adapters: the layer that applies them, and PEFT's and diffusers' files read strictly.

diffusers' and PEFT's loaders only warn of keys that do not fit, and an adapter that does not fit
would silently be the base.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from .files import write_json, write_whole
from .fingerprint import sha256_of
from .hub import hub_fault

if TYPE_CHECKING:
    from peft import LoraConfig

# Flow-GRPO's
ATTENTION = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)
MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")

CONFIG, PEFT_FILE, DIFFUSERS_FILE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
)
# Fields of PEFT's config that say which layers are adapted, and at what rank and scale.
PLAN = (
    "r lora_alpha target_modules exclude_modules layers_to_transform layers_pattern rank_pattern "
    "alpha_pattern use_rslora"
).split()
# Fields that do not change what an adapter computes. Every other one must have PEFT's default: what
# is not known here may change it.
HARMLESS = (
    "lora_dropout init_lora_weights inference_mode base_model_name_or_path revision task_type "
    "auto_mapping peft_version peft_type eva_config qalora_group_size megatron_core runtime_config "
    "ensure_weight_tying"
).split()
# The other initialisations (PiSSA, OLoRA, CorDA, ...) take something out of the base.
HARMLESS_INIT = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Lora:
    """By module name, A (r, in), B (out, r) and alpha: what is added to a weight is `alpha / r B
    A`."""

    a: dict[str, torch.Tensor]
    b: dict[str, torch.Tensor]
    alpha: dict[str, float]

    @property
    def ranks(self) -> dict[str, int]:
        return {name: len(a) for name, a in self.a.items()}

    @property
    def sha256(self) -> str:
        return sha256_of({name: [self.a[name], self.b[name], self.alpha[name]] for name in self.a})

    def delta(self, name: str) -> torch.Tensor:
        """(out, in): what is added to the weight of one module."""
        return self.alpha[name] / len(self.a[name]) * self.b[name] @ self.a[name]

    def config(self) -> LoraConfig:
        """PEFT's description of it: exactly these modules, ranks and scales."""
        from peft import LoraConfig

        usual_rank, usual_alpha = (
            Counter(values.values()).most_common(1)[0][0] for values in (self.ranks, self.alpha)
        )
        number = {n: int(a) if float(a).is_integer() else float(a) for n, a in self.alpha.items()}
        return LoraConfig(
            r=usual_rank,
            lora_alpha=int(usual_alpha) if float(usual_alpha).is_integer() else float(usual_alpha),
            target_modules=list(self.a),
            rank_pattern={f"^{re.escape(n)}": r for n, r in self.ranks.items() if r != usual_rank},
            alpha_pattern={f"^{re.escape(n)}": a for n, a in number.items() if a != usual_alpha},
        )


class LoRALinear(nn.Linear):
    """A linear layer with adapters by name: `x W^T + bias + alpha / r (x A^T) B^T`, for the adapter
    that `active` names. Factors are float32; products are taken in the dtype of `x` or of autocast.
    They are no part of the state dict, which stays the base's."""

    @classmethod
    def wrap(cls, linear: nn.Linear, active: list) -> LoRALinear:
        """A layer that shares the weights of `linear`; `active` is a list of one name, shared by
        all layers."""
        layer = cls.__new__(cls)
        layer.__dict__ = copy.copy(linear.__dict__)
        layer.active, layer.factors = active, {}
        return layer

    def add(self, name: str, a: torch.Tensor, b: torch.Tensor, alpha: float) -> None:
        a, b = (
            nn.Parameter(f.detach().clone().float().to(self.weight.device), requires_grad=False)
            for f in (a, b)
        )
        self.factors[name] = (a, b, alpha)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, factors = super().forward(x), self.factors.get(self.active[0])
        if factors is None:
            return y
        a, b, alpha = factors
        return y + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * (alpha / len(a))


def linear_modules(transformer: nn.Module) -> dict[str, tuple[int, int]]:
    """{module name: (in, out)} of the linear layers."""
    return {
        name: (m.in_features, m.out_features)
        for name, m in transformer.named_modules()
        if isinstance(m, nn.Linear)
    }


def new_lora(
    modules: Mapping[str, tuple[int, int]],
    rank: int,
    alpha: float,
    targets: tuple[str, ...],
    seed: int = 0,
) -> Lora:
    """An adapter that changes nothing yet: A is drawn from `seed`, B is 0. Raises ValueError for
    targets that name no module."""
    if rank < 1 or not alpha > 0:
        raise ValueError(
            f"an adapter needs a rank of at least 1 and a positive alpha, not {rank} and {alpha}"
        )
    names = [n for n in modules if any(n == t or n.endswith(f".{t}") for t in targets)]
    if not names:
        raise ValueError(f"no linear layer of this model is called {' or '.join(targets)}")
    g = torch.Generator().manual_seed(seed)
    a = {n: torch.randn(rank, modules[n][0], generator=g) / rank for n in names}
    return Lora(
        a, {n: torch.zeros(modules[n][1], rank) for n in names}, dict.fromkeys(names, float(alpha))
    )


def read_adapter(source: str | Path, modules: Mapping[str, tuple[int, int]]) -> Lora:
    """An adapter for a transformer with these linear modules, float32: from a PEFT folder
    (`adapter_config.json` and `adapter_model.safetensors`), a diffusers folder
    (`pytorch_lora_weights.safetensors`), one safetensors file of either, or a hub id.

    Raises FileNotFoundError where there is none, and ValueError, with counts and an example, for
    keys that are missing, unexpected or of another shape, for numbers that are not finite, and for
    a kind of adapter that is not plain LoRA or rsLoRA.
    """
    file, config_file = _files_of(source)
    weights, metadata = _read_safetensors(file)
    if config_file is not None:
        config, prefix, format = _read_json(config_file), "base_model.model.", "PEFT"
    else:
        packed = json.loads(metadata.get("lora_adapter_metadata", "null")) or {}
        config = {
            k.removeprefix("transformer."): v
            for k, v in packed.items()
            if k.startswith("transformer.")
        }
        prefix, format = "transformer.", "diffusers"
    foreign = [
        k for k in weights if not re.fullmatch(re.escape(prefix) + r".+\.lora_[AB]\.weight", k)
    ]
    if foreign:
        hint = (
            "; it changes a text encoder, which is not trained here"
            if "text_enc" in foreign[0]
            else ""
        )
        raise ValueError(
            f"{source}: {len(foreign)} of {len(weights)} keys are not of {file.name} in {format}'s "
            f"format, such as {foreign[0]!r}; expected {prefix}MODULE.lora_A.weight and "
            f".lora_B.weight{hint}"
        )
    weights = {key.removeprefix(prefix): w for key, w in weights.items()}
    if config:
        plan = _plan(config, modules, source)
    else:  # diffusers' older files, whose scales are all 1
        a_keys = [k for k in weights if k.endswith("lora_A.weight")]
        plan = {
            k.removesuffix(".lora_A.weight"): (len(weights[k]), float(len(weights[k])))
            for k in a_keys
        }
    expected = {
        f"{name}.lora_{f}.weight": (rank, modules[name][0])
        if f == "A"
        else (modules[name][1], rank)
        for name, (rank, _) in plan.items()
        if name in modules
        for f in "AB"
    }
    if not expected:
        raise ValueError(f"the adapter {source} adapts no layer of this model")
    missing, unexpected = (
        [k for k in expected if k not in weights],
        [k for k in weights if k not in expected],
    )
    bent = [k for k in expected if k in weights and tuple(weights[k].shape) != expected[k]]
    problems = [
        f"{len(keys)} of {len(expected)} keys are {what}, such as {keys[0]!r}"
        for what, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    if bent:
        problems.append(
            f"{len(bent)} of {len(expected)} have another shape, such as {bent[0]!r} "
            f"{tuple(weights[bent[0]].shape)} instead of {expected[bent[0]]}"
        )
    if problems:
        raise ValueError(
            f"the adapter {source} does not fit this model: {'; '.join(problems)}; it belongs to "
            "another model, or its config does not belong to it"
        )
    broken = [k for k, w in weights.items() if not w.is_floating_point() or not w.isfinite().all()]
    if broken:
        raise ValueError(
            f"the adapter {source}: {len(broken)} of {len(weights)} weights are not finite "
            f"floating-point numbers, such as {broken[0]!r}"
        )
    return Lora(
        {n: weights[f"{n}.lora_A.weight"].float() for n in plan},
        {n: weights[f"{n}.lora_B.weight"].float() for n in plan},
        {n: alpha for n, (_, alpha) in plan.items()},
    )


def _plan(config: Mapping, modules: Mapping, source: str | Path) -> dict[str, tuple[int, float]]:
    """{module name: (rank, alpha)} as PEFT itself plans them. Raises ValueError for a kind of
    adapter that is not supported."""
    from peft import LoraConfig, inject_adapter_in_model

    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(
            f"the adapter {source} is of the kind {config['peft_type']}; only LoRA is supported"
        )
    defaults = LoraConfig().to_dict()
    for field, value in config.items():
        harmless = field in HARMLESS or field in PLAN or value in (None, False, [], {})
        if field == "init_lora_weights":
            harmless = value in HARMLESS_INIT
        if not harmless and value != defaults.get(field):
            raise ValueError(
                f"the adapter {source} has {field} = {value!r}, which is not supported: it is more "
                "than `alpha / r B A` on linear layers, so it could be neither averaged nor "
                "exported; convert it to plain LoRA with PEFT"
            )
    lora = LoraConfig(**{k: config[k] for k in PLAN if config.get(k) is not None})
    if not lora.target_modules:
        raise ValueError(
            f"the adapter {source} does not say which layers it adapts (target_modules)"
        )
    skeleton = nn.Module()
    with torch.device("meta"):
        for name, shape in modules.items():
            *parents, last = name.split(".")
            node = skeleton
            for part in parents:
                if part not in dict(node.named_children()):
                    node.add_module(part, nn.Module())
                node = node.get_submodule(part)
            node.add_module(last, nn.Linear(*shape))
        try:
            inject_adapter_in_model(lora, skeleton)
        except ValueError:  # PEFT's own where no module has such a name
            return {}
    return {
        name: (m.r["default"], m.scaling["default"] * m.r["default"])
        for name, m in skeleton.named_modules()
        if hasattr(m, "lora_A")
    }


def _files_of(source: str | Path) -> tuple[Path, Path | None]:
    """The weights' file and, in PEFT's format, the config's."""
    path = Path(source)
    if not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        import huggingface_hub

        patterns = [CONFIG, PEFT_FILE, DIFFUSERS_FILE]
        try:
            path = Path(huggingface_hub.snapshot_download(str(source), allow_patterns=patterns))
        except Exception as error:  # the hub's client has many kinds of its own
            raise FileNotFoundError(
                f"{str(source)!r} is neither a folder here nor an adapter on the hub: "
                f"{hub_fault(str(source), error)}"
            ) from error
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{path} is not a safetensors file; pickles are never read: convert it first"
            )
        config = path.with_name(CONFIG)
        return path, config if path.name == PEFT_FILE and config.is_file() else None
    names = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    if CONFIG in names and PEFT_FILE in names:
        return path / PEFT_FILE, path / CONFIG
    if CONFIG not in names and DIFFUSERS_FILE in names:
        return path / DIFFUSERS_FILE, None
    pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        raise ValueError(
            f"{path} has its weights in {pickles[0]}, a pickle, which is never read; convert it to "
            f"safetensors with PEFT, or take a release with {PEFT_FILE}"
        )
    raise FileNotFoundError(
        f"{source} is no adapter: a PEFT folder has {CONFIG} and {PEFT_FILE}, a diffusers folder "
        f"{DIFFUSERS_FILE}; this has {', '.join(names[:5]) or 'nothing, or does not exist'}"
    )


def _read_safetensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if file.read_bytes()[:24].startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` where it was cloned"
        )
    try:
        with safe_open(file, "pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a whole safetensors file ({error}); copy or download it again"
        ) from error


def _read_json(file: Path) -> dict:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file} is not an adapter's config: it has no names and values")
    return record


def write_peft(lora: Lora, folder: str | Path) -> None:
    """A folder that `read_adapter` and PEFT read."""
    record = {**lora.config().to_dict(), "inference_mode": True}
    record["target_modules"] = sorted(record["target_modules"])
    write_whole(
        Path(folder) / PEFT_FILE, save(_state_dict(lora, "base_model.model."), {"format": "pt"})
    )
    write_json(Path(folder) / CONFIG, record)


def write_diffusers(lora: Lora, folder: str | Path) -> None:
    """A folder that `read_adapter` and `StableDiffusion3Pipeline.load_lora_weights` read, ranks and
    alphas included."""
    record = lora.config().to_dict()
    plan = {
        f"transformer.{k}": record[k] for k in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
    }
    plan["transformer.target_modules"] = sorted(record["target_modules"])
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(plan, sort_keys=True)}
    write_whole(Path(folder) / DIFFUSERS_FILE, save(_state_dict(lora, "transformer."), metadata))


def _state_dict(lora: Lora, prefix: str) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}{name}.lora_{f}.weight": w.detach().cpu().contiguous()
        for f, factors in (("A", lora.a), ("B", lora.b))
        for name, w in factors.items()
    }
