"""A training as data: what a YAML file, a notebook or `accelerate launch -m flowopd_lib.jobs RECIPE.yaml`
describes, built.

model: ""                       # a Stable Diffusion 3 folder or hub id; "" is the small world's base, with
                                its prompts and judges
prompts: ""                     # a Flow-GRPO dataset folder
judges: {}                      # of another world: {PickScore: {model_id: ...}, OCR: {}, DeQA: {model_id:
                                ...}}
adapters: {ocr: experts/ocr}    # loaded beside the student: teachers, anchors, references; a folder, or one
                                of the package's assets
student: {rank: 32, alpha: 64}  # a new adapter; or {load: FOLDER}; or {merge: cat, adapters: [ocr, ...]}
schedule: {tasks: [ocr], prompts_per_batch: 12, images_per_prompt: 12}      # tags: {color_attr: 3}: GenEval's
                                                            tags drawn so often; else once
sampler: {steps: 10, kind: sde, noise_level: 0.7}
grpo: {rewards: {OCR: 1.0}}     # or   opd: {teachers: {ocr: ocr}}
train: {iterations: 100, lr: 3.0e-4}
"""

from __future__ import annotations

import argparse
import contextlib
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
from accelerate.tracking import get_available_trackers

from ..files import write_whole
from ..inputs import SEED, check_keys, check_options, check_value, list_of, nearest, one_of, read_yaml
from ..merge import METHODS, merge
from ..objectives import GRPO, OPD, Objective
from ..policy import FlowPolicy
from ..precision import NAMES, decide
from ..prompts import FILES, TASKS, Prompt, load_prompts
from ..rewards import OCR, DeQA, GenEval, PickScore, RemoteDetector, RemoteJudge, Reward
from ..rollout import Sampler
from ..schedule import Schedule
from ..train import TrainConfig, train
from ..worlds import tiny
from .launch import STOPPED, Look, some_prompts

JUDGES = {"PickScore": PickScore, "OCR": OCR, "DeQA": DeQA}
# What each key of a recipe may be; the sections' own keys are the arguments of what they describe, with their
# types.
KEYS = {
    "model": str | None,
    "prompts": str | None,
    "judges": dict[str, dict],
    "adapters": dict[str, str],
    "student": dict,
    "schedule": dict,
    "sampler": dict,
    "grpo": dict,
    "opd": dict,
    "train": dict,
    "seed": SEED,
}
STUDENTS = {
    "load": {"load": str},
    "merge": {
        "merge": one_of(*METHODS),
        "adapters": list_of(str),
        "weights": list[float] | None,
        "rank": int | None,
        "density": float,
    },
}


def build(
    recipe: Mapping,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    policy: FlowPolicy | None = None,
) -> tuple[FlowPolicy, Objective, TrainConfig]:
    """Everything `train` takes; the policy has the recipe's adapters and one called `student`, unless one
    that has them is given.

    Raises ValueError or FileNotFoundError, naming key and value, before anything long begins: all of the
    recipe is checked before a model is loaded.
    """
    check_keys("the recipe", recipe, KEYS)
    for key, value in recipe.items():
        check_value(key, value, KEYS[key])
    if ("grpo" in recipe) == ("opd" in recipe) or "train" not in recipe or "schedule" not in recipe:
        raise ValueError("a recipe has a schedule, a train section, and one objective: grpo or opd")
    seed = recipe.get("seed", 0)
    if "iterations" not in recipe["train"]:
        raise ValueError("train lacks iterations: how many to train for")
    config = TrainConfig(**check_options("train", recipe["train"], TrainConfig))
    sampler = Sampler(
        **check_options("sampler", {"steps": 10, "kind": "sde", **recipe.get("sampler", {})}, Sampler)
    )
    schedule = dict(recipe["schedule"])
    tasks = check_value("schedule.tasks", schedule.pop("tasks", list(TASKS)), list_of(one_of(*FILES)))
    tags = check_value("schedule.tags", schedule.pop("tags", {}), dict[str, int])
    options = check_options("schedule", schedule, Schedule, ("prompts", "seed"))
    if "prompts_per_batch" not in options:
        raise ValueError("schedule lacks prompts_per_batch: how many prompts an iteration trains on")
    folder = recipe.get("prompts") or tiny.PROMPTS
    prompts = Schedule(
        {task: _weighed(load_prompts(folder, task, "train"), tags) for task in tasks}, seed=seed, **options
    )
    student = _checked_student(recipe)
    adapters = {name: _place(path) for name, path in recipe.get("adapters", {}).items()}
    if "opd" in recipe:
        own = check_options("opd", {"teachers": {}, **recipe["opd"]}, OPD, ("schedule", "sampler"))
        objective = OPD(prompts, sampler=sampler, **own)
    else:
        own = check_options(
            "grpo", {"rewards": {}, **recipe["grpo"]}, GRPO, ("schedule", "judges", "sampler")
        )
        objective = GRPO(prompts, judges_of(recipe), sampler=sampler, **own)
    unknown = sorted(objective.adapters - {*adapters})
    if unknown:
        raise ValueError(
            f"{'opd' if 'opd' in recipe else 'grpo'} names the adapter "
            f"{unknown[0]!r}{nearest(unknown[0], adapters)}; "
            f"the recipe's adapters are {', '.join(adapters) or 'none'}"
        )
    if policy is None:
        policy = _policy(recipe, adapters, student, seed, device, dtype)
    objective.check(policy, "student")
    return policy, objective, config


