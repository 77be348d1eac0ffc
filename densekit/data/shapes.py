"""Writes the generated "shapes" data set: one set of pictures, described in COCO's and in ADE20K's own format.

Five classes that differ in outline, colour and texture lie on cloudy backgrounds and partly cover each other. Of every
25 images one shows no object, of every 20 one holds a crowd, of every 10 one is crossed by a bar that belongs to no
class. Layout::

    shapes.json                                         the parameters the folder was made with
    coco/annotations/instances_{train,val}.json         boxes and masks; category ids 1 to 5
    coco/{train,val}/000000000001.jpg
    ade/annotations/{training,validation}/ADE_train_00000001.png   0 ignored, 1 background, 2 to 6 the classes
    ade/images/{training,validation}/ADE_train_00000001.jpg        the same file under a second name

Polygons follow the pixel edges of the visible part of an object, so that decoding them gives back exactly the pixels
that ``area``, ``bbox`` and the label map describe.
"""

import json
import os
import shutil
import uuid
from pathlib import Path

import cv2
import numpy as np

from densekit.data.scenes import CLASSES, PALETTE, Scene, render

SEG_CLASSES = ('background', *CLASSES)
SEG_PALETTE = ((120, 120, 120), *PALETTE)

FORMAT = 1  # to be raised whenever the same parameters give other pixels or annotations
MANIFEST = 'shapes.json'
MIN_SIZE = 32
ADE_SPLITS = {'train': 'training', 'val': 'validation'}

JPEG = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]


def _label_map(scene: Scene) -> np.ndarray:
    """ADE20K's labels: 0 ignored (shared pixels and the bar), 1 background, 2 onwards the classes, (H, W) uint8."""
    values = [1, *(0 if item.category is None else item.category + 2 for item in scene.items)]
    return np.where(scene.mixed, 0, np.array(values, np.uint8)[scene.owner]).astype(np.uint8)


def mask_to_polygons(mask: np.ndarray) -> list[list[int]]:
    """Trace the pixel edges around a mask without holes.

    Args:
        mask: boolean, (H, W).

    Returns:
        One polygon ``[x1, y1, x2, y2, ...]`` per connected part; pixel (i, j) spans x from j to j + 1.
    """
    double = mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(double, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    polygons = []
    for contour in contours:
        # A pixel is doubled to the columns 2j and 2j + 1, whose nearest pixel edges are j and j + 1.
        points = (contour[:, 0] + 1) // 2
        points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]
        straight = np.roll(points, 1, axis=0) + np.roll(points, -1, axis=0) == 2 * points
        polygons.append(points[~straight.all(axis=1)].ravel().tolist())
    return polygons


def mask_to_rle(mask: np.ndarray) -> dict:
    """COCO's uncompressed run lengths of a mask (H, W): column by column, first the number of zeros."""
    flat = mask.ravel(order='F')
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return {'counts': [0, *counts] if flat[0] else counts, 'size': list(mask.shape)}


def _annotations(scene: Scene, image_id: int) -> list[dict]:
    """COCO's annotations of a picture, without their ids."""
    annotations = []
    for number, item in enumerate(scene.items, start=1):
        if item.category is None:
            continue
        mask = scene.visible(number)
        xs, ys = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        box = [xs[0], ys[0], xs[-1] + 1 - xs[0], ys[-1] + 1 - ys[0]]
        annotations.append(
            {
                'image_id': image_id,
                'category_id': item.category + 1,
                'iscrowd': int(item.crowd),
                'area': int(mask.sum()),
                'bbox': [int(value) for value in box],
                'segmentation': mask_to_rle(mask) if item.crowd else mask_to_polygons(mask),
            }
        )
    return annotations


def _write_image(path: Path, pixels: np.ndarray, options: list[int] | None = None) -> None:
    done, data = cv2.imencode(path.suffix, pixels, options or [])
    assert done, path
    path.write_bytes(data.tobytes())


