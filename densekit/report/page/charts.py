"""Line and bar charts as SVG within the page; colours are names of the page's style, light and dark."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from densekit.report.page.markup import Html, join, note, tag

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 12, 40
MOST_POINTS = 500  # of a line; more are thinned
DASHES = (None, '7 3', '2 3', '9 3 2 3')


@dataclass
class Line:
    """A line of a chart.

    Attributes:
        name: in the legend; without one it is not there.
        xs: ascending.
        ys: as many; gaps where they are no numbers.
        colour: 1 to 6, a colour of the page, or 'ramp-P', P percent of the way from one colour to another.
        dash: 0 for a whole line, 1 to 3 for broken ones.
        faint: behind the others.
        dots: mark each point.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: int | str = 1
    dash: int = 0
    faint: bool = False
    dots: bool = False


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    y_range: tuple[float, float] | None = None,
    x_range: tuple[float, float] | None = None,
    small: bool = False,
) -> Html:
    """A chart with its title and legend.

    Args:
        title: above it, and what it is called for those who cannot see it.
        lines: to draw.
        x_label: below it.
        y_label: beside it.
        y_range: of the values; default from 0 to the highest that is not faint.
        x_range: default from 0 to the last.
        small: one of many: no labels.
    """
    finite = [y for line in lines if not line.faint for y in line.ys if math.isfinite(y)]
    if not finite:
        return tag('figure', tag('figcaption', title), note('nothing was logged'), class_='chart')
    xs = x_range or (0, max(max(line.xs) for line in lines if len(line.xs)) or 1)
    ys = y_range or (min(0, min(finite)), 1.08 * max(max(finite), 0) or 1)
    frame = _Frame(xs, ys, 150 if small else WIDTH, 120 if small else HEIGHT, small)
    parts = [
        frame.axes(x_label, y_label),
        *(frame.line(line) for line in sorted(lines, key=lambda line: not line.faint)),
    ]
    said = f'{title}. Horizontal: {x_label}. Vertical: {y_label}. Lines: {", ".join(line.name for line in lines)}.'
    svg = tag(
        'svg',
        *parts,
        viewBox=f'0 0 {frame.width} {frame.height}',
        role='img',
        aria_label=said,
        data_frame=json.dumps([LEFT if not small else 4, frame.left, frame.right, *xs, frame.bottom, frame.top, *ys]),
        data_labels=json.dumps([x_label, y_label]),
    )
    legend = Html('') if small else _legend([line for line in lines if line.name and any(map(math.isfinite, line.ys))])
    return tag('figure', tag('figcaption', title), svg, legend, class_='chart small' if small else 'chart')


def bars(shares: Sequence[float]) -> Html:
    """A cell of a table with a bar for each run; the numbers stand in cells of their own.

    Args:
        shares: from 0 to 1; NaN: no bar.
    """
    made = [
        tag('span', class_=f'bar c{i + 1}', style=f'width:{100 * min(max(share, 0), 1):.2f}%')
        for i, share in enumerate(shares)
        if not math.isnan(share)
    ]
    return tag('td', *made, class_='bars', aria_hidden='true')


