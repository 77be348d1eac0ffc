"""The forward pass that is counted: of images to what heads put out, before boxes are suppressed or masks pasted."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from densekit.report.image_size import Size

# The counting rule behind the published figures of two-stage detectors, of Swin and ConvNeXt alike.
NUM_PROPOSALS = 1000
NUM_MASKS = 100

_COUNTED_HEADS = {'bbox_roi_extractor', 'bbox_head', 'mask_roi_extractor', 'mask_head'}


def run_as_counted(model: Any, size: Size) -> None:
    """Runs a detector or segmentor of mmdet or mmseg on one image, as the papers count it.

    Two-stage detectors send 1000 proposals through each box head, and 100 RoIs through each mask head. A segmentor's
    auxiliary head, which serves training only, is not run.

    Args:
        model: on the meta device.
        size: of the image.

    Raises:
        ValueError: if a two-stage detector has heads besides those for boxes and masks.
    """
    image = torch.empty(1, 3, *size, device='meta')
    samples = [BaseDataElement(metainfo=_metainfo(size))]
    if getattr(model, 'with_roi_head', False):
        _run_two_stage(model, image)
    elif _takes_samples(getattr(model, 'decode_head', None)):
        model.decode_head(model.extract_feat(image), samples)  # mmseg's own forward leaves the samples out
    else:
        model(image, samples, mode='tensor')


def _run_two_stage(model: Any, image: Tensor) -> None:
    others = {name for name, _ in model.roi_head.named_children()} - _COUNTED_HEADS
    if others:
        raise ValueError(f'{type(model.roi_head).__name__} has {", ".join(sorted(others))}, which no rule covers')
    features = model.extract_feat(image)
    if model.with_rpn:
        model.rpn_head(features)
    for kind, number in (('bbox', NUM_PROPOSALS), ('mask', NUM_MASKS)):
        heads = _stages(model.roi_head, f'{kind}_head')
        for head, extractor in zip(heads, _stages(model.roi_head, f'{kind}_roi_extractor'), strict=True):
            head(image.new_empty(number, extractor.out_channels, *extractor.roi_layers[0].output_size))


def _stages(roi_head: nn.Module, name: str) -> Iterator[Any]:
    """The modules of that name, one for each stage of a cascade."""
    module = getattr(roi_head, name, None)
    if isinstance(module, nn.ModuleList):
        yield from module
    elif module is not None:
        yield module


def _takes_samples(head: nn.Module | None) -> bool:
    return head is not None and len(inspect.signature(head.forward).parameters) > 1


def _metainfo(size: Size) -> dict[str, Any]:
    shapes = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
    return {**dict.fromkeys(shapes, size), 'scale_factor': (1.0, 1.0)}