def _policy(
    recipe: Mapping,
    adapters: Mapping[str, str],
    student: Mapping,
    seed: int,
    device: str | torch.device,
    dtype: str | torch.dtype,
) -> FlowPolicy:
    policy = FlowPolicy(recipe.get("model") or tiny.BASE, device, dtype)
    for name, path in adapters.items():
        policy.load_adapter(name, path)
    if "load" in student:
        policy.load_adapter("student", _place(student["load"]))
    elif "merge" in student:
        merge(
            policy,
            student["adapters"],
            "student",
            student["merge"],
            **{k: v for k, v in student.items() if k not in ("merge", "adapters")},
        )
    else:
        policy.add_adapter("student", seed=seed, **student)
    return policy


def _place(path: str) -> str:
    """A folder as it is named or, where there is none, among the package's assets."""
    shipped = tiny.ASSETS / path
    return str(shipped) if shipped.is_dir() and not Path(path).exists() else path


def _checked_student(recipe: Mapping) -> dict:
    settings = recipe.get("student", {})
    for kind, known in STUDENTS.items():
        if kind in settings:
            check_keys("student", settings, known)
            for name, value in settings.items():
                check_value(f"student.{name}", value, known[name])
            for name in settings.get("adapters", []):
                if name not in recipe.get("adapters", {}):
                    raise ValueError(
                        f"student merges {name!r}{nearest(name, recipe.get('adapters', {}))}; the recipe's "
                        "adapters are "
                        f"{', '.join(recipe.get('adapters', {})) or 'none'}"
                    )
            return dict(settings)
    return check_options("student", settings, FlowPolicy.add_adapter, ("self", "name", "seed"))


def judges_of(recipe: Mapping) -> dict[str, Reward]:
    """The judges that a recipe names; without any, the small world's."""
    judges = recipe.get("judges", {})
    here = {name: settings for name, settings in judges.items() if "url" not in settings}
    check_keys("judges", here, JUDGES)
    checked = {
        name: check_options(f"judges.{name}", settings, JUDGES[name]) for name, settings in here.items()
    }
    for name, settings in checked.items():
        if "model_id" not in settings and "model_id" in inspect.signature(JUDGES[name]).parameters:
            raise ValueError(f"judges.{name} lacks model_id: a folder or a hub id")
    if not judges:
        return tiny.training_judges()
    return {
        name: JUDGES[name](**checked[name]) if name in checked else _remote(name, settings)
        for name, settings in judges.items()
    }


def _remote(name: str, settings: Mapping) -> Reward:
    """A judge with a url is a judge server's; the token is the environment's, never a recipe's."""
    if name in ("GenEval", "GenEvalPartial"):
        settings = check_options(f"judges.{name}", settings, RemoteDetector, ("token",))
        return GenEval(RemoteDetector(**settings), partial=name == "GenEvalPartial")
    settings = check_options(f"judges.{name}", settings, RemoteJudge, ("judge", "token"))
    return RemoteJudge(judge=name, **settings)


