"""Plain-text tables."""

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real

COCO_COLUMNS = {'': 'AP', '_50': 'AP50', '_75': 'AP75', '_s': 'APs', '_m': 'APm', '_l': 'APl'}
COCO_ROWS = {'bbox': 'box', 'segm': 'mask'}
COCO_KEY = re.compile(r'((?:.*/)?)(bbox|segm)_mAP(|_50|_75|_s|_m|_l)')
SEG_COLUMNS = ('mIoU', 'mAcc', 'aAcc')
SEG_KEY = re.compile(r'((?:.*/)?)(mIoU|mAcc|aAcc)')
NUMBER = re.compile(r'[-+]?(\d[\d,]*(\.\d*)?|\.\d+)(e[-+]?\d+)?%?|nan|[-+]?inf|-|', re.IGNORECASE)


def format_table(header: Sequence[str], rows: Sequence[Sequence], *, align: str | None = None) -> str:
    """Lay out a table in columns two spaces apart, under a ruled header.

    Args:
        header: titles of the columns.
        rows: cells; anything but text is shown as by ``str``.
        align: one ``<`` or ``>`` per column, left or right. By default columns of numbers, in which ``-`` or nothing
            may stand for a missing one, go to the right and others to the left.

    Raises:
        ValueError: if a row is not as long as the header, or ``align`` is not one of ``<`` and ``>`` per column.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    odd = [i for i, row in enumerate(cells) if len(row) != len(header)]
    if odd:
        raise ValueError(f'The header has {len(header)} columns, row {odd[0]} has {len(cells[odd[0]])}.')
    columns = [[row[i] for row in cells] for i in range(len(header))]
    if align is None:
        align = ''.join(
            '>' if any(column) and all(NUMBER.fullmatch(cell) for cell in column) else '<' for column in columns
        )
    if len(align) != len(header) or set(align) - set('<>'):
        raise ValueError(f'align is {align!r}; it has to be one < or > for each of {len(header)} columns.')
    widths = [max(map(len, [title, *column])) for title, column in zip(header, columns, strict=True)]
    lines = [list(header), ['-' * width for width in widths], *cells]
    return '\n'.join(
        '  '.join(f'{cell:{side}{width}}' for cell, side, width in zip(line, align, widths, strict=True)).rstrip()
        for line in lines
    )


def metrics_table(metrics: Mapping[str, float]) -> str:
    """Show the metrics of mmdet's COCO and mmseg's IoU evaluation in percent, then any others as they are.

    COCO's are fractions and are multiplied by 100; -1, which COCO gives where no object has the size asked for, becomes
    a dash. mmseg's are percentages already.

    Args:
        metrics: for example ``{'coco/bbox_mAP': 0.512, 'coco/bbox_mAP_50': 0.701, 'mIoU': 81.2}``.
    """
    if not metrics:
        return 'no metrics'
    coco: dict[tuple[str, str], dict[str, str]] = {}
    segmentation: dict[str, dict[str, str]] = {}
    others = []
    for key, value in metrics.items():
        if not isinstance(value, Real):
            others.append((key, value))
        elif match := COCO_KEY.fullmatch(key):
            coco.setdefault((match[1], match[2]), {})[match[3]] = '-' if value == -1 else f'{100 * value:.1f}'
        elif match := SEG_KEY.fullmatch(key):
            segmentation.setdefault(match[1], {})[match[2]] = f'{value:.1f}'
        else:
            others.append((key, f'{value:.4g}' if math.isfinite(value) else value))

    tables = []
    if coco:
        used = [suffix for suffix in COCO_COLUMNS if any(suffix in row for row in coco.values())]
        several = len({prefix for prefix, _ in coco}) > 1
        rows = [
            [(prefix if several else '') + COCO_ROWS[kind], *(row.get(suffix, '') for suffix in used)]
            for (prefix, kind), row in coco.items()
        ]
        tables.append(format_table(['%', *(COCO_COLUMNS[suffix] for suffix in used)], rows))
    if segmentation:
        used = [name for name in SEG_COLUMNS if any(name in row for row in segmentation.values())]
        rows = [[prefix + 'label map', *(row.get(name, '') for name in used)] for prefix, row in segmentation.items()]
        tables.append(format_table(['%', *used], rows))
    if others:
        tables.append(format_table(['other', 'value'], others, align='<>'))
    return '\n\n'.join(tables)
