"""The judges: one class each, the same for the small world and for full models."""

from .base import Reward, attribute, can_judge
from .deqa import DeQA
from .geneval import Detection, Detector, GenEval
from .ocr import OCR
from .pickscore import PickScore

__all__ = ["attribute", "can_judge", "DeQA", "Detection", "Detector", "GenEval", "OCR", "PickScore", "Reward"]
