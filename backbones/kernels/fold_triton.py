"""Triton kernels that fold the small affine maps of a block into its linear layers, during training too.

``Linear(LayerNorm(x))`` and ``gamma * Linear(x)`` are linear layers themselves. Folded, their scales and shifts cost
the pass over the weights that autocast's cast costs anyway, instead of passes over the activations:

    weight @ (scale * x + shift) + bias  =  (weight * scale) @ x + (bias + weight @ shift)
    gamma * (weight @ x + bias)          =  (gamma[:, None] * weight) @ x + gamma * bias

The gradients of the parts follow from those of the folded layer, exactly. Products and sums are float32, cast once.
Rows are output channels, columns input channels, and both are compile-time constants: a model has few sizes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbones.kernels.dtypes import math_dtype
from backbones.kernels.pointwise_triton import (
    Launch,
    cdiv,
    launch,
    launches,
    math_type,
    power_of_2,
    tile,
    whole_rows,
)


@triton.jit
def _fold_norm_kernel(
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    out_bias_ptr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    MATH: tl.constexpr,
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    col = tl.arange(0, B)
    mask = (row[:, None] < ROWS) & (col[None, :] < C)
    at = row[:, None] * C + col[None, :]
    weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(MATH)
    scale = tl.load(scale_ptr + col, mask=col < C, other=0.0).to(MATH)
    shift = tl.load(shift_ptr + col, mask=col < C, other=0.0).to(MATH)
    bias = tl.load(bias_ptr + row, mask=row < ROWS, other=0.0).to(MATH)
    tl.store(out_ptr + at, (weight * scale[None, :]).to(out_ptr.dtype.element_ty), mask=mask)
    bias += tl.sum(weight * shift[None, :], axis=1)
    tl.store(out_bias_ptr + row, bias.to(out_bias_ptr.dtype.element_ty), mask=row < ROWS)


@triton.jit
def _fold_norm_backward_kernel(
    weight_ptr,
    scale_ptr,
    shift_ptr,
    d_out_ptr,
    d_bias_ptr,
    d_weight_ptr,
    scale_sums_ptr,
    shift_sums_ptr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    MATH: tl.constexpr,
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    col = tl.program_id(1) * B + tl.arange(0, B)
    mask = (row[:, None] < ROWS) & (col[None, :] < C)
    at = row[:, None] * C + col[None, :]
    weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(MATH)
    scale = tl.load(scale_ptr + col, mask=col < C, other=0.0).to(MATH)
    shift = tl.load(shift_ptr + col, mask=col < C, other=0.0).to(MATH)
    d_out = tl.load(d_out_ptr + at, mask=mask, other=0.0).to(MATH)
    d_bias = tl.load(d_bias_ptr + row, mask=row < ROWS, other=0.0).to(MATH)
    d_weight = d_out * scale[None, :] + d_bias[:, None] * shift[None, :]
    tl.store(d_weight_ptr + at, d_weight.to(d_weight_ptr.dtype.element_ty), mask=mask)
    to = tl.program_id(0) * C + col
    tl.store(scale_sums_ptr + to, tl.sum(weight * d_out, axis=0), mask=col < C)
    tl.store(shift_sums_ptr + to, tl.sum(weight * d_bias[:, None], axis=0), mask=col < C)


@triton.jit
def _fold_scale_kernel(
    weight_ptr,
    bias_ptr,
    scale_ptr,
    out_ptr,
    out_bias_ptr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    MATH: tl.constexpr,
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    col = tl.program_id(1) * B + tl.arange(0, B)
    mask = (row[:, None] < ROWS) & (col[None, :] < C)
    at = row[:, None] * C + col[None, :]
    scale = tl.load(scale_ptr + row, mask=row < ROWS, other=0.0).to(MATH)
    weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(MATH)
    tl.store(out_ptr + at, (weight * scale[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
    if tl.program_id(1) == 0:
        bias = tl.load(bias_ptr + row, mask=row < ROWS, other=0.0).to(MATH)
        tl.store(out_bias_ptr + row, bias * scale, mask=row < ROWS)


@triton.jit
def _fold_scale_backward_kernel(
    weight_ptr,
    bias_ptr,
    scale_ptr,
    d_out_ptr,
    d_out_bias_ptr,
    d_weight_ptr,
    d_bias_ptr,
    d_scale_ptr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    MATH: tl.constexpr,
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    scale = tl.load(scale_ptr + row, mask=row < ROWS, other=0.0).to(MATH)
    along = tl.full((R, B), 0.0, MATH)
    for start in range(0, C, B):
        col = start + tl.arange(0, B)
        mask = (row[:, None] < ROWS) & (col[None, :] < C)
        at = row[:, None] * C + col[None, :]
        weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(MATH)
        d_out = tl.load(d_out_ptr + at, mask=mask, other=0.0).to(MATH)
        tl.store(d_weight_ptr + at, (d_out * scale[:, None]).to(d_weight_ptr.dtype.element_ty), mask=mask)
        along += weight * d_out
    bias = tl.load(bias_ptr + row, mask=row < ROWS, other=0.0).to(MATH)
    d_out_bias = tl.load(d_out_bias_ptr + row, mask=row < ROWS, other=0.0).to(MATH)
    d_scale = tl.sum(along, axis=1) + bias * d_out_bias
    tl.store(d_bias_ptr + row, (d_out_bias * scale).to(d_bias_ptr.dtype.element_ty), mask=row < ROWS)
    tl.store(d_scale_ptr + row, d_scale.to(d_scale_ptr.dtype.element_ty), mask=row < ROWS)


def fold_norm(weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The linear layer that does what a norm's affine map and the linear layer behind it do together.

    Args:
        weight: ``(D, C)``.
        bias: ``(D,)``.
        scale: ``(C,)``, the norm's weight.
        shift: ``(C,)``, the norm's bias.
        dtype: of the results.

    Returns:
        Weight and bias.
    """
    rows, columns = weight.shape
    out, out_bias = torch.empty_like(weight, dtype=dtype), torch.empty_like(bias, dtype=dtype)
    options = whole_rows(columns)
    grid = (cdiv(rows, options['R']),)
    operands = (weight, bias, scale, shift, out, out_bias)
    launch(_fold_norm_kernel, grid, *operands, ROWS=rows, C=columns, MATH=math_type(weight), **options)
    return out, out_bias


