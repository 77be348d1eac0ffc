"""The inside of a block, ``gelu(x @ w1.T + b1) @ w2.T``, optionally with a GRN behind the GELU.

Autograd would keep both the input and the result of GELU, and of GRN as well; here the input alone is kept, or not
even that, and the rest is computed anew in the pass over it that the backward needs anyway.
"""

from typing import Any

import torch
from torch import Tensor

from backbones.kernels.dtypes import math_dtype
from backbones.kernels.pointwise import whole

# GELU inside the matrix products: (name of the device, channels) for which benchmarks/gpu_block.py shows it to be
# faster than cuBLAS and a pass of GELU, forward and backward. Empty until measured.
FUSED_PRODUCTS: frozenset[tuple[str, int]] = frozenset()


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor | None = None,
    *,
    grn_weight: Tensor | None = None,
    grn_bias: Tensor | None = None,
    eps: float = 1e-6,
    recompute: bool = False,
) -> Tensor:
    """Two linear layers with an exact GELU, and optionally a GRN, between them. All tensors have one dtype but GRN's.

    Args:
        x: ``(N, H, W, C)``.
        w1: ``(D, C)``.
        b1: ``(D,)``.
        w2: ``(C, D)``.
        b2: ``(C,)``; not given, nothing is added, for a caller that adds it later.
        grn_weight: ``(D,)``; not given, there is no GRN.
        grn_bias: ``(D,)``.
        eps: of the GRN.
        recompute: keep only x for the backward pass, which repeats the first product.

    Returns:
        ``(N, H, W, C)``.
    """
    needed = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, w1, b1, w2, grn_weight, grn_bias)
    )
    y = _mlp(x, w1, b1, w2, grn_weight, grn_bias, eps, needed and not recompute)[0]
    return y if b2 is None else y + b2


def forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, grn_weight: Tensor | None, grn_bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What the operator computes, for one that contains it.

    Returns:
        The result, like x; the GELU's input ``(N * H * W, D)``; GRN's norms ``(N, D)``, or nothing without GRN.
    """
    from backbones.kernels import grn_triton, mlp_triton, pointwise_triton

    h = _hidden(x, w1, b1)
    energy = h.new_empty(0, dtype=math_dtype(x))
    if grn_weight is not None and grn_bias is not None:
        h_images = h.view(x.shape[0], x.shape[1] * x.shape[2], h.shape[1])
        energy, scale = grn_triton.energy_and_scale(h_images, grn_weight, eps, gelu=True)
        y = grn_triton.apply(h_images, scale, grn_bias, gelu=True).view(h.shape) @ w2.t()
    elif _fused(x):
        y = mlp_triton.linear(h, w2)
    else:
        y = pointwise_triton.gelu_forward(h) @ w2.t()
    return y.view(x.shape), h, energy


def backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    grn_weight: Tensor | None,
    grn_bias: Tensor | None,
    h: Tensor | None,
    energy: Tensor,
    eps: float,
    weights: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, w1, b1 (a float32 sum), w2, and GRN's weight and bias, which are empty without GRN.

    Where h is not given it is computed anew. Without ``weights`` those of w1 and w2 are empty.
    """
    from backbones.kernels import grn_triton, mlp_triton, pointwise_triton

    h = _hidden(x, w1, b1) if h is None else h
    dy = grad.contiguous().view(-1, grad.shape[3])
    d_grn_weight, d_grn_bias = energy.new_empty(0), energy.new_empty(0)
    if grn_weight is not None and grn_bias is not None:
        shape = (x.shape[0], x.shape[1] * x.shape[2], h.shape[1])
        d_hidden, d_grn_weight, d_grn_bias, hidden, db1 = grn_triton.backward_through_gelu(
            h.view(shape), (dy @ w2).view(shape), energy, grn_weight, grn_bias, eps
        )
        dh, hidden = d_hidden.view(h.shape), hidden.view(h.shape)
        dw2 = dy.t() @ hidden if weights else w2.new_empty(0)
    elif _fused(x):
        dh, db1 = mlp_triton.input_gradient(dy, w2, h)
        dw2 = mlp_triton.weight_gradient(dy, h).to(w2.dtype) if weights else w2.new_empty(0)
    else:
        hidden, dh, db1 = pointwise_triton.gelu_backward(h, dy @ w2, overwrite=True)
        dw2 = dy.t() @ hidden if weights else w2.new_empty(0)
    dw1 = dh.t() @ x.contiguous().view(-1, x.shape[3]) if weights else w1.new_empty(0)
    return (dh @ w1).view(x.shape), dw1, db1, dw2, d_grn_weight, d_grn_bias


@torch.library.custom_op('densekit::mlp', mutates_args=())
def _mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    grn_weight: Tensor | None,
    grn_bias: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, h, energy = forward(x, w1, b1, w2, whole(grn_weight), whole(grn_bias), eps)
    return y, h if keep else h.new_empty(0), energy


@_mlp.register_fake
def _(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    grn_weight: Tensor | None,
    grn_bias: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    pixels = x.shape[0] * x.shape[1] * x.shape[2]
    h = x.new_empty((pixels, w1.shape[0]) if keep else (0,))
    energy = x.new_empty((0,) if grn_weight is None else (x.shape[0], w1.shape[0]), dtype=math_dtype(x))
    return x.new_empty(x.shape), h, energy


@torch.library.custom_op('densekit::mlp_backward', mutates_args=())
def _mlp_backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    grn_weight: Tensor | None,
    grn_bias: Tensor | None,
    h: Tensor | None,
    energy: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return backward(grad, x, w1, b1, w2, whole(grn_weight), whole(grn_bias), h, energy, eps)


@_mlp_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    grn_weight: Tensor | None,
    grn_bias: Tensor | None,
    h: Tensor | None,
    energy: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    small = energy.new_empty(0 if grn_weight is None else grn_weight.shape)
    return (
        *(x.new_empty(x.shape), w1.new_empty(w1.shape), energy.new_empty(b1.shape), w2.new_empty(w2.shape)),
        *(small, torch.empty_like(small)),
    )


def _mlp_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.eps, keep = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, output[1] if keep else None, output[2])


def _mlp_grad(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    *inputs, h, energy = ctx.saved_tensors
    grads = _mlp_backward(grad, *inputs, h, energy, ctx.eps)
    return *(None if t is None else d.to(t.dtype) for t, d in zip(inputs, grads, strict=True)), None, None


_mlp.register_autograd(_mlp_grad, setup_context=_mlp_setup)


def _hidden(x: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
    return torch.addmm(b1, x.contiguous().view(-1, x.shape[3]), w1.t())


def _fused(x: Tensor) -> bool:
    if not FUSED_PRODUCTS or x.dtype not in (torch.float16, torch.bfloat16) or not x.is_cuda:
        return False
    return (torch.cuda.get_device_name(x.device), x.shape[3]) in FUSED_PRODUCTS
