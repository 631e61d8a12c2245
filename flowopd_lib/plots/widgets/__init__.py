"""What moves in a notebook. Headless (the environment's FLOWOPD_HEADLESS), the same things show themselves as
pictures and tables."""

from .explorer import TrajectoryExplorer
from .gallery import SampleGallery
from .monitor import TrainingMonitor
from .playground import Playground

__all__ = ["Playground", "SampleGallery", "TrainingMonitor", "TrajectoryExplorer"]
