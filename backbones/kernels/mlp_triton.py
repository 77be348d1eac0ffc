"""Triton matrix products with exact GELU inside: GELU's result never goes to memory.

They are for narrow stages, where cuBLAS waits for memory and GELU's traffic is what can be saved. Matrices are row
major with ``rows`` pixels; C is the block's width, 4 C the width inside. As elsewhere only C is a compile-time
constant, and sums over rows are taken in two stages. Products accumulate in float32; those of float32, which only
tests ask for, are not shortened to TF32 whatever torch is told for its own.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbones.kernels.pointwise_triton import Launch, cdiv, gelu, gelu_and_slope, launch, launches, power_of_2

MAX_CHANNELS = 256
"""A tile holds all output channels, so that GELU is computed once for each element."""


@triton.jit(do_not_specialize=['rows'])
def _linear_kernel(
    h_ptr,
    w_ptr,
    out_ptr,
    rows,
    K: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``gelu(h) @ w.T`` of ``h`` (rows, K) and ``w`` (N, K)."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    col = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.full((BM, BN), 0.0, tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        h = tl.load(
            h_ptr + row[:, None].to(tl.int64) * K + k[None, :],
            mask=(row[:, None] < rows) & (k[None, :] < K),
            other=0.0,
        )
        w = tl.load(w_ptr + col[None, :] * K + k[:, None], mask=(col[None, :] < N) & (k[:, None] < K), other=0.0)
        acc = tl.dot(gelu(h.to(tl.float32)).to(h.dtype), w, acc, input_precision='ieee')
    at = row[:, None].to(tl.int64) * N + col[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(row[:, None] < rows) & (col[None, :] < N))


@triton.jit(do_not_specialize=['rows'])
def _input_gradient_kernel(
    grad_ptr,
    w_ptr,
    h_ptr,
    dh_ptr,
    sums_ptr,
    rows,
    K: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``(grad @ w) * gelu'(h)`` of ``grad`` (rows, K), ``w`` (K, N) and ``h`` (rows, N), and sums over rows of it."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    col = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.full((BM, BN), 0.0, tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        grad = tl.load(
            grad_ptr + row[:, None].to(tl.int64) * K + k[None, :],
            mask=(row[:, None] < rows) & (k[None, :] < K),
            other=0.0,
        )
        w = tl.load(w_ptr + k[:, None] * N + col[None, :], mask=(k[:, None] < K) & (col[None, :] < N), other=0.0)
        acc = tl.dot(grad, w, acc, input_precision='ieee')
    mask = (row[:, None] < rows) & (col[None, :] < N)
    at = row[:, None].to(tl.int64) * N + col[None, :]
    h = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dh = (acc * gelu_and_slope(h)[1]).to(dh_ptr.dtype.element_ty)
    tl.store(dh_ptr + at, dh, mask=mask)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * N + col, tl.sum(dh.to(tl.float32), axis=0), mask=col < N)


@triton.jit(do_not_specialize=['rows'])
def _weight_gradient_kernel(
    grad_ptr,
    h_ptr,
    sums_ptr,
    rows,
    M: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One part of ``grad.T @ gelu(h)`` of ``grad`` (rows, M) and ``h`` (rows, N), of ``STEPS * BK`` rows."""
    part = tl.program_id(0).to(tl.int64)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.full((BM, BN), 0.0, tl.float32)
    for step in range(STEPS):
        row = (part * STEPS + step) * BK + tl.arange(0, BK)
        grad = tl.load(
            grad_ptr + row[None, :] * M + m[:, None], mask=(row[None, :] < rows) & (m[:, None] < M), other=0.0
        )
        h = tl.load(h_ptr + row[:, None] * N + n[None, :], mask=(row[:, None] < rows) & (n[None, :] < N), other=0.0)
        acc = tl.dot(grad, gelu(h.to(tl.float32)).to(h.dtype), acc, input_precision='ieee')
    at = (part * M + m[:, None]) * N + n[None, :]
    tl.store(sums_ptr + at, acc, mask=(m[:, None] < M) & (n[None, :] < N))


def linear(h: Tensor, weight: Tensor) -> Tensor:
    """``gelu(h) @ weight.T`` of ``(rows, 4 C)`` and ``(C, 4 C)``: ``(rows, C)``."""
    (rows, inner), channels = h.shape, weight.shape[0]
    out = h.new_empty(rows, channels)
    options = linear_options(channels)
    grid = (cdiv(rows, options['BM']), cdiv(channels, options['BN']))
    launch(_linear_kernel, grid, h, weight, out, rows, K=inner, N=channels, **options)
    return out


def input_gradient(grad: Tensor, weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of h ``(rows, 4 C)`` from that of :func:`linear`'s result, and its sum over the rows ``(4 C,)``."""
    (rows, inner), channels = h.shape, weight.shape[0]
    dh = torch.empty_like(h)
    options = input_gradient_options(channels)
    grid = (cdiv(rows, options['BM']), cdiv(inner, options['BN']))
    sums = torch.empty(grid[0], inner, dtype=torch.float32, device=h.device)
    operands = (grad, weight, h, dh, sums, rows)
    launch(_input_gradient_kernel, grid, *operands, K=channels, N=inner, **options)
    return dh, sums.sum(0)


def weight_gradient(grad: Tensor, h: Tensor) -> Tensor:
    """The gradient ``(C, 4 C)`` of :func:`linear`'s weight, in float32."""
    (rows, inner), channels = h.shape, grad.shape[1]
    options = weight_gradient_options(channels, rows)
    parts = cdiv(rows, options['STEPS'] * options['BK'])
    grid = (parts, cdiv(inner, options['BN']), cdiv(channels, options['BM']))
    sums = torch.empty(parts, channels, inner, dtype=torch.float32, device=h.device)
    launch(_weight_gradient_kernel, grid, grad, h, sums, rows, M=channels, N=inner, **options)
    return sums.sum(0)


def linear_options(channels: int) -> dict[str, Any]:
    """Tile and launch options of :func:`linear`."""
    return dict(BM=128, BN=_power(channels), BK=_depth(4 * channels), num_warps=8, num_stages=3)


def input_gradient_options(channels: int) -> dict[str, Any]:
    """Tile and launch options of :func:`input_gradient`."""
    return dict(BM=128, BN=64, BK=_depth(channels), num_warps=8, num_stages=3)


def weight_gradient_options(channels: int, rows: int) -> dict[str, Any]:
    """Tile and launch options of :func:`weight_gradient`: one of two lengths of a part, so as not to compile more."""
    return dict(BM=_power(channels), BN=64, BK=64, STEPS=16 if rows < 2**16 else 128, num_warps=8, num_stages=3)


def configurations(channels: int, dtype: torch.dtype) -> list[Launch]:
    """The launches for blocks of so many channels in ``dtype``, on small and on large maps; none in float32."""

    def call() -> None:
        for rows in (2**6, 2**20):
            y = torch.empty(rows, channels, dtype=dtype, device='meta')
            h = torch.empty(rows, 4 * channels, dtype=dtype, device='meta')
            weight = torch.empty(channels, 4 * channels, dtype=dtype, device='meta')
            linear(h, weight)
            input_gradient(y, weight, h)
            weight_gradient(y, h)

    return launches(call) if channels <= MAX_CHANNELS and dtype != torch.float32 else []


def _power(channels: int) -> int:
    return max(power_of_2(channels), 16)


def _depth(k: int) -> int:
    """Of one step of a product over k: what divides k leaves no step half empty."""
    return next((size for size in (64, 32, 16) if k % size == 0), 32)
