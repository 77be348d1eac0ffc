"""The data set of this project."""

from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS


@DATASETS.register_module()
class ShapesDataset(BaseSegDataset):
    """Five shapes on a background, as label maps; 0 is ignored and the classes count from 1."""

    METAINFO = {
        'classes': ('background', 'circle', 'square', 'triangle', 'star', 'cross'),
        'palette': [[120, 120, 120], [220, 20, 60], [119, 11, 32], [0, 0, 142], [0, 60, 100], [0, 80, 100]],
    }

    def __init__(self, reduce_zero_label: bool = True, **kwargs) -> None:
        super().__init__(reduce_zero_label=reduce_zero_label, **kwargs)