def fold_norm_backward(
    weight: Tensor, scale: Tensor, shift: Tensor, d_out: Tensor, d_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of weight, scale and shift from those of the folded weight and bias.

    The gradient of the bias is that of the folded one.
    """
    rows, columns = weight.shape
    r, b = tile(columns, 4096)
    grid = (cdiv(rows, r), cdiv(columns, b))
    d_weight = torch.empty_like(weight)
    scale_sums = torch.empty(grid[0], columns, dtype=math_dtype(weight), device=weight.device)
    shift_sums = torch.empty_like(scale_sums)
    operands = (weight, scale, shift, d_out, d_bias, d_weight, scale_sums, shift_sums)
    launch(_fold_norm_backward_kernel, grid, *operands, ROWS=rows, C=columns, R=r, B=b, MATH=math_type(weight))
    return d_weight, scale_sums.sum(0), shift_sums.sum(0)


def fold_scale(weight: Tensor, bias: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The linear layer whose result is that of the given one times a scale per channel.

    Not for float16, in which a layer scale of 1e-6 times a weight is zero.

    Args:
        weight: ``(C, D)``.
        bias: ``(C,)``.
        scale: ``(C,)``.
        dtype: of the weight; the bias is float32.

    Returns:
        Weight and bias.
    """
    rows, columns = weight.shape
    r, b = tile(columns)
    grid = (cdiv(rows, r), cdiv(columns, b))
    out, out_bias = torch.empty_like(weight, dtype=dtype), torch.empty_like(bias, dtype=math_dtype(bias))
    operands = (weight, bias, scale, out, out_bias)
    launch(_fold_scale_kernel, grid, *operands, ROWS=rows, C=columns, R=r, B=b, MATH=math_type(weight))
    return out, out_bias


def fold_scale_backward(
    weight: Tensor, bias: Tensor, scale: Tensor, d_out: Tensor, d_out_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of weight, bias and scale from those of the folded weight and bias."""
    rows, columns = weight.shape
    b = min(power_of_2(columns), 1024)
    r = max(2048 // b, 1)
    d_weight, d_bias, d_scale = torch.empty_like(weight), torch.empty_like(bias), torch.empty_like(scale)
    launch(
        _fold_scale_backward_kernel,
        (cdiv(rows, r),),
        *(weight, bias, scale, d_out, d_out_bias, d_weight, d_bias, d_scale),
        **dict(ROWS=rows, C=columns, R=r, B=b),
        MATH=math_type(weight),
    )
    return d_weight, d_bias, d_scale


def configurations(channels: int, dtype: torch.dtype) -> list[Launch]:
    """The launches for blocks of so many channels whose products are in ``dtype``, with float32 parameters."""

    def call() -> None:
        w1, b1 = (torch.empty(*shape, device='meta') for shape in [(4 * channels, channels), (4 * channels,)])
        w2, b2 = w1.t().contiguous(), torch.empty(channels, device='meta')
        fold_norm_backward(w1, b2, b2, fold_norm(w1, b1, b2, b2, dtype)[0], b1)
        if dtype != torch.float16:
            fold_scale_backward(w2, b2, b2, *fold_scale(w2, b2, b2, dtype))

    return launches(call)
