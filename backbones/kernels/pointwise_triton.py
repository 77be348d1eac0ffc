"""Triton kernels for what surrounds the matrix products: LayerNorm without affine, exact GELU, the residual.

Every tensor is a matrix ``(rows, C)`` in row-major order, one row a pixel. C is a compile-time constant, so that masks
and addresses are known to be aligned and 16 bytes move at a time; the number of rows is an ordinary argument, so that
another image size compiles at most one more form of a kernel (see :func:`steps`), and a tensor that does not begin at a
multiple of 16 bytes one more again. Arithmetic is float32 (float64 for float64). Sums over rows are taken in two
stages, first per program in a fixed order, then over the programs: the same bits in every run.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbones.kernels.dtypes import math_dtype

_TILE = 2048
"""Elements of a tile; with 128 threads two loads of 16 bytes are in flight for each 16-bit input."""

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A kernel, its arguments in order, and its compile-time constants and launch options by name."""

_record: list[Launch] | None = None


@triton.jit
def gelu(h):
    """``h`` times the normal distribution's cumulative function, as torch computes GELU with approximate='none'."""
    return h * 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))


@triton.jit
def gelu_and_slope(h):
    """GELU and its derivative, ``cdf(h) + h * density(h)``."""
    cdf = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
    return h * cdf, cdf + h * (0.3989422804014327 * tl.exp(-0.5 * h * h))


