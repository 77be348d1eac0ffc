"""Batches made up for a config's model, in the form that its data loader gives them: the same for all candidates."""

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData

from densekit.benchmark.case import Images

OBJECTS = 7
"""Per image; COCO has 7.3."""

_BLOCK = 64  # pixels of one class in a label map


def make_batch(cfg: Config, images: Images, *, polygons: bool | None = None) -> dict[str, list[Any]]:
    """Random images with random boxes and, where the training pipeline loads them, masks; or with label maps.

    Args:
        cfg: its scope and model say which labels are needed, its training pipeline whether there are masks, and whether
            they are polygons.
        images: number, height, width.
        polygons: masks, as polygons or not; by default as the pipeline loads them.
    """
    number, height, width = images
    generator = np.random.default_rng(0)
    inputs = [torch.from_numpy(generator.integers(0, 256, (3, height, width), np.uint8)) for _ in range(number)]
    if cfg.default_scope == 'mmseg':
        classes = int(cfg.model.decode_head.num_classes)
        samples = [_label_map(generator, height, width, classes) for _ in range(number)]
    else:
        loaded = _loaded_masks(cfg) if polygons is None else 'polygons' if polygons else 'bitmaps'
        classes = min(int(part['num_classes']) for part in _dictionaries(cfg.model) if part.get('num_classes'))
        samples = [_instances(generator, height, width, loaded, classes) for _ in range(number)]
    return {'inputs': inputs, 'data_samples': samples}


def jittered_truth(boxes: torch.Tensor, number: int) -> torch.Tensor:
    """Proposals as a trained detector has them: each lies on a box, moved by up to a tenth of its sides.

    Args:
        boxes: ``(n, 4)``.
        number: of proposals.

    Returns:
        ``(number, 4)``, always the same.
    """
    repeated = boxes.repeat(-(-number // len(boxes)), 1)[:number]
    noise = torch.rand(repeated.shape, generator=torch.Generator().manual_seed(0)).to(boxes) - 0.5
    return repeated + 0.2 * noise * (repeated[:, 2:] - repeated[:, :2]).repeat(1, 2)


def _loaded_masks(cfg: Config) -> str | None:
    """'polygons' or 'bitmaps'; None for a pipeline without masks, with which a detector may not expect any."""
    steps = list(_dictionaries((cfg.get('train_dataloader') or {}).get('dataset', {})))
    loaders = [step for step in steps if re.search(r'Load\w*Annotations$', str(step.get('type')))]
    loaders = [step for step in loaders if step.get('with_mask')]
    if not loaders:
        return None
    return 'polygons' if any(step.get('poly2mask') is False for step in loaders) else 'bitmaps'


def _dictionaries(node: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(node, Mapping):
        yield node
        node = list(node.values())
    if isinstance(node, list | tuple):
        for part in node:
            yield from _dictionaries(part)


def _instances(generator: np.random.Generator, height: int, width: int, kind: str | None, classes: int) -> Any:
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks, PolygonMasks

    sides = generator.uniform(0.08, 0.5, (OBJECTS, 2)) * (width, height)
    corners = generator.uniform(0, 1, (OBJECTS, 2)) * ((width, height) - sides)
    boxes = np.concatenate([corners, corners + sides], 1).astype(np.float32)
    sample = DetDataSample(metainfo=_metainfo(height, width))
    sample.gt_instances = InstanceData(
        bboxes=torch.from_numpy(boxes),
        labels=torch.from_numpy(generator.integers(0, classes, OBJECTS)),
    )
    if kind is not None:
        masks = PolygonMasks([[_diamond(box)] for box in boxes], height, width)
        bitmaps = kind == 'bitmaps'
        sample.gt_instances.masks = BitmapMasks(masks.to_ndarray(), height, width) if bitmaps else masks
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    return sample


def _diamond(box: np.ndarray) -> np.ndarray:
    x1, y1, x2, y2 = box
    middle_x, middle_y = (x1 + x2) / 2, (y1 + y2) / 2
    return np.array([middle_x, y1, x2, middle_y, middle_x, y2, x1, middle_y], np.float32)


def _label_map(generator: np.random.Generator, height: int, width: int, classes: int) -> Any:
    from mmseg.structures import SegDataSample

    labels = torch.empty(1, height, width, dtype=torch.long)
    for top, left in itertools.product(range(0, height, _BLOCK), range(0, width, _BLOCK)):
        labels[:, top : top + _BLOCK, left : left + _BLOCK] = int(generator.integers(0, classes))
    labels[:, :, -8:] = 255  # some pixels have no label
    return SegDataSample(metainfo=_metainfo(height, width), gt_sem_seg=PixelData(data=labels))


def _metainfo(height: int, width: int) -> dict[str, Any]:
    shapes = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), (height, width))
    return {**shapes, 'scale_factor': (1.0, 1.0), 'img_path': '', 'img_id': 0}
