"""The data set of this project."""

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS


@DATASETS.register_module()
class ShapesDataset(CocoDataset):
    """Five shapes with boxes, in COCO's format."""

    METAINFO = {
        'classes': ('circle', 'square', 'triangle', 'star', 'cross'),
        'palette': [(220, 20, 60), (119, 11, 32), (0, 0, 142), (0, 60, 100), (0, 80, 100)],
    }
