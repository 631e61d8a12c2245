"""A trained adapter for others to use: a folder with `pytorch_lora_weights.safetensors`, which
`StableDiffusion3Pipeline.load_lora_weights` reads, ranks and alphas included, and a model card,
`README.md`, with base, recipe, data and licence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from .benchmarks import DEFAULT, load_benchmark
from .config import read_yaml
from .files import read_lines, write_whole
from .lora import PEFT_FILE, read_adapter, write_diffusers
from .train import METRICS

METHODS = {
    "opd": "on-policy distillation (Flow-OPD, arXiv 2605.08063)",
    "grpo": "GRPO (Flow-GRPO, arXiv 2505.05470)",
    "sft": "supervised fine-tuning on samples of its teachers",
}
CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
tags: [lora, flow-matching, flow-opd]
license: {license!r}
{base_model}---

# A LoRA adapter trained with flowopd_lib

For **{base}**, by {method}: {iterations} iterations on
the training prompts of {tasks} of the benchmark {benchmark}; no images but the model's own.

```python
pipeline.load_lora_weights(FOLDER)
```

## Recipe

```yaml
{recipe}```

## Licence

{license}. An adapter also follows the terms of its base and, if it was distilled, of its teachers.
"""


def export_training(folder: str | Path, out: str | Path, license: str) -> Path:
    """Write the adapter of a finished training into `out`, a new folder.

    `license`: its name on the hub, such as apache-2.0. Raises ValueError for a folder that is not
    empty, and FileNotFoundError for a training that has not finished.
    """
    folder, out = Path(folder), Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty; give a new folder")
    if not (folder / "adapter").is_dir():
        raise FileNotFoundError(f"{folder} has no adapter/: has the training finished?")
    recipe = read_yaml(folder / "recipe.yaml")
    benchmark = load_benchmark(recipe.get("benchmark", DEFAULT))
    base = benchmark.base_name
    kind = next(key for key in METHODS if recipe.get(key) is not None)
    tasks = (recipe.get("schedule") or recipe[kind]).get("tasks") or (
        benchmark.prompt_tasks if kind == "grpo" else benchmark.distilled_tasks
    )
    card = CARD.format(
        base_model=f"base_model: {base}\n" if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else "",
        base=base,
        method=METHODS[kind],
        iterations=len(read_lines(folder / METRICS)),
        tasks=", ".join(tasks),
        benchmark=benchmark.name,
        recipe=yaml.safe_dump(without_paths(recipe), sort_keys=False),
        license=license,
    )
    modules = adapted_modules(folder / "adapter" / PEFT_FILE)
    write_diffusers(read_adapter(folder / "adapter", modules), out)
    write_whole(out / "README.md", card)
    return out


def without_paths(node: Any) -> Any:
    """Of each absolute path, which is of this machine, the last two names."""
    if isinstance(node, dict):
        return {key: without_paths(value) for key, value in node.items()}
    if isinstance(node, list):
        return [without_paths(value) for value in node]
    is_path = isinstance(node, str) and Path(node).is_absolute()
    return "/".join(Path(node).parts[-2:]) if is_path else node


def adapted_modules(weights: Path) -> dict[str, tuple[int, int]]:
    """{module name: (in, out)} by an adapter's own file, because the base, which it was trained
    on, need not be on this machine."""
    tensors, modules = load_file(weights), {}
    for key, a in tensors.items():
        name, separator, _ = key.removeprefix("base_model.model.").partition(".lora_A.")
        if separator:
            b = tensors[key.replace(".lora_A.", ".lora_B.")]
            modules[name] = a.shape[1], b.shape[0]
    return modules
