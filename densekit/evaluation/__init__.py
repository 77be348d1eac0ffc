"""Metrics. Importing it registers them."""

from densekit.evaluation.iou import ExactIoUMetric as ExactIoUMetric
