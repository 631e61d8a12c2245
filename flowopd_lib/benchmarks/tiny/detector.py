"""The small benchmark's detector: colour masks, connected components, and overlap with shape
templates."""

from __future__ import annotations

from functools import lru_cache

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
    """(len(SHAPES), GRID, GRID): how much of each cell of its own bounding box each shape
    covers."""
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


TEMPLATES, HUES = _templates(), _hue(np.array(list(COLORS.values())))


class ShapeDetector:
    """Detections of the benchmark's shapes on plain backgrounds; confidence is the overlap (IoU)
    with the best template."""

    name = "colour masks and shape templates"
    labels, colors, size = SHAPES, tuple(COLORS), (SIZE, SIZE)
    threshold = counting_threshold = 0.7

    def __call__(self, images: np.ndarray) -> list[list[Detection]]:
        """(B, 64, 64, 3) uint8 to one list of detections an image."""
        return [list(_detections(image.tobytes())) for image in np.ascontiguousarray(images)]


# the strict, the partial and the gold verdict look at the same images one after another
@lru_cache(maxsize=1024)
def _detections(image: bytes) -> tuple[Detection, ...]:
    rgb = np.frombuffer(image, np.uint8).reshape(SIZE, SIZE, 3)
    chroma = np.ptp(rgb, axis=-1).astype(np.float32)
    coloured, nearest = chroma > CHROMA, np.full(chroma.shape, -1)
    distance = np.abs(np.angle(np.exp(1j * (_hue(rgb[coloured])[..., None] - HUES))))
    nearest[coloured] = distance.argmin(-1)
    found = []
    for index, color in enumerate(COLORS):
        mask = nearest == index
        if not mask.any():
            continue
        parts, _ = ndimage.label(ndimage.binary_fill_holes(mask))
        areas = np.bincount(parts.ravel())
        for part, (rows, columns) in enumerate(ndimage.find_objects(parts), 1):
            if areas[part] < MIN_AREA:
                continue
            # with what its edge may reach
            top, left = max(rows.start - 1, 0), max(columns.start - 1, 0)
            place = np.s_[top : rows.stop + 1, left : columns.stop + 1]
            found.append(_match(parts[place] == part, chroma[place], color, top, left))
    return tuple(found)


def _match(inside: np.ndarray, chroma: np.ndarray, color: str, top: int, left: int) -> Detection:
    """The best template for a part, seen in a window of the image that begins at `top` and
    `left`."""
    # Antialiased edge pixels count by how coloured they are: at these sizes half a pixel decides a
    # shape.
    full = np.percentile(chroma[inside], 80)
    near, core = ndimage.binary_dilation(inside), ndimage.binary_erosion(inside)
    cover = np.where(core, 1.0, np.where(near, np.clip(chroma / full, 0, 1), 0.0))
    ys, xs = np.nonzero(cover > 0.5)
    y0, y1, x0, x1 = ys.min(), ys.max() + 1, xs.min(), xs.max() + 1
    crop = cover[y0:y1, x0:x1].astype(np.float32)
    crop = cv2.resize(crop, (GRID, GRID), interpolation=cv2.INTER_LINEAR)
    overlap = np.minimum(crop, TEMPLATES).sum((1, 2)) / np.maximum(crop, TEMPLATES).sum((1, 2))
    stretch = min(y1 - y0, x1 - x0) / max(y1 - y0, x1 - x0)
    best = int(overlap.argmax())
    box = (float(x0 + left), float(y0 + top), float(x1 + left), float(y1 + top))
    return Detection(SHAPES[best], color, float(overlap[best]) * min(1.0, stretch / 0.75), box)
