"""YOLO's annotations: a text file an image, a line an object; numbers are shares of the image's width and height.

A line is the number of the class, from 0, and the centre, width and height of a box, or the corners of one polygon. An
image without a file, or with an empty one, shows nothing. Folders below ``images`` have their like below ``labels``.
"""

import itertools
from pathlib import Path

import yaml

from densekit.data.convert import Conversion, Shape, annotation_files, box_around

_LISTS = ('classes.txt', 'obj.names', 'labels.txt')


def class_names(labels: Path, images: Path) -> list[str]:
    """The classes that a data set's own files name.

    Args:
        labels: folder of the text files.
        images: folder of the images.

    Returns:
        Names by number.

    Raises:
        ValueError: if there is no such file, or it does not say.
    """
    folders = dict.fromkeys(
        itertools.chain.from_iterable([f, *f.parents[:2]] for f in map(Path.absolute, (labels, images)))
    )
    for folder in folders:
        for path in sorted([*folder.glob('*.yaml'), *folder.glob('*.yml')]):
            names = _names_of_yaml(path)
            if names:
                return names
        for path in (folder / name for name in _LISTS):
            if path.is_file():
                return [line.strip() for line in path.read_text(encoding='utf-8').splitlines() if line.strip()]
    raise ValueError(
        f'the classes are not known: neither {labels}, {images} nor the folders above have a .yaml with names or a '
        f'{_LISTS[0]}. Give them in the order of their numbers: --classes NAME NAME ...'
    )


def _names_of_yaml(path: Path) -> list[str]:
    try:
        content = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} is no YAML: {error}') from error
    names = content.get('names') if isinstance(content, dict) else None
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise ValueError(f'{path}: names have the numbers {", ".join(map(str, names))}; they count from 0')
        names = [names[number] for number in range(len(names))]
    return [str(name) for name in names or []]


def read_yolo(conversion: Conversion, folder: Path) -> None:
    """Adds every image and its text file to a conversion."""
    assert conversion.classes is not None
    found = annotation_files(folder, '.txt')
    labels = {path.relative_to(folder).with_suffix('').as_posix(): path for path in found if path.name not in _LISTS}
    without = 0
    for image in conversion.images.paths:
        path = labels.pop(Path(image).with_suffix('').as_posix(), None)
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
        for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), start=1):
            if line.strip():
                try:
                    shapes.append(_shape(line, conversion.classes or (), width, height))
                except ValueError as error:
                    raise ValueError(f'line {number}, {line.strip()[:60]!r}: {error}') from error
    conversion.add(image, (width, height), shapes, path or conversion.images.root / image)


def _shape(line: str, classes, width: int, height: int) -> Shape:
    first, *texts = line.split()
    try:
        label, numbers = int(first), [float(text) for text in texts]
    except ValueError:
        raise ValueError('wanted are the number of a class and 4 numbers of a box, or 6 or more of a polygon') from None
    if not 0 <= label < len(classes):
        raise ValueError(f'class {label}; there are 0 to {len(classes) - 1}: {", ".join(classes)}')
    if len(numbers) == 5:
        raise ValueError('a box has 4 numbers; this looks like a prediction, with its score')
    if len(numbers) < 4 or len(numbers) % 2:
        raise ValueError(f'{len(numbers)} numbers; a box has 4, and a polygon an even number from 6 on')
    if not all(0 <= number <= 1 for number in numbers):
        raise ValueError('a number below 0 or above 1; they are shares of the width and height of the image')
    if len(numbers) > 4:
        polygon = [number * (height if i % 2 else width) for i, number in enumerate(numbers)]
        return Shape(classes[label], box_around([polygon]), [polygon])
    x, y, w, h = numbers
    return Shape(classes[label], ((x - w / 2) * width, (y - h / 2) * height, w * width, h * height))
