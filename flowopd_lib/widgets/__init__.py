"""Interactive widgets for notebooks. Headless (FLOWOPD_HEADLESS, or no kernel) they show figures
and tables instead."""

from .gallery import SampleGallery
from .monitor import TrainingMonitor
from .player import TrajectoryPlayer
from .playground import Playground

__all__ = ["Playground", "SampleGallery", "TrainingMonitor", "TrajectoryPlayer"]
