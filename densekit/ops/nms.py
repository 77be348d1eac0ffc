"""Non-maximum suppression: the plain one, the soft one, and the one that tells what suppressed what."""

import ctypes

import torch
import torchvision
from torch import Tensor

from densekit.ops.registry import compute_dtype, substitute


@substitute
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Non-maximum suppression.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2 in pixels.
        scores: (N,).
        iou_threshold: Of two boxes whose IoU is larger, the one with the higher score stays.
        offset: 1 where x2 and y2 are the last pixels inside the box (widths are x2 - x1 + 1), else 0.

    Returns:
        The int64 indices of the boxes that stay, by descending score.
    """
    dtype = compute_dtype(boxes, scores)
    boxes = boxes.to(dtype)
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    if dtype == torch.float32:
        # A float32 IoU is to be compared with the float32 threshold, as mmcv and torchvision's CUDA kernel do;
        # torchvision's CPU kernel takes the double, for which an IoU of 0.3f is above 0.3.
        iou_threshold = ctypes.c_float(iou_threshold).value
    return torchvision.ops.nms(boxes, scores.to(dtype), iou_threshold)


def _iou_of_one(box: Tensor, boxes: Tensor, offset: int) -> Tensor:
    """Return the IoU of one box (4,) with the boxes (N, 4); 0 where they do not meet or have no area."""
    inter = torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2]) + offset
    inter = inter.clamp(min=0).prod(dim=-1)
    area = (box[2:] - box[:2] + offset).prod()
    areas = (boxes[:, 2:] - boxes[:, :2] + offset).prod(dim=-1)
    return torch.where(inter > 0, inter / (area + areas - inter), 0)


@substitute
def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft non-maximum suppression (Bodla et al., 2017).

    The box with the highest score is taken, the scores of the others are lowered by their IoU with it, and so on. Boxes
    whose score falls below ``min_score`` are out; the very first is never tested.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2 in pixels.
        scores: (N,).
        dets: (N, 5), filled in place: the first K rows get the boxes that stay and their lowered scores; the other rows
            are left as they are.
        iou_threshold: Methods 0 and 1 lower the score of a box if its IoU is at least this.
        sigma: The width of method 2.
        min_score: The lowest score to stay.
        method: The factor on the score: 0 (naive) zero, 1 (linear) 1 - IoU, 2 (gaussian) exp(-IoU^2 / sigma).
        offset: 1 where x2 and y2 are the last pixels inside the box (widths are x2 - x1 + 1), else 0.

    Returns:
        The int64 indices (K,) of the boxes that stay, in the order of ``dets``.
    """
    dtype = compute_dtype(boxes, scores)
    rest, scores = boxes.to(dtype), scores.to(dtype)
    order = torch.arange(len(boxes), device=boxes.device)
    kept: list[int] = []
    while len(order):
        top = int(scores.argmax())
        dets[len(kept), :4] = rest[top]
        dets[len(kept), 4] = scores[top]
        kept.append(int(order[top]))

        iou = _iou_of_one(rest[top], rest, offset)
        if method == 2:
            factor = torch.exp(-(iou * iou) / sigma)
        else:
            factor = torch.where(iou >= iou_threshold, 1 - iou if method == 1 else torch.zeros_like(iou), 1)
        scores = scores * factor
        stays = ~(scores < min_score)
        stays[top] = False
        rest, scores, order = rest[stays], scores[stays], order[stays]
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device)


@substitute
def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Non-maximum suppression that tells which box suppressed which.

    Args:
        dets: (N, 5) as x1, y1, x2, y2 in pixels and score.
        iou_threshold: A box suppresses those of lower score whose IoU with it is at least this.

    Returns:
        For each box that stays, by descending score, its index and those of the boxes it suppressed.
    """
    dets = dets.to(compute_dtype(dets))
    order = dets[:, 4].argsort(descending=True, stable=True)
    groups = []
    while len(order):
        matched = _iou_of_one(dets[order[0], :4], dets[order, :4], 0) >= iou_threshold
        matched[0] = True  # a box without an area does not overlap itself
        groups.append(order[matched].tolist())
        order = order[~matched]
    return groups
