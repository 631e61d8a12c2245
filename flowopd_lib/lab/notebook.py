# ruff: noqa: F401 (some types are only passed on to notebooks)
"""What a notebook computes with: `Lab`, which runs its jobs, and its parameters, written once as
annotations in the cell tagged `parameters`.

    from flowopd_lib.lab.notebook import Folder, Int, Rate, String, open_lab

    benchmark: String = "tiny"
    iterations: Int[1, 5000] = 200  # OPD updates
    lr: Rate = 3e-4
    out_dir: Folder = ""

The next cell calls `lab = open_lab(globals())`, which checks the values. The runner reads the same
annotations from the notebook's file, so that all notebooks of a profile are checked before the
first one starts. papermill shows an annotation that is a name with numbers or names in brackets:
everything else has a name here.
"""

from __future__ import annotations

import ast
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, create_model

from ..benchmarks import DEFAULT, Benchmark, load_benchmark
from ..config import (
    Config,
    Count,
    Fraction,
    Index,
    NonNegative,
    Seed,
    choose,
    load_plugin,
    validate,
)
from ..files import ROOT, RUNS, read_lines, write_table
from ..losses.grpo import find_loss
from ..losses.opd import LOSSES, OPDConfig
from ..merge import Method as MergeMethod
from ..policy import FlowPolicy
from ..sde import WEIGHTINGS
from ..stats import GOLD
from ..train import METRICS
from .jobs import job_of, run_job, validation_scores
from .launch import JobQueue, LaunchedJob, load_launcher
from .recipe import guidance_of
from .workspace import Workspace

STRICT = ConfigDict(
    extra="forbid", strict=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
)


class Int:
    """`Int[1, 100]`: an integer from 1 to 100."""

    def __class_getitem__(cls, limits: tuple[int, int]) -> Any:
        return Annotated[int, Field(ge=limits[0], le=limits[1])]


class List:
    """`List[Rate]`: a list of at least one."""

    def __class_getitem__(cls, kind: Any) -> Any:
        return Annotated[list[kind], Field(min_length=1)]


def _check_loss(name: str) -> str:
    find_loss(LOSSES, load_plugin(name) if ":" in name else name)
    return name


def _check_weighting(name: str, info: ValidationInfo) -> str:
    validate(OPDConfig, {"loss": info.data.get("loss", "pathwise"), "weighting": name})
    return name if ":" in name else choose("weighting", name, WEIGHTINGS)


def _of_benchmark(names: Callable[[Benchmark], Iterable[str]]) -> AfterValidator:
    """Names must be among those of the parameter `benchmark`, the notebook's first."""

    def check(value: Any, info: ValidationInfo) -> Any:
        known = names(load_benchmark(info.data.get("benchmark", DEFAULT)))
        for name in [value] if isinstance(value, str) else value:
            choose("such name", name, known)
        return value

    return AfterValidator(check)


def _check_steps(number: int, info: ValidationInfo) -> int:
    load_benchmark(info.data.get("benchmark", DEFAULT)).sampling.opd.trained_steps(number or None)
    return number


Flag, Folder, Number, String = bool, str, float, str
Rate = Annotated[float, Field(gt=0, le=1)]  # a learning rate
Steps = Int[1, 1000]  # denoising steps
Loss = Annotated[str, AfterValidator(_check_loss)]  # of OPD, as in a recipe
Weighting = Annotated[str, AfterValidator(_check_weighting)]
Names = list[str]
Students = list[Literal["sft", "base", "GRPO-Mix"]]  # trained besides the one of OPD
Adapter = Annotated[str, _of_benchmark(lambda b: ("merged", *b.experts))]
TrainedSteps = Annotated[int, Field(ge=0), AfterValidator(_check_steps)]  # of OPD; 0: all
Counts = dict[str, Count]  # positive integers by name; by task, all or those with prompts
TaskWeights = Annotated[Counts, _of_benchmark(lambda b: b.tasks)]
TaskCounts = Annotated[Counts, _of_benchmark(lambda b: b.prompt_tasks)]

# What an annotation may name, besides list[...] and dict[..., ...] of these.
NAMES = """Adapter Count Counts Flag Folder Fraction Index Int List Loss MergeMethod Names
NonNegative Number Rate Seed Steps String Students TaskCounts TaskWeights TrainedSteps
Weighting""".split()
TYPES = {name: globals()[name] for name in NAMES} | {"list": list, "dict": dict}


class NotForThisBenchmark(ValueError):
    """A notebook needs what its benchmark does not have. A run leaves it out."""


