"""Masks as COCO's run lengths: found from a network's small masks without drawing them, or from drawn ones.

COCO's run lengths go down the columns of an image, from left to right: how many pixels are off, on, off and so on.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional

COLUMNS_AT_ONCE = 4096
POINTS_AT_ONCE = 1 << 20


class RleMasks:
    """The masks of an image as run lengths, in the place of mmdet's ``(n, H, W)`` tensor of ``pred_instances.masks``.

    Indexed by a number it gives COCO's dictionary, as mmdet's CocoMetric wants it; ``numpy()`` and ``astype()`` draw
    the masks, as mmdet's visualizer and :class:`densekit.Predictor` want them.

    Args:
        rles: ``{'size': [H, W], 'counts': bytes}`` for each mask.
        height: H, in pixels.
        width: W, in pixels.
    """

    def __init__(self, rles: Sequence[dict[str, Any]], height: int, width: int) -> None:
        self.rles = list(rles)
        self.height = height
        self.width = width

    def __len__(self) -> int:
        return len(self.rles)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rles)

    def __getitem__(self, index: Any) -> Any:
        """A dictionary for a number; for a slice, or an array or list of numbers or of bools, masks like these."""
        if isinstance(index, int | np.integer):
            return self.rles[index]
        chosen = np.arange(len(self))[index.cpu().numpy() if isinstance(index, Tensor) else index]
        return RleMasks([self.rles[i] for i in chosen], self.height, self.width)

    @staticmethod
    def cat(parts: Sequence['RleMasks']) -> 'RleMasks':
        """The masks of all parts, which are of one image; mmengine's InstanceData asks for this."""
        return RleMasks([rle for part in parts for rle in part.rles], parts[0].height, parts[0].width)

    def numpy(self) -> np.ndarray:
        """Draws the masks: ``(n, H, W)`` bool."""
        drawn = np.zeros((len(self), self.height, self.width), dtype=bool)
        for mask, rle in zip(drawn, self.rles, strict=True):
            mask[:] = coco_mask.decode(rle)
        return drawn

    def astype(self, dtype: DTypeLike) -> np.ndarray:
        """Draws the masks: ``(n, H, W)`` of a dtype."""
        return self.numpy().astype(dtype, copy=False)


def encode(masks: np.ndarray) -> list[dict[str, Any]]:
    """Run lengths of drawn masks, byte for byte those of pycocotools.

    Args:
        masks: ``(n, H, W)``, on where not zero.

    Returns:
        ``{'size': [H, W], 'counts': bytes}`` for each mask.
    """
    indices, positions = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for index, mask in enumerate(masks):
        on = mask.astype(bool, copy=False)
        rows, columns = np.flatnonzero(on.any(axis=1)), np.flatnonzero(on.any(axis=0))
        if len(rows):
            window = on[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            column, row = _changes(np.ascontiguousarray(window.T))
            positions.append(_without_doubles((columns[0] + column) * on.shape[0] + rows[0] + row))
            indices.append(np.full(len(positions[-1]), index))
    return _rles(np.concatenate(indices), np.concatenate(positions), *masks.shape)


def paste(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5) -> list[dict[str, Any]]:
    """Run lengths of masks that are stretched into their boxes and cut off at a threshold, without drawing them.

    To the pixel what mmdet 3.3.0 draws on a CPU (fcn_mask_head.py, ``_do_paste_mask``). In a column of pixels, a
    bilinear mask is linear between the centres of two of its rows. Where it passes the threshold there, all pixels of
    one side are on; the others need no look. The few columns in which a pixel is so near to the threshold that
    rounding decides are drawn as mmdet draws them.

    Args:
        masks: ``(n, h, w)``, probabilities.
        boxes: ``(n, 4)``: x1, y1, x2, y2 in pixels of the image; they may reach beyond it.
        height: of the image, in pixels.
        width: of the image, in pixels.
        threshold: on from this probability on.

    Returns:
        ``{'size': [height, width], 'counts': bytes}`` for each mask.
    """
    # In one piece: the host waits for the device once.
    both = torch.cat([masks.detach().float().flatten(1), boxes.detach().float()], dim=1).cpu()
    masks, boxes = both[:, :-4].reshape(masks.shape), both[:, -4:].contiguous()
    windows = _windows(boxes.numpy(), height, width)
    counts = windows[:, 2] - windows[:, 0]
    index = np.repeat(np.arange(len(masks)), counts)
    x = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts - windows[:, 0], counts)
    framed, whole_boxes = _framed(masks.numpy()), boxes.double().numpy()
    columns, rows, drawn = [], [], []
    for start in range(0, len(index), COLUMNS_AT_ONCE):
        part = slice(start, start + COLUMNS_AT_ONCE)
        column, row, doubtful = _edges(framed, whole_boxes, windows, index[part], x[part], threshold)
        columns.append(start + column)
        rows.append(row)
        drawn.append(start + doubtful)
    if any(len(doubtful) for doubtful in drawn):
        doubtful = np.concatenate(drawn)
        column, row = _drawn(masks, boxes, windows, index[doubtful], x[doubtful], threshold)
        columns.append(doubtful[column])
        rows.append(row)
    column, row = (np.concatenate(part) if part else np.zeros(0, dtype=np.int64) for part in (columns, rows))
    order = np.argsort(column, kind='stable')
    column, row = column[order], row[order]
    key = _without_doubles(index[column] * (height * width + 1) + x[column] * height + row)
    return _rles(*np.divmod(key, height * width + 1), len(masks), height, width)


