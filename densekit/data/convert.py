"""Makes COCO annotation files of Pascal VOC's XML, YOLO's text files and LabelMe's JSON.

hotcoco reads the first two as well; the tests compare with it. It is not used, because it stops at the first wrong
file, leaves the suffix out of the file names of YOLO's images, and reads no polygons and none of LabelMe's files.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from densekit.cli import check_writable
from densekit.data.image_files import probe
from densekit.files import write_whole

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
_TOLD = 10  # wrong files


@dataclass
class Shape:
    """An annotated object.

    Attributes:
        category: name of its class.
        box: x, y, width and height in pixels, continuous: the first pixel spans 0 to 1.
        polygons: outlines, each [x1, y1, x2, y2, ...] in pixels; empty without a mask.
        crowd: whether it is neither learned nor scored.
    """

    category: str
    box: tuple[float, float, float, float]
    polygons: list[list[float]] = field(default_factory=list)
    crowd: bool = False

    @property
    def area(self) -> float:
        """Of the polygons, or of the box where there is none, in pixels."""
        return sum(map(polygon_area, self.polygons)) or self.box[2] * self.box[3]


@dataclass
class Images:
    """The image files below a folder, found by their path or their name.

    Attributes:
        root: the folder.
        paths: of all images, relative to it, ascending.
    """

    root: Path
    paths: list[str]

    def __post_init__(self) -> None:
        self._known = set(self.paths)
        self._by_name: dict[str, list[str]] = {}
        for path in self.paths:
            for key in (Path(path).name, Path(path).stem):
                self._by_name.setdefault(key, []).append(path)

    def find(self, *names: str) -> str:
        """The image that the first of some paths or names leads to, relative to the folder.

        Raises:
            ValueError: if there is none, or several.
        """
        for name in names:
            name = name.replace('\\', '/')
            if name in self._known:
                return name
            found = self._by_name.get(name.rpartition('/')[2], [])
            if len(found) > 1:
                raise ValueError(f'{len(found)} images below {self.root} are named so: {", ".join(found[:3])}')
            if found:
                return found[0]
        raise ValueError(f'its image {names[0]} is not below {self.root}')


def image_files(folder: str | os.PathLike, kind: str = 'images') -> Images:
    """The images below a folder.

    Args:
        folder: path.
        kind: what they are, for messages.

    Raises:
        FileNotFoundError: if it is no folder, or holds none.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f'folder of {kind} {folder}: {"it is a file" if root.exists() else "no such folder"}')
    paths = sorted(path for path in _files(root) if path.lower().endswith(SUFFIXES))
    if not paths:
        raise FileNotFoundError(f'folder of {kind} {folder}: no file in it ends in {", ".join(SUFFIXES)}')
    return Images(root, paths)


