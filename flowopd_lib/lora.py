"""LoRA adapters: the layer that applies them, and PEFT's and diffusers' files read strictly.

diffusers' and PEFT's loaders only warn of keys that do not fit, and an adapter that does not fit
would silently be the base.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mode

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from .files import write_json, write_whole
from .fingerprint import sha256_of
from .loading import hub_fault

# Flow-GRPO's
ATTENTION = tuple("to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split())
MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")

CONFIG, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
FILES = (CONFIG, PEFT_FILE, DIFFUSERS_FILE)  # what is read: never a pickle
# OWNER/NAME, /SUBFOLDER, @REVISION
HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)((?:/[\w-][\w.-]*)*)(?:@([\w./-]+))?")
# Fields of PEFT's config that say which layers are adapted, and at what rank and scale.
PLAN = (
    "r lora_alpha target_modules exclude_modules layers_to_transform layers_pattern rank_pattern "
    "alpha_pattern use_rslora"
).split()
# Fields that do not change what an adapter computes. Every other one must have PEFT's default: what
# is not known here may change it.
HARMLESS = (
    "lora_dropout init_lora_weights inference_mode base_model_name_or_path revision task_type "
    "auto_mapping peft_version eva_config qalora_group_size megatron_core runtime_config "
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

    def cpu(self) -> Lora:
        a, b = ({name: w.cpu() for name, w in factors.items()} for factors in (self.a, self.b))
        return Lora(a, b, self.alpha)

    def delta(self, name: str) -> torch.Tensor:
        """(out, in): what is added to the weight of one module."""
        return self.alpha[name] / len(self.a[name]) * self.b[name] @ self.a[name]

    def config(self) -> dict:
        """As PEFT describes it: exactly these modules, ranks and scales."""
        rank, alpha = mode(self.ranks.values()), mode(self.alpha.values())
        return {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": sorted(self.a),
            "rank_pattern": {f"^{re.escape(n)}": r for n, r in self.ranks.items() if r != rank},
            "alpha_pattern": {f"^{re.escape(n)}": a for n, a in self.alpha.items() if a != alpha},
        }


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
    names = [n for n in modules if any(n == t or n.endswith(f".{t}") for t in targets)]
    if not names:
        raise ValueError(f"no linear layer of this model is called {' or '.join(targets)}")
    g = torch.Generator().manual_seed(seed)
    a = {n: torch.randn(rank, modules[n][0], generator=g) / rank for n in names}
    b = {n: torch.zeros(modules[n][1], rank) for n in names}
    return Lora(a, b, dict.fromkeys(names, float(alpha)))


def read_adapter(source: str | Path, modules: Mapping[str, tuple[int, int]]) -> Lora:
    """An adapter for a transformer with these linear modules, float32: from a PEFT folder
    (`adapter_config.json` and `adapter_model.safetensors`), a diffusers folder
    (`pytorch_lora_weights.safetensors`), one safetensors file of either, or a hub id: `OWNER/NAME`,
    `OWNER/NAME/SUBFOLDER`, and with `@REVISION` at the end a branch, tag or commit.

    Raises FileNotFoundError where there is none, and ValueError, with counts and an example, for
    keys that are missing, unexpected or of another shape, for numbers that are not finite, and for
    a kind of adapter that is not plain LoRA or rsLoRA.
    """
    file, config_file = _files_of(source)
    weights, metadata = _read_safetensors(file)
    if config_file is not None:
        try:
            config, prefix = dict(json.loads(config_file.read_text())), "base_model.model."
        except (ValueError, TypeError) as error:
            raise ValueError(f"{config_file} is not an adapter's config ({error})") from error
    else:
        prefix = "transformer."
        packed = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        config = {k.removeprefix(prefix): v for k, v in packed.items() if k.startswith(prefix)}
    if config:
        plan = _plan(config, modules, source)
    else:  # diffusers' older files, whose scales are all 1
        ranks = {k: len(w) for k, w in weights.items() if k.endswith(".lora_A.weight")}
        plan = {k[len(prefix) : -len(".lora_A.weight")]: (r, float(r)) for k, r in ranks.items()}
    expected = {}
    for name, (rank, _) in plan.items():
        inputs, outputs = modules.get(name, (0, 0))
        expected[f"{prefix}{name}.lora_A.weight"] = rank, inputs
        expected[f"{prefix}{name}.lora_B.weight"] = outputs, rank
    shapes = {key: tuple(w.shape) for key, w in weights.items()}
    wrong = [k for k in {**expected, **shapes} if expected.get(k) != shapes.get(k)]
    if wrong or not plan:
        example = wrong[0] if wrong else "none"
        raise ValueError(
            f"the adapter {source} does not fit this model, or its config does not belong to it: "
            f"{len(wrong)} keys are missing, unexpected or of another shape, such as {example!r}, "
            f"{shapes.get(example, 'missing')} instead of {expected.get(example, 'unexpected')}"
        )
    broken = [k for k, w in weights.items() if not w.is_floating_point() or not w.isfinite().all()]
    if broken:
        raise ValueError(
            f"the adapter {source}: {len(broken)} of {len(weights)} weights are not finite "
            f"floating-point numbers, such as {broken[0]!r}"
        )
    a, b = ({n: weights[f"{prefix}{n}.lora_{f}.weight"].float() for n in plan} for f in "AB")
    return Lora(a, b, {name: alpha for name, (_, alpha) in plan.items()})


def _plan(config: Mapping, modules: Mapping, source: str | Path) -> dict[str, tuple[int, float]]:
    """{module name: (rank, alpha)} as PEFT itself plans them. Raises ValueError for a kind of
    adapter that is not supported."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    defaults = LoraConfig().to_dict()
    for field, value in {"peft_type": "LORA", **config}.items():
        harmless = field in (*HARMLESS, *PLAN) or value in (None, False, [], {})
        if field == "init_lora_weights":
            harmless = value in HARMLESS_INIT
        if not harmless and value != defaults.get(field):
            raise ValueError(
                f"the adapter {source} has {field} = {value!r}, which is not supported: it is more "
                "than `alpha / r B A` on linear layers; convert it to plain LoRA with PEFT"
            )
    lora = LoraConfig(**{k: config[k] for k in PLAN if config.get(k) is not None})
    ranks, alphas, targets = lora.rank_pattern, lora.alpha_pattern, lora.target_modules
    plan = {}
    for name in (n for n in modules if targets and check_target_module_exists(lora, n)):
        rank = ranks.get(get_pattern_key(ranks, name), lora.r)
        alpha = alphas.get(get_pattern_key(alphas, name), lora.lora_alpha)
        plan[name] = rank, float(alpha * rank**0.5 if lora.use_rslora else alpha)
    if not plan:
        raise ValueError(f"the adapter {source} adapts no layer of this model: {targets}")
    return plan