def _write_split(root: Path, split: str, count: int, size: int, seed: int) -> None:
    """Write one split in both formats."""
    images: list[dict] = []
    annotations: list[dict] = []
    folders = [root / 'coco' / split, *(root / 'ade' / kind / ADE_SPLITS[split] for kind in ('images', 'annotations'))]
    for folder in folders:
        folder.mkdir(parents=True)
    for index in range(count):
        scene = render(seed, list(ADE_SPLITS).index(split), index, size)
        coco_image = folders[0] / f'{index + 1:012d}.jpg'
        ade_name = f'ADE_{split}_{index + 1:08d}'
        pixels = np.clip(np.rint(scene.picture[..., ::-1] * 255), 0, 255).astype(np.uint8)
        _write_image(coco_image, pixels, JPEG)
        _write_image(folders[2] / f'{ade_name}.png', _label_map(scene))
        try:
            os.link(coco_image, folders[1] / f'{ade_name}.jpg')
        except OSError:  # a file system without hard links
            shutil.copyfile(coco_image, folders[1] / f'{ade_name}.jpg')
        images.append({'id': index + 1, 'file_name': coco_image.name, 'height': size, 'width': size})
        for annotation in _annotations(scene, index + 1):
            annotations.append({'id': len(annotations) + 1, **annotation})
    content = {
        'info': {'description': 'densekit shapes', 'version': str(FORMAT)},
        'licenses': [],
        'images': images,
        'annotations': annotations,
        'categories': [{'id': i, 'name': name, 'supercategory': 'shape'} for i, name in enumerate(CLASSES, start=1)],
    }
    file = root / 'coco' / 'annotations' / f'instances_{split}.json'
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, separators=(',', ':')), encoding='utf-8')


def _is_there(root: Path, wanted: dict) -> bool:
    """Whether ``root`` holds the wanted data set; False if it is missing or empty, an error if it holds another."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / MANIFEST).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        found = f'no readable {MANIFEST}'
    if found == wanted:
        return True
    raise ValueError(
        f'{root} is not the shapes data set asked for: it holds {found}, asked for was {wanted}. '
        'Delete this folder to have it generated anew, or choose another data_root.'
    )


def generate_shapes(
    root: str | os.PathLike, *, num_train: int = 2000, num_val: int = 100, size: int = 96, seed: int = 0
) -> Path:
    """Write the shapes data set to ``root`` unless it is there already.

    The same arguments give the same bytes; image i does not depend on the number of images. Several processes may call
    this at once: each writes to a folder of its own beside ``root``, and the first to finish moves it into place.

    Args:
        root: folder to write; see the module's docstring for what is in it.
        num_train: number of training images.
        num_val: number of validation images.
        size: height and width of the images in pixels.
        seed: seed of everything random.

    Returns:
        The resolved path of ``root``.

    Raises:
        ValueError: if an argument is out of range, or ``root`` holds something else.
    """
    if min(num_train, num_val) < 1 or size < MIN_SIZE or seed < 0:
        raise ValueError(
            f'shapes: num_train={num_train}, num_val={num_val}, size={size}, seed={seed} given; '
            f'allowed are numbers of images >= 1, size >= {MIN_SIZE} and seed >= 0'
        )
    manifest = {'format': FORMAT, 'num_train': num_train, 'num_val': num_val, 'size': size, 'seed': seed}
    root = Path(root).resolve()
    if _is_there(root, manifest):
        return root
    draft = root.with_name(f'.{root.name}-{uuid.uuid4().hex}')
    try:
        draft.mkdir(parents=True)
        _write_split(draft, 'train', num_train, size, seed)
        _write_split(draft, 'val', num_val, size, seed)
        (draft / MANIFEST).write_text(json.dumps(manifest), encoding='utf-8')
        try:
            draft.rename(root)
        except OSError:  # root is no longer empty: another process was faster, or this is an error of its own
            if not _is_there(root, manifest):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return root
