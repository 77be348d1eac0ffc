"""Many captioned pictures on one, and numbers as colours. Pictures are RGB, (H, W, 3) uint8."""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw

from densekit.report.fonts import font
from densekit.report.pictures import check_image, fit

GAP = 16  # pixels


def contact_sheet(
    pictures: Sequence[np.ndarray],
    captions: Sequence[str],
    *,
    columns: int,
    title: str = '',
    cell: int = 480,
    text_size: int = 20,
) -> np.ndarray:
    """Lay pictures out in rows on white, each with its caption below.

    Args:
        pictures: of any sizes.
        captions: of as many pictures; lines that are wider than a cell lose their middle.
        columns: pictures in a row.
        title: written above all.
        cell: pixels of the longer side of every picture.
        text_size: of the captions, in pixels; the title is larger.

    Raises:
        ValueError: if there is no picture, or not one caption for each.
    """
    if not pictures or len(pictures) != len(captions):
        raise ValueError(f'A sheet needs one caption per picture; there are {len(pictures)} and {len(captions)}.')
    for picture in pictures:
        check_image(picture)
    fitted = [fit(picture, cell) for picture in pictures]
    width = max(picture.shape[1] for picture in fitted)
    lines = [[_shortened(line, width, text_size) for line in caption.splitlines()] for caption in captions]
    starts = range(0, len(fitted), columns)
    heights = [max(picture.shape[0] for picture in fitted[start : start + columns]) for start in starts]
    texts = [max(len(rows) for rows in lines[start : start + columns]) * text_size * 5 // 4 for start in starts]
    top = GAP + (text_size * 5 // 2 if title else 0)
    tops = np.cumsum([top, *(h + t + 2 * GAP for h, t in zip(heights, texts, strict=True))]).tolist()

    across = min(columns, len(fitted))
    sheet = Image.new('RGB', (GAP + across * (width + GAP), tops[-1]), 'white')
    draw = ImageDraw.Draw(sheet)
    heading = _shortened(title, sheet.width - 2 * GAP, text_size * 4 // 3)
    draw.text((GAP, GAP), heading, 'black', font(text_size * 4 // 3, heading))
    for i, (picture, rows) in enumerate(zip(fitted, lines, strict=True)):
        row, column = divmod(i, columns)
        left, y = GAP + column * (width + GAP), tops[row] + heights[row]
        sheet.paste(Image.fromarray(picture), (left, y - picture.shape[0]))
        for number, text in enumerate(rows):
            place = (left, y + GAP // 3 + number * text_size * 5 // 4)
            draw.text(place, text, (40, 40, 40), font(text_size, text))
    return np.array(sheet)


def as_colours(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Numbers ``(H, W)`` from black over violet and orange to pale yellow, RGB uint8; what lies outside is clipped."""
    span = high - low
    levels = np.clip((values - low) / span if span > 0 else np.zeros(values.shape), 0, 1)
    coloured = cv2.applyColorMap(np.rint(levels * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    return np.ascontiguousarray(coloured[..., ::-1])


def stretched(picture: np.ndarray, height: int, width: int, smooth: bool = False) -> np.ndarray:
    """A map or a picture of another size; its own pixels stay visible as squares unless ``smooth``."""
    how = cv2.INTER_LINEAR if smooth else cv2.INTER_NEAREST_EXACT
    return cv2.resize(np.ascontiguousarray(picture), (width, height), interpolation=how)


def _shortened(text: str, width: int, size: int) -> str:
    """A text that fits in ``width`` pixels: of one that is longer, the beginning and the end."""
    kept = text
    while font(size, kept).getlength(kept) > width and len(text) > 3:
        half = (len(text) - 1) // 2
        text = text[:half] + text[-half:]
        kept = f'{text[:half]}…{text[half:]}'
    return kept
