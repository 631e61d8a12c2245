"""Headless runs of the notebooks: profiles, the runner, its report, publishing, comparison."""
