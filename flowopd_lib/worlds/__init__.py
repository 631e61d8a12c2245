"""Worlds: what a suite of experiments is about, as data. A name or a YAML file gives one."""

from .world import Expert, Task, World, load_world

__all__ = ["Expert", "load_world", "Task", "World"]
