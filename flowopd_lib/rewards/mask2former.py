"""GenEval's detector in transformers: Mask2Former with a Swin-S backbone, trained on COCO's instances.

The public scorer runs mmdetection's training of the same architecture on the same data. This is another
checkpoint with the same rule, so its scores belong in tables under its own name.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..quiet import quiet
from .base import load_frozen
from .colors import COLORS, ColorNamer, cut_out
from .geneval import Detection

MAX_OBJECTS = 16  # of a class in a picture: GenEval's rule looks at no more
# GenEval's names for what COCO, or the spelling of COCO's classes in the published config, calls otherwise.
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
    """The instances of one picture above `threshold`, the surest first: labels (N,), scores (N,) and masks
    (N, *size) bool.

    From the logits of Q queries over C classes and none, (Q, C + 1), and of their masks, (Q, h, w), as in
    mmdetection's `instance_postprocess`: the Q largest of the Q x C class probabilities, each times the mean
    probability of its mask inside the mask; nothing is suppressed, and a query can be two classes. Masks are
    cut at 1/2 after they are enlarged. `post_process_instance_segmentation` of transformers, with
    `return_binary_maps=True`, says the same of pictures of 384 pixels; for others it cuts masks at 384 and
    enlarges them by the nearest pixel.
    """
    queries, classes = class_logits.shape[0], class_logits.shape[1] - 1
    if not (torch.isfinite(class_logits).all() and torch.isfinite(mask_logits).all()):
        raise ValueError(
            "GenEval's detector gave NaN; its weights are damaged: load them anew, in float32"
        )
    probable, index = class_logits.softmax(-1)[:, :-1].flatten().topk(queries)
    index = index[probable > threshold]  # a mask can only lower it, and most are low already
    if not len(index):
        return np.zeros(0, int), np.zeros(0, np.float32), np.zeros((0, *size), bool)
    enlarged = torch.nn.functional.interpolate(
        mask_logits[index // classes][None], size=size, mode="bilinear", align_corners=False
    )[0]
    inside = enlarged > 0
    area = inside.sum((1, 2))
    certain = (enlarged.sigmoid() * inside).sum((1, 2)) / (area + 1e-6)
    scores = probable[: len(index)] * certain
    kept = torch.nonzero((scores > threshold) & (area > 0))[:, 0]
    kept = kept[scores[kept].argsort(descending=True, stable=True)]
    return tuple(found[kept].cpu().numpy() for found in (index % classes, scores, inside))


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) in pixels of a mask (H, W) that is not empty; the last two exclusive."""
    xs, ys = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)


class Mask2FormerDetector:
    """COCO's 80 classes under GenEval's names, in pictures of any size, their colours told by CLIP.

    `model_id`: a folder or hub id of a `Mask2FormerForUniversalSegmentation`, published as
    `facebook/mask2former-swin-small-coco-instance`; `clip_id`: see `ColorNamer`. Pictures are enlarged to
    `side` pixels at the shorter edge, as the public scorer does (its longer edge: at most 1333); None: as the
    model's own processor says, which for the published one is 384 x 384. Colours are asked of CLIP for all
    objects kept, whether a prompt asks for them or not: the detector sees no prompt.
    """

    colors, size = COLORS, None

    def __init__(
        self,
        model_id: str | Path,
        clip_id: str | Path,
        device: str = "cpu",
        batch: int = 8,
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        side: int | None = 800,
    ):
        # by name: the plain one needs torchvision, and scores would differ where there is one
        from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil

        if not 0 < threshold <= counting_threshold < 1:
            raise ValueError(
                f"GenEval's detector cannot use thresholds of {threshold} and, to count, "
                f"{counting_threshold}; they are probabilities, the second no lower than the first "
                "(GenEval: 0.3 and 0.9)"
            )
        self.name = f"{Path(model_id).name} (transformers)"
        self.device, self.batch = device, batch
        self.threshold, self.counting_threshold = threshold, counting_threshold
        self.model = load_frozen(
            Mask2FormerForUniversalSegmentation, model_id, "GenEval's detector", device
        )
        with quiet():
            self.processor = Mask2FormerImageProcessorPil.from_pretrained(model_id)
        self.options = (
            {} if side is None else {"size": {"shortest_edge": side, "longest_edge": side * 5 // 3}}
        )
        names = self.model.config.id2label
        self.labels = tuple(GENEVAL_NAMES.get(names[i], names[i]) for i in range(len(names)))
        self.name_colors = ColorNamer(clip_id, device)

    def __call__(self, images: np.ndarray) -> list[list[Detection]]:
        """(B, H, W, 3) uint8 to one list of detections an image, the surest first."""
        return [
            d
            for i in range(0, len(images), self.batch)
            for d in self._some(images[i : i + self.batch])
        ]

    @torch.no_grad()
    def _some(self, images: np.ndarray) -> list[list[Detection]]:
        """What is in the pictures of one batch."""
        inputs = self.processor(list(images), return_tensors="pt", **self.options).to(self.device)
        told, found, objects = self.model(**inputs), [], []
        for image, classes, masks in zip(
            images, told.class_queries_logits, told.masks_queries_logits
        ):
            found.append([])
            for index, score, mask in zip(
                *instances(classes, masks, image.shape[:2], self.threshold)
            ):
                label = self.labels[index]
                if sum(label == other for other, *_ in found[-1]) < MAX_OBJECTS:
                    found[-1].append((label, float(score), box_of(mask)))
                    objects.append(cut_out(image, mask, found[-1][-1][2]))
        colors = iter(self.name_colors(objects, [label for one in found for label, *_ in one]))
        return [
            [Detection(label, next(colors), score, box) for label, score, box in one]
            for one in found
        ]
