"""The faults of COCO annotation files and of the images they name."""

import difflib
import os.path as osp
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from densekit.data.coco_file import CocoFile
from densekit.data.faults import Fault, Severity, fault, printable
from densekit.data.image_files import SAMPLE, Progress, evenly, missing, probe_all

# A box may reach beyond its image by this many pixels or this share of its side: annotators' tools round.
_BEYOND = (2.0, 0.02)
# As many boxes beyond their images, in number and as a share, have corners where COCO has width and height.
_CORNERS = (10, 0.1)
_LONGEST = 2**31  # pixels; no format has longer sides


@dataclass(frozen=True)
class CocoUse:
    """How a config uses an annotation file.

    Attributes:
        where: the part of the config, such as 'train_dataloader'.
        classes: names by label.
        kind: name of the data set's type.
        default_classes: whether the classes are the type's own because the config names none.
        training: whether it is learned from, not only scored.
        image_prefix: folder of the images; None where they are not local or not read.
        seg_prefix: folder of the panoptic maps, None without.
        filter_empty: ``filter_cfg.filter_empty_gt``, None if the config does not say.
        min_size: ``filter_cfg.min_size`` in pixels.
        masks: whether masks are read.
        scored: whether an evaluator reads the file.
        oriented: whether the loader turns images as EXIF says.
        unopened: why the images are not read, for a remark.
    """

    where: str
    classes: tuple[str, ...]
    kind: str = 'CocoDataset'
    default_classes: bool = False
    training: bool = False
    image_prefix: str | None = None
    seg_prefix: str | None = None
    filter_empty: bool | None = None
    min_size: int = 0
    masks: bool = False
    scored: bool = False
    oriented: bool = True
    unopened: str = ''


class Table:
    """An annotation file as columns: one entry per image or per annotation.

    Attributes:
        file: what it was made of.
        image_id: of images, (I,).
        width: of images in pixels, (I,); NaN where it is no number.
        height: likewise.
        annotation_id: (A,).
        category_id: of annotations, (A,).
        image: index of each annotation's image, (A,); -1 for none.
        box: x, y, width and height in pixels, (A, 4); 0 where they are not finite.
        area: in pixels, (A,); NaN where malformed.
        malformed: indices of annotations whose box or area are no numbers.
        finite: whether box and area are numbers of some size, (A,).
        crowd: (A,).
        ignored: annotations marked to be passed over, (A,).
    """

    def __init__(self, file: CocoFile) -> None:
        self.file = file
        images, annotations = file.images, file.annotations
        self.image_id = _integers(images, 'id')
        self.width, self.height = _numbers(images, 'width')[0], _numbers(images, 'height')[0]
        self.annotation_id = _integers(annotations, 'id')
        self.category_id = _integers(annotations, 'category_id')
        self.image = _positions(self.image_id, _integers(annotations, 'image_id'))
        self.area, no_area = _numbers(annotations, 'area')
        self.box, no_box = _boxes(annotations)
        self.malformed = np.union1d(no_area, no_box)
        self.finite = (np.abs(self.box) < _LONGEST).all(axis=1) & np.isfinite(self.area)
        self.box[~self.finite] = 0  # so that what follows computes with numbers; `finite` is asked first
        self.crowd = np.array([bool(a.get('iscrowd')) for a in annotations], bool)
        self.ignored = np.array([bool(a.get('ignore')) for a in annotations], bool)

    @cached_property
    def image_size(self) -> np.ndarray:
        """Width and height of each annotation's image, (A, 2); NaN where there is none."""
        sizes = np.stack([np.append(self.width, np.nan), np.append(self.height, np.nan)], axis=1)
        return sizes[self.image]

    @cached_property
    def negative(self) -> np.ndarray:
        """(A,)."""
        return self.finite & (self.box[:, 2:] < 0).any(axis=1)

    @cached_property
    def no_area(self) -> np.ndarray:
        """(A,); what mmdet's CocoDataset drops."""
        small = (self.box[:, 2:] < 1).any(axis=1) | (self.area <= 0)
        return self.finite & ~self.negative & small

    @cached_property
    def outside(self) -> np.ndarray:
        """(A,); what mmdet's CocoDataset drops as well."""
        low, high = np.maximum(self.box[:, :2], 0), np.minimum(self.box[:, :2] + self.box[:, 2:], self.image_size)
        return self.finite & ~self.negative & ~self.no_area & (high - low <= 0).any(axis=1)

    @cached_property
    def sticks_out(self) -> np.ndarray:
        """(A,)."""
        slack = np.maximum(_BEYOND[0], _BEYOND[1] * self.image_size)
        low, high = self.box[:, :2], self.box[:, :2] + self.box[:, 2:]
        beyond = ((low < -slack) | (high > self.image_size + slack)).any(axis=1)
        return self.finite & ~self.negative & ~self.no_area & ~self.outside & beyond

    @cached_property
    def usable(self) -> np.ndarray:
        """(A,); without regard to the category."""
        return self.finite & ~self.negative & ~self.no_area & ~self.outside & (self.image >= 0) & ~self.ignored

    def name(self, i: int) -> str:
        """An annotation, for messages."""
        annotation = self.file.annotations[i]
        noun = 'segment' if self.file.panoptic else 'annotation'
        return f'{noun} {annotation["id"]} of image {annotation["image_id"]}'


