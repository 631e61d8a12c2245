"""A benchmark as data: a model, prompts by task, rewards, experts, and how it is sampled.

docs/benchmarks.md describes the YAML file. Everything else asks the benchmark what there is: tasks,
rewards and experts are counted, never assumed.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, get_type_hints

import torch
from pydantic import ConfigDict, Field, create_model, model_validator

from .. import rewards as shipped_rewards
from ..config import (
    CONFIG,
    Config,
    Count,
    Index,
    NonNegative,
    Positive,
    choose,
    load_plugin,
    read_yaml,
    validate,
)
from ..data import Kind, Prompt, read_prompts
from ..files import RUNS
from ..loading import choose_device
from ..lora import ATTENTION, MLP
from ..merge import MergeConfig
from ..policy import FlowPolicy
from ..rewards import Reward, as_reward
from ..rollout import Sampler
from ..stats import GOLD, Domain

DEFAULT, SHIPPED = "tiny", Path(__file__).parent
Split = Literal["train", "val", "test", "ood"]
# of a reward, which the file says or its class
ATTRIBUTES = {"scale", "tasks", "held_out", "training_only"}


class TaskConfig(Config):
    """A capability: the prompts that ask for it, the reward that measures it, the expert that its
    prompts are routed to (by default the one of the task's name), and what GRPO trains it on, by
    reward. `prompts_of`: the task whose prompts it shares; `val_from_train`: how many of the last
    training prompts are the split val."""

    reward: str
    prompts: str = ""
    kind: Kind = "plain"
    splits: list[Split] = ["train", "val", "test", "ood"]
    val_from_train: Index = 0
    expert: str | None = None
    reward_weights: dict[str, float] = {}
    prompts_of: str | None = None

    @model_validator(mode="after")
    def _one_source(self):
        if bool(self.prompts) == bool(self.prompts_of):
            raise ValueError("give either prompts, its files, or prompts_of, a task that has them")
        return self


class RewardConfig(Config):
    """A reward's class, the class's arguments, and what the benchmark says of it: the `tasks` whose
    prompts it scores (None: all it can), the `scale` its scores are divided by where rewards are
    added up, `held_out` (for evaluation only), `training_only` (never reported), and its gold
    reward."""

    model_config = ConfigDict(extra="allow")

    cls: str = Field(alias="class")
    scale: Positive | None = None
    tasks: list[str] | None = None
    held_out: bool | None = None
    training_only: bool | None = None
    gold: RewardConfig | None = None


class ExpertConfig(Config):
    """An adapter trained for a task: its folder or hub id, its guidance (None: that of
    evaluations), and the recipe that trained it."""

    adapter: str
    guidance: NonNegative | None = None
    recipe: str | None = None


class AdapterDefaults(Config):
    rank: Count = 32
    alpha: Positive = 64.0
    targets: tuple[str, ...] = ATTENTION + MLP


class MixConfig(Config):
    """GRPO-Mix: how often each task's prompts come, and the rewards added to every task's own."""

    task_schedule: dict[str, Count] = {}
    auxiliary_rewards: dict[str, float] = {}


class Sampling(Config):
    evaluation: Sampler = Sampler()
    grpo: Sampler = Sampler(10, "sde")
    opd: Sampler = Sampler(10, "sde")


class BenchmarkConfig(Config):
    """The file. Relative paths are as seen from `folder`, which is as seen from the file."""

    model: str
    tasks: Annotated[dict[str, TaskConfig], Field(min_length=1)]
    rewards: dict[str, RewardConfig]
    about: str = ""
    folder: str = "."
    prompts: str = "."
    resolution: Count | None = None
    text_length: Count | None = None
    experts: dict[str, ExpertConfig] = {}
    anchor: str | None = None
    ability: str | None = None  # an adapter that undoes a misalignment of the base
    adapters: AdapterDefaults = AdapterDefaults()
    grpo_mix: MixConfig = MixConfig()
    task_weights: dict[str, Count] = {}
    sampling: Sampling = Sampling()
    renderer: str = ""
    true_by_construction: dict[str, str] = {}

    @model_validator(mode="after")
    def _names(self):
        def check(what: str, names: Iterable[str | None], known: Iterable[str]) -> None:
            for name in filter(None, names):
                choose(what, name, known)

        tasks, mix = [name for name, task in self.tasks.items() if task.prompts], self.grpo_mix
        for name, task in self.tasks.items():
            at = f"tasks.{name}"
            check(f"reward ({at})", [task.reward, *task.reward_weights], self.rewards)
            check(f"expert ({at}.expert)", [task.expert], self.experts)
            check(f"task with prompts ({at}.prompts_of)", [task.prompts_of], tasks)
        for name, reward in self.rewards.items():
            check(f"task (rewards.{name}.tasks)", reward.tasks or (), self.tasks)
            if reward.gold and name + GOLD in self.rewards:
                raise ValueError(f"rewards.{name}.gold: there is already a reward {name + GOLD!r}")
        check("expert (anchor)", [self.anchor], self.experts)
        check("reward (grpo_mix.auxiliary_rewards)", mix.auxiliary_rewards, self.rewards)
        check("task with prompts (grpo_mix.task_schedule)", mix.task_schedule, tasks)
        check("task (task_weights)", self.task_weights, self.tasks)
        return self


class Benchmark:
    """See `load_benchmark`. `source`: what `load_benchmark` takes, its name or its file."""

    def __init__(self, config: BenchmarkConfig, name: str, source: str, folder: Path):
        self.config, self.name, self.source = config, name, source
        self.folder = folder / expand(config.folder)
        self.tasks, self.experts, self.about = config.tasks, config.experts, config.about
        self.anchor, self.task_weights = config.anchor, config.task_weights
        self.true_by_construction = config.true_by_construction
        of = config.adapters
        self.rank, self.alpha, self.targets = of.rank, of.alpha, of.targets
        self.sampling, self.base = config.sampling, self._path(config.model)
        # the adapter with which the base does all that it can, if the benchmark has one: the
        # ceiling of what reinforcement learning can bring out
        self.ability = self._path(config.ability) if config.ability else None
        self.reward_configs = dict(config.rewards)
        for name, reward in config.rewards.items():
            if gold := reward.gold:
                shared = {"tasks": gold.tasks or reward.tasks, "scale": gold.scale or reward.scale}
                shared["held_out"] = True
                self.reward_configs[name + GOLD] = gold.model_copy(update=shared)

    # --- names

    @property
    def base_name(self) -> str:
        """The base as a reader is shown it: a hub id, or its folder's name and the benchmark's."""
        path = Path(self.base)
        return f"{path.name} (the benchmark {self.name})" if path.is_dir() else self.base

    @property
    def prompt_tasks(self) -> tuple[str, ...]:
        """The tasks that have prompts of their own."""
        return tuple(name for name, task in self.tasks.items() if not task.prompts_of)

    @property
    def domains(self) -> tuple[Domain, ...]:
        """What the Average adds up, one a task: (reward, task of the prompts, full scale)."""
        return tuple(
            (task.reward, task.prompts_of or name, self.scales[task.reward])
            for name, task in self.tasks.items()
        )

    @cached_property
    def scales(self) -> dict[str, float]:
        """What each reward's score is divided by where scores are added up."""
        return {name: float(self._attribute(name, "scale", 1.0)) for name in self.reward_configs}

    @property
    def teachers(self) -> dict[str, str]:
        """The expert that each task's prompts are routed to."""
        found = {name: task.expert or name for name, task in self.tasks.items()}
        return {task: expert for task, expert in found.items() if expert in self.experts}

    @property
    def distilled_tasks(self) -> tuple[str, ...]:
        """The tasks with prompts of their own and an expert to route them to."""
        return tuple(task for task in self.prompt_tasks if task in self.teachers)

    @property
    def experts_of(self) -> dict[str, str]:
        """The expert that was trained for each reward."""
        return {self.tasks[task].reward: expert for task, expert in self.teachers.items()}

    @property
    def guidance(self) -> dict[str, float]:
        """By expert: what it says wherever it is sampled, as a teacher too."""
        default = self.sampling.evaluation.guidance
        return {n: default if e.guidance is None else e.guidance for n, e in self.experts.items()}

    @property
    def task_schedule(self) -> dict[str, int]:
        return self.config.grpo_mix.task_schedule or dict.fromkeys(self.prompt_tasks, 1)

    # --- the model

    @property
    def device(self) -> str:
        return str(choose_device())

    def policy(self, dtype: str | torch.dtype = "auto", device="") -> FlowPolicy:
        """The base, without adapters, on `device` or on what there is."""
        size = self.config.resolution, self.config.text_length
        return FlowPolicy(self.base, device or self.device, dtype, *size)

    def sampler(self, steps: int) -> Sampler:
        """That of evaluations, in so many steps."""
        return replace(self.sampling.evaluation, steps=steps)

    def adapter(self, expert: str) -> str:
        """Where an expert's adapter is: a folder, or a hub id."""
        return self._path(self.experts[choose("expert", expert, self.experts)].adapter)

    def recipe(self, expert: str) -> dict | None:
        """The recipe that trained an expert, where the benchmark names one: a file next to the
        benchmark's, or one of papermill_runs/recipes."""
        name = self.experts[expert].recipe
        if not name:
            return None
        path = self.folder / expand(name)
        recipe = read_yaml(path if path.is_file() else RUNS / "recipes" / name)
        return {"benchmark": self.source, **recipe}

    def average(self, method: str = "svd") -> MergeConfig:
        """The experts' average, where students start."""
        return MergeConfig(merge=method, adapters=list(self.experts), rank=self.rank)

    # --- prompts

    def prompts(self, task: str, split: str) -> list[Prompt]:
        """One split of one task. Raises FileNotFoundError, with the splits there are."""
        of = self._prompt_config(task)
        n = of.val_from_train if split in ("train", "val") else 0
        source = "train" if n else split
        if source not in of.splits:
            raise FileNotFoundError(
                f"the {task} prompts of the benchmark {self.name} have no split {split}; they have "
                f"{', '.join(self.splits(task))}"
            )
        found = read_prompts(self.prompt_file(task, source), task, of.kind)
        if n:
            found = found[-n:] if split == "val" else found[:-n]
        if not found:
            raise ValueError(f"the {task} prompts give {n} to val, and there are no more")
        return found

    def prompt_file(self, task: str, split: str) -> Path:
        name = expand(self._prompt_config(task).prompts.replace("{split}", split))
        return self.folder / expand(self.config.prompts) / name

    def splits(self, task: str) -> list[str]:
        """Those whose file exists."""
        of = self._prompt_config(task)
        there = [split for split in of.splits if self.prompt_file(task, split).is_file()]
        return there + (["val"] if of.val_from_train and "train" in there else [])

    def first_prompts(self, split: str, n: int) -> list[Prompt]:
        """The first `n` prompts (or as many as there are) of every task with prompts of its own,
        one list."""
        return [p for task in self.prompt_tasks for p in self.prompts(task, split)[:n]]

    def _prompt_config(self, task: str) -> TaskConfig:
        of = self.tasks[choose(f"task ({self.name})", task, self.tasks)]
        return self.tasks[of.prompts_of] if of.prompts_of else of

    # --- rewards

    def rewards(self, device: str = "") -> dict[str, Reward]:
        """Those that are reported, and that GRPO may train on. Each reward is loaded once."""
        return self.rewards_named(self._without("held_out", "training_only"), device)

    def training_rewards(self, device: str = "") -> dict[str, Reward]:
        """The same and those that are for training only."""
        return self.rewards_named(self._without("held_out"), device)

    def held_out_rewards(self, device: str = "") -> dict[str, Reward]:
        """Those that nothing may be trained on, gold rewards among them."""
        return self.rewards_named(set(self.reward_configs) - set(self._without("held_out")), device)

    def all_rewards(self, device: str = "") -> dict[str, Reward]:
        """What evaluations report: the rewards and the held-out ones."""
        return self.rewards(device) | self.held_out_rewards(device)

    def _without(self, *flags: str) -> list[str]:
        return [name for name in self.reward_configs if not self.reward_is(name, *flags)]

    def rewards_named(self, names: Iterable[str], device: str = "") -> dict[str, Reward]:
        wanted = {choose(f"reward ({self.name})", name, self.reward_configs) for name in names}
        order = [name for name in self.reward_configs if name in wanted]
        return {name: self._reward(name, device or self.device) for name in order}

    def reward_is(self, name: str, *flags: str) -> bool:
        """Whether a reward is `held_out` or `training_only`, as the file or its class says."""
        return any(self._attribute(name, flag, False) for flag in flags)

    def passes_gradient(self, name: str) -> bool:
        """Whether a reward's score can be differentiated by the image (`with_gradient`)."""
        return bool(self._attribute(name, "with_gradient", None))

    def _attribute(self, name: str, what: str, default: Any) -> Any:
        """Of a reward that need not be loaded for it."""
        config = self.reward_configs[name]
        said = getattr(config, what, None)
        kind = self._class(f"rewards.{name}", config.cls)
        return getattr(kind, what, default) if said is None else said

    def embedder(self, device: str = "") -> Callable | None:
        """What embeds images, for diversity and distances: the first reward that can."""
        return next((r.embed for r in self.rewards(device).values() if hasattr(r, "embed")), None)

    def _reward(self, name: str, device: str) -> Reward:
        loaded = self.__dict__.setdefault("_loaded", {})
        if (name, device) not in loaded:
            config = self.reward_configs[name]
            arguments = {"class": config.cls, **(config.model_extra or {})}
            reward = as_reward(self._build(f"rewards.{name}", arguments, device))
            for key, value in config.model_dump(include=ATTRIBUTES, exclude_none=True).items():
                setattr(reward, key, value)
            loaded[name, device] = reward
        return loaded[name, device]

    def _build(self, where: str, spec: Mapping[str, Any], device: str) -> Any:
        """An object of a class with its arguments, which may be such objects themselves."""
        kind = self._class(where, spec["class"])
        if inspect.isfunction(kind):
            return kind
        known = inspect.signature(kind).parameters
        hints = get_type_hints(kind.__init__, include_extras=True)
        arguments = {"device": device} if "device" in known else {}
        for key, value in spec.items():
            if key == "class":
                continue
            if isinstance(value, Mapping) and "class" in value:
                value = self._build(f"{where}.{key}", value, device)
            elif isinstance(value, str) and value:
                value = self._path(value)
            arguments[key] = value
        fields = {
            key: (hints.get(key, Any), ... if one.default is one.empty else one.default)
            for key, one in known.items()
        }
        settings = create_model(kind.__name__, __config__=CONFIG, **fields)
        return kind(**dict(validate(settings, arguments, where)))

    def _class(self, where: str, name: str) -> Any:
        """`Name` is one of ours, `package.module:Name` and `file.py:Name` anybody's."""
        if ":" in name:
            try:
                return load_plugin(name, self.folder)
            except ValueError as error:
                raise ValueError(f"{where}.class: {error}") from error
        choose(f"class ({where}.class)", name, shipped_rewards.__all__)
        return getattr(shipped_rewards, name)

    def reward_weights(self, auxiliary: bool = False, tasks: Iterable[str] = ()) -> dict[str, dict]:
        """By task (those with prompts of their own, unless some are named), what GRPO trains it on;
        with `auxiliary`, GRPO-Mix's sum (4.3)."""
        added = self.config.grpo_mix.auxiliary_rewards if auxiliary else {}
        rest, weights = 1 - sum(added.values()), {}
        for name in tasks or self.prompt_tasks:
            task = self.tasks[name]
            own = task.reward_weights or {task.reward: 1.0}
            weights[name] = {**{r: rest * w for r, w in own.items()}, **added}
        return weights

    @cached_property
    def renderer(self) -> ModuleType | None:
        """What can draw correct images of prompts and check the rewards by them; None where nothing
        can."""
        return importlib.import_module(self.config.renderer) if self.config.renderer else None

    def _path(self, text: str) -> str:
        """A path as seen from the folder, or a hub id or name, which is what names no file
        there."""
        text = expand(text)
        path = self.folder / text
        return str(path) if os.path.exists(path) else text  # False for a text too long for a path


def expand(text: str) -> str:
    """With environment variables, written `${NAME}`. Raises ValueError for one that is not set."""
    for variable in re.findall(r"\$\{(\w+)\}", text):
        if variable not in os.environ:
            raise ValueError(
                f"{text} needs the environment variable {variable}; set it (docs/benchmarks.md)"
            )
    return os.path.expandvars(text)


def load_benchmark(name: str | Path = DEFAULT) -> Benchmark:
    """A shipped benchmark by its name, or one of your own by its YAML file (docs/benchmarks.md).

    Raises ValueError with file, key and value or with the environment variable that is not set,
    FileNotFoundError where there is no file.
    """
    path, source = Path(name), str(name)
    if path.suffix in (".yaml", ".yml"):
        source = str(path.resolve())
    else:
        shipped = {p.stem: p for p in SHIPPED.glob("*.yaml")}
        shipped |= {p.parent.name: p for p in SHIPPED.glob("*/benchmark.yaml")}
        path = shipped[choose("benchmark", source, sorted(shipped))]
    config = validate(BenchmarkConfig, read_yaml(path), str(path))
    short = path.parent.name if path.stem == "benchmark" else path.stem
    return Benchmark(config, short, source, path.parent)
