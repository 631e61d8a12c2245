"""Recipes that are wrong in one place each, and what a user is told: for test_inputs.py and drill.py."""

import contextlib
import copy
import io
import signal
import sys

import yaml

from flowopd_lib.jobs import __main__ as jobs

GOOD = {
    "student": {"rank": 4, "alpha": 8},
    "schedule": {"tasks": ["geneval", "ocr"], "prompts_per_batch": 4},
    "adapters": {"mine": "ocr"},  # a copy of the benchmark's expert under another name
    "sampler": {"steps": 4},
    "opd": {"teachers": {"geneval": None, "ocr": "mine"}},
    "train": {"iterations": 6, "lr": 1e-3},
}


def put(**values):
    """Set keys, written `section__key`."""

    def change(recipe):
        for where, value in values.items():
            *sections, key = where.split("__")
            node = recipe
            for section in sections:
                node = node.setdefault(section, {})
            node[key] = value

    return change


def without(where):
    def change(recipe):
        *sections, key = where.split("__")
        node = recipe
        for section in sections:
            node = node[section]
        del node[key]

    return change


def grpo(**options):
    def change(recipe):
        del recipe["opd"]
        recipe["schedule"] = {"tasks": ["ocr"], "prompts_per_batch": 2, "images_per_prompt": 4}
        recipe["grpo"] = {"rewards": {"OCR": 1.0}, **options}

    return change


def sft(**options):
    def change(recipe):
        del recipe["opd"], recipe["schedule"], recipe["sampler"]
        recipe["sft"] = {"samples": 4, "batch": 2, "steps": 2, **options}

    return change


