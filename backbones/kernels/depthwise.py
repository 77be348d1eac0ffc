"""Depthwise convolution of stride 1, channels last, alone and with the LayerNorm behind it.

The functions are registered as operators, so that autograd, ``torch.compile`` and ``torch.export`` see through them;
Triton is imported when one first runs. The arithmetic is float32 whatever the dtype of the tensors (float64 for
float64); weights are read in their own dtype and never copied to another one. Gradients of gradients are an error.

Layouts: N images, C channels, H rows, W columns, K rows and columns of the filter.
"""

from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from backbones.kernels.choice import why_not
from backbones.kernels.dtypes import product_dtype
from backbones.kernels.pointwise import _normalize_backward

SIZES = (3, 5, 7, 9, 11)
"""Of the filter, K."""


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise convolution with stride 1, dilation 1 and as many zeros around the image as keep its size.

    Under autocast the result has autocast's dtype; x is read as it is, so that a float32 residual stream needs no cast.

    Args:
        x: ``(N, C, H, W)``. Any memory format; another than channels_last is copied to it first.
        weight: ``(C, 1, K, K)`` with K in ``SIZES``, of any floating dtype.
        bias: ``(C,)``.

    Returns:
        ``(N, C, H, W)`` in channels_last, of x's dtype or autocast's.

    Raises:
        ValueError: if the shapes or dtypes are others.
        RuntimeError: if there is no Triton for the device of x.
    """
    _check(x, weight, bias)
    return _forward(_last(x), weight, bias, product_dtype(x))


def depthwise_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Depthwise convolution and, over the channels, LayerNorm without weight and bias.

    The backward pass needs x, the result and one number per pixel; the convolution's own result is not kept.

    Args:
        x: ``(N, C, H, W)``.
        weight: ``(C, 1, K, K)`` with K in ``SIZES``.
        bias: ``(C,)``.
        eps: added to the variance.

    Returns:
        ``(N, H, W, C)``, contiguous, of x's dtype or autocast's.

    Raises:
        ValueError: if the shapes or dtypes are others.
        RuntimeError: if there is no Triton for the device of x.
    """
    _check(x, weight, bias)
    return _norm(_last(x), weight, bias, eps, product_dtype(x))[0]


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[0] != x.shape[1] or weight.shape[1] != 1:
        raise ValueError(f'x is {tuple(x.shape)}, weight {tuple(weight.shape)}: give (N, C, H, W) and (C, 1, K, K)')
    if weight.shape[2] != weight.shape[3] or weight.shape[3] not in SIZES:
        raise ValueError(f'a filter of {tuple(weight.shape[2:])}: give K x K with K one of {SIZES}')
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f'bias is {tuple(bias.shape)}: give ({weight.shape[0]},)')
    for tensor in (x, weight) if bias is None else (x, weight, bias):
        if not tensor.is_floating_point():
            raise ValueError(f'a tensor of {tensor.dtype}: give floating-point numbers')


def _kernels(x: Tensor) -> ModuleType:
    if reason := why_not(x.device, x.dtype):
        raise RuntimeError(f'the Triton kernels cannot run here: {reason}')
    from backbones.kernels import depthwise_triton

    return depthwise_triton


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _taps(weight: Tensor) -> Tensor:
    """The weights with one distance in memory between the taps of a channel."""
    return weight if weight.stride(2) == weight.shape[3] * weight.stride(3) else weight.contiguous()


@torch.library.custom_op('densekit::depthwise_conv2d', mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    return _kernels(x).forward(_last(x), _taps(weight), bias, dtype)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.custom_op('densekit::depthwise_conv2d_input_grad', mutates_args=())
def _input_grad(grad: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return _kernels(grad).input_gradient(_last(grad), _taps(weight), dtype)


@_input_grad.register_fake
def _(grad: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(grad.shape, dtype=dtype, device=grad.device, memory_format=torch.channels_last)


@torch.library.custom_op('densekit::depthwise_conv2d_weight_grad', mutates_args=())
def _weight_grad(x: Tensor, grad: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    return _kernels(x).weight_gradient(_last(x), _last(grad), _taps(weight), bias)


@_weight_grad.register_fake
def _(x: Tensor, grad: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(_taps(weight)), weight.new_empty(weight.shape[0] if bias else 0)


@torch.library.custom_op('densekit::depthwise_norm', mutates_args=())
def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    bias = None if bias is None else bias.contiguous()
    return _kernels(x).forward_and_normalize(_last(x), _taps(weight), bias, eps, dtype)


@_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    num, channels, height, width = x.shape
    out = x.new_empty((num, height, width, channels), dtype=dtype)
    return out, x.new_empty((num, height, width), dtype=torch.promote_types(dtype, torch.float32))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, grad, *ctx.saved_tensors), None)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, *output)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _norm_backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    x, weight, out, rstd = ctx.saved_tensors
    inner = _normalize_backward(out, rstd, grad, out.dtype).permute(0, 3, 1, 2)
    return (*_gradients(ctx, inner, x, weight), None, None)


def _gradients(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, weight and bias, each only if it is needed."""
    x_grad = weight_grad = bias_grad = None
    if ctx.needs_input_grad[0]:
        x_grad = _input_grad(grad, weight, x.dtype)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        weight_grad, bias_grad = _weight_grad(x, grad, weight, ctx.needs_input_grad[2])
    return (
        x_grad,
        weight_grad if ctx.needs_input_grad[1] else None,
        bias_grad.to(ctx.bias_dtype) if ctx.needs_input_grad[2] and bias_grad is not None else None,
    )


def _no_second_gradient(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError("the depthwise kernels have no gradient of the gradient; build the model with kernels='eager'")


_forward.register_autograd(_backward, setup_context=_setup)
_norm.register_autograd(_norm_backward, setup_context=_norm_setup)
_input_grad.register_autograd(_no_second_gradient)
_weight_grad.register_autograd(_no_second_gradient)
