"""What a mask head is to learn: each true mask, cut out by a box and scaled to the size of the head's output.

mmdet 3.3.0 (mask_target.py, structures/mask/structures.py) takes the boxes to the host, gathers the mask of every
positive box as float32 over the whole image (128 boxes at 800 x 1333 are 546 MB), and brings the targets through NumPy
back to the device, in each stage of a cascade anew. Here masks go to the device once, as bytes, and nothing comes back.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import densekit.ops  # noqa: F401  importing mmdet needs mmcv's ops

# isort: split
from mmcv.ops import roi_align
from mmdet.structures.mask import BitmapMasks, mask_target
from torch import Tensor
from torch.nn.modules.utils import _pair

# Masks as float32 that exist at a time: 128 MiB, 31 masks of 800 x 1333 pixels.
PIXELS_AT_ONCE = 1 << 25


def mask_targets(
    boxes: Sequence[Tensor], indices: Sequence[Tensor], masks: Sequence[Any], cfg: Mapping[str, Any]
) -> Tensor:
    """Targets of the positive boxes of several images, to the bit those of mmdet's ``mask_target`` on a GPU.

    On a CPU mmdet also clips the boxes that it is given, in place; these stay as they are.

    Args:
        boxes: for each image ``(n, 4)``: x1, y1, x2, y2 in pixels.
        indices: for each image ``(n,)``: which mask belongs to a box.
        masks: for each image mmdet's BitmapMasks or PolygonMasks. Polygons, which mmdet cuts before it draws them, are
            left to mmdet.
        cfg: ``mask_size``, a number or (height, width), and ``soft_mask_target`` for shares of pixels instead of 0
            and 1.

    Returns:
        ``(n of all images, height, width)`` float32.
    """
    if not all(isinstance(image, BitmapMasks) for image in masks):
        return mask_target(boxes, indices, masks, cfg)
    size = _pair(cfg['mask_size'])
    parts = [_of_image(*image, size) for image in zip(boxes, indices, masks, strict=True)]
    shares = torch.cat(parts)
    return shares if cfg.get('soft_mask_target', False) else (shares >= 0.5).float()


def _of_image(boxes: Tensor, indices: Tensor, masks: BitmapMasks, size: tuple[int, int]) -> Tensor:
    """``(n, *size)``: the share of each cell that the mask covers."""
    boxes = boxes.float()
    targets = boxes.new_zeros((len(boxes), *size))
    if not len(boxes):
        return targets
    bytes_ = _on_device(masks, boxes.device)
    x1, y1, x2, y2 = boxes.T
    corners = (x1.clamp(0, masks.width), y1.clamp(0, masks.height), x2.clamp(0, masks.width), y2.clamp(0, masks.height))
    at_once = max(PIXELS_AT_ONCE // (masks.height * masks.width), 1)
    for first in range(0, len(bytes_), at_once):
        # Boxes of other masks are pooled too and thrown away: to leave them out the host would have to wait.
        part = bytes_[first : first + at_once].to(boxes.dtype)
        within = (indices - first).clamp(0, len(part) - 1)
        rois = torch.stack([within.to(boxes.dtype), *corners], dim=1)
        pooled = roi_align(part[:, None], rois, size, 1.0, 0, 'avg', True)[:, 0]
        targets = torch.where((within == indices - first)[:, None, None], pooled, targets)
    return targets


def _on_device(masks: BitmapMasks, device: torch.device) -> Tensor:
    """``(masks, H, W)`` on the device; kept with the masks, for the next stage of a cascade."""
    array, kept = getattr(masks, '_on_device', (None, None))
    if kept is None or array is not masks.masks or kept.device != device:
        kept = torch.from_numpy(masks.masks)
        if device.type == 'cuda':
            kept = kept.pin_memory().to(device, non_blocking=True)  # from pageable memory the host would wait
        masks._on_device = masks.masks, kept
    return kept
