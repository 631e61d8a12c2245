"""What a computation follows from, told as plain values and hashes: what a resume compares before it goes
on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from .prompts import Prompt

# Where and in what portions it is computed changes roundings, not what is computed.
ASIDE = ("device", "batch", "micro_batch_size")


def _bytes(digest, node: Any) -> None:
    if isinstance(node, torch.Tensor):
        node = node.detach().cpu().contiguous()
        digest.update(f"{node.dtype} {tuple(node.shape)} ".encode())
        digest.update(memoryview(node.reshape(-1).view(torch.uint8).numpy()))
    elif isinstance(node, np.ndarray):
        _bytes(digest, torch.from_numpy(np.ascontiguousarray(node)))
    elif isinstance(node, Mapping):
        for key, value in node.items():
            digest.update(f"{key!r}: ".encode())
            _bytes(digest, value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            _bytes(digest, value)
            digest.update(b", ")
    else:
        digest.update(repr(node).encode())


def sha256_of(node: Any) -> str:
    """Of tensors (dtype, shape and bytes), arrays, numbers and texts, nested in mappings and lists as they
    may be."""
    digest = hashlib.sha256()
    _bytes(digest, node)
    return digest.hexdigest()


def describe(node: Any, known: bool = True) -> Any:
    """`node` as JSON can hold it: numbers and texts as they are, tensors and modules by the hash of their
    weights, long lists by theirs, objects by the name of their class and what they hold. An object that has
    `identity()` says itself what it is. What other libraries hold is not looked into."""
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    if isinstance(node, torch.nn.Module):
        return sha256_of(dict(node.state_dict()))
    if isinstance(node, (torch.Tensor, np.ndarray)):
        return sha256_of(node)
    if isinstance(node, (torch.dtype, torch.device)):
        return str(node)
    if isinstance(node, np.generic):
        return node.item()
    if isinstance(node, Prompt):
        return [node.text, node.task, node.metadata]
    if isinstance(node, Mapping):
        return {str(key): describe(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        values = [describe(value) for value in node]
        return (
            values
            if len(values) <= 24
            else {
                "n": len(values),
                "sha256": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest(),
            }
        )
    if known and hasattr(node, "identity"):
        return {"class": type(node).__qualname__, **describe(node.identity())}
    if not known or isinstance(node, type) or callable(node) and not hasattr(node, "__dict__"):
        return getattr(node, "__qualname__", type(node).__qualname__)
    held = (
        {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
        if dataclasses.is_dataclass(node)
        else getattr(node, "__dict__", {})
    )
    ours = {
        k: describe(
            v,
            known=dataclasses.is_dataclass(v)
            or hasattr(v, "identity")
            or type(v).__module__.split(".")[0] == __package__,
        )
        for k, v in held.items()
        if not k.startswith("_") and k not in ASIDE
    }
    return {"class": type(node).__qualname__, **ours}


def differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """One line for each value that two descriptions do not share: `sampler.steps was 3 and is 6`."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            yield from differences(
                before.get(key), now.get(key), f"{where}.{key}" if where else str(key)
            )
    elif before != now:
        yield f"{where} was {_short(before)} and is {_short(now)}"


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return f"weights {value[:8]}…"
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
