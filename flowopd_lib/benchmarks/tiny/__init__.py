"""The small benchmark: scenes to build, prompts, a trained base and rewards; benchmark.yaml says
what is what."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parents[2] / "assets"
BASE, PROMPTS, EXPERTS = ASSETS / "tiny-sd3", ASSETS / "prompts", ASSETS / "experts"
