"""What a notebook computes with: jobs, launchers, cached trainings."""

from .notebook import Lab, Training
from .recipe import Recipe, build, grpo_mix

__all__ = ["Lab", "Recipe", "Training", "build", "grpo_mix"]
