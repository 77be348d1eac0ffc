"""A whole ConvNeXt block from the fused kernels; the eager form is :class:`backbones.convnext.ConvNeXtBlock`.

Same parameters, same result within the rounding of the dtype, same random numbers for dropped paths. One operator
forward and one backward: what a block costs the CPU matters where batches are small. The norm's affine map and the
layer scale are folded into the linear layers at every step (:mod:`backbones.kernels.fold_triton`). For the backward
pass there are kept x, the normalized input of the first linear layer and, unless it is recomputed, the GELU's input.
"""

from typing import Any

import torch
from torch import Tensor, nn

from backbones.kernels import choice, mlp
from backbones.kernels.depthwise import SIZES
from backbones.layers import GRN


def unsupported(dwconv: nn.Conv2d, act: nn.Module) -> str | None:
    """Why a block of these parts has no kernels, in words; None if it has."""
    if dwconv.kernel_size[0] not in SIZES:
        return f'there are none for a convolution of {dwconv.kernel_size[0]} x {dwconv.kernel_size[1]}'
    if dwconv.dilation[0] != 1:
        return f'there are none for a convolution with dilation {dwconv.dilation[0]}'
    if not isinstance(act, nn.GELU) or act.approximate != 'none':
        return f'there are none for the activation {act}'
    return None


def runs(kernels: str, x: Tensor, dwconv: nn.Conv2d, act: nn.Module) -> bool:
    """Whether a block of these parts runs on the Triton kernels, rather than as eager code.

    With 'auto' whatever looks on, such as an exporter or a counter of operations, sees the operators everybody knows.

    Args:
        kernels: a member of ``choice.KERNELS``.
        x: the residual stream, ``(N, C, H, W)``.
        dwconv: the depthwise convolution.
        act: the activation.

    Raises:
        RuntimeError: if 'triton' is asked for where it cannot run.
    """
    if kernels == 'eager':
        return False
    if kernels == 'auto' and (x.device.type != 'cuda' or _is_watched()):
        return False
    if choice.choose(kernels, x.device, product_dtype(x)) == 'eager':
        return False
    if reason := unsupported(dwconv, act):
        if kernels == 'triton':
            raise RuntimeError(f"kernels='triton' cannot run this block: {reason}. Give kernels='auto' or 'eager'")
        choice.say_once(f"Some ConvNeXt blocks run without Triton kernels (kernels='auto'): {reason}")
        return False
    return True


def _is_watched() -> bool:
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return True
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0


