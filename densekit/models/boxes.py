"""Operations on boxes as mmdet has them, to the bit, but without the host waiting for the device.

The host waits when a number on the device decides the size of a result, and when numbers go there from memory that is
not pinned, as ``new_tensor`` has it. Constants are filled in on the device instead; how many there are of something is
asked once for all images (:mod:`densekit.models.sampler`). How often a step waits, ``densekit.benchmark.waits`` counts.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

import densekit.ops  # noqa: F401  importing mmdet needs mmcv's ops

# isort: split
from mmcv.ops import batched_nms, nms
from mmdet.models.losses.iou_loss import GIoULoss
from mmdet.models.losses.smooth_l1_loss import L1Loss, SmoothL1Loss, l1_loss, smooth_l1_loss
from mmdet.models.losses.utils import weighted_loss
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from mmengine.registry import TASK_UTILS
from torch import Tensor, nn

SPLIT_AT = 10000  # boxes: from there on mmcv's batched_nms takes one group after the other


def constant(values: Sequence[float], like: Tensor) -> Tensor:
    """``like.new_tensor(values)``, made on the device.

    Args:
        values: at least one.
        like: of the dtype and on the device that the result is to have.
    """
    if len(set(values)) == 1:
        return like.new_full((len(values),), values[0])
    return torch.cat([like.new_full((1,), value) for value in values])


def positions(mask: Tensor, count: int) -> Tensor:
    """Where a mask ``(n,)`` is on, ascending, given in how many places; ``(count,)`` int64."""
    if mask.device.type == 'cpu':
        return mask.nonzero().squeeze(1)
    # Not nonzero_static, which CUDA has from torch 2.7 on, and for empty masks from 2.10 on.
    return mask.logical_not().byte().argsort(stable=True)[:count]


def scaled(boxes: Tensor, factors: Sequence[float]) -> Tensor:
    """Boxes ``(..., 4)`` in pixels of an image that is (horizontal, vertical) times as large."""
    return boxes * constant(tuple(factors) * 2, boxes)


def overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU ``(m, n)`` of boxes ``(m, 4)`` with others ``(n, 4)``; as mmdet's ``bbox_overlaps``."""
    if not len(boxes) or not len(others):
        return boxes.new_empty(len(boxes), len(others))
    return _ratios(boxes[:, None], others[None], 1e-6)[0]


@weighted_loss
def giou_loss(boxes: Tensor, truth: Tensor, eps: float) -> Tensor:
    """1 - GIoU ``(n,)`` of boxes ``(n, 4)`` with the true ones; as mmdet's ``giou_loss``."""
    least = constant([eps], boxes)
    ious, union = _ratios(boxes, truth, eps)
    sides = torch.max(boxes[..., 2:], truth[..., 2:]) - torch.min(boxes[..., :2], truth[..., :2])
    sides = sides.clamp(min=0)
    around = torch.max(sides[..., 0] * sides[..., 1], least)
    return 1 - (ious - (around - union) / around)


