"""Box heads that learn and find without asking the device what the host knows."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import densekit.ops  # noqa: F401  importing mmdet needs mmcv's ops

# isort: split
from mmdet.models.losses import accuracy
from mmdet.models.roi_heads.bbox_heads import BBoxHead, ConvFCBBoxHead, Shared2FCBBoxHead
from mmengine.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor

from densekit.models.boxes import box_loss, positions, scaled, suppressed
from densekit.models.overrides import unchanged


class WholeBoxes(BBoxHead):
    """mmdet's BBoxHead, to the bit.

    mmdet's (3.3.0) looks at the labels to find out which boxes have an object; the sampler knows it. With
    :class:`DeviceBoxCoder` the host does not wait in training. In inference it does twice for each image: for the
    number of boxes with a score, and in the suppression. A subclass with a ``loss`` or targets of its own goes mmdet's
    way.
    """

    def loss_and_target(
        self,
        cls_score: Tensor,
        bbox_pred: Any,
        rois: Tensor,
        sampling_results: Sequence[Any],
        rcnn_train_cfg: Any,
        concat: bool = True,
        reduction_override: str | None = None,
    ) -> dict[str, Any]:
        """Losses and targets.

        Args:
            cls_score: ``(n, classes + 1)``, of the boxes of all images.
            bbox_pred: ``(n, classes * 4)``.
            rois: ``(n, 5)``: index of the image, x1, y1, x2, y2 in pixels.
            sampling_results: of each image: first come its boxes with an object, then those without.
            rcnn_train_cfg: with ``pos_weight``.
            concat: targets of all images in one tensor.
            reduction_override: of the losses.

        Returns:
            ``loss_bbox``, the losses by name, and ``bbox_targets``, as of mmdet's.
        """
        usual = isinstance(cls_score, Tensor) and isinstance(bbox_pred, Tensor) and concat and not reduction_override
        same = unchanged(self, BBoxHead, 'loss', 'get_targets', '_get_targets_single')
        if not usual or not same or self.custom_activation or not len(rois):
            return super().loss_and_target(
                cls_score, bbox_pred, rois, sampling_results, rcnn_train_cfg, concat, reduction_override
            )
        targets = self.get_targets(sampling_results, rcnn_train_cfg)
        labels, weights, truth, box_weights = targets
        loss = self.loss_cls(cls_score, labels, weights, avg_factor=float(len(labels)))  # no weight is 0
        losses = dict(loss) if isinstance(loss, dict) else {'loss_cls': loss}
        losses['acc'] = accuracy(cls_score, labels)
        chosen = _with_objects(sampling_results, rois.device)
        if len(chosen):
            boxes = bbox_pred.view(len(bbox_pred), -1, truth.shape[1])
            boxes = boxes[chosen, 0 if self.reg_class_agnostic else labels[chosen]]
            if self.reg_decoded_bbox:
                boxes = self.bbox_coder.decode(rois[chosen, 1:], boxes)
            losses['loss_bbox'] = box_loss(self.loss_bbox, boxes, truth[chosen], box_weights[chosen], len(truth))
        else:
            losses['loss_bbox'] = bbox_pred[:0].sum()
        return dict(loss_bbox=losses, bbox_targets=targets)

    def refine_bboxes(
        self,
        sampling_results: Sequence[Any],
        bbox_results: Mapping[str, Any],
        batch_img_metas: Sequence[Mapping[str, Any]],
    ) -> Any:
        """The boxes of the next stage of a cascade: those of this one, moved, without the true ones that were added.

        Args:
            sampling_results: of each image.
            bbox_results: ``rois`` ``(n, 5)``, ``cls_score``, ``bbox_pred`` and ``bbox_targets`` of all images.
            batch_img_metas: of each image, with ``img_shape``.

        Returns:
            Of each image, with ``bboxes`` ``(n, 4)``; None if there are no boxes.
        """
        scores, rois = bbox_results['cls_score'], bbox_results['rois']
        known = all(hasattr(sample, 'truths') for sample in sampling_results)
        if not known or self.custom_activation or not len(rois) or scores.shape[1] != self.num_classes + 1:
            return super().refine_bboxes(sampling_results, bbox_results, batch_img_metas)
        labels = bbox_results['bbox_targets'][0]
        labels = torch.where(labels == self.num_classes, scores[:, :-1].argmax(1), labels)
        sizes = [len(sample.priors) for sample in sampling_results]
        parts = (part.split(sizes) for part in (rois[:, 1:], labels, bbox_results['bbox_pred']))
        return [
            InstanceData(bboxes=self.regress_by_class(*part, meta)[sample.truths :])
            for *part, sample, meta in zip(*parts, sampling_results, batch_img_metas, strict=True)
        ]

    def _predict_by_feat_single(
        self,
        roi: Tensor,
        cls_score: Tensor,
        bbox_pred: Tensor,
        img_meta: Mapping[str, Any],
        rescale: bool = False,
        rcnn_test_cfg: Any = None,
    ) -> InstanceData:
        """The objects of an image; only boxes with a score are moved, where mmdet moves all for each class."""
        usual = isinstance(cls_score, Tensor) and isinstance(bbox_pred, Tensor) and rcnn_test_cfg is not None
        if not usual or self.custom_cls_channels or not len(roi) or self.bbox_coder.encode_size != 4:
            return super()._predict_by_feat_single(roi, cls_score, bbox_pred, img_meta, rescale, rcnn_test_cfg)
        scores = cls_score.softmax(-1)[:, :-1].reshape(-1)
        above = scores > rcnn_test_cfg.score_thr
        places = positions(above, int(above.sum()))
        boxes_of, labels = places // self.num_classes, places % self.num_classes
        moves = bbox_pred.view(len(roi), -1, 4)[boxes_of, 0 if self.reg_class_agnostic else labels]
        boxes = self.bbox_coder.decode(roi[boxes_of, 1:], moves, max_shape=img_meta['img_shape'])
        if rescale:
            boxes = scaled(boxes, [1 / factor for factor in img_meta['scale_factor']])
        scores = scores[places]
        if not len(boxes):
            return InstanceData(bboxes=boxes, scores=scores, labels=labels)
        found, kept = suppressed(boxes, scores, labels, rcnn_test_cfg.nms)
        if rcnn_test_cfg.max_per_img > 0:
            found, kept = found[: rcnn_test_cfg.max_per_img], kept[: rcnn_test_cfg.max_per_img]
        return InstanceData(bboxes=found[:, :-1], scores=found[:, -1], labels=labels[kept])


def _with_objects(sampling_results: Sequence[Any], device: torch.device) -> Tensor:
    """Where the boxes with an object are among those of all images."""
    parts, start = [], 0
    for sample in sampling_results:
        parts.append(torch.arange(start, start + len(sample.pos_inds), device=device))
        start += len(sample.pos_inds) + len(sample.neg_inds)
    return torch.cat(parts)


@MODELS.register_module()
class WholeShared2FCBBoxHead(WholeBoxes, Shared2FCBBoxHead):
    """mmdet's Shared2FCBBoxHead, to the bit, as :class:`WholeBoxes` says. The arguments are those of mmdet's class."""


@MODELS.register_module()
class WholeConvFCBBoxHead(WholeBoxes, ConvFCBBoxHead):
    """mmdet's ConvFCBBoxHead, to the bit, as :class:`WholeBoxes` says. The arguments are those of mmdet's class."""
