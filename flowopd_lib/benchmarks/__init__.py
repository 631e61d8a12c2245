"""Benchmarks: what a suite of experiments is about, as data. A name or a YAML file gives one."""

from .benchmark import Benchmark, Expert, Task, load_benchmark

__all__ = ["Expert", "load_benchmark", "Task", "Benchmark"]