def _files_of(source: str | Path) -> tuple[Path, Path | None]:
    """The weights' file and, in PEFT's format, the config's."""
    path = Path(source)
    if not path.exists() and (on_hub := HUB_ID.fullmatch(str(source))):
        try:
            path = _download(*on_hub.groups())
        except Exception as error:  # the hub's client has many kinds of its own
            raise FileNotFoundError(
                f"{str(source)!r} is neither a folder here nor an adapter on the hub: "
                f"{hub_fault(str(source), error)}"
            ) from error
    folder = path.parent if path.suffix == ".safetensors" else path
    config, peft_file = folder / CONFIG, folder / PEFT_FILE
    if path in (folder, peft_file) and config.is_file() and peft_file.is_file():
        return peft_file, config
    if path.is_dir():
        path = path / DIFFUSERS_FILE
    if path.suffix == ".safetensors" and path.is_file():
        return path, None
    raise FileNotFoundError(
        f"{source} is no adapter: a PEFT folder has {CONFIG} and {PEFT_FILE}, a diffusers folder "
        f"{DIFFUSERS_FILE}; pickles are never read"
    )


def _download(name: str, subfolder: str, revision: str | None) -> Path:
    """The folder of an adapter on the hub: the subfolder, or the only one below it. Raises
    FileNotFoundError with those there are."""
    import huggingface_hub

    def download(at: str, *files: str) -> Path:
        patterns = [at + file for file in files]
        how = {"revision": revision, "allow_patterns": patterns}
        return Path(huggingface_hub.snapshot_download(name, **how))

    at = f"{subfolder[1:]}/" if subfolder else ""
    root = download(at, *FILES)
    if any((root / at / file).is_file() for file in FILES):
        return root / at
    root = download("*/", CONFIG)  # small, and says where the others are
    found = {p.parent for file in FILES for p in root.rglob(file)}
    there = sorted(f for f in found if found.isdisjoint(f.parents))  # no checkpoints of others
    below = [folder for folder in there if folder.is_relative_to(root / at)]
    if len(below) == 1:
        at = f"{below[0].relative_to(root).as_posix()}/"
        return download(at, *FILES) / at
    names = ", ".join(f"{name}/{p.relative_to(root).as_posix()}" for p in below or there)
    raise FileNotFoundError(f"the adapters of {name} are {names or 'none that can be read'}")


def _read_safetensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(file, "pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a whole safetensors file ({error}); download it again, or run `git lfs "
            "pull` where it was cloned"
        ) from error


def write_peft(lora: Lora, folder: str | Path) -> None:
    """A folder that `read_adapter` and PEFT read."""
    from peft import LoraConfig

    record = LoraConfig().to_dict() | lora.config() | {"inference_mode": True}
    weights = save(_state_dict(lora, "base_model.model."), {"format": "pt"})
    write_whole(Path(folder) / PEFT_FILE, weights)
    write_json(Path(folder) / CONFIG, record)


def write_diffusers(lora: Lora, folder: str | Path) -> None:
    """A folder that `read_adapter` and `StableDiffusion3Pipeline.load_lora_weights` read, ranks and
    alphas included."""
    plan = {f"transformer.{key}": value for key, value in lora.config().items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(plan, sort_keys=True)}
    write_whole(Path(folder) / DIFFUSERS_FILE, save(_state_dict(lora, "transformer."), metadata))


def _state_dict(lora: Lora, prefix: str) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}{name}.lora_{f}.weight": w.detach().cpu().contiguous()
        for f, factors in (("A", lora.a), ("B", lora.b))
        for name, w in factors.items()
    }
