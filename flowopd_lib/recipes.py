"""A training as data: what a YAML file, a notebook or `accelerate launch -m flowopd_lib.recipes RECIPE.yaml` describes, built.

    model: ""                       # a Stable Diffusion 3 folder or hub id; "" is the small world's base, with its prompts and judges
    prompts: ""                     # a Flow-GRPO dataset folder
    judges: {}                      # of another world: {PickScore: {model_id: ...}, OCR: {}, DeQA: {model_id: ...}}
    adapters: {ocr: experts/ocr}    # loaded beside the student: teachers, anchors, references; a folder, or one of the package's assets
    student: {rank: 32, alpha: 64}  # a new adapter; or {load: FOLDER}; or {merge: cat, adapters: [ocr, ...]}
    schedule: {tasks: [ocr], prompts_per_batch: 12, images_per_prompt: 12}      # tags: {color_attr: 3}: GenEval's tags drawn so often; else once
    sampler: {steps: 10, kind: sde, noise_level: 0.7}
    grpo: {rewards: {OCR: 1.0}}     # or   opd: {teachers: {ocr: ocr}}
    train: {iterations: 100, lr: 3.0e-4}
"""
from __future__ import annotations

import argparse
import inspect
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator

from . import tinyworld
from .launch import STOPPED, Look, some_prompts
from .merge import merge
from .objectives import GRPO, OPD, Objective
from .policy import FlowPolicy
from .prompts import TASKS, Prompt, load_prompts
from .rewards import OCR, DeQA, PickScore, Reward
from .rollout import Sampler
from .runs import nearest
from .schedule import Schedule
from .train import TrainConfig, train

KEYS = ("model", "prompts", "judges", "adapters", "student", "schedule", "sampler", "grpo", "opd", "train", "seed")
JUDGES = {"PickScore": PickScore, "OCR": OCR, "DeQA": DeQA}


def check_keys(where: str, given: Mapping, known) -> None:
    """Raises ValueError that names the nearest known key."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be a mapping of names to values, not {given!r}")
    for key in given:
        if key not in known:
            raise ValueError(f"{where} has no {key!r}{nearest(str(key), known)}; it has {', '.join(known)}")


def _options(where: str, given: Mapping, kind, left_out=()) -> dict:
    """`given`, checked against the arguments of `kind`; lists become tuples."""
    check_keys(where, given, [n for n in inspect.signature(kind).parameters if n not in left_out])
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def build(recipe: Mapping, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
          ) -> tuple[FlowPolicy, Objective, TrainConfig]:
    """Everything `train` takes; the policy has the recipe's adapters and one called `student`.

    Raises ValueError or FileNotFoundError, naming key and value, before anything long begins.
    """
    check_keys("the recipe", recipe, KEYS)
    if ("grpo" in recipe) == ("opd" in recipe) or "train" not in recipe or "schedule" not in recipe:
        raise ValueError("a recipe has a schedule, a train section, and one objective: grpo or opd")
    seed = recipe.get("seed", 0)
    config = TrainConfig(**_options("train", recipe["train"], TrainConfig))
    sampler = Sampler(**_options("sampler", {"steps": 10, "kind": "sde", **recipe.get("sampler", {})}, Sampler))
    schedule = dict(recipe["schedule"])
    tasks, tags = schedule.pop("tasks", list(TASKS)), schedule.pop("tags", {})
    options = _options("schedule", schedule, Schedule, ("prompts", "seed"))
    folder = recipe.get("prompts") or tinyworld.PROMPTS
    prompts = Schedule({task: _weighed(load_prompts(folder, task, "train"), tags) for task in tasks}, seed=seed, **options)
    policy = FlowPolicy(recipe.get("model") or tinyworld.BASE, device, dtype)
    for name, path in recipe.get("adapters", {}).items():
        shipped = tinyworld.ASSETS / path
        policy.load_adapter(name, shipped if shipped.is_dir() and not Path(path).is_dir() else path)
    _student(policy, recipe.get("student", {}), seed)
    if "opd" in recipe:
        return policy, OPD(prompts, sampler=sampler, **_options("opd", recipe["opd"], OPD, ("schedule", "sampler"))), config
    return policy, GRPO(prompts, judges_of(recipe), sampler=sampler, **_options("grpo", recipe["grpo"], GRPO, ("schedule", "judges", "sampler"))), config


def judges_of(recipe: Mapping) -> dict[str, Reward]:
    """The judges that a recipe names; without any, the small world's."""
    judges = recipe.get("judges", {})
    check_keys("judges", judges, JUDGES)
    return {name: JUDGES[name](**settings) for name, settings in judges.items()} if judges else tinyworld.training_judges()


def _weighed(prompts: list[Prompt], tags: Mapping[str, int]) -> list[Prompt]:
    """Every prompt as often as its tag says (once by default), as in Flow-GRPO's training set for GenEval."""
    if any(p.tag != p.task for p in prompts):
        check_keys("tags", tags, sorted({p.tag for p in prompts}))
    if not all(isinstance(n, int) and n >= 0 for n in tags.values()):
        raise ValueError(f"tags say how often their prompts are drawn, in whole numbers, not {dict(tags)}")
    return [p for p in prompts for _ in range(tags.get(p.tag, 1))]


def _student(policy: FlowPolicy, settings: Mapping, seed: int) -> None:
    if "load" in settings:
        check_keys("student", settings, ("load",))
        policy.load_adapter("student", settings["load"])
    elif "merge" in settings:
        check_keys("student", settings, ("merge", "adapters", "weights", "rank", "density"))
        merge(policy, settings["adapters"], "student", settings["merge"],
              **{k: v for k, v in settings.items() if k not in ("merge", "adapters")})
    else:
        policy.add_adapter("student", seed=seed, **_options("student", settings, policy.add_adapter, ("name", "seed")))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flowopd_lib.recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="a YAML file")
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints, metrics and the adapter; resumed if it holds some")
    parser.add_argument("--look", type=int, default=0, help="after every so many iterations, draw and judge about six of its prompts into the folder; 0: never")
    args = parser.parse_args()
    asked = threading.Event()       # to stop: by a scheduler that wants its machine back, or by `launch`
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if accelerator.mixed_precision not in ("no", "bf16"):
        sys.exit(f"error: mixed precision {accelerator.mixed_precision} is not supported; use no or bf16")
    if accelerator.device.type == "cpu" and accelerator.num_processes == 1:
        torch.set_num_threads(os.cpu_count())
    try:
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        recipe = yaml.safe_load(args.recipe.read_text())
        policy, objective, config = build(recipe, accelerator.device, dtype)
        updates = train(policy, objective, args.folder, config, accelerator=accelerator)
        if args.look and accelerator.is_main_process:
            judges = getattr(objective, "judges", None) or ({} if recipe.get("model") and not recipe.get("judges") else judges_of(recipe))
            updates = Look(some_prompts(objective.schedule), judges, args.look).during(updates, policy, "student", args.folder)
        for info in updates:
            if not info.metrics:
                continue
            if accelerator.is_main_process:
                shown = " ".join(f"{name} {value:.4g}" for name, value in info.metrics.items())
                print(f"{info.iteration + 1}/{config.iterations} {info.seconds:.0f} s loss {info.loss:.4g} {shown}", flush=True)
            # Several processes hear of it at different moments, and must stop at the same iteration.
            if accelerator.reduce(torch.tensor(float(asked.is_set()), device=accelerator.device), "sum") > 0:
                updates.close()
                if accelerator.is_main_process:
                    print(f"{STOPPED} {info.iteration + 1}; the same command goes on from there", flush=True)
                break
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
