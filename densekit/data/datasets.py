"""The generated shapes data set as dataset classes of mmdet and mmseg, whichever of the two is installed.

They stand in mmengine's root registry, where both mmdet and mmseg look after their own.
"""

import inspect
from importlib.util import find_spec
from pathlib import Path

from mmengine.logging import print_log
from mmengine.registry import DATASETS

import densekit.ops  # noqa: F401  importing mmdet needs mmcv's ops
from densekit.data.shapes import CLASSES, MANIFEST, PALETTE, SEG_CLASSES, SEG_PALETTE, generate_shapes


def _provide(data_root: str | None, shapes: dict) -> None:
    """Generate the data set if it is not there yet."""
    allowed = [name for name in inspect.signature(generate_shapes).parameters if name != 'root']
    unknown = sorted(set(shapes) - set(allowed))
    if not data_root or unknown:
        problem = f'unknown {", ".join(unknown)} in shapes' if unknown else 'no data_root given'
        raise ValueError(
            f'Shapes data set: {problem}. It takes data_root, the folder to generate it in, and shapes, a dict of '
            f'{", ".join(allowed)}.'
        )
    if not (Path(data_root) / MANIFEST).exists():
        print_log(f'Generating the shapes data set in {data_root}', logger='current')
    generate_shapes(data_root, **shapes)


if find_spec('mmdet'):
    from mmdet.datasets import CocoDataset

    @DATASETS.register_module()
    class ShapesDetDataset(CocoDataset):
        """The shapes data set for detection and instance segmentation, generated in ``data_root`` on first use.

        Args:
            *args: as for ``CocoDataset``.
            shapes: arguments of :func:`densekit.data.shapes.generate_shapes` other than the folder.
            **kwargs: as for ``CocoDataset``.

        Raises:
            ValueError: if ``data_root`` is missing or holds something else, or ``shapes`` is not understood.
        """

        METAINFO = {'classes': CLASSES, 'palette': list(PALETTE)}

        def __init__(self, *args, shapes: dict | None = None, **kwargs) -> None:
            self.shapes = dict(shapes or {})
            super().__init__(*args, **kwargs)

        def load_data_list(self) -> list[dict]:
            """Generate the data set if it is not there yet, then load its annotations."""
            _provide(self.data_root, self.shapes)
            return super().load_data_list()


if find_spec('mmseg'):
    from mmseg.datasets import BaseSegDataset

    @DATASETS.register_module()
    class ShapesSegDataset(BaseSegDataset):
        """The shapes data set for semantic segmentation, generated in ``data_root`` on first use.

        As in ADE20K, label 0 is ignored and the classes count from 1 on disk, from 0 after loading.

        Args:
            shapes: arguments of :func:`densekit.data.shapes.generate_shapes` other than the folder.
            reduce_zero_label: ignore label 0 and let the others count from 0.
            **kwargs: as for ``BaseSegDataset``.

        Raises:
            ValueError: if ``data_root`` is missing or holds something else, or ``shapes`` is not understood.
        """

        METAINFO = {'classes': SEG_CLASSES, 'palette': [list(colour) for colour in SEG_PALETTE]}

        def __init__(self, *, shapes: dict | None = None, reduce_zero_label: bool = True, **kwargs) -> None:
            self.shapes = dict(shapes or {})
            super().__init__(reduce_zero_label=reduce_zero_label, **kwargs)

        def load_data_list(self) -> list[dict]:
            """Generate the data set if it is not there yet, then list its images."""
            _provide(self.data_root, self.shapes)
            return super().load_data_list()
