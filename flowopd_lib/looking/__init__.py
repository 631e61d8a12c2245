"""Figures, galleries, trajectories."""
