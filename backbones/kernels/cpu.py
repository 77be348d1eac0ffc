"""What is faster on a CPU than the obvious operators, from PyTorch's own operators.

The weight gradient of large depthwise convolutions; linear layers, with an exact GELU or an addition inside.

oneDNN, which computes PyTorch's convolutions on x86, has fast code for the weight gradient of a depthwise convolution
for kernels of at most 3 columns (``jcp.kw <= 3`` in oneDNN 3.10, src/cpu/x64/jit_uni_dw_conv_kernel_utils.cpp; the
implementation that runs is seen with ``ONEDNN_VERBOSE=1``). Beyond that it computes a dense convolution of 16 x 16
channels and throws 15 of 16 results away. Here a wider kernel is cut into groups of 3 columns.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.kernels.dtypes import product_dtype

_COLUMNS = 3  # of a kernel that oneDNN has fast code for


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are ordinary CPU tensors that are computed now.

    Not so where something looks on: a compiler, an exporter, vmap, a counter of operations. Those are to see the
    operators that everybody knows.
    """
    return (
        not torch.compiler.is_compiling()
        and all(type(x) in (Tensor, torch.nn.Parameter) and x.device.type == 'cpu' for x in tensors)
        and not torch.jit.is_tracing()
        and not torch.onnx.is_in_onnx_export()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def autocast(*tensors: Tensor) -> list[Tensor]:
    """These CPU tensors as autocast, where it is on, would hand them to a convolution or a linear layer."""
    return [x.to(product_dtype(x)) for x in tensors]


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in this dtype here, by its code for x86."""
    x86 = torch.backends.cpu.get_cpu_capability().startswith('AVX')
    if not (x86 and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def depthwise_pays(x: Tensor, kernel_size: int) -> bool:
    """Whether :func:`depthwise_conv2d` is the faster form in training. See benchmarks/cpu_block.py.

    Args:
        x: ``(N, C, H, W)``.
        kernel_size: of a square kernel.
    """
    return kernel_size > _COLUMNS and x.numel() > 0 and has_onednn(product_dtype(x))


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    """A depthwise convolution that keeps height and width, with a fast weight gradient.

    Args:
        x: ``(N, C, H, W)``, of any memory format.
        weight: ``(C, 1, K, K)``, K odd.
        bias: ``(C,)``.
        dilation: of the kernel.

    Returns:
        ``(N, C, H, W)``, exactly what ``F.conv2d`` gives; the weight's gradient is equal within rounding.
    """
    result: Tensor = _DepthwiseConv2d.apply(x, weight, bias, dilation)
    return result


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return F.conv2d(x, weight, bias, padding=_padding(weight, dilation), dilation=dilation, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        [gradient] = gradients
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # Grad mode says that this gradient is to be differentiated again, which the stock operator can.
        ours = needs_weight and not torch.is_grad_enabled()
        stock = [needs_x, needs_weight and not ours, needs_bias and not ours]
        grad_x = grad_weight = grad_bias = None
        if any(stock):
            grad_x, grad_weight, grad_bias = _stock_backward(gradient, x, weight, ctx.dilation, stock)
        if ours:
            grad_weight = depthwise_weight_gradient(x, gradient, weight.shape[-1], ctx.dilation)
            grad_bias = gradient.sum((0, 2, 3)) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None


def depthwise_weight_gradient(x: Tensor, gradient: Tensor, kernel_size: int, dilation: int = 1) -> Tensor:
    """The gradient of the weight of a depthwise convolution that keeps height and width, for at least one pixel.

    Three columns of the kernel at a time, each by oneDNN's code for three. A column reads the input shifted by some
    pixels. With the rows of the input behind one another in memory and zeros between them, a shift is another start
    in the same memory, so that one copy serves all columns.

    Args:
        x: ``(N, C, H, W)``, the input.
        gradient: ``(N, C, H, W)``, of the output.
        kernel_size: K, odd and at least 3.
        dilation: of the kernel.

    Returns:
        ``(C, 1, K, K)``.
    """
    x_nhwc, gradient_nhwc = x.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
    if dilation > 1:
        x_nhwc, gradient_nhwc = _phases(x_nhwc, dilation), _phases(gradient_nhwc, dilation)
    n, h, w, c = x_nhwc.shape
    reach = kernel_size // 2
    rows = max(h, kernel_size)  # with fewer, oneDNN leaves its fast code
    columns = w + max(reach, _COLUMNS - 1)  # the zeros behind a row stand before the next one too
    size = n * rows * columns * c
    memory = x_nhwc.new_zeros(size + 2 * reach * c)
    memory[reach * c : reach * c + size].view(n, rows, columns, c)[:, :h, :w] = x_nhwc
    gradient_nhwc = F.pad(gradient_nhwc, (0, 0, 0, columns - (_COLUMNS - 1) - w, 0, rows - h)).contiguous()
    weight = x.new_empty(c, 1, kernel_size, _COLUMNS)  # of which oneDNN wants the shape only
    groups = []
    for first in range(0, kernel_size, _COLUMNS):
        shifted = memory.as_strided((n, rows, columns, c), (rows * columns * c, columns * c, c, 1), first * c)
        group = torch.ops.aten.convolution_backward(
            *(gradient_nhwc.permute(0, 3, 1, 2), shifted.permute(0, 3, 1, 2), weight, None),
            *([1, 1], [reach, 0], [1, 1], False, [0, 0], c, [False, True, False]),
        )[1]
        groups.append(group[..., : kernel_size - first])
    return torch.cat(groups, -1)


def _phases(x_nhwc: Tensor, dilation: int) -> Tensor:
    """``(N, H, W, C)`` as N * dilation**2 images of every dilation-th pixel; a dilated kernel mixes none of them."""
    n, h, w, c = x_nhwc.shape
    rows, columns = -(-h // dilation), -(-w // dilation)
    x_nhwc = F.pad(x_nhwc, (0, 0, 0, columns * dilation - w, 0, rows * dilation - h))
    x_nhwc = x_nhwc.reshape(n, rows, dilation, columns, dilation, c).permute(0, 2, 4, 1, 3, 5)
    return x_nhwc.reshape(n * dilation**2, rows, columns, c)


def _padding(weight: Tensor, dilation: int) -> int:
    return dilation * (weight.shape[-1] // 2)


def _stock_backward(gradient: Tensor, x: Tensor, weight: Tensor, dilation: int, wanted: list[bool]) -> Any:
    padding, c = _padding(weight, dilation), len(weight)
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, [c], [1, 1], [padding] * 2, [dilation] * 2, False, [0, 0], c, wanted
    )


def linear_pays(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`linear` is faster than ``F.linear``. See benchmarks/cpu_block.py.

    In bfloat16 ``F.linear`` is oneDNN's already, in float32 it is MKL's.

    Args:
        x: ``(..., C_in)``.
        weight: ``(C_out, C_in)``.
    """
    return min(weight.shape) >= 96 and product_dtype(x) == torch.float32 and can_fuse_linear(x)


def can_fuse_linear(x: Tensor) -> bool:
    """Whether :func:`linear`, :func:`linear_gelu` and :func:`linear_add` work on such a tensor here."""
    return x.numel() > 0 and has_onednn(x.dtype) and hasattr(torch.ops.mkldnn, '_linear_pointwise')


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.linear`` by oneDNN, with gradients.

    Args:
        x: ``(..., C_in)``.
        weight: ``(C_out, C_in)``.
        bias: ``(C_out,)``.
    """
    result: Tensor = _Linear.apply(x, weight, bias)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _pointwise(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        [gradient] = gradients
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            # oneDNN's result has no gradient of its own; grad mode says that one is wanted.
            ours = not torch.is_grad_enabled()
            grad_x = _pointwise(gradient, weight.t(), None) if ours else gradient @ weight
        if needs_weight:
            grad_weight = rows.t() @ x.flatten(0, -2)
        if needs_bias:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, act: str = 'none') -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, act, [], 'none')
    return result


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``gelu(linear(x))`` with the exact GELU, without gradients, in one operator.

    Args:
        x: ``(..., C_in)``.
        weight: ``(C_out, C_in)``, plain or :func:`packed`.
        bias: ``(C_out,)``.
    """
    return _pointwise(x, weight, bias, 'gelu')


def linear_add(x: Tensor, weight: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    """``linear(x) + other``, without gradients, in one operator.

    Args:
        x: ``(..., C_in)``.
        weight: ``(C_out, C_in)``, plain or :func:`packed`.
        bias: ``(C_out,)``.
        other: ``(..., C_out)``.
    """
    result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, 'add')
    return result


def packed(weight: Tensor, rows: int) -> Tensor:
    """A copy of a linear layer's weight in the order in which oneDNN computes with it.

    Args:
        weight: ``(C_out, C_in)``.
        rows: of the inputs to expect; others work, more slowly.
    """
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
    return result
