"""What a detector found and missed: figures, curves, errors, images."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from densekit.data.class_order import ids_by_name
from densekit.evaluation import coco_engine
from densekit.evaluation.coco import summary
from densekit.predictor import colours_for
from densekit.report.page.gallery import Shown, worst_and_best
from densekit.report.page.markup import MAX_SIDE, shrink
from densekit.report.page.predictions import Predictions, annotation_file
from densekit.report.pictures import draw_instances, read_image

LIMITS = (1, 10, 100)
THRESHOLDS = np.linspace(0.5, 0.95, 10)
MATCH = 0.5  # IoU from which an object counts as found in an image


@dataclass
class Scores:
    """COCO's figures of boxes or masks.

    Attributes:
        summary: of all classes; fractions, -1 where there is nothing to measure.
        classes: of each class, likewise.
        precision: ``(thresholds, recalls, classes)``, of all sizes at 100 detections an image.
    """

    summary: dict[str, float]
    classes: dict[str, dict[str, float]]
    precision: np.ndarray


@dataclass
class Detection:
    """All that the page says about a detector.

    Attributes:
        source: where the predictions come from.
        images: that were evaluated.
        total: that there are.
        classes: names, by label.
        objects: of each class, crowds not counted.
        scores: by kind, 'bbox' and 'segm'.
        engine: that computed them.
        errors: hotcoco's TIDE errors, or None.
        confusion: ``(C + 1, C + 1)`` objects of each true class by predicted class, the last is background; or None.
        confused: names of its rows.
        health: hotcoco's check of the ground truth, or None.
        found: of each image its name and how many objects were found, invented and missed, worst image first.
        worst: images.
        best: images.
        score_thr: lowest score of the objects that count as predicted in an image.
    """

    source: str
    images: int
    total: int
    classes: list[str]
    objects: dict[str, int]
    scores: dict[str, Scores]
    engine: str
    score_thr: float
    errors: dict[str, Any] | None = None
    confusion: np.ndarray | None = None
    confused: list[str] = field(default_factory=list)
    health: dict[str, Any] | None = None
    found: list['Found'] = field(default_factory=list)
    worst: list[Shown] = field(default_factory=list)
    best: list[Shown] = field(default_factory=list)


@dataclass
class Found:
    """How well an image was predicted; ``overlap`` is the mean IoU of the objects found."""

    index: int
    name: str
    hits: int
    false: int
    missed: int
    overlap: float

    @property
    def f1(self) -> float:
        """1 for an image without objects in which none was found."""
        total = 2 * self.hits + self.false + self.missed
        return 2 * self.hits / total if total else 1.0

    def __str__(self) -> str:
        return f'F1 {self.f1:.2f}: {self.hits} found, {self.false} false, {self.missed} missed'


def detection(predictions: Predictions, score_thr: float) -> Detection:
    """Scores predictions.

    Args:
        predictions: COCO's file of results.
        score_thr: lowest score of the objects that count as predicted in an image.

    Raises:
        FileNotFoundError: if an image or a file is missing.
        ValueError: if the results are not of this data set.
    """
    dataset = predictions.dataset
    file = annotation_file(dataset)
    truth = coco_engine.load(file, coco_engine.choose(None))
    classes = list(dataset.metainfo['classes'])
    category_ids = ids_by_name(classes, truth.cats.values())
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    image_ids = [info['img_id'] for info in infos]
    rows = _rows(predictions.path)
    _check(rows, image_ids, category_ids, str(predictions.path))
    annotations = _by_image(truth, image_ids, category_ids)
    counts = Counter(a['category_id'] for found in annotations.values() for a in found if not a.get('iscrowd'))
    kinds = ['bbox', 'segm'] if rows and all('segmentation' in row for row in rows) else ['bbox']
    made = Detection(
        source=predictions.source,
        images=len(image_ids),
        total=predictions.total,
        classes=classes,
        objects={name: counts[id_] for name, id_ in zip(classes, category_ids, strict=False)},
        scores={kind: _scores(truth, rows, kind, image_ids, category_ids, classes) for kind in kinds},
        engine='pycocotools' if isinstance(truth, coco_engine.COCO) else 'hotcoco',
        score_thr=score_thr,
    )
    if made.engine == 'hotcoco':
        _add_errors(made, truth, rows, image_ids, category_ids)
    _add_images(made, dataset, infos, truth, annotations, rows, category_ids)
    return made


def _rows(path: Path) -> list[dict]:
    keys = {'image_id', 'category_id', 'bbox', 'score'}
    try:
        rows = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is no JSON: {error}') from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and keys <= row.keys() for row in rows):
        raise ValueError(f"{path} is not COCO's file of results, a list of objects with {', '.join(sorted(keys))}")
    return rows


def _check(rows: Sequence[dict], image_ids: Sequence, category_ids: Sequence, file: str) -> None:
    known, categories = set(image_ids), set(category_ids)
    if strange := next((row for row in rows if row['image_id'] not in known), None):
        raise ValueError(f'{file} has results for image {strange["image_id"]}, which is not in the validation set')
    if strange := next((row for row in rows if row['category_id'] not in categories), None):
        raise ValueError(f'{file} has category {strange["category_id"]}, which the validation set does not have')


def _by_image(truth: Any, image_ids: Sequence, category_ids: Sequence) -> dict[Any, list[dict]]:
    annotations: dict[Any, list[dict]] = {image_id: [] for image_id in image_ids}
    categories = set(category_ids)
    for annotation in truth.anns.values():
        if annotation['image_id'] in annotations and annotation['category_id'] in categories:
            annotations[annotation['image_id']].append(annotation)
    return annotations


def _columns(rows: Sequence[dict], kind: str) -> dict[str, Any]:
    """The rows as :func:`densekit.evaluation.coco_engine.score` wants them."""
    name = 'mask_score' if kind == 'segm' else 'score'
    return {
        'image': [row['image_id'] for row in rows],
        'category': np.array([row['category_id'] for row in rows], dtype=np.int64),
        'box': np.array([row['bbox'] for row in rows], dtype=np.float64).reshape(-1, 4),
        'score': np.array([row.get(name, row['score']) for row in rows], dtype=np.float64),
        'mask': [row['segmentation'] for row in rows] if kind == 'segm' else None,
    }


def _scores(
    truth: Any, rows: Sequence[dict], kind: str, image_ids: Sequence, category_ids: Sequence, classes: Sequence[str]
) -> Scores:
    precision, recall = coco_engine.score(
        truth,
        _columns(rows, kind),
        category_ids=category_ids,
        image_ids=image_ids,
        limits=LIMITS,
        thresholds=THRESHOLDS,
    )
    order = [sorted(category_ids).index(id_) for id_ in category_ids]
    precision, recall = precision[:, :, order], recall[:, order]
    by_class = {
        name: summary(precision[:, :, [i]], recall[:, [i]], THRESHOLDS, LIMITS)
        for i, name in enumerate(classes[: len(category_ids)])
    }
    return Scores(summary(precision, recall, THRESHOLDS, LIMITS), by_class, precision[:, :, :, 0, -1])


def _add_errors(made: Detection, truth: Any, rows: Sequence[dict], image_ids: Sequence, category_ids: Sequence) -> None:
    """What hotcoco knows of boxes: error types, confusion, health."""
    from hotcoco import COCOeval

    columns = _columns(rows, 'bbox')
    table = np.column_stack([columns['image'] or np.empty(0), columns['box'], columns['score'], columns['category']])
    evaluation = COCOeval(truth, truth.load_res(table), 'bbox')
    evaluation.params.imgIds, evaluation.params.catIds = list(image_ids), sorted(category_ids)
    evaluation.evaluate()
    made.errors = evaluation.tide_errors()
    confusion = evaluation.confusion_matrix(min_score=made.score_thr)
    made.confusion, made.confused = confusion['matrix'].astype(np.int64), [*confusion['cat_names'], 'background']
    made.health = truth.healthcheck()


def _add_images(
    made: Detection,
    dataset: Any,
    infos: Sequence[dict],
    truth: Any,
    annotations: dict[Any, list[dict]],
    rows: Sequence[dict],
    category_ids: Sequence,
) -> None:
    predicted = defaultdict(list)
    for row in rows:
        if row['score'] >= made.score_thr:
            predicted[row['image_id']].append(row)
    found = [
        Found(i, Path(info['img_path']).name, *match(annotations[info['img_id']], predicted[info['img_id']]))
        for i, info in enumerate(infos)
    ]
    made.found = sorted(found, key=lambda f: (f.f1, f.hits - f.false - f.missed, f.hits, f.overlap))
    palette = colours_for(made.classes, dataset.metainfo.get('palette'))
    labels = {id_: label for label, id_ in enumerate(category_ids)}

    def shown(place: int) -> Shown:
        image = made.found[place]
        info = infos[image.index]
        pixels = read_image(info['img_path'])
        style = {'classes': made.classes, 'palette': palette}
        true, guessed = annotations[info['img_id']], predicted[info['img_id']]
        masks = [np.asarray(truth.annToMask(a)) if a.get('segmentation') else None for a in true]
        drawn = [coco_mask.decode(_rle(row['segmentation'])) if 'segmentation' in row else None for row in guessed]
        return Shown(
            image.name,
            str(image),
            _draw(pixels, true, masks, labels, **style, ignored=[bool(a.get('iscrowd')) for a in true]),
            _draw(pixels, guessed, drawn, labels, **style, scores=[row['score'] for row in guessed]),
        )

    worst, best = worst_and_best(range(len(found)))
    made.worst, made.best = [shown(i) for i in worst], [shown(i) for i in best]


def match(true: Sequence[dict], predicted: Sequence[dict]) -> tuple[int, int, int, float]:
    """Matches the objects of an image within each class, best score first, from IoU 0.5 of the boxes.

    Args:
        true: annotations; crowds count neither as found nor as missed, and excuse what lies in them.
        predicted: results.

    Returns:
        Objects found, invented and missed; mean IoU of those found, 0 if there are none.
    """
    overlaps, false, taken = [], 0, set()
    for row in sorted(predicted, key=lambda row: -row['score']):
        rivals = [i for i, a in enumerate(true) if a['category_id'] == row['category_id']]
        boxes = np.array([true[i]['bbox'] for i in rivals], dtype=np.float64).reshape(-1, 4)
        crowd = [int(bool(true[i].get('iscrowd'))) for i in rivals]
        ious = coco_mask.iou(np.array([row['bbox']], dtype=np.float64), boxes, crowd)[0] if rivals else []
        open_ = [(iou, i) for iou, i, c in zip(ious, rivals, crowd, strict=True) if not c and i not in taken]
        best = max(open_, default=(0.0, -1))
        if best[0] >= MATCH:
            overlaps.append(float(best[0]))
            taken.add(best[1])
        elif not any(c and iou >= MATCH for iou, c in zip(ious, crowd, strict=True)):
            false += 1
    missed = sum(not a.get('iscrowd') for a in true) - len(taken)
    return len(taken), false, missed, float(np.mean(overlaps)) if overlaps else 0.0


def _draw(
    image: np.ndarray,
    objects: Sequence[dict],
    masks: Sequence[np.ndarray | None],
    labels: dict[Any, int],
    *,
    scores: Sequence[float] | None = None,
    ignored: Sequence[bool] | None = None,
    **style: Any,
) -> np.ndarray:
    """Shrinks first and draws then, so that lines and names stay readable."""
    small = shrink(image, MAX_SIDE)
    scale = small.shape[1] / image.shape[1]
    boxes = np.array([o['bbox'] for o in objects], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    drawn = None
    if any(mask is not None for mask in masks):
        empty = np.zeros(image.shape[:2], np.uint8)
        drawn = np.stack([shrink(empty if mask is None else mask, MAX_SIDE, smooth=False) for mask in masks]).astype(
            bool
        )
    return draw_instances(
        small,
        boxes=boxes * scale,
        labels=np.array([labels[o['category_id']] for o in objects], dtype=np.int64),
        masks=drawn,
        scores=None if scores is None else np.array(scores),
        ignored=None if ignored is None else np.array(ignored, dtype=bool),
        **style,
    )


def _rle(segmentation: dict) -> dict:
    counts = segmentation['counts']
    return {'size': segmentation['size'], 'counts': counts.encode() if isinstance(counts, str) else counts}
