"""What surrounds the matrix products of a block, each in one pass: LayerNorm without affine, GELU, the residual.

The functions take tensors whose last dimension holds the channels. They are registered as operators, so that
autograd, ``torch.compile`` and ``torch.export`` see through them; Triton is imported when one first runs.
"""

from typing import Any

import torch
from torch import Tensor

from backbones.kernels.dtypes import math_dtype


def normalize(x: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm over the last dimension without weight and bias.

    Only the result and one number per row are kept for the backward pass, not the input.

    Args:
        x: ``(..., C)``.
        eps: added to the variance.
        dtype: of the result; that of x if not given.

    Returns:
        ``(..., C)``, contiguous.
    """
    return _normalize(x, eps, x.dtype if dtype is None else dtype)[0]


def gelu(h: Tensor) -> Tensor:
    """Exact GELU, ``h * Phi(h)``.

    Args:
        h: ``(..., C)``.

    Returns:
        ``(..., C)``, contiguous.
    """
    return _gelu(h)


def add_branch(
    x: Tensor,
    y: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    factor: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The end of a block, ``x + factor * scale * (y + bias)``, computed in float32 and rounded once.

    Args:
        x: the residual stream, ``(N, H, W, C)``.
        y: the branch without the bias of its last layer, ``(N, H, W, C)``, of any floating dtype.
        bias: ``(C,)``.
        scale: of each channel, ``(C,)``: the layer scale where it is not folded into the weights.
        factor: of each image, ``(N,)``: 0 or ``1 / (1 - p)`` where paths are dropped. It gets no gradient.
        dtype: of the result; that of x if not given.

    Returns:
        ``(N, H, W, C)``, contiguous.
    """
    return _add_branch(x, y, bias, scale, factor, x.dtype if dtype is None else dtype)


def _matrix(x: Tensor) -> Tensor:
    """``(..., C)`` as rows of channels, copied only where x does not already lie so in memory."""
    return x.contiguous().view(-1, x.shape[-1])


def whole(vector: Tensor | None) -> Tensor | None:
    """Numbers that follow one another in memory, as the kernels read them."""
    return None if vector is None else vector.contiguous()


@torch.library.custom_op('densekit::normalize', mutates_args=())
def _normalize(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    from backbones.kernels import pointwise_triton

    out, rstd = pointwise_triton.normalize(_matrix(x), eps, dtype)
    return out.view(x.shape), rstd.view(x.shape[:-1])


@_normalize.register_fake
def _(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=math_dtype(x))


@torch.library.custom_op('densekit::normalize_backward', mutates_args=())
def _normalize_backward(out: Tensor, rstd: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    from backbones.kernels import pointwise_triton

    return pointwise_triton.normalize_backward(_matrix(out), rstd.view(-1), _matrix(grad), dtype).view(out.shape)


@_normalize_backward.register_fake
def _(out: Tensor, rstd: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    return out.new_empty(out.shape, dtype=dtype)


def _normalize_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output)


def _normalize_grad(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
    return (None if grad is None else _normalize_backward(*ctx.saved_tensors, grad, ctx.dtype)), None, None


_normalize.register_autograd(_normalize_grad, setup_context=_normalize_setup)


@torch.library.custom_op('densekit::gelu', mutates_args=())
def _gelu(h: Tensor) -> Tensor:
    from backbones.kernels import pointwise_triton

    return pointwise_triton.gelu_forward(_matrix(h)).view(h.shape)


@_gelu.register_fake
def _(h: Tensor) -> Tensor:
    return h.new_empty(h.shape)


@torch.library.custom_op('densekit::gelu_backward', mutates_args=())
def _gelu_backward(h: Tensor, grad: Tensor) -> Tensor:
    from backbones.kernels import pointwise_triton

    return pointwise_triton.gelu_backward(_matrix(h), _matrix(grad))[1].view(h.shape)


@_gelu_backward.register_fake
def _(h: Tensor, grad: Tensor) -> Tensor:
    return h.new_empty(h.shape)


_gelu.register_autograd(
    lambda ctx, grad: _gelu_backward(*ctx.saved_tensors, grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op('densekit::add_branch', mutates_args=())
def _add_branch(
    x: Tensor, y: Tensor, bias: Tensor, scale: Tensor | None, factor: Tensor | None, dtype: torch.dtype
) -> Tensor:
    from backbones.kernels import pointwise_triton

    pixels, vectors = x.shape[1] * x.shape[2], (bias.contiguous(), whole(scale), whole(factor))
    return pointwise_triton.residual(_matrix(x), _matrix(y), *vectors, pixels, dtype).view(x.shape)


@_add_branch.register_fake
def _(x: Tensor, y: Tensor, bias: Tensor, scale: Tensor | None, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op('densekit::add_branch_backward', mutates_args=())
def _add_branch_backward(
    grad: Tensor, y: Tensor | None, bias: Tensor, scale: Tensor | None, factor: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    from backbones.kernels import pointwise_triton

    pixels, vectors = grad.shape[1] * grad.shape[2], (bias.contiguous(), whole(scale), whole(factor))
    y = None if y is None else _matrix(y)
    dy, d_bias, d_scale = pointwise_triton.residual_backward(_matrix(grad), y, *vectors, pixels, dtype)
    return dy.view(grad.shape), d_bias, d_bias.new_empty(0) if d_scale is None else d_scale


@_add_branch_backward.register_fake
def _(
    grad: Tensor, y: Tensor | None, bias: Tensor, scale: Tensor | None, factor: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    sums = grad.new_empty(grad.shape[-1], dtype=math_dtype(grad))
    return grad.new_empty(grad.shape, dtype=dtype), sums, sums.new_empty(0 if scale is None else sums.shape)


def _add_branch_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, bias, scale, factor, _ = inputs
    ctx.dtypes = (x.dtype, y.dtype)
    ctx.save_for_backward(None if scale is None else y, bias, scale, factor)


def _add_branch_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, bias, scale, factor = ctx.saved_tensors
    dy, d_bias, d_scale = _add_branch_backward(grad, y, bias, scale, factor, ctx.dtypes[1])
    d_scale = None if scale is None else d_scale.to(scale.dtype)
    return grad.to(ctx.dtypes[0]), dy, d_bias.to(bias.dtype), d_scale, None, None


_add_branch.register_autograd(_add_branch_grad, setup_context=_add_branch_setup)
