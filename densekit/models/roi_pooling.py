"""RoIAlign with a gradient that takes matrix products, for the CPU.

RoIAlign is linear and separable: of a map X ``(H, W)`` a box takes ``Y X Z'``, where the rows of Y ``(height, H)`` and
Z ``(width, W)`` hold the weights that bilinear samples have. So the gradient of all boxes of an image is one product,
while torchvision's (0.26, cpu/roi_align_kernel.cpp) goes from sample to sample on one core, for each channel anew. The
forward is torchvision's, to the bit; the gradient differs in the order of sums.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from densekit.ops.roi_align import roi_align_backward, roi_align_forward

# A sample of torchvision takes as long as so many multiplications of a matrix product (AMD EPYC with AVX-512).
PRODUCTS_PER_SAMPLE = 200
NUMBERS_AT_ONCE = 1 << 24


class RoIAlignByProducts(torch.autograd.Function):
    """``apply(features, rois, height, width, scale, sampling_ratio)``: RoIAlign (He et al., 2017), aligned, averaged.

    Features ``(N, C, H, W)`` and rois ``(K, 5)`` (image, x1, y1, x2, y2 in pixels) on the CPU give
    ``(K, C, height, width)``; ``scale`` is cells of the map per pixel.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, rois: Tensor, height: int, width: int, *how: float) -> Tensor:
        """Pools, as torchvision does."""
        ctx.save_for_backward(rois)
        ctx.how, ctx.shape = how, features.shape
        pooled = features.new_empty((len(rois), features.shape[1], height, width))
        none = features.new_empty(0)
        roi_align_forward(features, rois, pooled, none, none, height, width, *how, 1, True)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """The gradient with respect to the features."""
        (rois,) = ctx.saved_tensors
        with torch.autocast('cpu', enabled=False):
            return roi_align_gradient(grad, rois, ctx.shape, *ctx.how), None, None, None, None, None


def roi_align_gradient(grad: Tensor, rois: Tensor, shape: tuple[int, ...], scale: float, sampling_ratio: int) -> Tensor:
    """The gradient with respect to the features, by whichever of the two ways is less work.

    Args:
        grad: ``(K, C, height, width)``.
        rois: ``(K, 5)``.
        shape: of the features, N, C, H, W.
        scale: cells of the map per pixel.
        sampling_ratio: samples per bin and axis; 0 takes one per cell.

    Returns:
        ``(N, C, H, W)``.
    """
    sides = (rois[:, 3:] - rois[:, 1:3]) * scale  # width and height, in cells
    bins = sides.new_tensor([grad.shape[3], grad.shape[2]])
    samples = torch.full_like(sides, sampling_ratio) if sampling_ratio > 0 else (sides / bins).ceil()
    products = len(rois) * grad.shape[2] * shape[2] * shape[3]
    if products > PRODUCTS_PER_SAMPLE * grad.shape[2] * grad.shape[3] * samples.prod(dim=1).sum():
        none = grad.new_empty(0)
        out = grad.new_zeros(shape)
        roi_align_backward(grad, rois, none, none, out, *grad.shape[2:], scale, sampling_ratio, 1, True)
        return out
    corner = rois[:, 1:3] * scale - 0.5
    across, down = (
        _weights(corner[:, axis], sides[:, axis], samples[:, axis], grad.shape[3 - axis], shape[3 - axis])
        for axis in (0, 1)
    )
    return _products(grad.permute(0, 2, 3, 1), rois[:, 0], down, across, shape)


def _products(grad: Tensor, image: Tensor, down: Tensor, across: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sums ``down' grad across`` over the boxes of each image: grad ``(K, height, width, C)``."""
    count, channels, rows, columns = shape
    out = grad.new_zeros((count, rows, columns * channels))
    height = grad.shape[1]
    at_once = max(NUMBERS_AT_ONCE // (height * columns * channels), 1)
    for i, total in enumerate(out):
        for part in torch.nonzero(image == i)[:, 0].split(at_once):
            spread = across[part].mT[:, None] @ grad[part]  # (boxes, height, W, C)
            total.addmm_(down[part].reshape(-1, rows).T, spread.reshape(-1, columns * channels))
    return out.reshape(count, rows, columns, channels).permute(0, 3, 1, 2)


def _weights(start: Tensor, side: Tensor, samples: Tensor, bins: int, cells: int) -> Tensor:
    """``(K, bins, cells)``: how much of each cell a bin takes along one axis.

    Args:
        start: ``(K,)``, of the boxes, where the centre of the first cell is 0.
        side: ``(K,)``, of the boxes, in cells.
        samples: ``(K,)``, in each bin.
        bins: of each box.
        cells: of the map.
    """
    most = int(samples.max()) if len(samples) else 0
    step = side / bins
    index = torch.arange(most, dtype=side.dtype)
    divisor = samples.clamp(min=1)  # a box without width has no sample
    inner = (index + 0.5) * (step / divisor)[:, None]  # (K, samples)
    place = (start[:, None] + torch.arange(bins) * step[:, None])[:, :, None] + inner[:, None]
    counts = (index < samples[:, None])[:, None] & (place >= -1) & (place <= cells)
    place = place.clamp(0, cells - 1)
    low = place.floor()
    share = place - low
    weight = counts / divisor[:, None, None]
    low = low.long()
    out = side.new_zeros((len(side), bins, cells))
    out.scatter_add_(2, low, weight * (1 - share))
    return out.scatter_add_(2, (low + 1).clamp(max=cells - 1), weight * share)
