"""pycocotools' evaluation, and hotcoco's in its place: the same arrays in a fraction of the time."""

import contextlib
import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from mmengine.logging import print_log

import densekit.ops  # noqa: F401  importing mmdet needs mmcv's ops

# isort: split
from mmdet.datasets.api_wrappers import COCO, COCOeval, COCOevalMP

ENGINES = ('hotcoco', 'pycocotools')


def choose(engine: str | None) -> str:
    """The engine asked for, or the first that is installed.

    Raises:
        ValueError: if there is no such engine, or it is not installed.
    """
    if engine is None:
        return next(name for name in ENGINES if find_spec(name))
    if engine not in ENGINES:
        raise ValueError(f'engine is {engine!r}; there are {" and ".join(ENGINES)}')
    if not find_spec(engine):
        raise ValueError(f'engine={engine!r} is not installed: pip install {engine}')
    return engine


def load(file: str, engine: str) -> Any:
    """Reads a ground truth.

    Args:
        file: in COCO's format.
        engine: one of ``ENGINES``.

    Returns:
        The engine's COCO object. hotcoco takes whole numbers as ids only: pycocotools' where a file has others.
    """
    if engine == 'hotcoco':
        import hotcoco

        try:
            truth = hotcoco.COCO(file)
        except ValueError as error:
            print_log(f'pycocotools scores, because hotcoco cannot read {file}: {error}', 'current')
        else:
            for warning in truth.load_warnings[:3]:
                print_log(f'{file}: {warning}', 'current')
            return truth
    with contextlib.redirect_stdout(io.StringIO()):  # "creating index..."
        return COCO(file)


def columns(found: Sequence[dict], category_ids: Sequence[int], masks: bool) -> dict[str, Any]:
    """The detections of all images, one below the other.

    Args:
        found: of each image ``img_id``, ``bboxes`` (n, 4) x1, y1, x2, y2, ``scores`` (n,), ``labels`` (n,), and maybe
            ``masks``, run lengths, and ``mask_scores`` (n,), the scores of these.
        category_ids: by label.
        masks: take the masks and their scores.

    Returns:
        ``image`` and ``category``, ids; ``box`` (n, 4) float64 x, y, width, height; ``score`` float64; ``mask``.
    """
    boxes = np.concatenate([result['bboxes'].reshape(-1, 4) for result in found]).astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    scores = [result.get('mask_scores', result['scores']) if masks else result['scores'] for result in found]
    labels = np.concatenate([result['labels'] for result in found]).astype(np.int64)
    return {
        'image': [result['img_id'] for result in found for _ in range(len(result['labels']))],
        'category': np.asarray(category_ids)[labels],
        'box': boxes,
        'score': np.concatenate(scores).astype(np.float64),
        'mask': [rle for result in found for rle in result['masks']] if masks else None,
    }


def score(
    truth: Any,
    detections: dict[str, Any],
    *,
    category_ids: Sequence[int],
    image_ids: Sequence[Any],
    limits: Sequence[int],
    thresholds: np.ndarray,
    by_class: bool = True,
    several_processes: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall.

    Args:
        truth: what :func:`load` gave.
        detections: what :func:`columns` gave; their masks count, if they have them, else their boxes.
        category_ids: that count.
        image_ids: that count.
        limits: on the detections of an image, ascending.
        thresholds: of IoU.
        by_class: compare within a class; False for proposals.
        several_processes: mmdet's form of pycocotools' evaluation, if pycocotools does it.

    Returns:
        Precision ``(thresholds, recalls, classes, areas, limits)``, and recall without the second axis, float64; -1
        where there is nothing to find. Classes are in the order of their ids.
    """
    kind = 'bbox' if detections['mask'] is None else 'segm'
    if isinstance(truth, COCO):
        cls = COCOevalMP if several_processes else COCOeval
        results = _pycocotools_results(truth, detections)
    else:
        from hotcoco import COCOeval as cls

        results = _hotcoco_results(truth, detections)
    with contextlib.redirect_stdout(io.StringIO()):  # "Running per image evaluation..."
        evaluation = cls(truth, results, kind)
        evaluation.params.catIds = sorted(category_ids)
        evaluation.params.imgIds = list(image_ids)
        evaluation.params.maxDets = list(limits)
        evaluation.params.iouThrs = thresholds if isinstance(truth, COCO) else thresholds.tolist()
        evaluation.params.useCats = by_class
        evaluation.evaluate()
        evaluation.accumulate()
    return np.asarray(evaluation.eval['precision']), np.asarray(evaluation.eval['recall'])


def _hotcoco_results(truth: Any, detections: dict[str, Any]) -> Any:
    import hotcoco

    table = np.empty((len(detections['score']), 7))
    table[:, 0], table[:, 1:5] = detections['image'], detections['box']
    table[:, 5], table[:, 6] = detections['score'], detections['category']
    masks = detections['mask']
    results = truth.load_res(table, segmentation=masks)
    if masks:  # small, medium and large go by the areas of the masks
        results.update_anns(ids=np.arange(1, len(masks) + 1), area=hotcoco.mask.area(masks).astype(np.float64))
    return results


def _pycocotools_results(truth: COCO, detections: dict[str, Any]) -> COCO:
    common = zip(detections['image'], detections['category'].tolist(), detections['score'].tolist(), strict=True)
    # pycocotools takes the area of the box where there is one, so that masks have to come without.
    shapes = [{'bbox': box} for box in detections['box'].tolist()]
    if detections['mask'] is not None:
        shapes = [{'segmentation': dict(mask)} for mask in detections['mask']]
    entries = [
        {'image_id': image, 'category_id': category, 'score': score, **shape}
        for (image, category, score), shape in zip(common, shapes, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        if entries:
            return truth.loadRes(entries)
        empty = COCO()
        empty.dataset = {**truth.dataset, 'annotations': []}
        empty.createIndex()
        return empty
