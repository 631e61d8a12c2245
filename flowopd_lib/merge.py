"""Cold start by merging (Flow-OPD 5.1): one adapter out of several.

An adapter changes a weight by its task vector `alpha / r B A`. The average of the *task vectors* is
not what the averages of B and of A make, which is what the public code's `merge.py` builds: with n
experts that has all n^2 cross products, over n^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, get_args

import torch
from pydantic import Field, model_validator

from .config import Config, Count, Fraction, choose, refuse_unused
from .lora import Lora
from .policy import FlowPolicy

Method = Literal["cat", "svd", "ties", "dare", "factor_wise"]
METHODS = get_args(Method)


class MergeConfig(Config):
    """See `merge_loras`."""

    merge: Method
    adapters: Annotated[list[str], Field(min_length=1)]
    weights: list[float] | None = None
    rank: Count | None = None
    density: Fraction = 0.5
    seed: int = 0

    @model_validator(mode="after")
    def _effects(self):
        if self.merge not in ("ties", "dare"):
            refuse_unused(self, density=f"with {self.merge}")
        if self.merge != "dare":
            refuse_unused(self, seed=f"with {self.merge}")
        return self


def merge_loras(
    loras: Sequence[Lora],
    method: Method = "cat",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> Lora:
    """The weighted mean (equal weights by default) of adapters; that of one is itself.

    cat          the exact mean of the task vectors; its rank is the sum of the ranks
    svd          the best approximation of that mean with `rank` (default: the largest of the
                 adapters'; exact at the sum of the ranks)
    ties, dare   TIES (2306.01708) and DARE with TIES' signs (2311.03099), keeping a fraction
                 `density` of each task vector; `rank` as for svd. DARE draws what it drops, from
                 `seed`
    factor_wise  mean of the A, mean of the B: the public code's, kept to be compared

    Raises ValueError for weights, ranks or densities that do not fit.
    """
    from peft.utils.merge_utils import dare_ties, ties

    choose("way to merge", method, METHODS)
    weights = list(weights) if weights is not None else [1 / len(loras)] * len(loras)
    if len(weights) != len(loras):
        raise ValueError(f"{len(loras)} adapters need as many weights, not {weights}")
    rank = rank or max(r for lora in loras for r in lora.ranks.values())
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], not {density}")
    a, b, alpha = {}, {}, {}
    # a training knows its start by its weights, so rounding must not follow the number of threads
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in dict.fromkeys(name for lora in loras for name in lora.a):
                here = [(lora, w) for lora, w in zip(loras, weights) if name in lora.a]
                if method == "cat":
                    a[name] = torch.cat([lora.a[name] for lora, _ in here])
                    scaled = [
                        w * lora.alpha[name] / len(lora.a[name]) * lora.b[name] for lora, w in here
                    ]
                    b[name] = torch.cat(scaled, 1)
                elif method == "factor_wise":
                    a[name], b[name] = _mean_of_factors(name, loras, weights)
                else:
                    deltas, of_deltas = [lora.delta(name) for lora, _ in here], [w for _, w in here]
                    if method == "svd":
                        mean = sum(w * delta for delta, w in zip(deltas, of_deltas))
                    else:
                        combine = ties if method == "ties" else dare_ties
                        mean = combine(deltas, torch.tensor(of_deltas), density)
                    u, s, vh = torch.linalg.svd(mean, full_matrices=False)
                    a[name], b[name] = vh[:rank].contiguous(), u[:, :rank] * s[:rank]
                alpha[name] = float(len(a[name]))
    finally:
        torch.set_num_threads(threads)
    return Lora(a, b, alpha)


def _mean_of_factors(
    name: str, loras: Sequence[Lora], weights: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    ranks = [lora.ranks.get(name) for lora in loras]
    if len(set(ranks)) > 1:
        raise ValueError(
            "factor_wise averages factors, so adapters need the same ranks everywhere: at "
            f"{name} they are {ranks}; take cat or svd"
        )
    # each factor with the root of its adapter's scale
    roots = [w * (lora.alpha[name] / ranks[0]) ** 0.5 for lora, w in zip(loras, weights)]
    a = sum(root * lora.a[name] for root, lora in zip(roots, loras))
    return a, sum(root * lora.b[name] for root, lora in zip(roots, loras))


def merge(
    policy: FlowPolicy, adapters: Sequence[str], name: str, method: Method = "cat", **how
) -> None:
    """Add adapter `name`, made of others of the policy by `merge_loras`."""
    loras = [policy.adapter(a).cpu() for a in adapters]
    policy.set_adapter(name, merge_loras(loras, method, **how))
