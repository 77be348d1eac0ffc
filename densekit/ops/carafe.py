"""CARAFE: upsampling with a kernel predicted for each pixel."""

import torch
import torch.nn.functional as F
from torch import Tensor

from densekit.ops.registry import compute_dtype, substitute


def _carafe_views(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the features padded with zeros, the masks and the output (or its gradient) in shapes that broadcast.

    With k the kernel size, s the scale factor, G groups and c = C / G, these are (N, G, c, H + k - 1, 1, W + k - 1, 1),
    (N, G, 1, k * k, H, s, W, s) and (N, G, c, H, s, W, s).
    """
    n, c, h, w = features.shape
    padded = F.pad(features, [kernel_size // 2] * 4).view(
        n, group_size, c // group_size, h + kernel_size - 1, 1, w + kernel_size - 1, 1
    )
    masks = masks.reshape(n, group_size, 1, kernel_size**2, h, scale_factor, w, scale_factor)
    return padded, masks, output.view(n, group_size, c // group_size, h, scale_factor, w, scale_factor)


def _carafe_windows(padded: Tensor, kernel_size: int) -> list[Tensor]:
    """Return the views (N, G, C/G, H, 1, W, 1) of the padded features that each element of the kernel sees."""
    h, w = padded.shape[3] - kernel_size + 1, padded.shape[5] - kernel_size + 1
    return [padded[:, :, :, y : y + h, :, x : x + w] for y in range(kernel_size) for x in range(kernel_size)]


@substitute
def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Upsampling with a kernel predicted for each pixel (CARAFE; Wang et al., 2019).

    Args:
        features: (N, C, H, W).
        masks: The kernels (N, group_size * kernel_size^2, H * scale_factor, W * scale_factor).
        rfeatures: (N, C, H, W), filled in place with what the backward takes for the features.
        routput: Unused, scratch of the compiled op.
        rmasks: Unused, scratch of the compiled op.
        output: (N, C, H * scale_factor, W * scale_factor), filled in place.
        kernel_size: Rows and columns of a kernel, odd.
        group_size: Groups of channels, each with kernels of its own.
        scale_factor: Pixels of the output per pixel of the features and axis.
    """
    rfeatures.copy_(features)
    dtype = compute_dtype(features)
    result = torch.zeros_like(output, dtype=dtype)
    padded, kernels, blocks = _carafe_views(
        features.to(dtype), masks.to(dtype), result, kernel_size, group_size, scale_factor
    )
    for i, window in enumerate(_carafe_windows(padded, kernel_size)):
        blocks += window * kernels[:, :, :, i]
    output.copy_(result)


@substitute
def carafe_backward(
    grad_output: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rgrad_output: Tensor,
    rgrad_input_hs: Tensor,
    rgrad_input: Tensor,
    rgrad_masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Gradients of CARAFE.

    Args:
        grad_output: (N, C, H * scale_factor, W * scale_factor).
        rfeatures: What the forward left there.
        masks: As in the forward.
        rgrad_output: Unused, scratch of the compiled op.
        rgrad_input_hs: Unused, scratch of the compiled op.
        rgrad_input: Unused, scratch of the compiled op.
        rgrad_masks: Unused, scratch of the compiled op.
        grad_input: Of the features (N, C, H, W), filled in place.
        grad_masks: Of the kernels, shaped as they are, filled in place.
        kernel_size: As in the forward.
        group_size: As in the forward.
        scale_factor: As in the forward.
    """
    dtype = compute_dtype(rfeatures)
    padded, kernels, grad = _carafe_views(
        rfeatures.to(dtype), masks.to(dtype), grad_output.to(dtype), kernel_size, group_size, scale_factor
    )
    grad_padded, grad_kernels = torch.zeros_like(padded), torch.zeros_like(kernels)
    windows = zip(_carafe_windows(padded, kernel_size), _carafe_windows(grad_padded, kernel_size), strict=True)
    for i, (window, grad_window) in enumerate(windows):
        grad_window += (grad * kernels[:, :, :, i]).sum(dim=(4, 6), keepdim=True)
        grad_kernels[:, :, :, i] = (grad * window).sum(dim=2, keepdim=True)
    inner = _carafe_windows(grad_padded, kernel_size)[kernel_size**2 // 2]
    grad_input.copy_(inner.reshape(grad_input.shape))
    grad_masks.copy_(grad_kernels.view(grad_masks.shape))
