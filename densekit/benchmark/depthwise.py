"""The depthwise 7 x 7 convolution by itself: each direction, beside the machine's limit.

On CUDA the time is that in which the GPU works, as the profiler records it, for these operations are shorter than it
takes to start them; on a CPU it is the time of the call. Several copies of the tensors take turns, so that no operation
finds its input in a cache.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from densekit.benchmark.case import Candidate, Record, Settings, measure_rows
from densekit.benchmark.launches import busy_seconds
from densekit.benchmark.peers import OURS
from densekit.benchmark.roofline import depthwise_floor
from densekit.benchmark.timing import Call, timed

# channels, height, width of the stages of ConvNeXt-T on images of 800 x 1333
STAGES = ((96, 200, 334), (192, 100, 167), (384, 50, 84), (768, 25, 42))
DIRECTIONS = ('forward', 'input gradient', 'weight gradient', 'both gradients')
_KERNEL = 7
_CACHE = 2**28  # bytes that the copies of a tensor have at least

Convolution = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DepthwiseCase:
    """One batch size.

    Attributes:
        number: of images.
        dtype: 'bf16' or 'fp32', of all tensors.
        shapes: ``(C, H, W)``.
    """

    number: int
    dtype: str = 'bf16'
    shapes: tuple[tuple[int, int, int], ...] = STAGES

    @property
    def key(self) -> str:
        """Says all that matters."""
        return ' '.join(['depthwise', str(self.number), self.dtype, *('x'.join(map(str, s)) for s in self.shapes)])

    def measure(self, settings: Settings) -> Record:
        """Measures each shape in an interleaved run of its own."""
        rates = settings.peaks.rates(self.dtype)
        value_bytes = 2 if self.dtype == 'bf16' else 4
        clock = busy_seconds if settings.device.type == 'cuda' else timed
        rows: list[Record] = []
        for shape, direction in itertools.product(self.shapes, DIRECTIONS):
            what = f'{"x".join(map(str, shape))} {direction}'
            makers = {
                Candidate(f'{who}: {what}', layout): (
                    lambda f=function, layout=layout: Operation(self, shape, direction, f, layout, settings.device)  # noqa: B023
                )
                for who, layout, function in _convolutions(settings.device)
            }
            elements = self.number * shape[0] * shape[1] * shape[2]
            times = 2 if direction == 'both gradients' else 1
            for row in measure_rows(makers, settings, clock):
                row |= {'floor': times * depthwise_floor(elements, rates, value_bytes=value_bytes)}
                rows.append(row | {'elements': times * elements})
        return {
            'kind': 'depthwise',
            'title': f'Depthwise 7 x 7, {self.number} images, {self.dtype}',
            'rows': rows,
            'text': f"The multiply-adds alone take {98e12 / rates.vector:.3g} ps per element at this machine's float32 "
            f'rate, memory {2e12 * value_bytes / rates.copy:.3g} ps.',
        }


class Operation:
    """One direction of a convolution, on another copy of its tensors in each call.

    Args:
        case: batch size and dtype.
        shape: ``(C, H, W)``.
        direction: one of ``DIRECTIONS``.
        function: of input, weight and bias.
        layout: of the input.
        device: to run on.
    """

    def __init__(
        self,
        case: DepthwiseCase,
        shape: tuple[int, int, int],
        direction: str,
        function: Convolution,
        layout: str,
        device: torch.device,
    ) -> None:
        dtype = torch.bfloat16 if case.dtype == 'bf16' else torch.float32
        memory_format = torch.channels_last if layout == 'nhwc' else torch.contiguous_format
        size = (case.number, *shape)
        copies = max(1, -(-_CACHE // (case.number * shape[0] * shape[1] * shape[2] * dtype.itemsize)))
        copies = min(copies, 16 if device.type == 'cuda' else 2)
        weight = torch.randn(shape[0], 1, _KERNEL, _KERNEL, device=device, dtype=dtype)
        bias = torch.randn(shape[0], device=device, dtype=dtype)
        inputs = [torch.randn(size, dtype=dtype).to(device=device, memory_format=memory_format) for _ in range(copies)]
        make = self._forward if direction == 'forward' else functools.partial(self._backward, direction=direction)
        self._turns: Iterator[Call] = itertools.cycle([make(function, x, weight, bias) for x in inputs])

    def __call__(self) -> None:
        """Computes."""
        with torch.set_grad_enabled(False):
            next(self._turns)()

    @staticmethod
    def _forward(function: Convolution, x: Tensor, weight: Tensor, bias: Tensor) -> Call:
        return lambda: function(x, weight, bias)

    @staticmethod
    def _backward(function: Convolution, x: Tensor, weight: Tensor, bias: Tensor, direction: str) -> Call:
        wanted = []
        if direction != 'weight gradient':
            wanted.append(x.requires_grad_())
        if direction != 'input gradient':
            weight = weight.detach().requires_grad_()
            wanted.append(weight)
        y = function(x, weight, bias)
        gradient = torch.randn_like(y)
        return lambda: torch.autograd.grad(y, wanted, gradient, retain_graph=True)


def _convolutions(device: torch.device) -> list[tuple[str, str, Convolution]]:
    """Who, layout and function; ours where this checkout has one for the device."""

    def conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=_KERNEL // 2, groups=x.shape[1])

    found: list[tuple[str, str, Convolution]] = [('torch', 'nchw', conv2d), ('torch', 'nhwc', conv2d)]
    if (ours := _ours(device)) is not None:
        found.append((OURS, 'nhwc', ours))
    return found


def _ours(device: torch.device) -> Convolution | None:
    try:
        if device.type == 'cuda':
            from backbones.kernels.depthwise import depthwise_conv2d

            return depthwise_conv2d
        from backbones.kernels import cpu
    except ImportError:
        return None
    return lambda x, weight, bias: cpu.depthwise_conv2d(x, weight, bias, 1)
