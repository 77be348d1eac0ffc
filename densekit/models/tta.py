"""Test-time augmentation for detectors with masks, which mmdet's own model refuses.

As in Detectron2 and MMDetection 2: each view of an image is detected by itself, the boxes of all are merged by
suppression, and the mask head then looks at the merged boxes in every view. So each mask belongs to its box.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.model import BaseTTAModel
from mmengine.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor, nn

import densekit.ops  # noqa: F401  importing mmdet needs mmcv's ops

# isort: split
from mmcv.ops import batched_nms
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox2roi, bbox_flip

from densekit.models.mask_head import sigmoid

_NEEDED = ('ori_shape', 'scale_factor', 'flip', 'flip_direction')
_FLIPPED = {'horizontal': (-1,), 'vertical': (-2,), 'diagonal': (-2, -1)}  # dimensions of a mask
_MERGING = ('nms', 'max_per_img')


@MODELS.register_module()
class MaskTTAModel(BaseTTAModel):
    """Mask R-CNN or Cascade Mask R-CNN over several scales and flips of an image.

    Boxes are merged as by mmdet's DetTTAModel; mask probabilities are averaged over the views (and the stages of a
    cascade), then drawn once. With one view nothing is merged, and the results are those of the plain test but for the
    rounding of boxes that are divided and multiplied by the scale. The features of all views are kept until the masks
    are done.

    Args:
        module: the detector, or its config. Its RoI head has to predict masks as StandardRoIHead or CascadeRoIHead do.
        tta_cfg: ``nms`` and ``max_per_img`` of the merging; default those of the detector's ``test_cfg.rcnn``.
        data_preprocessor: of the detector, instead of its own.

    Raises:
        ValueError: if the detector is of another kind, or ``tta_cfg`` has other keys.
    """

    def __init__(
        self,
        module: nn.Module | dict,
        tta_cfg: Mapping[str, Any] | None = None,
        data_preprocessor: nn.Module | dict | None = None,
    ) -> None:
        super().__init__(module=module, data_preprocessor=data_preprocessor)
        given = dict(tta_cfg or {})
        if unknown := sorted(given.keys() - set(_MERGING)):
            raise ValueError(f'tta_cfg of MaskTTAModel has {unknown[0]!r}; there are {" and ".join(_MERGING)}')
        own = _roi_head(self.module).test_cfg
        self.tta_cfg = ConfigDict({key: own[key] for key in _MERGING} | given)

    def test_step(self, data: Mapping[str, Sequence[Any]]) -> list[DetDataSample]:
        """The merged detections of a batch.

        Args:
            data: what TestTimeAug and the collate function make: ``inputs`` and ``data_samples``, each a list over
                views of lists over images; images ``(3, H, W)``.

        Returns:
            A sample of each image, its ``pred_instances`` in pixels of the original: boxes, scores, labels and masks.

        Raises:
            ValueError: if a view does not say how it was made.
        """
        features, views = [], []
        for index in range(len(data['inputs'])):
            maps, samples = self._detect({key: value[index] for key, value in data.items()})
            features.append(maps)
            views.append(samples)
        metas = [[sample.metainfo for sample in view] for view in views]
        merged = self.merge_preds([list(image) for image in zip(*views, strict=True)])
        self._add_masks(features, metas, merged)
        return merged

    def merge_preds(self, data_samples_list: list[list[DetDataSample]]) -> list[DetDataSample]:
        """Merges the boxes that the views of each image have.

        Args:
            data_samples_list: images, each a list over views with ``pred_instances`` in pixels of the original.

        Returns:
            The samples of the first view, with the boxes, scores and labels of all, best first.
        """
        for views in data_samples_list:
            if len(views) > 1:  # suppressing twice would lower the scores of soft-NMS twice
                views[0].pred_instances = self._merged([view.pred_instances for view in views])
        return [views[0] for views in data_samples_list]

    def _merged(self, views: list[InstanceData]) -> InstanceData:
        found = InstanceData.cat(views)
        if len(found) == 0:
            return found
        rows, kept = batched_nms(found.bboxes, found.scores, found.labels, self.tta_cfg.nms)
        best = slice(self.tta_cfg.max_per_img if self.tta_cfg.max_per_img > 0 else None)
        return InstanceData(bboxes=rows[best, :4], scores=rows[best, 4], labels=found.labels[kept[best]])

    def _detect(self, view: dict[str, Any]) -> tuple[Sequence[Tensor], list[DetDataSample]]:
        """Features of a view, and its samples with boxes in pixels of the original."""
        view = self.module.data_preprocessor(view, training=False)
        samples = view['data_samples']
        metas = [sample.metainfo for sample in samples]
        _check_metas(metas)
        features = self.module.extract_feat(view['inputs'])
        proposals = self.module.rpn_head.predict(features, samples, rescale=False)
        head = _roi_head(self.module)
        found = head.predict_bbox(features, metas, proposals, rcnn_test_cfg=head.test_cfg, rescale=False)
        for sample, instances in zip(samples, found, strict=True):
            instances.bboxes = _to_original(instances.bboxes, sample.metainfo)
            sample.pred_instances = instances
        return features, samples

    def _add_masks(
        self,
        features: Sequence[Sequence[Tensor]],
        metas: Sequence[Sequence[Mapping[str, Any]]],
        merged: Sequence[DetDataSample],
    ) -> None:
        """Gives the detections of each image the mean of the masks that the views have at their boxes."""
        found = [sample.pred_instances for sample in merged]
        counts = [len(instances) for instances in found]
        masks: Sequence[Any] = [None] * len(found)
        if sum(counts):
            total: Any = 0
            for maps, view in zip(features, metas, strict=True):
                boxes = [_to_view(instances.bboxes, meta) for instances, meta in zip(found, view, strict=True)]
                parts = self._mask_probabilities(maps, bbox2roi(boxes)).split(counts)
                total = total + torch.cat([_upright(part, meta) for part, meta in zip(parts, view, strict=True)])
            masks = (total / len(features)).split(counts)
        head = _roi_head(self.module)
        last = head.mask_head[-1] if isinstance(head, CascadeRoIHead) else head.mask_head
        last.predict_by_feat(
            mask_preds=masks,
            results_list=found,
            batch_img_metas=[{'ori_shape': meta['ori_shape'], 'scale_factor': (1.0, 1.0)} for meta in metas[0]],
            rcnn_test_cfg=head.test_cfg,
            rescale=True,
            activate_map=True,
        )

    def _mask_probabilities(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        """Probabilities ``(K, classes, h, w)`` in K boxes in float32, the mean over the stages of a cascade."""
        head = _roi_head(self.module)
        if not isinstance(head, CascadeRoIHead):
            return sigmoid(head._mask_forward(features, rois)['mask_preds']).float()
        stages = [head._mask_forward(stage, features, rois)['mask_preds'] for stage in range(head.num_stages)]
        return torch.stack([sigmoid(logits) for logits in stages]).mean(dim=0).float()


def _roi_head(detector: nn.Module) -> Any:
    """The detector's second stage, whose masks can be had at any boxes."""
    head: Any = getattr(detector, 'roi_head', None)
    known = (StandardRoIHead.predict_mask, CascadeRoIHead.predict_mask)
    if not getattr(head, 'with_mask', False) or getattr(type(head), 'predict_mask', None) not in known:
        raise ValueError(
            f'MaskTTAModel cannot test a {type(detector).__name__} with {type(head).__name__} as its roi_head; it can '
            "test Mask R-CNN and Cascade Mask R-CNN. For a detector without masks take mmdet's DetTTAModel."
        )
    return head


