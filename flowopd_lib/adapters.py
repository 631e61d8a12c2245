"""LoRA adapters on disk: one strict way in, for the folders, files and hub ids of PEFT and of diffusers, and
what is written back.

Inside there is one kind, plain LoRA: at each place (a linear layer of the transformer, by name) `W + alpha /
r * B A`. rsLoRA, whose scale is
`alpha / sqrt(r)`, is the same with another alpha, and becomes that when it is read. What is not of this form
is refused by name: DoRA, biases, layers saved whole, starts that change the base. A teacher that does not fit
would else be silently the base.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .files import write_json, write_whole
from .hub import hub_fault
from .identity import sha256_of

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
# What an adapter's config may say. Every other field must be as PEFT has it by default: what we do not know
# may change what it computes.
UNDERSTOOD = {
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "lora_dropout",
    "init_lora_weights",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "auto_mapping",
    "peft_version",
    "peft_type",
    "eva_config",
    "qalora_group_size",
    "megatron_core",
    "runtime_config",
    "ensure_weight_tying",
}
REASONS = {
    "use_dora": "a DoRA adapter also scales the columns of the weights, so its change is no B A that could "
    "be averaged or exported",
    "bias": "trained biases belong to the base: they would change it and every other adapter too",
    "lora_bias": "an adapter with biases is no B A",
    "modules_to_save": "layers saved whole are no B A",
    "use_qalora": "QALoRA pools the activations, so its change is no B A",
    "layer_replication": "it changes the layers of the base",
    "target_parameters": "only linear layers are adapted here",
    "trainable_token_indices": "only linear layers are adapted here",
}
# the others (PiSSA, OLoRA, CorDA, ...) take something out of the base
HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Lora:
    """By place, A (r, in), B (out, r) and alpha: what is added to the weight there is `alpha / r * B A`."""

    a: dict[str, torch.Tensor]
    b: dict[str, torch.Tensor]
    alpha: dict[str, float]

    @property
    def ranks(self) -> dict[str, int]:
        return {place: len(a) for place, a in self.a.items()}

    @property
    def sha256(self) -> str:
        """Of what it adds to the weights: factors and scales by place."""
        return sha256_of({p: [self.a[p], self.b[p], self.alpha[p]] for p in self.a})

    def config(self) -> LoraConfig:
        """PEFT's description of it, that gives exactly these places, ranks and scales."""
        from peft import LoraConfig

        (rank, _), (alpha, _) = (
            Counter(values.values()).most_common(1)[0] for values in (self.ranks, self.alpha)
        )

        def but(usual: float, values: Mapping[str, float]) -> dict[str, float]:
            return {f"^{re.escape(place)}": v for place, v in values.items() if v != usual}

        return LoraConfig(
            r=rank,
            lora_alpha=whole(alpha),
            target_modules=list(self.a),
            rank_pattern=but(rank, self.ranks),
            alpha_pattern=but(alpha, {p: whole(v) for p, v in self.alpha.items()}),
        )


def whole(number: float) -> float | int:
    return int(number) if float(number).is_integer() else float(number)


