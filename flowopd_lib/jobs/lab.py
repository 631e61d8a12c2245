"""What a notebook computes with: a benchmark, and one way to ask for a job, in its own process or by a
launcher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from ..benchmarks import load_benchmark
from ..files import read_lines
from ..inputs import check_value, one_of
from ..policy import FlowPolicy
from ..stats import GOLD
from .launchers import load_launcher
from .processes import Served
from .site import Site
from .work import check_spec, run_job

# How far the seeds of further noises lie from the first ones.
OTHER = 1 << 22


class Lab:
    """`benchmark` and `launcher` by their names, `out` the folder for results. With a launcher this process loads
    no model: every job runs in the launcher's processes and leaves its tables in `out`.

    `sources`: what the adapters that jobs name come from, beside the benchmark's experts (see `site.SOURCES`);
    a training adds its own.
    """

    def __init__(self, benchmark: str, launcher: str, out: Path):
        self.benchmark, self.launcher, self.out = load_benchmark(benchmark), launcher, Path(out)
        self.sources: dict[str, Any] = {}
        self.site = Site(self.benchmark)
        if launcher:
            load_launcher(launcher)  # tells of one that is not there
        self._served = Served(launcher, self.out / ".jobs")

    @property
    def policy(self) -> FlowPolicy:
        """The model in this process. Raises RuntimeError where a launcher computes."""
        if self.launcher:
            raise RuntimeError(
                f"the launcher {self.launcher} computes: this process holds no model; leave launcher empty"
            )
        return self.site.policy

    def run(self, job: str, folder: str = "", **spec: Any) -> Path:
        """Do a job, or go on with it, in `out/folder`; that folder. `work` says what there is."""
        spec, into = self.spec_of(job, **spec), self.out / folder
        if not self.launcher:
            run_job(spec, into, self.site)
            return into
        self._served.do(spec, into)
        return into

    def spec_of(self, job: str, **spec: Any) -> dict[str, Any]:
        """A job's specification, with what the adapters that it names come from. Raises ValueError for one
        that is none."""
        spec = {
            k: v
            for k, v in {"job": job, "benchmark": self.benchmark.place, **spec}.items()
            if v is not None
        }
        named = [*spec.get("models", {}).values(), spec.get("adapter")]
        sources = self._sources(named)
        if sources:
            spec["adapters"] = sources | spec.get("adapters", {})
        check_spec(spec)
        return spec

    def _sources(self, names: Iterable[str | None]) -> dict[str, Any]:
        """What these adapters come from, and what those come from that they are merged of."""
        found = {name: self.sources[name] for name in names if name in self.sources}
        parts = [
            p
            for source in found.values()
            if isinstance(source, Mapping)
            for p in source.get("adapters", ())
        ]
        return found | (self._sources(parts) if parts else {})

    def train(
        self, name: str, recipe: Mapping, probe: Mapping | None = None, after: str = ""
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The adapter `name` trained by a recipe in `out/name`: its metrics, a row an iteration, and what
        `probe` ({every, n, split, steps, until}) told on the way. `after`: the adapter that the same recipe
        trained for fewer iterations, from which it goes on."""
        spec = {k: v for k, v in recipe.items() if k != "benchmark"}
        begun = str((self.out / after).resolve()) if after else None
        folder = self.run("train", name, **spec, name=name, probe=probe, after=begun)
        self.sources[name] = str((folder / "adapter").resolve())
        return read_lines(folder / "metrics.jsonl"), read_lines(folder / "probes.jsonl")

    def evaluate(
        self,
        models: Mapping[str, str | None],
        file: str = "samples.parquet",
        noises: Mapping[str, int] = MappingProxyType({}),
        **how,
    ) -> pd.DataFrame:
        """The table of `evaluate` for the first `n` prompts of each task of a `split`, in `out`. A model
        called NAME#K is training K of NAME: in the table `train_seed` K of the model NAME.

        `noises`: by task, how many more samples of each of its prompts, for more certain means; only the
        task's own rewards are asked, and nothing is drawn for a gallery. They have seeds of their own, and lie
        in TASK_file.
        """
        for task in noises:
            check_value("noises", task, one_of(*self.benchmark.own))
        tables = [self.table("evaluate", file, models=dict(models), **how)]
        for task, more in noises.items():
            asked = [reward for reward, home, _ in self.benchmark.home if home == task]
            asked += [reward + GOLD for reward in asked if reward + GOLD in self.benchmark.specs]
            again = {
                "tasks": [task],
                "rewards": asked,
                "repeats": more,
                "seed": how.get("seed", 0) + OTHER,
            }
            beside = {k: v for k, v in how.items() if k not in ("pictures", "embed")} | again
            rows = self.table("evaluate", f"{task}_{file}", models=dict(models), **beside)
            tables.append(rows.assign(repeat=rows["repeat"] + how.get("repeats", 1)))
        table = pd.concat(tables, ignore_index=True)
        named = table["model"].str.extract(r"^(.*?)(?:#(\d+))?$")
        if named[1].isna().all():
            return table
        return table.assign(model=named[0], train_seed=named[1].fillna("0").astype(int))

    def table(self, job: str, file: str, **spec) -> pd.DataFrame:
        """The table that a job leaves in `out`."""
        return pd.read_parquet(self.run(job, file=file, **spec) / file)

    def load(self, names: Sequence[str]) -> FlowPolicy:
        """The model in this process with these adapters."""
        self.site.adapters(names, self.sources)
        return self.policy

    def stop(self) -> None:
        """End a launcher's processes, which else end with this one."""
        self._served.stop()

    def code(self, names: Sequence[str], about: Mapping) -> str:
        """Code that makes `policy`, with the adapters of these names, as it drew samples (`about`: what their
        about.json says): what a gallery's `code_of` begins with."""
        dtype = about.get("dtype", "auto").removeprefix("torch.")
        sources = {name: self.sources[name] for name in names if name in self.sources}
        return "\n".join(
            [
                "from flowopd_lib.jobs.site import Site",
                f"site = Site({self.benchmark.place!r}, {dtype!r})",
                f"site.adapters({list(names)!r}, {sources!r})",
                "policy = site.policy",
            ]
        )

    def live(self, make: Callable[[], Any]) -> Any:
        """Something that draws with the model in this process, such as a widget; a sentence where a launcher
        computes."""
        if self.launcher:
            print("Drawn by a model in the notebook's own process: leave launcher empty to see it.")
            return None
        return make()
