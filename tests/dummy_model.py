"""A benchmark of the full one's kind, without its weights: Stable Diffusion 3.5's architecture, the published
experts' format, and the real classes of every reward that runs in process, all tiny and random; and one reward
behind a real server. What it draws and how it is scored means nothing; that all of it runs is what it is for.

`python tests/dummy_model.py FOLDER` writes it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from flowopd_lib import load_benchmark
from flowopd_lib.adapters import ATTENTION, linear_places
from flowopd_lib.bench.dummy_model import TINY, write_sd35
from flowopd_lib.bench.dummy_rewards import (
    write_aesthetic,
    write_blip_vqa,
    write_clip,
    write_mask2former,
)

EXPERTS = ("geneval", "ocr", "pickscore", "deqa")
OBJECTS = ("bench", "dog", "computer mouse", "tv remote")
COLORS = ("red", "blue", "green")
TARGETS = [f"attn.{projection}" for projection in ATTENTION]


def write_expert(folder: Path, places: dict[str, tuple[int, int]], seed: int) -> Path:
    """An adapter as Flow-GRPO's are published: PEFT's format, r = 32, alpha = 64, on the eight projections of
    the joint attention, attn2 left out."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for place, (inputs, outputs) in places.items():
        if ".attn." in f".{place}." and place.endswith(ATTENTION):
            for factor, shape in (("A", (32, inputs)), ("B", (outputs, 32))):
                key = f"base_model.model.{place}.lora_{factor}.weight"
                weights[key] = torch.randn(shape, generator=generator) * 0.02
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 32, "lora_alpha": 64, "target_modules": TARGETS}
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "init_lora_weights": "gaussian"})
    )
    return folder


def write_prompts(folder: Path) -> None:
    """In Flow-GRPO's formats and under its names: no split but train and test."""
    for split, n in (("train", 28), ("test", 12)):
        (folder / "geneval").mkdir(parents=True, exist_ok=True)
        records = []
        for i in range(n):
            color, thing = COLORS[i % 3], OBJECTS[i % 4]
            include = [{"class": thing, "count": 1, "color": color}]
            prompt = f"a photo of a {color} {thing} and {split} {i}"
            records.append({"tag": "colors", "include": include, "prompt": prompt})
        lines = "\n".join(json.dumps(r) for r in records) + "\n"
        (folder / "geneval" / f"{split}_metadata.jsonl").write_text(lines)
        # what its text encoders can read, for they are the shipped benchmark's
        for task, name in (("ocr", "ocr"), ("pickscore", "pickscore_sfw")):
            (folder / name).mkdir(parents=True, exist_ok=True)
            lines = [p.text for p in load_benchmark().prompts(task, split)[:n]]
            (folder / name / f"{split}.txt").write_text("\n".join(lines) + "\n")


def write_benchmark(folder: Path, server: str = "") -> Path:
    """The benchmark's file; `server`: the url of a reward server with `brightness`, which stands for DeQA's."""
    from diffusers import SD3Transformer2DModel

    folder.mkdir(parents=True, exist_ok=True)
    model = write_sd35(folder / "model", TINY, torch.float32)
    places = linear_places(SD3Transformer2DModel.from_pretrained(model / "transformer"))
    for seed, name in enumerate(EXPERTS):
        write_expert(folder / "experts" / name, places, seed)
    write_prompts(folder / "prompts")
    write_mask2former(folder / "mask2former")
    write_clip(folder / "clip")
    write_aesthetic(folder / "aesthetic")
    write_blip_vqa(folder / "blip")
    detector = {
        "class": "Mask2FormerDetector",
        "model_id": "mask2former",
        "clip_id": "clip",
        "side": 64,
    }
    genevals = {"class": "GenEval", "detector": detector, "tasks": ["geneval"]}
    deqa = {"class": "RemoteReward", "url": server, "reward": "Brightness", "scale": 1.0}
    rewards = {
        "GenEval": genevals,
        # of a part of the picture: to look for text in a whole one takes a hundred times as long
        "OCR": {"class": "OCR", "tasks": ["ocr"], "region": [1, 17, 63, 47], "size": [64, 64]},
        "PickScore": {"class": "PickScore", "model_id": "clip", "scale": 26.0},
        **({"DeQA": deqa} if server else {}),
        "GenEvalScore": {**genevals, "rule": "score", "training": True},
        "BLIP-VQA": {"class": "BLIPVQA", "model_id": "blip", "tasks": ["geneval"]},
        "Aesthetic": {
            "class": "Aesthetic",
            "clip_id": "aesthetic",
            "head": "aesthetic/head.safetensors",
            "scale": 10.0,
        },
    }
    split = "{split}"
    plain = {"splits": ["train", "test"], "held_out": 12}
    tasks = {
        "geneval": {
            "reward": "GenEval",
            "prompts": f"geneval/{split}_metadata.jsonl",
            "kind": "geneval",
            **plain,
        },
        "ocr": {"reward": "OCR", "prompts": f"ocr/{split}.txt", "kind": "quoted", **plain},
        "pickscore": {
            "reward": "PickScore",
            "prompts": f"pickscore_sfw/{split}.txt",
            "kind": "plain",
            **plain,
        },
        "deqa": {"reward": "DeQA" if server else "PickScore", "like": "pickscore"},
    }
    tasks["geneval"]["reward_weights"] = {"GenEvalScore": 1.0}
    benchmark = {
        "about": "Stable Diffusion 3.5's architecture, the rewards' own classes, all tiny and random.",
        "model": "model",
        "resolution": 64,
        "text_length": 128,
        "prompts": "prompts",
        "tasks": tasks,
        "rewards": rewards,
        "experts": {n: {"adapter": f"experts/{n}", "guidance": 1.5} for n in EXPERTS},
        "anchor": "deqa",
        "adapters": {"rank": 32, "alpha": 64.0, "targets": TARGETS},
        "mix": {
            "task_schedule": {"geneval": 3, "ocr": 1, "pickscore": 1},
            "auxiliary_rewards": {"DeQA" if server else "PickScore": 0.2},
        },
        "sampling": {
            "evaluation": {"steps": 3, "guidance": 1.5},
            "exploration": {"steps": 3, "kind": "sde", "guidance": 1.5},
            "distillation": {"steps": 3, "kind": "sde", "guidance": 1.5},
        },
    }
    path = folder / "dummy_model.yaml"
    path.write_text(yaml.safe_dump(benchmark, sort_keys=False))
    return path


if __name__ == "__main__":
    print(write_benchmark(Path(sys.argv[1]), *sys.argv[2:]))
