"""densekit: ConvNeXt for detection and segmentation. Importing this package imports nothing else."""

__version__ = '0.1.0'