def linear_places(transformer: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """{name: (in, out)} of the linear layers, adapted or not."""
    found = {}
    for name, module in transformer.named_modules():
        # one that PEFT adapts
        layer = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if (
            isinstance(layer, torch.nn.Linear)
            and ".lora_" not in name
            and not name.endswith(".base_layer")
        ):
            found[name] = (layer.in_features, layer.out_features)
    return found


def read_adapter(source: str | Path, places: Mapping[str, tuple[int, int]]) -> Lora:
    """An adapter for a transformer with the linear layers `places`, float32, from a PEFT folder
    (`adapter_config.json` beside
    `adapter_model.safetensors`), a diffusers folder (`pytorch_lora_weights.safetensors`), one safetensors
    file of either, or a hub id.

    Raises FileNotFoundError where there is none, and ValueError, with counts and an example, for keys that
    are missing, unexpected or of another shape, for numbers that are not finite, and for a kind of adapter
    that is not plain LoRA or rsLoRA.
    """
    file, config_file = _files_of(source)
    weights, metadata = _weights(file)
    if config_file is not None:
        config = _json(config_file)
        prefix, about = "base_model.model.", f"{file.name} in PEFT's format ({CONFIG} is beside it)"
    else:
        packed = json.loads(metadata.get("lora_adapter_metadata", "null"))
        config = (
            None
            if packed is None
            else {
                k.removeprefix("transformer."): v
                for k, v in packed.items()
                if k.startswith("transformer.")
            }
        )
        prefix, about = "transformer.", f"{file.name} in diffusers' format"
    strange = [
        key
        for key in weights
        if not re.fullmatch(re.escape(prefix) + r".+\.lora_[AB]\.weight", key)
    ]
    if strange:
        other = {"base_model.model.": "transformer.", "transformer.": "base_model.model."}[prefix]
        hint = {
            other: f"; keys that begin with {other} are of the other format, PEFT's or diffusers': copy the "
            "file again with what belongs to it",
            "text_enc": "; it changes a text encoder, which is not trained here",
        }
        more = next((said for start, said in hint.items() if strange[0].startswith(start)), "")
        raise ValueError(
            f"{source}: {len(strange)} of {len(weights)} keys are not of {about}, such as {strange[0]!r}; "
            f"expected {prefix}PLACE.lora_A.weight and .lora_B.weight{more}"
        )
    found = {key.removeprefix(prefix): w for key, w in weights.items()}
    if config is None:  # diffusers' older files: every scale is 1
        ranks = {
            key.removesuffix(".lora_A.weight"): len(w)
            for key, w in found.items()
            if key.endswith("A.weight")
        }
        alphas = {place: float(rank) for place, rank in ranks.items()}
    else:
        ranks, alphas = _planned(config, places, source)
    expected = {
        f"{place}.lora_{f}.weight": (rank, places[place][0])
        if f == "A"
        else (places[place][1], rank)
        for place, rank in ranks.items()
        if place in places
        for f in "AB"
    }
    problems = []
    for what, keys in (
        ("missing", [k for k in expected if k not in found]),
        ("unexpected", [k for k in found if k not in expected]),
    ):
        if keys:
            problems.append(
                f"{len(keys)} of {len(expected) or len(found)} keys are {what}, such as {keys[0]!r}"
            )
    bent = [k for k in expected if k in found and tuple(found[k].shape) != expected[k]]
    if bent:
        problems.append(
            f"{len(bent)} of {len(expected)} have another shape, such as {bent[0]!r} "
            f"{tuple(found[bent[0]].shape)} instead of {expected[bent[0]]}"
        )
    if problems:
        raise ValueError(
            f"the adapter {source} does not fit this model: {'; '.join(problems)}; it belongs to another "
            "model, or its config does not belong to it"
        )
    if not expected:
        raise ValueError(f"the adapter {source} adapts no layer of this model")
    broken = [k for k, w in found.items() if not w.is_floating_point() or not w.isfinite().all()]
    if broken:
        raise ValueError(
            f"the adapter {source}: {len(broken)} of {len(found)} weights are not finite floating-point "
            f"numbers, such as {broken[0]!r}"
        )
    found = {k: w.float() for k, w in found.items()}
    return Lora(
        {p: found[f"{p}.lora_A.weight"] for p in ranks},
        {p: found[f"{p}.lora_B.weight"] for p in ranks},
        alphas,
    )


def _planned(
    config: Mapping, places: Iterable[str], source: str | Path
) -> tuple[dict[str, int], dict[str, float]]:
    """Rank and alpha by place, as PEFT would make them of a config. Raises ValueError for a kind that is not
    supported."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(f"the adapter {source} is of the kind {kind}; only LoRA is supported")
    usual = LoraConfig().to_dict()
    for field, value in config.items():
        if (
            field not in UNDERSTOOD
            and value not in (None, False, [], {})
            and value != usual.get(field)
        ):
            raise ValueError(
                f"the adapter {source} has {field} = {value!r}, which is not supported: "
                f"{REASONS.get(field, 'it may change what the adapter computes')}"
            )
    if config.get("init_lora_weights", True) not in HARMLESS_STARTS:
        raise ValueError(
            f"the adapter {source} has init_lora_weights = {config['init_lora_weights']!r}, which is not "
            "supported: such a start takes "
            "something out of the base, so its weights mean nothing without that; convert it to plain LoRA "
            "with PEFT first"
        )
    lora = LoraConfig(
        **{
            k: config[k]
            for k in (
                "r",
                "lora_alpha",
                "target_modules",
                "exclude_modules",
                "layers_to_transform",
                "layers_pattern",
                "rank_pattern",
                "alpha_pattern",
                "use_rslora",
            )
            if config.get(k) is not None
        }
    )
    if not lora.target_modules:
        raise ValueError(
            f"the adapter {source} does not say which layers it adapts (target_modules)"
        )
    ranks, alphas = {}, {}
    for place in places:
        if check_target_module_exists(lora, place):
            ranks[place] = rank = lora.rank_pattern.get(
                get_pattern_key(lora.rank_pattern, place), lora.r
            )
            alpha = lora.alpha_pattern.get(
                get_pattern_key(lora.alpha_pattern, place), lora.lora_alpha
            )
            alphas[place] = float(alpha) * (math.sqrt(rank) if lora.use_rslora else 1.0)
    return ranks, alphas


def _files_of(source: str | Path) -> tuple[Path, Path | None]:
    """The weights' file and, in PEFT's format, the config's."""
    path = Path(source)
    if (
        not path.exists()
        and not isinstance(source, Path)
        and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source))
    ):
        import huggingface_hub

        try:
            path = Path(
                huggingface_hub.snapshot_download(
                    str(source), allow_patterns=[CONFIG, PEFT_FILE, DIFFUSERS_FILE]
                )
            )
        except Exception as error:  # the hub's client has many kinds of its own
            raise FileNotFoundError(
                f"{str(source)!r} is neither a folder here nor an adapter that the hub gives: "
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
            "safetensors with PEFT, or take a release "
            f"with {PEFT_FILE}"
        )
    raise FileNotFoundError(
        f"{source} is no adapter: a PEFT folder has {CONFIG} and {PEFT_FILE}, a diffusers folder "
        f"{DIFFUSERS_FILE}; "
        f"this has {', '.join(names[:5]) or 'nothing, or is not there'}"
    )


