"""Headless runs of the notebooks."""
