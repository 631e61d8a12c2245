"""The judges: one class each, the same for small and for full models."""

from .aesthetic import Aesthetic
from .base import Reward, attribute, can_judge
from .compbench import BLIPVQA, load_compbench
from .deqa import DeQA
from .geneval import Detection, Detector, GenEval
from .mask2former import Mask2FormerDetector
from .ocr import OCR
from .pickscore import PickScore
from .remote import ChatJudge, JudgeUnavailable, RemoteDetector, RemoteJudge

__all__ = [
    "Aesthetic",
    "BLIPVQA",
    "ChatJudge",
    "DeQA",
    "Detection",
    "Detector",
    "GenEval",
    "JudgeUnavailable",
    "Mask2FormerDetector",
    "OCR",
    "PickScore",
    "RemoteDetector",
    "RemoteJudge",
    "Reward",
    "attribute",
    "can_judge",
    "load_compbench",
]