def product_dtype(x: Tensor) -> torch.dtype:
    """In which the matrix products of a block are taken: autocast's dtype where it is on, else that of x."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def convnext_block(
    x: Tensor,
    dwconv: nn.Conv2d,
    norm: nn.LayerNorm,
    pwconv1: nn.Linear,
    grn: GRN | None,
    pwconv2: nn.Linear,
    gamma: Tensor | None,
    drop_path: nn.Module,
    recompute: bool,
) -> Tensor:
    """Computes a block.

    Args:
        x: the residual stream, ``(N, C, H, W)``.
        dwconv: the depthwise convolution.
        norm: the LayerNorm.
        pwconv1: to 4 C channels; an exact GELU follows.
        grn: behind the GELU.
        pwconv2: back to C channels.
        gamma: the layer scale, ``(C,)``.
        drop_path: timm's DropPath, or nothing of the kind.
        recompute: do not keep the GELU's input for the backward pass.

    Returns:
        ``(N, C, H, W)`` in channels_last; under autocast float32, else of x's dtype.
    """
    dtype = product_dtype(x)
    branch_dtype = dtype if gamma is None else torch.promote_types(dtype, gamma.dtype)
    factor = _drop_factor(drop_path, x, branch_dtype)
    autocast = x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)
    return _block(
        *(x, dwconv.weight, dwconv.bias, norm.weight, norm.bias, pwconv1.weight, pwconv1.bias),
        *((None, None) if grn is None else (grn.gamma.view(-1), grn.beta.view(-1))),
        *(pwconv2.weight, pwconv2.bias, gamma, factor),
        *(norm.eps, 0.0 if grn is None else grn.eps, dtype, _math(x) if autocast else x.dtype),
        not recompute and torch.is_grad_enabled(),
    )[0]


def _drop_factor(drop_path: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """0 or ``1 / (1 - p)`` for each image, drawn as timm draws it for a branch of that dtype: same seed, same paths."""
    probability = getattr(drop_path, 'drop_prob', 0.0)
    if not probability or not drop_path.training:
        return None
    kept = x.new_empty(x.shape[0], dtype=dtype).bernoulli_(1 - probability)
    return kept.to(_math(kept)) / (1 - probability)


@torch.library.custom_op('densekit::convnext_block', mutates_args=())
def _block(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    grn_weight: Tensor | None,
    grn_bias: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None,
    factor: Tensor | None,
    eps: float,
    grn_eps: float,
    dtype: torch.dtype,
    stream_dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result, and what the backward pass needs; :func:`_block_backward` names it."""
    from backbones.kernels import depthwise_triton, fold_triton, pointwise_triton

    x = _last(x)
    x_norm, rstd = depthwise_triton.forward_and_normalize(x, dw_weight.contiguous(), dw_bias, eps, dtype)
    w1_folded, b1_folded = fold_triton.fold_norm(w1.contiguous(), b1, norm_weight, norm_bias, dtype)
    if gamma is not None and _folds_scale(dtype):
        w2_folded, bias = fold_triton.fold_scale(w2.contiguous(), b2, gamma, dtype)
        scale = None
    else:
        w2_folded, bias, scale = w2.to(dtype, copy=True), b2, gamma
    y, h, energy = mlp.forward(x_norm, w1_folded, b1_folded, w2_folded, grn_weight, grn_bias, grn_eps)
    operands = (_rows(x), y.view(-1, y.shape[3]), bias, scale, factor, x.shape[2] * x.shape[3])
    out = pointwise_triton.residual(*operands, stream_dtype)
    none = y.new_empty(0)
    kept_h, kept_y = h if keep else none, none.clone() if scale is None else y
    out = out.view(_nhwc(x)).permute(0, 3, 1, 2)
    return out, x_norm, rstd, kept_h, energy, w1_folded, b1_folded, w2_folded, kept_y


@_block.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, _, _, w1, b1, grn_weight, _, w2, _, gamma, _, _, _, dtype, stream_dtype, keep = rest
    n, c, height, width = x.shape
    pixels = n * height * width
    math = torch.promote_types(dtype, torch.float32)
    new = lambda *shape, dtype=dtype: x.new_empty(shape, dtype=dtype)  # noqa: E731
    return (
        new(n, height, width, c, dtype=stream_dtype).permute(0, 3, 1, 2),
        new(n, height, width, c),
        new(n, height, width, dtype=math),
        new(pixels, w1.shape[0]) if keep else new(0),
        new(0, dtype=math) if grn_weight is None else new(n, w1.shape[0], dtype=math),
        *(new(*w1.shape), new(*b1.shape), new(*w2.shape)),
        new(0) if gamma is None or _folds_scale(dtype) else new(n, height, width, c),
    )


