"""Pascal VOC's annotations: an XML file an image, with boxes.

Its pixels count from 1 and the last one belongs to the box (VOC2012 development kit, section 4): xmin 1 and xmax 100 is
a box 100 pixels wide that begins at 0. What VOC calls difficult is not scored there, which COCO calls a crowd.
"""

import math
from pathlib import Path
from xml.etree import ElementTree

from densekit.data.convert import Conversion, Shape, annotation_files

_CORNERS = ('xmin', 'ymin', 'xmax', 'ymax')


def read_voc(conversion: Conversion, folder: Path) -> None:
    """Adds every XML file below a folder to a conversion."""
    from_zero: list[str] = []
    conversion.each(annotation_files(folder, '.xml'), lambda path: _read_file(conversion, path, from_zero))
    if from_zero:
        conversion.remarks.append(
            f'{len(from_zero):,} objects begin at pixel 0, the first in {from_zero[0]}, and Pascal VOC counts from 1. '
            'If these files count from 0, every box came out one pixel too far to the left and to the top'
        )


def _read_file(conversion: Conversion, path: Path, from_zero: list[str]) -> None:
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f'no XML: {error}') from error
    if root.tag != 'annotation':
        raise ValueError(f'<{root.tag}> where Pascal VOC has <annotation>')
    names = [name.strip() for name in [root.findtext('filename') or '', path.stem] if name.strip()]
    image = conversion.images.find(*names)
    size = conversion.size(image)
    said = tuple(root.findtext(f'size/{side}') for side in ('width', 'height'))
    if any(said) and said not in (('0', '0'), tuple(map(str, size))):
        raise ValueError(f'it says {said[0]} x {said[1]} pixels, and its image {image} has {size[0]} x {size[1]}')
    shapes = [_shape(item) for item in root.iter('object')]
    from_zero += [str(path) for shape in shapes if min(shape.box[:2]) < 0]
    conversion.add(image, size, shapes, path)


def _shape(item: ElementTree.Element) -> Shape:
    name = (item.findtext('name') or '').strip()
    if not name:
        raise ValueError('an <object> has no <name>')
    texts = [item.findtext(f'bndbox/{corner}') for corner in _CORNERS]
    try:
        left, top, right, bottom = (float(text) for text in texts)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(
            f'the <bndbox> of a {name!r} has {", ".join(map(str, texts))} for {", ".join(_CORNERS)}'
        ) from None
    if not all(map(math.isfinite, (left, top, right, bottom))) or right < left or bottom < top:
        raise ValueError(f'the <bndbox> of a {name!r} ends before it begins: {", ".join(map(str, texts))}')
    box = (left - 1, top - 1, right - left + 1, bottom - top + 1)
    return Shape(name, box, crowd=(item.findtext('difficult') or '0').strip() == '1')
