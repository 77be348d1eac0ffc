"""Several maps, resized bilinearly, straight into the one that joins them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def resized_and_joined(
    maps: Sequence[Tensor],
    align_corners: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """All maps in the size of the first, one after the other along the channels.

    As ``torch.cat`` of the resized maps, which this does not keep: at most one exists at a time.

    Args:
        maps: ``(N, C_i, h_i, w_i)`` each.
        align_corners: whether the centres of the corner cells stay where they are.
        memory_format: of the result.

    Returns:
        ``(N, sum of C_i, h_0, w_0)``.
    """
    return _ResizedAndJoined.apply(align_corners, memory_format, *maps)


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
            grads.append(_gradient(part, shape, ctx.align_corners).to(dtype) if needed else None)
        return None, None, *grads


def _starts(channels: Sequence[int]) -> list[int]:
    return [sum(channels[:i]) for i in range(len(channels))]


def _interpolated(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    return functional.interpolate(x, size=tuple(size), mode='bilinear', align_corners=align_corners)


def _gradient(grad: Tensor, shape: Sequence[int], align_corners: bool) -> Tensor:
    """``(N, C, h, w)`` from ``(N, C, H, W)``."""
    if grad.shape[2:] == torch.Size(shape[2:]):
        return grad
    if torch.are_deterministic_algorithms_enabled():  # there is such a form, but autograd alone finds it
        with torch.enable_grad():
            x = grad.new_zeros(shape, requires_grad=True)
            return torch.autograd.grad(_interpolated(x, grad.shape[2:], align_corners), x, grad)[0]
    return torch.ops.aten.upsample_bilinear2d_backward(grad, grad.shape[2:], list(shape), align_corners)
