"""A trained adapter as others take it: `python -m flowopd_lib.export runs/student --out
student-lora --license apache-2.0`.

The folder has `pytorch_lora_weights.safetensors`, which
`StableDiffusion3Pipeline.load_lora_weights` reads, ranks and alphas included, and a model card,
`README.md`, that says what it was made of: base, recipe, scores, data, licence.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from .adapters import write_diffusers
from .benchmarks import load_benchmark
from .benchmarks.benchmark import DEFAULT
from .files import read_lines, write_whole
from .inputs import read_yaml
from .policy import FlowPolicy


def export(
    policy: FlowPolicy,
    adapter: str,
    folder: str | Path,
    recipe: Mapping,
    license: str,
    base: str = "",
    scores: Sequence[Mapping] = (),
    updates: int | None = None,
) -> Path:
    """Write one adapter of `policy` in diffusers' format, with its card.

    `recipe` as in `recipes`; `scores` are records of `model_scores` (reward, mean, low, high, n).
    Raises ValueError for a licence without a name.
    """
    if not license.strip():
        raise ValueError(
            "a model card needs a licence, such as apache-2.0, or that of the base: an adapter follows its "
            "base's terms"
        )
    folder = Path(folder)
    write_diffusers(policy.adapter(adapter), folder)
    write_whole(
        folder / "README.md",
        card(
            recipe,
            license,
            base or load_benchmark(recipe.get("benchmark", DEFAULT)).base_name,
            scores,
            updates,
        ),
    )
    return folder


def card(
    recipe: Mapping, license: str, base: str, scores: Sequence[Mapping], updates: int | None
) -> str:
    """The model card's text, with the metadata that the hub reads."""
    about = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["lora", "flow-matching", "flow-opd"],
        "license": license,
        **({"base_model": base} if "/" in base and " " not in base else {}),
    }
    how = (
        "on-policy distillation (Flow-OPD, 2605.08063)"
        if "opd" in recipe
        else "GRPO (Flow-GRPO, 2505.05470)"
        if "grpo" in recipe
        else "an unknown way"
    )
    schedule = recipe.get("schedule", {})
    data = (
        f"Prompts of {', '.join(schedule.get('tasks', ['geneval', 'ocr', 'pickscore']))}, split train, of "
        f"the benchmark {recipe.get('benchmark', DEFAULT)}; no pictures but the model's own."
    )
    table = ["Not evaluated, or the scores were not given to `export`."]
    if scores:
        table = [
            "| reward | mean [95 % interval] | n |",
            "|---|---|---|",
            *(
                f"| {s['reward']} | {s['mean']:.3f} [{s['low']:.3f}, {s['high']:.3f}] | {s['n']} |"
                for s in scores
            ),
        ]
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(about, sort_keys=False)}---",
            "",
            "# A LoRA adapter trained by Flow-OPD lab",
            "",
            f"For **{base}**, by {how}{f', {updates} iterations' if updates else ''}.",
            "",
            "```python",
            "pipeline.load_lora_weights(FOLDER)",
            "```",
            "",
            "## Scores",
            "",
            *table,
            "",
            "## Data",
            "",
            data,
            "",
            "## Recipe",
            "",
            "```yaml",
            yaml.safe_dump(dict(recipe), sort_keys=False).strip(),
            "```",
            "",
            "## Licence",
            "",
            f"{license}. An adapter also follows the terms of its base and, where it was distilled, of its "
            "teachers.",
            "",
        ]
    )


def scores_of(path: Path, model: str) -> list[dict]:
    """A model's records in a notebook's `results.json`. Raises ValueError where there are none."""
    record = json.loads(path.read_text())
    rows = [
        r
        for r in record.get("scores", [])
        if isinstance(r, dict) and r.get("model") == model and "reward" in r
    ]
    if not rows:
        there = sorted(
            {str(r.get("model")) for r in record.get("scores", []) if isinstance(r, dict)}
        )
        raise ValueError(
            f"{path} has no scores of {model!r}; it has those of {', '.join(there) or 'nothing'}"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flowopd_lib.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "training",
        type=Path,
        help="the folder of a finished training, with adapter/ and recipe.yaml",
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--license", required=True, help="the licence's name on the hub, such as apache-2.0"
    )
    parser.add_argument("--base", default="", help="the base's name, if not the recipe's")
    parser.add_argument(
        "--scores",
        type=Path,
        help="a results.json with the model's scores, such as a run's 05_opd/results.json",
    )
    parser.add_argument("--model", default="student", help="its name in those scores")
    args = parser.parse_args()
    try:
        if args.out.exists() and any(args.out.iterdir()):
            raise ValueError(f"{args.out} is there already and not empty; give a new folder")
        if not (args.training / "adapter").is_dir():
            raise FileNotFoundError(f"{args.training} has no adapter/: is the training over?")
        recipe = read_yaml(args.training / "recipe.yaml")
        scores = scores_of(args.scores, args.model) if args.scores else []
        policy = load_benchmark(recipe.get("benchmark", DEFAULT)).policy()
        policy.load_adapter("exported", args.training / "adapter")
        print(
            export(
                policy,
                "exported",
                args.out,
                recipe,
                args.license,
                args.base,
                scores,
                len(read_lines(args.training / "metrics.jsonl")),
            )
        )
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
