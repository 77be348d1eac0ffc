"""mIoU from one exact table of counts, to which every pixel contributes or is an error."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_reduce, get_dist_info
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from mmengine.registry import METRICS
from PIL import Image
from torch import Tensor

from densekit.data.sampling import SampleError
from densekit.report.tables import format_table

IOU_METRICS = ('mIoU', 'mDice', 'mFscore')


def label_counts(predicted: Tensor, truth: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Counts the pixels of an image by true and predicted class, on its device and without waiting for it.

    ``torch.bincount`` would do, but waits for a GPU to tell it the largest value.

    Args:
        predicted: ``(H, W)`` label map.
        truth: ``(H, W)`` label map, on the same device.
        num_classes: C; labels are 0 to C - 1.
        ignore_index: label of the pixels that do not count.

    Returns:
        ``(C * C + 1,)`` int64, entry ``truth * C + predicted`` and at last the pixels that do not count or cannot be
        counted; and ``(4,)`` int64, lowest and highest label of the truth but for ``ignore_index``, then of the
        prediction.
    """
    predicted, truth = predicted.long().flatten(), truth.long().flatten()
    ignored = truth == ignore_index
    known = torch.where(ignored, 0, truth)
    inside = (known >= 0) & (known < num_classes) & (predicted >= 0) & (predicted < num_classes)
    index = torch.where(inside & ~ignored, known * num_classes + predicted, num_classes**2)
    counts = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, index, torch.ones_like(index)), torch.stack([*known.aminmax(), *predicted.aminmax()])


def class_scores(confusion: np.ndarray, metrics: Sequence[str] = ('mIoU',), beta: float = 1) -> dict[str, np.ndarray]:
    """The scores of each class.

    Args:
        confusion: ``(C, C)`` pixels of each true class (row) by predicted class (column).
        metrics: any of ``IOU_METRICS``.
        beta: weight of recall in Fscore.

    Returns:
        ``(C,)`` float64 in [0, 1] by name, as mmseg's IoUMetric names them, and aAcc without an axis. NaN where a
        class has no pixels to be judged by.
    """
    both, truth, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    with np.errstate(divide='ignore', invalid='ignore'):
        scores = {'aAcc': np.asarray(both.sum() / truth.sum())}
        recall, precision = both / truth, both / predicted
        for metric in metrics:
            if metric == 'mIoU':
                scores |= {'IoU': both / (truth + predicted - both), 'Acc': recall}
            elif metric == 'mDice':
                scores |= {'Dice': 2 * both / (truth + predicted), 'Acc': recall}
            else:
                fscore = (1 + beta**2) * precision * recall / (beta**2 * precision + recall)
                scores |= {'Fscore': fscore, 'Precision': precision, 'Recall': recall}
    return scores


