"""Heads that draw the boxes to learn from of all images at once."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import densekit.ops  # noqa: F401  importing mmdet needs mmcv's ops

# isort: split
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.utils import unpack_gt_instances
from mmengine.registry import MODELS
from torch import Tensor

from densekit.models.box_heads import WholeBoxes
from densekit.models.sampler import WholeRandomSampler


@MODELS.register_module()
class WholeRoIHead(StandardRoIHead):
    """mmdet's StandardRoIHead, to the bit, with :class:`WholeRandomSampler` for all images at once.

    The arguments are those of mmdet's class.
    """

    def loss(
        self, x: Sequence[Tensor], rpn_results_list: Sequence[Any], batch_data_samples: Sequence[Any]
    ) -> dict[str, Any]:
        """Losses by name.

        Args:
            x: ``(N, C, H, W)`` of each level.
            rpn_results_list: of each image, with ``bboxes``, which become ``priors``.
            batch_data_samples: of each image, with ``gt_instances``.
        """
        if not _whole(self.bbox_sampler) or not self.with_bbox:
            return super().loss(x, rpn_results_list, batch_data_samples)
        truths, ignored, _ = unpack_gt_instances(batch_data_samples)
        samples = _drawn(self.bbox_assigner, self.bbox_sampler, rpn_results_list, truths, ignored)
        boxes = self.bbox_loss(x, samples)
        losses = dict(boxes['loss_bbox'])
        if self.with_mask:
            losses.update(self.mask_loss(x, samples, boxes['bbox_feats'], truths)['loss_mask'])
        return losses


@MODELS.register_module()
class WholeCascadeRoIHead(CascadeRoIHead):
    """mmdet's CascadeRoIHead, to the bit, with :class:`WholeRandomSampler` for all images at once in each stage.

    The arguments are those of mmdet's class.
    """

    def loss(
        self, x: Sequence[Tensor], rpn_results_list: Sequence[Any], batch_data_samples: Sequence[Any]
    ) -> dict[str, Any]:
        """Losses by stage and name; the arguments are those of :meth:`WholeRoIHead.loss`."""
        if not all(map(_whole, self.bbox_sampler)) or not self.with_bbox:
            return super().loss(x, rpn_results_list, batch_data_samples)
        truths, ignored, metas = unpack_gt_instances(batch_data_samples)
        losses: dict[str, Any] = {}
        proposals: Any = rpn_results_list
        for stage, weight in enumerate(self.stage_loss_weights):
            self.current_stage = stage
            samples = _drawn(self.bbox_assigner[stage], self.bbox_sampler[stage], proposals, truths, ignored)
            boxes = self.bbox_loss(stage, x, samples)
            found = dict(boxes['loss_bbox'])
            if self.with_mask:
                found.update(self.mask_loss(stage, x, samples, truths)['loss_mask'])
            for name, value in found.items():
                losses[f's{stage}.{name}'] = value * weight if 'loss' in name else value
            if stage < self.num_stages - 1:
                with torch.no_grad():
                    proposals = self.bbox_head[stage].refine_bboxes(samples, boxes, metas)
                if proposals is None:
                    break
        return losses

    def _refine_roi(
        self,
        x: Sequence[Tensor],
        rois: Tensor,
        batch_img_metas: Sequence[Mapping[str, Any]],
        num_proposals_per_img: Sequence[int],
        **kwargs: Any,
    ) -> tuple[Any, Any, Any]:
        """Moves proposals ``(n, 5)`` through all stages.

        Returns:
            Of each image: the proposals of the last stage, the mean of all stages' scores, the last stage's offsets.
        """
        usual = all(isinstance(head, WholeBoxes) and head.with_reg for head in self.bbox_head)
        if not usual or any(head.custom_activation for head in self.bbox_head):
            return super()._refine_roi(x, rois, batch_img_metas, num_proposals_per_img, **kwargs)
        scores, sizes = [], list(num_proposals_per_img)
        for stage, head in enumerate(self.bbox_head):
            found = self._bbox_forward(stage=stage, x=x, rois=rois, **kwargs)
            parts = rois.split(sizes), found['cls_score'].split(sizes), found['bbox_pred'].split(sizes)
            scores.append(parts[1])
            if stage < self.num_stages - 1:
                moved = [
                    head.regress_by_class(roi[:, 1:], score[:, :-1].argmax(dim=1), move, meta)
                    for roi, score, move, meta in zip(*parts, batch_img_metas, strict=True)
                ]
                rois = torch.cat([rois[:, :1], torch.cat(moved)], dim=1)
        means = [sum(of_image) / float(len(scores)) for of_image in zip(*scores, strict=True)]
        return parts[0], means, parts[2]


def _whole(sampler: Any) -> bool:
    return isinstance(sampler, WholeRandomSampler) and sampler.whole


def _drawn(
    assigner: Any, sampler: WholeRandomSampler, proposals: Sequence[Any], truths: Sequence[Any], ignored: Sequence[Any]
) -> list[Any]:
    """The boxes of each image to learn from."""
    for one in proposals:
        one.priors = one.pop('bboxes')
    assigned = [assigner.assign(*parts) for parts in zip(proposals, truths, ignored, strict=True)]
    return sampler.sample_all(assigned, [one.priors for one in proposals], truths)
