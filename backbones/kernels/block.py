"""A whole ConvNeXt block from the fused kernels; the eager form is :class:`backbones.convnext.ConvNeXtBlock`.

Same parameters, same result within the rounding of the dtype, same random numbers for dropped paths. One operator
forward and one backward: what a block costs the CPU matters where batches are small. The norm's affine map and the
layer scale are folded into the linear layers at every step (:mod:`backbones.kernels.fold_triton`).

For the backward pass there are kept x, the normalized input of the first linear layer with a number per pixel and,
unless it is recomputed, the GELU's input; where the layer scale is not folded (float16) the branch's result; with a GRN
4 C numbers per image; and the folded weights, 8 C^2 numbers a block.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from backbones.kernels import choice, mlp
from backbones.kernels.depthwise import SIZES
from backbones.kernels.dtypes import math_dtype, product_dtype
from backbones.kernels.pointwise import whole
from backbones.layers import GRN


def unsupported(dwconv: nn.Conv2d, act: nn.Module) -> str | None:
    """Why a block of these parts has no kernels, in words; None if it has."""
    rows, columns = dwconv.kernel_size
    if rows != columns or rows not in SIZES:
        return f'there are none for a convolution of {rows} x {columns}'
    for name, given in (('dilation', dwconv.dilation), ('stride', dwconv.stride)):
        if given != (1, 1):
            return f'there are none for a convolution with {name} {_short(given)}'
    if dwconv.padding not in ((rows // 2, rows // 2), 'same') or dwconv.padding_mode != 'zeros':
        return f'there are none for a convolution with padding {_short(dwconv.padding)} of {dwconv.padding_mode}'
    if not dwconv.groups == dwconv.in_channels == dwconv.out_channels:
        return f'there are none for a convolution with {dwconv.groups} groups of {dwconv.in_channels} channels'
    if not isinstance(act, nn.GELU) or act.approximate != 'none':
        return f'there are none for the activation {act}'
    return None


def _short(size: tuple[int, ...] | str) -> str:
    """Of rows and columns; one number where they are equal."""
    return size if isinstance(size, str) else ' x '.join(map(str, dict.fromkeys(size)))


def runs(kernels: str, x: Tensor) -> bool:
    """Whether a block of the usual parts runs on the Triton kernels, rather than as eager code.

    With 'auto' whatever looks on, such as an exporter or a counter of operations, sees the operators everybody knows.
    With 'triton' it sees one operator for the block, of which a counter of FLOPs knows nothing and counts none.

    Args:
        kernels: a member of ``choice.KERNELS``.
        x: the residual stream, ``(N, C, H, W)``.

    Raises:
        RuntimeError: if 'triton' is asked for where it cannot run.
    """
    if kernels == 'eager':
        return False
    if kernels == 'auto' and (x.device.type != 'cuda' or _is_watched()):
        return False
    return choice.choose(kernels, x.device, product_dtype(x)) == 'triton'


def supports(kernels: str, dwconv: nn.Conv2d, act: nn.Module) -> bool:
    """Whether there are kernels for a block of these parts; if not, says so once.

    Args:
        kernels: 'auto' or 'triton'.
        dwconv: the depthwise convolution.
        act: the activation.

    Raises:
        RuntimeError: if there are none and 'triton' is asked for.
    """
    reason = unsupported(dwconv, act)
    if reason is None:
        return True
    if kernels == 'triton':
        raise RuntimeError(f"kernels='triton' cannot run this block: {reason}. Give kernels='auto' or 'eager'")
    choice.say_once(f"Some ConvNeXt blocks run without Triton kernels (kernels='auto'): {reason}")
    return False


def _is_watched() -> bool:
    # Not is_exporting(): Dynamo takes it for True while it merely compiles (torch 2.11), and torch 2.6 has none.
    if getattr(torch.compiler, '_is_exporting_flag', False) or torch.jit.is_tracing():
        return True
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0


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
    inputs = (
        *(x, dwconv.weight, whole(dwconv.bias), whole(norm.weight), whole(norm.bias)),
        *(pwconv1.weight, whole(pwconv1.bias)),
        *((None, None) if grn is None else (whole(grn.gamma.view(-1)), whole(grn.beta.view(-1)))),
        *(pwconv2.weight, whole(pwconv2.bias), whole(gamma), factor),
        *(norm.eps, 0.0 if grn is None else grn.eps, dtype, math_dtype(x) if autocast else x.dtype),
        not recompute and torch.is_grad_enabled(),
    )
    if torch.compiler.is_compiling() or _is_watched():
        return _block(*inputs)[0]
    result: Tensor = _Block.apply(*inputs)
    return result


def _drop_factor(drop_path: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """0 or ``1 / (1 - p)`` for each image, drawn as timm draws it for a branch of that dtype: same seed, same paths."""
    probability = getattr(drop_path, 'drop_prob', 0.0)
    if not probability or not drop_path.training:
        return None
    kept = x.new_empty(x.shape[0], dtype=dtype).bernoulli_(1 - probability)
    return kept.to(math_dtype(kept)) / (1 - probability)


def _forward(
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
    """The result, and what the backward pass needs; :func:`_backward` names it."""
    from backbones.kernels import depthwise_triton, fold_triton, pointwise_triton

    x = _last(x)
    x_norm, rstd = depthwise_triton.forward_and_normalize(x, dw_weight.contiguous(), dw_bias, eps, dtype)
    w1_folded, b1_folded = fold_triton.fold_norm(w1.contiguous(), b1, norm_weight, norm_bias, dtype)
    if gamma is not None and _folds_scale(dtype):
        w2_folded, bias = fold_triton.fold_scale(w2.contiguous(), b2, gamma, dtype)
        scale = None
    else:
        w2_folded, bias, scale = w2.to(dtype, copy=True, memory_format=torch.contiguous_format), b2, gamma
    y, h, energy = mlp.forward(x_norm, w1_folded, b1_folded, w2_folded, grn_weight, grn_bias, grn_eps)
    # Made in its final shape: a view could not be changed in place by whoever gets it.
    out = torch.empty_like(x, dtype=stream_dtype, memory_format=torch.channels_last)
    operands = (_rows(x), y.view(-1, y.shape[3]), bias, scale, factor, x.shape[2] * x.shape[3])
    pointwise_triton.residual_into(_rows(out), *operands)
    none = y.new_empty(0)
    kept_h, kept_y = h if keep else none, none.clone() if scale is None else y
    return out, x_norm, rstd, kept_h, energy, w1_folded, b1_folded, w2_folded, kept_y


_block = torch.library.custom_op('densekit::convnext_block', _forward, mutates_args=())


@_block.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, _, _, w1, b1, grn_weight, _, w2, _, gamma, _, _, _, dtype, stream_dtype, keep = rest
    n, c, height, width = x.shape
    pixels = n * height * width
    math = torch.promote_types(dtype, torch.float32)
    new = lambda *shape, dtype=dtype: x.new_empty(shape, dtype=dtype)  # noqa: E731
    return (
        torch.empty_like(x, dtype=stream_dtype, memory_format=torch.channels_last),
        new(n, height, width, c),
        new(n, height, width, dtype=math),
        new(pixels, w1.shape[0]) if keep else new(0),
        new(0, dtype=math) if grn_weight is None else new(n, w1.shape[0], dtype=math),
        *(new(*w1.shape), new(*b1.shape), new(*w2.shape)),
        new(0) if gamma is None or _folds_scale(dtype) else new(n, height, width, c),
    )


def _backward(
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
    needs_parameters: bool,
) -> list[Tensor]:
    """The gradients of x and of the parameters, in the order of the forward operator's arguments and in their dtypes.

    Those of the biases of convolution and first linear layer have their weight's. What is not needed, or not there,
    has no elements. The forward operator's arguments, then what it returned behind its result: the normalized input of
    the first linear layer and the factor of each pixel that normalized it, GELU's input, GRN's norms, the folded
    weights, and the branch's result where the layer scale is not folded.
    """
    from backbones.kernels import depthwise_triton, fold_triton, pointwise_triton

    x, grad = _last(x), _last(grad)
    dtype, pixels = x_norm.dtype, x.shape[2] * x.shape[3]
    scale = None if y is None else gamma
    y_rows = None if y is None else y.view(-1, y.shape[3])
    dy, d_b2, d_gamma = pointwise_triton.residual_backward(_rows(grad), y_rows, b2, scale, factor, pixels, dtype)
    d_x_norm, d_w1, d_b1, d_w2, d_grn_weight, d_grn_bias = mlp.backward(
        *(dy.view(_nhwc(x)), x_norm, w1_folded, b1_folded, w2_folded, grn_weight, grn_bias, h, energy, grn_eps),
        weights=needs_parameters,
    )
    flat = (-1, x_norm.shape[3])
    du = pointwise_triton.normalize_backward(x_norm.view(flat), rstd.view(-1), d_x_norm.view(flat), dtype)
    du, dw_weight = du.view(_nhwc(x)).permute(0, 3, 1, 2), dw_weight.contiguous()
    dx = depthwise_triton.input_gradient(du, dw_weight, x.dtype, more=grad) if needs_dx else x.new_empty(0)
    if not needs_parameters:
        return [dx, *(x.new_empty(0) for _ in range(11))]
    if gamma is not None and y is None:
        d_w2, d_b2, d_gamma = fold_triton.fold_scale_backward(w2.contiguous(), b2, gamma, d_w2, d_b2)
    d_w1, d_norm_weight, d_norm_bias = fold_triton.fold_norm_backward(
        w1.contiguous(), norm_weight, norm_bias, d_w1, d_b1
    )
    d_dw_weight, d_dw_bias = depthwise_triton.weight_gradient(x, du, dw_weight, bias=True)
    grads = (d_dw_weight, d_dw_bias, d_norm_weight, d_norm_bias, d_w1, d_b1, d_grn_weight, d_grn_bias, d_w2, d_b2)
    like = (dw_weight, dw_weight, norm_weight, norm_bias, w1, w1, grn_weight, grn_bias, w2, b2, gamma)
    pairs = zip((*grads, d_gamma), like, strict=True)
    return [dx, *(x.new_empty(0) if g is None or t is None else g.to(t.dtype) for g, t in pairs)]


_block_backward = torch.library.custom_op('densekit::convnext_block_backward', _backward, mutates_args=())


@_block_backward.register_fake
def _(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    dw_weight, norm_weight, norm_bias, w1, grn_weight, grn_bias, w2, b2, gamma, *_, needs_dx, needs_parameters = rest
    dw_bias, b1 = dw_weight[:, 0, 0, 0], w1[:, 0]
    like = (dw_weight, dw_bias, norm_weight, norm_bias, w1, b1, grn_weight, grn_bias, w2, b2, gamma)
    return [
        torch.empty_like(x, memory_format=torch.channels_last) if needs_dx else x.new_empty(0),
        *(t.new_empty(t.shape) if needs_parameters and t is not None else x.new_empty(0) for t in like),
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _keep(ctx, inputs, output)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, ctx.grn_eps, _, _, keep = inputs
    x, dw_weight, _, norm_weight, norm_bias, w1, _, grn_weight, grn_bias, w2, b2, gamma, factor = tensors
    _, x_norm, rstd, h, energy, w1_folded, b1_folded, w2_folded, y = output
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if t is None else t.dtype for t in tensors[:-1]]
    parameters = (dw_weight, norm_weight, norm_bias, w1, grn_weight, grn_bias, w2, b2, gamma, factor)
    kept_y = None if gamma is None or _folds_scale(x_norm.dtype) else y
    kept = (x_norm, rstd, h if keep else None, energy, w1_folded, b1_folded, w2_folded, kept_y)
    ctx.save_for_backward(x, *parameters, *kept)


def _grad(
    ctx: Any, grad: Tensor | None, *_: None, backward: Callable[..., list[Tensor]] = _block_backward
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 18
    needed = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:])
    grads = backward(grad, *ctx.saved_tensors, ctx.grn_eps, *needed)
    cast = [g.to(dtype) if n else None for g, dtype, n in zip(grads, ctx.dtypes, ctx.needs_input_grad, strict=False)]
    return *cast, *(None,) * 6


_block.register_autograd(_grad, setup_context=_setup)


class _Block(torch.autograd.Function):
    """The operators' functions without the operators, whose calls cost the CPU time that small batches wait for."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _forward(*inputs)
        _keep(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        # Grad mode says that the gradient is to be differentiated again, of which the operator says that it cannot be.
        return _grad(ctx, grad, backward=_block_backward if torch.is_grad_enabled() else _backward)


def _folds_scale(dtype: torch.dtype) -> bool:
    """In float16 a layer scale of 1e-6 times a weight is zero; there it is left to the residual addition."""
    return dtype != torch.float16


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _nhwc(x: Tensor) -> tuple[int, ...]:
    return x.shape[0], x.shape[2], x.shape[3], x.shape[1]


def _rows(x: Tensor) -> Tensor:
    """``(N, C, H, W)`` in channels_last as ``(N * H * W, C)``, without a copy."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])
