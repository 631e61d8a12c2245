"""Recipes that are wrong in one place each, and part of what their error says: for test_inputs.py
and fault_injection.py."""

import contextlib
import io
import signal

import yaml

from flowopd_lib import cli

TRAIN = {"iterations": 6, "lr": 1e-3}
GOOD = {
    "student": {"rank": 4, "alpha": 8},
    "schedule": {"tasks": ["geneval", "ocr"], "prompts_per_batch": 4},
    "adapters": {"mine": "ocr"},  # the benchmark's expert under another name
    "sampler": {"steps": 4},
    "opd": {"teachers": {"geneval": None, "ocr": "mine"}},
    "train": TRAIN,
}
GRPO = {
    "schedule": {"tasks": ["ocr"], "prompts_per_batch": 2, "images_per_prompt": 4},
    "sampler": {"steps": 4, "noisy_steps": None},
    "grpo": {"reward_weights": {"OCR": 1.0}},
    "train": TRAIN,
}
SFT = {"sft": {"samples": 4, "batch": 2, "steps": 2}, "train": TRAIN}

# Of each recipe: a change as YAML, and part of the error.
CHANGES = (
    (GOOD, {
        "train: {iterations: 1.5}": "train.iterations: Input should be a valid integer, got a numb",
        "train: {iterations: 0}": "train.iterations: Input should be greater than or equal to 1",
        "train: {iterations: null}": "train.iterations: Input should be a valid integer, not None",
        "train: {lr: small}": "train.lr: Input should be a valid number",
        "train: {lr: -0.001}": "train.lr: Input should be greater than 0, not -0.001",
        "train: {lr: .inf}": "train.lr: Input should be a finite number, not inf",
        "train: {warmup: -1}": "train.warmup: Input should be greater than or equal to 0, not -1",
        "train: {cooldown: 1.5}": "train.cooldown: Input should be less than or equal to 1",
        "train: {ema: 1.0}": "train.ema: Input should be less than 1, not 1.0",
        "train: [1]": "train: Input should be a dictionary",
        "train: {log_with: tensorbord}": "there is no installed tracker 'tensorbord'",
        "scedule: {}": "scedule: no such setting (did you mean 'schedule'?)",
        "opd: {teachers: [ocr]}": "opd.teachers: Input should be a valid dictionary, not ['ocr']",
        "opd: {teachers: {ocr: mine}}": "no teacher for the task geneval",
        "opd: {teachers: {ocr: ocrr, geneval: null}}": "'ocrr' (did you mean 'ocr'?)",
        "opd: {anchor: dequa}": "'dequa' (did you mean 'deqa'?)",
        "opd: {guidance: {ocrr: 4.5}}": "there is no teacher or anchor (guidance) 'ocrr'",
        "opd: {guidance: {ocr: -1.0}}": "opd.guidance.ocr: Input should be greater than or equal",
        "opd: {mar: .inf}": "opd.mar: Input should be a finite number, not inf",
        "opd: {guidance: {mine: .inf}}": "opd.guidance.mine: Input should be a finite number",
        "opd: {draw: iteration}": "opd: draw has no effect unless trained_steps is a number",
        "opd: {draw: trajectory, trained_steps: 2, loss: paper}": "opd: draw: trajectory is for pa",
        "opd: {clip: 0.1}": "opd: clip has no effect with the loss pathwise, which takes no ratios",
        "opd: {loss: log_ratio, weighting: x0}": "opd: log_ratio estimates the KL, so weighting",
        "opd: {anchor: deqa, mar: 0}": "opd: anchor has no effect with mar 0",
        "opd: {mar: -1}": "opd.mar: Input should be greater than or equal to 0, not -1",
        "opd: {loss: pathwize}": "there is no loss 'pathwize' (did you mean 'pathwise'?)",
        "opd: {loss: 3}": "opd.loss: Input should be a valid string, not 3",
        "opd: {loss: 'nowhere.py:loss'}": "opd.loss: 'nowhere.py:loss' cannot be loaded",
        "opd: {weighting: snr}": "there is no weighting 'snr'",
        "opd: {los: paper}": "opd.los: no such setting (did you mean 'loss'?)",
        "opd: {updates: 5}": "5 updates need as many prompts",
        "opd: {trained_steps: [7]}": "trained steps are numbers from 0 to 2",
        "opd: null": "a recipe has one objective: grpo, opd or sft",
        "grpo: {}": "a recipe has one objective: grpo, opd or sft",
        "sampler: {steps: 1}": "take at least 2 steps",
        "sampler: {steps: 0}": "sampler: steps: Input should be greater than or equal to 1, not 0",
        "sampler: {stepz: 4}": "sampler: stepz: no such setting (did you mean 'steps'?)",
        "sampler: {kind: ddim}": "sampler: kind: Input should be 'ode', 'sde' or 'cps', not 'ddim'",
        "sampler: {guidance: .inf}": "sampler: guidance: Input should be a finite number, not inf",
        "sampler: {guidance: -1}": "sampler: guidance: Input should be greater than or equal to 0",
        "sampler: {kind: cps, noise_level: 2}": "the noise level of CPS lies in [0, 1]",
        "schedule: {tasks: [gneval]}": "'gneval' (did you mean 'geneval'?)",
        "schedule: {task_weights: {gneval: 1}}": "'gneval' (did you mean 'geneval'?)",
        "schedule: {prompts_per_batch: 0}": "schedule.prompts_per_batch: Input should be greater",
        "schedule: {tag_weights: [colors]}": "schedule.tag_weights: Input should be a valid dict",
        "schedule: {tag_weights: {colour: 2}}": "(did you mean 'colors'?)",
        "schedule: {}": "schedule.prompts_per_batch: Field required",
        "schedule: null": "a recipe of grpo or opd has a schedule",
        "seed: -5": "seed: Input should be greater than or equal to 0, not -5",
        "benchmark: tini": "there is no benchmark 'tini' (did you mean 'tiny'?)",
        "benchmark: nowhere.yaml": "there is no nowhere.yaml",
        "benchmark: 3": "benchmark: Input should be a valid string, not 3",
        "model: ./nowhere": "model: no such setting",
        "adapters: {mine: experts/none}": "'experts/none' is neither a folder here nor an adapter",
        "adapters: {mine: {lode: ocr}}": "adapters.mine.lode: no such setting (did you mean 'load'",
        "adapters: {mine: {merge: cat, adapters: [ocr], rnak: 3}}": "(did you mean 'rank'?)",
        "adapters: {mine: 3}": "adapters.mine: Input should be a valid string, not 3",
        "adapters: {mine: b, b: mine}": "is no adapter: a PEFT folder has",
        "student: {rank: 0}": "student.rank: Input should be greater than or equal to 1, not 0",
        "job: trian": "there is no job 'trian' (did you mean 'train'?)",
        "validation: {every: 2, split: vla}": "validation.split: Input should be 'train', 'val',",
    }),
    (GRPO, {
        "student: {merge: svd, adapters: []}": "List should have at least 1 item",
        "student: {merge: svd, adapters: [ocr, dequa]}": "(student.adapters) 'dequa' (did you mean",
        "student: {merge: mean, adapters: [ocr, deqa]}": "student.merge: Input should be 'cat', ",
        "grpo: {reward_weights: {OCRR: 1.0}}": "'OCRR' (did you mean 'OCR'?)",
        "grpo: {reward_weights: {OCR gold: 1.0}}": "OCR gold is a held-out reward",
        "grpo: {reward_weights: {OCR: much}}": "grpo.reward_weights.OCR: Input should be a valid",
        "grpo: {clip: 0.0}": "grpo.clip: Input should be greater than 0, not 0.0",
        "grpo: {normalise: z}": "grpo.normalise: Input should be 'batch', 'group'",
        "grpo: {reference: ocr, beta: 0}": "grpo: reference has no effect with beta 0",
        "schedule: {tag_weights: {counting: 2}}": "no tag (schedule.tag_weights) 'counting'",
        "student: {merge: svd, adapters: [ocr, deqa], density: 0.2}": "density has no effect with",
        "student: {merge: ties, adapters: [ocr, deqa], seed: 2}": "student: seed has no effect wit",
        "grpo: {reference: ocrr}": "there is no adapter 'ocrr' (did you mean 'ocr'?)",
    }),
    (SFT, {
        "sft: {samples: 0}": "sft.samples: Input should be greater than or equal to 1, not 0",
        "sft: {tasks: [gneval]}": "(did you mean 'geneval'?)",
        "sampler: {steps: 3}": "a recipe of sft has neither schedule nor sampler",
    }),
)  # fmt: skip

