"""The judges: one class each, the same for the small world and for full models."""

from .base import Reward
from .deqa import DeQA
from .geneval import Detection, Detector, GenEval
from .ocr import OCR
from .pickscore import PickScore
from .remote import ChatJudge, JudgeUnavailable, RemoteDetector, RemoteJudge

__all__ = ["DeQA", "Detection", "Detector", "GenEval", "OCR", "PickScore", "Reward"]
__all__ += ["ChatJudge", "JudgeUnavailable", "RemoteDetector", "RemoteJudge"]
