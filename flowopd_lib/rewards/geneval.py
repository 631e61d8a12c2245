"""GenEval's rule (Ghosh et al. 2023, evaluation/evaluate_images.py) over the detections of any
detector, and its detector with transformers.

The public scorer runs mmdetection's training of the detector's architecture on the same data. The
one here is another checkpoint under the same rule, so its scores belong in tables under its own
name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from pydantic import validate_call

from ..data import Prompt
from .base import as_uint8, batches, load_clip, load_frozen, loading
from .server import COLORS, ColorClassifier

POSITION_MARGIN = 0.1  # GenEval's POSITION_THRESHOLD, in object sizes: "left of" starts beyond it
MAX_OBJECTS = 16  # of a class in an image; the rule ignores further ones
# GenEval's names of COCO's classes, where COCO or the published config have others
GENEVAL_NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


@dataclass(frozen=True)
class Detection:
    """One object: its class, colour (None: unknown), confidence, and box (left, top, right,
    bottom)."""

    label: str
    color: str | None
    score: float
    box: tuple[float, float, float, float]


def relations(a: Detection, b: Detection) -> set[str]:
    """Where `a` lies as seen from `b`: GenEval's margin first, then more than half of the
    normalised offset."""
    box_a, box_b = (np.reshape(d.box, (2, 2)) for d in (a, b))
    offset = box_a.mean(0) - box_b.mean(0)
    margin = POSITION_MARGIN * (np.ptp(box_a, axis=0) + np.ptp(box_b, axis=0))
    revised = np.maximum(np.abs(offset) - margin, 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, value in holds.items() if value}


def in_relation(group: Sequence[Detection], relation: str, others: Sequence[Detection]) -> bool:
    return all(relation in relations(a, b) for a in group for b in others)


def counted_objects(record: dict, detections: Sequence[Detection], detector) -> dict[str, list]:
    """The detections that the rule counts for a GenEval record, by class, by falling confidence."""
    counting = record["tag"] == "counting"
    threshold = detector.counting_threshold if counting else detector.threshold
    objects: dict[str, list[Detection]] = {}
    for d in sorted(detections, key=lambda d: -d.score):
        if d.score > threshold and len(objects.setdefault(d.label, [])) < MAX_OBJECTS:
            objects[d.label].append(d)
    return objects


def verdict(record: dict, objects: dict[str, list], exact: bool = False) -> tuple[bool, str]:
    """Whether an image with these `counted_objects` is correct by GenEval and, if not, why.

    All or nothing: every included object must be there in its number, colour and relative position,
    and no excluded number of objects may be reached; with `exact`, there may be no objects beyond
    the included ones.
    """
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []  # None: the requirement is not met
    for wanted in record["include"]:
        name, count, faults = wanted["class"], wanted["count"], len(reasons)
        group = objects.get(name, [])[:count]
        colors = [d.color for d in group]
        if len(group) < count:
            reasons.append(f"expected {count} {name}, found {len(group)}")
        elif "color" in wanted and colors.count(wanted["color"]) < count:
            found = ", ".join(map(str, colors))
            reasons.append(f"expected {wanted['color']} {name}, found {found}")
        elif "position" in wanted:
            relation, target = wanted["position"]
            if groups[target] is None:
                reasons.append(f"no target for {name} to be {relation}")
            elif not in_relation(group, relation, groups[target]):
                reasons.append(f"expected {name} {relation} the other, found it elsewhere")
        groups.append(group if len(reasons) == faults else None)
    for excluded in record.get("exclude", []):
        name, count = excluded["class"], excluded["count"]
        number = len(objects.get(name, []))
        if number >= count:
            reasons.append(f"expected fewer than {count} {name}, found {number}")
    count, number = sum(w["count"] for w in record["include"]), sum(map(len, objects.values()))
    if exact and number > count:
        reasons.append(f"expected {count} in all, found {number}")
    return not reasons, "; ".join(reasons)


def score(record: dict, objects: dict[str, list]) -> float:
    """Flow-GRPO's training reward (yifan123/reward-server, `evaluate_reward`): the mean of terms,
    at most 1.

    Every included class adds `1 - |expected - found| / expected` with all objects of that class, in
    every tag: one object too many costs as much as one too few. Its colour and its position add a
    term each, which count only if the number is exact; otherwise both together add one 0. A wrong
    position adds a 0 and, by a bug of that code, a 1.
    """
    terms: list[float] = []
    groups: list[list[Detection] | None] = []
    for wanted in record["include"]:
        group, count = objects.get(wanted["class"], []), wanted["count"]
        terms.append(1 - abs(count - len(group)) / count)
        matched = len(group) == count
        if not matched and ("color" in wanted or "position" in wanted):
            terms.append(0.0)
        if matched and "color" in wanted:
            number = sum(d.color == wanted["color"] for d in group)
            terms.append(1 - abs(count - number) / count)
            matched = number == count
        if matched and "position" in wanted:
            relation, target = wanted["position"]
            others = groups[target]
            matched = others is not None and in_relation(group, relation, others)
            terms += [1.0] if matched else [0.0] if others is None else [0.0, 1.0]
        groups.append(group if matched else None)
    return sum(terms) / len(terms)


class GenEval:
    """GenEval over the detections of any detector. `rule` is one of

    correct  GenEval's: 1 if the image shows what the prompt's metadata requires, else 0
    score    Flow-GRPO's training reward (`score`): to train on, never to report
    exact    the gold reward: `correct`, and no object beyond what the prompt includes. GenEval
             forbids surplus objects only where a prompt counts, so a model trained on it can draw
             more of them

    `detector` turns images (B, H, W, 3) uint8 into a list of detections per image. It has the
    attributes `name`, for tables (scores of different detectors cannot be compared); `labels` and
    `colors`, all that it knows; `threshold` and `counting_threshold`, the confidences above which
    objects count; and `size`, the (H, W) of images that it needs, or None.
    """

    name, range = "GenEval", (0.0, 1.0)

    @validate_call
    def __init__(self, detector: Callable, rule: Literal["correct", "score", "exact"] = "correct"):
        self.detector, self.rule, self.training_only = detector, rule, rule == "score"
        if self.training_only:
            self.range = (2.0 - MAX_OBJECTS, 1.0)  # 16 objects of a class where one is expected

    def applies(self, prompt: Prompt) -> bool:
        return {"tag", "include"} <= prompt.metadata.keys()

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        if self.rule == "score":
            return np.array([score(*one) for one in self._detect(images, prompts)], np.float32)
        return np.array([correct for correct, _ in self.explain(images, prompts)], np.float32)

    def explain(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> list[tuple[bool, str]]:
        """The verdict on each image, and what is wrong with it. Raises ValueError for a prompt
        without GenEval metadata, or with a class or colour that the detector does not know."""
        return [verdict(*one, self.rule == "exact") for one in self._detect(images, prompts)]

    def _detect(self, images, prompts) -> Iterator[tuple[dict, dict[str, list]]]:
        """The record and the counted objects of each image."""
        pixels = as_uint8(images, prompts, self.name, self.detector.size)
        known = {"class": self.detector.labels, "color": self.detector.colors}
        for text, record in ((prompt.text, prompt.metadata) for prompt in prompts):
            if not {"tag", "include"} <= set(record):
                raise ValueError(f"GenEval needs the record (tag, include) of {text!r} as metadata")
            for wanted, key in ((w, key) for w in record["include"] for key in known if key in w):
                if wanted[key] not in known[key]:
                    fault = f"does not know the {key} {wanted[key]!r} of {text!r}"
                    raise ValueError(f"the detector {fault}; it knows {', '.join(known[key])}")
        for prompt, detections in zip(prompts, self.detector(pixels)):
            yield prompt.metadata, counted_objects(prompt.metadata, detections, self.detector)


class Mask2FormerDetector:
    """COCO's 80 classes under GenEval's names in images of any size, with colours by CLIP.

    `model_id`: a folder or hub id of a `Mask2FormerForUniversalSegmentation`, published as
    `facebook/mask2former-swin-small-coco-instance` (backbone Swin-S, trained on COCO's instances);
    `clip_id`: of the `CLIPModel` of `ColorClassifier`. Images are enlarged to `side` pixels at the
    shorter edge, as the public scorer does (longer edge: at most 1333). Masks are those of
    transformers: cut at 384 x 384 pixels and resized to the image.
    """

    colors, size = COLORS, None
    threshold, counting_threshold = 0.3, 0.9

    def __init__(
        self,
        model_id: str | Path,
        clip_id: str | Path,
        device: str = "cpu",
        batch: int = 8,
        side: int = 800,
    ):
        # by name: the plain processor needs torchvision, with which scores differ
        from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil

        self.name, self.batch = f"{Path(model_id).name} (transformers)", batch
        kind, what = Mask2FormerForUniversalSegmentation, "GenEval's detector"
        self.model = load_frozen(kind, model_id, what, device)
        with loading(f"processor of {what}", model_id):
            self.processor = Mask2FormerImageProcessorPil.from_pretrained(model_id)
        self.options = {"size": {"shortest_edge": side, "longest_edge": side * 5 // 3}}
        names = self.model.config.id2label
        self.labels = tuple(GENEVAL_NAMES.get(names[i], names[i]) for i in range(len(names)))
        self.classify = ColorClassifier(*load_clip(clip_id, "GenEval's colours", device))

    def __call__(self, images: np.ndarray) -> list[list[Detection]]:
        """(B, H, W, 3) uint8 to a list of detections per image."""
        return [found for (some,) in batches(self.batch, images) for found in self._detect(some)]

    @torch.no_grad()
    def _detect(self, images: np.ndarray) -> Iterator[list[Detection]]:
        inputs = self.processor(list(images), return_tensors="pt", **self.options)
        output = self.model(**inputs.to(self.model.device))
        for logits in (output.class_queries_logits, output.masks_queries_logits):
            if not torch.isfinite(logits).all():
                raise ValueError("GenEval's detector gave NaN; load its weights again, in float32")
        results = self.processor.post_process_instance_segmentation(
            output,
            self.threshold,
            target_sizes=[image.shape[:2] for image in images],
            return_binary_maps=True,
        )
        for image, result in zip(images, results):
            segments, objects = result["segments_info"], []
            masks = [mask.bool().cpu().numpy() for mask in result["segmentation"][: len(segments)]]
            for segment, mask in zip(segments, masks):
                box = tuple(map(float, Image.fromarray(mask).getbbox()))
                label = self.labels[segment["label_id"]]
                objects.append({"label": label, "score": segment["score"], "box": box})
            colored = self.classify(Image.fromarray(image), objects, masks)
            yield [Detection(**found) for found in colored]
