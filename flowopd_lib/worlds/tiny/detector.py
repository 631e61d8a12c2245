"""The small world's detector: colour masks, connected components, and overlap with shape templates."""

from __future__ import annotations

import cv2
import numpy as np
from scipy import ndimage

from ...rewards.geneval import Detection
from .scenes import SIZE, outline
from .specs import COLORS, SHAPES

# max - min of a pixel's RGB from which it belongs to a shape and not to a plain background
CHROMA = 70
MIN_AREA = 30  # pixels; the smallest right shape, a star among five, has about 45
GRID = 32


def _templates() -> np.ndarray:
    """(len(SHAPES), GRID, GRID): how much of each cell of its own bounding box each shape covers."""
    masks = []
    for shape in SHAPES:
        points = outline(shape)
        low, high = points.min(0), points.max(0)
        polygon = np.round((points - low) / (high - low) * (GRID * 8 - 1)).astype(np.int32)
        mask = np.zeros((GRID * 8, GRID * 8), np.float32)
        cv2.fillPoly(mask, [polygon], 1.0)
        masks.append(cv2.resize(mask, (GRID, GRID), interpolation=cv2.INTER_AREA))
    return np.stack(masks)


def _hue(rgb: np.ndarray) -> np.ndarray:
    """Angle on the colour circle, radians."""
    r, g, b = np.moveaxis(rgb.astype(np.float32), -1, 0)
    return np.arctan2(np.sqrt(3.0) * (g - b), 2 * r - g - b)


class ShapeDetector:
    """Detections of the world's shapes on plain backgrounds; confidence is the overlap (IoU) with the best
    template."""

    name = "colour masks and shape templates"
    labels, colors, size = SHAPES, tuple(COLORS), (SIZE, SIZE)
    threshold = counting_threshold = 0.7

    def __init__(self):
        self.templates = _templates()
        self.hues = _hue(np.array(list(COLORS.values())))

    def __call__(self, images: np.ndarray) -> list[list[Detection]]:
        """(B, 64, 64, 3) uint8 to one list of detections an image."""
        return [self._one(image) for image in images]

    def _one(self, image: np.ndarray) -> list[Detection]:
        chroma = np.ptp(image, axis=-1).astype(np.float32)
        distance = np.abs(np.angle(np.exp(1j * (_hue(image)[..., None] - self.hues))))
        nearest = distance.argmin(-1)
        found = []
        for index, color in enumerate(COLORS):
            mask = ndimage.binary_fill_holes((chroma > CHROMA) & (nearest == index))
            parts, n = ndimage.label(mask)
            for part in range(1, n + 1):
                inside = parts == part
                if inside.sum() >= MIN_AREA:
                    found.append(self._match(inside, chroma, color))
        return found

    def _match(self, inside: np.ndarray, chroma: np.ndarray, color: str) -> Detection:
        # Antialiased edge pixels count by how coloured they are: at these sizes half a pixel decides a shape.
        full = np.percentile(chroma[inside], 80)
        near = ndimage.binary_dilation(inside)
        cover = np.where(
            ndimage.binary_erosion(inside), 1.0, np.where(near, np.clip(chroma / full, 0, 1), 0.0)
        )
        ys, xs = np.nonzero(cover > 0.5)
        if len(ys) == 0:
            ys, xs = np.nonzero(inside)
        top, bottom, left, right = ys.min(), ys.max() + 1, xs.min(), xs.max() + 1
        crop = cv2.resize(
            cover[top:bottom, left:right].astype(np.float32), (GRID, GRID), interpolation=cv2.INTER_LINEAR
        )
        overlap = np.minimum(crop, self.templates).sum((1, 2)) / np.maximum(crop, self.templates).sum((1, 2))
        stretch = min(bottom - top, right - left) / max(bottom - top, right - left)
        best = int(overlap.argmax())
        return Detection(
            SHAPES[best],
            color,
            float(overlap[best]) * min(1.0, stretch / 0.75),
            (float(left), float(top), float(right), float(bottom)),
        )
