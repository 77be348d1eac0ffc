# mypy: disable-error-code="assignment"
# Tuples that grow are resolved when a kernel is compiled.
"""Triton kernels of the depthwise convolution, channels last; :mod:`backbones.kernels.depthwise` calls them.

One warp lane has one channel of a strip of ``S`` neighbouring columns and walks down the rows. Each loaded value feeds
up to ``S * K`` multiply-adds from registers, because on current GPUs a depthwise 7x7 in float32 arithmetic is bound by
instructions, not by memory. Heights, widths and batch sizes are run-time numbers: one compilation serves every image
size. Sums have a fixed order: no atomics.

The gradients are three kernels: LayerNorm's, the input's, the weights'. By the H200's data sheet (67 TFLOP/s, 4.8 TB/s)
and with 0.7 of its multiply-adds and 0.85 of its memory's speed, the input's takes 2.5 ps an element (10 bytes with a
float32 stream; 49 multiply-adds are 2.1 ps) and the weights' 2.1 ps (49 multiply-adds; 6 bytes are 1.5 ps). One kernel
for both would read LayerNorm's gradient once and take the 4.2 ps of 98 multiply-adds, not 4.6. But a thread would hold
49 weights, 50 gradients of weights and, for each column, 7 sums and 7 gradients: 155 numbers for 4 columns, beside the
20 it loads for a row and the addresses. Two programs would fit on a multiprocessor instead of four, with about as many
loads for a multiply-add as now. LayerNorm's gradient computed where it is read needs its two inputs there, and before
that for the means over the channels: 4 + 4 + 4 bytes an element instead of 4 + 2 + 2 + 2.

Names: R = K // 2. A "part" is what one program contributes to the gradient of the weights. Strips are counted through
the images of the batch, so small feature maps fill the lanes too.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbones.kernels.depthwise_plan import (
    CONVOLVE_RESIDENT,
    CONVOLVE_RESIDENT_OLDER,
    CORRELATE_RESIDENT,
    TOGETHER_RESIDENT,
    WARPS,
    WIDEST,
    convolve_plan,
    correlate_plan,
    registers,
    together_pays,
    together_plan,
)
from backbones.kernels.dtypes import math_dtype
from backbones.kernels.pointwise_triton import Launch, cdiv, launch, launches, math_type, whole_rows
from backbones.kernels.pointwise_triton import _normalize_kernel as normalize_kernel

PARTS, CHANNELS = 64, 32
"""Tile of the sum over the parts."""


@triton.jit
def _load_row(
    base,
    offset,
    columns,
    good,
    C: tl.constexpr,
    NUM: tl.constexpr,
    FIRST: tl.constexpr,
    W,
    INTERIOR: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """NUM neighbouring columns of a row, as a tuple; what lies outside is zero."""
    row = ()
    for j in tl.static_range(NUM):
        if INTERIOR:
            inside = good
        else:
            column = columns + (FIRST + j)
            inside = good & (column >= 0) & (column < W)
        row += (tl.load(base + (offset + (FIRST + j) * C), mask=inside, other=0.0).to(DTYPE),)
    return row


@triton.jit
def _load_taps(
    weight,
    channels,
    good,
    K: tl.constexpr,
    LEVELS: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
    TAP_STRIDE: tl.constexpr,
    FLIP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The K * K weights of each channel, as a tuple: read as they lie in memory, and handed out in one exchange."""
    tap = tl.arange(0, 2**LEVELS)
    place = channels[:, None] * CHANNEL_STRIDE + tap[None, :] * TAP_STRIDE
    tile = tl.load(weight + place, mask=good[:, None] & (tap < K * K)[None, :], other=0.0).to(DTYPE)
    taps = (tl.reshape(tile, (tile.shape[0],) + (2,) * LEVELS),)
    for level in tl.static_range(LEVELS):  # the last bit of a tap's number first
        even = ()
        odd = ()
        for i in tl.static_range(2**level):
            halves = tl.split(taps[i])
            even += (halves[0],)
            odd += (halves[1],)
        taps = even + odd
    rows = ()
    for k in tl.static_range(K * K):
        rows += (taps[K * K - 1 - k if FLIP else k][None, :],)
    return rows


