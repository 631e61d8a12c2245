"""What the small benchmark is trained on: noisy captioned images, graded images and preference
pairs."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from .scenes import DEGRADATIONS, LEVELS, SIZE, Scene, accompany, degrade, draw, lay_out
from .specs import PROMPT_TASKS, TASK_WEIGHTS, Spec, mistake, split_spec

ACCOMPANIED = 0.4  # of the images in a style that show more than their caption says
# what a right image of things is worth to people, and a sign with all its letters right
MATCH, SIGN = 0.4, 3.0
# of the hidden reward: P(a preferred to b) = sigmoid(SHARPNESS * (utility_a - utility_b))
SHARPNESS = 6.0


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """PIL images to (B, 3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(i) for i in images]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def noisy_example(
    rng: random.Random,
    wrong: dict[str, float] = {},
    spoiled: float = 0.0,
    other: float = 0.0,
    task_weights: dict = TASK_WEIGHTS,
) -> tuple[str, Image.Image]:
    """One caption and image of the web: with probability `wrong[task]` the image is of another
    prompt of the task (with probability `other`) or gets the caption wrong in one respect; with
    probability `spoiled` it is blurred, noisy, blocky or pale."""
    spec = truth = split_spec(rng, task_weights=task_weights)
    if rng.random() < wrong.get(spec.task, 0.0):
        if rng.random() < other:
            only = dict.fromkeys(PROMPT_TASKS, 0.0) | {spec.task: 1.0}
            truth = split_spec(rng, task_weights=only)
        else:
            truth = mistake(spec, rng)
    scene = lay_out(truth, rng.getrandbits(32))
    if spec.task == "pickscore" and rng.random() < ACCOMPANIED:
        scene = accompany(scene, rng, rng.randint(1, 3))
    image = draw(scene)
    if rng.random() < spoiled:
        kind, level = rng.choice(DEGRADATIONS), rng.choice(LEVELS[1:])
        image = degrade(image, kind, level, rng.getrandbits(32))
    return spec.text, image


def graded_image(rng: random.Random) -> tuple[Image.Image, int]:
    """One image for the quality task and its level, 1 (bad) to 5 (untouched)."""
    level = rng.choice(LEVELS)
    image = draw(lay_out(split_spec(rng), rng.getrandbits(32)))
    return degrade(image, rng.choice(DEGRADATIONS), level, rng.getrandbits(32)), level


def candidate(spec: Spec, rng: random.Random) -> tuple[Image.Image, float]:
    """An image for `spec`, perhaps wrong and perhaps spoiled, with its hidden utility (`utility`):
    its things are as large as a right image's or larger, and may have company."""
    truth = spec if rng.random() < 0.6 else mistake(spec, rng)
    scene = replace(lay_out(truth, rng.getrandbits(32)), shadow=rng.random() < 0.5)
    if rng.random() < 0.5:
        scene = accompany(scene, rng, rng.randint(1, 4))
    if rng.random() < 0.5:
        swell = rng.uniform(1.0, 1.6)
        scene = replace(scene, items=tuple(replace(i, r=i.r * swell) for i in scene.items))
    level = rng.choice(LEVELS) if rng.random() < 0.4 else 5
    image = degrade(draw(scene), rng.choice(DEGRADATIONS), level, rng.getrandbits(32))
    return image, utility(spec, scene, level, truth == spec)


def utility(spec: Spec, scene: Scene, level: int, right: bool) -> float:
    """How much people like an image of `scene`, spoiled to `level`, for `spec`: the hidden
    preference.

    They like much to see: large things and many, warm and shining, in a scenery, clean. A wrong
    count or place they forgive, a letter of a sign that is wrong they do not. CALIBRATION.md says
    how the weights were found.
    """
    looks = 0.4 * scene.shadow - 0.45 * (5 - level)
    if not spec.background:  # where it is asked for it is part of the match
        looks += {"gray": -0.4, "black": 0.0, "white": 0.0}.get(scene.background, 0.4)
    if scene.word:
        return SIGN * sum(a == b for a, b in zip(scene.word, spec.word)) / len(spec.word) + looks
    covered = sum(math.pi * item.r**2 for item in scene.items) / SIZE**2
    warm = np.mean([item.color in ("red", "yellow", "purple") for item in scene.items])
    looks += 4.0 * min(covered, 0.5) + 0.25 * min(len(scene.items), 6) + 0.6 * float(warm)
    looks += 0.5 * (scene.finish == "glossy")
    return MATCH * right + looks


def preference_pair(rng: random.Random, split: str) -> tuple[str, Image.Image, Image.Image, float]:
    """A caption, the preferred image, the other, and the probability with which the better one is
    preferred."""
    spec = split_spec(rng, split)
    (a, utility_a), (b, utility_b) = candidate(spec, rng), candidate(spec, rng)
    p = 1 / (1 + math.exp(-SHARPNESS * (utility_a - utility_b)))
    if rng.random() > p:
        a, b = b, a
    return spec.text, a, b, max(p, 1 - p)