def open_lab(names: Mapping[str, Any], experts: int = 0) -> Lab:
    """For a notebook: `lab = open_lab(globals())`. The lab of the parameters `benchmark` and
    `launcher`, whose results go to `out_dir`, or to a temporary folder where that is empty. Sets
    the style of figures.

    Raises ValueError for a value that its annotation does not allow, and NotForThisBenchmark for a
    benchmark with fewer `experts` than the notebook compares.
    """
    kinds = {n: kind for n, kind in names.get("__annotations__", {}).items() if n in names}
    values = {name: names[name] for name in kinds}
    validate(_model({n: (kind, ...) for n, kind in kinds.items()}), values, "this notebook")
    out = Path(values.get("out_dir") or tempfile.mkdtemp(prefix="flowopd_"))
    out.mkdir(parents=True, exist_ok=True)

    from ..plots.style import use_style  # seaborn, which nothing before needs

    use_style()
    lab = Lab(values.get("benchmark", DEFAULT), values.get("launcher", ""), out)
    if (n := len(lab.benchmark.experts)) < experts:
        raise NotForThisBenchmark(
            f"this notebook needs {experts} of a benchmark's experts, and {lab.benchmark.name} has "
            f"{n or 'none'}: train them (notebook 03) and name them in its file"
        )
    return lab


def read_parameters(notebook: str | Path) -> type[BaseModel]:
    """The parameters of a notebook's file, with their defaults, as a pydantic model. Nothing of the
    notebook is executed.

    Raises ValueError for an annotation that `TYPES` does not have.
    """
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    tagged = (c["source"] for c in cells if "parameters" in c["metadata"].get("tags", ()))
    nodes = ast.parse("".join(next(tagged, ""))).body
    return _model(
        {
            node.target.id: (read_type(node.annotation), ast.literal_eval(node.value))
            for node in nodes
            if isinstance(node, ast.AnnAssign)
        }
    )


def read_type(annotation: ast.expr) -> Any:
    """The type that an annotation names. Raises ValueError for one that is none of `TYPES`."""
    if isinstance(annotation, ast.Subscript):
        inside = annotation.slice
        inside = inside.elts if isinstance(inside, ast.Tuple) else [inside]
        arguments = tuple(
            ast.literal_eval(i) if isinstance(i, (ast.Constant, ast.UnaryOp)) else read_type(i)
            for i in inside
        )
        kind = read_type(annotation.value)
        return kind[arguments if len(arguments) > 1 else arguments[0]]
    return TYPES[choose("type of a parameter", ast.unparse(annotation), TYPES)]


def _model(fields: Mapping[str, tuple[Any, Any]]) -> type[BaseModel]:
    return create_model("Parameters", __config__=STRICT, **fields)


# ---- the lab


@dataclass(frozen=True)
class Training:
    """A finished training: the adapter's name, its folder, metrics (a row an iteration) and
    validation scores (reward, mean, low, high, n, iteration, seconds). `earlier_seconds`: of the
    trainings that it continues."""

    name: str
    folder: Path
    metrics: pd.DataFrame
    validation: pd.DataFrame
    earlier_seconds: float = 0.0

    @property
    def adapter(self) -> str:
        return str((self.folder / "adapter").resolve())

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + float(self.metrics["seconds"].iloc[-1])


