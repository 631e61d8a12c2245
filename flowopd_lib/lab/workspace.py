"""Where a job runs: a benchmark's model with the adapters it names, in this process or in one of
several."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..benchmarks import Benchmark, load_benchmark
from ..config import validate
from ..losses import Shard
from ..merge import MergeConfig, merge
from ..policy import FlowPolicy
from ..precision import resolve
from ..train import StepInfo, shard_of
from .recipe import LoadAdapter, NewAdapter, Source

if TYPE_CHECKING:
    from accelerate import Accelerator


class Workspace:
    """`benchmark` on a device (the accelerator's, or what there is), in `dtype` (see `precision`).
    The model is loaded when it is first needed. `on_step` is called after every iteration of a
    training."""

    def __init__(
        self,
        benchmark: Benchmark | str,
        dtype: str | torch.dtype = "auto",
        accelerator: Accelerator | None = None,
        policy: FlowPolicy | None = None,
    ):
        self.benchmark = load_benchmark(benchmark) if isinstance(benchmark, str) else benchmark
        self.accelerator, self._dtype = accelerator, dtype
        self.on_step: Callable[[StepInfo], bool | None] | None = None
        self.show_progress = True
        self._sources: dict[str, str] = {}  # what each adapter in the policy was made from
        if policy is not None:
            self.policy = policy

    @cached_property
    def policy(self) -> FlowPolicy:
        return self.benchmark.policy(
            self._dtype, self.accelerator.device if self.accelerator else ("")
        )

    @property
    def dtype(self) -> torch.dtype:
        return (
            self.policy.dtype if ("policy") in self.__dict__ else resolve(self._dtype, self.device)
        )

    @property
    def device(self) -> str:
        if self.accelerator is not None:
            return str(self.accelerator.device)
        return str(self.policy.device) if "policy" in self.__dict__ else self.benchmark.device

    @cached_property
    def shard(self) -> Shard:
        return shard_of(self.accelerator) if self.accelerator else Shard()

    @property
    def main(self) -> bool:
        return self.shard.rank == 0

    def load_adapter(
        self, name: str, source: Any = None, sources: Mapping[str, Any] = {}, fresh: bool = False
    ) -> None:
        """See that the policy has this adapter, made from `source` (None: the benchmark's expert of
        that name). One of the same name that was made from something else, or with `fresh` from
        anything, is replaced. `sources`: of other adapters that it names."""
        source, sources = self._resolve(name, source, sources)
        made_from = self._describe(source, sources)
        if name in self.policy.adapters:
            if not fresh and self._sources.get(name) == made_from:
                return
            self.policy.remove_adapter(name)
        if isinstance(source, MergeConfig):
            self.load_adapters(source.adapters, sources)
            how = source.model_dump(exclude={"merge", "adapters"})
            merge(self.policy, source.adapters, name, source.merge, **how)
        elif isinstance(source, NewAdapter):
            targets = source.targets or self.benchmark.targets
            alpha = source.alpha or 2 * source.rank
            self.policy.add_adapter(name, source.rank, alpha, targets, source.seed or 0)
        else:
            self.policy.load_adapter(name, self._path(source))
        self._sources[name] = made_from

    def load_adapters(self, names: Iterable[str], sources: Mapping[str, Any] = {}) -> None:
        for name in names:
            self.load_adapter(name, sources.get(name), sources)

    def _resolve(
        self, name: str, source: Any, sources: Mapping[str, Any]
    ) -> tuple[Source, dict[str, Any]]:
        """The checked source of an adapter, which may be the name of another, and the sources of
        those that are left to be named by it."""
        source = validate(Source, name if source is None else source, f"the adapter {name}")
        sources = {k: v for k, v in sources.items() if k != name}
        if isinstance(source, str) and source in sources:
            return self._resolve(source, sources[source], sources)
        return source, sources

    def _path(self, source: str | LoadAdapter) -> str:
        name = source.load if isinstance(source, LoadAdapter) else source
        return self.benchmark.adapter(name) if name in self.benchmark.experts else name

    def _describe(self, source: Source, sources: Mapping[str, Any]) -> str:
        """What an adapter is made from, files by their time and size."""
        if isinstance(source, (str, LoadAdapter)):
            path = Path(self._path(source))
            files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] * path.is_file()
            return json.dumps(
                [str(path), *((f.stat().st_mtime_ns, f.stat().st_size) for f in files)]
            )
        described = source.model_dump(mode="json")
        if isinstance(source, MergeConfig):
            described["parts"] = [
                self._describe(*self._resolve(n, sources.get(n), sources)) for n in source.adapters
            ]
        return json.dumps(described)

    def remove_adapters(self) -> None:
        if "policy" in self.__dict__:
            self.policy.remove_adapters()
            self._sources.clear()