def _check_metas(metas: Sequence[Mapping[str, Any]]) -> None:
    for meta in metas:
        if missing := [key for key in _NEEDED if key not in meta]:
            raise ValueError(
                f'test-time augmentation cannot undo a view without {", ".join(missing)}: the views of tta_pipeline '
                'need Resize and RandomFlip (prob 0.0 or 1.0), and these names in meta_keys of PackDetInputs'
            )


def _to_original(boxes: Tensor, meta: Mapping[str, Any]) -> Tensor:
    """Boxes ``(n, 4)`` of a view in pixels of the original image."""
    boxes = boxes / boxes.new_tensor(meta['scale_factor']).repeat(2)
    return bbox_flip(boxes, meta['ori_shape'], meta['flip_direction']) if meta['flip'] else boxes


def _to_view(boxes: Tensor, meta: Mapping[str, Any]) -> Tensor:
    """What :func:`_to_original` undoes."""
    boxes = bbox_flip(boxes, meta['ori_shape'], meta['flip_direction']) if meta['flip'] else boxes
    return boxes * boxes.new_tensor(meta['scale_factor']).repeat(2)


def _upright(masks: Tensor, meta: Mapping[str, Any]) -> Tensor:
    return masks.flip(_FLIPPED[meta['flip_direction']]) if meta['flip'] else masks
