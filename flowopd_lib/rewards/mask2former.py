"""GenEval's detector with transformers: Mask2Former with a Swin-S backbone, trained on COCO's
instances.

The public scorer runs mmdetection's training of the same architecture on the same data. This is
another checkpoint under the same rule, so its scores belong in tables under its own name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import validate_call

from ..config import Count, Fraction
from .base import batches, load_clip, load_frozen, loading
from .geneval import MAX_OBJECTS, Detection
from .server import COLORS, ColorClassifier

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


def instances(
    class_logits: torch.Tensor, mask_logits: torch.Tensor, size: tuple[int, int], threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The instances of one image above `threshold`, by falling score: labels (N,), scores (N,) and
    masks (N, *size) bool.

    From the logits of Q queries over C classes and none, (Q, C + 1), and of their masks, (Q, h, w),
    as in mmdetection's `instance_postprocess`: the Q largest of the Q x C class probabilities, each
    times the mean probability of its mask inside the mask; nothing is suppressed, and a query can
    be two classes. Masks are cut at 1/2 after they are enlarged.
    `post_process_instance_segmentation` of transformers, with `return_binary_maps=True`, gives the
    same for images of 384 pixels; for others it cuts masks at 384 and enlarges them by the nearest
    pixel.
    """
    queries, classes = class_logits.shape[0], class_logits.shape[1] - 1
    if not (torch.isfinite(class_logits).all() and torch.isfinite(mask_logits).all()):
        raise ValueError("GenEval's detector gave NaN; load its weights again, in float32")
    probability, index = class_logits.softmax(-1)[:, :-1].flatten().topk(queries)
    index = index[probability > threshold]  # a mask can only lower it, and most are low already
    if not len(index):
        return np.zeros(0, int), np.zeros(0, np.float32), np.zeros((0, *size), bool)
    masks = torch.nn.functional.interpolate(
        mask_logits[index // classes][None], size=size, mode="bilinear", align_corners=False
    )[0]
    inside = masks > 0
    area = inside.sum((1, 2))
    certainty = (masks.sigmoid() * inside).sum((1, 2)) / (area + 1e-6)
    scores = probability[: len(index)] * certainty
    rows = torch.nonzero((scores > threshold) & (area > 0))[:, 0]
    rows = rows[scores[rows].argsort(descending=True, stable=True)]
    return tuple(values[rows].cpu().numpy() for values in (index % classes, scores, inside))


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) in pixels of a mask (H, W) that is not empty; the last two
    exclusive."""
    xs, ys = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)


def cut_out(image: np.ndarray, mask: np.ndarray, box: Sequence[float]) -> Image.Image:
    """The object alone: image (H, W, 3) uint8 where mask (H, W) is true, GenEval's gray #999
    elsewhere, cropped to its box."""
    left, top, right, bottom = (int(edge) for edge in box)
    inside = mask[top:bottom, left:right, None]
    return Image.fromarray(np.where(inside, image[top:bottom, left:right], np.uint8(0x99)))


class Mask2FormerDetector:
    """COCO's 80 classes under GenEval's names in images of any size, with colours by CLIP.

    `model_id`: a folder or hub id of a `Mask2FormerForUniversalSegmentation`, published as
    `facebook/mask2former-swin-small-coco-instance`; `clip_id`: of the `CLIPModel` of
    `ColorClassifier`. Images are enlarged to `side` pixels at the shorter edge, as the public
    scorer does (longer edge: at most 1333); None: as the model's own processor does, for the
    published one to 384 x 384. Colours are found for every object, since the detector sees no
    prompt.
    """

    colors, size = COLORS, None

    @validate_call
    def __init__(
        self,
        model_id: str | Path,
        clip_id: str | Path,
        device: str = "cpu",
        batch: int = 8,
        threshold: Fraction = 0.3,
        counting_threshold: Fraction = 0.9,
        side: Count | None = 800,
    ):
        # by name: the plain processor needs torchvision, with which scores differ
        from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil

        self.name, self.batch = f"{Path(model_id).name} (transformers)", batch
        self.threshold, self.counting_threshold = threshold, counting_threshold
        kind, what = Mask2FormerForUniversalSegmentation, "GenEval's detector"
        self.model = load_frozen(kind, model_id, what, device)
        with loading(f"processor of {what}", model_id):
            self.processor = Mask2FormerImageProcessorPil.from_pretrained(model_id)
        size = {"shortest_edge": side, "longest_edge": side * 5 // 3} if side else None
        self.options = {"size": size} if side else {}
        names = self.model.config.id2label
        self.labels = tuple(GENEVAL_NAMES.get(names[i], names[i]) for i in range(len(names)))
        self.classify = ColorClassifier(*load_clip(clip_id, "GenEval's colours", device))

    def __call__(self, images: np.ndarray) -> list[list[Detection]]:
        """(B, H, W, 3) uint8 to a list of detections per image, by falling score."""
        return [found for (some,) in batches(self.batch, images) for found in self._detect(some)]

    @torch.no_grad()
    def _detect(self, images: np.ndarray) -> list[list[Detection]]:
        inputs = self.processor(list(images), return_tensors="pt", **self.options)
        output = self.model(**inputs.to(self.model.device))
        detections, crops = [], []
        logits = zip(output.class_queries_logits, output.masks_queries_logits)
        for image, one in zip(images, logits):
            detections.append([])
            for index, score, mask in zip(*instances(*one, image.shape[:2], self.threshold)):
                label, box = self.labels[index], box_of(mask)
                if sum(d.label == label for d in detections[-1]) < MAX_OBJECTS:
                    detections[-1].append(Detection(label, None, float(score), box))
                    crops.append(cut_out(image, mask, box))
        colors = iter(self.classify(crops, [d.label for found in detections for d in found]))
        return [[replace(d, color=next(colors)) for d in found] for found in detections]
