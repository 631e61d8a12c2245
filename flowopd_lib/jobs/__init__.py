"""Trainings as data, and where they run."""
