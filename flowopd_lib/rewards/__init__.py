"""The rewards: one class each, the same for small and for full models."""

from .aesthetic import Aesthetic
from .base import Reward, attribute, can_reward
from .compbench import BLIPVQA, load_compbench
from .deqa import DeQA
from .geneval import Detection, Detector, GenEval
from .mask2former import Mask2FormerDetector
from .ocr import OCR
from .pickscore import PickScore
from .remote import ChatReward, RemoteDetector, RemoteReward, RewardUnavailable

__all__ = [
    "Aesthetic",
    "BLIPVQA",
    "ChatReward",
    "DeQA",
    "Detection",
    "Detector",
    "GenEval",
    "RewardUnavailable",
    "Mask2FormerDetector",
    "OCR",
    "PickScore",
    "RemoteDetector",
    "RemoteReward",
    "Reward",
    "attribute",
    "can_reward",
    "load_compbench",
]
