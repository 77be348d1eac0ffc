"""Reads a COCO annotation file for its checks, in a fraction of the memory of the file's content.

A segmentation is judged and dropped the moment it is parsed: the coordinates of all polygons of COCO's training set
would take several gigabytes.
"""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from densekit.data.faults import Fault, fault

_REQUIRED = {
    'images': ('id', 'file_name', 'height', 'width'),
    'annotations': ('id', 'image_id', 'category_id', 'bbox', 'area'),
    'categories': ('id', 'name'),
}
_REQUIRED_PANOPTIC = {
    'images': _REQUIRED['images'],
    'annotations': ('image_id', 'file_name', 'segments_info'),
    'segments': ('id', 'category_id', 'bbox', 'area'),
    'categories': (*_REQUIRED['categories'], 'isthing'),
}
_LARGEST_ID = 2**63
_FARTHEST = 1e6  # pixels; pycocotools paints farther polygons until memory ends, or crashes
_INTEGERS = ('id', 'image_id', 'category_id')


class Mask(NamedTuple):
    """What remains of a segmentation.

    Attributes:
        kind: kind of the fault, empty if there is none.
        problem: the same in words.
        size: height and width of run lengths in pixels.
    """

    kind: str = ''
    problem: str = ''
    size: tuple[int, int] | None = None


_FINE = Mask()


@dataclass
class CocoFile:
    """The content of an annotation file, without what is malformed.

    Attributes:
        path: of the file.
        images: each with integer id, file_name, height and width.
        annotations: each with integer id, image_id and category_id, bbox and area; segmentation is a :class:`Mask` or
            None. Those of a panoptic file are its segments.
        categories: each with integer id and name.
        faults: found on the way.
        panoptic: whether the annotations were segments.
        readable: False if nothing could be read.
    """

    path: str
    images: list[dict] = field(default_factory=list)
    annotations: list[dict] = field(default_factory=list)
    categories: list[dict] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    panoptic: bool = False
    readable: bool = True


def read_coco(path: str, panoptic: bool = False) -> CocoFile:
    """Reads an annotation file.

    Args:
        path: a JSON file on disk.
        panoptic: whether the annotations are those of COCO's panoptic format.

    Returns:
        What is well-formed in it, and the faults of what is not.
    """
    content, problem = _parse(path)
    if problem is not None:
        return CocoFile(path, faults=[problem], readable=False)
    layout = _layout_problem(content)
    if layout:
        return CocoFile(path, faults=[fault('json-layout', path, None, layout)], readable=False)
    read = CocoFile(path, panoptic=panoptic)
    required = _REQUIRED_PANOPTIC if panoptic else _REQUIRED
    read.images = _well_formed(read, content['images'], 'image', required['images'])
    read.categories = _well_formed(read, content['categories'], 'category', required['categories'])
    entries = _well_formed(read, content.get('annotations', []), 'annotation', required['annotations'])
    if panoptic:
        segments = [{**segment, 'image_id': entry['image_id']} for entry in entries for segment in _segments(entry)]
        entries = _well_formed(read, segments, 'segment', required['segments'])
    read.annotations = entries
    return read


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Millions of objects are made, none of them garbage: looking for some takes as long as making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _parse(path: str) -> tuple[Any, Fault | None]:
    try:
        with open(path, encoding='utf-8') as file, _no_garbage_collection():
            text = file.read()
            if text.startswith('\ufeff'):  # json's own words for it are for programmers
                raise ValueError(
                    'it begins with a byte order mark, which pycocotools does not read; save it as UTF-8 without BOM'
                )
            return json.loads(text, object_hook=_judge_segmentation), None
    except FileNotFoundError:
        return None, fault('json-missing', path, None, 'no such file')
    except json.JSONDecodeError as error:
        size = len(error.doc)
        place = f'line {error.lineno}, column {error.colno}; character {error.pos:,} of {size:,}'
        cut = ', where the file ends: it was cut off' if error.pos >= size - 1 or 'Unterminated' in error.msg else ''
        return None, fault('json-unreadable', path, None, f'no JSON: {error.msg} at {place}{cut}')
    except (OSError, ValueError, RecursionError) as error:
        return None, fault('json-unreadable', path, None, f'cannot be read: {error}')


def _layout_problem(content: Any) -> str:
    if not isinstance(content, dict):
        return f'holds a {type(content).__name__} and not an object with images, annotations and categories'
    for section in ('images', 'categories', 'annotations'):
        if section not in content and section != 'annotations':  # which test sets go without
            return f'has no {section}; there are {", ".join(content) or "no keys at all"}'
        if not isinstance(content.get(section, []), list):
            return f'{section} is a {type(content[section]).__name__} and not a list'
    return ''


def _segments(entry: dict) -> list:
    return entry['segments_info'] if isinstance(entry['segments_info'], list) else []


