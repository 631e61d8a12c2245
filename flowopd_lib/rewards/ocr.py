"""OCR reward: how much of a prompt's quoted words can be read in its image (Flow-GRPO's reward)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from rapidfuzz.distance import Levenshtein

from ..data import Prompt, quoted_words
from .base import as_uint8


def ocr_reward(read: str, target: str) -> float:
    """`1 - min(levenshtein, len) / len` of lower case without spaces; 1 if `read` contains
    `target`."""
    read, target = ("".join(text.split()).lower() for text in (read, target))
    if target in read:
        return 1.0
    return 1 - min(Levenshtein.distance(read, target), len(target)) / len(target)


def find_model(name: str) -> str:
    """The path of a file, which may be given as `PACKAGE/PATH` inside an installed package."""
    package, _, path = name.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    file = Path(spec.origin).parent / path if spec and spec.origin else Path(name)
    return str(file.resolve(strict=True))  # rapidocr would notice at the first image


class OCR:
    """rapidocr with the models inside its wheel, which are PaddleOCR's, without the classifier of
    upside-down lines, as in Flow-GRPO.

    With `region` (left, top, right, bottom in pixels) that part of the images is enlarged and
    recognised as one line. Without, text is detected and recognised on the whole image, and the
    text of all its lines joined; a single "I", "l" or "O" is then read as another character and
    scores 0, however clean, so prompts should quote two letters or more. `size`: the only (height,
    width) of images that is accepted. `recogniser`: another model of PaddleOCR's, an ONNX file
    or one inside an installed package (`PACKAGE/PATH`).
    """

    name, range = "OCR", (0.0, 1.0)

    def __init__(
        self,
        region: tuple[int, int, int, int] | None = None,
        size: tuple[int, int] | None = None,
        recogniser: str = "",
    ):
        from rapidocr import OCRVersion, RapidOCR

        self.region, self.size = region, size
        options = {"Global.log_level": "error", "Rec.rec_batch_num": 64, "Global.use_cls": False}
        if region:
            left, top, right, bottom = region
            # lines are padded to this width; the default, 320, is mostly padding for a sign
            width = int(np.ceil(48 * (right - left) / (bottom - top) / 32)) * 32
            options["Rec.rec_img_shape"] = [3, 48, width]
        if recogniser:  # the version only says how images are prepared, alike for all
            options["Rec.model_path"] = find_model(recogniser)
            options["Rec.ocr_version"] = OCRVersion.PPOCRV5
        self.engine = RapidOCR(params=options)

    def read(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> list[str]:
        """The text in each image, "" where there is none."""
        pixels = as_uint8(images, prompts, self.name, self.size)[..., ::-1]  # the engine reads BGR
        if not self.region:
            return ["".join(self.engine(np.ascontiguousarray(p)).txts or ()) for p in pixels]
        from rapidocr.ch_ppocr_rec import TextRecInput

        left, top, right, bottom = self.region
        scale = {"fx": 3, "fy": 3, "interpolation": cv2.INTER_CUBIC}
        crops = [cv2.resize(image[top:bottom, left:right], None, **scale) for image in pixels]
        return list(self.engine._load_rec_model()(TextRecInput(img=crops)).txts)

    def applies(self, prompt: Prompt) -> bool:
        return prompt.text.count('"') >= 2

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        targets = [quoted_words(prompt.text) for prompt in prompts]
        scores = map(ocr_reward, self.read(images, prompts), targets)
        return np.array(list(scores), np.float32)
