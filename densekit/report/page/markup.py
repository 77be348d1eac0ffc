"""HTML from Python values: whatever is not :class:`Html` already is text, and escaped."""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import cv2
import numpy as np
from PIL import Image

MAX_SIDE = 560  # pixels of an embedded picture
MAX_BYTES = 120_000  # of an embedded picture
DASH = '–'  # noqa: RUF001  in place of a number that is not known
_EMPTY = {'img', 'link', 'meta', 'polyline', 'line', 'circle'}


class Html(str):
    """Text that is markup and is not escaped again."""


def text(value: Any) -> Html:
    """The value as markup."""
    return value if isinstance(value, Html) else Html(escape(str(value), quote=True))


def join(parts: Iterable[Any], between: str = '') -> Html:
    """The parts one after another."""
    return Html(between.join(text(part) for part in parts))


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element.

    Args:
        name: of the element.
        *children: text or markup.
        **attributes: ``_`` stands for ``-`` and at the end of a name for nothing; those that are None are left out.
    """
    given = ''.join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    # the slash matters to the parser within SVG
    return Html(f'<{name}{given}/>' if name in _EMPTY else f'<{name}{given}>{join(children)}</{name}>')


def section(name: str, title: str, *content: Any) -> Html:
    """A part of the page with a heading, which the contents at its top point to."""
    return tag('section', tag('h2', title), *content, id=name)


def note(message: Any) -> Html:
    """A line in place of something that is missing, or about how something was made."""
    return tag('p', message, class_='note')


def side_by_side(*parts: Any) -> Html:
    """Parts next to each other, or below each other where the window is narrow."""
    return tag('div', *(tag('div', part) for part in parts), class_='columns')


def fold(title: str, *content: Any) -> Html:
    """What is hidden until one asks for it."""
    return tag('details', tag('summary', title), *content)


def table(caption: str, header: Sequence[Any], rows: Sequence[Sequence[Any]], sortable: bool = False) -> Html:
    """A table; the first cell of a row is its heading, numbers are set to the right.

    Args:
        caption: what it shows.
        header: of the columns.
        rows: cells; numbers as :func:`number` makes them.
        sortable: by a click on a column's heading.
    """
    heads = [
        tag('th', tag('button', title, type='button') if sortable else title, scope='col', class_=_side(rows, column))
        for column, title in enumerate(header)
    ]
    body = [
        tag('tr', tag('th', row[0], scope='row'), *(cell if _is_cell(cell) else _cell(cell) for cell in row[1:]))
        for row in rows
    ]
    made = tag('table', tag('thead', tag('tr', *heads)), tag('tbody', *body), aria_label=caption)
    # Not a <caption>, which is as wide as its table and would be cut off on a phone.
    scroller = tag('div', made, class_='wide', tabindex='0', role='region', aria_label=f'{caption} (scrolls)')
    return tag('div', tag('p', caption, class_='caption', aria_hidden='true'), scroller)


def number(value: float | int | None, digits: int = 1, factor: float = 1, sign: bool = False) -> Html:
    """A cell with a number; its full digits are kept for sorting and for whoever reads the page with a program.

    Args:
        value: None or NaN where it is not known.
        digits: after the point.
        factor: of the number shown.
        sign: show a plus.
    """
    if value is None or math.isnan(value):
        return tag('td', DASH, class_='n')
    shown = f'{value * factor:{"+" if sign else ""},.{digits}f}'
    return tag('td', shown.replace('-', '−'), class_='n', data_value=repr(value))  # noqa: RUF001


def picture(image: np.ndarray, alt: str) -> Html:
    """An image within the page, of at most ``MAX_SIDE`` pixels and ``MAX_BYTES`` bytes.

    Args:
        image: ``(H, W, 3)`` uint8, RGB.
        alt: what it shows, for those who cannot see it.
    """
    image = shrink(image, MAX_SIDE)
    height, width = image.shape[:2]
    encoded = b''
    for quality in (85, 70, 50, 30, 10):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, 'JPEG', quality=quality, subsampling=0 if quality > 80 else 2)
        encoded = buffer.getvalue()
        if len(encoded) <= MAX_BYTES:
            break
    data = f'data:image/jpeg;base64,{base64.b64encode(encoded).decode()}'
    return tag('img', src=data, alt=alt, width=width, height=height, decoding='async')


def shrink(image: np.ndarray, side: int, smooth: bool = True) -> np.ndarray:
    """An image or label map whose longer side is at most ``side`` pixels.

    Args:
        image: ``(H, W, ...)``.
        side: in pixels.
        smooth: average; False for labels, which have no mean.
    """
    height, width = image.shape[:2]
    if max(height, width) <= side:
        return image
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    how = cv2.INTER_AREA if smooth else cv2.INTER_NEAREST
    return cv2.resize(np.ascontiguousarray(image), size, interpolation=how)


def _is_cell(cell: Any) -> bool:
    return isinstance(cell, Html) and cell.startswith('<td')


def _cell(cell: Any) -> Html:
    return tag('td', cell)


def _side(rows: Sequence[Sequence[Any]], column: int) -> str | None:
    is_number = rows and column and str(rows[0][column]).startswith('<td class="n"')
    return 'n' if is_number else None
