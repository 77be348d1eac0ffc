"""Data: checks before a run, and the generated "shapes" data set.

Importing it registers the dataset classes, and makes mmdet match classes by name.
"""

from densekit.data import datasets as datasets
from densekit.data.class_order import match_classes_by_name

match_classes_by_name()
