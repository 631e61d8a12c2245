"""A benchmark of the full-size kind with tiny random weights: Stable Diffusion 3.5's architecture,
experts as they are published, the rewards' own classes, and one reward behind a real server. Its
images and scores mean nothing: all of it has to run."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from dummy_rewards import write_aesthetic, write_blip_vqa, write_clip, write_mask2former
from safetensors.torch import save_file

from flowopd_lib import load_benchmark
from flowopd_lib.bench import TINY, write_pipeline
from flowopd_lib.benchmarks.benchmark import SHIPPED
from flowopd_lib.config import read_yaml
from flowopd_lib.lora import ATTENTION, linear_modules

TARGETS = [f"attn.{projection}" for projection in ATTENTION]
OBJECTS, COLORS = ("bench", "dog", "computer mouse", "tv remote"), ("red", "blue", "green")


def write_expert(folder: Path, modules: dict[str, tuple[int, int]], seed: int) -> None:
    """An adapter as Flow-GRPO's are published: PEFT's format, r = 32, alpha = 64, on the eight
    projections of the joint attention, attn2 left out."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, (inputs, outputs) in modules.items():
        if ".attn." in name and name.endswith(ATTENTION):
            for factor, shape in (("A", (32, inputs)), ("B", (outputs, 32))):
                key = f"base_model.model.{name}.lora_{factor}.weight"
                weights[key] = torch.randn(shape, generator=generator) * 0.02
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 32, "lora_alpha": 64, "target_modules": TARGETS}
    config["init_lora_weights"] = "gaussian"
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_prompts(folder: Path) -> None:
    """In Flow-GRPO's formats and under its names: the splits train and test."""
    for split, n in (("train", 28), ("test", 12)):
        lines = {
            task: [p.text for p in load_benchmark().prompts(task, split)[:n]]
            for task in ("ocr", "pickscore")
        }  # which its text encoders can read
        lines["geneval"] = [
            json.dumps(
                {
                    "tag": "colors",
                    "include": [{"class": OBJECTS[i % 4], "count": 1, "color": COLORS[i % 3]}],
                    "prompt": f"a photo of a {COLORS[i % 3]} {OBJECTS[i % 4]} and {split} {i}",
                }
            )
            for i in range(n)
        ]
        for task, name in (
            ("geneval", f"geneval/{split}_metadata.jsonl"),
            ("ocr", f"ocr/{split}.txt"),
            ("pickscore", f"pickscore_sfw/{split}.txt"),
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("\n".join(lines[task]) + "\n")


def write_benchmark(folder: Path, server: str) -> Path:
    """The benchmark's file: sd35.yaml with dummy models; `server`: the url of a reward server with
    `brightness`, as DeQA."""
    modules = linear_modules(write_pipeline(folder / "model", TINY, torch.float32).transformer)
    benchmark = read_yaml(SHIPPED / "sd35.yaml")
    for seed, (name, expert) in enumerate(benchmark["experts"].items()):
        write_expert(folder / "experts" / name, modules, seed)
        expert |= {"adapter": f"experts/{name}", "guidance": 1.5}
    write_prompts(folder / "prompts")
    for task in benchmark["tasks"].values():
        task |= {"val_from_train": 12} if "prompts" in task else {}
    write_mask2former(folder / "mask2former")
    write_clip(folder / "clip")
    write_aesthetic(folder / "aesthetic")
    write_blip_vqa(folder / "blip")
    rewards = benchmark["rewards"]
    detector = {"model_id": "mask2former", "clip_id": "clip", "side": 64}
    for name, settings in {
        "GenEval": {"detector": rewards["GenEval"]["detector"] | detector},
        "GenEvalScore": {"detector": rewards["GenEval"]["detector"] | detector},
        # of a part of the image: to look for text in a whole one takes a hundred times as long
        "OCR": {"region": [1, 17, 63, 47], "size": [64, 64]},
        "PickScore": {"model_id": "clip", "processor_id": "clip"},
        "DeQA": {"url": server, "reward": "Brightness", "scale": 1.0},
        "Aesthetic": {"clip_id": "aesthetic", "head": "aesthetic/head.safetensors"},
    }.items():
        rewards[name] |= settings
    del rewards["ImageReward"], rewards["HPS"]
    rewards["BLIP-VQA"] = {"class": "BLIPVQA", "model_id": "blip", "tasks": ["geneval"]}
    for sampler in benchmark["sampling"].values():
        sampler |= {"steps": 3, "guidance": 1.5}
    benchmark |= {"model": "model", "resolution": 64, "text_length": 128, "prompts": "prompts"}
    path = folder / "dummy_model.yaml"
    path.write_text(yaml.safe_dump(benchmark, sort_keys=False))
    return path
