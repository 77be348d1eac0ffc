"""Triton kernels of global response normalization, with the GELU in front of it where that is wanted.

Tensors are ``(N, P, C)``: images, pixels, channels. The GELU in front is computed anew from its input wherever it is
needed, so that its result never goes to memory. Sums over pixels are float32 and taken in two stages, in a fixed
order. As in :mod:`backbones.kernels.pointwise_triton`, only C is a compile-time constant.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbones.kernels.dtypes import math_dtype
from backbones.kernels.pointwise_triton import (
    Launch,
    cdiv,
    gelu,
    gelu_and_slope,
    launch,
    launches,
    math_type,
    power_of_2,
    steps,
    tile,
)


@triton.jit(do_not_specialize=['pixels', 'parts'])
def _squares_kernel(
    x_ptr,
    sums_ptr,
    pixels,
    parts,
    C: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    STEPS: tl.constexpr,
    GELU: tl.constexpr,
    MATH: tl.constexpr,
):
    part = tl.program_id(0)
    start = (part // parts).to(tl.int64) * pixels
    col = tl.program_id(1) * B + tl.arange(0, B)
    total = tl.full((R, B), 0.0, MATH)
    for step in range(STEPS):
        row = ((part % parts) * STEPS + step) * R + tl.arange(0, R)
        mask = (row[:, None] < pixels) & (col[None, :] < C)
        x = tl.load(x_ptr + (start + row[:, None]) * C + col[None, :], mask=mask, other=0.0).to(MATH)
        if GELU:
            x = gelu(x)
        total += x * x
    tl.store(sums_ptr + part.to(tl.int64) * C + col, tl.sum(total, axis=0), mask=col < C)


@triton.jit
def _scale_kernel(
    squares_ptr, weight_ptr, energy_ptr, scale_ptr, eps, C: tl.constexpr, B: tl.constexpr, MATH: tl.constexpr
):
    """One image: the norm of each channel, and the factor of each channel that follows from it."""
    col = tl.arange(0, B)
    at = tl.program_id(0).to(tl.int64) * C + col
    energy = tl.sqrt(tl.load(squares_ptr + at, mask=col < C, other=0.0))
    weight = tl.load(weight_ptr + col, mask=col < C, other=0.0).to(MATH)
    mean = tl.sum(energy, axis=0) / C
    tl.store(energy_ptr + at, energy, mask=col < C)
    tl.store(scale_ptr + at, weight * (energy / (mean + eps)), mask=col < C)


@triton.jit(do_not_specialize=['pixels', 'parts'])
def _apply_kernel(
    x_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    pixels,
    parts,
    C: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    GELU: tl.constexpr,
    MATH: tl.constexpr,
):
    part = tl.program_id(0)
    image = (part // parts).to(tl.int64)
    row = (part % parts) * R + tl.arange(0, R)
    col = tl.program_id(1) * B + tl.arange(0, B)
    mask = (row[:, None] < pixels) & (col[None, :] < C)
    at = (image * pixels + row[:, None]) * C + col[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(MATH)
    if GELU:
        x = gelu(x)
    scale = tl.load(scale_ptr + image * C + col, mask=col < C, other=0.0)
    bias = tl.load(bias_ptr + col, mask=col < C, other=0.0).to(MATH)
    out = x + bias[None, :] + x * scale[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['pixels', 'parts'])
def _backward_sums_kernel(
    x_ptr,
    grad_ptr,
    along_ptr,
    sums_ptr,
    pixels,
    parts,
    C: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    STEPS: tl.constexpr,
    GELU: tl.constexpr,
    MATH: tl.constexpr,
):
    """Sums over pixels of the gradient, and of the gradient times the normalization's input."""
    part = tl.program_id(0)
    start = (part // parts).to(tl.int64) * pixels
    col = tl.program_id(1) * B + tl.arange(0, B)
    along = tl.full((R, B), 0.0, MATH)
    total = tl.full((R, B), 0.0, MATH)
    for step in range(STEPS):
        row = ((part % parts) * STEPS + step) * R + tl.arange(0, R)
        mask = (row[:, None] < pixels) & (col[None, :] < C)
        at = (start + row[:, None]) * C + col[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(MATH)
        if GELU:
            x = gelu(x)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(MATH)
        along += grad * x
        total += grad
    to = part.to(tl.int64) * C + col
    tl.store(along_ptr + to, tl.sum(along, axis=0), mask=col < C)
    tl.store(sums_ptr + to, tl.sum(total, axis=0), mask=col < C)


@triton.jit
def _backward_scale_kernel(
    along_ptr,
    energy_ptr,
    weight_ptr,
    scale_ptr,
    pull_ptr,
    d_weight_ptr,
    eps,
    C: tl.constexpr,
    B: tl.constexpr,
    MATH: tl.constexpr,
):
    """One image: the factor of each channel, what the norm's gradient adds per unit of input, the weight's gradient."""
    col = tl.arange(0, B)
    known = col < C
    at = tl.program_id(0).to(tl.int64) * C + col
    along = tl.load(along_ptr + at, mask=known, other=0.0)
    energy = tl.load(energy_ptr + at, mask=known, other=0.0)
    weight = tl.load(weight_ptr + col, mask=known, other=0.0).to(MATH)
    inverse = 1.0 / (tl.sum(energy, axis=0) / C + eps)
    d_relative = along * weight
    d_energy = d_relative * inverse - tl.sum(d_relative * energy, axis=0) / C * inverse * inverse
    # A channel that is zero everywhere has a norm without slope; torch's vector_norm calls it 0 as well.
    pull = tl.where(energy > 0.0, d_energy / tl.where(energy > 0.0, energy, 1.0), 0.0)
    tl.store(scale_ptr + at, weight * energy * inverse, mask=known)
    tl.store(pull_ptr + at, pull, mask=known)
    tl.store(d_weight_ptr + at, along * energy * inverse, mask=known)


@triton.jit(do_not_specialize=['pixels', 'parts'])
def _backward_kernel(
    x_ptr,
    grad_ptr,
    scale_ptr,
    pull_ptr,
    bias_ptr,
    out_ptr,
    dx_ptr,
    sums_ptr,
    pixels,
    parts,
    C: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    STEPS: tl.constexpr,
    GELU: tl.constexpr,
    MATH: tl.constexpr,
):
    part = tl.program_id(0)
    image = (part // parts).to(tl.int64)
    col = tl.program_id(1) * B + tl.arange(0, B)
    scale = tl.load(scale_ptr + image * C + col, mask=col < C, other=0.0)[None, :]
    pull = tl.load(pull_ptr + image * C + col, mask=col < C, other=0.0)[None, :]
    if GELU:
        bias = tl.load(bias_ptr + col, mask=col < C, other=0.0).to(MATH)[None, :]
        total = tl.full((R, B), 0.0, MATH)
    for step in range(STEPS):
        row = ((part % parts) * STEPS + step) * R + tl.arange(0, R)
        mask = (row[:, None] < pixels) & (col[None, :] < C)
        at = (image * pixels + row[:, None]) * C + col[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(MATH)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(MATH)
        if GELU:
            x, slope = gelu_and_slope(x)
            out = x + bias + x * scale
            dx = ((grad + grad * scale + pull * x) * slope).to(dx_ptr.dtype.element_ty)
            tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(dx_ptr + at, dx, mask=mask)
            total += tl.where(mask, dx.to(MATH), 0.0)
        else:
            dx = grad + grad * scale + pull * x
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if GELU:
        tl.store(sums_ptr + part.to(tl.int64) * C + col, tl.sum(total, axis=0), mask=col < C)


def energy_and_scale(x: Tensor, weight: Tensor, eps: float, gelu: bool) -> tuple[Tensor, Tensor]:
    """The norm of each channel and its factor ``weight * norm / (mean of the norms + eps)``, both ``(N, C)``."""
    images, pixels, channels = x.shape
    sums, grid, options = _parts(x)
    launch(_squares_kernel, grid, x, sums, pixels, sums.shape[1], GELU=gelu, MATH=math_type(x), **options)
    squares = sums.sum(1)
    energy, scale = torch.empty_like(squares), torch.empty_like(squares)
    launch(_scale_kernel, (images,), squares, weight, energy, scale, eps, MATH=math_type(x), **_one_row(channels))
    return energy, scale


def apply(x: Tensor, scale: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    """``x + bias + x * scale`` of ``(N, P, C)``."""
    images, pixels, channels = x.shape
    out = torch.empty_like(x)
    r, b = tile(channels)
    parts = cdiv(pixels, r)
    grid = (images * parts, cdiv(channels, b))
    launch(_apply_kernel, grid, x, scale, bias, out, pixels, parts, C=channels, R=r, B=b, GELU=gelu, MATH=math_type(x))
    return out


def backward(x: Tensor, grad: Tensor, energy: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x ``(N, P, C)``, weight and bias ``(C,)``."""
    dx = torch.empty_like(x)
    d_weight, d_bias, _ = _backward(x, grad, energy, weight, None, eps, None, dx)
    return dx, d_weight, d_bias


def backward_through_gelu(
    h: Tensor, grad: Tensor, energy: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of GELU's input ``(N, P, C)``, weight and bias ``(C,)``.

    Then the normalization's result ``(N, P, C)``, and the sum ``(C,)`` of the first over all pixels.
    ``grad`` is overwritten.
    """
    out = torch.empty_like(h)
    d_weight, d_bias, sums = _backward(h, grad, energy, weight, bias, eps, out, grad)
    return grad, d_weight, d_bias, out, sums


def _backward(
    x: Tensor,
    grad: Tensor,
    energy: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor | None,
    dx: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills ``dx``, and ``out`` where there is a GELU; the sums over all pixels mean something only there."""
    images, pixels, channels = x.shape
    along, grid, options = _parts(x)
    flags = dict(GELU=out is not None, MATH=math_type(x))
    sums = torch.empty_like(along)
    parts = along.shape[1]
    launch(_backward_sums_kernel, grid, x, grad, along, sums, pixels, parts, **options, **flags)
    d_bias = sums.sum((0, 1))
    along = along.sum(1)
    scale, pull, d_weight = (torch.empty_like(along) for _ in range(3))
    small = (along, energy, weight, scale, pull, d_weight, eps)
    launch(_backward_scale_kernel, (images,), *small, MATH=math_type(x), **_one_row(channels))
    large = (x, grad, scale, pull, bias, out, dx, sums, pixels, parts)
    launch(_backward_kernel, grid, *large, **options, **flags)
    return d_weight.sum(0), d_bias, sums.sum((0, 1))


def _parts(x: Tensor) -> tuple[Tensor, tuple[int, int], dict[str, int]]:
    """Room ``(N, parts, C)`` for the first stage of a sum over pixels, the grid and the tile that fill it."""
    images, pixels, channels = x.shape
    r, b = tile(channels)
    n = steps(pixels * images, channels, r, b)
    parts = cdiv(pixels, n * r)
    room = torch.empty(images, parts, channels, dtype=math_dtype(x), device=x.device)
    return room, (images * parts, cdiv(channels, b)), dict(C=channels, R=r, B=b, STEPS=n)


def _one_row(channels: int) -> dict[str, int]:
    return dict(C=channels, B=max(power_of_2(channels), 16), num_warps=16 if channels > 8192 else 8)


def configurations(channels: int, dtype: torch.dtype) -> list[Launch]:
    """The launches for blocks of so many channels whose products are in ``dtype``, on small and on large maps."""

    def call() -> None:
        for pixels in (2**6, 2**20):
            h = torch.empty(1, pixels, 4 * channels, dtype=dtype, device='meta')
            weight = torch.empty(4 * channels, device='meta')
            for with_gelu in (False, True):
                energy, scale = energy_and_scale(h, weight, 1e-6, with_gelu)
                apply(h, scale, weight, with_gelu)
            backward(h, h, energy, weight, 1e-6)
            backward_through_gelu(h, h, energy, weight, weight, 1e-6)

    return launches(call)