@triton.jit
def _store_row(
    base,
    more,
    offset,
    columns,
    good,
    values,
    C: tl.constexpr,
    W,
    S: tl.constexpr,
    INTERIOR: tl.constexpr,
    HAS_MORE: tl.constexpr,
):
    for s in tl.static_range(S):
        inside = good if INTERIOR else good & (columns + s < W)
        value = values[s]
        if HAS_MORE:
            value += tl.load(more + (offset + s * C), mask=inside, other=0.0).to(value.dtype)
        tl.store(base + (offset + s * C), value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _interior(strip, strips, num, W, R: tl.constexpr, S: tl.constexpr, STRIPS: tl.constexpr):
    """Whether STRIPS strips from ``strip`` on lie in one row of an image, and R columns beside them too."""
    left = (strip % strips) * S
    return (left >= R) & (left + STRIPS * S + R <= W) & (strip < num * strips)


@triton.jit
def _walk_down(
    x,
    more,
    out,
    offset,
    columns,
    good,
    taps,
    start,
    top,
    bottom,
    H,
    W,
    C: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    INTERIOR: tl.constexpr,
    HAS_MORE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Convolves the rows ``top`` to ``bottom`` of the strips; ``offset`` is that of row 0."""
    R: tl.constexpr = K // 2
    first = tl.maximum(top - R, 0)
    last = tl.minimum(bottom + R, H)
    step = W.to(tl.int64) * C
    offset += first * step
    sums = (start,) * (K * S)  # of output rows i - R ... i + R, where i is the input row
    i = first
    while i < last:
        row = _load_row(x, offset, columns, good, C, S + K - 1, -R, W, INTERIOR, DTYPE)
        moved = ()
        for j in tl.static_range(K):
            for s in tl.static_range(S):
                value = sums[j * S + s]
                for k in tl.static_range(K):
                    value += row[s + k] * taps[(K - 1 - j) * K + k]
                moved += (value,)
        done = good & (i - R >= top)
        _store_row(out, more, offset - R * step, columns, done, moved, C, W, S, INTERIOR, HAS_MORE)
        sums = moved[S:] + (start,) * S
        offset += step
        i += 1
    for j in tl.static_range(R):  # rows below the image add nothing to the last ones
        done = good & (last - R + j >= top) & (last - R + j < bottom)
        ready = sums[j * S : j * S + S]
        _store_row(out, more, offset + (j - R) * step, columns, done, ready, C, W, S, INTERIOR, HAS_MORE)


@triton.jit
def _convolve_block(
    x,
    weight,
    bias,
    more,
    out,
    block,
    first,
    top,
    bottom,
    num,
    H,
    W,
    strips,
    C: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    STRIPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
    TAP_STRIDE: tl.constexpr,
    FLIP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MORE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Convolves the rows ``top`` to ``bottom`` of STRIPS strips from ``first`` on, in a block of the channels."""
    R: tl.constexpr = K // 2
    channels = block * CHANNELS + tl.arange(0, CHANNELS)
    known = channels < C
    taps = _load_taps(weight, channels, known, K, LEVELS, CHANNEL_STRIDE, TAP_STRIDE, FLIP, DTYPE)
    start = tl.zeros([STRIPS, CHANNELS], DTYPE)
    if HAS_BIAS:
        start += tl.load(bias + channels, mask=known, other=0.0).to(DTYPE)[None, :]

    strip = first + tl.arange(0, STRIPS)
    columns = ((strip % strips) * S)[:, None]
    good = (strip < num * strips)[:, None] & known[None, :]
    image = (strip // strips).to(tl.int64)[:, None] * H
    offset = (image * W + columns) * C + channels[None, :]
    full = (block + 1) * CHANNELS <= C
    if full & _interior(first, strips, num, W, R, S, STRIPS):
        _walk_down(x, more, out, offset, columns, full, taps, start, top, bottom, H, W, C, K, S, True, HAS_MORE, DTYPE)
    else:
        _walk_down(x, more, out, offset, columns, good, taps, start, top, bottom, H, W, C, K, S, False, HAS_MORE, DTYPE)


@triton.jit(do_not_specialize=['num', 'H', 'W', 'strips', 'rows'])
def convolve(
    x,
    weight,
    bias,
    more,
    out,
    num,
    H,
    W,
    strips,
    rows,
    C: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    STRIPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
    TAP_STRIDE: tl.constexpr,
    FLIP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MORE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Writes the convolution of ``x`` (num, H, W, C), or with FLIP the gradient of its input; and adds ``more``."""
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    pid = tl.program_id(0)
    top = tl.program_id(1) * rows
    bottom = tl.minimum(top + rows, H)
    _convolve_block(
        *(x, weight, bias, more, out, pid % BLOCKS, pid // BLOCKS * STRIPS, top, bottom, num, H, W, strips),
        *(C, K, S, STRIPS, CHANNELS, LEVELS, CHANNEL_STRIDE, TAP_STRIDE, FLIP, HAS_BIAS, HAS_MORE, DTYPE),
    )


@triton.jit
def _normalize_pixels(
    out,
    rstd,
    eps,
    first,
    top,
    bottom,
    num,
    H,
    W,
    strips,
    C: tl.constexpr,
    S: tl.constexpr,
    STRIPS: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """LayerNorm in place of the pixels of STRIPS strips, summed in the order of pointwise_triton's kernel."""
    WIDTH: tl.constexpr = STRIPS * S
    col = tl.arange(0, B)
    pixels = (bottom - top) * WIDTH
    done = 0
    while done < pixels:
        pixel = done + tl.arange(0, R)
        strip = first + pixel % WIDTH // S
        column = strip % strips * S + pixel % S
        good = (pixel < pixels) & (strip < num * strips) & (column < W)
        row = ((strip // strips).to(tl.int64) * H + (top + pixel // WIDTH)) * W + column
        at = row[:, None] * C + col[None, :]
        mask = good[:, None] & (col[None, :] < C)
        value = tl.load(out + at, mask=mask, other=0.0).to(DTYPE)
        mean = tl.sum(value, axis=1) / C
        centred = tl.where(mask, value - mean[:, None], 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)
        tl.store(out + at, (centred * scale[:, None]).to(out.dtype.element_ty), mask=mask)
        tl.store(rstd + row, scale, mask=good)
        done += R


@triton.jit(do_not_specialize=['num', 'H', 'W', 'strips', 'rows'])
def convolve_normalize(
    x,
    weight,
    bias,
    out,
    rstd,
    num,
    H,
    W,
    strips,
    rows,
    eps,
    C: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    STRIPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
    TAP_STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Writes the convolution of ``x`` (num, H, W, C) after LayerNorm over the channels, and 1 / standard deviation."""
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    first = tl.program_id(0) * STRIPS
    top = tl.program_id(1) * rows
    bottom = tl.minimum(top + rows, H)
    for block in range(BLOCKS):
        _convolve_block(
            *(x, weight, bias, None, out, block, first, top, bottom, num, H, W, strips),
            *(C, K, S, STRIPS, CHANNELS, LEVELS, CHANNEL_STRIDE, TAP_STRIDE, False, HAS_BIAS, False, DTYPE),
        )
    tl.debug_barrier()  # other threads wrote what this one reads next
    _normalize_pixels(out, rstd, eps, first, top, bottom, num, H, W, strips, C, S, STRIPS, R, B, DTYPE)


@triton.jit
def _sum_strips(values, COUNT: tl.constexpr, LEVELS: tl.constexpr):
    """Sums COUNT tensors [strips, channels] over the strips, in one exchange; gives [channels, 2**LEVELS]."""
    joined = values + (tl.zeros_like(values[0]),) * (2**LEVELS - COUNT)
    for level in tl.static_range(LEVELS):
        pairs = ()
        for i in tl.static_range(2 ** (LEVELS - 1 - level)):
            pairs += (tl.join(joined[i], joined[i + 2 ** (LEVELS - 1 - level)]),)
        joined = pairs
    return tl.reshape(tl.sum(joined[0], axis=0), [values[0].shape[1], 2**LEVELS])


@triton.jit
def _walk_both(
    x,
    grad,
    offset,
    columns,
    good,
    sums,
    top,
    bottom,
    H,
    W,
    C: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    INTERIOR: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Adds to the sums what the gradient's rows ``top`` to ``bottom`` give; ``offset`` is that of row 0."""
    R: tl.constexpr = K // 2
    first = tl.maximum(top - R, 0)
    last = tl.minimum(bottom + R, H)
    step = W.to(tl.int64) * C
    offset += first * step
    window = ()  # of the gradient's rows i - R ... i + R, where i is the input row
    shift = sums[K * K]
    for j in tl.static_range(K - 1):
        there = good & (first - R + j >= top) & (first - R + j < bottom)
        window = window + _load_row(grad, offset + (j - R) * step, columns, there, C, S, 0, W, INTERIOR, DTYPE)
    for j in tl.static_range((K - 1) * S):
        shift += window[j]

    i = first
    while i < last:
        row = _load_row(x, offset, columns, good, C, S + K - 1, -R, W, INTERIOR, DTYPE)
        there = good & (i + R >= top) & (i + R < bottom)
        window = window + _load_row(grad, offset + R * step, columns, there, C, S, 0, W, INTERIOR, DTYPE)
        more = ()
        for j in tl.static_range(K):
            for k in tl.static_range(K):
                value = sums[j * K + k]
                for s in tl.static_range(S):
                    value += row[s + k] * window[(K - 1 - j) * S + s]
                more += (value,)
        for s in tl.static_range(S):
            shift += window[(K - 1) * S + s]
        more += (shift,)
        sums = more
        window = window[S:]
        offset += step
        i += 1
    return sums


@triton.jit(do_not_specialize=['num', 'H', 'W', 'strips', 'rows', 'parts'])
def correlate(
    x,
    grad,
    partial,
    num,
    H,
    W,
    strips,
    rows,
    parts,
    C: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    STRIPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Writes each part's gradient of the weights, and of the bias behind them: ``partial`` (parts, K * K + 1, C)."""
    R: tl.constexpr = K // 2
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    pid = tl.program_id(0)
    channels = (pid % BLOCKS) * CHANNELS + tl.arange(0, CHANNELS)
    part = pid // BLOCKS
    known = channels < C
    full = (pid % BLOCKS + 1) * CHANNELS <= C
    segments = (H + rows - 1) // rows
    items = (num * strips + STRIPS - 1) // STRIPS * segments

    sums = (tl.zeros([STRIPS, CHANNELS], DTYPE),) * (K * K + 1)
    item = part
    while item < items:
        strip = (item // segments) * STRIPS + tl.arange(0, STRIPS)
        columns = ((strip % strips) * S)[:, None]
        good = (strip < num * strips)[:, None] & known[None, :]
        image = (strip // strips).to(tl.int64)[:, None] * H
        offset = (image * W + columns) * C + channels[None, :]
        top = (item % segments) * rows
        bottom = tl.minimum(top + rows, H)
        if full & _interior((item // segments) * STRIPS, strips, num, W, R, S, STRIPS):
            sums = _walk_both(x, grad, offset, columns, full, sums, top, bottom, H, W, C, K, S, True, DTYPE)
        else:
            sums = _walk_both(x, grad, offset, columns, good, sums, top, bottom, H, W, C, K, S, False, DTYPE)
        item += parts

    total = _sum_strips(sums, K * K + 1, LEVELS)
    tap = tl.arange(0, 2**LEVELS)
    place = (part.to(tl.int64) * (K * K + 1) + tap[None, :]) * C + channels[:, None]
    tl.store(partial + place, total, mask=known[:, None] & (tap <= K * K)[None, :])


@triton.jit(do_not_specialize=['parts'])
def sum_parts(
    partial,
    weight_grad,
    bias_grad,
    parts,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
    TAP_STRIDE: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Sums ``partial`` (parts, TAPS + 1, C) into the gradients of the weights (C, TAPS) and the bias (C)."""
    tap = tl.program_id(0)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channels < C
    sums = tl.zeros([PARTS, CHANNELS], DTYPE)
    part = 0
    while part < parts:
        lane = part + tl.arange(0, PARTS)
        place = (lane.to(tl.int64)[:, None] * (TAPS + 1) + tap) * C + channels[None, :]
        sums += tl.load(partial + place, mask=(lane < parts)[:, None] & known[None, :], other=0.0)
        part += PARTS
    total = tl.sum(sums, axis=0)
    if tap < TAPS:
        place = channels * CHANNEL_STRIDE + tap * TAP_STRIDE
        tl.store(weight_grad + place, total.to(weight_grad.dtype.element_ty), mask=known)
    elif HAS_BIAS:
        tl.store(bias_grad + channels, total.to(bias_grad.dtype.element_ty), mask=known)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The convolution of ``x`` (N, C, H, W), channels last, in ``dtype``."""
    return _convolve(x, weight, bias, None, dtype, flip=False)


def forward_and_normalize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    together: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The convolution's LayerNorm without affine ``(N, H, W, C)``, and 1 / standard deviation ``(N, H, W)``.

    Args:
        x: ``(N, C, H, W)``, channels last.
        weight: ``(C, 1, K, K)``.
        bias: ``(C,)``.
        eps: added to the variance.
        dtype: of the result, and of the convolution's before it is normalized.
        together: in one kernel, or in two of which the second writes over the result of the first; the same bits. By
            default :func:`backbones.kernels.depthwise_plan.together_pays` decides.
    """
    num, channels, height, width = x.shape
    if together is None:
        size = num, channels, height, width, weight.shape[-1], processors(x.device)
        together = together_pays(*size, cache_size(x.device), x.dtype.itemsize, dtype.itemsize)
    if together:
        return _convolve_normalize(x, weight, bias, eps, dtype)
    out = forward(x, weight, bias, dtype).permute(0, 2, 3, 1)
    rows = out.shape[:-1].numel()
    rstd = torch.empty(out.shape[:-1], dtype=math_dtype(out), device=x.device)
    options = whole_rows(channels)
    grid = (cdiv(rows, options['R']),)
    launch(normalize_kernel, grid, out, out, rstd, rows, eps, C=channels, MATH=math_type(out), **options)
    return out, rstd


def input_gradient(grad: Tensor, weight: Tensor, dtype: torch.dtype, more: Tensor | None = None) -> Tensor:
    """The gradient of the input in ``dtype``: a convolution of ``grad`` with the filter turned round.

    ``more``, channels last as well, is added to it: what comes back along a residual stream.
    """
    return _convolve(grad, weight, None, more, dtype, flip=True)


def weight_gradient(x: Tensor, grad: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """The gradients of the weights, laid out as they are, and of the bias ``(C,)``, which is empty if not asked for."""
    num, channels, height, width = x.shape
    size = weight.shape[-1]
    weight_grad = torch.empty_like(weight)
    bias_grad = weight.new_empty(channels if bias else 0)
    if x.numel() == 0:
        return weight_grad.zero_(), bias_grad.zero_()
    plan = correlate_plan(num, channels, height, width, size, processors(x.device))
    partial = torch.empty(plan.parts, size * size + 1, channels, dtype=math_dtype(x), device=x.device)
    launch(
        correlate,
        (plan.blocks * plan.parts,),
        *(x, grad, partial, num, height, width, plan.per_row, plan.rows, plan.parts),
        **dict(C=channels, K=size, S=plan.columns, STRIPS=plan.strips, CHANNELS=plan.channels),
        **dict(LEVELS=(size * size).bit_length(), DTYPE=math_type(x)),
        **dict(num_warps=WARPS, maxnreg=registers(CORRELATE_RESIDENT[size])),
    )
    launch(
        sum_parts,
        (size * size + 1 if bias else size * size, cdiv(channels, CHANNELS)),
        *(partial, weight_grad, bias_grad, plan.parts),
        **dict(C=channels, TAPS=size * size, CHANNEL_STRIDE=weight_grad.stride(0), TAP_STRIDE=weight_grad.stride(3)),
        **dict(PARTS=PARTS, CHANNELS=CHANNELS, HAS_BIAS=bias, DTYPE=math_type(x), num_warps=WARPS),
    )
    return weight_grad, bias_grad


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, more: Tensor | None, dtype: torch.dtype, flip: bool
) -> Tensor:
    num, channels, height, width = x.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    if x.numel() == 0:
        return out
    size = weight.shape[-1]
    plan = convolve_plan(num, channels, height, width, size, processors(x.device))
    resident = CONVOLVE_RESIDENT if capability(x.device) >= (9, 0) else CONVOLVE_RESIDENT_OLDER
    launch(
        convolve,
        (plan.blocks * plan.groups, plan.segments),
        *(x, weight, bias, more, out, num, height, width, plan.per_row, plan.rows),
        **dict(C=channels, K=size, S=plan.columns, STRIPS=plan.strips, CHANNELS=plan.channels),
        **dict(CHANNEL_STRIDE=weight.stride(0), TAP_STRIDE=weight.stride(3), FLIP=flip, HAS_BIAS=bias is not None),
        **dict(LEVELS=(size * size).bit_length(), HAS_MORE=more is not None, DTYPE=math_type(x)),
        **dict(num_warps=WARPS, maxnreg=registers(resident[size])),
    )
    return out


def _convolve_normalize(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    num, channels, height, width = x.shape
    out = torch.empty(num, height, width, channels, dtype=dtype, device=x.device)
    rstd = torch.empty(num, height, width, dtype=math_dtype(out), device=x.device)
    if x.numel() == 0:
        return out, rstd
    size = weight.shape[-1]
    itemsize = x.dtype.itemsize + dtype.itemsize
    plan = together_plan(num, channels, height, width, size, processors(x.device), cache_size(x.device), itemsize)
    tile = whole_rows(channels)
    launch(
        convolve_normalize,
        (plan.groups, plan.segments),
        *(x, weight, bias, out, rstd, num, height, width, plan.per_row, plan.rows, eps),
        **dict(C=channels, K=size, S=plan.columns, STRIPS=plan.strips, CHANNELS=plan.channels),
        **dict(CHANNEL_STRIDE=weight.stride(0), TAP_STRIDE=weight.stride(3), HAS_BIAS=bias is not None),
        **dict(LEVELS=(size * size).bit_length(), R=tile['R'], B=tile['B'], DTYPE=math_type(x)),
        **dict(num_warps=WARPS, maxnreg=registers(TOGETHER_RESIDENT[size])),
    )
    return out, rstd


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; one where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 1


@functools.cache
def cache_size(device: torch.device) -> int:
    """Bytes of a device's second-level cache; that of an H200 where there is none."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == 'cuda' else 50 * 2**20


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device; where there is none, what :func:`configurations` is asked for."""
    return _capability(device) if device.type == 'cuda' else _target


_capability = functools.cache(torch.cuda.get_device_capability)
_target = (9, 0)


def configurations(channels: int, size: int, dtype: torch.dtype, target: tuple[int, int] = (9, 0)) -> list[Launch]:
    """The launches for so many channels and a filter of ``size`` squared, to be compiled where there is no device.

    Args:
        channels: of the map.
        size: of the filter.
        dtype: of the convolution's result.
        target: the compute capability to compile for.
    """
    global _target

    def call() -> None:
        x = torch.empty(1, channels, 8, 8, dtype=dtype, device='meta', memory_format=torch.channels_last)
        weight = torch.empty(channels, 1, size, size, device='meta')
        for stream in (x, x.float()):  # without autocast, and with it
            for together in (False, True) if channels <= WIDEST else (False,):
                forward_and_normalize(stream, weight, weight[:, 0, 0, 0], 1e-6, dtype, together)
            input_gradient(x, weight, stream.dtype)
            input_gradient(x, weight, stream.dtype, stream)
            weight_gradient(stream, x, weight, bias=True)

    _target = target
    try:
        return launches(call)
    finally:
        _target = (9, 0)
