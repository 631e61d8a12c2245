"""What a result follows from, as plain values and hashes: compared before anything is resumed or
reused."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Where and in which portions something is computed changes rounding, not what is computed.
NOT_COMPARED = ("device", "batch", "micro_batch_size")
# What the names of modules begin with that `config.load_plugin` loads from a user's file.
PLUGIN = "flowopd_plugin_"
LIBRARY = Path(__file__).parent
# What samples and scores are computed by, and what trainings are: after a change here, but for
# comments and docstrings, nothing is found again and no training is resumed.
SAMPLING_CODE = ("sde", "lora", "policy", "rollout", "data", "evaluate", "rewards")
CODE = (*SAMPLING_CODE, "merge", "train", "losses", "lab/recipe", "lab/jobs")


def sha256_of(node: Any) -> str:
    """Of tensors (dtype, shape and bytes), arrays, numbers and strings, nested in mappings and
    lists."""
    digest = hashlib.sha256()
    _update(digest, node)
    return digest.hexdigest()


def _update(digest, node: Any) -> None:
    if isinstance(node, torch.Tensor):
        node = node.detach().cpu().contiguous()
        digest.update(f"{node.dtype} {tuple(node.shape)} ".encode())
        digest.update(memoryview(node.reshape(-1).view(torch.uint8).numpy()))
    elif isinstance(node, np.ndarray):
        _update(digest, torch.from_numpy(np.array(node, order="C")))
    elif isinstance(node, Mapping):
        for key, value in node.items():
            digest.update(f"{key!r}: ".encode())
            _update(digest, value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            _update(digest, value)
            digest.update(b", ")
    else:
        digest.update(repr(node).encode())


def sha256_of_json(node: Any) -> str:
    return hashlib.sha256(json.dumps(node, sort_keys=True, default=str).encode()).hexdigest()


def describe(node: Any, ours: bool = True) -> Any:
    """`node` as JSON can hold it: numbers and strings as they are, tensors and modules by the hash
    of their weights, long lists by theirs, objects by their class and settings, functions and
    classes of the user by their source. An object with `identity()` describes itself. Objects of
    other libraries (`ours` False) are not looked into."""
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    if isinstance(node, torch.nn.Module):
        return sha256_of(dict(node.state_dict()))
    if isinstance(node, (torch.Tensor, np.ndarray)):
        return sha256_of(node)
    if isinstance(node, (torch.dtype, torch.device, np.generic)):
        return str(node)
    if isinstance(node, Mapping):
        return {str(key): describe(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        values = [describe(value) for value in node]
        return values if len(values) <= 24 else {"n": len(values), "sha256": sha256_of_json(values)}
    if inspect.isroutine(node) or inspect.isclass(node):
        return {"name": node.__qualname__, **source_hash(node)}
    about = {"class": type(node).__qualname__, **source_hash(type(node))}
    if ours and hasattr(node, "identity"):
        return {**about, **describe(node.identity())}
    if not ours:
        return about["class"]
    values = {k: v for k, v in getattr(node, "__dict__", {}).items() if k not in NOT_COMPARED}
    return about | {k: describe(v, _is_ours(v)) for k, v in values.items() if k[0] != "_"}


def _is_ours(node: Any) -> bool:
    ours = type(node).__module__.split(".")[0] == __package__
    return ours or dataclasses.is_dataclass(node) or hasattr(node, "identity")


def source_hash(node: Any) -> dict[str, str]:
    """The hash of the source of a user's function or class; nothing for this library's and other
    packages', whose version is part of a run's manifest."""
    module = inspect.getmodule(node)
    name, file = getattr(module, "__name__", ""), getattr(module, "__file__", None) or ""
    if name.split(".")[0] == __package__ or "site-packages" in file:
        return {}
    try:
        # of a plugin's file all of it, for the function may call others that are there
        source = Path(file).read_text() if name.startswith(PLUGIN) else inspect.getsource(node)
    except (OSError, TypeError):  # built in, or typed where no source is kept
        return {}
    return {"source": sha256_of_code(source)}


def sha256_of_code(source: str) -> str:
    """Of what Python code does: without comments, docstrings and layout."""
    try:
        tree = ast.parse(textwrap.dedent(source))
    except SyntaxError:  # a lambda's lines are part of an expression
        return hashlib.sha256(source.encode()).hexdigest()
    for node in ast.walk(tree):
        match getattr(node, "body", None):
            case [ast.Expr(ast.Constant(str())), *_]:
                del node.body[0]
    return hashlib.sha256(repr(_syntax(tree)).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Of a file's bytes, of Python code without comments and docstrings, of a folder's weights and
    settings by their paths; of a hub id its commit. Computed again only if the file has changed."""
    if path.is_dir():
        files = {
            p.relative_to(path).as_posix(): file_hash(p)
            for p in path.rglob("*")
            if p.suffix in (".safetensors", ".json", ".txt", ".model") and p.name != "manifest.json"
        }
        return sha256_of_json(files)
    return _file_hash(path, path.stat().st_mtime_ns) if path.is_file() else hub_commit(str(path))


def hub_commit(name: str) -> str:
    """A hub id with its commit on this machine; any other string as it is."""
    from huggingface_hub.constants import HF_HUB_CACHE

    path, _, revision = name.partition("@")
    if not (parts := re.match(r"([\w.-]{1,96})/([\w.-]{1,96})(/|$)", path)):
        return name
    ref = Path(HF_HUB_CACHE) / f"models--{parts[1]}--{parts[2]}" / "refs" / (revision or "main")
    return f"{name} at {ref.read_text().strip()}" if ref.is_file() else name


@cache
def _file_hash(path: Path, changed: int) -> str:
    if path.suffix == ".py":
        return sha256_of_code(path.read_text(encoding="utf-8"))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def code_hashes(names: tuple[str, ...] = CODE) -> dict[str, str]:
    """Of this library's modules and folders of these names, by file: what they do."""
    files = [p for name in names for p in LIBRARY.glob(f"{name}.py")]
    files += [p for name in names for p in (LIBRARY / name).rglob("*.py") if p.stem != "server"]
    return {p.relative_to(LIBRARY).as_posix(): file_hash(p) for p in files}


def _syntax(node: Any) -> Any:
    """A syntax tree as lists. Empty fields are left out: later versions of Python have more of
    them."""
    if isinstance(node, ast.AST):
        fields = [(k, _syntax(v)) for k, v in ast.iter_fields(node) if v not in (None, [])]
        return [type(node).__name__, *fields]
    return [_syntax(item) for item in node] if isinstance(node, list) else repr(node)


def differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """One line for each value that two descriptions do not share: `sampler.steps was 3 and is
    6`."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            inside = f"{where}.{key}" if where else str(key)
            yield from differences(before.get(key), now.get(key), inside)
    elif before != now:
        yield f"{where} was {_short(before)} and is {_short(now)}"


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return f"sha256 {value[:8]}…"
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
