"""The judges: one class each, the same for small and for full models."""

from .aesthetic import Aesthetic
from .base import Reward, attribute, can_judge
from .compbench import BLIPVQA, load_compbench
from .deqa import DeQA
from .geneval import Detection, Detector, GenEval
from .mask2former import Mask2FormerDetector
from .ocr import OCR
from .pickscore import PickScore

__all__ = [
    "Aesthetic",
    "BLIPVQA",
    "DeQA",
    "Detection",
    "Detector",
    "GenEval",
    "Mask2FormerDetector",
    "OCR",
    "PickScore",
    "Reward",
    "attribute",
    "can_judge",
    "load_compbench",
]
