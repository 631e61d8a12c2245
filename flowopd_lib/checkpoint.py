"""Checkpoints without pickle: a nested state is one safetensors file, written atomically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .files import write_whole


def save_state(path: str | Path, state: Any) -> None:
    """Write nested dicts and lists of tensors and JSON values; a kill leaves the old file or the
    new one, whole."""
    tensors: dict[str, torch.Tensor] = {}

    def strip(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            key = f"t{len(tensors)}"
            tensors[key] = node.detach().cpu().contiguous().clone()
            return {"__tensor__": key}
        if isinstance(node, dict):
            # pairs keep the integer keys of optimizers
            return {"__dict__": [[k, strip(v)] for k, v in node.items()]}
        if isinstance(node, (list, tuple)):
            return [strip(v) for v in node]
        return node

    skeleton = json.dumps(strip(state))
    write_whole(path, save(tensors, {"skeleton": skeleton}))


def load_state(path: str | Path) -> Any:
    """Read what `save_state` wrote. Raises ValueError, naming the file, if it is not such a
    file."""
    try:
        with safe_open(path, "pt") as file:
            skeleton = json.loads(file.metadata()["skeleton"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a checkpoint of this library ({error}); delete it to start over"
        ) from error

    def fill(node: Any) -> Any:
        if isinstance(node, list):
            return [fill(v) for v in node]
        if isinstance(node, dict):
            return (
                tensors[node["__tensor__"]]
                if "__tensor__" in node
                else {k: fill(v) for k, v in node["__dict__"]}
            )
        return node

    return fill(skeleton)
