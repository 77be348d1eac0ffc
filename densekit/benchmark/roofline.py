"""The least time that a backbone can take on a machine, whoever writes its kernels.

Each operation takes the longer of two times: its bytes at the machine's copying rate, and its arithmetic at the
machine's rate for that kind, matrix products or fused multiply-adds. Times of operations add up; launches are free and
the cache is empty.

An element is one channel of one position of a block's input; C is the number of channels, a value is 2 bytes (bf16) or
4 (float32, which doubles all bytes below). Matrix products of a block: 2 of 4 C^2 multiply-adds per position, so 8 C
FLOP per element forward, twice that backward. The depthwise 7 x 7 convolution has 49 multiply-adds per element and
direction (forward, gradient of the input, gradient of the weights): 98 FLOP, outside of the matrix units.

Bytes per element of a block, in bf16:

- ``compiled``: kernels with cuBLAS's or oneDNN's matrix products and fused elementwise operations. Forward 46:
  convolution with LayerNorm 4 (read x, write the normalized), fc1 10 (read C, write 4 C), GELU 16, fc2 10, scale, drop
  path and residual 6. Backward 96: four matrix products of 10, LayerNorm 6, convolution with residual 8 (read x, the
  gradient of its output and that of the block; write), the rest 42: GELU 32 (its gradient, and its output once more),
  scale and drop path with the sums of the biases 10. About what a compiler reaches.
- ``fused``: GELU within the matrix products, from the stored input of GELU. Forward 26: 4, fc1 10, fc2 12. Backward 62:
  fc2's input gradient with GELU's 18, fc2's weights 10, fc1's two 10 each, 6, 8.
- ``whole``: the MLP in one kernel, which recomputes in the backward pass (48 C FLOP per element there instead of 32 C).
  Forward 10: 4, 6. Backward 24: 10, 6, 8.
- ``best``: the smaller of ``fused`` and ``whole``, stage by stage. The figure that everything is judged by.

Around the blocks: the stem reads an image of 3 channels and writes its output, normalized; LayerNorms before the
downsamplings and at the outputs take 4 bytes forward and 6 backward; a downsampling reads C and writes C / 2 per
element with 4 C FLOP, twice that backward, the stem once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from backbones import ARCHS

_TAPS = 98.0  # FLOP per element of a 7 x 7 depthwise convolution


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        copy: bytes read plus bytes written by a copy.
        matrix: FLOP of matrix products in the dtype at hand.
        vector: FLOP of float32 multiply-adds.
    """

    copy: float
    matrix: float
    vector: float


# bytes, FLOP in matrix products, FLOP in multiply-adds; all per element
_Operation = tuple[float, float, float]


def _compiled(channels: int, training: bool) -> list[_Operation]:
    product = (10.0, 8.0 * channels, 0.0)
    forward: list[_Operation] = [(4, 0, _TAPS), product, (16, 0, 0), product, (6, 0, 0)]
    backward: list[_Operation] = [*[product] * 4, (6, 0, 0), (8, 0, 2 * _TAPS), (42, 0, 0)]
    return forward + backward * training


def _fused(channels: int, training: bool) -> list[_Operation]:
    flop = 8.0 * channels
    forward: list[_Operation] = [(4, 0, _TAPS), (10, flop, 0), (12, flop, 0)]
    backward: list[_Operation] = [(18, flop, 0), *[(10, flop, 0)] * 3, (6, 0, 0), (8, 0, 2 * _TAPS)]
    return forward + backward * training


def _whole(channels: int, training: bool) -> list[_Operation]:
    forward: list[_Operation] = [(4, 0, _TAPS), (6, 16.0 * channels, 0)]
    backward: list[_Operation] = [(10, 48.0 * channels, 0), (6, 0, 0), (8, 0, 2 * _TAPS)]
    return forward + backward * training


_FORMS: dict[str, Sequence[Callable[[int, bool], list]]] = {
    'compiled': (_compiled,),
    'fused': (_fused,),
    'best': (_fused, _whole),
}
FORMS = tuple(_FORMS)


def floor(
    arch: str, images: tuple[int, int, int], rates: Rates, *, training: bool, value_bytes: int = 2, form: str = 'best'
) -> float:
    """Seconds that a ConvNeXt with four output norms takes at least, forward and, in training, backward.

    Args:
        arch: a name in ``ARCHS``.
        images: number, height and width.
        rates: of the machine.
        training: count the backward pass too.
        value_bytes: of a value in memory, 2 or 4.
        form: ``'compiled'``, ``'fused'`` or ``'best'``.

    Example:
        ``floor('tiny', (1, 512, 512), Rates(4.3e12, 790e12, 67e12), training=True, form='compiled')`` is 0.466 ms.
    """
    depths, channels = ARCHS[arch]
    number, height, width = images
    wide = value_bytes / 2

    def total(operations: Sequence[_Operation], elements: float) -> float:
        return elements * sum(
            max(wide * size / rates.copy, matrix / rates.matrix, vector / rates.vector)
            for size, matrix, vector in operations
        )

    seconds = 0.0
    for stage, (depth, width_c) in enumerate(zip(depths, channels, strict=True)):
        stride = 4 * 2**stage
        elements = number * math.ceil(height / stride) * math.ceil(width / stride) * width_c
        seconds += depth * min(total(make(width_c, training), elements) for make in _FORMS[form])
        norms = 1 if stage == 3 else 2  # of the output; before the downsampling
        seconds += norms * total([(4, 0, 0), *[(6.0, 0.0, 0.0)] * training], elements)
        if stage < 3:
            seconds += total([(3, 4.0 * width_c, 0)] * (3 if training else 1), elements)
        if stage == 0:  # 48 values of the image for each position, a LayerNorm backward
            pixels = (2 * 48 / width_c + 2, 96.0, 0.0)
            seconds += total([pixels] * (2 if training else 1) + [(6.0, 0.0, 0.0)] * training, elements)
    return seconds


def depthwise_floor(elements: int, rates: Rates, *, value_bytes: int = 2, taps: int = 49) -> float:
    """Seconds of one direction of a depthwise convolution: two tensors through memory, or its multiply-adds."""
    return elements * max(2 * value_bytes / rates.copy, 2 * taps / rates.vector)
