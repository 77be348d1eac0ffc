"""What this project adds to mmdet. Importing it registers the data set."""

from .datasets import ShapesDataset

__all__ = ['ShapesDataset']
