"""Where a job runs: a benchmark's model with the adapters it names, in this process or in one of
several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ..benchmarks import Benchmark, load_benchmark
from ..loading import resolve
from ..losses import Shard
from ..merge import MergeConfig, merge
from ..policy import FlowPolicy
from ..train import StepInfo, shard_of
from .recipe import NewAdapter, made_from

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
        self.device = str(accelerator.device) if accelerator else self.benchmark.device
        self.accelerator, self._dtype = accelerator, dtype
        self.on_step: Callable[[StepInfo], bool | None] | None = None
        self.show_progress = True
        if policy is not None:
            self.policy, self.device, self._dtype = policy, str(policy.device), policy.dtype

    @cached_property
    def policy(self) -> FlowPolicy:
        return self.benchmark.policy(self._dtype, self.device)

    @cached_property
    def dtype(self) -> torch.dtype:
        return resolve(self._dtype, self.device)

    @cached_property
    def shard(self) -> Shard:
        return shard_of(self.accelerator) if self.accelerator else Shard()

    @property
    def main(self) -> bool:
        return self.shard.rank == 0

    def load_adapter(self, name: str, source: Any = None, sources: Mapping[str, Any] = {}) -> None:
        """Give the policy this adapter, made from `source` (None: the benchmark's expert of that
        name), in place of one of the same name. `sources`: of other adapters that it names."""
        others = {k: v for k, v in sources.items() if k != name}
        source = made_from(name, others if source is None else {**others, name: source})
        if isinstance(source, MergeConfig):
            self.load_adapters(source.adapters, others)
        if name in self.policy.adapters:
            self.policy.remove_adapter(name)
        if isinstance(source, MergeConfig):
            how = source.model_dump(exclude={"merge", "adapters"})
            merge(self.policy, source.adapters, name, source.merge, **how)
        elif isinstance(source, NewAdapter):
            rank, alpha = source.rank, source.alpha or 2 * source.rank
            self.policy.add_adapter(name, rank, alpha, self.benchmark.targets, source.seed or 0)
        else:
            expert = source in self.benchmark.experts
            self.policy.load_adapter(name, self.benchmark.adapter(source) if expert else source)

    def load_adapters(self, names: Iterable[str], sources: Mapping[str, Any] = {}) -> None:
        for name in names:
            self.load_adapter(name, sources.get(name), sources)