class Lab:
    """`benchmark` and `launcher` by their names, `out` the folder for results. With a launcher this
    process loads no model: every job runs in the launcher's processes and leaves its tables in
    `out`.

    `sources`: where the adapters that jobs name come from, besides the benchmark's experts (see
    `recipe.Source`); a training adds its own.
    """

    def __init__(self, benchmark: str = "tiny", launcher: str = "", out: str | Path = "."):
        self.benchmark, self.launcher, self.out = load_benchmark(benchmark), launcher, Path(out)
        self.sources: dict[str, Any] = {}
        self.workspace = Workspace(self.benchmark)
        if launcher:
            load_launcher(launcher)  # raises for one that does not exist
        self._queue = JobQueue(launcher, self.out / ".jobs")

    @property
    def policy(self) -> FlowPolicy:
        """The model in this process. Raises RuntimeError where a launcher computes."""
        if self.launcher:
            raise RuntimeError(
                f"the launcher {self.launcher} computes: this process holds no model; leave "
                "launcher empty"
            )
        return self.workspace.policy

    def run(self, job: str, folder: str = "", **config: Any) -> Path:
        """Run a job, or resume it, in `out/folder`; that folder."""
        spec, into = self.spec_of(job, **config), self.out / folder
        if self.launcher:
            self._queue.run(spec, into)
        else:
            run_job(spec, into, self.workspace)
        return into

    def spec_of(self, job: str, **config: Any) -> dict[str, Any]:
        """A job's specification, with where the adapters that it names come from. Raises ValueError
        for one that is none."""
        given = {k: _plain(v) for k, v in config.items() if v is not None}
        spec = {"job": job, **given, "benchmark": self.benchmark.source}
        if sources := self._sources(adapters_in(spec)):
            spec["adapters"] = sources | spec.get("adapters", {})
        job_of(spec)
        sections = [section for section in spec.values() if isinstance(section, dict)]
        functions = [value for section in sections for value in section.values()]
        if self.launcher and any(map(callable, functions)):
            raise ValueError(
                "a launcher's processes cannot see functions of this notebook: save the function "
                "in a file and write 'file.py:name'"
            )
        return spec

    def _sources(self, names: Iterable[str | None]) -> dict[str, Any]:
        """Where these adapters come from, and those that they are merged from."""
        found = {name: _plain(self.sources[name]) for name in names if name in self.sources}
        merges = [source for source in found.values() if isinstance(source, Mapping)]
        parts = [name for merge in merges for name in merge.get("adapters", ())]
        return found | (self._sources(parts) if parts else {})

    def train(
        self,
        name: str,
        recipe: Mapping[str, Any] = MappingProxyType({}),
        loss: str | Callable | None = None,
        validation: Mapping[str, Any] | None = None,
        continue_from: str = "",
        **sections: Any,
    ) -> Training:
        """Train the adapter `name` by a recipe in `out/name`, or find the finished training there
        or in the cache.

        `recipe`: a mapping as in a recipe's file; `sections` replace parts of it (`opd={...},
        train={...}`). `loss`: one of the objective's losses by its name, a function of the
        notebook, or `file.py:name`. `validation`: see `jobs.ValidationConfig`. `continue_from`: an
        adapter that the same recipe trained for fewer iterations.
        """
        spec = {**recipe, **sections, "name": name, "validation": validation}
        if loss is not None:
            objective = next((k for k in ("grpo", "opd") if k in spec), "opd")
            spec[objective] = {**_plain(spec.get(objective, {})), "loss": loss}
        if continue_from:
            spec["continue_from"] = str((self.out / continue_from).resolve())
        folder = self.run("train", name, **spec)
        self.sources[name] = str((folder / "adapter").resolve())
        scores = validation_scores(folder, self.benchmark)
        return Training(name, folder, read_lines(folder / METRICS), scores)

    def train_runs(
        self,
        model: str,
        runs: int,
        recipe: Mapping[str, Any] = MappingProxyType({}),
        seed: int = 0,
        validation: Mapping[str, Any] | None = None,
        **how: Any,
    ) -> dict[str, Training]:
        """`train` from the seeds `seed`, `seed + 1`, ...: the trainings by `MODEL#0`, `MODEL#1`,
        ..., as `evaluate` takes them. Only the first has validation probes."""
        # an adapter's name has neither spaces nor dots: `Mix_3_1_1`
        adapter, trainings = re.sub(r"[^\w-]+", "_", model).strip("_"), {}
        for k in range(runs):
            own = {**how, "seed": seed + k, "validation": validation if k == 0 else None}
            trainings[f"{model}#{k}"] = self.train(f"{adapter}_{k}", recipe, **own)
        return trainings

    def background(
        self, name: str, recipe: Mapping[str, Any], validation: Mapping[str, Any] | None = None
    ) -> LaunchedJob:
        """The same training next to the notebook, in a process of its own, not yet started: for
        `TrainingMonitor`."""
        spec = self.spec_of("train", **{**recipe, "name": name, "validation": validation})
        return LaunchedJob(spec, self.out / name, self.launcher or "local")

    def evaluate(
        self,
        models: Mapping[str, str | Training | None],
        file: str = "samples.parquet",
        samples_per_prompt: Mapping[str, int] = MappingProxyType({}),
        folder: str = "",
        **how: Any,
    ) -> pd.DataFrame:
        """The table of `evaluate` for the first `n` prompts of each task of a `split`, in `out`.
        `models`: an adapter's name or a training by the model's name. A model called NAME#K is
        training K of NAME: in the table `train_seed` K of the model NAME.

        `samples_per_prompt`: by task, how many samples each of its prompts gets, for more certain
        means; the further ones are scored by the task's own rewards only, and no thumbnails are
        saved of them.
        """
        models = {m: a.name if isinstance(a, Training) else a for m, a in models.items()}
        tables = [self.table("evaluate", f"raw_{file}", folder, models=models, **how)]
        for task, samples in samples_per_prompt.items():
            choose("task with prompts (samples_per_prompt)", task, self.benchmark.prompt_tasks)
            further = samples - how.get("repeats", 1)
            if further <= 0:
                continue
            names = [r for r, domain, _ in self.benchmark.domains if domain == task]
            names += [r + GOLD for r in names if r + GOLD in self.benchmark.reward_configs]
            again = {k: v for k, v in how.items() if k not in ("images", "embed")}
            again |= {"tasks": [task], "rewards": names, "repeats": further}
            again["first_repeat"] = how.get("repeats", 1)
            rows = self.table("evaluate", f"raw_{task}_{file}", folder, models=models, **again)
            tables.append(rows)
        table = pd.concat(tables, ignore_index=True)
        named = table["model"].str.extract(r"^(.*?)(?:#(\d+))?$")
        if named[1].notna().any():
            table = table.assign(model=named[0], train_seed=named[1].fillna("0").astype(int))
        write_table(self.out / folder / file, table)
        return table

    def table(self, job: str, file: str, folder: str = "", **config: Any) -> pd.DataFrame:
        """The table that a job leaves in `out/folder`."""
        return pd.read_parquet(self.run(job, folder, file=file, **config) / file)

    def find_run(self, run_dir: str | Path = "", notebook: str = "05_opd") -> Path | None:
        """The folder of an earlier run; by default papermill_runs/reference, None where that is not
        there or of another benchmark. Raises FileNotFoundError or ValueError for a `run_dir` that
        has no results of `notebook`, or those of another benchmark."""
        run = ROOT / (run_dir or RUNS / "reference")
        status = run / "status.json"
        if not (run / notebook).is_dir():
            if run_dir:
                raise FileNotFoundError(
                    f"{run} has no results of {notebook}; `make demo` writes papermill_runs/demo"
                )
            return None
        entry = json.loads(status.read_text()).get(notebook, {}) if status.is_file() else {}
        path = Path(entry.get("parameters", {}).get("benchmark", DEFAULT))
        benchmark = path.parent.name if path.stem == "benchmark" else path.stem
        if benchmark == self.benchmark.name:
            return run
        if run_dir:
            raise ValueError(f"{run} is a run of the benchmark {benchmark}, not of this one")
        return None

    @property
    def guidance(self) -> dict[str, float]:
        """By adapter: what the benchmark says of its experts, for widgets that sample them."""
        return guidance_of(self.benchmark, self.sources)

    def load(self, names: Sequence[str]) -> FlowPolicy:
        """The model in this process with these adapters."""
        self.workspace.load_adapters(names, self.sources)
        return self.policy

    def stop(self) -> None:
        """End a launcher's processes, which otherwise end with this one."""
        self._queue.stop()

    def code(self, names: Sequence[str], about: Mapping[str, Any]) -> str:
        """Code that makes `policy`, with the adapters of these names, as it drew samples (`about`:
        their about.json): what a gallery's code for a sample begins with."""
        sources = {name: _plain(self.sources[name]) for name in names if name in self.sources}
        return f"""from flowopd_lib.lab.workspace import Workspace
workspace = Workspace({self.benchmark.source!r}, {about.get("dtype", "auto")!r})
workspace.load_adapters({list(names)!r}, {sources!r})
policy = workspace.policy"""

    def live(self, make: Callable[[], Any]) -> Any:
        """Something that samples with the model in this process, such as a widget; a sentence where
        a launcher computes."""
        if self.launcher:
            print(
                "Sampled by a model in the notebook's own process: leave launcher empty to see it."
            )
            return None
        return make()


def adapters_in(spec: Mapping[str, Any]) -> list[str | None]:
    """The adapters that a job names."""
    student, grpo, opd = (spec.get(key) or {} for key in ("student", "grpo", "opd"))
    named = student.get("adapters", ()) if isinstance(student, Mapping) else [student]
    teachers = [*opd.get("teachers", {}).values(), opd.get("anchor"), grpo.get("reference")]
    return [*spec.get("models", {}).values(), spec.get("adapter"), *named, *teachers]


def _plain(value: Any) -> Any:
    """Configs as plain mappings."""
    if isinstance(value, Config):
        return value.model_dump(exclude_unset=True)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value
