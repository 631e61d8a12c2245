"""What moves in a notebook. Headless (the environment's FLOWOPD_HEADLESS), the same things show themselves as pictures and tables."""
from .gallery import SampleGallery
from .watch import watch

__all__ = ["SampleGallery", "watch"]
