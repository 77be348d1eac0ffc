"""Global response normalization, fused; the eager form is :class:`backbones.layers.GRN`."""

from typing import Any

import torch
from torch import Tensor

from backbones.kernels.dtypes import math_dtype


def grn(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``x + bias + x * weight * n``, with n the spatial L2 norm of each channel over its mean across channels.

    Two passes over x forward and two backward; everything between is float32.

    Args:
        x: ``(N, H, W, C)``.
        weight: of any shape with C elements.
        bias: of any shape with C elements.
        eps: added to the mean over channels.

    Returns:
        ``(N, H, W, C)`` in the dtype of x.
    """
    return _grn(x, weight.reshape(-1), bias.reshape(-1), eps)[0]


def _images(x: Tensor) -> Tensor:
    """``(N, H, W, C)`` as ``(N, H * W, C)``, copied only where x does not already lie so in memory."""
    return x.contiguous().view(x.shape[0], x.shape[1] * x.shape[2], x.shape[3])


@torch.library.custom_op('densekit::grn', mutates_args=())
def _grn(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from backbones.kernels import grn_triton

    x_images = _images(x)
    energy, scale = grn_triton.energy_and_scale(x_images, weight.contiguous(), eps, gelu=False)
    return grn_triton.apply(x_images, scale, bias.contiguous(), gelu=False).view(x.shape), energy


@_grn.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], x.shape[3]), dtype=math_dtype(x))


@torch.library.custom_op('densekit::grn_backward', mutates_args=())
def _grn_backward(grad: Tensor, x: Tensor, energy: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from backbones.kernels import grn_triton

    dx, d_weight, d_bias = grn_triton.backward(_images(x), _images(grad), energy, weight.contiguous(), eps)
    return dx.view(x.shape), d_weight, d_bias


@_grn_backward.register_fake
def _(grad: Tensor, x: Tensor, energy: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), energy.new_empty(weight.shape), energy.new_empty(weight.shape)


def _grn_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, output[1], weight)


def _grn_grad(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    x, energy, weight = ctx.saved_tensors
    dx, d_weight, d_bias = _grn_backward(grad, x, energy, weight, ctx.eps)
    return dx, d_weight.to(weight.dtype), d_bias.to(ctx.bias_dtype), None


_grn.register_autograd(_grn_grad, setup_context=_grn_setup)
