"""Pooling of boxes that keep float32 coordinates under mixed precision, and that is quick on a CPU.

bfloat16 has 8 significant bits: a coordinate near 1333 pixels moves by up to 4. mmdet 3.3 casts boxes to the dtype of
the features before pooling. In float32 the class here gives the same numbers as mmdet's.
"""

import torch

import densekit.ops  # noqa: F401  importing mmdet needs mmcv's ops

# isort: split
from mmcv.ops import RoIAlign
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmengine.registry import MODELS
from torch import Tensor, nn

from densekit.models.roi_pooling import RoIAlignByProducts


@MODELS.register_module()
class ExactRoIExtractor(SingleRoIExtractor):
    """mmdet's SingleRoIExtractor with float32 boxes and pooling; the result has the dtype of the features.

    On a CPU the gradient is that of :mod:`densekit.models.roi_pooling`, equal within rounding and several times as
    fast. The arguments are those of mmdet's class.
    """

    def forward(self, feats: tuple[Tensor, ...], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        """Pools each box from the level that fits its size.

        Args:
            feats: one ``(N, C, H / stride, W / stride)`` per entry of ``featmap_strides``.
            rois: ``(K, 5)``: index of the image, x1, y1, x2, y2 in pixels of the input.
            roi_scale_factor: enlarges the boxes about their centres.

        Returns:
            ``(K, C, output height, output width)``.
        """
        rois = rois.float()
        levels = self.map_roi_levels(rois, len(feats)).clamp(0, len(feats) - 1)  # of NaN too, which RoIAlign names
        if roi_scale_factor is not None:
            rois = self.roi_rescale(rois, roi_scale_factor)
        pooled = feats[0].new_zeros(len(rois), self.out_channels, *self.roi_layers[0].output_size)
        # Boxes in the order of their levels: the device is waited for once, and not for each level.
        order = levels.argsort(stable=True)
        counts = (levels == torch.arange(len(feats), device=levels.device)[:, None]).sum(dim=1).tolist()
        for feat, roi_layer, inside in zip(feats, self.roi_layers, order.split(counts), strict=True):
            # Levels without boxes are pooled too (to nothing): every level stays in the graph, as DDP needs.
            pooled[inside] = _pool(roi_layer, feat.float(), rois[inside]).to(pooled.dtype)
        return pooled


def _pool(layer: nn.Module, feat: Tensor, rois: Tensor) -> Tensor:
    """RoIAlign of a layer, with a quicker gradient where there is one."""
    if feat.device.type != 'cpu' or not isinstance(layer, RoIAlign) or layer.pool_mode != 'avg' or not layer.aligned:
        return layer(feat, rois)
    return RoIAlignByProducts.apply(feat, rois, *layer.output_size, layer.spatial_scale, layer.sampling_ratio)