class _Frame:
    """Where values are drawn."""

    def __init__(self, xs: tuple[float, float], ys: tuple[float, float], width: int, height: int, small: bool) -> None:
        self.xs, self.ys, self.width, self.height, self.small = xs, ys, width, height, small
        self.left, self.right = (4, width - 4) if small else (LEFT, width - RIGHT)
        self.top, self.bottom = (4, height - 4) if small else (TOP, height - BOTTOM)

    def x(self, value: float) -> float:
        low, high = self.xs
        return self.left + (value - low) / ((high - low) or 1) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.ys
        place = self.bottom - (value - low) / ((high - low) or 1) * (self.bottom - self.top)
        return min(max(place, self.top - 2), self.bottom + 2)

    def axes(self, x_label: str, y_label: str) -> Html:
        x_ticks, y_ticks = ([0, 0.5, 1], [0, 0.5, 1]) if self.small else (ticks(*self.xs), ticks(*self.ys))
        lines = [
            tag('line', x1=self.left, x2=self.right, y1=_short(self.y(t)), y2=_short(self.y(t)), class_='grid')
            for t in y_ticks
        ]
        if self.small:
            lines += [
                tag('line', y1=self.top, y2=self.bottom, x1=_short(self.x(t)), x2=_short(self.x(t)), class_='grid')
                for t in x_ticks
            ]
            return join(lines)
        texts = [
            tag('text', t_text, x=self.left - 6, y=_short(self.y(t) + 4), class_='tick end')
            for t, t_text in _said(y_ticks)
        ]
        texts += [
            tag('text', t_text, x=_short(self.x(t)), y=self.bottom + 16, class_='tick middle')
            for t, t_text in _said(x_ticks)
        ]
        middle = (self.left + self.right) / 2
        texts.append(tag('text', x_label, x=middle, y=self.height - 6, class_='tick middle'))
        height = (self.top + self.bottom) / 2
        texts.append(tag('text', y_label, x=12, y=height, class_='tick middle', transform=f'rotate(-90 12 {height})'))
        return join([*lines, *texts])

    def line(self, line: Line) -> Html:
        pieces = _pieces(*thin(np.asarray(line.xs, float), np.asarray(line.ys, float)))
        placed = [[(_short(self.x(x)), _short(self.y(y))) for x, y in piece] for piece in pieces]
        parts = [
            tag(
                'polyline',
                points=' '.join(f'{x},{y}' for x, y in piece),
                data_name=None if line.faint else line.name,
                **_look(line),
            )
            for piece in placed
        ]
        # a single value would be invisible as a line
        dots = [point for piece in placed if line.dots or len(piece) == 1 for point in piece]
        colour = _colour(line)
        return join(
            [*parts, *(tag('circle', cx=x, cy=y, r=3, class_=f'dot {colour[0]}', style=colour[1]) for x, y in dots)]
        )


def ticks(low: float, high: float, number: int = 5) -> list[float]:
    """Round values from ``low`` to ``high``, about as many as asked for."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    power = 10 ** math.floor(math.log10(span / number))
    step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= number)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def thin(xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most ``MOST_POINTS`` points: of each stretch its lowest and highest, so that peaks stay."""
    if len(xs) <= MOST_POINTS:
        return xs, ys
    kept: set[int] = {0, len(xs) - 1}
    for part in np.array_split(np.arange(len(xs)), (MOST_POINTS - 2) // 2):
        values = ys[part]
        if np.isfinite(values).all():
            kept |= {int(part[values.argmin()]), int(part[values.argmax()])}
        else:
            kept.add(int(part[~np.isfinite(values)][0]))  # the gap stays a gap
    chosen = sorted(kept)
    return xs[chosen], ys[chosen]


def _pieces(xs: np.ndarray, ys: np.ndarray) -> list[list[tuple[float, float]]]:
    """The points between those that are no numbers."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(xs.tolist(), ys.tolist(), strict=True):
        if math.isfinite(y):
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _colour(line: Line) -> tuple[str, str | None]:
    """Class and style of the page."""
    if isinstance(line.colour, int):
        return f'c{line.colour}', None
    return 'ramp', f'--p:{line.colour.removeprefix("ramp-")}%'


def _look(line: Line) -> dict[str, str | None]:
    colour, style = _colour(line)
    return {
        'class_': f'line {colour}{" faint" if line.faint else ""}',
        'style': style,
        'stroke_dasharray': DASHES[line.dash],
    }


def _legend(lines: Sequence[Line]) -> Html:
    entries = []
    for line in lines:
        drawn = tag('line', x1=0, x2=24, y1=5, y2=5, **_look(line))
        entries.append(
            tag('li', tag('svg', drawn, viewBox='0 0 24 10', class_='key', aria_hidden='true'), ' ', line.name)
        )
    return tag('ul', *entries, class_='legend')


def _said(values: Sequence[float]) -> list[tuple[float, str]]:
    """Ticks with their texts; small and large ones in powers of ten."""
    largest = max(map(abs, values), default=0)
    if largest and not 1e-3 <= largest < 1e5:
        return [(value, f'{value:.2g}' if value else '0') for value in values]
    return [(value, f'{value:g}') for value in values]


def _short(value: float) -> str:
    return f'{value:.1f}'.removesuffix('.0')