def _windows(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """``(n, 4)`` int64: the part of the image in which a mask is drawn, x1, y1, x2, y2; x2 and y2 not in it."""
    low = np.maximum(np.floor(boxes[:, :2]) - 1, 0)
    high = np.minimum(np.ceil(boxes[:, 2:]) + 1, (width, height))
    return np.concatenate([low, np.maximum(low, high)], axis=1).astype(np.int64)


def _framed(masks: np.ndarray) -> np.ndarray:
    """``(n, w + 3, h + 2)`` float32: masks ``(n, h, w)``, turned, and the zeros that lie around them."""
    n, h, w = masks.shape
    framed = np.zeros((n, w + 3, h + 2), dtype=np.float32)
    framed[:, 1 : w + 1, 1 : h + 1] = masks.transpose(0, 2, 1)
    return framed


def _edges(
    framed: np.ndarray, boxes: np.ndarray, windows: np.ndarray, index: np.ndarray, x: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where columns of pixels change, from top to bottom and left to right; an edge may be there twice.

    Args:
        framed: ``(n, w + 3, h + 2)``.
        boxes: ``(n, 4)`` float64.
        windows: ``(n, 4)``.
        index: ``(columns,)``, which mask.
        x: ``(columns,)``, of the pixels.
        threshold: on from this probability on.

    Returns:
        Of each change: which of the columns, and the row of the first pixel after it. And the columns of which this is
        not known, because rounding decides.
    """
    knots = _knots(framed, boxes, index, x)
    knots -= np.float32(threshold)
    size = knots.shape[1]
    off = knots.ravel()
    on = off >= 0
    place = np.flatnonzero(on[1:] != on[:-1])  # none from one column to the next, which begin and end with zeros
    column, knot = np.divmod(place, size)
    before, after = off[place], off[place + 1]
    # What mmdet computes in float32 is off by less than 0.7e-6 for each row or column of the mask.
    doubt = 1e-6 * max(framed.shape[1:])
    step = (boxes[:, 3] - boxes[:, 1]) / (size - 2)  # pixels from one row of the mask to the next
    which = index[column]
    with np.errstate(all='ignore'):  # of boxes without a height
        slope = after - before
        y = (knot - 0.5 - before / slope) * step[which] + (boxes[:, 1] - 0.5)[which]
        sure = np.abs(y - np.rint(y)) * np.abs(slope) > doubt * step[which]
    doubtful = np.zeros(len(index), dtype=bool)
    doubtful[column[~sure]] = True
    doubtful[np.flatnonzero(~(np.abs(off) > doubt)) // size] = True  # on the threshold, or no number
    doubtful |= ((boxes[:, 2:] - boxes[:, :2]).min(axis=1) <= 0)[index]
    sure = ~doubtful[column]
    column, which = column[sure], which[sure]
    row = np.clip(np.ceil(y[sure]), windows[which, 1], windows[which, 3]).astype(np.int64)
    return column, row, np.flatnonzero(doubtful)


def _knots(framed: np.ndarray, boxes: np.ndarray, index: np.ndarray, x: np.ndarray) -> np.ndarray:
    """``(columns, h + 2)`` float32: masks at columns of pixels, and at each of their own rows and the frame's."""
    width = framed.shape[1] - 3
    left, right = boxes[:, 0], boxes[:, 2]
    with np.errstate(all='ignore'):
        place = (x + 0.5 - left[index]) / (right - left)[index] * width - 0.5
    place = np.clip(np.nan_to_num(place), -1, width)
    whole = np.floor(place).astype(np.int64)
    fraction = (place - whole).astype(np.float32)[:, None]
    lines = framed.reshape(-1, framed.shape[2])
    first = index * framed.shape[1] + whole + 1
    knots, following = lines.take(first, axis=0), lines.take(first + 1, axis=0)
    following -= knots
    following *= fraction
    knots += following
    return knots


def _drawn(
    masks: Tensor, boxes: Tensor, windows: np.ndarray, index: np.ndarray, x: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draws columns as mmdet does, with its arithmetic.

    Returns:
        Of each change: which of the columns, and the row of the first pixel after it.
    """
    tops, bottoms = windows[index, 1], windows[index, 3]
    rows = max(int((bottoms - tops).max()), 1)
    portion = max(POINTS_AT_ONCE // rows, 1)
    found = []
    for start in range(0, len(index), portion):
        part = slice(start, start + portion)
        which = torch.from_numpy(index[part])
        x1, y1, x2, y2 = boxes[which].T[..., None]
        y = torch.from_numpy(tops[part, None] + np.arange(rows))
        gx = (torch.from_numpy(x[part, None]).float() + 0.5 - x1) / (x2 - x1) * 2 - 1
        gy = (y.float() + 0.5 - y1) / (y2 - y1) * 2 - 1
        grid = torch.stack([gx.expand_as(gy), gy], dim=2)[:, :, None]
        grid[torch.isinf(grid)] = 0
        values = functional.grid_sample(masks[which, None], grid, align_corners=False)[:, 0, :, 0]
        on = (values >= threshold) & (y < torch.from_numpy(bottoms[part, None]))
        column, row = _changes(on.numpy())
        found.append((start + column, tops[start + column] + row))
    columns, positions = zip(*found, strict=True)
    return np.concatenate(columns), np.concatenate(positions)


def _changes(on: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where columns ``(columns, rows)`` bool, off above and below, change: the column, and the row after the change."""
    framed = np.zeros((on.shape[0], on.shape[1] + 2), dtype=bool)
    framed[:, 1:-1] = on
    column, row = np.nonzero(framed[:, 1:] != framed[:, :-1])
    return column, row


def _without_doubles(ascending: np.ndarray) -> np.ndarray:
    """Positions that occur an odd number of times: two changes at one place are none."""
    starts = np.flatnonzero(np.diff(ascending, prepend=-1))
    times = np.diff(starts, append=len(ascending))
    return ascending[starts[times % 2 == 1]]


def _rles(index: np.ndarray, position: np.ndarray, n: int, height: int, width: int) -> list[dict[str, Any]]:
    """COCO's dictionaries of n masks, from which of them change (ascending) and at which positions (likewise)."""
    if not n:
        return []
    pixels = height * width
    inside = position < pixels
    index, position = index[inside], position[inside]
    starts = np.searchsorted(index, np.arange(n))
    changes = np.insert(index * pixels + position, starts, np.arange(n) * pixels)
    counts = np.split(np.diff(changes, append=n * pixels), starts[1:] + np.arange(1, n))
    return coco_mask.frPyObjects([{'size': [height, width], 'counts': count} for count in counts], height, width)