# name: (what is changed, part of what is said)
RECIPES = {
    "lr as YAML's text": (put(train__lr="3e-4"), "train.lr must be a number, not '3e-4'"),
    "iterations in quotes": (
        put(train__iterations="1"),
        "train.iterations must be a whole number, not '1'",
    ),
    "half an iteration": (
        put(train__iterations=1.5),
        "train.iterations must be a whole number, not 1.5",
    ),
    "no iterations": (put(train__iterations=0), "train.iterations must be at least 1, not 0"),
    "iterations missing": (without("train__iterations"), "train lacks iterations"),
    "a negative rate": (put(train__lr=-1e-3), "train.lr must be more than 0, not -0.001"),
    "a negative warmup": (put(train__warmup=-1), "train.warmup must be at least 0, not -1"),
    "more than all of it cooled down": (
        put(train__cooldown=1.5),
        "train.cooldown must be at most 1, not 1.5",
    ),
    "a cooldown to no known end": (
        put(train__cooldown=0.5, train__max_seconds=60.0),
        "needs to know how many there are",
    ),
    "ema of 1": (put(train__ema=1.0), "train.ema must be less than 1, not 1.0"),
    "one beta": (put(train__betas=[0.9]), "train.betas"),
    "teachers as a list": (
        put(opd__teachers=["ocr"]),
        "opd.teachers must be a mapping of names to values, not ['ocr']",
    ),
    "a task without teacher": (
        put(opd__teachers={"ocr": "mine"}),
        "no teacher for the task geneval",
    ),
    "a teacher that is not loaded": (
        put(opd__teachers={"ocr": "ocrr", "geneval": None}),
        "opd names the adapter 'ocrr' (did you mean 'ocr'?)",
    ),
    "an anchor that is not loaded": (
        put(opd__anchor="dequa"),
        "names the adapter 'dequa' (did you mean 'deqa'?)",
    ),
    "guidance of no teacher": (
        put(opd__guidance={"ocrr": 4.5}),
        "guidance names 'ocrr', which is no teacher",
    ),
    "negative guidance of a teacher": (
        put(opd__guidance={"ocr": -1.0}),
        "opd.guidance['ocr'] must be at least 0",
    ),
    "a negative anchor": (put(opd__mar=-1), "mar must be at least 0"),
    "an unknown reading": (put(opd__estimator="pathwize"), "unknown estimator pathwize"),
    "a misspelt option": (put(opd__estimater="paper"), "did you mean 'estimator'"),
    "more updates than prompts": (put(opd__updates=5), "5 updates need as many prompts"),
    "one step": (put(sampler__steps=1), "take at least 2 steps"),
    "no steps": (put(sampler__steps=0), "sampler.steps must be at least 1, not 0"),
    "steps as a text": (put(sampler__steps="4"), "sampler.steps must be a whole number"),
    "an unknown sampler": (
        put(sampler__kind="ddim"),
        "sampler.kind must be one of ode, sde, cps, not 'ddim'",
    ),
    "negative guidance": (put(sampler__guidance=-1), "guidance must be at least 0"),
    "too much noise for cps": (
        put(sampler__kind="cps", sampler__noise_level=2.0),
        "noise level of CPS lies in [0, 1]",
    ),
    "a step that is not there": (put(opd__steps=[7]), "trained steps are numbers from 0 to 2"),
    "a negative seed": (put(seed=-5), "seed must be at least 0, not -5"),
    "an unknown task": (put(schedule__tasks=["gneval"]), "did you mean 'geneval'"),
    "no prompts": (put(schedule__prompts_per_batch=0), "at least one prompt"),
    "prompts missing": (without("schedule__prompts_per_batch"), "schedule lacks prompts_per_batch"),
    "tags as a list": (put(schedule__tags=["colors"]), "schedule.tags must be a mapping"),
    "a benchmark that is not there": (
        put(benchmark="tini"),
        "there is no benchmark 'tini'; there are",
    ),
    "a benchmark's file that is not there": (
        put(benchmark="nowhere.yaml"),
        "there is no nowhere.yaml",
    ),
    "a model, which is the benchmark's": (put(model="./nowhere"), "the train job has no 'model'"),
    "prompts, which are the benchmark's": (
        put(prompts="nowhere"),
        "the train job has no 'prompts'",
    ),
    "an adapter that is not there": (
        put(adapters__mine="experts/none"),
        "is neither a folder here nor an adapter that the hub gives",
    ),
    "an adapter of nothing": (
        put(adapters__mine={"lode": "ocr"}),
        "or have one of merge, load, rank, not be",
    ),
    "an adapter's misspelt option": (
        put(adapters__mine={"merge": "cat", "adapters": ["ocr", "deqa"], "rnak": 3}),
        "adapters.mine has no 'rnak' (did you mean 'rank'?)",
    ),
    "rank of 0": (put(student__rank=0), "a rank of at least 1"),
    "a merge of one": (put(student={"merge": "svd", "adapters": ["ocr"]}), "at least two"),
    "an unknown merge": (
        put(student={"merge": "mean", "adapters": ["ocr", "ocr"]}),
        "student.merge must be one of",
    ),
    "two objectives": (put(grpo={"rewards": {}}), "one objective: grpo, opd or sft"),
    "an unknown job": (put(job="trian"), "there is no job 'trian' (did you mean 'train'?)"),
    "a probe of no split": (
        put(probe={"split": "vla"}),
        "probe.split must be one of train, val, test, ood",
    ),
    "no samples to begin with": (sft(samples=0), "sft.samples must be at least 1, not 0"),
    "a start on no task": (sft(tasks=["gneval"]), "has no task 'gneval'"),
    "a section as a list": (put(train=[1]), "train must be a mapping"),
    "a misspelt section": (put(scedule={}), "did you mean 'schedule'"),
    "a reward of no reward": (grpo(reward_weights={"OCRR": 1.0}), "name OCRR; the rewards are"),
    "a weight as a text": (
        grpo(reward_weights={"OCR": "1"}),
        "grpo.reward_weights['OCR'] must be a number",
    ),
    "a clip of 0": (grpo(clip=0.0), "grpo.clip must be more than 0, not 0.0"),
    "an unknown normalisation": (
        grpo(normalise="z"),
        "grpo.normalise must be one of batch, group, gdpo, none, not 'z'",
    ),
}


# Files that are no recipe at all: (their bytes; None: there is none, part of what is said).
FILES = {
    "a tab": (b"train:\n\titerations: 3\n", "line 2, column 1 is not YAML"),
    "an empty file": (b"", "a job is a mapping of names to values, not None"),
    "a list": (b"- a\n- b\n", "a job is a mapping of names to values, not ['a', 'b']"),
    "no text": (b"\xff\xfe\x00", "is not YAML"),
    "a file that is not there": (None, "there is no "),
}


def broken(change):
    recipe = copy.deepcopy(GOOD)
    change(recipe)
    return recipe


def cases():
    """By name: (the file's bytes, part of what is said)."""
    return {
        name: (yaml.safe_dump(broken(change)).encode(), message)
        for name, (change, message) in RECIPES.items()
    } | FILES


def said_of(content, folder):
    """(exit code, what was printed as an error) of the command line on a file of this content, run in this
    process."""
    path = folder / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    before, printed = sys.argv, io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    sys.argv = ["jobs", str(path), "--folder", str(folder / "training")]
    try:
        with contextlib.redirect_stderr(printed):
            jobs.main()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            printed.write(stop.code)
            return 1, printed.getvalue()
        return stop.code, printed.getvalue()
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0, printed.getvalue()
