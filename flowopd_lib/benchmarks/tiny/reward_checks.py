"""How often each reward is right on images and prompts that nothing was trained on, and clean
renders to compare samples with."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats

from ...data import Prompt
from ...rewards import score_images
from ...stats import GOLD, kernel_distance, mean_interval
from .data import preference_pair, to_tensor
from .scenes import DEGRADATIONS, EXTRA_CENTRES, LEVELS, Item, Scene, degrade, draw, lay_out, render
from .specs import PROMPT_COUNTS, PROMPT_TASKS, mutate, sample_specs

SURPLUS_RADIUS = 8.0
PATCH = 8  # pixels


def to_images(images) -> torch.Tensor:
    """(B, 3, 64, 64) in [0, 1]."""
    return to_tensor(list(images)) / 2 + 0.5


def with_surplus(scene: Scene) -> Scene:
    """The scene with one more object of the first one's kind, where there is room."""
    for x, y in EXTRA_CENTRES:
        if all(math.dist((x, y), (i.x, i.y)) > SURPLUS_RADIUS + i.r + 1 for i in scene.items):
            first = scene.items[0]
            new = Item(first.shape, first.color, x, y, SURPLUS_RADIUS)
            return replace(scene, items=(*scene.items, new))
    raise RuntimeError(f"no room for a surplus object in {scene}")


def known_answers(n: int, seed: int = 0) -> tuple[list[Prompt], torch.Tensor, torch.Tensor]:
    """GenEval prompts of the test split, a correct image of each, and one with a mistake."""
    specs, rng = sample_specs("geneval", "test", n, seed), random.Random(f"wrong/{seed}")
    right = to_images(render(s, seed) for s in specs)
    return [s.prompt for s in specs], right, to_images(render(mutate(s, rng), seed) for s in specs)


