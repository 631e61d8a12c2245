"""What is optimised: GRPO (the experts, and the baselines), SFT (a cold start), OPD (the
method)."""

from .base import Objective, Shard, trained_steps
from .grpo import GRPO, GRPOBatch, GRPOConfig, advantages, clipped_loss
from .opd import LOSSES, OPD, OPDBatch, OPDConfig, anchor_loss, pathwise
from .sft import SFT, SFTConfig, sample_teachers

__all__ = [
    "GRPO",
    "LOSSES",
    "OPD",
    "SFT",
    "GRPOBatch",
    "GRPOConfig",
    "OPDBatch",
    "OPDConfig",
    "Objective",
    "SFTConfig",
    "Shard",
    "advantages",
    "anchor_loss",
    "clipped_loss",
    "pathwise",
    "sample_teachers",
    "trained_steps",
]
