"""A mask head that learns from targets made on the device, and whose masks are scored as run lengths, undrawn."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS
from torch import Tensor
from torch.nn import functional

import densekit.ops  # noqa: F401  importing mmdet needs mmcv's ops

# isort: split
from mmdet.evaluation import CocoMetric
from mmdet.models.roi_heads.mask_heads import FCNMaskHead

from densekit.evaluation.rle import RleMasks, paste
from densekit.models.boxes import constant
from densekit.models.mask_targets import mask_targets


@MODELS.register_module()
class RleMaskHead(FCNMaskHead):
    """mmdet's FCNMaskHead, whose targets stay on the device, and which can give its masks as run lengths.

    Both are the same, targets to the bit and masks to the pixel.

    The arguments are those of mmdet's class.

    Attributes:
        run_lengths: give :class:`densekit.evaluation.rle.RleMasks` instead of tensors. Off, but while
            :class:`RleMasksHook` has it on.
    """

    run_lengths = False

    def get_targets(
        self, sampling_results: Sequence[Any], batch_gt_instances: Sequence[Any], rcnn_train_cfg: Mapping[str, Any]
    ) -> Tensor:
        """The targets ``(n, height, width)`` of the positive boxes of all images.

        Args:
            sampling_results: mmdet's SamplingResult of each image.
            batch_gt_instances: of each image, with ``masks``.
            rcnn_train_cfg: with ``mask_size``.
        """
        return mask_targets(
            [result.pos_priors for result in sampling_results],
            [result.pos_assigned_gt_inds for result in sampling_results],
            [instances.masks for instances in batch_gt_instances],
            rcnn_train_cfg,
        )

    def _predict_by_feat_single(
        self,
        mask_preds: Any,
        bboxes: Tensor,
        labels: Tensor,
        img_meta: Mapping[str, Any],
        rcnn_test_cfg: Any,
        rescale: bool = False,
        activate_map: bool = False,
    ) -> Any:
        """The masks of an image, from ``(n, classes, h, w)`` logits, or probabilities with ``activate_map``."""
        threshold = rcnn_test_cfg.mask_thr_binary
        if not self.run_lengths or threshold < 0:  # below 0 mmdet gives shades of grey
            return super()._predict_by_feat_single(
                mask_preds, bboxes, labels, img_meta, rcnn_test_cfg, rescale, activate_map
            )
        across, down = torch.tensor(img_meta['scale_factor'], dtype=bboxes.dtype).tolist()
        height, width = img_meta['ori_shape'][:2]
        if rescale:
            bboxes /= constant([across, down, across, down], bboxes)  # the boxes of the results, as mmdet does it
        else:
            height, width = round(height * down), round(width * across)
        scores = torch.as_tensor(mask_preds)
        if self.class_agnostic:
            scores = scores[:, 0]
        else:
            scores = scores[torch.arange(len(labels), device=scores.device), labels.to(scores.device)]
        return RleMasks(
            paste(scores if activate_map else sigmoid(scores), bboxes, height, width, threshold), height, width
        )


def sigmoid(logits: Tensor) -> Tensor:
    """The sigmoid, to the bit as it is within a long tensor.

    On a CPU torch computes the last few numbers of a tensor, and of each thread's part of it, by another formula than
    the others; the last bit may differ.
    """
    if logits.device.type != 'cpu':
        return logits.sigmoid()
    count, alone = logits.numel(), 32768  # up to so many one thread does
    padded = functional.pad(logits.flatten(), (0, -count % 64))
    return torch.cat([part.sigmoid() for part in padded.split(alone)])[:count].reshape(logits.shape)


@HOOKS.register_module()
class RleMasksHook(Hook):
    """Lets mask heads give run lengths during validation and test, if all metrics are COCO's, which can read them."""

    def before_val(self, runner: Any) -> None:
        """Turns run lengths on."""
        _set_run_lengths(runner, _all_coco(runner.val_loop.evaluator))

    def after_val(self, runner: Any) -> None:
        """Turns run lengths off."""
        _set_run_lengths(runner, False)

    def before_test(self, runner: Any) -> None:
        """Turns run lengths on."""
        _set_run_lengths(runner, _all_coco(runner.test_loop.evaluator))

    def after_test(self, runner: Any) -> None:
        """Turns run lengths off."""
        _set_run_lengths(runner, False)


def _all_coco(evaluator: Any) -> bool:
    return all(isinstance(metric, CocoMetric) for metric in evaluator.metrics)


def _set_run_lengths(runner: Any, value: bool) -> None:
    for module in runner.model.modules():
        if isinstance(module, RleMaskHead):
            module.run_lengths = value