def _weighed(prompts: list[Prompt], tags: Mapping[str, int]) -> list[Prompt]:
    """Every prompt as often as its tag says (once by default), as in Flow-GRPO's training set for GenEval."""
    if any(p.tag != p.task for p in prompts):
        check_keys("tags", tags, sorted({p.tag for p in prompts}))
    if not all(n >= 0 for n in tags.values()):
        raise ValueError(f"tags say how often their prompts are drawn, in whole numbers, not {dict(tags)}")
    return [p for p in prompts for _ in range(tags.get(p.tag, 1))]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flowopd_lib.jobs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, help="a YAML file")
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="for checkpoints, metrics and the adapter; resumed if it holds some",
    )
    parser.add_argument(
        "--look",
        type=int,
        default=0,
        help="after every so many iterations, draw and judge about six of its prompts into the folder; "
        "0: never",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", *NAMES),
        default="auto",
        help="auto: that of the folder, or of accelerate, or what is faster here",
    )
    args = parser.parse_args()
    if args.look < 0:
        parser.error(f"--look is a number of iterations, or 0, not {args.look}")
    # to stop: by Ctrl-C, by a scheduler that wants its machine back, or by `launch`
    asked = threading.Event()

    def ask(number: int, _) -> None:
        if number == signal.SIGINT and asked.is_set():
            raise KeyboardInterrupt  # the second time: now, without a checkpoint
        asked.set()

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)
    try:
        recipe = read_yaml(args.recipe)
        train_section = recipe.get("train") if isinstance(recipe, dict) else None
        tracker = train_section.get("log_with") if isinstance(train_section, dict) else None
        # `build` tells of one that is not there
        tracker = tracker if tracker in map(str, get_available_trackers()) else None
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), log_with=tracker, project_dir=args.folder
        )
        if accelerator.mixed_precision not in ("no", "bf16"):
            raise ValueError(
                f"mixed precision {accelerator.mixed_precision} is not supported; use no or bf16"
            )
        if accelerator.device.type == "cpu" and accelerator.num_processes == 1:
            torch.set_num_threads(os.cpu_count())
        # accelerate's "no" is also what it says where nobody said anything.
        asked_for = (
            "bfloat16"
            if args.precision == "auto" and accelerator.mixed_precision == "bf16"
            else args.precision
        )
        dtype = decide(args.folder, asked_for, accelerator.device, write=False)
        # all have looked before the first writes, and a fault in the recipe leaves no folder
        accelerator.wait_for_everyone()
        policy, objective, config = build(recipe, accelerator.device, dtype)
        updates = train(policy, objective, args.folder, config, accelerator=accelerator)
        if args.look and accelerator.is_main_process:
            judges = getattr(objective, "judges", None) or (
                {} if recipe.get("model") and not recipe.get("judges") else judges_of(recipe)
            )
            updates = Look(some_prompts(objective.schedule), judges, args.look).during(
                updates, policy, "student", args.folder
            )
        kept = False
        with contextlib.closing(updates):
            for info in updates:
                if not info.metrics:
                    continue
                if accelerator.is_main_process:
                    # only now: a recipe that the folder's training refused must not take the place of its own
                    if not kept:
                        write_whole(args.folder / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
                        decide(args.folder, dtype, accelerator.device)
                        kept = True
                    shown = " ".join(f"{name} {value:.4g}" for name, value in info.metrics.items())
                    print(
                        f"{info.iteration + 1}/{config.iterations} {info.seconds:.0f} s loss "
                        f"{info.loss:.4g} {shown}",
                        flush=True,
                    )
                # Several processes hear of it at different moments, and must stop at the same iteration.
                if (
                    accelerator.reduce(torch.tensor(float(asked.is_set()), device=accelerator.device), "sum")
                    > 0
                ):
                    updates.close()
                    if accelerator.is_main_process:
                        print(
                            f"{STOPPED} {info.iteration + 1}; the same command goes on from there", flush=True
                        )
                    break
    except KeyboardInterrupt:
        sys.exit("error: interrupted; the same command goes on from the last checkpoint")
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
