"""How the depthwise kernels share out their work: tables and arithmetic, no Triton.

A program of 128 threads takes ``channels`` neighbouring channels of ``strips`` strips of columns, each ``columns``
wide, and a segment of the rows. What is compiled depends on the kernel size and the number of channels alone.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

WARPS = 4
THREADS = 32 * WARPS

# By kernel size: the columns of a strip, and the programs that are at a time on a multiprocessor. A thread holds the
# weights of its channel, or their gradients, and K values of each column. benchmarks/kernel_budget.py counts them.
CONVOLVE_COLUMNS = {3: 8, 5: 8, 7: 6, 9: 4, 11: 4}
CONVOLVE_RESIDENT = {3: 4, 5: 4, 7: 4, 9: 3, 11: 2}
# The registers do not hold four programs of 7x7 below compute capability 9.0, nor with LayerNorm in the same kernel,
# where fewer programs also leave each more of the cache.
CONVOLVE_RESIDENT_OLDER = {**CONVOLVE_RESIDENT, 7: 3}
TOGETHER_RESIDENT = {**CONVOLVE_RESIDENT, 7: 3}
CORRELATE_COLUMNS = {3: 8, 5: 8, 7: 4, 9: 4, 11: 2}
CORRELATE_RESIDENT = {3: 4, 5: 4, 7: 4, 9: 2, 11: 2}

REGISTERS = 65536
"""Of a multiprocessor."""

PROLOGUE = 4
"""What reading the weights or filling the window costs, in rows of work."""

FMAS_PER_BYTE = 5
"""Multiply-adds in whose time a byte moves from or to memory: of the H200's data sheet 67 TFLOP/s and 4.8 TB/s, at the
share of multiply-adds among the instructions that benchmarks/kernel_budget.py reads, 0.7."""

NORMALIZE = 8
"""Multiply-adds in whose time an element from the cache is normalized: about as many instructions."""

WIDEST = 2048
"""Channels of a pixel that 128 threads normalize in the order of the kernel that does nothing else."""


class Plan(NamedTuple):
    """What a launch needs to know.

    Attributes:
        columns: of a strip.
        channels: of a program.
        strips: of a program.
        per_row: strips in a row of an image.
        rows: of a segment.
        segments: of an image.
        groups: of strips, over the whole batch.
        blocks: of channels.
        parts: programs for each block of channels, where one program takes several groups and segments.
    """

    columns: int
    channels: int
    strips: int
    per_row: int
    rows: int
    segments: int
    groups: int
    blocks: int
    parts: int


def registers(resident: int) -> int:
    """What a thread may have, so that so many programs fit; they are handed out by eight, and 255 are the most."""
    return min(REGISTERS // (THREADS * resident) // 8 * 8, 255)


def channel_block(channels: int, widest: int = 32) -> int:
    """Channels of a program: 32 fill a warp; fewer where that wastes fewer lanes."""
    padded = {block: -(-channels // block) * block for block in (16, 32, 64, 128) if block <= widest}
    return min(padded, key=lambda block: (padded[block], -block))


@functools.lru_cache(maxsize=4096)
def convolve_plan(num: int, channels: int, height: int, width: int, kernel_size: int, processors: int) -> Plan:
    """For the forward pass and the gradient of the input, on a device of so many multiprocessors."""
    plan = _plan(num, channels, width, CONVOLVE_COLUMNS[kernel_size], channel_block(channels))
    return _cut(plan, height, lambda cut: _convolve_cost(cut, kernel_size, processors))


@functools.lru_cache(maxsize=4096)
def together_plan(
    num: int, channels: int, height: int, width: int, kernel_size: int, processors: int, cache: int, itemsize: int
) -> Plan:
    """For convolution and LayerNorm in one kernel, whose programs loop over the channels of their pixels.

    Args:
        num: images.
        channels: at most ``WIDEST``.
        height: of an image.
        width: of an image.
        kernel_size: of the filter.
        processors: of the device.
        cache: bytes of its second-level cache.
        itemsize: bytes of an element of the input and one of the result together.
    """
    assert channels <= WIDEST
    # The wider a program, the fewer its columns; beside a loop there are registers to read the weights of 64 channels.
    widest = THREADS if channels <= THREADS and kernel_size <= 7 else THREADS // 2
    plan = _plan(num, channels, width, CONVOLVE_COLUMNS[kernel_size], channel_block(channels, widest))
    return _cut(plan, height, lambda cut: _together_cost(cut, channels, kernel_size, processors, cache, itemsize))


@functools.lru_cache(maxsize=4096)
def together_pays(
    num: int,
    channels: int,
    height: int,
    width: int,
    kernel_size: int,
    processors: int,
    cache: int,
    read: int,
    written: int,
) -> bool:
    """Whether convolution and LayerNorm in one kernel take less time than in two.

    Two kernels move the result three times: written, read again, written normalized. Where the map fits into the cache,
    N H W C (read + written) bytes, the second kernel finds it there; two are taken, which share out the channels too.

    Beyond the cache, reading and writing again take the time of ``2 * written * FMAS_PER_BYTE`` multiply-adds for each
    element, in bfloat16 20 beside the 49 of a 7x7. In one kernel it is ``NORMALIZE``, 8, if a program's result is still
    in the cache when it comes back for it. But all programs that run come back at about the same time. On a
    multiprocessor there are 3, with 24 columns of 96 channels each: in float32 and out bfloat16 that is 41 KB a row, on
    132 of them 5.5 MB, and a cache of 50 MB holds 9 rows. With the 6 rows that a segment needs beside its own, there
    are 1.7 times the multiply-adds: it does not pay. 128 channels fill the threads, so that a program has 6 columns and
    28 rows fit: it does. With more channels the rows become fewer again. The times of both are compared, launch for
    launch, with what is rounded up to whole programs.

    Args:
        num: images.
        channels: of an image.
        height: of an image.
        width: of an image.
        kernel_size: of the filter.
        processors: of the device.
        cache: bytes of its second-level cache.
        read: bytes of an element of the input.
        written: bytes of an element of the result.
    """
    elements, itemsize = num * height * width * channels, read + written
    if channels > WIDEST or elements * itemsize <= cache:
        return False
    size = num, channels, height, width, kernel_size, processors
    two = convolve_plan(*size)
    again = 2 * written * FMAS_PER_BYTE / _element(kernel_size, itemsize)
    one = together_plan(*size, cache, itemsize)
    cost = _together_cost(one, channels, kernel_size, processors, cache, itemsize)
    return cost < _convolve_cost(two, kernel_size, processors) + again * elements / (THREADS * two.columns * processors)


@functools.lru_cache(maxsize=4096)
def correlate_plan(num: int, channels: int, height: int, width: int, kernel_size: int, processors: int) -> Plan:
    """For the gradient of the weights."""
    plan = _plan(num, channels, width, CORRELATE_COLUMNS[kernel_size], channel_block(channels))
    most = max(processors * CORRELATE_RESIDENT[kernel_size] // plan.blocks, 1)

    def turns(cut: Plan) -> int:
        items = cut.groups * cut.segments
        return -(-items // min(items, most))

    plan = _cut(plan, height, lambda cut: turns(cut) * _work(cut, kernel_size))
    return plan._replace(parts=-(-plan.groups * plan.segments // turns(plan)))


def _plan(num: int, channels: int, width: int, columns: int, block: int) -> Plan:
    per_row = -(-width // columns)
    strips = THREADS // block
    groups = -(-num * per_row // strips)
    return Plan(columns, block, strips, per_row, 0, 0, groups, -(-channels // block), 0)


def _cut(plan: Plan, height: int, cost: Callable[[Plan], float]) -> Plan:
    """Cuts the rows into segments at the least cost; the first of equals has the fewest."""
    rows = [-(-height // segments) for segments in range(1, min(height, 64) + 1)]
    return min((plan._replace(rows=r, segments=-(-height // r)) for r in rows), key=cost)


def _convolve_cost(plan: Plan, kernel_size: int, processors: int) -> int:
    """Of a multiprocessor, in rows of work of a program."""
    programs = plan.groups * plan.blocks * plan.segments
    return _waiting(programs, kernel_size, processors) * _work(plan, kernel_size)


def _together_cost(plan: Plan, channels: int, kernel_size: int, processors: int, cache: int, itemsize: int) -> float:
    """The same with LayerNorm; infinite where results do not stay in the cache until they are read again."""
    programs = plan.groups * plan.segments
    running = min(programs, processors * TOGETHER_RESIDENT[kernel_size])
    if running * plan.rows * plan.strips * plan.columns * channels * itemsize > cache:
        return math.inf
    work = _work(plan, kernel_size) + plan.rows * NORMALIZE / _element(kernel_size, itemsize)
    return _waiting(programs, kernel_size, processors) * plan.blocks * work


def _element(kernel_size: int, itemsize: int) -> int:
    """What an element of the convolution takes, in multiply-adds; small filters wait for the memory."""
    return max(kernel_size**2, itemsize * FMAS_PER_BYTE)


def _waiting(programs: int, kernel_size: int, processors: int) -> int:
    """Programs for each multiprocessor; too few do not hide the memory's latency."""
    return max(-(-programs // processors), CONVOLVE_RESIDENT[kernel_size])


def _work(plan: Plan, kernel_size: int) -> int:
    """Of a program in a segment, in rows."""
    return plan.rows + (0 if plan.segments == 1 else kernel_size - 1) + PROLOGUE
