"""OCR reward: how much of the text asked for can be read (Flow-GRPO's reward; METHOD.md)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from rapidfuzz.distance import Levenshtein

from ..prompts import Prompt, target_text
from .base import as_uint8


def ocr_reward(read: str, target: str) -> float:
    """`1 - min(levenshtein, len) / len`, lower case, without spaces; 1 if the target is contained in what was
    read."""
    read, target = ("".join(text.split()).lower() for text in (read, target))
    if not target:
        raise ValueError("the OCR reward needs a text to look for; the prompt asks for none")
    return (
        1.0
        if target in read
        else 1 - min(Levenshtein.distance(read, target), len(target)) / len(target)
    )


def _found(recogniser: str) -> Path:
    """Its file. Raises FileNotFoundError."""
    package, _, place = recogniser.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    places = [Path(folder) / place for folder in (spec and spec.submodule_search_locations) or ()]
    for path in (Path(recogniser), *places):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"OCR's recogniser {recogniser} is neither a file nor inside an installed package; install the "
        "package that has it"
    )


class OCR:
    """rapidocr with the models inside its wheel, which are PaddleOCR's, without the classifier of upside-down
    lines, as Flow-GRPO uses it. With `region` (left, top, right, bottom in pixels) that part of images of
    `size` (height, width) is recognised as one line; without, text is detected and recognised on the whole
    picture, of any size, and the text of all its lines joined. `recogniser`: another model of PaddleOCR's, an
    ONNX file or one inside an installed package (`PACKAGE/PLACE`)."""

    name, range, tasks = "OCR", (0.0, 1.0), ("ocr",)

    def __init__(
        self,
        region: tuple[int, int, int, int] | None = None,
        size: tuple[int, int] | None = None,
        upscale: int = 3,
        batch: int = 64,
        recogniser: str = "",
    ):
        from rapidocr import OCRVersion, RapidOCR

        if region and not size:
            raise ValueError(
                "a region in pixels means nothing without the size (height, width) of the images it is a "
                "part of; give size too"
            )
        if region and not (
            0 <= region[0] < region[2] <= size[1] and 0 <= region[1] < region[3] <= size[0]
        ):
            raise ValueError(
                f"OCR cannot look at {region} (left, top, right, bottom) of an image {size[0]} high and "
                f"{size[1]} wide"
            )
        self.region, self.size, self.upscale = region, size, upscale
        options = {"Global.log_level": "error", "Rec.rec_batch_num": batch, "Global.use_cls": False}
        # the recogniser pads narrower lines to this width; the default, 320, is mostly padding for a sign
        if region:
            width = 48 * (region[2] - region[0]) / (region[3] - region[1])
            options["Rec.rec_img_shape"] = [3, 48, int(np.ceil(width / 32)) * 32]
        if recogniser:
            # which says how pictures are prepared: alike for all
            options |= {
                "Rec.model_path": str(_found(recogniser)),
                "Rec.ocr_version": OCRVersion.PPOCRV5,
            }
        self.engine = RapidOCR(params=options)

    def read(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> list[str]:
        """The text in each picture, "" where there is none."""
        pixels = as_uint8(images, prompts, self.name, self.size)[..., ::-1]  # the engine reads BGR
        if not self.region:
            return self._read_whole([np.ascontiguousarray(p) for p in pixels])
        from rapidocr.ch_ppocr_rec import TextRecInput

        left, top, right, bottom = self.region
        crops = [
            cv2.resize(
                p[top:bottom, left:right],
                None,
                fx=self.upscale,
                fy=self.upscale,
                interpolation=cv2.INTER_CUBIC,
            )
            for p in pixels
        ]
        return list(self.engine._load_rec_model()(TextRecInput(img=crops)).txts)

    def _read_whole(self, pictures: Sequence[np.ndarray]) -> list[str]:
        """What the engine reads in each picture (H, W, 3) by itself, with the lines of many pictures
        recognised together."""
        from rapidocr.main import RapidOCRError

        lines = []
        for picture in pictures:
            try:
                lines.append(self.engine.detect_and_crop(*self.engine.preprocess_img(picture))[0])
            except RapidOCRError:  # no text found
                lines.append([])
        # The recogniser pads all lines of a call to its widest, and padding can change what it reads: only
        # pictures without a line wider than the least it pads to share a call.
        _, height, width = self.engine._load_rec_model().rec_image_shape
        narrow = [all(c.shape[1] * height <= width * c.shape[0] for c in crops) for crops in lines]
        together = [i for i, crops in enumerate(lines) if crops and narrow[i]]
        alone = [[i] for i, crops in enumerate(lines) if crops and not narrow[i]]
        read = [""] * len(pictures)
        for group in [together, *alone] if together else alone:
            found = self.engine.recognize_txt([c for i in group for c in lines[i]])
            owners = [i for i in group for _ in lines[i]]
            for i, text, score in zip(owners, found.txts, found.scores):
                if text.strip() and score >= self.engine.text_score:
                    read[i] += text
        return read

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        targets = [target_text(p.text) for p in prompts]
        return np.array(
            [ocr_reward(r, t) for r, t in zip(self.read(images, prompts), targets)], np.float32
        )
