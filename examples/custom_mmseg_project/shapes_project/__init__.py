"""What this project adds to mmseg. Importing it registers the data set."""

from .datasets import ShapesDataset

__all__ = ['ShapesDataset']