@torch.library.custom_op('densekit::convnext_block_backward', mutates_args=())
def _block_backward(
    grad: Tensor,
    x: Tensor,
    dw_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    grn_weight: Tensor | None,
    grn_bias: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None,
    factor: Tensor | None,
    x_norm: Tensor,
    rstd: Tensor,
    h: Tensor | None,
    energy: Tensor,
    w1_folded: Tensor,
    b1_folded: Tensor,
    w2_folded: Tensor,
    y: Tensor | None,
    grn_eps: float,
    needs_dx: bool,
) -> list[Tensor]:
    """The gradients of x and of the parameters, in the order of the forward operator's arguments.

    What there is no gradient for has no elements. The forward operator's arguments, then what it returned behind its
    result: the normalized input of the first linear layer and the factor of each pixel that normalized it, GELU's
    input, GRN's norms, the folded weights, and the branch's result where the layer scale is not folded.
    """
    from backbones.kernels import depthwise_triton, fold_triton, pointwise_triton

    x, grad = _last(x), _last(grad)
    dtype, pixels = x_norm.dtype, x.shape[2] * x.shape[3]
    scale = None if y is None else gamma
    y_rows = None if y is None else y.view(-1, y.shape[3])
    dy, d_b2, d_gamma = pointwise_triton.residual_backward(_rows(grad), y_rows, b2, scale, factor, pixels, dtype)
    d_x_norm, d_w1, d_b1, d_w2, d_grn_weight, d_grn_bias = mlp.backward(
        dy.view(_nhwc(x)), x_norm, w1_folded, b1_folded, w2_folded, grn_weight, grn_bias, h, energy, grn_eps
    )
    if gamma is not None and y is None:
        d_w2, d_b2, d_gamma = fold_triton.fold_scale_backward(w2.contiguous(), b2, gamma, d_w2, d_b2)
    d_w1, d_norm_weight, d_norm_bias = fold_triton.fold_norm_backward(
        w1.contiguous(), norm_weight, norm_bias, d_w1, d_b1
    )
    flat = (-1, x_norm.shape[3])
    du = pointwise_triton.normalize_backward(x_norm.view(flat), rstd.view(-1), d_x_norm.view(flat), dtype)
    du = du.view(_nhwc(x)).permute(0, 3, 1, 2)
    dw_weight = dw_weight.contiguous()
    d_dw_weight, d_dw_bias = depthwise_triton.weight_gradient(x, du, dw_weight, bias=True)
    dx = depthwise_triton.input_gradient(du, dw_weight, x.dtype, more=grad) if needs_dx else du.new_empty(0)
    grads = [dx, d_dw_weight, d_dw_bias, d_norm_weight, d_norm_bias, d_w1, d_b1]
    return [*grads, d_grn_weight, d_grn_bias, d_w2, d_b2, d_b2.new_empty(0) if d_gamma is None else d_gamma]


@_block_backward.register_fake
def _(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    dw_weight, norm_weight, norm_bias, w1, grn_weight, grn_bias, w2, b2, gamma, *others = rest
    dw_bias, b1, needs_dx = norm_bias, others[6], others[-1]
    like = (dw_weight, dw_bias, norm_weight, norm_bias, w1, b1, grn_weight, grn_bias, w2, b2, gamma)
    return [
        torch.empty_like(x, memory_format=torch.channels_last) if needs_dx else x.new_empty(0),
        *(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in like),
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, ctx.grn_eps, _, _, keep = inputs
    x, dw_weight, _, norm_weight, norm_bias, w1, _, grn_weight, grn_bias, w2, b2, gamma, factor = tensors
    _, x_norm, rstd, h, energy, w1_folded, b1_folded, w2_folded, y = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtypes = [None if t is None else t.dtype for t in tensors[:-1]]
    parameters = (dw_weight, norm_weight, norm_bias, w1, grn_weight, grn_bias, w2, b2, gamma, factor)
    kept_y = None if gamma is None or _folds_scale(x_norm.dtype) else y
    kept = (x_norm, rstd, h if keep else None, energy, w1_folded, b1_folded, w2_folded, kept_y)
    ctx.save_for_backward(x, *parameters, *kept)


def _grad(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 18
    grads = _block_backward(grad, *ctx.saved_tensors, ctx.grn_eps, ctx.needs_input_grad[0])
    cast = [g.to(dtype) if n else None for g, dtype, n in zip(grads, ctx.dtypes, ctx.needs_input_grad, strict=False)]
    return *cast, *(None,) * 6


_block.register_autograd(_grad, setup_context=_setup)


def _folds_scale(dtype: torch.dtype) -> bool:
    """In float16 a layer scale of 1e-6 times a weight is zero; there it is left to the residual addition."""
    return dtype != torch.float16


def _math(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _nhwc(x: Tensor) -> tuple[int, ...]:
    return x.shape[0], x.shape[2], x.shape[3], x.shape[1]


def _rows(x: Tensor) -> Tensor:
    """``(N, C, H, W)`` in channels_last as ``(N * H * W, C)``, without a copy."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])