@dataclass
class Findings:
    """What the checks of one use of a file found.

    Attributes:
        faults: all of them.
        images: number of images.
        without: number of images without an annotation of the classes.
        boxes: number of usable annotations of the classes.
        classes: number of usable annotations by class.
        image_ids: of the file, ascending.
        remarks: what is not at fault and good to know.
    """

    faults: list[Fault] = field(default_factory=list)
    images: int = 0
    without: int = 0
    boxes: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    image_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    remarks: list[str] = field(default_factory=list)


def check_file(table: Table) -> list[Fault]:
    """The faults of a file that do not depend on how it is used."""
    faults = list(table.file.faults)
    faults += _twice(table)
    faults += _image_faults(table)
    faults += _annotation_faults(table)
    faults += _mask_faults(table)
    return faults


def check_use(
    table: Table, use: CocoUse, *, headers: bool = False, decode: bool = False, progress: Progress | None = None
) -> Findings:
    """The faults of a file for a data set or an evaluator of a config.

    Args:
        table: the file.
        use: how it is used.
        headers: open every image, not only some spread over all.
        decode: decode every image.
        progress: see :func:`densekit.data.image_files.probe_all`.

    Returns:
        The faults that :func:`check_file` does not find, and counts.
    """
    found = Findings(images=len(table.image_id), image_ids=np.sort(table.image_id))
    found.faults += _class_faults(table.file, use)
    names = {category['id']: str(category['name']) for category in table.file.categories}
    of_class = np.isin(table.category_id, [i for i, name in names.items() if name in use.classes])
    found.classes = dict.fromkeys(use.classes, 0)
    for category, count in Counter(table.category_id[of_class & table.usable].tolist()).items():
        found.classes[names[category]] += count
    found.boxes = sum(found.classes.values())
    with_any = np.bincount(table.image[of_class & (table.image >= 0)], minlength=found.images) > 0
    found.without = int((~with_any).sum())
    found.faults += _content_faults(table, use, of_class, with_any, found)
    found.faults += _read_faults(table, use, of_class)
    others = sorted(set(names.values()) - set(use.classes))
    if others and len(others) < len(names):
        found.remarks.append(printable(f'categories that are no class of the config: {_some(others)}'))
    if use.unopened:
        found.remarks.append(use.unopened)
    if use.image_prefix is not None:
        found.faults += _file_faults(table, use, headers, decode, progress)
    return found


def _integers(entries: Sequence[dict], key: str) -> np.ndarray:
    return np.fromiter((entry[key] for entry in entries), np.int64, len(entries))


def _numbers(entries: Sequence[dict], key: str) -> tuple[np.ndarray, list[int]]:
    """A column of numbers, (N,), and the indices of what is none, which is NaN."""
    values = [entry[key] for entry in entries]
    odd = [i for i, value in enumerate(values) if type(value) is not float and type(value) is not int]
    for i in odd:
        values[i] = np.nan
    return np.array(values, np.float64), odd


