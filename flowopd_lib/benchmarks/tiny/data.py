"""What the small benchmark is trained on: noisy captioned images, graded images and preference
pairs."""

from __future__ import annotations

import math
import random
import string
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from .scenes import DEGRADATIONS, LEVELS, SIZE, Scene, accompany, degrade, draw, lay_out
from .specs import (
    COLORS,
    FINISHES,
    PROMPT_TASKS,
    RELATIONS,
    SCENERIES,
    SHAPES,
    Spec,
    random_spec,
    split_of,
)


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """PIL images to (B, 3, H, W) in [-1, 1]."""
    return (
        torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2).float()
        / 127.5
        - 1
    )


TASK_WEIGHTS = {"geneval": 0.5, "ocr": 0.3, "pickscore": 0.2}


def split_spec(rng: random.Random, split: str = "train", task_weights: dict = TASK_WEIGHTS) -> Spec:
    """A draw from one split: whoever trains on "train" never sees a val, test or OOD prompt."""
    while True:
        spec = random_spec(
            rng, rng.choices(PROMPT_TASKS, [task_weights[t] for t in PROMPT_TASKS])[0]
        )
        if split_of(spec) == split:
            return spec


def mutate(spec: Spec, rng: random.Random) -> Spec:
    """The same prompt got wrong in one respect (a sign: mostly all of its word): what a wrong
    caption describes, and what a reward must notice."""
    if spec.word and rng.random() < 0.7:
        return replace(spec, word="".join(rng.choices(string.ascii_uppercase, k=len(spec.word))))
    if spec.word:
        i = rng.randrange(len(spec.word))
        other = rng.choice([c for c in string.ascii_uppercase if c != spec.word[i]])
        return replace(spec, word=spec.word[:i] + other + spec.word[i + 1 :])
    ways = ["shape"]
    if spec.count > 1:
        ways += ["count"] * 3
    if spec.relation:
        ways += ["relation"] * 3
    if any(color for _, color in spec.objects):
        ways += ["color"] * 2
    if spec.tag == "style":
        ways += ["background", "finish"]
    way = rng.choice(ways)
    if way == "count":
        return replace(spec, count=rng.choice([n for n in (2, 3, 4) if n != spec.count]))
    if way == "relation":
        return replace(spec, relation=rng.choice([r for r in RELATIONS if r != spec.relation]))
    if way == "background":
        return replace(spec, background=rng.choice([b for b in SCENERIES if b != spec.background]))
    if way == "finish":
        return replace(spec, finish=rng.choice([f for f in FINISHES if f != spec.finish]))
    i = rng.randrange(len(spec.objects))
    objects, (shape, color) = list(spec.objects), spec.objects[i]
    if way == "shape":
        shape = rng.choice([s for s in SHAPES if s not in [o[0] for o in objects]])
    else:
        color = rng.choice([c for c in COLORS if c not in [o[1] for o in objects]])
    objects[i] = (shape, color)
    return replace(spec, objects=tuple(objects))


def mistake(spec: Spec, rng: random.Random) -> Spec:
    """`mutate`, but never into what is held out for the OOD split, not even as the image of a
    wrong caption."""
    other = mutate(spec, rng)
    return spec if split_of(other) == "ood" else other


ACCOMPANIED = 0.4  # of the images in a style that show more than their caption says


def noisy_example(
    rng: random.Random,
    wrong: dict[str, float] | None = None,
    spoiled: float = 0.0,
    other: float = 0.0,
    task_weights: dict = TASK_WEIGHTS,
) -> tuple[str, Image.Image]:
    """One caption and image of the web: with probability `wrong[task]` the image is of another
    prompt of the task (with probability `other`) or gets the caption wrong in one respect; with
    probability `spoiled` it is blurred, noisy, blocky or pale."""
    spec = truth = split_spec(rng, task_weights=task_weights)
    if rng.random() < (wrong or {}).get(spec.task, 0.0):
        if rng.random() < other:
            truth = split_spec(
                rng, task_weights=dict.fromkeys(PROMPT_TASKS, 0.0) | {spec.task: 1.0}
            )
        else:
            truth = mistake(spec, rng)
    scene = lay_out(truth, rng.getrandbits(32))
    if spec.task == "pickscore" and rng.random() < ACCOMPANIED:
        scene = accompany(scene, rng, rng.randint(1, 3))
    image = draw(scene)
    if rng.random() < spoiled:
        image = degrade(
            image, rng.choice(DEGRADATIONS), rng.choice(LEVELS[1:]), rng.getrandbits(32)
        )
    return spec.text, image


def graded_image(rng: random.Random, split: str = "train") -> tuple[Image.Image, int]:
    """One image for the quality task and its level, 1 (bad) to 5 (untouched)."""
    level = rng.choice(LEVELS)
    image = draw(lay_out(split_spec(rng, split), rng.getrandbits(32)))
    return degrade(image, rng.choice(DEGRADATIONS), level, rng.getrandbits(32)), level


@dataclass(frozen=True)
class Candidate:
    """One image offered for a prompt, and how much the benchmark's hidden reward likes it."""

    image: Image.Image
    utility: float


def candidate(spec: Spec, rng: random.Random) -> Candidate:
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
    return Candidate(image, utility(spec, scene, level, truth == spec))


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


# what a right image of things is worth to people, and a sign with all its letters right
MATCH, SIGN = 0.4, 3.0


SHARPNESS = (
    6.0  # of the hidden reward: P(a preferred to b) = sigmoid(SHARPNESS * (utility_a - utility_b))
)


def preference_pair(
    rng: random.Random, split: str = "train"
) -> tuple[str, Image.Image, Image.Image, float]:
    """A caption, the preferred image, the other, and the probability with which the better one is
    preferred."""
    spec = split_spec(rng, split)
    a, b = candidate(spec, rng), candidate(spec, rng)
    p = 1 / (1 + math.exp(-SHARPNESS * (a.utility - b.utility)))
    if rng.random() > p:
        a, b = b, a
    return spec.text, a.image, b.image, max(p, 1 - p)