@triton.jit(do_not_specialize=['rows'])
def _normalize_kernel(
    x_ptr, out_ptr, rstd_ptr, rows, eps, C: tl.constexpr, R: tl.constexpr, B: tl.constexpr, MATH: tl.constexpr
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    col = tl.arange(0, B)
    mask = (row[:, None] < rows) & (col[None, :] < C)
    at = row[:, None].to(tl.int64) * C + col[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(MATH)
    mean = tl.sum(x, axis=1) / C
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)
    tl.store(out_ptr + at, (centred * rstd[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit(do_not_specialize=['rows'])
def _normalize_backward_kernel(
    out_ptr, rstd_ptr, grad_ptr, dx_ptr, rows, C: tl.constexpr, R: tl.constexpr, B: tl.constexpr, MATH: tl.constexpr
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    col = tl.arange(0, B)
    mask = (row[:, None] < rows) & (col[None, :] < C)
    at = row[:, None].to(tl.int64) * C + col[None, :]
    out = tl.load(out_ptr + at, mask=mask, other=0.0).to(MATH)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(MATH)
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
    along = tl.sum(grad * out, axis=1) / C
    mean = tl.sum(grad, axis=1) / C
    dx = (grad - mean[:, None] - out * along[:, None]) * rstd[:, None]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['rows'])
def _gelu_kernel(h_ptr, out_ptr, rows, C: tl.constexpr, R: tl.constexpr, B: tl.constexpr, MATH: tl.constexpr):
    row = tl.program_id(0) * R + tl.arange(0, R)
    col = tl.program_id(1) * B + tl.arange(0, B)
    mask = (row[:, None] < rows) & (col[None, :] < C)
    at = row[:, None].to(tl.int64) * C + col[None, :]
    h = tl.load(h_ptr + at, mask=mask, other=0.0).to(MATH)
    tl.store(out_ptr + at, gelu(h).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['rows'])
def _gelu_backward_kernel(
    h_ptr,
    grad_ptr,
    out_ptr,
    dh_ptr,
    sums_ptr,
    rows,
    C: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    STEPS: tl.constexpr,
    MATH: tl.constexpr,
):
    col = tl.program_id(1) * B + tl.arange(0, B)
    total = tl.full((R, B), 0.0, MATH)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * R + tl.arange(0, R)
        mask = (row[:, None] < rows) & (col[None, :] < C)
        at = row[:, None].to(tl.int64) * C + col[None, :]
        h = tl.load(h_ptr + at, mask=mask, other=0.0).to(MATH)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(MATH)
        out, slope = gelu_and_slope(h)
        dh = (grad * slope).to(dh_ptr.dtype.element_ty)
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(dh_ptr + at, dh, mask=mask)
        total += dh.to(MATH)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * C + col, tl.sum(total, axis=0), mask=col < C)


@triton.jit(do_not_specialize=['rows', 'pixels'])
def _residual_kernel(
    x_ptr,
    y_ptr,
    bias_ptr,
    scale_ptr,
    factor_ptr,
    out_ptr,
    rows,
    pixels,
    C: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    MATH: tl.constexpr,
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    col = tl.program_id(1) * B + tl.arange(0, B)
    mask = (row[:, None] < rows) & (col[None, :] < C)
    at = row[:, None].to(tl.int64) * C + col[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(MATH)
    bias = tl.load(bias_ptr + col, mask=col < C, other=0.0).to(MATH)
    branch = tl.load(y_ptr + at, mask=mask, other=0.0).to(MATH) + bias[None, :]
    if HAS_SCALE:
        branch *= tl.load(scale_ptr + col, mask=col < C, other=0.0).to(MATH)[None, :]
    if HAS_FACTOR:
        branch *= tl.load(factor_ptr + row // pixels, mask=row < rows, other=0.0).to(MATH)[:, None]
    tl.store(out_ptr + at, (x + branch).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['rows', 'pixels'])
def _residual_backward_kernel(
    grad_ptr,
    y_ptr,
    bias_ptr,
    scale_ptr,
    factor_ptr,
    dy_ptr,
    bias_sums_ptr,
    scale_sums_ptr,
    rows,
    pixels,
    C: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    MATH: tl.constexpr,
):
    col = tl.program_id(1) * B + tl.arange(0, B)
    bias_total = tl.full((R, B), 0.0, MATH)
    scale_total = tl.full((R, B), 0.0, MATH)
    if HAS_SCALE:
        bias = tl.load(bias_ptr + col, mask=col < C, other=0.0).to(MATH)
        scale = tl.load(scale_ptr + col, mask=col < C, other=0.0).to(MATH)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * R + tl.arange(0, R)
        mask = (row[:, None] < rows) & (col[None, :] < C)
        at = row[:, None].to(tl.int64) * C + col[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(MATH)
        if HAS_FACTOR:
            grad *= tl.load(factor_ptr + row // pixels, mask=row < rows, other=0.0).to(MATH)[:, None]
        if HAS_SCALE:
            branch = tl.load(y_ptr + at, mask=mask, other=0.0).to(MATH) + bias[None, :]
            scale_total += grad * branch
            grad *= scale[None, :]
        bias_total += grad
        tl.store(dy_ptr + at, grad.to(dy_ptr.dtype.element_ty), mask=mask)
    to = tl.program_id(0).to(tl.int64) * C + col
    tl.store(bias_sums_ptr + to, tl.sum(bias_total, axis=0), mask=col < C)
    if HAS_SCALE:
        tl.store(scale_sums_ptr + to, tl.sum(scale_total, axis=0), mask=col < C)


def math_type(x: Tensor) -> tl.dtype:
    """:func:`math_dtype`, as Triton names it."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def cdiv(a: int, b: int) -> int:
    """How many b hold a; triton.cdiv takes ten times as long on the CPU."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << (n - 1).bit_length()


@functools.cache
def tile(channels: int, elements: int = _TILE) -> tuple[int, int]:
    """Rows and columns of a tile of about so many elements, where the columns may be cut into several tiles."""
    wasted = {size: cdiv(channels, size) * size for size in (512, 256, 128, 64)}
    columns = next((size for size, padded in wasted.items() if padded <= 1.1 * channels), 64)
    if channels < 128:
        columns = max(power_of_2(channels), 16)
    return max(elements // columns, 1), columns


def steps(rows: int, channels: int, tile_rows: int, tile_columns: int) -> int:
    """How many tiles a program of a sum over rows takes: one where that fills the device, else eight.

    Two values only, so that an image size compiles at most one kernel anew.
    """
    programs = cdiv(rows, 8 * tile_rows) * cdiv(channels, tile_columns)
    return 8 if programs >= 512 else 1


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Runs a kernel on the device of its first tensor; Triton alone would take the current one."""
    if 0 in grid:
        return
    if _record is not None:
        _record.append((kernel, args, options))
        return
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **options)


def launches(call: Callable[[], object]) -> list[Launch]:
    """What a call would launch, without running it, so that it can be compiled where there is no device."""
    global _record
    _record = []
    try:
        call()
        return _record
    finally:
        _record = None


@functools.cache
def whole_rows(channels: int) -> dict[str, int]:
    """Launch options of a kernel that needs all channels of a pixel in one tile."""
    columns = max(power_of_2(channels), 16)
    return dict(R=max(_TILE // columns, 1), B=columns, num_warps=8 if columns > _TILE else 4)


def normalize(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """LayerNorm of ``(rows, C)`` without affine: the result in ``dtype``, and 1 / standard deviation ``(rows,)``."""
    rows, channels = x.shape
    out = torch.empty_like(x, dtype=dtype)
    rstd = torch.empty(rows, dtype=math_dtype(x), device=x.device)
    options = whole_rows(channels)
    grid = (cdiv(rows, options['R']),)
    launch(_normalize_kernel, grid, x, out, rstd, rows, eps, C=channels, MATH=math_type(x), **options)
    return out, rstd


def normalize_backward(out: Tensor, rstd: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient ``(rows, C)`` of :func:`normalize`'s input, from its result alone."""
    rows, channels = out.shape
    dx = torch.empty_like(out, dtype=dtype)
    options = whole_rows(channels)
    grid = (cdiv(rows, options['R']),)
    launch(_normalize_backward_kernel, grid, out, rstd, grad, dx, rows, C=channels, MATH=math_type(grad), **options)
    return dx


def gelu_forward(h: Tensor) -> Tensor:
    """Exact GELU of ``(rows, C)``."""
    rows, channels = h.shape
    out = torch.empty_like(h)
    r, b = tile(channels)
    grid = (cdiv(rows, r), cdiv(channels, b))
    launch(_gelu_kernel, grid, h, out, rows, C=channels, R=r, B=b, MATH=math_type(h))
    return out


def gelu_backward(h: Tensor, grad: Tensor, overwrite: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """In one pass GELU itself, the gradient of ``h``, both ``(rows, C)``, and the sum ``(C,)`` of that over the rows.

    The first is for the weights behind, which need it again; it need not be kept from the forward pass.

    Args:
        h: ``(rows, C)``.
        grad: of GELU's result, ``(rows, C)``.
        overwrite: whether the gradient of ``h`` may take the place of ``grad``.
    """
    rows, channels = h.shape
    out, dh = torch.empty_like(h), grad if overwrite else torch.empty_like(h)
    r, b = tile(channels)
    n = steps(rows, channels, r, b)
    grid = (cdiv(rows, n * r), cdiv(channels, b))
    sums = torch.empty(grid[0], channels, dtype=math_dtype(h), device=h.device)
    launch(_gelu_backward_kernel, grid, h, grad, out, dh, sums, rows, C=channels, R=r, B=b, STEPS=n, MATH=math_type(h))
    return out, dh, sums.sum(0)


def residual(
    x: Tensor, y: Tensor, bias: Tensor, scale: Tensor | None, factor: Tensor | None, pixels: int, dtype: torch.dtype
) -> Tensor:
    """``x + factor * scale * (y + bias)`` of ``(rows, C)``, with a scale per channel and a factor per image."""
    out = torch.empty_like(x, dtype=dtype)
    residual_into(out, x, y, bias, scale, factor, pixels)
    return out


def residual_into(
    out: Tensor, x: Tensor, y: Tensor, bias: Tensor, scale: Tensor | None, factor: Tensor | None, pixels: int
) -> None:
    """The same, written to ``out``."""
    rows, channels = x.shape
    r, b = tile(channels)
    launch(
        _residual_kernel,
        (cdiv(rows, r), cdiv(channels, b)),
        *(x, y, bias, scale, factor, out, rows, pixels),
        **dict(C=channels, R=r, B=b, HAS_SCALE=scale is not None, HAS_FACTOR=factor is not None),
        MATH=math_type(x),
    )


def residual_backward(
    grad: Tensor,
    y: Tensor | None,
    bias: Tensor,
    scale: Tensor | None,
    factor: Tensor | None,
    pixels: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of y ``(rows, C)``, bias ``(C,)`` and scale ``(C,)``; y is needed where there is a scale."""
    rows, channels = grad.shape
    dy = torch.empty_like(grad, dtype=dtype)
    r, b = tile(channels)
    n = steps(rows, channels, r, b)
    grid = (cdiv(rows, n * r), cdiv(channels, b))
    sums = torch.empty(grid[0], channels, dtype=math_dtype(grad), device=grad.device)
    scale_sums = None if scale is None else torch.empty_like(sums)
    launch(
        _residual_backward_kernel,
        grid,
        *(grad, y, bias, scale, factor, dy, sums, scale_sums, rows, pixels),
        **dict(C=channels, R=r, B=b, STEPS=n, HAS_SCALE=scale is not None, HAS_FACTOR=factor is not None),
        MATH=math_type(grad),
    )
    return dy, sums.sum(0), None if scale_sums is None else scale_sums.sum(0)


def configurations(channels: int, dtype: torch.dtype) -> list[Launch]:
    """The launches for blocks of so many channels whose products are in ``dtype``, on small and on large maps."""

    def call() -> None:
        for rows in (2**6, 2**20):
            x = torch.empty(rows, channels, device='meta')
            y, h = x.to(dtype), torch.empty(rows, 4 * channels, dtype=dtype, device='meta')
            normalize_backward(*normalize(y, 1e-6, dtype), y, dtype)
            gelu_forward(h)
            gelu_backward(h, h)
            for scale, factor in itertools.product((None, x[0]), (None, x[:, 0])):
                residual(x, y, x[0], scale, factor, 1, x.dtype)
                residual_backward(x, y, x[0], scale, factor, 1, dtype)

    return launches(call)