def annotation_files(folder: str | os.PathLike, suffix: str) -> list[Path]:
    """The files of a suffix below a folder, ascending.

    Raises:
        FileNotFoundError: if it is no folder, or holds none.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f'folder of annotations {folder}: no such folder')
    found = sorted(root / path for path in _files(root) if path.lower().endswith(suffix))
    if not found:
        raise FileNotFoundError(f'folder of annotations {folder}: no file in it ends in {suffix}')
    return found


def _files(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root, onerror=_unreadable, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith('.')]
        for name in names:
            if not name.startswith('.'):
                yield Path(folder, name).relative_to(root).as_posix()


def _unreadable(error: OSError) -> None:
    """Without this os.walk passes over folders."""
    raise type(error)(f'folder {error.filename} cannot be read: {error.strerror}') from error


class Conversion:
    """Gathers images, their objects, and what is wrong with the files on the way.

    Args:
        images: that the annotations are of.
        classes: names in the order of their ids; None to take those that occur, in alphabetical order.
    """

    def __init__(self, images: Images, classes: Sequence[str] | None = None) -> None:
        self.images = images
        self.classes = classes
        self.faults: list[str] = []
        self.remarks: list[str] = []
        self._found: dict[str, tuple[tuple[int, int], list[Shape], Path]] = {}

    def size(self, image: str) -> tuple[int, int]:
        """Width and height of an image in pixels, turned as its EXIF data say, as loaders do.

        Raises:
            ValueError: if it cannot be read.
        """
        found = probe(str(self.images.root / image), False)
        if found.problem:
            raise ValueError(f'its image {self.images.root / image} cannot be read: {found.problem}')
        return found.loaded_size(True)

    def add(self, image: str, size: tuple[int, int], shapes: list[Shape], source: Path) -> None:
        """Adds an image and its objects, as one annotation file has them.

        Raises:
            ValueError: if another file has the same image, or an object is of no class that was given.
        """
        if image in self._found:
            raise ValueError(f'it is of image {image}, and so is {self._found[image][2]}')
        for shape in shapes:
            if self.classes is not None and shape.category not in self.classes:
                raise ValueError(f'{shape.category!r} is none of the classes: {", ".join(self.classes)}')
        self._found[image] = (size, shapes, source)

    def each(self, files: Sequence[Path], read: Callable[[Path], None]) -> None:
        """Reads every file; what is wrong with one is kept, and the next is read."""
        for path in files:
            try:
                read(path)
            except (ValueError, OSError) as error:
                self.faults.append(f'{path}: {error}')

    def result(self) -> dict:
        """COCO's images, annotations and categories; ids count from 1.

        Raises:
            ValueError: naming the files that are wrong, if any is.
        """
        if self.faults:
            more = f'\n  and {len(self.faults) - _TOLD:,} more' if len(self.faults) > _TOLD else ''
            told = '\n  '.join(self.faults[:_TOLD])
            raise ValueError(f'{len(self.faults):,} annotation files cannot be converted:\n  {told}{more}')
        names = self.classes or sorted({shape.category for _, shapes, _ in self._found.values() for shape in shapes})
        ids = {name: number for number, name in enumerate(names, start=1)}
        images: list[dict] = []
        annotations: list[dict] = []
        for path, ((width, height), shapes, _) in sorted(self._found.items()):
            images.append({'id': len(images) + 1, 'file_name': path, 'width': width, 'height': height})
            for shape in shapes:
                entry: dict = {'id': len(annotations) + 1, 'image_id': len(images), 'category_id': ids[shape.category]}
                entry |= {'bbox': list(shape.box), 'area': shape.area, 'iscrowd': int(shape.crowd)}
                annotations.append(entry | ({'segmentation': shape.polygons} if shape.polygons else {}))
        categories = [{'id': number, 'name': name} for name, number in ids.items()]
        return {'images': images, 'annotations': annotations, 'categories': categories}


def polygon_area(polygon: Sequence[float]) -> float:
    """Area of [x1, y1, x2, y2, ...], in squares of its unit."""
    corners = list(zip(polygon[::2], polygon[1::2], strict=True))
    following = [*corners[1:], corners[0]]
    return abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(corners, following, strict=True))) / 2


def box_around(polygons: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
    """The smallest x, y, width and height that hold all corners."""
    xs = [x for polygon in polygons for x in polygon[::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def convert(
    kind: str, annotations: str, images: str | None = None, classes: Sequence[str] | None = None
) -> tuple[dict, list[str]]:
    """Converts a folder of annotations.

    Args:
        kind: 'voc', 'yolo' or 'labelme'.
        annotations: folder of the XML, text or JSON files; those in folders below it count as well.
        images: folder of the images; default that of the annotations.
        classes: names in the order of their ids; for YOLO by default those of the data.yaml or classes.txt that lies
            with the files, for the others those that occur.

    Returns:
        What :func:`json.dump` makes a COCO file of, whose file names are relative to ``images``; and remarks.

    Raises:
        FileNotFoundError: if a folder is missing or empty.
        ValueError: if files are wrong; the message names them.
    """
    from densekit.data.convert_labelme import read_labelme
    from densekit.data.convert_voc import read_voc
    from densekit.data.convert_yolo import class_names, read_yolo

    found = image_files(images or annotations)
    if kind == 'yolo':
        names, source = (classes, None) if classes else class_names(Path(annotations), found.root)
        conversion = Conversion(found, names)
        conversion.remarks += [f'the classes are those of {source}'] if source else []
        read_yolo(conversion, Path(annotations))
    elif kind in ('voc', 'labelme'):
        conversion = Conversion(found, classes)
        (read_voc if kind == 'voc' else read_labelme)(conversion, Path(annotations))
    else:
        raise ValueError(f'format {kind!r}: choose voc, yolo or labelme')
    return conversion.result(), conversion.remarks


def convert_to_file(
    kind: str,
    annotations: str,
    images: str | None,
    out: str,
    classes: Sequence[str] | None = None,
    overwrite: bool = False,
) -> str:
    """As :func:`convert`, into a file; returns what was written, in words.

    Raises:
        ValueError: also if ``out`` is a folder, or is there and ``overwrite`` is not set.
    """
    if Path(out).is_dir():
        raise ValueError(f'--out {out} is a folder; give the name of a file, such as {Path(out, "instances.json")}')
    if Path(out).exists() and not overwrite:
        raise ValueError(f'--out {out} is there already; give another name, or --overwrite')
    check_writable(str(Path(out).parent), '--out')
    content, remarks = convert(kind, annotations, images, classes)
    write_whole(out, json.dumps(content, ensure_ascii=False))
    counts = f'{len(content["images"]):,} images, {len(content["annotations"]):,} objects'
    masks = sum('segmentation' in annotation for annotation in content['annotations'])
    names = ', '.join(category['name'] for category in content['categories'])
    lines = [f'{out}: {counts} ({masks:,} with a mask), classes {names}']
    return '\n'.join([*lines, *remarks])
