"""Names in a picture: each where it covers none of the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw

from densekit.report.fonts import font

MAX_COVERED = 0.08  # of a name by others, so that all of them can be read


@dataclass
class Tag:
    """A name to write: ``places`` tells, for a text size (w, h), where its upper left corner may go, best first."""

    text: str
    colour: tuple[int, ...]
    places: Callable[[int, int], list[tuple[float, float]]]


def around(box: np.ndarray) -> Callable[[int, int], list[tuple[float, float]]]:
    """Places at the corners of a box: above it, inside, then below; then farther inside."""
    x1, y1, x2, y2 = box
    return lambda w, h: [
        *((x1, y1 - h), (x1, y1), (x2 + 1 - w, y1 - h), (x2 + 1 - w, y1)),
        *((x1, y2 + 1 - h), (x1, y2 + 1), (x2 + 1 - w, y2 + 1 - h), (x2 + 1 - w, y2 + 1)),
        # Along the sides and the middle, where the corners are taken.
        *((x, y) for y in range(int(y1) + h, int(y2) - h, h) for x in (x1, x2 + 1 - w, (x1 + x2 - w) / 2)),
    ]


def inside(mask: np.ndarray) -> Callable[[int, int], list[tuple[float, float]]]:
    """Places at the point of the largest region that is farthest from its border, then above and below it."""
    _, regions, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    largest = regions == 1 + np.argmax(stats[1:, cv2.CC_STAT_AREA])
    depth = cv2.distanceTransform(np.pad(largest, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(np.argmax(depth), depth.shape)
    return lambda w, h: [(x - w / 2, y - h / 2 + step * h) for step in (0, -0.6, 0.6, -1.2, 1.2, -2.4, 2.4)]


def write_tags(picture: np.ndarray, tags: Sequence[Tag]) -> np.ndarray:
    """Write each name on a filled box in its colour, within the picture and where it covers none of the others.

    Names for which there is no room are left out, and counted in a corner.
    """
    height, width = picture.shape[:2]
    size = max(14, round(0.018 * (height * width) ** 0.5))
    pad = max(2, size // 5)
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    taken: list[tuple[int, int, int, int]] = []

    def write(tag: Tag, most: float) -> bool:
        typeface = font(size, tag.text)
        w, h = round(typeface.getlength(tag.text)) + 2 * pad, size + pad
        inside = [(_clip(x, width - w), _clip(y, height - h)) for x, y in tag.places(w, h)]
        covered = [sum(_overlap((x, y, x + w, y + h), t) for t in taken) for x, y in inside]
        best = int(np.argmin(covered))
        if covered[best] > most * w * h:
            return False
        x, y = inside[best]
        taken.append((x, y, x + w, y + h))
        draw.rectangle((x, y, x + w - 1, y + h - 1), fill=tag.colour)
        luminance = np.dot(tag.colour, (0.299, 0.587, 0.114))
        draw.text((x + pad, y + h / 2), tag.text, 'black' if luminance > 140 else 'white', typeface, anchor='lm')
        return True

    left_out = sum(not write(tag, MAX_COVERED) for tag in tags)
    if left_out:
        corners = around(np.array([0, 0, width - 1, height - 1]))
        write(Tag(f'{left_out} name{"s" * (left_out > 1)} without room', (40, 40, 40), corners), 1)
    return np.array(canvas)


def _clip(start: float, last: int) -> int:
    return int(max(0, min(round(start), last)))


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
