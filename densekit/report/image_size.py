"""The largest image that a training pipeline makes, as far as its config tells."""

from collections.abc import Mapping, Sequence
from typing import Any

Size = tuple[int, int]
"""(height, width)"""


def training_size(dataset: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Size | None:
    """The largest size of a training image after augmentation and padding.

    Follows the resizing, cropping and padding transforms of mmcv, mmdet and mmseg; others are taken to keep the size.
    Where the aspect ratio is kept, the result is the frame that images fit into, lying on its long side.

    Args:
        dataset: a config with a pipeline, wrappers and their inner data sets included.
        preprocessor: config of the model's data preprocessor, for what it pads to.

    Returns:
        Height and width, or None if nothing in the configs sets them.
    """
    size = _of_dataset(dataset)
    preprocessor = preprocessor or {}
    fixed = [augment['size'] for augment in preprocessor.get('batch_augments') or [] if 'size' in augment]
    if preprocessor.get('size'):
        fixed.append(preprocessor['size'])
    for height, width in fixed:
        size = (height, width) if size is None else (max(size[0], height), max(size[1], width))
    return padded(size, preprocessor) if size else None


def padded(size: Size, preprocessor: Mapping[str, Any] | None) -> Size:
    """Both sides rounded up to what a data preprocessor makes them divisible by."""
    preprocessor = preprocessor or {}
    divisor = preprocessor.get('pad_size_divisor') or preprocessor.get('size_divisor') or 1
    height, width = (-(-side // divisor) * divisor for side in size)
    return height, width


def _of_dataset(dataset: Mapping[str, Any]) -> Size | None:
    inner = dataset.get('datasets') or ([dataset['dataset']] if dataset.get('dataset') else [])
    return _after(dataset.get('pipeline') or [], _largest([_of_dataset(part) for part in inner]))


def _largest(sizes: Sequence[Size | None]) -> Size | None:
    return max((size for size in sizes if size), key=lambda size: size[0] * size[1], default=None)


def _after(pipeline: Sequence[Mapping[str, Any]], size: Size | None) -> Size | None:
    for transform in pipeline:
        size = _transformed(transform, size)
    return size


def _transformed(transform: Mapping[str, Any], size: Size | None) -> Size | None:
    kind = str(transform.get('type')).rpartition('.')[2]
    if kind == 'RandomChoice':
        return _largest([_after(branch, size) for branch in transform['transforms']])
    if 'Resize' in kind:
        return _resized(transform) or size
    if kind == 'RandomCrop' and transform.get('crop_type', 'absolute').startswith('absolute'):
        crop = _pair(transform['crop_size'])
        return crop if size is None else _cut(size, crop)
    if kind == 'Pad' and transform.get('size'):
        width, height = transform['size']  # as mmcv has it
        return height, width
    return size


def _resized(transform: Mapping[str, Any]) -> Size | None:
    """The result of a resizing transform: the largest of its scales, by the largest of its ratios."""
    scales = transform.get('scales') or ([transform['scale']] if transform.get('scale') else [])
    if not scales:
        return (transform['height'], transform['width']) if 'height' in transform else None
    ratio = max(transform.get('ratio_range') or [1.0])
    sizes = []
    for scale in scales:
        # A number is the short side where there is a limit to the long one, otherwise both.
        width, height = (transform.get('max_size') or scale, scale) if isinstance(scale, int) else scale
        sizes.append((int(height * ratio), int(width * ratio)))
    if transform.get('keep_ratio') or 'max_size' in transform:
        sizes = [(min(size), max(size)) for size in sizes]
    return _largest(sizes)


def _cut(size: Size, crop: Size) -> Size:
    """What is left of an image, lying or standing, after a crop."""
    lying = min(size[0], crop[0]), min(size[1], crop[1])
    standing = min(size[1], crop[0]), min(size[0], crop[1])
    return max(lying, standing, key=lambda pair: pair[0] * pair[1])


def _pair(value: int | Sequence[int]) -> Size:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
