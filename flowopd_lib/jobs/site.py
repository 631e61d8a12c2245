"""Where a job runs: a benchmark's model with the adapters it names, in this process or in one of several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ..benchmarks import Benchmark, load_benchmark
from ..inputs import check_mapping, list_of, one_of
from ..merge import METHODS, merge
from ..objectives import Share
from ..policy import FlowPolicy
from ..precision import resolve
from ..train import share_of

if TYPE_CHECKING:
    from accelerate import Accelerator

# What an adapter may come from: an expert of the benchmark, a folder or a hub id by its name, or one of these.
SOURCES = {
    "merge": {
        "merge": one_of(*METHODS),
        "adapters": list_of(str),
        "weights": list[float] | None,
        "rank": int | None,
        "density": float,
    },
    "load": {"load": str},
    "rank": {"rank": int, "alpha": float | None, "targets": list[str], "seed": int},
}


def check_source(where: str, source: Any) -> None:
    """Raises ValueError for what names no adapter."""
    if isinstance(source, str) and source:
        return
    kind = next((k for k in SOURCES if isinstance(source, Mapping) and k in source), None)
    if kind is None:
        raise ValueError(
            f"{where} must be an expert, a folder or a hub id by its name, or have one of "
            f"{', '.join(SOURCES)}, not be {source!r}"
        )
    check_mapping(where, source, SOURCES[kind], f"{where}.")


@contextmanager
def one_thread() -> Iterator[None]:
    """Several threads round as they share the work. A merge is made by one, for a training knows its start by
    its weights: it would not go on in a process with another number of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Site:
    """`benchmark` on a device (the accelerator's, or what there is), in `dtype` (see `precision`). The model is
    loaded when it is first asked for."""

    def __init__(
        self,
        benchmark: Benchmark | str,
        dtype: str | torch.dtype = "auto",
        accelerator: Accelerator | None = None,
        policy: FlowPolicy | None = None,
    ):
        self.benchmark = load_benchmark(benchmark) if isinstance(benchmark, str) else benchmark
        self.accelerator, self._dtype = accelerator, dtype
        if policy is not None:
            self.policy = policy

    @cached_property
    def policy(self) -> FlowPolicy:
        return self.benchmark.policy(
            self._dtype, self.accelerator.device if self.accelerator else ""
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.policy.dtype if "policy" in self.__dict__ else resolve(self._dtype, self.device)

    @property
    def device(self) -> str:
        if self.accelerator is not None:
            return str(self.accelerator.device)
        return str(self.policy.device) if "policy" in self.__dict__ else self.benchmark.device

    @cached_property
    def share(self) -> Share:
        return share_of(self.accelerator) if self.accelerator else Share()

    @property
    def main(self) -> bool:
        return self.share.rank == 0

    def adapter(self, name: str, source: Any = None, sources: Mapping[str, Any] = {}) -> None:
        """See that the policy has this adapter: it is made of `source` (None: the benchmark's expert of that
        name) unless it is there. `sources`: of those that it is merged of."""
        if name in self.policy.adapters:
            return
        source = name if source is None else source
        check_source(f"the adapter {name}", source)
        if isinstance(source, str) or "load" in source:
            place = source if isinstance(source, str) else source["load"]
            benchmark = self.benchmark
            self.policy.load_adapter(
                name, benchmark.adapter(place) if place in benchmark.experts else place
            )
        elif "merge" in source:
            how = {k: v for k, v in source.items() if k not in ("merge", "adapters")}
            self.adapters(source["adapters"], sources)
            with one_thread():
                merge(self.policy, source["adapters"], name, source["merge"], **how)
        else:
            alpha = source.get("alpha") or 2 * source["rank"]
            targets = tuple(source.get("targets", self.benchmark.targets))
            self.policy.add_adapter(name, source["rank"], alpha, targets, source.get("seed", 0))

    def forget(self) -> None:
        """Drop all adapters."""
        if "policy" in self.__dict__:
            self.policy.remove_adapters()

    def adapters(self, names: Iterable[str], sources: Mapping[str, Any] = {}) -> None:
        for name in names:
            self.adapter(name, sources.get(name), sources)
