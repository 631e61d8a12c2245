"""What the experiments are about: models with prompts, rewards and experts."""

from .benchmark import DEFAULT, Benchmark, load_benchmark

__all__ = ["DEFAULT", "Benchmark", "load_benchmark"]
