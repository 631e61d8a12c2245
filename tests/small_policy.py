"""A policy small enough to average over thousands of rollouts: v = a x + b (1 + sigma)."""

from types import SimpleNamespace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flowopd_lib.policy import TextEmbedding


class SmallPolicy:
    """The part of FlowPolicy that samplers and objectives use; weights are one (2, D) tensor an
    adapter: slope, bias."""

    device = torch.device("cpu")
    pipeline = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))

    def __init__(self, size: int = 2, **adapters: torch.Tensor):
        self.latent_shape, self.calls = (size, 1, 1), []
        self.weights = {None: torch.zeros(2, size), **adapters}

    def encode(self, texts):
        return TextEmbedding(torch.zeros(len(texts), 1, 1), torch.zeros(len(texts), 1))

    def velocity(self, x, sigma, text, guidance=1.0, adapter=None):
        self.calls.append((adapter, len(x), torch.is_grad_enabled()))
        slope, bias = self.weights[adapter]
        level = 1 + sigma[:, None, None, None] if torch.is_tensor(sigma) else 1 + sigma
        return slope[:, None, None] * x + bias[:, None, None] * level

    def sigmas(self, steps):
        self.pipeline.scheduler.set_timesteps(steps)
        return self.pipeline.scheduler.sigmas.tolist()

    def decode(self, latents):
        return latents[:, :1].expand(-1, 3, 1, 1)
