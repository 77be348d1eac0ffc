"""A COCO file of one's own and its images: where they are, which classes are in use, which images validate."""

import json
import shlex
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from densekit.data.coco_file import read_coco
from densekit.data.convert import Images, image_files
from densekit.data.faults import Fault

_NAMED = 3  # files, in messages


@dataclass
class CocoData:
    """An annotation file that can be read, and the folder of its images.

    Attributes:
        path: of the file.
        images: the folder.
        content: of the file.
    """

    path: str
    images: str
    content: dict

    @property
    def names(self) -> dict[int, str]:
        """Categories by id, in the order of the file."""
        return {category['id']: str(category['name']) for category in self.content['categories']}

    def of_images(self) -> list[set[int]]:
        """The categories on each image, in the order of the file; crowds do not count."""
        found: dict[int, set[int]] = {image['id']: set() for image in self.content['images']}
        for annotation in self.content.get('annotations', []):
            if annotation['image_id'] in found and not annotation.get('iscrowd'):
                found[annotation['image_id']].add(annotation['category_id'])
        return [found[image['id']] for image in self.content['images']]

    def of_classes(self, classes: Collection[str]) -> 'CocoData':
        """The same with what is annotated as some of the classes; all images stay."""
        ids = {number for number, name in self.names.items() if name in classes}
        annotations = [a for a in self.content.get('annotations', []) if a['category_id'] in ids]
        return CocoData(self.path, self.images, {**self.content, 'annotations': annotations})

    def sides(self) -> np.ndarray:
        """Width and height of the boxes that are no crowds, in pixels, (N, 2)."""
        boxes = [a['bbox'][2:] for a in self.content.get('annotations', []) if not a.get('iscrowd')]
        return np.array(boxes, np.float64).reshape(-1, 2)

    def with_masks(self) -> bool:
        """Whether most objects have a mask."""
        annotations = self.content.get('annotations', [])
        return sum(bool(a.get('segmentation')) for a in annotations) * 2 > len(annotations)

    def part(self, chosen: Sequence[bool]) -> 'CocoData':
        """The same with some of the images and what is annotated in them."""
        images = [image for image, keep in zip(self.content['images'], chosen, strict=True) if keep]
        ids = {image['id'] for image in images}
        annotations = [a for a in self.content.get('annotations', []) if a['image_id'] in ids]
        return CocoData(self.path, self.images, {**self.content, 'images': images, 'annotations': annotations})


def load_coco(path: str, images: str) -> tuple[CocoData | None, list[Fault]]:
    """Reads an annotation file.

    Args:
        path: of a JSON file.
        images: folder of the images.

    Returns:
        The data, None if the file is not laid out as it has to be; and the faults found so far.

    Raises:
        FileNotFoundError: if there is no such folder, no such file, or none of the images is there.
        ValueError: if the file names no images or no categories.
    """
    there = image_files(images)
    if not Path(path).is_file():
        hint = '; for a folder of XML, text or LabelMe files add --format voc, yolo or labelme' * Path(path).is_dir()
        raise FileNotFoundError(f'annotation file {path}: {"it is a folder" if hint else "no such file"}{hint}')
    read = read_coco(path)
    if read.faults:
        return None, read.faults
    with open(path, encoding='utf-8') as file:
        data = CocoData(path, images, json.load(file))
    for section in ('images', 'categories'):
        if not data.content[section]:
            raise ValueError(f'annotation file {path} has no {section}')
    _check_location(data, there)
    return data, []


def _check_location(data: CocoData, there: Images) -> None:
    """Tells apart what makes all images look missing: another folder, folders in it, and another data set."""
    names = [str(image['file_name']) for image in data.content['images']]
    if any(Path(data.images, name).is_file() for name in names):
        return  # those that are missing are told one by one
    found = {}
    for name in names:
        try:
            found[name] = there.find(name)
        except ValueError:
            continue
    above = Path(data.images).resolve().parent
    text = f'none of the {len(names):,} images of {data.path} is in {data.images}: '
    if not found:
        text += f'it names {_some(names)}, and the folder has {_some(there.paths)}. '
        if any(above.joinpath(name).is_file() for name in names):
            raise FileNotFoundError(f'{text}Give the folder above it: --images {above}')
        if {Path(name).name.lower() for name in names} & {Path(path).name.lower() for path in there.paths}:
            raise FileNotFoundError(f'{text}Upper and lower case have to be the same')
        raise FileNotFoundError(f'{text}Is it the annotation file of another data set?')
    folders = {path[: -len(name)] for name, path in found.items() if path.endswith(name)}
    if len(folders) == 1 and len(found) == len(names):
        below = shlex.quote(str(Path(data.images, folders.pop())))
        raise FileNotFoundError(f'{text}they are in a folder below. Give that: --images {below}')
    name, path = next(iter(found.items()))
    if all((above / name).is_file() for name in names[:_NAMED]):
        raise FileNotFoundError(
            f'{text}the names have their folder in front ({name}). Give the folder above: --images {above}'
        )
    raise FileNotFoundError(
        f'{text}{len(found):,} are there under another name, such as {path}, which the file calls {name}. file_name '
        'has to be the path from the folder of the images on, with /'
    )


def _some(names: Sequence[str]) -> str:
    return ', '.join(names[:_NAMED]) + (', ...' if len(names) > _NAMED else '')


def choose(contents: Sequence[set[int]], fraction: float, seed: int) -> list[bool]:
    """Chooses the images that validate, so that every class is in them as often as it can be.

    Images are put in the order of the rarest class on them, at random within it, and every so-manieth is taken.

    Args:
        contents: the classes of each image.
        fraction: to choose, of all images.
        seed: of what is random.

    Returns:
        For each image whether it is chosen. At least one is, and one is not.

    Raises:
        ValueError: if there is one image or none.
    """
    total = len(contents)
    if total < 2:
        raise ValueError(
            f'{total} image cannot be parted into some to train and some to validate; give the latter as well: '
            '--val-images and --val-annotations or --val-masks (the same again shows only whether it learns them)'
        )
    counts = Counter(label for labels in contents for label in labels)
    rarest = [min(((counts[label], label) for label in labels), default=(0, -1)) for labels in contents]
    luck = np.random.default_rng(seed).permutation(total)
    order = sorted(range(total), key=lambda i: (rarest[i], luck[i]))
    number = min(total - 1, max(1, round(fraction * total)))
    chosen = {order[int((i + 0.5) * total / number)] for i in range(number)}
    return [i in chosen for i in range(total)]
