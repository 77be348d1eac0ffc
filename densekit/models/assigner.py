"""Which boxes are to learn which objects, decided without asking the device about each object."""

from typing import Any

import torch

import densekit.ops  # noqa: F401  importing mmdet needs mmcv's ops

# isort: split
from mmdet.models.task_modules.assigners import AssignResult, MaxIoUAssigner
from mmengine.registry import TASK_UTILS
from torch import Tensor


@TASK_UTILS.register_module()
class WholeMaxIoUAssigner(MaxIoUAssigner):
    """mmdet's MaxIoUAssigner, to the bit, for all objects at once.

    mmdet's (3.3.0) compares each object's best IoU with ``min_pos_iou`` on the host and selects by masks; each of both
    waits for the device. This one never does. The arguments are those of mmdet's class.
    """

    def assign_wrt_overlaps(self, overlaps: Tensor, gt_labels: Tensor) -> AssignResult:
        """Assigns boxes by their IoU with objects.

        Args:
            overlaps: ``(objects, boxes)``.
            gt_labels: ``(objects,)``.

        Returns:
            Of each box the object, counted from 1 (0 for none, -1 for one that is left out), its IoU and its label (-1
            for none).
        """
        objects, boxes = overlaps.shape
        if not objects or not boxes or not self.gt_max_assign_all:
            return super().assign_wrt_overlaps(overlaps, gt_labels)
        best, nearest = overlaps.max(dim=0)
        low, high = self.neg_iou_thr if isinstance(self.neg_iou_thr, tuple) else (0, self.neg_iou_thr)
        assigned = nearest.new_full((boxes,), -1)
        assigned.masked_fill_((best >= low) & (best < high), 0)
        assigned = torch.where(best >= self.pos_iou_thr, nearest + 1, assigned)
        if self.match_low_quality:
            assigned = torch.where((last := self._last_claim(overlaps)) > 0, last, assigned)
        labels = torch.where(assigned > 0, gt_labels[(assigned - 1).clamp(min=0)], -1)
        return AssignResult(num_gts=objects, gt_inds=assigned, max_overlaps=best, labels=labels)

    def _last_claim(self, overlaps: Tensor) -> Tensor:
        """``(boxes,)``: the last object, from 1, of those for which no box is better; 0 for none."""
        best = overlaps.max(dim=1, keepdim=True).values
        claims = (overlaps == best) & (best >= self.min_pos_iou)
        numbers: Any = torch.arange(1, len(overlaps) + 1, dtype=torch.int32, device=overlaps.device)
        return torch.where(claims, numbers[:, None], 0).amax(dim=0).long()
