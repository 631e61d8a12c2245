# ruff: noqa: F401 (names for other modules and for users)
"""What is optimised: GRPO (the experts, and the baselines), SFT (a cold start), OPD (the method).

All three are objectives: data is collected once, then `updates` optimizer updates are made on it.

    updates       their number
    adapters      the adapters it uses besides the one in training: teachers, anchor, reference
    check(policy, adapter)
                  raises ValueError, before anything long begins, for what cannot be trained
    collect(policy, adapter, iteration, shard)
                  data for the updates, and metrics of the collection, such as mean rewards
    losses(policy, adapter, data, update)
                  terms that the loop differentiates one by one, so that one graph is alive at a
                  time; their sum over all processes is the update's loss. Each is a tensor with its
                  graph and detached metrics: scalars, or (B,) one value a row

Everything random follows from the seed and the iteration.
"""

from ..data import Shard
from .grpo import GRPO, GRPOBatch, GRPOConfig, advantages, clipped_loss
from .opd import LOSSES, OPD, OPDBatch, OPDConfig, anchor_loss, pathwise
from .sft import SFT, SFTConfig, sample_teachers

Objective = GRPO | OPD | SFT
