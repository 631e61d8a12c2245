"""The rewards: one class each, for small and for full models alike."""

from .aesthetic import Aesthetic
from .base import FunctionReward, Reward, applies_to, as_reward, attribute, score_images
from .compbench import BLIPVQA
from .deqa import DeQA
from .geneval import Detection, GenEval, Mask2FormerDetector
from .ocr import OCR
from .pickscore import PickScore
from .remote import ChatReward, RemoteDetector, RemoteReward, RewardUnavailable

__all__ = ["Aesthetic", "BLIPVQA", "DeQA", "GenEval", "OCR", "PickScore"]
__all__ += ["Detection", "Mask2FormerDetector", "RemoteDetector"]
__all__ += ["ChatReward", "RemoteReward", "RewardUnavailable"]
__all__ += ["FunctionReward", "Reward", "applies_to", "as_reward", "attribute", "score_images"]
