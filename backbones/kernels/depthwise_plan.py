"""How the depthwise kernels share out their work: tables and arithmetic, no Triton.

A program of 128 threads takes ``channels`` neighbouring channels of ``strips`` strips of columns, each ``columns``
wide, and a segment of the rows. What is compiled depends on the kernel size and the number of channels alone.
"""

import functools
from typing import NamedTuple

WARPS = 4
THREADS = 32 * WARPS

# By kernel size: the columns of a strip, and the programs that are at a time on a multiprocessor. A thread holds the
# weights of its channel, or their gradients, and K values of each column. benchmarks/kernel_budget.py counts them.
CONVOLVE_COLUMNS = {3: 8, 5: 8, 7: 6, 9: 4, 11: 4}
CONVOLVE_RESIDENT = {3: 4, 5: 4, 7: 4, 9: 3, 11: 2}
CORRELATE_COLUMNS = {3: 8, 5: 8, 7: 4, 9: 4, 11: 2}
CORRELATE_RESIDENT = {3: 4, 5: 4, 7: 4, 9: 2, 11: 2}

REGISTERS = 65536
"""Of a multiprocessor."""

PROLOGUE = 4
"""What reading the weights or filling the window costs, in rows of work."""


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


def channel_block(channels: int) -> int:
    """Channels of a program: 32 fill a warp; fewer where that wastes fewer lanes."""
    padded = {block: -(-channels // block) * block for block in (32, 16)}
    return min(padded, key=lambda block: (padded[block], -block))


@functools.lru_cache(maxsize=4096)
def convolve_plan(num: int, channels: int, height: int, width: int, kernel_size: int, processors: int) -> Plan:
    """For the forward pass and the gradient of the input, on a device of so many multiprocessors."""
    plan = _plan(num, channels, width, CONVOLVE_COLUMNS[kernel_size])

    def cost(segments: int) -> int:
        programs = plan.groups * plan.blocks * segments
        waiting = max(
            -(-programs // processors), CONVOLVE_RESIDENT[kernel_size]
        )  # too few do not hide the memory's latency
        return waiting * (_rows(height, segments) + _halo(segments, kernel_size) + PROLOGUE)

    return _cut(plan, height, cost)


@functools.lru_cache(maxsize=4096)
def correlate_plan(num: int, channels: int, height: int, width: int, kernel_size: int, processors: int) -> Plan:
    """For the gradient of the weights."""
    plan = _plan(num, channels, width, CORRELATE_COLUMNS[kernel_size])
    most = max(processors * CORRELATE_RESIDENT[kernel_size] // plan.blocks, 1)

    def cost(segments: int) -> int:
        items = plan.groups * segments
        turns = -(-items // min(items, most))
        return turns * (_rows(height, segments) + _halo(segments, kernel_size) + PROLOGUE)

    plan = _cut(plan, height, cost)
    items = plan.groups * plan.segments
    turns = -(-items // min(items, most))
    return plan._replace(parts=-(-items // turns))


def _plan(num: int, channels: int, width: int, columns: int) -> Plan:
    block = channel_block(channels)
    per_row = -(-width // columns)
    strips = THREADS // block
    groups = -(-num * per_row // strips)
    return Plan(columns, block, strips, per_row, 0, 0, groups, -(-channels // block), 0)


def _cut(plan: Plan, height: int, cost) -> Plan:
    """Cuts the rows into segments at the least cost; the first of equals has the fewest."""
    rows = _rows(height, min(range(1, min(height, 64) + 1), key=cost))
    return plan._replace(rows=rows, segments=-(-height // rows))


def _rows(height: int, segments: int) -> int:
    return -(-height // segments)


def _halo(segments: int, kernel_size: int) -> int:
    return 0 if segments == 1 else kernel_size - 1
