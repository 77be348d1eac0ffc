"""Predictions as a file in COCO's format, written as they come."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from pycocotools import mask as coco_mask

from densekit.files import draft_of
from densekit.predictor import Detections

# COCO numbers its 80 classes from 1 to 90.
_COCO_LEFT_OUT = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


class CocoResults:
    """A JSON file with COCO's ``images``, ``categories`` and ``annotations``, which have a ``score`` in addition.

    ``pycocotools.coco.COCO`` reads the file, ``loadRes`` its ``annotations``. Boxes are x, y, width, height in pixels
    of the image, masks compressed run lengths. Of a label map, each class in it is an annotation, as in COCO's stuff.
    Annotations are written as they come, so that memory does not grow with them; nothing is there under the file's
    name before it is complete. As a context it is completed at the end, also when that comes early.

    Args:
        path: of the file; it and its folder are made with the first image.
        classes: names, by label.
        info: what to say of the file in it.
    """

    def __init__(self, path: str | os.PathLike, classes: Sequence[str], info: dict[str, Any]) -> None:
        self.path = Path(path)
        self.images: list[dict[str, Any]] = []
        self.num_annotations = 0
        self._ids = category_ids(classes)
        categories = [{'id': i, 'name': name} for i, name in zip(self._ids, classes, strict=True)]
        self._head = f'"info": {json.dumps(info)},\n"categories": {json.dumps(categories)}'
        self._draft = draft_of(self.path)
        self._file: TextIO | None = None

    def add(self, found: Detections | np.ndarray, size: tuple[int, ...], **fields: Any) -> None:
        """Adds an image and what was found in it.

        Args:
            found: what the predictor returned for it.
            size: H, W of the image.
            **fields: of the image, such as ``file_name``.
        """
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._draft.open('w', encoding='utf-8')
            self._file.write(f'{{{self._head},\n"annotations": [')
        image_id = len(self.images) + 1
        self.images.append({'id': image_id, **fields, 'height': size[0], 'width': size[1]})
        for annotation in _regions(found) if isinstance(found, np.ndarray) else _objects(found):
            self._file.write(',\n' if self.num_annotations else '\n')
            self.num_annotations += 1
            label = annotation.pop('label')
            named = {'id': self.num_annotations, 'image_id': image_id, 'category_id': self._ids[label]}
            self._file.write(json.dumps({**named, **annotation, 'iscrowd': 0}))

    def __enter__(self) -> 'CocoResults':
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is None:
            return
        images = ',\n'.join(json.dumps(image) for image in self.images)
        try:
            with self._file:
                self._file.write(f'\n],\n"images": [\n{images}\n]}}\n')
            self._draft.replace(self.path)
        finally:  # a disk that is full
            self._draft.unlink(missing_ok=True)


def category_ids(classes: Sequence[str]) -> list[int]:
    """COCO's own numbers for its 80 classes, else counted from 1."""
    if len(classes) == 80 and (classes[0], classes[79]) == ('person', 'toothbrush'):
        return [i for i in range(1, 91) if i not in _COCO_LEFT_OUT]
    return list(range(1, len(classes) + 1))


def _objects(found: Detections) -> list[dict[str, Any]]:
    annotations = []
    for i, (x1, y1, x2, y2) in enumerate(found.boxes.tolist()):
        annotation: dict[str, Any] = {
            'label': found.labels[i],
            'score': round(float(found.scores[i]), 5),
            'bbox': [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)],
            'area': round((x2 - x1) * (y2 - y1), 2),
        }
        if found.masks is not None:
            annotation.update(_run_lengths(found.masks[i]))
        annotations.append(annotation)
    return annotations


def _regions(label_map: np.ndarray) -> list[dict[str, Any]]:
    annotations = []
    for label in np.unique(label_map):
        regions = _run_lengths(label_map == label)
        annotations.append({'label': label, 'bbox': coco_mask.toBbox(regions['segmentation']).tolist(), **regions})
    return annotations


def _run_lengths(mask: np.ndarray | dict[str, Any]) -> dict[str, Any]:
    encoded = mask if isinstance(mask, dict) else coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    segmentation = {'size': list(encoded['size']), 'counts': encoded['counts'].decode()}
    return {'segmentation': segmentation, 'area': int(coco_mask.area(encoded))}
