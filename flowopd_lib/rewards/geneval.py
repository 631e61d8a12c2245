"""GenEval's rule (Ghosh et al. 2023, evaluation/evaluate_images.py) over the detections of any detector.

All or nothing per prompt: every included object must be there in its number, colour and relative position,
and no excluded number of objects may be reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ..prompts import Prompt
from .base import as_uint8

POSITION_MARGIN = (
    0.1  # GenEval's POSITION_THRESHOLD: how far apart, in object sizes, "left of" begins
)


@dataclass(frozen=True)
class Detection:
    """One object: its class, colour name (None: no colour told), confidence, and box
    (left, top, right, bottom)."""

    label: str
    color: str | None
    score: float
    box: tuple[float, float, float, float]


class Detector(Protocol):
    """Finds objects. `threshold` and `counting_threshold` are the confidences GenEval's rule takes from it;
    `name` is what a table of GenEval scores says they were found by."""

    name: str
    threshold: float
    counting_threshold: float
    labels: Sequence[str]
    colors: Sequence[str]
    size: tuple[int, int] | None

    def __call__(self, images: np.ndarray) -> list[list[Detection]]: ...


def relations(a: Detection, b: Detection) -> set[str]:
    """Where `a` lies as seen from `b`: GenEval's margin first, then more than half of the (normalised)
    offset."""
    box_a, box_b = (np.reshape(d.box, (2, 2)) for d in (a, b))
    offset = box_a.mean(0) - box_b.mean(0)
    margin = POSITION_MARGIN * (np.ptp(box_a, axis=0) + np.ptp(box_b, axis=0))
    revised = np.maximum(np.abs(offset) - margin, 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    return {
        name
        for name, holds in {
            "left of": dx < -0.5,
            "right of": dx > 0.5,
            "above": dy < -0.5,
            "below": dy > 0.5,
        }.items()
        if holds
    }


def _by_class(
    record, detections, threshold, counting_threshold, max_objects
) -> dict[str, list[Detection]]:
    """The detections that count, the surest first."""
    least = counting_threshold if record["tag"] == "counting" else threshold
    found: dict[str, list[Detection]] = {}
    for d in sorted(detections, key=lambda d: -d.score):
        if d.score > least and len(found.setdefault(d.label, [])) < max_objects:
            found[d.label].append(d)
    return found


def reward(
    record: dict,
    detections: Sequence[Detection],
    threshold: float,
    counting_threshold: float,
    max_objects: int = 16,
    exact: bool = False,
) -> tuple[bool, str]:
    """GenEval's verdict on one picture and, if wrong, why. `exact`: nothing may be there beside what is asked
    for."""
    found = _by_class(record, detections, threshold, counting_threshold, max_objects)
    reasons, groups = [], []
    for wanted in record["include"]:
        name, count = wanted["class"], wanted["count"]
        group = found.get(name, [])[:count]
        matched = len(group) == count
        if not matched:
            reasons.append(f"expected {count} {name}, found {len(group)}")
        elif "color" in wanted and sum(d.color == wanted["color"] for d in group) < count:
            matched = False
            reasons.append(
                f"expected {wanted['color']} {name}, found {', '.join(str(d.color) for d in group)}"
            )
        elif "position" in wanted:
            relation, target = wanted["position"]
            if groups[target] is None:
                matched = False
                reasons.append(f"no target for {name} to be {relation}")
            elif any(relation not in relations(a, b) for a in group for b in groups[target]):
                matched = False
                reasons.append(f"expected {name} {relation} the other, found it elsewhere")
        groups.append(group if matched else None)
    for unwanted in record.get("exclude", []):
        number = len(found.get(unwanted["class"], []))
        if number >= unwanted["count"]:
            reasons.append(
                f"expected fewer than {unwanted['count']} {unwanted['class']}, found {number}"
            )
    if exact:
        asked, there = sum(w["count"] for w in record["include"]), sum(map(len, found.values()))
        if there > asked:
            reasons.append(f"expected {asked} in all, found {there}")
    return not reasons, "; ".join(reasons)


def score(
    record: dict,
    detections: Sequence[Detection],
    threshold: float,
    counting_threshold: float,
    max_objects: int = 16,
) -> float:
    """Flow-GRPO's training reward (yifan123/reward-server, `evaluate_reward`): the mean of terms, 1 at most.

    Every included class adds `1 - |asked - found| / asked` with all of that class found, in every tag: one
    object too many costs as much as one too few. Its colour and its position add a term each, which count
    only if the number is exact; otherwise both together add one 0. A wrong position adds a 0 and, by a slip of
    that code, a 1.
    """
    found = _by_class(record, detections, threshold, counting_threshold, max_objects)
    terms, groups = [], []
    for wanted in record["include"]:
        group, count = found.get(wanted["class"], []), wanted["count"]
        terms.append(1 - abs(count - len(group)) / count)
        matched = len(group) == count
        if not matched and ("color" in wanted or "position" in wanted):
            terms.append(0.0)
        if matched and "color" in wanted:
            right = sum(d.color == wanted["color"] for d in group)
            terms.append(1 - abs(count - right) / count)
            matched = right == count
        if matched and "position" in wanted:
            relation, target = wanted["position"]
            if groups[target] is None:
                matched = False
                terms.append(0.0)
            else:
                matched = all(relation in relations(a, b) for a in group for b in groups[target])
                terms += [1.0] if matched else [0.0, 1.0]
        groups.append(group if matched else None)
    return sum(terms) / len(terms)


RULES = ("correct", "score", "exact")


class GenEval:
    """GenEval over the detections of any detector; scores are comparable with those of the same detector only
    (`detector.name`). `rule` is one of

    correct  GenEval's: 1 if the image shows what the prompt's metadata asks for, else 0
    score    Flow-GRPO's training reward (see `score`), to train on, never to report
    exact    the gold reward: `correct`, and nothing in the image that the prompt does not ask for. GenEval forbids
             surplus objects only where a prompt counts, so a model trained on it can draw more of them
    """

    name, range, tasks = "GenEval", (0.0, 1.0), ("geneval",)

    def __init__(self, detector: Detector, rule: str = "correct"):
        if rule not in RULES:
            raise ValueError(f"unknown rule {rule!r} of GenEval: choose one of {', '.join(RULES)}")
        self.detector, self.rule, self.training = detector, rule, rule == "score"
        if self.training:
            self.range = (-14.0, 1.0)  # 16 objects of a class where one was asked for

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        if self.rule == "score":
            thresholds = self.detector.threshold, self.detector.counting_threshold
            found = self._detect(images, prompts)
            return np.array(
                [score(p.metadata, f, *thresholds) for p, f in zip(prompts, found)], np.float32
            )
        return np.array([right for right, _ in self.explain(images, prompts)], np.float32)

    def explain(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> list[tuple[bool, str]]:
        """The verdict on each picture and what was wrong. Raises ValueError for a prompt without GenEval
        metadata."""
        return [
            reward(
                prompt.metadata,
                found,
                self.detector.threshold,
                self.detector.counting_threshold,
                exact=self.rule == "exact",
            )
            for prompt, found in zip(prompts, self._detect(images, prompts))
        ]

    def _detect(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> list[list[Detection]]:
        pixels = as_uint8(images, prompts, self.name, self.detector.size)
        for prompt in prompts:
            if not {"tag", "include"} <= set(prompt.metadata):
                raise ValueError(
                    f"GenEval needs metadata (tag, include) with the prompt {prompt.text!r}; load it from a "
                    "GenEval .jsonl file"
                )
            for wanted in prompt.metadata["include"]:
                if wanted["class"] not in self.detector.labels:
                    raise ValueError(
                        f"the detector does not know {wanted['class']!r}, asked for by {prompt.text!r}; it "
                        f"knows {', '.join(self.detector.labels)}"
                    )
                if wanted.get("color", self.detector.colors[0]) not in self.detector.colors:
                    raise ValueError(
                        f"the detector does not know the colour {wanted['color']!r}, asked for by "
                        f"{prompt.text!r}; it knows {', '.join(self.detector.colors)}"
                    )
        return self.detector(pixels)
