"""The small world: scenes, prompts, a trained base model and judges, all inside the package.

This is the only place that knows the world is small; everything else takes a model id, a prompt folder and
judges.
"""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parents[2] / "assets"
BASE, PROMPTS, EXPERTS = ASSETS / "tiny-sd3", ASSETS / "prompts", ASSETS / "experts"

from .judging import clean_renders, judge_judges, render_distance  # noqa: E402,F401


def judges() -> dict:
    """The four judges of the small world, by name."""
    from ...rewards import (  # here: they load models, and the build runs before there are any
        OCR,
        DeQA,
        GenEval,
        PickScore,
    )
    from .detector import ShapeDetector
    from .scenes import SIGN_BOX, SIZE

    return {
        "GenEval": GenEval(ShapeDetector()),
        "OCR": OCR(region=SIGN_BOX, size=(SIZE, SIZE)),
        "PickScore": PickScore(ASSETS / "pickscore"),
        "DeQA": DeQA(ASSETS / "deqa"),
    }


def first_prompts(split: str, n: int) -> list:
    """The first `n` prompts of every task of a split, one list."""
    from ...prompts import TASKS, load_prompts

    return [p for task in TASKS for p in load_prompts(PROMPTS, task, split)[:n]]


def load_experts(policy) -> tuple[str, ...]:
    """Load the four experts into a policy on `BASE`, under the names of their rewards; the names."""
    names = ("geneval", "ocr", "pickscore", "deqa")
    for name in names:
        policy.load_adapter(name, EXPERTS / name)
    return names


def merged_policy(method: str = "svd", dtype: str = "auto"):
    """A policy on `BASE` with the four experts and `merged`, their average of rank 32 (`method`: see
    `merge`): where students start."""
    from ...merge import merge
    from ...policy import FlowPolicy

    policy = FlowPolicy(BASE, dtype=dtype)
    merge(policy, load_experts(policy), "merged", method, rank=32)
    return policy


def training_judges() -> dict:
    """The judges, and `GenEvalPartial`, which gives credit for a part of what a prompt asks for."""
    from ...rewards import GenEval
    from .detector import ShapeDetector

    return {**judges(), "GenEvalPartial": GenEval(ShapeDetector(), partial=True)}
