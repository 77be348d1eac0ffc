"""Which boxes are to learn which objects, decided without asking the device about each object."""

from typing import Any

import torch

import densekit.ops  # noqa: F401  importing mmdet needs mmcv's ops

# isort: split
from mmdet.models.task_modules.assigners import AssignResult, BboxOverlaps2D, MaxIoUAssigner
from mmengine.registry import TASK_UTILS
from torch import Tensor

from densekit.models.boxes import overlaps as overlaps_of
from densekit.models.overrides import unchanged


@TASK_UTILS.register_module()
class WholeMaxIoUAssigner(MaxIoUAssigner):
    """mmdet's MaxIoUAssigner, to the bit, for all objects at once.

    mmdet's (3.3.0) compares each object's best IoU with ``min_pos_iou`` on the host and selects by masks; each of both
    waits for the device. This one never does. The arguments are those of mmdet's class.
    """

    @property
    def plain(self) -> bool:
        """Whether only IoUs decide, on the device: no regions to be left out, no repeated objects.

        Not in subclasses that assign otherwise.
        """
        if not unchanged(self, WholeMaxIoUAssigner, 'assign', 'assign_wrt_overlaps'):
            return False
        usual = type(self.iou_calculator) is BboxOverlaps2D and self.iou_calculator.dtype is None
        return usual and self.gpu_assign_thr <= 0 and self.ignore_iof_thr <= 0 and self.perm_repeat_gt_cfg is None

    def assign(
        self,
        pred_instances: Any,
        gt_instances: Any,
        gt_instances_ignore: Any = None,
        *,
        among: Tensor | None = None,
        **kwargs: Any,
    ) -> AssignResult:
        """Assigns boxes to objects.

        Args:
            pred_instances: with ``priors`` ``(boxes, 4)``.
            gt_instances: with ``bboxes`` ``(objects, 4)`` and ``labels`` ``(objects,)``.
            gt_instances_ignore: with ``bboxes``, regions to be left out, for an assigner that heeds them.
            among: ``(boxes,)`` bool: the others are left out, as if they were not there. Only if :attr:`plain`.
            **kwargs: passed on to mmdet's.

        Returns:
            As :meth:`assign_wrt_overlaps`.
        """
        if not self.plain or not isinstance(pred_instances.priors, Tensor):
            assert among is None, 'this assigner is not plain'
            return super().assign(pred_instances, gt_instances, gt_instances_ignore, **kwargs)
        found = overlaps_of(gt_instances.bboxes, pred_instances.priors)
        if among is None:
            return self.assign_wrt_overlaps(found, gt_instances.labels)
        result = self.assign_wrt_overlaps(found.masked_fill_(~among, -1), gt_instances.labels)
        result.gt_inds = result.gt_inds.masked_fill(~among, -1)  # without objects all would be background
        return result

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