def shuffle_patches(images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """The patches of every image, in an order of its own."""
    generator, patches = torch.Generator().manual_seed(seed), F.unfold(images, PATCH, stride=PATCH)
    order = torch.rand(len(images), 1, patches.shape[2], generator=generator).argsort(-1)
    return F.fold(patches.take_along_dim(order, 2), images.shape[2:], PATCH, stride=PATCH)


def check_rewards(
    rewards: Mapping, n: int = 300, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two tables. The first has a row per test: reward, test, value, low, high (95 %), n, aim (NaN:
    none). The second has DeQA's score of every degraded image: kind, level, score. Gold rewards
    that are given are tested as the rewards are. What no reward was trained to tell from images
    (shuffled patches, a checkerboard) has no aim: it shows where the rewards cannot be trusted.

    Prompts are of the test split; the images are rendered, so what is correct is known.
    """
    rows = []

    def add(name: str, test: str, values, aim: float = math.nan, interval=()) -> None:
        mean, low, high = interval or mean_interval(np.asarray(values, float))
        about = dict(reward=name, test=test, value=mean, low=low, high=high)
        rows.append(about | dict(n=len(values), aim=aim))

    def with_gold(name: str) -> list[str]:
        return [r for r in (name, name + GOLD) if r in rewards]

    def score(name: str, images: torch.Tensor) -> np.ndarray:
        return score_images(rewards[name], images, prompts)

    prompts, right, wrong = known_answers(n, seed)
    specs = sample_specs("geneval", "test", n, seed)
    surplus = to_images(draw(with_surplus(lay_out(s, seed))) for s in specs)
    for name in with_gold("GenEval"):
        add(name, "accepts correct renders", score(name, right) > 0.5, 0.98)
        rejected = score(name, wrong) < 0.5
        add(name, "rejects renders of a wrong caption", rejected, 0.95)
        # GenEval's own rule allows them but where it counts: nothing to aim at
        aim = 0.95 if name.endswith(GOLD) else math.nan
        add(name, "rejects a surplus object", score(name, surplus) < 0.5, aim)
    if "GenEvalScore" in rewards:
        lower = score("GenEvalScore", surplus) < score("GenEvalScore", right)
        add("GenEvalScore", "is lower with a surplus object", lower, 0.95)

    specs = sample_specs("ocr", "test", n, seed)
    signs, prompts = to_images(render(s, seed) for s in specs), [s.prompt for s in specs]
    for name in with_gold("OCR"):
        read = rewards[name].read(signs, prompts)  # a score of 1 also allows letters around it
        exact = [text.lower() == spec.word.lower() for text, spec in zip(read, specs)]
        add(name, "reads clean signs exactly", exact, 0.95)

    pairs = [preference_pair(random.Random(f"pair/{seed}/{i}"), "test") for i in range(n)]
    texts, better, worse, likely = zip(*pairs)
    prompts = [Prompt(t, "pickscore") for t in texts]
    best = f"orders preference pairs (knowing the hidden preference: {np.mean(likely):.0%})"
    for name in with_gold("PickScore"):
        ordered = score(name, to_images(better)) > score(name, to_images(worse))
        add(name, best, ordered, 0.85)

    specs = [s for task in PROMPT_TASKS for s in sample_specs(task, "test", -(-n // 3), seed)]
    random.Random(seed).shuffle(specs)
    grades = list(itertools.islice(itertools.cycle(itertools.product(LEVELS, DEGRADATIONS)), n))
    images = to_images(
        degrade(render(s, seed), kind, level, i)
        for i, (s, (level, kind)) in enumerate(zip(specs, grades))
    )
    details = pd.DataFrame(grades, columns=["level", "kind"])
    levels, prompts = details["level"].to_numpy(), [s.prompt for s in specs[:n]]
    for name in with_gold("DeQA"):
        scores = score(name, images)
        if name == "DeQA":
            details["score"] = scores
        draws = np.random.default_rng(seed).integers(n, size=(1000, n))
        correlations = [stats.spearmanr(levels[d], scores[d]).statistic for d in draws]
        low, high = np.percentile(correlations, (2.5, 97.5))
        interval = stats.spearmanr(levels, scores).statistic, low, high
        add(name, "rank correlation with the true level", scores, 0.9, interval)

    clean, board = to_images(render(s, seed) for s in specs[:n]), np.indices(images.shape[2:])
    board = torch.from_numpy(board // PATCH).sum(0) % 2 * torch.ones_like(clean)
    for name in with_gold("PickScore"):
        higher = score(name, clean) > score(name, shuffle_patches(clean, seed))
        add(name, "prefers an image to its patches in random order", higher)
    for name in with_gold("DeQA"):
        add(name, "prefers an image to a checkerboard", score(name, clean) > score(name, board))
    return pd.DataFrame(rows), details


def clean_renders(task: str, split: str, n: int, seed: int = 0) -> torch.Tensor:
    """(n, 3, 64, 64) in [0, 1]: a correct, clean image of each of the first `n` prompts of a split,
    what samples should be like."""
    specs = sample_specs(task, split, PROMPT_COUNTS[split])[:n]
    return to_images(render(spec, seed + i) for i, spec in enumerate(specs))


def render_distance(
    table: pd.DataFrame, embed: Callable[[torch.Tensor], np.ndarray], seed: int = 0
) -> pd.DataFrame:
    """How far every model's samples are from clean renders of the same prompts (`kernel_distance`):
    model, mean, low, high (95 %), n.

    `table` is `evaluate`'s, with the same `embed`, over the first test prompts of each task; of
    several trainings (`train_seed`) the first counts.
    """
    first = table[table["repeat"] == table["repeat"].min()]
    first = first[first["train_seed"] == 0] if "train_seed" in first else first
    counts = first[first["model"] == first["model"].iloc[0]].groupby("task", sort=False).size()
    clean = embed(torch.cat([clean_renders(task, "test", n, seed) for task, n in counts.items()]))
    rows = []
    for model, samples in first.groupby("model", sort=False):
        mean, low, high = kernel_distance(np.stack(samples["embedding"]), clean)
        rows.append(dict(model=model, mean=mean, low=low, high=high, n=len(samples)))
    return pd.DataFrame(rows)
