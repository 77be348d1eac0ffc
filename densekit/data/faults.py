"""What can be wrong with a data set, and how it is told."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Severity = Literal['error', 'warning']


class Kind(NamedTuple):
    """A kind of fault.

    Attributes:
        severity: 'error' if a run would fail, learn or score what is wrong; 'warning' if the loaders drop or pass over
            what is at fault and the rest is used as meant.
        what: in a few words.
    """

    severity: Severity
    what: str


COCO_KINDS: dict[str, Kind] = {
    'json-missing': Kind('error', 'the annotation file is not there'),
    'json-unreadable': Kind('error', 'the annotation file is no JSON, or was cut off'),
    'json-layout': Kind('error', 'the JSON is not laid out as lists of images, annotations and categories'),
    'key-missing': Kind('error', 'an image, annotation or category lacks a key that is read'),
    'id-not-integer': Kind('error', 'an id is no integer'),
    'category-name-twice': Kind('error', 'two categories have one name'),
    'category-id-twice': Kind('error', 'two categories have one id'),
    'class-absent': Kind('error', "a class of the config is none of the file's categories"),
    'classes-default': Kind('error', "the config names no classes, and the file has not the data set type's"),
    'classes-none': Kind('error', "no class of the config is one of the file's categories"),
    'class-unused': Kind('warning', 'a class has no usable annotation to train on'),
    'annotations-none': Kind('error', 'there is no annotation to learn from'),
    'nothing-left': Kind('error', 'the filter of the data set leaves no image'),
    'annotation-id-twice': Kind('error', 'two annotations have one id'),
    'annotation-image-unknown': Kind('warning', 'an annotation belongs to no image of the file, and is not used'),
    'annotation-category-unknown': Kind('error', 'an annotation is of a category that the file does not name'),
    'box-malformed': Kind('error', 'a box is not four numbers, or an area no number'),
    'box-not-finite': Kind('error', 'a box or an area is NaN, infinite or larger than any image'),
    'box-negative': Kind('error', 'a box has a negative width or height'),
    'box-no-area': Kind('warning', 'a box is less than a pixel wide or high, or its area 0; it is not used'),
    'box-outside': Kind('warning', 'a box lies wholly outside its image, and is not used'),
    'box-sticks-out': Kind('warning', 'a box reaches far beyond its image'),
    'mask-missing': Kind('error', 'an annotation has no mask, and the config wants masks'),
    'mask-malformed': Kind('error', 'a segmentation is neither polygons nor run lengths, or its numbers are none'),
    'polygon-bad': Kind('warning', 'a polygon has fewer than 6 or an odd number of coordinates, and is not used'),
    'run-lengths-bad': Kind('error', "run lengths do not fill a mask of the image's size"),
    'image-id-twice': Kind('error', 'two images have one id'),
    'file-name-twice': Kind('warning', 'two images have one file'),
    'image-size-invalid': Kind('error', 'the width or height of an image is no positive integer'),
    'image-all-crowd': Kind('warning', 'an image shows crowds only'),
    'image-nothing-usable': Kind('warning', 'of the annotations of an image none is usable'),
    'image-empty': Kind('warning', 'an image has no annotation, and the config does not say what to do with it'),
    'image-missing': Kind('error', 'the file of an image is not there'),
    'image-unreadable': Kind('error', 'an image cannot be read, or was cut off'),
    'image-size-differs': Kind('error', 'an image is not of the size that the annotations say'),
    'evaluator-differs': Kind('error', 'the evaluator scores other images than the data set has'),
    'heads-differ': Kind('error', 'a head of the model has another number of classes than the data set'),
}

LABEL_MAP_KINDS: dict[str, Kind] = {
    'images-none': Kind('error', 'no image with the suffix asked for'),
    'labels-none': Kind('error', 'no image has a label map: another suffix or folder'),
    'label-missing': Kind('error', 'an image has no label map'),
    'label-unreadable': Kind('error', 'a label map cannot be read, or was cut off'),
    'label-size-differs': Kind('error', 'a label map is not of the size of its image'),
    'label-out-of-range': Kind('error', 'a label map has a value that is no class and is not ignored'),
    'label-deep': Kind('error', 'a label map has more than 8 bits, which wrap'),
    'label-scaled': Kind('error', 'a label map of less than 8 bits, whose values are stretched on loading'),
    'label-float': Kind('error', 'a label map of fractions, which are cut off'),
    'label-coloured': Kind('error', 'a label map has several channels'),
    'label-lossy': Kind('error', 'a label map was compressed with losses'),
    'label-all-ignored': Kind('warning', 'every pixel of a label map is ignored'),
    'class-unseen': Kind('warning', 'a class is in no label map'),
    'classes-unknown': Kind('error', 'the classes of the config do not fit the data set'),
    'image-unreadable': COCO_KINDS['image-unreadable'],
    'image-missing': COCO_KINDS['image-missing'],
    'heads-differ': COCO_KINDS['heads-differ'],
}

KINDS = COCO_KINDS | LABEL_MAP_KINDS


@dataclass(frozen=True)
class Fault:
    """Something wrong with a data set.

    Attributes:
        kind: key of :data:`KINDS`.
        file: the file at fault: annotations, an image or a label map.
        id: in that file: of an annotation, image or category, or the name of a class; None if it is the file itself.
        text: what is wrong, with the values found.
        severity: 'error' or 'warning', see :class:`Kind`.
    """

    kind: str
    file: str
    id: int | str | None
    text: str
    severity: Severity


def fault(kind: str, file: str, id: int | str | None, text: str, severity: Severity | None = None) -> Fault:
    """A fault of the usual severity of its kind unless another is given; texts from the data are made printable."""
    return Fault(kind, printable(file), id, printable(text), severity or KINDS[kind].severity)


def printable(text: str) -> str:
    """Text of a file given to us, with escapes for what no terminal or file takes."""
    return text.encode('utf-8', 'backslashreplace').decode()


def describe(faults: Sequence[Fault], limit: int = 3) -> str:
    """The faults in words, by file and kind, errors first.

    Args:
        faults: of any severity.
        limit: how many of one kind are told one by one; the rest is counted.

    Returns:
        Several lines; empty without faults.
    """
    groups: dict[tuple[Severity, str], list[Fault]] = {}
    for found in sorted(faults, key=lambda f: f.severity != 'error'):
        groups.setdefault((found.severity, found.kind), []).append(found)
    lines = []
    for (severity, kind), members in groups.items():
        lines.append(f'{severity}, {len(members):,} x {kind}: {KINDS[kind].what}')
        lines += [f'    {member.file}: {member.text}' for member in members[:limit]]
        if len(members) > limit:
            lines.append(f'    and {len(members) - limit:,} more')
    return '\n'.join(lines)


def raise_for(faults: Iterable[Fault]) -> None:
    """Refuses to go on with data that has errors; warnings pass.

    Args:
        faults: as :func:`densekit.data.checks.check_data` finds them.

    Raises:
        ValueError: if any of them is an error; the first few of each kind with file and id, the rest counted.
    """
    errors = [found for found in faults if found.severity == 'error']
    if errors:
        raise ValueError(
            f'the data has {len(errors):,} faults by which training or its scores would go wrong:\n'
            f'{describe(errors)}\nCorrect the files or the config. `python tools/check_data.py CONFIG --json FILE` '
            'lists every fault.'
        )


def count_kinds(faults: Iterable[Fault]) -> Mapping[tuple[Severity, str], int]:
    """How many faults there are of each severity and kind, errors first."""
    counts: dict[tuple[Severity, str], int] = {}
    for found in faults:
        key = (found.severity, found.kind)
        counts[key] = counts.get(key, 0) + 1
    return dict(sorted(counts.items()))
