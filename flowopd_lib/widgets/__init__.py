"""Interactive widgets for notebooks. Headless (FLOWOPD_HEADLESS, or no kernel) they show figures
and tables instead."""

from .gallery import SampleGallery
from .monitor import TrainingMonitor
from .sampling import Playground, TrajectoryPlayer, list_prompts

__all__ = ["Playground", "SampleGallery", "TrainingMonitor", "TrajectoryPlayer", "list_prompts"]
