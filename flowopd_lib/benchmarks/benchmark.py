"""A benchmark as data: a model, prompts by task, rewards, experts, and how it is sampled; docs/benchmarks.md describes
the YAML file.

Everything else asks the benchmark what there is: tasks, rewards and experts are counted, never assumed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..adapters import ATTENTION, MLP
from ..files import RUNS
from ..inputs import read_yaml
from ..merge import merge
from ..policy import FlowPolicy
from ..prompts import Prompt, read_prompts
from ..rewards import Reward
from ..rollout import Sampler
from .read import placed, read_benchmark
from .reward_specs import build_reward, reward_class

DEFAULT, SHIPPED = "tiny", Path(__file__).parent


@dataclass(frozen=True)
class Task:
    """A capability: the prompts that ask for it, by split, the reward that measures it, the expert that its
    prompts are routed to (None: it has none), and what it is trained on by GRPO, reward by reward. `like`: the
    task whose prompts it shares; `held_out`: so many of the training file's last prompts are its split val.
    """

    name: str
    reward: str
    kind: str
    files: Mapping[str, Path]
    expert: str | None
    reward_weights: Mapping[str, float]
    like: str | None = None
    held_out: int = 0

    @property
    def home(self) -> str:
        """The task under whose name its prompts stand in a table of scores."""
        return self.like or self.name


@dataclass(frozen=True)
class Expert:
    """An adapter trained for a task: its folder or hub id, the guidance it is asked with, and the recipe that
    trained it, where there is one."""

    adapter: str
    guidance: float = 1.0
    recipe: Path | None = None


@dataclass(frozen=True)
class Benchmark:
    """See `load_benchmark`. `base`: a Stable Diffusion 3 folder or hub id; `resolution`: of its pictures, pixels
    at a side, and `text_length`, tokens of T5 (None: the model's own). `beside`: what GRPO-Mix adds to
    every task's own reward, and `turns`, how often each task's prompts come."""

    name: str
    place: str  # what `load_benchmark` takes: its name, or its file
    base: str
    tasks: Mapping[str, Task]
    experts: Mapping[str, Expert]
    specs: Mapping[str, dict]  # of rewards, as the file has them
    folder: Path
    resolution: int | None = None
    text_length: int | None = None
    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] = ATTENTION + MLP
    anchor: str | None = None
    auxiliary_rewards: Mapping[str, float] = field(default_factory=dict)
    task_schedule: Mapping[str, int] = field(default_factory=dict)
    task_weights: Mapping[str, int] = field(default_factory=dict)
    evaluation: Sampler = Sampler()
    exploration: Sampler = Sampler(10, "sde")
    distillation: Sampler = Sampler(10, "sde")
    truth_module: str = ""
    rates: Mapping[str, float] = field(default_factory=dict)  # measured: see `runs.cost`
    # claims of the claims table that were made true here, or follow from such, and why: no result
    calibrated: Mapping[str, str] = field(default_factory=dict)
    about: str = ""  # a sentence or two for a reader

    @property
    def base_name(self) -> str:
        """The base as a reader is told it: a hub id, or its folder's name and the benchmark's."""
        path = Path(self.base)
        return (
            f"{path.name} (the benchmark {self.name} of Flow-OPD lab)"
            if path.is_dir()
            else self.base
        )

    @property
    def own(self) -> tuple[str, ...]:
        """The tasks that have prompts of their own."""
        return tuple(name for name, task in self.tasks.items() if task.like is None)

    @cached_property
    def scales(self) -> dict[str, float]:
        """What each reward's score is divided by where scores are added up."""
        return {name: float(self._told(name, "scale", 1.0)) for name in self.specs}

    @property
    def home(self) -> tuple[tuple[str, str, float], ...]:
        """What the Average adds up: (reward, task of the prompts, full scale), one a task."""
        return tuple((t.reward, t.home, self.scales[t.reward]) for t in self.tasks.values())

    @property
    def teachers(self) -> dict[str, str]:
        """The expert that each task's prompts are routed to."""
        return {name: task.expert for name, task in self.tasks.items() if task.expert}

    @property
    def experts_of(self) -> dict[str, str]:
        """The expert that was trained for each reward."""
        return {task.reward: task.expert for task in self.tasks.values() if task.expert}

    @property
    def guidance(self) -> dict[str, float]:
        """By expert, where it is asked with guidance."""
        return {name: e.guidance for name, e in self.experts.items() if e.guidance != 1.0}

    @cached_property
    def truth(self) -> ModuleType | None:
        """What can draw right pictures of prompts and reward the rewards by them; None where nothing can."""
        return importlib.import_module(self.truth_module) if self.truth_module else None

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    def policy(
        self, dtype: str | torch.dtype = "auto", device: str | torch.device = ""
    ) -> FlowPolicy:
        """The base, without adapters, on `device` or on what there is."""
        return FlowPolicy(
            self.base, device or self.device, dtype, self.resolution, self.text_length
        )

    def sampler(self, steps: int) -> Sampler:
        """That of evaluations, in so many steps."""
        return replace(self.evaluation, steps=steps)

    def prompts(self, task: str, split: str) -> list[Prompt]:
        """One split of one task. Raises FileNotFoundError, with the splits there are."""
        if task not in self.tasks:
            raise ValueError(
                f"the benchmark {self.name} has no task {task!r}; it has {', '.join(self.tasks)}"
            )
        of = self.tasks[task]
        source, kept = split, slice(None)
        if of.held_out and split in ("train", "val"):
            source = "train"
            kept = slice(-of.held_out, None) if split == "val" else slice(None, -of.held_out)
        if source not in of.files:
            raise FileNotFoundError(
                f"the {task} prompts of the benchmark {self.name} have no split {split}; they have "
                f"{', '.join(self.splits(task))}"
            )
        found = read_prompts(placed(of.files[source], self.folder), task, of.kind)[kept]
        if not found:
            raise ValueError(
                f"the {task} prompts hold back {of.held_out} for val, and there are no more"
            )
        return found

    def splits(self, task: str) -> list[str]:
        """Those whose file is there."""
        of = self.tasks[task]
        there = [split for split, path in of.files.items() if placed(path, self.folder).is_file()]
        return there + (["val"] if of.held_out and "train" in there else [])

    def first_prompts(self, split: str, n: int) -> list[Prompt]:
        """The first `n` prompts (or as many as there are) of every task of its own, one list."""
        return [p for task in self.own for p in self.prompts(task, split)[:n]]

    def rewards(self, device: str = "") -> dict[str, Reward]:
        """Those whose scores are reported, and which GRPO may train on. Each reward is loaded once."""
        return self.rewards_named(
            [n for n in self.specs if not self.reward_is(n, "held_out", "training")], device
        )

    def all_training_rewards(self, device: str = "") -> dict[str, Reward]:
        """The same and those that are for training only."""
        return self.rewards_named(
            [n for n in self.specs if not self.reward_is(n, "held_out")], device
        )

    def held_out_rewards(self, device: str = "") -> dict[str, Reward]:
        """Those that nothing may be trained on, gold rewards (`stats.GOLD`) among them."""
        return self.rewards_named([n for n in self.specs if self.reward_is(n, "held_out")], device)

    def rewards_named(self, names: Iterable[str], device: str = "") -> dict[str, Reward]:
        """Those of these names. Raises ValueError for one there is not."""
        for name in names:
            if name not in self.specs:
                raise ValueError(
                    f"the benchmark {self.name} has no reward {name!r}; it has {', '.join(self.specs)}"
                )
        return {name: self._reward(name, device or self.device) for name in names}

    def reward_is(self, name: str, *what: str) -> bool:
        """Whether a reward is one of these kinds, as its file or its class says."""
        return any(self._told(name, w, False) for w in what)

    def passes_gradient(self, name: str) -> bool:
        """Whether a reward says how its score follows a picture (`with_gradient`)."""
        return bool(self._told(name, "with_gradient", None))

    def _told(self, name: str, what: str, default: Any) -> Any:
        """Of a reward that need not be loaded for it: as its file says, or its class."""
        kind = reward_class(f"rewards.{name}", self.specs[name]["class"], self.folder)
        return self.specs[name].get(what, getattr(kind, what, default))

    def embedder(self, device: str = "") -> Callable | None:
        """What embeds pictures, for diversity and distances: that of the first reward that can."""
        return next((j.embed for j in self.rewards(device).values() if hasattr(j, "embed")), None)

    def _reward(self, name: str, device: str) -> Reward:
        loaded = self.__dict__.setdefault("_loaded", {})
        if (name, device) not in loaded:
            loaded[name, device] = build_reward(name, self.specs[name], self.folder, device)
        return loaded[name, device]

    def reward_weights(self, auxiliary: bool = False) -> dict[str, dict[str, float]]:
        """By task with prompts of its own, what GRPO trains it on; with `auxiliary`, GRPO-Mix's sum (4.3)."""
        share = sum(self.auxiliary_rewards.values()) if auxiliary else 0.0
        added = dict(self.auxiliary_rewards) if auxiliary else {}
        return {
            name: {
                **{j: (1 - share) * w for j, w in self.tasks[name].reward_weights.items()},
                **added,
            }
            for name in self.own
        }

    def adapter(self, expert: str) -> str:
        """Where an expert's adapter lies: a folder, or a hub id."""
        if expert not in self.experts:
            raise ValueError(
                f"the benchmark {self.name} has no expert {expert!r}; it has {', '.join(self.experts)}"
            )
        return str(placed(self.experts[expert].adapter, self.folder, name=True))

    def recipe(self, expert: str) -> dict | None:
        """The recipe that began an expert's training, where the benchmark names one."""
        path = self.experts[expert].recipe
        return {"benchmark": self.place, **read_yaml(path)} if path else None

    def load_experts(self, policy: FlowPolicy) -> tuple[str, ...]:
        """Load those that the policy does not have yet, under their names; the names of all."""
        for name in self.experts:
            if name not in policy.adapters:
                policy.load_adapter(name, self.adapter(name))
        return tuple(self.experts)

    def average(self, method: str = "svd") -> dict:
        """The experts' average as what an adapter comes from (`merge` says what `method` can be)."""
        return {"merge": method, "adapters": list(self.experts), "rank": self.rank}

    def merged_policy(
        self, method: str = "svd", dtype: str | torch.dtype = "auto", device: str = ""
    ) -> FlowPolicy:
        """A policy with the experts and `merged`, their average (`method`: see `merge`): where students
        start."""
        policy = self.policy(dtype, device)
        merge(policy, self.load_experts(policy), "merged", method, rank=self.rank)
        return policy


def load_benchmark(name: str | Path = DEFAULT) -> Benchmark:
    """A shipped benchmark by its name, or one of your own by its YAML file (docs/benchmarks.md).

    Raises ValueError or FileNotFoundError that names file, key and value.
    """
    fields = read_benchmark(_file(name))
    folder, experts = fields["folder"], {}
    for key, expert in fields.pop("experts").items():
        recipe = expert.get("recipe")
        experts[key] = Expert(
            expert["adapter"],
            float(expert.get("guidance", 1.0)),
            recipe and _recipe(recipe, folder),
        )
    tasks = {}
    for key, task in fields.pop("tasks").items():
        of = fields["patterns"].get(task.get("like", key))
        tasks[key] = Task(
            key,
            task["reward"],
            of["kind"],
            {split: of["prompts"].replace("{split}", split) for split in of["splits"]},
            task.get("expert", key if key in experts else None),
            task.get("reward_weights", {task["reward"]: 1.0}),
            task.get("like"),
            of["held_out"],
        )
    del fields["patterns"]
    place = str(name) if not str(name).endswith((".yaml", ".yml")) else str(Path(name).resolve())
    return Benchmark(place=place, tasks=tasks, experts=experts, **fields)


def _file(name: str | Path) -> Path:
    text = str(name)
    if text.endswith((".yaml", ".yml")):
        return Path(text)
    shipped = {p.stem: p for p in SHIPPED.glob("*.yaml")}
    shipped |= {p.parent.name: p for p in SHIPPED.glob("*/benchmark.yaml")}
    if text not in shipped:
        raise ValueError(
            f"there is no benchmark {text!r}; there are {', '.join(sorted(shipped))}, or give a YAML file of "
            "your own (docs/benchmarks.md)"
        )
    return shipped[text]


def _recipe(name: str, folder: Path) -> Path:
    own = placed(name, folder)
    return own if own.is_file() else RUNS / "recipes" / name
