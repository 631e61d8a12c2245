"""A walk of one sample looked at step by step: the clean picture predicted, how far each teacher is, and
where in the picture they differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import matplotlib
import numpy as np
import pandas as pd
import torch
from PIL import Image

from ..policy import FlowPolicy
from ..prompts import Prompt
from ..rollout import Sampler, trajectory
from ..sde import velocity_weight


@dataclass(frozen=True)
class Walk:
    """What a model did from noise to picture, K steps.

    sigmas      (K,) the noise level that each step begins at
    noisy       (K, 3, H, W) the latent it begins with, decoded             clean   (K, 3, H, W) the picture
                                                            predicted there, decoded
    kl          K rows, a column per teacher: nats of the step; NaN for a step without noise (the last)
    difference  by teacher (K, h, w): root mean square over the latent's channels of v_walker - v_teacher
    """

    prompt: Prompt
    seed: int
    model: str
    sampler: Sampler
    sigmas: list[float]
    noisy: torch.Tensor
    clean: torch.Tensor
    kl: pd.DataFrame
    difference: dict[str, np.ndarray]

    def alt(self, step: int) -> str:
        """What a reader who does not see the picture of a step is told."""
        told = (
            ", ".join(
                f"{name} {value:.3g}"
                for name, value in self.kl.iloc[step].items()
                if value == value
            )
            or "none at this step"
        )
        return (
            f"{self.model}, seed {self.seed}, step {step + 1} of {len(self.sigmas)}, sigma "
            f"{self.sigmas[step]:.2f}: {self.prompt.text}; KL {told}"
        )


def heat(field: np.ndarray, top: float, size: int = 160) -> Image.Image:
    """A field (h, w) of differences as a picture `size` wide: black is none, the brightest `top`."""
    colors = (
        matplotlib.colormaps["magma"](np.clip(field / (top or 1.0), 0, 1))[..., :3] * 255
    ).astype(np.uint8)
    return Image.fromarray(colors).resize(
        (size, size * field.shape[0] // field.shape[1]), Image.Resampling.NEAREST
    )


def step_weight(sampler: Sampler, sigma: float, sigma_next: float) -> float:
    """What `||v - v'||^2` is multiplied by to be the KL of the step, as OPD trains on it: for an ODE walk
    that of the SDE with the same noise level. NaN for a step that has no noise even then."""
    if sigma_next == 0 or sampler.noise_level == 0:
        return np.nan
    return velocity_weight(
        sigma,
        sigma_next,
        "kl",
        "sde" if sampler.kind == "ode" else sampler.kind,
        sampler.noise_level,
    )


@torch.no_grad()
def walk_through(
    policy: FlowPolicy,
    prompt: Prompt,
    seed: int,
    sampler: Sampler,
    models: Mapping[str, str | None],
    model: str,
    teachers: list[str],
) -> Walk:
    """Let `model` walk, and ask each of `teachers` at every state it visits; `models` maps their names to
    adapters.

    Raises ValueError for a model there is not.
    """
    for name in (model, *teachers):
        if name not in models:
            raise ValueError(f"there is no model {name!r} here; there are {', '.join(models)}")
    text, sigmas, latents, clean, kl, difference = (
        policy.encode([prompt.text]),
        [],
        [],
        [],
        [],
        {name: [] for name in teachers},
    )
    for step in trajectory(policy, [prompt], [seed], sampler, models[model]):
        sigmas.append(step.sigma)
        latents.append(step.x)
        clean.append(step.x0_hat)
        weight, row = step_weight(sampler, step.sigma, step.sigma_next), {}
        for name in teachers:
            apart = step.v - policy.velocity(
                step.x, step.sigma, text, sampler.guidance, models[name]
            )
            row[name] = weight * apart.square().sum().item()
            difference[name].append(apart[0].square().mean(0).sqrt().cpu().numpy())
        kl.append(row)
    noisy, clean = (policy.decode(torch.cat(x)).cpu() for x in (latents, clean))
    apart = {name: np.stack(fields) for name, fields in difference.items()}
    return Walk(
        prompt,
        seed,
        model,
        sampler,
        sigmas,
        noisy,
        clean,
        pd.DataFrame(kl, columns=teachers, dtype=float),
        apart,
    )
