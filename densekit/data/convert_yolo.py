"""YOLO's annotations: a text file an image, a line an object; numbers are shares of the image's width and height.

A line is the number of the class, from 0, and the centre, width and height of a box, or the corners of one polygon. An
image without a file, or with an empty one, shows nothing. Folders below ``images`` have their like below ``labels``.
"""

import itertools
import os
from collections import defaultdict
from pathlib import Path

import yaml

from densekit.data.convert import Conversion, Shape, annotation_files, box_around

_YAMLS = ('data.yaml', 'data.yml')
_LISTS = ('classes.txt', 'obj.names', 'labels.txt')
_BEYOND = 1e-6  # the image, in shares of it: what rounding adds


def class_names(labels: Path, images: Path) -> tuple[list[str], Path]:
    """The classes that a data set's own files name.

    They are looked for in the folders of the labels and of the images and up to two above, the nearest first: data.yaml
    and lists of names, then any other .yaml with names, which above the folder that holds both may be another data
    set's and does not count.

    Args:
        labels: folder of the text files.
        images: folder of the images.

    Returns:
        Names by number, and the file that they are from.

    Raises:
        ValueError: if there is no such file, or it does not say.
    """
    starts = [Path(os.path.abspath(folder)) for folder in (labels, images)]
    both = Path(os.path.commonpath(starts))
    skipped = ''
    levels = itertools.zip_longest(*([folder, *folder.parents[:2]] for folder in starts))
    for folder in filter(None, dict.fromkeys(itertools.chain.from_iterable(levels))):
        for path in (folder / name for name in (*_YAMLS, *_LISTS)):
            names = _names_of(path) if path.is_file() else []
            if names:
                return names, path
        for path in sorted([*folder.glob('*.yaml'), *folder.glob('*.yml')]) if folder.is_relative_to(both) else []:
            try:
                names = _names_of(path)
            except ValueError as error:  # it need not have to do with the data
                skipped = f'. Passed over: {error}'
                continue
            if names:
                return names, path
    raise ValueError(
        f'the classes are not known: neither {labels}, {images} nor the folders above have a data.yaml with names or a '
        f'{_LISTS[0]}. Give them in the order of their numbers: --classes NAME NAME ...{skipped}'
    )


def _names_of(path: Path) -> list[str]:
    """Names by number; none if a YAML file has none."""
    try:
        text = path.read_text(encoding='utf-8-sig')
        if path.name in _LISTS:
            return _names_of_list(path, text)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f'{path} cannot be read: {error}') from error
    names = content.get('names') if isinstance(content, dict) else None
    if isinstance(names, dict):
        if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
            raise ValueError(f'{path}: names have the numbers {", ".join(map(str, names))}; they count from 0')
        names = [names[number] for number in sorted(names, key=int)]
    if not isinstance(names or [], list):
        raise ValueError(f'{path}: names is {names!r} and no list')
    return [str(name) for name in names or []]


def _names_of_list(path: Path, text: str) -> list[str]:
    names = [line.strip() for line in text.rstrip().splitlines()]
    if '' in names:
        raise ValueError(
            f'{path}: line {names.index("") + 1} is empty, so that the numbers of the classes are not known'
        )
    return names


def read_yolo(conversion: Conversion, folder: Path) -> None:
    """Adds every image and its text file to a conversion."""
    assert conversion.classes is not None
    found = annotation_files(folder, '.txt')
    labels = {path.relative_to(folder).with_suffix('').as_posix(): path for path in found if path.name not in _LISTS}
    without = 0
    alike: dict[str, list[str]] = defaultdict(list)
    for image in conversion.images.paths:
        alike[Path(image).with_suffix('').as_posix()].append(image)
    for name, images in alike.items():
        path = labels.pop(name, None)
        if path is not None and len(images) > 1:
            conversion.faults.append(f'{path}: it may be of {" or of ".join(images)}; keep one of them')
            continue
        for image in images:
            without += path is None
            source = path or conversion.images.root / image
            conversion.each([source], lambda _, image=image, path=path: _read_file(conversion, image, path))  # type: ignore[misc]
    conversion.faults += [
        f'{path}: there is no image of this name in {conversion.images.root}' for path in labels.values()
    ]
    if without == len(conversion.images.paths):
        raise ValueError(
            f'none of the {without:,} images of {conversion.images.root} has a text file of its name in {folder}, '
            f'there is {found[0].relative_to(folder)}; the first image is {conversion.images.paths[0]}'
        )
    if without:
        conversion.remarks.append(f'{without:,} images have no text file: taken as showing none of the classes')


def _read_file(conversion: Conversion, image: str, path: Path | None) -> None:
    width, height = conversion.size(image)
    shapes = []
    if path is not None:
        for number, line in enumerate(path.read_text(encoding='utf-8-sig').splitlines(), start=1):
            if line.strip():
                try:
                    shapes.append(_shape(line, conversion.classes or (), width, height))
                except ValueError as error:
                    raise ValueError(f'line {number}, {line.strip()[:60]!r}: {error}') from error
    conversion.add(image, (width, height), shapes, path or conversion.images.root / image)


def _shape(line: str, classes, width: int, height: int) -> Shape:
    first, *texts = line.split()
    try:
        number_of_class, numbers = float(first), [float(text) for text in texts]
        label = int(number_of_class)
        if label != number_of_class:
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError('wanted are the number of a class and 4 numbers of a box, or 6 or more of a polygon') from None
    if not 0 <= label < len(classes):
        raise ValueError(f'class {label}; there are 0 to {len(classes) - 1}: {", ".join(classes)}')
    if len(numbers) == 5:
        raise ValueError('a box has 4 numbers; this looks like a prediction, with its score')
    if len(numbers) < 4 or len(numbers) % 2:
        raise ValueError(f'{len(numbers)} numbers; a box has 4, and a polygon an even number from 6 on')
    if not all(-_BEYOND <= number <= 1 + _BEYOND for number in numbers):
        raise ValueError('a number below 0 or above 1; they are shares of the width and height of the image')
    numbers = [min(1.0, max(0.0, number)) for number in numbers]
    if len(numbers) > 4:
        polygon = [number * (height if i % 2 else width) for i, number in enumerate(numbers)]
        return Shape(classes[label], box_around([polygon]), [polygon])
    x, y, w, h = numbers
    return Shape(classes[label], ((x - w / 2) * width, (y - h / 2) * height, w * width, h * height))