def _well_formed(read: CocoFile, entries: list, noun: str, required: tuple[str, ...]) -> list[dict]:
    """The entries with all keys and integer ids; of the others a fault each."""
    wanted = frozenset(required)
    integers = tuple(key for key in _INTEGERS if key in wanted or (key == 'image_id' and noun == 'segment'))
    good = []
    for number, entry in enumerate(entries):
        # Cheap conditions for the millions that are fine; what is wrong is found out afterwards.
        if (
            type(entry) is dict
            and wanted <= entry.keys()
            and all(type(entry[key]) is int and abs(entry[key]) < _LARGEST_ID for key in integers)
        ):
            good.append(entry)
            continue
        problem = _entry_problem(entry, number, noun, required, integers, read.path)
        if problem is None:  # 7.0 for 7
            good.append({**entry, **{key: int(entry[key]) for key in integers}})
        else:
            read.faults.append(problem)
    return good


def _entry_problem(
    entry: Any, number: int, noun: str, required: tuple[str, ...], integers: tuple[str, ...], path: str
) -> Fault | None:
    if not isinstance(entry, dict):
        return fault('json-layout', path, None, f'{noun} number {number} is a {type(entry).__name__} and no object')
    label = entry.get('id', entry.get('image_id'))
    if not isinstance(label, int | str):
        label = None
    named = f'{noun} number {number}' if label is None else f'{noun} {label}'
    missing = [key for key in required if key not in entry]
    if missing:
        return fault('key-missing', path, label, f'{named} has no {", ".join(missing)}')
    for key in integers:
        value = entry[key]
        whole = isinstance(value, float) and value.is_integer()
        if isinstance(value, bool) or not (isinstance(value, int) or whole) or abs(value) >= _LARGEST_ID:
            return fault('id-not-integer', path, label, f'{key} of {noun} number {number} is {value!r}')
    return None


def _judge_segmentation(item: dict) -> dict:
    if 'segmentation' in item:
        item['segmentation'] = judge(item['segmentation'])
    return item


def judge(segmentation: Any) -> Mask | None:
    """What is wrong with a segmentation as far as it shows without its image.

    Args:
        segmentation: of an annotation, as it was parsed.

    Returns:
        None for none at all, which an empty list is as well.
    """
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        return _judge_polygons(segmentation)
    if isinstance(segmentation, dict):
        return _judge_run_lengths(segmentation)
    return Mask('mask-malformed', f'segmentation is a {type(segmentation).__name__}')


def _judge_polygons(polygons: list) -> Mask:
    bad = None
    try:
        for polygon in polygons:
            length = len(polygon)
            if length < 6 or length % 2:
                bad = length
            if not sum(map(abs, polygon)) < _FARTHEST * (length + 1):  # also if it is NaN
                text = 'a polygon has a coordinate that is not finite or of millions of pixels'
                return Mask('mask-malformed', text)
    except (TypeError, OverflowError):
        return Mask('mask-malformed', 'segmentation is no list of lists of numbers')
    if bad is None:
        return _FINE
    return Mask('polygon-bad', f'a polygon has {bad} coordinates; it is not used')


def _judge_run_lengths(item: dict) -> Mask:
    size, counts = item.get('size'), item.get('counts')
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        return Mask('run-lengths-bad', f'run lengths of size {size!r}')
    if isinstance(counts, str):
        counts = _decompress(counts)
    elif not (isinstance(counts, list) and all(type(count) is int for count in counts)):
        counts = None
    if counts is None or len(counts) == 0:
        return Mask('run-lengths-bad', 'counts of run lengths are neither integers nor a text of them')
    total, least = int(np.sum(counts)), int(np.min(counts))
    if total != size[0] * size[1] or least < 0:
        return Mask('run-lengths-bad', f'run lengths sum to {total}, and {size[0]} x {size[1]} pixels are to be filled')
    return Mask(size=(size[0], size[1]))


def _decompress(text: str) -> np.ndarray | None:
    """Run lengths of COCO's compressed text, (N,) int64; None if it is none.

    Six bits a character from '0' on: five of a number, the lowest first, and whether more follow. Numbers have a sign.
    From the fourth on they are differences to the last but one. (pycocotools reads and writes beyond its buffers on
    texts that are none.)
    """
    if not text or not text.isascii():
        return None
    codes = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    if codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    last = np.flatnonzero(codes & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    if (last - first).max() > 8:  # no run of an image needs 45 bits
        return None
    place = np.arange(len(codes)) - np.repeat(first, last - first + 1)
    numbers = np.add.reduceat((codes & 31) << (5 * place), first)
    numbers -= np.where(codes[last] & 16, 1 << (5 * (last - first + 1)), 0)
    for start in (1, 2):
        numbers[start::2] = np.cumsum(numbers[start::2])
    return numbers
