"""A proposal head that keeps float32 under mixed precision and asks the device once for all images.

bfloat16 has 8 significant bits: a coordinate near 1333 pixels moves by up to 4. mmdet 3.3 computes the proposals'
anchors in the dtype of the RPN's scores, so under bf16 they are that coarse. In float32 this head gives the same
numbers as mmdet's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import densekit.ops  # noqa: F401  importing mmdet needs mmcv's ops

# isort: split
from mmdet.models.dense_heads import RPNHead
from mmdet.models.losses import CrossEntropyLoss
from mmdet.models.task_modules.prior_generators import anchor_inside_flags
from mmdet.models.task_modules.samplers import SamplingResult
from mmdet.models.utils import images_to_levels
from mmengine.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor

from densekit.models.assigner import WholeMaxIoUAssigner
from densekit.models.boxes import box_loss, positions, scaled, suppressed
from densekit.models.overrides import unchanged
from densekit.models.sampler import WholeRandomSampler


@MODELS.register_module()
class ExactRPNHead(RPNHead):
    """mmdet's RPNHead with float32 outputs, hence float32 anchors, proposals and suppression.

    With :class:`WholeMaxIoUAssigner`, :class:`WholeRandomSampler` and :class:`DeviceBoxCoder` the host waits for the
    device once for the targets of all images, once for the proposals that are large enough, and once in each image's
    suppression. The arguments are those of mmdet's class.
    """

    def forward_single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and offsets of one level.

        Args:
            x: ``(N, C, H, W)``.

        Returns:
            Scores ``(N, anchors, H, W)`` and offsets ``(N, anchors * 4, H, W)``, in float32.
        """
        scores, offsets = super().forward_single(x)
        return scores.float(), offsets.float()

    def get_anchors(self, featmap_sizes: Sequence[Any], batch_img_metas: Sequence[Any], device: Any = 'cuda') -> Any:
        """Anchors of each image and level, and which of them are valid; as of mmdet's."""
        self._move_anchors(device)
        return super().get_anchors(featmap_sizes, batch_img_metas, device=device)

    def _move_anchors(self, device: torch.device | str) -> None:
        anchors = self.prior_generator.base_anchors
        anchors[:] = [anchor.to(device) for anchor in anchors]  # to stay there: mmdet copies them in each step

    def get_targets(
        self,
        anchor_list: Sequence[Sequence[Tensor]],
        valid_flag_list: Sequence[Sequence[Tensor]],
        batch_gt_instances: Sequence[Any],
        batch_img_metas: Sequence[Mapping[str, Any]],
        batch_gt_instances_ignore: Sequence[Any] | None = None,
        unmap_outputs: bool = True,
        return_sampling_results: bool = False,
    ) -> tuple[Any, ...]:
        """What each anchor is to learn.

        Args:
            anchor_list: of each image and level ``(anchors, 4)``.
            valid_flag_list: of each image and level ``(anchors,)`` bool.
            batch_gt_instances: of each image, with ``bboxes`` and ``labels``.
            batch_img_metas: of each image, with ``img_shape``.
            batch_gt_instances_ignore: of each image.
            unmap_outputs: also for anchors that are left out.
            return_sampling_results: give these too.

        Returns:
            Labels, their weights, offsets, their weights, each as ``(N, anchors, ...)`` per level; the number of
            anchors that count. As of mmdet's.

        Raises:
            ValueError: if no anchor is within an image.
        """
        usual = unmap_outputs and isinstance(anchor_list[0][0], Tensor)
        if not usual or not self._is_whole():
            return super().get_targets(
                *(anchor_list, valid_flag_list, batch_gt_instances, batch_img_metas, batch_gt_instances_ignore),
                unmap_outputs=unmap_outputs,
                return_sampling_results=return_sampling_results,
            )
        anchors = [torch.cat(list(levels)) for levels in anchor_list]
        inside = [
            anchor_inside_flags(boxes, torch.cat(list(flags)), meta['img_shape'][:2], self.train_cfg['allowed_border'])
            for boxes, flags, meta in zip(anchors, valid_flag_list, batch_img_metas, strict=True)
        ]
        assigned = [
            self.assigner.assign(InstanceData(priors=boxes), truth, among=flags)
            for boxes, truth, flags in zip(anchors, batch_gt_instances, inside, strict=True)
        ]
        samples = self.sampler.sample_all(assigned, anchors, batch_gt_instances)
        for sample, flags, meta in zip(samples, inside, batch_img_metas, strict=True):
            if not len(sample.pos_inds) and not len(sample.neg_inds) and not flags.any():
                raise ValueError(
                    f'no anchor lies within the image of {meta["img_shape"][:2]} pixels. Give larger images, smaller '
                    'anchors (rpn_head.anchor_generator), or train_cfg.rpn.allowed_border=-1, which takes all.'
                )
        self._raw_positive_infos.update(sampling_results=samples)
        targets = zip(*[self._targets(*pair) for pair in zip(anchors, samples, strict=True)], strict=True)
        sizes = [len(level) for level in anchor_list[0]]
        by_level = [images_to_levels(list(target), sizes) for target in targets]
        found = (*by_level, sum(sample.avg_factor for sample in samples))
        return (*found, samples) if return_sampling_results else found

    def _is_whole(self) -> bool:
        """Whether nothing has a way of its own by which targets are made image by image."""
        assigned = isinstance(self.assigner, WholeMaxIoUAssigner) and self.assigner.plain
        drawn = isinstance(self.sampler, WholeRandomSampler) and self.sampler.whole
        return assigned and drawn and unchanged(self, RPNHead, '_get_targets_single')

    def _targets(self, anchors: Tensor, sample: SamplingResult) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Labels ``(anchors,)``, their weights, offsets ``(anchors, 4)`` and their weights, of one image."""
        labels = anchors.new_full((len(anchors),), self.num_classes, dtype=torch.long)
        weights = anchors.new_zeros(len(anchors), dtype=torch.float)
        offsets, offset_weights = torch.zeros_like(anchors), torch.zeros_like(anchors)
        positive, weight = sample.pos_inds, self.train_cfg['pos_weight']
        if len(positive):
            truth = sample.pos_gt_bboxes
            offsets[positive] = truth if self.reg_decoded_bbox else self.bbox_coder.encode(sample.pos_priors, truth)
            offset_weights.index_fill_(0, positive, 1.0)
            labels[positive] = sample.pos_gt_labels
            weights.index_fill_(0, positive, 1.0 if weight <= 0 else weight)
        weights.index_fill_(0, sample.neg_inds, 1.0)
        return labels, weights, offsets, offset_weights

    def loss_by_feat_single(
        self,
        cls_score: Tensor,
        bbox_pred: Tensor,
        anchors: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        bbox_targets: Tensor,
        bbox_weights: Tensor,
        avg_factor: float,
    ) -> tuple[Tensor, Tensor]:
        """Losses of one level.

        Args:
            cls_score: ``(N, anchors, H, W)``.
            bbox_pred: ``(N, anchors * 4, H, W)``.
            anchors: ``(N, all anchors, 4)``.
            labels: ``(N, all anchors)``: 0 for an object, 1 for none.
            label_weights: ``(N, all anchors)``.
            bbox_targets: ``(N, all anchors, 4)``.
            bbox_weights: ``(N, all anchors, 4)``.
            avg_factor: the number of anchors that count.

        Returns:
            The loss of the scores and that of the offsets.
        """
        if type(self.loss_cls) is not CrossEntropyLoss or not self.use_sigmoid_cls or self.reg_decoded_bbox:
            targets = (labels, label_weights, bbox_targets, bbox_weights)
            return super().loss_by_feat_single(cls_score, bbox_pred, anchors, *targets, avg_factor)
        scores = cls_score.permute(0, 2, 3, 1).reshape(-1)
        # As numbers of the same shape: from labels of classes mmdet makes these by asking where they are.
        objects = (labels.reshape(-1) == 0).long()
        loss = self.loss_cls(scores, objects, label_weights.reshape(-1), avg_factor=avg_factor)
        offsets = bbox_pred.permute(0, 2, 3, 1).reshape(-1, 4)
        return loss, box_loss(
            self.loss_bbox, offsets, bbox_targets.reshape(-1, 4), bbox_weights.reshape(-1, 4), avg_factor
        )

    def predict_by_feat(
        self, cls_scores: Sequence[Tensor], *args: Any, cfg: Any = None, **kwargs: Any
    ) -> list[InstanceData]:
        """Proposals of all images; the arguments are those of mmdet's.

        Returns:
            Of each image ``bboxes`` ``(n, 4)``, ``scores`` and ``labels``, by descending score.
        """
        self._move_anchors(cls_scores[0].device)
        found = super().predict_by_feat(cls_scores, *args, cfg=cfg, **kwargs)
        if not unchanged(self, ExactRPNHead, '_bbox_post_process'):
            return found
        cfg = self.test_cfg if cfg is None else cfg
        least = cfg.get('min_bbox_size', -1)
        if least >= 0:
            masks = [((boxes[:, 2:] - boxes[:, :2]) > least).all(dim=1) for boxes in (one.bboxes for one in found)]
            counts = torch.stack([mask.sum() for mask in masks]).tolist()
            found = [
                one if count == len(one) else one[positions(mask, count)]
                for one, mask, count in zip(found, masks, counts, strict=True)
            ]
        return [_suppressed(one, cfg) for one in found]

    def _bbox_post_process(
        self, results: InstanceData, cfg: Any, rescale: bool = False, with_nms: bool = True, img_meta: Any = None
    ) -> InstanceData:
        """All candidates of an image; :meth:`predict_by_feat` goes on with those of all images. Not in subclasses."""
        if not unchanged(self, ExactRPNHead, '_bbox_post_process'):
            return super()._bbox_post_process(results, cfg, rescale, with_nms, img_meta)
        assert with_nms, 'proposals are always suppressed'
        if rescale:
            results.bboxes = scaled(results.bboxes, [1 / factor for factor in img_meta['scale_factor']])
        return results


def _suppressed(found: InstanceData, cfg: Any) -> InstanceData:
    """The proposals of an image that stay."""
    if not len(found):
        return InstanceData(bboxes=found.bboxes, scores=found.scores, labels=found.scores.new_zeros(0))
    boxes, kept = suppressed(found.bboxes, found.scores, found.level_ids, cfg.nms)
    boxes, kept = boxes[: cfg.max_per_img], kept[: cfg.max_per_img]
    return InstanceData(bboxes=found.bboxes[kept], scores=boxes[:, -1], labels=torch.zeros_like(kept))
