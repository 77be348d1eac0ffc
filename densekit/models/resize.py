"""Bilinear resizing: with a gradient by matrix products on a CPU, and of several maps straight into one.

Resizing is linear and separable: ``Y X Z'``, where the rows of Y and Z hold the bilinear weights. So is its gradient,
``Y' G Z``, two small matrix products, while torch's (2.11) adds number by number. In the forward, all is torch's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def resize(x: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Bilinear interpolation.

    Args:
        x: ``(N, C, h, w)``.
        size: H, W.
        align_corners: whether the centres of the corner cells stay where they are.

    Returns:
        ``(N, C, H, W)``.
    """
    return _Resize.apply(x, tuple(size), align_corners)


def resized_and_joined(
    maps: Sequence[Tensor],
    align_corners: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """All maps in the size of the first, one after the other along the channels.

    As ``torch.cat`` of the resized maps, which this does not keep: at most one exists at a time.

    Args:
        maps: ``(N, C_i, h_i, w_i)`` each.
        align_corners: see :func:`resize`.
        memory_format: of the result.

    Returns:
        ``(N, sum of C_i, h_0, w_0)``.
    """
    return _ResizedAndJoined.apply(align_corners, memory_format, *maps)


class _Resize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
        ctx.shape, ctx.dtype, ctx.align_corners = x.shape, x.dtype, align_corners
        return _interpolated(x, size, align_corners)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gradient(grad, ctx.shape, ctx.align_corners).to(ctx.dtype), None, None


class _ResizedAndJoined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, align_corners: bool, memory_format: torch.memory_format, *maps: Tensor) -> Tensor:
        ctx.like, ctx.align_corners = [(x.shape, x.dtype) for x in maps], align_corners
        first, size = maps[0], maps[0].shape[2:]
        out: Tensor | None = None
        channels = [x.shape[1] for x in maps]
        for x, start in reversed(list(zip(maps, _starts(channels), strict=True))):
            part = x if x is first else _interpolated(x, size, align_corners)
            if out is None:  # the dtype of what is resized is autocast's choice
                dtype = torch.promote_types(part.dtype, first.dtype)
                shape = (len(first), sum(channels), *size)
                out = torch.empty(shape, dtype=dtype, device=first.device, memory_format=memory_format)
            out[:, start : start + x.shape[1]] = part
            del part  # before the next one is made
        assert out is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        starts = _starts([shape[1] for shape, _ in ctx.like])
        grads = []
        for (shape, dtype), start, needed in zip(ctx.like, starts, ctx.needs_input_grad[2:], strict=True):
            part = grad[:, start : start + shape[1]]
            with torch.autocast('cpu', enabled=False):
                grads.append(_gradient(part, shape, ctx.align_corners).to(dtype) if needed else None)
        return None, None, *grads


def _starts(channels: Sequence[int]) -> list[int]:
    return [sum(channels[:i]) for i in range(len(channels))]


def _interpolated(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    return functional.interpolate(x, size=tuple(size), mode='bilinear', align_corners=align_corners)


def _gradient(grad: Tensor, shape: Sequence[int], align_corners: bool) -> Tensor:
    """``(N, C, h, w)`` from ``(N, C, H, W)``."""
    count, channels, height, width = shape
    size = grad.shape[2:]
    if size == (height, width):
        return grad
    if grad.device.type != 'cpu':
        return torch.ops.aten.upsample_bilinear2d_backward(grad, size, list(shape), align_corners)
    down, across = (_weights(old, new, align_corners) for old, new in zip((height, width), size, strict=True))
    rows = down.T @ grad.float().permute(0, 2, 3, 1).reshape(count, size[0], -1)
    both = across.T @ rows.reshape(count * height, size[1], channels)
    return both.reshape(count, height, width, channels).permute(0, 3, 1, 2).to(grad.dtype)


def _weights(old: int, new: int, align_corners: bool) -> Tensor:
    """``(new, old)``: what each of the old cells is worth to a new one."""
    return _interpolated(torch.eye(old)[None, None], (new, old), align_corners)[0, 0]
