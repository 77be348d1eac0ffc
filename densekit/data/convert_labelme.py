"""LabelMe's annotations: a JSON file an image, with polygons, rectangles and circles.

Coordinates are continuous, as COCO's are: the first pixel spans 0 to 1. Shapes of one label and one group_id are parts
of one object. The image itself, if the file holds it, is not used.
"""

import json
import math
from pathlib import Path

from densekit.data.convert import Conversion, Shape, annotation_files, box_around

_CORNERS = 64  # of the polygon that stands for a circle


def read_labelme(conversion: Conversion, folder: Path) -> None:
    """Adds every JSON file below a folder to a conversion."""
    conversion.each(annotation_files(folder, '.json'), lambda path: _read_file(conversion, path))


def _read_file(conversion: Conversion, path: Path) -> None:
    try:
        content = json.loads(path.read_text(encoding='utf-8-sig'))
    except ValueError as error:
        raise ValueError(f'no JSON: {error}') from error
    if not isinstance(content, dict) or not isinstance(content.get('shapes'), list):
        raise ValueError('no shapes in it, which LabelMe files have')
    image = conversion.images.find(*_names(content, path, conversion.images.root))
    size = conversion.size(image)
    said = (content.get('imageWidth'), content.get('imageHeight'))
    if said != (None, None) and said != size:
        raise ValueError(f'it says {said[0]} x {said[1]} pixels, and its image {image} has {size[0]} x {size[1]}')
    objects: dict[object, Shape] = {}
    for number, item in enumerate(content['shapes']):
        label, polygon = _label_and_polygon(item, number)
        group = item.get('group_id')
        if not isinstance(group, int | str | None):
            raise ValueError(f'group_id of a {label!r} (shape number {number}) is {group!r}; it has to be a number')
        shape = objects.setdefault(number if group is None else (group, label), Shape(label, (0, 0, 0, 0)))
        shape.polygons.append(polygon)
    for shape in objects.values():
        shape.box = box_around(shape.polygons)
    conversion.add(image, size, list(objects.values()), path)


def _names(content: dict, path: Path, root: Path) -> list[str]:
    """Where the image may be: as imagePath says, seen from the JSON file; by its name; by the JSON file's name."""
    named = str(content.get('imagePath') or '').replace('\\', '/')
    names = [named, path.stem] if named else [path.stem]
    there = (path.parent / named).resolve()
    if named and there.is_relative_to(root.resolve()):
        names.insert(0, there.relative_to(root.resolve()).as_posix())
    return names


def _label_and_polygon(item: dict, number: int) -> tuple[str, list[float]]:
    if not isinstance(item, dict) or not isinstance(item.get('label'), str) or not item['label'].strip():
        raise ValueError(f'shape number {number} has no label')
    label, kind = item['label'].strip(), item.get('shape_type') or 'polygon'
    try:
        points = [(float(x), float(y)) for x, y in item['points']]
    except (KeyError, TypeError, ValueError):
        points = []
    if not points or not all(math.isfinite(value) for point in points for value in point):
        raise ValueError(f'the points of a {label!r} (shape number {number}) are no pairs of numbers')
    if kind == 'polygon' and len(points) > 2:
        corners = points
    elif kind == 'rectangle' and len(points) == 2:
        (x1, y1), (x2, y2) = points
        corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    elif kind == 'circle' and len(points) == 2:
        (x, y), radius = points[0], math.dist(*points)
        angles = [2 * math.pi * i / _CORNERS for i in range(_CORNERS)]
        corners = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
    else:
        raise ValueError(
            f'a {label!r} (shape number {number}) is a {kind} of {len(points)} points; objects are polygons of 3 or '
            'more points, and rectangles and circles of 2'
        )
    return label, [value for corner in corners for value in corner]
