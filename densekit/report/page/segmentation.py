"""How well a segmentor labels pixels: figures, confusion, images."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from densekit.evaluation.iou import class_scores, label_counts
from densekit.predictor import colours_for
from densekit.report.page.gallery import Shown, worst_and_best
from densekit.report.page.markup import MAX_SIDE, shrink
from densekit.report.page.predictions import Predictions
from densekit.report.pictures import draw_label_map, read_image


@dataclass
class Segmentation:
    """All that the page says about a segmentor.

    Attributes:
        source: where the predictions come from.
        images: that were evaluated.
        total: that there are.
        classes: names, by label.
        confusion: ``(C, C)`` pixels of each true class by predicted class.
        scores: ``(C,)`` fractions by name, IoU and Acc; aAcc without an axis; NaN where a class has no pixels.
        found: of each image its name and mean IoU, worst image first.
        worst: images.
        best: images.
    """

    source: str
    images: int
    total: int
    classes: list[str]
    confusion: np.ndarray
    scores: dict[str, np.ndarray]
    found: list[tuple[float, int, str]]
    worst: list[Shown] = field(default_factory=list)
    best: list[Shown] = field(default_factory=list)


def segmentation(predictions: Predictions) -> Segmentation:
    """Scores predictions.

    Args:
        predictions: a folder of label maps.

    Raises:
        FileNotFoundError: if an image or a label map is missing.
        ValueError: if the label maps are not of this data set.
    """
    dataset = predictions.dataset
    classes = list(dataset.metainfo['classes'])
    ignore_index = _ignore_index(predictions)
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    found = []
    for index in range(len(dataset)):
        path, truth, predicted = _maps(predictions, index)
        counts = _counts(path, truth, predicted, len(classes), ignore_index)
        confusion += counts
        iou = class_scores(counts)['IoU']
        found.append((float(np.nanmean(iou)) if not np.isnan(iou).all() else 1.0, index, path.name))
    made = Segmentation(
        predictions.source, len(dataset), predictions.total, classes, confusion, class_scores(confusion), sorted(found)
    )
    worst, best = worst_and_best([index for _, index, _ in made.found])
    made.worst, made.best = (
        [_shown(predictions, made, index, ignore_index) for index in indices] for indices in (worst, best)
    )
    return made


def mean(values: np.ndarray) -> float:
    """Over the classes that have a score; NaN if none has."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float('nan')


def _ignore_index(predictions: Predictions) -> int:
    evaluator = predictions.cfg.get('val_evaluator') or {}
    evaluator = evaluator[0] if isinstance(evaluator, list) else evaluator
    return int(evaluator.get('ignore_index', 255))


def _maps(predictions: Predictions, index: int) -> tuple[Path, np.ndarray, np.ndarray]:
    """Path of an image, its true and its predicted label map ``(H, W)``."""
    sample: Any = predictions.dataset[index]['data_samples']
    path = Path(sample.metainfo['img_path'])
    file = predictions.path / f'{path.stem}.png'
    if not file.is_file():
        raise FileNotFoundError(f'{file} does not exist: there is no prediction for {path}')
    if 'gt_sem_seg' not in sample:
        raise ValueError(f'the validation pipeline loads no ground truth for {path}')
    predicted = np.array(Image.open(file)).astype(np.int64)
    if sample.metainfo.get('reduce_zero_label'):
        predicted -= 1  # as they are written for a test server
    return path, sample.gt_sem_seg.data[0].numpy(), predicted


def _counts(path: Path, truth: np.ndarray, predicted: np.ndarray, num_classes: int, ignore_index: int) -> np.ndarray:
    if truth.shape != predicted.shape:
        raise ValueError(f'{path}: the prediction is of shape {predicted.shape}, the ground truth of {truth.shape}')
    counts, ranges = label_counts(torch.from_numpy(predicted), torch.from_numpy(truth), num_classes, ignore_index)
    low, high = int(ranges[[0, 2]].min()), int(ranges[[1, 3]].max())
    if low < 0 or high >= num_classes:
        raise ValueError(f'{path}: labels from {low} to {high}, and the data set has classes 0 to {num_classes - 1}')
    return counts[:-1].reshape(num_classes, num_classes).numpy()


def _shown(predictions: Predictions, made: Segmentation, index: int, ignore_index: int) -> Shown:
    path, truth, predicted = _maps(predictions, index)
    image = shrink(read_image(path), MAX_SIDE)
    palette = colours_for(made.classes, predictions.dataset.metainfo.get('palette'))

    def draw(labels: np.ndarray) -> np.ndarray:
        small = shrink(labels.astype(np.int16), MAX_SIDE, smooth=False)
        return draw_label_map(image, small, classes=made.classes, palette=palette, ignore_index=ignore_index)

    score = next(score for score, i, _ in made.found if i == index)
    return Shown(path.name, f'mIoU {100 * score:.1f} %', draw(truth), draw(predicted))