def _weights(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with file.open("rb") as start:
        if start.read(24).startswith(b"version https://git-lfs"):
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


def _json(file: Path) -> dict:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file} is not an adapter's config: it holds no names and values")
    return record


def write_peft(lora: Lora, folder: str | Path) -> None:
    """A folder that `read_adapter` and PEFT read."""
    record = {**lora.config().to_dict(), "inference_mode": True}
    record["target_modules"] = sorted(record["target_modules"])
    write_whole(Path(folder) / PEFT_FILE, save(_keyed(lora, "base_model.model."), {"format": "pt"}))
    write_json(Path(folder) / CONFIG, record)


def write_diffusers(lora: Lora, folder: str | Path) -> None:
    """A folder that `read_adapter` and `StableDiffusion3Pipeline.load_lora_weights` read, ranks and alphas
    included."""
    record = lora.config().to_dict()
    told = {
        f"transformer.{k}": record[k] for k in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
    }
    told["transformer.target_modules"] = sorted(record["target_modules"])
    write_whole(
        Path(folder) / DIFFUSERS_FILE,
        save(
            _keyed(lora, "transformer."),
            {"format": "pt", "lora_adapter_metadata": json.dumps(told, sort_keys=True)},
        ),
    )


def _keyed(lora: Lora, prefix: str) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}{place}.lora_{f}.weight": w.detach().cpu().contiguous()
        for f, factors in (("A", lora.a), ("B", lora.b))
        for place, w in factors.items()
    }