def _ratios(boxes: Tensor, others: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """IoU and union of boxes that broadcast."""
    first = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    second = (others[..., 2] - others[..., 0]) * (others[..., 3] - others[..., 1])
    sides = torch.min(boxes[..., 2:], others[..., 2:]) - torch.max(boxes[..., :2], others[..., :2])
    sides = sides.clamp(min=0)
    common = sides[..., 0] * sides[..., 1]
    union = torch.max(first + second - common, constant([eps], boxes))
    return common / union, union


def box_loss(loss: nn.Module, boxes: Tensor, truth: Tensor, weight: Tensor, avg_factor: float) -> Tensor:
    """``loss(boxes, truth, weight, avg_factor=avg_factor)`` of one of mmdet's classes.

    These ask first whether any weight is above 0; where none is, both ways give 0.

    Args:
        loss: L1Loss, SmoothL1Loss and GIoULoss of mmdet are computed without a question.
        boxes: ``(n, 4)``, or offsets of boxes.
        truth: ``(n, 4)``.
        weight: ``(n, 4)``.
        avg_factor: what the sum is divided by.
    """
    functions = {
        L1Loss: l1_loss,
        SmoothL1Loss: functools.partial(smooth_l1_loss, beta=getattr(loss, 'beta', None)),
        GIoULoss: functools.partial(giou_loss, eps=getattr(loss, 'eps', None)),
    }
    function = functions.get(type(loss))
    if function is None or boxes.dtype == torch.float16:
        return loss(boxes, truth, weight, avg_factor=avg_factor)
    if isinstance(loss, GIoULoss):
        weight = weight.mean(-1)
    return loss.loss_weight * function(boxes, truth, weight, reduction=loss.reduction, avg_factor=avg_factor)


def suppressed(boxes: Tensor, scores: Tensor, groups: Tensor, cfg: Mapping[str, Any] | None) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression within each group, as mmcv's ``batched_nms``.

    The host waits once, within torchvision's operator for CUDA, which needs to know how many boxes stay.

    Args:
        boxes: ``(n, 4)``, n at least 1.
        scores: ``(n,)``.
        groups: ``(n,)``: levels or classes.
        cfg: ``type`` and the arguments of one of mmcv's operators. Others than plain ``nms`` are left to mmcv,
            and so is None, by which boxes are sorted only.

    Returns:
        ``(k, 5)``, boxes with scores, by descending score, and their indices.
    """
    if cfg is None:
        return batched_nms(boxes, scores, groups, None)
    rest = {key: value for key, value in cfg.items() if key not in ('type', 'class_agnostic', 'split_thr')}
    plain = cfg.get('type', 'nms') == 'nms' and not cfg.get('class_agnostic')
    if not plain or len(boxes) >= cfg.get('split_thr', SPLIT_AT):
        return batched_nms(boxes, scores, groups, cfg)
    apart = boxes + (groups.to(boxes) * (boxes.max() + 1))[:, None]
    found, kept = nms(apart, scores, **rest)
    return torch.cat([boxes[kept], found[:, -1:]], dim=1), kept


@TASK_UTILS.register_module()
class DeviceBoxCoder(DeltaXYWHBBoxCoder):
    """mmdet's DeltaXYWHBBoxCoder, to the bit, with its constants made on the device.

    The arguments are those of mmdet's class.
    """

    def encode(self, bboxes: Any, gt_bboxes: Any) -> Tensor:
        """Offsets that turn boxes into the true ones.

        Args:
            bboxes: ``(n, 4)``.
            gt_bboxes: ``(n, 4)``.

        Returns:
            ``(n, 4)``: dx and dy in sides of the box, dw and dh as logarithms; less the means, by the deviations.
        """
        if not isinstance(bboxes, Tensor) or not isinstance(gt_bboxes, Tensor):
            return super().encode(bboxes, gt_bboxes)
        boxes, truth = bboxes.float(), gt_bboxes.float()
        sides, true_sides = boxes[:, 2:] - boxes[:, :2], truth[:, 2:] - truth[:, :2]
        centres, true_centres = (boxes[:, :2] + boxes[:, 2:]) * 0.5, (truth[:, :2] + truth[:, 2:]) * 0.5
        offsets = torch.cat([(true_centres - centres) / sides, torch.log(true_sides / sides)], dim=1)
        return offsets.sub_(constant(self.means, offsets)).div_(constant(self.stds, offsets))

    def decode(self, bboxes: Any, pred_bboxes: Tensor, max_shape: Any = None, wh_ratio_clip: float = 16 / 1000) -> Any:
        """Boxes moved by offsets.

        Args:
            bboxes: ``(n, 4)``.
            pred_bboxes: ``(n, classes * 4)``.
            max_shape: height and width of the image, to which boxes are cut.
            wh_ratio_clip: the most by which a side is divided, or multiplied by its inverse.

        Returns:
            ``(n, classes * 4)``.
        """
        plain = isinstance(bboxes, Tensor) and pred_bboxes.ndim == 2 and not self.use_box_type
        if not plain or self.add_ctr_clamp or not len(pred_bboxes) or torch.onnx.is_in_onnx_export():
            return super().decode(bboxes, pred_bboxes, max_shape, wh_ratio_clip)
        offsets = pred_bboxes.reshape(-1, 4)
        offsets = offsets * constant(self.stds, offsets)[None] + constant(self.means, offsets)[None]
        boxes = bboxes.repeat(1, pred_bboxes.shape[1] // 4).reshape(-1, 4)
        sides = boxes[:, 2:] - boxes[:, :2]
        largest = np.abs(np.log(wh_ratio_clip))
        centres = (boxes[:, :2] + boxes[:, 2:]) * 0.5 + sides * offsets[:, :2]
        sides = sides * offsets[:, 2:].clamp(min=-largest, max=largest).exp()
        moved = torch.cat([centres - sides * 0.5, centres + sides * 0.5], dim=-1)
        if self.clip_border and max_shape is not None:
            moved[:, 0::2].clamp_(min=0, max=max_shape[1])
            moved[:, 1::2].clamp_(min=0, max=max_shape[0])
        return moved.reshape(len(pred_bboxes), -1)
