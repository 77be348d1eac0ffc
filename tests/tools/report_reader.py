"""Reads a report as a program that is not ours would: tables, charts, images and where each refers to."""

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {'img', 'link', 'meta', 'polyline', 'line', 'circle', 'br'}


@dataclass
class Table:
    header: list = field(default_factory=list)
    rows: dict = field(default_factory=dict)  # name -> cells, numbers in full digits

    def column(self, title):
        return {name: cells[self.header.index(title) - 1] for name, cells in self.rows.items()}


@dataclass
class Chart:
    frame: list
    lines: dict = field(default_factory=dict)

    def values(self, name):
        """Points of a line in the units of its axes."""
        _, left, right, x0, x1, bottom, top, y0, y1 = self.frame
        points = [tuple(map(float, point.split(','))) for point in self.lines[name].split()]
        return [
            (x0 + (x - left) / (right - left) * (x1 - x0), y0 + (bottom - y) / (bottom - top) * (y1 - y0))
            for x, y in points
        ]


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.text = text
        self.tables, self.charts, self.sections = {}, {}, {}
        self.below = {}  # heading -> its charts by title, where several have one title
        self.images, self.attributes, self.tags, self.open = [], [], [], []
        self.scripts, self.shown = [], []
        self._section = self._table = self._row = self._cell = self._chart = None
        self._title = self._caption = self._heading = ''
        self.feed(text)
        assert not self.open, f'{self.open} are not closed'

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.attributes += [(tag, key, value) for key, value in attrs.items()]
        if tag not in VOID:
            self.open.append((tag, attrs))
        if tag == 'section':
            self._section = attrs['id']
            self.sections[self._section] = ''
        elif tag == 'table':
            self._table = self.tables[attrs['aria-label']] = Table()
        elif tag == 'tr':
            self._row = []
        elif tag in ('td', 'th'):
            self._cell = attrs.get('data-value', '')
        elif tag == 'img':
            self.images.append(attrs)
        elif tag == 'figcaption':
            self._title = ''
        elif tag == 'h3':
            self._heading = ''
        elif tag == 'svg' and 'data-frame' in attrs:
            self._chart = self.charts[self._title] = Chart(json.loads(attrs['data-frame']))
            self.below.setdefault(self._heading, {})[self._title] = self._chart
        elif tag == 'polyline' and attrs.get('data-name') is not None:
            self._chart.lines[attrs['data-name']] = attrs['points']

    def handle_endtag(self, tag):
        opened, attrs = self.open.pop()
        assert opened == tag, f'{opened} is closed by {tag}'
        if tag == 'section':
            self._section = None
        elif tag in ('td', 'th'):
            self._row.append(float(self._cell) if 'data-value' in attrs else self._cell.strip())
            self._cell = None
        elif tag == 'tr' and self._table is not None:
            if self._table.header:
                self._table.rows[self._row[0]] = self._row[1:]
            else:
                self._table.header = self._row
        elif tag == 'table':
            self._table = None
        elif tag == 'figcaption':
            self.shown.append(self._title)

    def handle_data(self, data):
        within = [tag for tag, _ in self.open]
        if within[-1:] == ['script']:
            self.scripts.append(data)
        if self._section is not None:
            self.sections[self._section] += data
        if self._cell is not None and 'data-value' not in self.open[-1][1]:
            self._cell += data
        if 'figcaption' in within:
            self._title += data
        if 'h3' in within:
            self._heading += data
