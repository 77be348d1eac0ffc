"""Data: checks before a run, and the generated "shapes" data set. Importing it registers the dataset classes."""

from densekit.data import datasets as datasets
