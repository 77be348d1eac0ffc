"""RoIAlign on torchvision's kernels."""

import torch
from torch import Tensor

from densekit.ops.registry import compute_dtype, substitute, unsupported


def _check_roi_align(rois: Tensor, pool_mode: int, aligned: bool) -> None:
    """Refuse what has no substitute, and RoIs that would read outside of the feature map's memory.

    Raises:
        NotImplementedError: For max pooling.
        ValueError: For a RoI that is not finite, or that ends before it begins while ``aligned`` (legacy RoIAlign gives
            such a RoI the size 1). Checked on the CPU only: on CUDA the check would wait for the device.
    """
    if pool_mode != 1:
        unsupported("RoIAlign with pool_mode='max'")
    if rois.device.type != 'cpu':
        return
    bad = ~rois.isfinite().all(dim=1)
    if aligned:
        bad |= (rois[:, 3:] < rois[:, 1:3]).any(dim=1)
    if bad.any():
        i = int(bad.nonzero()[0])
        raise ValueError(
            f'RoI {i} of {len(rois)} is {rois[i].tolist()}. RoIs are (image, x1, y1, x2, y2) with finite numbers, '
            'x1 <= x2 and y1 <= y2. Look for a loss that is NaN or Inf, or for boxes in another format.'
        )


@substitute
def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign (He et al., 2017).

    Args:
        input: The feature map (N, C, H, W).
        rois: (K, 5) as image, x1, y1, x2, y2 in pixels of the image; the dtype may differ from the feature map's.
        output: (K, C, aligned_height, aligned_width), filled in place.
        argmax_y: Unused, of max pooling.
        argmax_x: Unused, of max pooling.
        aligned_height: Rows of the output.
        aligned_width: Columns of the output.
        spatial_scale: Pixels of the feature map per pixel of the image.
        sampling_ratio: Samples per bin and axis; 0 takes one per pixel of the feature map.
        pool_mode: 1, the average of a bin's samples.
        aligned: Whether pixel centres lie at half-integers; False is the legacy form, half a pixel off.

    Raises:
        NotImplementedError: For ``pool_mode`` 0 (max pooling).
        ValueError: For RoIs on the CPU that are not finite or end before they begin.
    """
    _check_roi_align(rois, pool_mode, aligned)
    dtype = compute_dtype(input)
    # Not torchvision.ops.roi_align: with deterministic algorithms that one turns to slow Python, even for the forward.
    result = torch.ops.torchvision.roi_align(
        input.to(dtype), rois.to(dtype), spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
    )
    output.copy_(result)


@substitute
def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of RoIAlign with respect to the feature map, added to ``grad_input`` in place.

    Args:
        grad_output: (K, C, aligned_height, aligned_width).
        rois: As in the forward.
        argmax_y: Unused, of max pooling.
        argmax_x: Unused, of max pooling.
        grad_input: (N, C, H, W), which the caller has filled with zeros.
        aligned_height: As in the forward.
        aligned_width: As in the forward.
        spatial_scale: As in the forward.
        sampling_ratio: As in the forward.
        pool_mode: As in the forward.
        aligned: As in the forward.

    Raises:
        NotImplementedError: For ``pool_mode`` 0 (max pooling).
    """
    _check_roi_align(rois, pool_mode, aligned)
    dtype = compute_dtype(grad_input)
    grad = torch.ops.torchvision._roi_align_backward(
        grad_output.to(dtype),
        rois.to(dtype),
        spatial_scale,
        aligned_height,
        aligned_width,
        *grad_input.shape,
        sampling_ratio,
        aligned,
    )
    grad_input.add_(grad)