# Files that are no recipe at all: (their bytes; None: there is none, part of the error).
FILES = {
    "a tab": (b"train:\n\titerations: 3\n", "line 2, column 1"),
    "an empty file": (b"", "Input should be a valid dictionary, not None"),
    "a list": (b"- a\n- b\n", "Input should be a valid dictionary, not ['a', 'b']"),
    "bytes": (b"\xff\xfe\x00", "is not YAML"),
    "no file": (None, "there is no "),
}


def merged(recipe, change):
    """A section of the change adds to the recipe's, an empty one replaces it."""
    sections = {
        key: {**recipe[key], **value}
        if isinstance(value, dict) and recipe.get(key) and value
        else value
        for key, value in change.items()
    }
    return {**recipe, **sections}


def cases():
    """By name: (the file's bytes, part of the error)."""
    recipes = {
        change: (yaml.safe_dump(merged(recipe, yaml.safe_load(change))).encode(), message)
        for recipe, changes in CHANGES
        for change, message in changes.items()
    }
    return recipes | FILES


def exit_of(content, folder):
    """(exit code, error) of the command line on a file of this content, run in this process."""
    path, printed = folder / "recipe.yaml", io.StringIO()
    if content is not None:
        path.write_bytes(content)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            cli.main(["job", str(path), "--folder", str(folder / "training")])
    except SystemExit as stop:
        if isinstance(stop.code, str):  # Python prints it and exits with 1
            return 1, stop.code
        return stop.code, printed.getvalue()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0, printed.getvalue()
