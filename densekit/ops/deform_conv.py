"""Deformable convolution, plain and modulated, on torchvision's kernels."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from densekit.ops.registry import compute_dtype, substitute

# The names of stride, padding and dilation (rows, then columns) and of the groups, in the order of torchvision.
_DEFORM = ('dH', 'dW', 'padH', 'padW', 'dilationH', 'dilationW', 'group', 'deformable_group')
_MODULATED = ('stride_h', 'stride_w', 'pad_h', 'pad_w', 'dilation_h', 'dilation_w', 'group', 'deformable_group')


def _deform_conv_args(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None, settings: Sequence[int]
) -> tuple[Any, ...]:
    """Return what torchvision's ops take: tensors in the dtype to compute in, the settings, whether there is a mask."""
    tensors = (
        input,
        weight,
        offset,
        input.new_zeros(len(input), 1) if mask is None else mask,
        input.new_zeros(len(weight)) if bias is None else bias,
    )
    dtype = compute_dtype(input)
    return *(t.to(dtype) for t in tensors), *settings, mask is not None


@substitute
def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **settings: int
) -> None:
    """Deformable convolution (Dai et al., 2017).

    Args:
        input: (N, C, H, W).
        weight: (C_out, C / group, kH, kW).
        offset: What to add to the position of each sample (N, deformable_group * kH * kW * 2, H_out, W_out) as y, x in
            pixels of the input.
        output: (N, C_out, H_out, W_out), filled in place.
        columns: Unused, scratch of the compiled op.
        ones: Unused, scratch of the compiled op.
        settings: Stride ``dH``, ``dW``, padding ``padH``, ``padW``, ``dilationH``, ``dilationW``, ``group``, and
            ``deformable_group``: groups of input channels, each with offsets of its own. ``kH`` and ``kW``, which the
            weight tells, and ``im2col_step``, how many images the compiled op takes at a time, are not read.
    """
    args = _deform_conv_args(input, weight, offset, None, None, [settings[name] for name in _DEFORM])
    output.copy_(torch.ops.torchvision.deform_conv2d(*args))


@substitute
def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **settings: int,
) -> None:
    """Gradients of deformable convolution with respect to input and offset.

    Args:
        input: As in the forward.
        offset: As in the forward.
        grad_output: (N, C_out, H_out, W_out).
        grad_input: (N, C, H, W), filled in place.
        grad_offset: Shaped as ``offset``, filled in place.
        weight: As in the forward.
        columns: Unused, scratch of the compiled op.
        settings: As in the forward.
    """
    args = _deform_conv_args(input, weight, offset, None, None, [settings[name] for name in _DEFORM])
    grads = torch.ops.torchvision._deform_conv2d_backward(grad_output.to(args[0]), *args)
    grad_input.copy_(grads[0])
    grad_offset.copy_(grads[2])


@substitute
def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    scale: float,
    **settings: int,
) -> None:
    """Gradient of deformable convolution with respect to its weight.

    Args:
        input: As in the forward.
        offset: As in the forward.
        grad_output: (N, C_out, H_out, W_out).
        grad_weight: (C_out, C / group, kH, kW), to which it is added in place.
        columns: Unused, scratch of the compiled op.
        ones: Unused, scratch of the compiled op.
        scale: A factor on the gradient.
        settings: As in the forward.
    """
    # The weight is not given, and its gradient does not depend on it.
    weight = torch.zeros_like(grad_weight)
    args = _deform_conv_args(input, weight, offset, None, None, [settings[name] for name in _DEFORM])
    grads = torch.ops.torchvision._deform_conv2d_backward(grad_output.to(args[0]), *args)
    grad_weight.add_(grads[1], alpha=scale)


def _as_read(samples: Tensor, size: Sequence[int]) -> Tensor:
    """Return (N, C, h, w) of offsets or factors (N, C, H, W) as the compiled modulated convolution reads them.

    It takes the memory of each image for that of a map of the output's size, h and w. The larger maps for which that
    makes a difference are the ones that mmdet's DyHead takes from the level below.
    """
    channels = samples.shape[1]
    return samples.flatten(1)[:, : channels * size[0] * size[1]].reshape(-1, channels, *size)


@substitute
def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    with_bias: bool,
    **settings: int,
) -> None:
    """Modulated deformable convolution (Zhu et al., 2019): deformable convolution with a factor for each sample.

    Args:
        input: (N, C, H, W).
        weight: (C_out, C / group, kernel_h, kernel_w).
        bias: (C_out,); without ``with_bias`` it is not read.
        ones: Unused, scratch of the compiled op.
        offset: As for deformable convolution; of a larger map only the beginning is read.
        mask: The factors (N, deformable_group * kernel_h * kernel_w, H_out, W_out); as ``offset``.
        output: (N, C_out, H_out, W_out), filled in place.
        columns: Unused, scratch of the compiled op.
        with_bias: Whether to add ``bias``.
        settings: ``stride_h``, ``stride_w``, ``pad_h``, ``pad_w``, ``dilation_h``, ``dilation_w``, ``group`` and
            ``deformable_group``, as for deformable convolution; ``kernel_h`` and ``kernel_w`` are not read.
    """
    offset, mask = (_as_read(samples, output.shape[2:]) for samples in (offset, mask))
    settings_ = [settings[name] for name in _MODULATED]
    args = _deform_conv_args(input, weight, offset, mask, bias if with_bias else None, settings_)
    output.copy_(torch.ops.torchvision.deform_conv2d(*args))


@substitute
def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    with_bias: bool,
    **settings: int,
) -> None:
    """Gradients of modulated deformable convolution.

    Args:
        input: As in the forward.
        weight: As in the forward.
        bias: As in the forward.
        ones: Unused, scratch of the compiled op.
        offset: As in the forward.
        mask: As in the forward.
        columns: Unused, scratch of the compiled op.
        grad_input: Filled in place, as are the next four; each is shaped as what it is the gradient of.
        grad_weight: Of ``weight``.
        grad_bias: Of ``bias``; without ``with_bias`` it is left as it is.
        grad_offset: Of ``offset``.
        grad_mask: Of ``mask``.
        grad_output: (N, C_out, H_out, W_out).
        with_bias: As in the forward.
        settings: As in the forward.
    """
    offset, mask = (_as_read(samples, grad_output.shape[2:]) for samples in (offset, mask))
    settings_ = [settings[name] for name in _MODULATED]
    args = _deform_conv_args(input, weight, offset, mask, bias if with_bias else None, settings_)
    grads = torch.ops.torchvision._deform_conv2d_backward(grad_output.to(args[0]), *args)
    grad_input.copy_(grads[0])
    grad_weight.copy_(grads[1])
    for target, grad in ((grad_offset, grads[2]), (grad_mask, grads[3])):
        unread = target.flatten(1).shape[1] - grad.flatten(1).shape[1]
        target.copy_(F.pad(grad.flatten(1), (0, unread)).view(target.shape))
    if with_bias:
        grad_bias.copy_(grads[4])
