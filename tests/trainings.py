"""Small trainings on the shipped model, for the tests of the loop, the jobs and the launchers."""

import json
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from flowopd_lib import SFT, SFTConfig, TrainConfig, load_benchmark
from flowopd_lib.config import validate
from flowopd_lib.files import load_state
from flowopd_lib.lab import build
from flowopd_lib.lab.recipe import Recipe
from flowopd_lib.train import train

OPD = {
    "student": {"rank": 4, "alpha": 8},
    "schedule": {"tasks": ["geneval", "ocr"], "prompts_per_batch": 4},
    "sampler": {"steps": 3},
    "opd": {
        "teachers": {"geneval": "geneval", "ocr": None},
        "micro_batch_size": 2,
        "anchor": "geneval",
    },
    "train": {"iterations": 4, "lr": 1e-3},
}
DRAWN = {**OPD, "opd": {**OPD["opd"], "trained_steps": 1}}
GRPO = {
    "student": {"rank": 4, "alpha": 8},
    "schedule": {"tasks": ["ocr"], "prompts_per_batch": 2, "images_per_prompt": 4},
    "sampler": {"steps": 3, "noisy_steps": None},
    "grpo": {"reward_weights": {"OCR": 0.6, "DeQA": 0.4}, "micro_batch_size": 2, "updates": 2},
    "train": {"iterations": 3, "lr": 1e-3},
}
# the window moves, and the images of a prompt separate there
BRANCH = {**GRPO, "sampler": {"steps": 4, "noisy_steps": 1, "window_start": [0, 2], "branch": True}}
START = {
    "student": {"rank": 4, "alpha": 8},
    "sft": {"samples": 6, "batch": 3, "steps": 2},
    "train": {"iterations": 3, "lr": 1e-3},
}
RECIPES = {"opd": OPD, "opd drawn": DRAWN, "grpo": GRPO, "grpo branch": BRANCH, "sft": START}


def changed(recipe, **sections):
    """A recipe with other values in its sections."""
    return recipe | {
        key: {**recipe[key], **value} if isinstance(value, dict) and key in recipe else value
        for key, value in sections.items()
    }


def run(recipe, workspace, folder, name="student"):
    """Train by a recipe, or resume; the iterations that were trained."""
    objective, config = build(validate(Recipe, recipe), workspace, name)
    updates = train(workspace.policy, objective, folder, config, name)
    return sorted({info.iteration for info in updates})


def sft(policy, scale=1.0):
    """An objective that needs no teacher, for a policy with an adapter."""
    prompts = load_benchmark().prompts("ocr", "train")[:8]
    g = torch.Generator().manual_seed(0)
    latents = scale * torch.randn(len(prompts), *policy.latent_shape, generator=g)
    return SFT(latents, prompts, SFTConfig(batch=4))


def train_config(iterations, **options):
    return TrainConfig(iterations, **{"lr": 1e-3, **options})


def metrics(folder):
    """The lines of metrics.jsonl without seconds, which no two trainings share."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def adapter_weights(folder):
    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


def assert_same_training(whole, other, iterations):
    """The same to the bit: weights, average, optimizer, metrics."""
    a, b = (load_state(Path(folder) / "state.safetensors") for folder in (whole, other))
    assert a["iteration"] == b["iteration"] == iterations and a["updates"] == b["updates"]
    for key in ("parameters", "average"):
        assert all(torch.equal(x, y) for x, y in zip(a[key], b[key], strict=True))
    for i, moments in a["optimizer"]["state"].items():
        assert all(torch.equal(moments[k], b["optimizer"]["state"][i][k]) for k in moments)
    assert metrics(whole) == metrics(other)
    assert [line["iteration"] for line in metrics(whole)] == list(range(iterations))


def gradients(folder):
    """AdamW's first moments, means of the updates' gradients. The weights themselves move by its
    sign, which rounding decides where it is almost 0."""
    state = load_state(Path(folder) / "state.safetensors")["optimizer"]["state"]
    return torch.cat([moments["exp_avg"].flatten() for moments in state.values()])


def relative_distance(one, other):
    return ((one - other).norm() / one.norm()).item()


def launcher(folder, processes=1):
    """The file of a launcher that runs jobs in processes of one thread."""
    many = f"-m torch.distributed.run --standalone --nproc_per_node {processes} "
    command = f'exec "$PYTHON" {many if processes > 1 else ""}-m flowopd_lib job "$@"'
    path = Path(folder) / f"local{processes}.yaml"
    path.write_text(yaml.safe_dump({"command": command, "environment": {"OMP_NUM_THREADS": "1"}}))
    return str(path)


def wait_until(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
