"""One training in stages, each with more time than the one before it.

What is kept of a training that has ended is its adapter, not its optimizer's state (`jobs.kept`). So a stage
is a training of its own, found again by itself, that goes on from the adapter of the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Adam knows nothing of the gradients before: its first updates, of 2 in an iteration, are let in slowly.
WARMUP = 20


def stages_of(budgets: Mapping[str, int]) -> list[tuple[str, int, str, int]]:
    """(name, iterations in all, name of the stage before and its iterations, "" and 0 for the first) in their
    order. Raises ValueError for two of the same length: the later would have nothing to do."""
    inorder = sorted(budgets.items(), key=lambda item: item[1])
    for (first, one), (second, other) in zip(inorder, inorder[1:]):
        if one == other:
            raise ValueError(
                f"budgets gives {first} and {second} the same {one} iterations, and each goes on from the "
                "one before it: leave one out, or give it more"
            )
    return [(*stage, *before) for stage, before in zip(inorder, [("", 0), *inorder])]


def go_on(recipe: Mapping[str, Any], adapter: str, begun: int) -> dict[str, Any]:
    """The recipe of the stage that follows `begun` iterations and ends where `recipe` does, from the folder
    of an adapter, with prompts and noise that were not there before."""
    train = {
        **recipe["train"],
        "iterations": recipe["train"]["iterations"] - begun,
        "warmup": WARMUP,
    }
    return {
        **recipe,
        "student": {"load": adapter},
        "seed": recipe.get("seed", 0) + begun,
        "train": train,
    }
