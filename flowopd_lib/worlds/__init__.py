"""Worlds: a pipeline, prompts, judges and experts."""