def _boxes(entries: Sequence[dict]) -> tuple[np.ndarray, list[int]]:
    """Boxes, (N, 4), and the indices of what is none, which is NaN."""
    values = [entry['bbox'] for entry in entries]
    odd = [i for i, box in enumerate(values) if not _is_box(box)]
    for i in odd:
        values[i] = [np.nan] * 4
    return np.array(values, np.float64).reshape(-1, 4), odd


def _is_box(box: object) -> bool:
    return type(box) is list and len(box) == 4 and _NUMBERS.issuperset(map(type, box))


_NUMBERS = frozenset((int, float))


def _positions(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each wanted id its index in ``ids``, -1 where it is not."""
    if not len(ids):
        return np.full(len(wanted), -1)
    order = np.argsort(ids, kind='stable')
    places = np.minimum(np.searchsorted(ids[order], wanted), len(ids) - 1)
    return np.where(ids[order][places] == wanted, order[places], -1)


def _some(names: Sequence[object], limit: int = 5) -> str:
    return ', '.join(map(str, names[:limit])) + (f' and {len(names) - limit:,} more' if len(names) > limit else '')


def _repeated(values: Iterable) -> list[tuple]:
    """What occurs several times, and how often."""
    return [(value, count) for value, count in Counter(values).items() if count > 1]


def _twice(table: Table) -> Iterator[Fault]:
    file = table.file
    for kind, values in (
        ('image-id-twice', table.image_id.tolist()),
        ('category-id-twice', [category['id'] for category in file.categories]),
        ('annotation-id-twice', [] if file.panoptic else table.annotation_id.tolist()),
    ):
        noun = kind.split('-')[0]
        for value, count in _repeated(values):
            yield fault(kind, file.path, value, f'{count} {noun} entries have the id {value}')
    for name, _ in _repeated(str(category['name']) for category in file.categories):
        ids = [category['id'] for category in file.categories if str(category['name']) == name]
        yield fault('category-name-twice', file.path, name, f'{name!r} is the name of the categories {_some(ids)}')
    users: dict[str, list[int]] = {}
    for image in file.images:
        users.setdefault(str(image['file_name']), []).append(image['id'])
    for name, ids in users.items():
        if len(ids) > 1:
            yield fault('file-name-twice', file.path, ids[1], f'{name} is the file of the images {_some(ids)}')


def _image_faults(table: Table) -> Iterator[Fault]:
    sides = np.stack([table.width, table.height], axis=1)
    for i in np.flatnonzero(~((sides >= 1) & (sides == np.floor(sides)) & (sides < _LONGEST)).all(axis=1)):
        image = table.file.images[i]
        yield fault(
            'image-size-invalid',
            table.file.path,
            image['id'],
            f'image {image["id"]} ({image["file_name"]}) is said to be {image["width"]!r} x {image["height"]!r} pixels',
        )


def _annotation_faults(table: Table) -> Iterator[Fault]:
    """What is wrong with boxes, areas and references, each annotation under the first kind that fits."""
    annotations, path = table.file.annotations, table.file.path
    malformed = np.isin(np.arange(len(annotations)), table.malformed)
    known = np.isin(table.category_id, [category['id'] for category in table.file.categories])

    def box(i: int) -> str:
        return f'box {annotations[i]["bbox"]}'

    def with_area(i: int) -> str:
        return f'{box(i)}, area {annotations[i]["area"]!r}'

    def with_size(i: int) -> str:
        width, height = table.image_size[i]
        return f'{box(i)} in an image of {width:g} x {height:g}{hint}'

    beyond = np.count_nonzero(table.sticks_out | table.outside)
    corners = beyond >= _CORNERS[0] and beyond > _CORNERS[1] * len(annotations)
    hint = f'; {beyond:,} of {len(annotations):,} are like this: [x, y, width, height] is wanted, not corners'
    hint = hint if corners else ''
    rows: list[tuple[str, np.ndarray, Callable[[int], str]]] = [
        ('annotation-image-unknown', table.image < 0, lambda i: 'there is no such image in the file'),
        (
            'annotation-category-unknown',
            ~known & ~table.ignored,
            lambda i: f'there is no category {annotations[i]["category_id"]} in the file',
        ),
        ('box-malformed', malformed, with_area),
        ('box-not-finite', ~table.finite & ~malformed, with_area),
        ('box-negative', table.negative, box),
        ('box-no-area', table.no_area, with_area),
        ('box-outside', table.outside, with_size),
        ('box-sticks-out', table.sticks_out, with_size),
    ]
    for kind, wrong, tell in rows:
        severity: Severity | None = 'error' if corners and kind in ('box-outside', 'box-sticks-out') else None
        for i in np.flatnonzero(wrong).tolist():
            yield fault(kind, path, annotations[i]['id'], f'{table.name(i)}: {tell(i)}', severity)


def _mask_faults(table: Table) -> Iterator[Fault]:
    for i, annotation in enumerate(table.file.annotations):
        mask = annotation.get('segmentation')
        if mask is None or (not mask.kind and mask.size is None):
            continue
        if mask.kind:
            yield fault(mask.kind, table.file.path, annotation['id'], f'{table.name(i)}: {mask.problem}')
        elif table.image[i] >= 0 and (mask.size != tuple(table.image_size[i, ::-1])):
            width, height = table.image_size[i]
            yield fault(
                'run-lengths-bad',
                table.file.path,
                annotation['id'],
                f'{table.name(i)}: run lengths of size {list(mask.size)}, and the image is {height:g} high and '
                f'{width:g} wide',
            )


def _class_faults(file: CocoFile, use: CocoUse) -> Iterator[Fault]:
    """The classes of the config that the file does not name."""
    names = [str(category['name']) for category in file.categories]
    absent = [name for name in use.classes if name not in names]
    if not absent:
        return
    has = f'the file has {len(names)}: {_some(names, 10)}'
    if use.default_classes:
        suggestion = ', '.join(map(repr, names[:10])) + (', ...' if len(names) > 10 else '')
        text = (
            f'{use.where} names no classes, so the {len(use.classes)} of {use.kind} count ({_some(use.classes, 3)}), '
            f'of which {len(absent)} are not in the file; {has}. Set metainfo=dict(classes=({suggestion},)) of the '
            'data set, and num_classes of the heads'
        )
        yield fault('classes-default', file.path, absent[0], text)
    elif len(absent) == len(use.classes):
        text = f'none of the {len(absent)} classes of {use.where} ({_some(absent, 10)}) is a category; {has}'
        yield fault('classes-none', file.path, absent[0], text)
    else:
        for name in absent:
            near = difflib.get_close_matches(name, [other for other in names if other not in use.classes], n=1)
            near = near or difflib.get_close_matches(name, names, n=1)
            hint = f'; the nearest is {near[0]!r}' if near else f'; {has}'
            yield fault('class-absent', file.path, name, f'class {name!r} of {use.where} is no category{hint}')


def _content_faults(
    table: Table, use: CocoUse, of_class: np.ndarray, with_any: np.ndarray, found: Findings
) -> Iterator[Fault]:
    """Whether there is something to learn from, in the whole and in each image."""
    path = table.file.path
    if not table.file.readable:
        return
    severity: Severity = 'error' if use.training else 'warning'
    if not len(table.annotation_id):
        yield fault('annotations-none', path, None, f'{use.where} reads it, and it has no annotations', severity)
    elif not found.boxes and any(str(category['name']) in use.classes for category in table.file.categories):
        text = f'none of its {len(of_class):,} annotations can be used for {use.where}'
        yield fault('annotations-none', path, None, text, severity)
    if not use.training:
        return
    kept = np.minimum(table.width, table.height) >= use.min_size
    kept &= with_any if use.filter_empty else True
    if found.boxes and not kept.any():
        text = f'filter_cfg of {use.where} leaves none of {found.images:,} images: min_size is {use.min_size}'
        yield fault('nothing-left', path, None, text)
    named = {str(category['name']) for category in table.file.categories}
    for name, count in found.classes.items():
        if found.boxes and not count and name in named:
            yield fault('class-unused', path, name, f'class {name!r} has no usable annotation in {use.where}')
    objects = of_class & table.usable
    some = np.bincount(table.image[objects], minlength=found.images) > 0
    single = np.bincount(table.image[objects & ~table.crowd], minlength=found.images) > 0
    rows: list[tuple[str, np.ndarray, str]] = [
        ('image-all-crowd', some & ~single, 'shows crowds only, and gives nothing to learn'),
        ('image-nothing-usable', with_any & ~some, 'has annotations, of which none is usable: it counts as background'),
    ]
    if use.filter_empty is None:
        text = 'has no annotation: it counts as background. filter_cfg=dict(filter_empty_gt=...) says what is meant'
        rows.append(('image-empty', ~with_any, text))
    for kind, wrong, text in rows:
        for i in np.flatnonzero(wrong) if found.boxes else ():
            image = table.file.images[i]
            yield fault(kind, path, image['id'], f'image {image["id"]} ({image["file_name"]}) {text}')


def _read_faults(table: Table, use: CocoUse, of_class: np.ndarray) -> Iterator[Fault]:
    """What loaders or evaluators look for in annotations and do not find."""
    annotations, path = table.file.annotations, table.file.path
    if use.masks and not table.file.panoptic:
        for i in np.flatnonzero(of_class & table.usable).tolist():
            if annotations[i].get('segmentation') is None:
                text = f'{table.name(i)} has no segmentation, and {use.where} reads masks'
                yield fault('mask-missing', path, annotations[i]['id'], text)
    if use.scored:
        for i in np.flatnonzero(of_class).tolist():
            if 'iscrowd' not in annotations[i]:
                text = f'{table.name(i)} has no iscrowd, which the evaluator reads'
                yield fault('key-missing', path, annotations[i]['id'], text)


def _file_faults(table: Table, use: CocoUse, headers: bool, decode: bool, progress: Progress | None) -> Iterator[Fault]:
    """Whether the images are there, readable and of the size that is said."""
    images = table.file.images
    paths = [osp.join(use.image_prefix or '', str(image['file_name'])) for image in images]
    absent = set(missing(paths))
    for i in sorted(absent):
        text = f'no such file, for image {images[i]["id"]} of {table.file.path}'
        yield fault('image-missing', paths[i], images[i]['id'], text)
    yield from _panoptic_map_faults(table, use)
    there = [i for i in range(len(paths)) if i not in absent]
    sample = {there[i] for i in evenly(len(there), SAMPLE)}
    chosen = there if headers or decode else sorted(sample)
    probes = probe_all(
        [paths[i] for i in chosen],
        [decode or i in sample for i in chosen],
        title=f'{use.where}: images',
        progress=progress,
    )
    for i, found in zip(chosen, probes, strict=True):
        image = images[i]
        said = (image['width'], image['height'])
        if found.problem:
            yield fault('image-unreadable', paths[i], image['id'], f'image {image["id"]}: {found.problem}')
        elif found.loaded_size(use.oriented) != said:
            turned = ''
            if use.oriented and found.orientation >= 5:
                turned = f' after EXIF orientation {found.orientation}, which the loader follows'
            width, height = found.loaded_size(use.oriented)
            text = f'image {image["id"]} is {width} x {height}{turned}; {table.file.path} says {said[0]} x {said[1]}'
            yield fault('image-size-differs', paths[i], image['id'], text)


def _panoptic_map_faults(table: Table, use: CocoUse) -> Iterator[Fault]:
    if use.seg_prefix is None:
        return
    images = table.file.images
    paths = [osp.join(use.seg_prefix, str(image['file_name']).replace('.jpg', '.png')) for image in images]
    for i in missing(paths):
        text = f'no such file, the panoptic map of image {images[i]["id"]} of {table.file.path}'
        yield fault('image-missing', paths[i], images[i]['id'], text)
