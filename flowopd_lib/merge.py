"""Cold start (Flow-OPD 5.1): one adapter out of several, by merging them through PEFT or by fine-tuning on
their samples.

An adapter changes a weight by `s B A`. The average of the *changes* is not the change made by the averages of
B and of A, which is what the public code's `merge.py` builds: with n experts that has all n^2 cross products,
over n^2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .objectives import Share, teacher_samples
from .policy import FlowPolicy
from .prompts import Prompt
from .rollout import Sampler

METHODS = ("cat", "svd", "ties", "dare", "factor_wise")


def merge(
    policy: FlowPolicy,
    adapters: Sequence[str],
    name: str,
    method: str = "cat",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> None:
    """Add adapter `name`, the weighted mean (equal weights by default) of `adapters`; of one, with a weight,
    so much of it.

    cat          the exact mean of the changes; its rank is the sum of the ranks
    svd          the best approximation of that mean with `rank` (default: the largest of the adapters'; exact
                 at the sum of the ranks)
    ties, dare   TIES (2306.01708) and DARE with TIES' signs (2311.03099), keeping a share `density` of each
                 change; `rank` as for svd.
                 DARE draws what it drops, from `seed`
    factor_wise  mean of the A, mean of the B: the public code's, kept to be compared

    Raises ValueError for no or unknown adapters, or a method that does not exist.
    """
    adapters = list(adapters)
    unknown = set(adapters) - set(policy.adapters)
    if not adapters or unknown:
        raise ValueError(
            f"merging takes some of the adapters {', '.join(policy.adapters) or '(none)'}, not {adapters}"
        )
    if len(adapters) == 1 and weights is None:
        raise ValueError(
            f"an average takes at least two adapters, not {adapters} alone; of one, weights say how much"
        )
    if method not in METHODS:
        raise ValueError(f"unknown way to merge {method!r}: choose one of {', '.join(METHODS)}")
    weights = list(weights) if weights is not None else [1 / len(adapters)] * len(adapters)
    if len(weights) != len(adapters) or (method == "factor_wise" and min(weights) < 0):
        raise ValueError(
            f"{len(adapters)} adapters need as many weights, not {weights} (positive ones, factor by factor)"
        )
    ranks = {a: policy.adapter(a).ranks for a in adapters}
    if method == "factor_wise":
        for other in adapters[1:]:
            apart = [
                p
                for p in ranks[adapters[0]] | ranks[other]
                if ranks[adapters[0]].get(p) != ranks[other].get(p)
            ]
            if apart:
                raise ValueError(
                    "factor_wise averages factors, so adapters need the same ranks everywhere: at "
                    f"{apart[0]} {adapters[0]} has "
                    f"{ranks[adapters[0]].get(apart[0])} and {other} {ranks[other].get(apart[0])}; take "
                    "cat or svd"
                )
    rank = rank or max(r for of in ranks.values() for r in of.values())
    if rank < 1 or not 0 < density <= 1:
        raise ValueError(f"rank must be at least 1 and density in (0, 1], not {rank} and {density}")
    how = {
        "cat": dict(combination_type="cat"),
        "svd": dict(combination_type="svd", svd_rank=rank, svd_full_matrices=False),
        "ties": dict(
            combination_type="ties_svd", density=density, svd_rank=rank, svd_full_matrices=False
        ),
        "dare": dict(
            combination_type="dare_ties_svd",
            density=density,
            svd_rank=rank,
            svd_full_matrices=False,
        ),
        "factor_wise": dict(combination_type="linear"),
    }[method]
    # PEFT's `linear` weighs A and B by sqrt(w s) each: w^2 gives the means of both
    if method == "factor_wise":
        weights = [w**2 for w in weights]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy.combine_adapters(adapters, weights, name, **how)


def drawn_by_teachers(
    policy: FlowPolicy,
    prompts: Sequence[Prompt],
    teachers: Mapping[str, str | None],
    sampler: Sampler = Sampler(),
    share: Share = Share(),
) -> torch.Tensor:
    """What a supervised start learns from: `teacher_samples` with seeds far from those of evaluations and of
    the schedules."""
    seeds = range(1 << 39, (1 << 39) + len(prompts))
    return teacher_samples(policy, prompts, seeds, teachers, sampler, share=share)