@METRICS.register_module()
class ExactIoUMetric(BaseMetric):
    """What mmseg's IoUMetric computes, without dropping a label that is out of range.

    Counts are whole numbers of 64 bits in one table of true by predicted classes, on the device of the predictions,
    which is waited for once at the end. Several processes add up their tables and get the figure of one, to the last
    digit; images that the sampler repeats to give each process as many count once.

    Args:
        ignore_index: label of the pixels that do not count.
        iou_metrics: any of 'mIoU', 'mDice' and 'mFscore', or one of them.
        nan_to_num: in place of the score of a class that is nowhere; by default such a class is left out of the mean.
        beta: weight of recall in Fscore.
        collect_device: as mmengine's metrics take it. Makes no difference: nothing but the table is collected.
        output_dir: folder to write the predictions to, a PNG of labels each; those of a data set with
            ``reduce_zero_label`` count from 1, as its test server wants them.
        format_only: write them and compute nothing, where there is no ground truth.
        prefix: of the names of the metrics.

    Attributes:
        confusion: ``(C, C)`` int64, pixels of each true class (row) by predicted class, of the last evaluation.

    Raises:
        ValueError: if a metric is unknown, or ``format_only`` comes without ``output_dir``.
    """

    def __init__(
        self,
        ignore_index: int = 255,
        iou_metrics: str | Sequence[str] = ('mIoU',),
        nan_to_num: float | None = None,
        beta: float = 1,
        collect_device: str = 'cpu',
        output_dir: str | None = None,
        format_only: bool = False,
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.metrics = [iou_metrics] if isinstance(iou_metrics, str) else list(iou_metrics)
        unknown = [metric for metric in self.metrics if metric not in IOU_METRICS]
        if unknown or not self.metrics:
            raise ValueError(f'iou_metrics is {iou_metrics!r}; give one or more of {", ".join(IOU_METRICS)}')
        if format_only and not output_dir:
            raise ValueError('format_only=True writes predictions and nothing else; give output_dir, their folder')
        self.ignore_index = ignore_index
        self.nan_to_num = nan_to_num
        self.beta = beta
        self.output_dir = Path(output_dir) if output_dir else None
        self.format_only = format_only
        self.confusion: np.ndarray | None = None
        self._written: dict[str, str] = {}
        self._forget()

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Counts the pixels of a batch.

        Args:
            data_batch: not used.
            data_samples: the model's output: ``pred_sem_seg``, ``gt_sem_seg`` and ``img_path`` of each image.

        Raises:
            SampleError: if an image has no ground truth, or one of another size than its prediction.
        """
        for sample in data_samples:
            name = str(sample.get('img_path', f'image {len(self._images)}'))
            predicted = sample['pred_sem_seg']['data'].squeeze(0)
            if not self.format_only:
                self._count(name, predicted, sample)
            if self.output_dir is not None:
                self._write(name, predicted, shift=int(bool(sample.get('reduce_zero_label'))))

    def evaluate(self, size: int) -> dict[str, float]:
        """Adds up all processes and computes the metrics.

        Args:
            size: images in the data set.

        Returns:
            The metrics in %, rounded to two decimals as mmseg rounds them; the same in every process.

        Raises:
            SampleError: if a label is out of range, or not every image was scored, in whatever process.
        """
        if self.format_only:
            print_log(f'Predictions are written to {self.output_dir}', logger='current')
            self._forget()
            return {}
        problem, table = self._problem(size), self._table(size)
        self._forget()
        counts = torch.cat([table, table.new_tensor([bool(problem)])])
        all_reduce(counts)
        if counts[-1]:
            raise SampleError(problem or 'another process cannot score its part; its message says why')
        num_classes = len(self.dataset_meta['classes'])
        self.confusion = counts[: num_classes**2].reshape(num_classes, num_classes).cpu().numpy()
        metrics = self.compute_metrics(self.confusion)
        return {f'{self.prefix}/{name}': value for name, value in metrics.items()} if self.prefix else metrics

    def compute_metrics(self, results: np.ndarray) -> dict[str, float]:
        """Computes the metrics and logs those of each class.

        Args:
            results: ``(C, C)`` pixels of each true class (row) by predicted class.

        Returns:
            Means over the classes, in %.
        """
        scores = class_scores(results, self.metrics, self.beta)
        if self.nan_to_num is not None:
            scores = {name: np.nan_to_num(values, nan=self.nan_to_num) for name, values in scores.items()}
        columns = [name for name in scores if name != 'aAcc']
        rows = [
            [name, *(f'{100 * scores[column][label]:.2f}' for column in columns)]
            for label, name in enumerate(self.dataset_meta['classes'])
        ]
        table = format_table(['class', *columns], rows, align='<' + '>' * len(columns))
        print_log(f'per class results in %:\n{table}', logger='current')
        return {name if name == 'aAcc' else f'm{name}': _mean(values) for name, values in scores.items()}

    def _forget(self) -> None:
        self._counts: Tensor | None = None  # of all images but the last, which may be a repeated one
        self._last: Tensor | None = None
        self._images: list[tuple[str, str]] = []  # paths of image and ground truth
        self._ranges: list[Tensor] = []
        self._written.clear()

    def _count(self, name: str, predicted: Tensor, sample: Mapping[str, Any]) -> None:
        if 'gt_sem_seg' not in sample:
            raise SampleError(
                f'{name} has no ground truth to score against; ExactIoUMetric with format_only=True and output_dir '
                'writes the predictions alone'
            )
        truth = sample['gt_sem_seg']['data'].squeeze(0)
        if truth.shape != predicted.shape:
            raise SampleError(
                f'{name}: the ground truth {sample.get("seg_map_path", "")} is of shape {tuple(truth.shape)}, the '
                f'prediction of {tuple(predicted.shape)}; a label map is one number for each pixel of the image, and '
                "the test pipeline loads it after Resize, at the image's own size"
            )
        num_classes = len(self.dataset_meta['classes'])
        counts, found = label_counts(predicted, truth.to(predicted.device), num_classes, self.ignore_index)
        if self._last is not None:
            self._counts = self._last if self._counts is None else self._counts + self._last
        self._last = counts
        self._images.append((name, str(sample.get('seg_map_path', name))))
        self._ranges.append(found)

    def _table(self, size: int) -> Tensor:
        """The counts of this process.

        Images are dealt out in turn, and those repeated to make the turns come out even are the last of all.
        """
        empty = torch.zeros(len(self.dataset_meta['classes']) ** 2 + 1, dtype=torch.int64)
        counted = [table for table in (self._counts, self._last) if table is not None]
        repeated = len(self._images) - _share(size)
        return sum(counted[: len(counted) - max(repeated, 0)], start=empty.to(counted[0].device) if counted else empty)

    def _problem(self, size: int) -> str:
        """What forbids an evaluation, or nothing."""
        world_size = get_dist_info()[1]
        if len(self._images) not in (_share(size), math.ceil(size / world_size)):
            return (
                f'{len(self._images)} images were scored in this process and {_share(size)} are its part of the '
                f"data set's {size}. Validate with sampler=dict(type='DefaultSampler', shuffle=False) and without "
                'drop_last.'
            )
        num_classes = len(self.dataset_meta['classes'])
        ranges = torch.stack(self._ranges).tolist() if self._ranges else []
        lines = []
        for (image, truth), (lowest, highest, lowest_predicted, highest_predicted) in zip(
            self._images, ranges, strict=True
        ):
            if lowest < 0 or highest >= num_classes:
                lines.append(f'  ground truth {truth} of {image}: labels from {lowest} to {highest}')
            if lowest_predicted < 0 or highest_predicted >= num_classes:
                lines.append(f'  prediction for {image}: labels from {lowest_predicted} to {highest_predicted}')
        if not lines:
            return ''
        shown = lines[:10] + [f'  and {len(lines) - 10} more'] * (len(lines) > 10)
        return (
            f'{len(lines)} label maps cannot be scored: the data set has {num_classes} classes, so that labels are 0 '
            f'to {num_classes - 1}, and {self.ignore_index} where nothing is to be scored.\n'
            + '\n'.join(shown)
            + "\nMend the label maps, the data set's classes or reduce_zero_label, or num_classes of the head."
        )

    def _write(self, name: str, predicted: Tensor, shift: int) -> None:
        assert self.output_dir is not None
        path = self.output_dir / f'{Path(name).stem}.png'
        other = self._written.setdefault(str(path), name)
        if other != name:
            raise SampleError(f'{name} and {other} would both be written to {path}; give images names of their own')
        labels = predicted.cpu().numpy().astype(np.int64) + shift
        if labels.min() < 0 or labels.max() > 255:
            raise SampleError(
                f'{path} cannot be written: a PNG of labels holds 0 to 255, and {name} has {labels.min()} to '
                f'{labels.max()}'
            )
        self.output_dir.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels.astype(np.uint8)).save(path)


def _share(size: int) -> int:
    """How many of a data set's images this process is the one to count."""
    rank, world_size = get_dist_info()
    return max(math.ceil((size - rank) / world_size), 0)


def _mean(values: np.ndarray) -> float:
    """In %, over the classes that have a score; NaN if none has."""
    scored = values[~np.isnan(values)]
    return float(np.round(scored.mean() * 100, 2)) if scored.size else math.nan
