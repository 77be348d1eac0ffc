"""What is in a data set: tables for a terminal, and a picture."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from densekit.data.own_coco import CocoData
from densekit.data.own_maps import MapData
from densekit.report.curves import FIRST, SECOND, STYLE
from densekit.report.pictures import draw_instances, draw_label_map, read_image
from densekit.report.tables import format_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LISTED = 30  # classes in a table or a chart; of more, the most and the least frequent
_EXAMPLES = 6
_COCO_SIDES = (32, 96)  # pixels; COCO's small, medium and large are parted by their squares


def palette(classes: Sequence[str]) -> tuple[tuple[int, int, int], ...]:
    """A colour for each class, RGB: grey for what is called background, the others as unlike each other as can be."""
    number = len(classes)
    # Hues by the golden angle never come near the last few; every other one is darker.
    hues = np.arange(number) * 0.618034 % 1
    values = np.where(np.arange(number) % 2, 0.72, 0.95)
    red, green, blue = (
        values * (1 - 0.78 * np.clip(np.minimum(k, 4 - k), 0, 1)) for k in ((n + hues * 6) % 6 for n in (5, 3, 1))
    )
    bright = np.round(255 * np.stack([red, green, blue], axis=1)).astype(int).tolist()
    grey = ('background', 'unlabeled', 'unlabelled', 'void')
    return tuple(
        (120, 120, 120) if name.lower() in grey else (r, g, b) for name, (r, g, b) in zip(classes, bright, strict=True)
    )


def class_table(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Counts by class.

    Args:
        counts: title of a column to the counts by class; the first column decides the order.
    """
    first = next(iter(counts.values()))
    rows = [[name, *(f'{column[name]:,}' for column in counts.values())] for name in _ranked(first)]
    if len(rows) > _LISTED:
        middle = [f'... {len(rows) - _LISTED:,} more', *([''] * len(counts))]
        rows = [*rows[: _LISTED // 2], middle, *rows[-_LISTED // 2 :]]
    return format_table(['class', *counts], rows, align='<' + '>' * len(counts))


def _ranked(counts: Mapping[str, int]) -> list[str]:
    return sorted(counts, key=lambda name: -counts[name])


def size_lines(data: CocoData) -> list[str]:
    """Sizes of images and of boxes, in words."""
    images = np.array([[image['width'], image['height']] for image in data.content['images']])
    lines = [f'images: {_span(images[:, 0])} wide, {_span(images[:, 1])} high (pixels)']
    sides = np.sqrt(np.clip(data.sides(), 0, None).prod(axis=1))
    if len(sides):
        low, middle, high = np.quantile(sides, (0.05, 0.5, 0.95))
        small, large = (sides < _COCO_SIDES[0]).mean(), (sides >= _COCO_SIDES[1]).mean()
        lines.append(
            f'square root of the area of boxes: 5 % below {low:.0f}, half below {middle:.0f}, 5 % above '
            f'{high:.0f} pixels'
        )
        lines.append(
            f"in COCO's terms {100 * small:.0f} % small (below {_COCO_SIDES[0]}), "
            f'{100 * (1 - small - large):.0f} % medium, {100 * large:.0f} % large ({_COCO_SIDES[1]} or more)'
        )
    return lines


def _span(values: np.ndarray) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f'{low} to {high}'


def coco_picture(
    data: CocoData, classes: Sequence[str], colours: Sequence[tuple[int, int, int]], masks: bool
) -> np.ndarray:
    """Charts of classes and box sizes over examples with their boxes, RGB (H, W, 3) uint8."""
    per_image = data.of_images()
    full = [i for i, labels in enumerate(per_image) if labels] or list(range(len(per_image)))
    examples = [_draw_coco(data, data.content['images'][i], classes, colours, masks) for i in _evenly(full)]
    counts = dict.fromkeys(classes, 0)
    for annotation in data.content.get('annotations', []):
        name = data.names.get(annotation['category_id'])
        if name in counts and not annotation.get('iscrowd'):
            counts[name] += 1

    from matplotlib.ticker import LogLocator, NullFormatter

    def sizes(axis: 'Axes') -> None:
        sides = np.sqrt(np.clip(data.sides(), 1e-6, None).prod(axis=1))
        sides = sides[sides >= 1]
        if len(sides):
            axis.hist(sides, bins=np.geomspace(max(1, sides.min() / 1.1), sides.max() * 1.1, 30).tolist(), color=SECOND)
            axis.set_xscale('log')
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter('{x:g}')
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set(title='boxes by size', xlabel='square root of the area (pixels)', ylabel='boxes')

    return _sheet(counts, 'boxes', colours, classes, sizes, examples)


def _draw_coco(data: CocoData, image: dict, classes: Sequence[str], colours: Sequence, with_masks: bool) -> np.ndarray:
    pixels = read_image(f'{data.images}/{image["file_name"]}')
    height, width = pixels.shape[:2]
    labels = {name: i for i, name in enumerate(classes)}
    shown = [
        a
        for a in data.content.get('annotations', [])
        if a['image_id'] == image['id'] and data.names.get(a['category_id']) in labels
    ]
    boxes = np.array([a['bbox'] for a in shown], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = None
    if with_masks:
        masks = np.zeros((len(shown), height, width), bool)
        for i, annotation in enumerate(shown):
            masks[i] = _mask(annotation.get('segmentation'), height, width)
    return draw_instances(
        pixels,
        boxes=boxes,
        labels=np.array([labels[data.names[a['category_id']]] for a in shown], np.int64),
        classes=classes,
        palette=colours,
        masks=masks,
        ignored=np.array([bool(a.get('iscrowd')) for a in shown], bool),
    )


def _mask(segmentation: list | dict | None, height: int, width: int) -> np.ndarray:
    if isinstance(segmentation, dict):
        counts = segmentation['counts']
        rle = coco_mask.frPyObjects(segmentation, height, width) if isinstance(counts, list) else segmentation
        return coco_mask.decode(rle).astype(bool)
    polygons = [polygon for polygon in segmentation or [] if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if not polygons:
        return np.zeros((height, width), bool)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)


def map_picture(
    data: MapData, classes: Sequence[str], colours: Sequence[tuple[int, int, int]], ignore_zero: bool
) -> np.ndarray:
    """Charts of images by class and of pixels by class over examples in the classes' colours."""
    examples, pixels = [], np.zeros(256, np.int64)
    for name in _evenly(sorted(data.values)):
        labels = load_labels(data.map(name), ignore_zero)
        pixels += np.bincount(labels.ravel(), minlength=256)
        examples.append(draw_label_map(read_image(data.image(name)), labels, classes=classes, palette=colours))
    counts = images_by_class(data, classes, ignore_zero)

    def shares(axis: 'Axes') -> None:
        total = max(1, int(pixels[: len(classes)].sum()))
        _bars(axis, {name: float(100 * pixels[i] / total) for i, name in enumerate(classes)}, colours, classes)
        axis.set(title=f'pixels of the {len(examples)} images below', xlabel='%')

    return _sheet(counts, 'images', colours, classes, shares, examples)


def images_by_class(data: MapData, classes: Sequence[str], ignore_zero: bool) -> dict[str, int]:
    """The number of label maps that each class is in."""
    first = int(ignore_zero)
    return {name: sum(i + first in values for values in data.values.values()) for i, name in enumerate(classes)}


def load_labels(path: str, ignore_zero: bool) -> np.ndarray:
    """A label map as it is learned, (H, W) uint8."""
    with Image.open(path) as file:
        labels = np.asarray(file).astype(np.uint8)
    return np.where((labels == 0) | (labels == 255), 255, labels - 1).astype(np.uint8) if ignore_zero else labels


def _evenly(items: Sequence) -> list:
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, min(len(items), _EXAMPLES))]


def _sheet(
    counts: Mapping[str, int],
    noun: str,
    colours: Sequence,
    classes: Sequence[str],
    second: Callable[['Axes'], None],
    examples: Sequence[np.ndarray],
) -> np.ndarray:
    """Two charts above rows of three pictures."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(examples) // 3)
    bars = min(_LISTED, len(counts))
    chart = max(3.0, 0.2 * bars + 0.9)
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')  # of scripts that the font has not
        figure = Figure(figsize=(12, chart + 3.6 * rows), dpi=110, layout='constrained')
        grid = figure.add_gridspec(1 + rows, 6, height_ratios=[chart, *([3.6] * rows)])
        left, right = figure.add_subplot(grid[0, :3]), figure.add_subplot(grid[0, 3:])
        _bars(left, counts, colours, classes)
        left.set(title=f'{noun} by class', xlabel=noun)
        second(right)
        for i, picture in enumerate(examples):
            axis = figure.add_subplot(grid[1 + i // 3, 2 * (i % 3) : 2 * (i % 3) + 2])
            axis.imshow(picture, interpolation='antialiased')
            axis.axis('off')
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _bars(axis: 'Axes', counts: Mapping[str, float], colours: Sequence, classes: Sequence[str]) -> None:
    """Horizontal bars, the longest on top, each in the colour of its class."""
    names = sorted(counts, key=lambda name: -counts[name])
    if len(names) > _LISTED:
        names = [*names[: _LISTED // 2], *names[-_LISTED // 2 :]]
    tints = [[value / 255 for value in colours[list(classes).index(name)]] for name in names]
    values = [counts[name] for name in names]
    places = np.arange(len(names))
    axis.barh(places, values, color=tints or FIRST)
    axis.set_yticks(places, [name if len(name) < 25 else f'{name[:23]}...' for name in names])
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.margins(x=0.12)
    for place, value in zip(places, values, strict=True):
        axis.annotate(f' {value:,.3g}' if value < 1000 else f' {value:,.0f}', (value, place), va='center', fontsize=8)
