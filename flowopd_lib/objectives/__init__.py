"""What is optimised: GRPO (the experts, and the baselines), SFT (a cold start), OPD (the method)."""

from .base import Objective, Share, trained_steps
from .grpo import GRPO, advantages
from .opd import ESTIMATORS, OPD
from .sft import SFT, teacher_samples

__all__ = [
    "ESTIMATORS",
    "GRPO",
    "OPD",
    "SFT",
    "Objective",
    "Share",
    "advantages",
    "teacher_samples",
    "trained_steps",
]
