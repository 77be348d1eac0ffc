"""COCO's metrics for boxes and masks: pycocotools' figures to the last bit, from hotcoco where it is installed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_dist_info
from mmengine.fileio import get_local_path
from mmengine.logging import print_log
from mmengine.registry import METRICS

import densekit.ops  # noqa: F401  importing mmdet needs mmcv's ops

# isort: split
from mmdet.evaluation import CocoMetric

from densekit.data.class_order import ids_by_name
from densekit.engine.distributed import from_first
from densekit.evaluation import coco_engine
from densekit.evaluation.gather import gather_bytes, pack, unpack
from densekit.evaluation.rle import RleMasks, encode
from densekit.report.tables import format_table

PRECISIONS = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
STOCK_FIGURES = (*PRECISIONS, 'AR@100', 'AR@300', 'AR@1000', 'AR_s@1000', 'AR_m@1000', 'AR_l@1000')
CLASS_COLUMNS = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl')


def average(values: np.ndarray) -> float:
    """The mean of what COCO could measure, as pycocotools computes it; -1 if there is nothing."""
    known = values[values > -1]
    return float(np.mean(known)) if known.size else -1.0


def summary(
    precision: np.ndarray, recall: np.ndarray, thresholds: np.ndarray, limits: Sequence[int]
) -> dict[str, float]:
    """COCO's twelve figures, as pycocotools 2.0.11 computes them (cocoeval.py, ``_summarizeDets``).

    Args:
        precision: ``(thresholds, recalls, classes, areas, limits)``; areas are all, small, medium, large.
        recall: ``(thresholds, classes, areas, limits)``.
        thresholds: of IoU.
        limits: on the detections of an image, ascending. AP is at 100 of them, and -1 if that is no limit; all other
            figures but two AR are at the highest.

    Returns:
        Fractions, -1 where there is nothing to measure.
    """
    hundred = [i for i, limit in enumerate(limits) if limit == 100]
    figures = [
        precision[:, :, :, 0, hundred],
        precision[thresholds == 0.5, :, :, 0, -1],
        precision[thresholds == 0.75, :, :, 0, -1],
        *(precision[:, :, :, area, -1] for area in (1, 2, 3)),
        *(recall[:, :, 0, limit] for limit in range(len(limits))),
        *(recall[:, :, area, -1] for area in (1, 2, 3)),
    ]
    return {name: average(values) for name, values in zip(figure_names(limits), figures, strict=True)}


def figure_names(limits: Sequence[int]) -> list[str]:
    """The names of COCO's twelve figures, for three ascending limits."""
    return [*PRECISIONS, *(f'AR@{limit}' for limit in limits), *(f'AR_{size}@{limits[-1]}' for size in 'sml')]


@METRICS.register_module()
class FastCocoMetric(CocoMetric):
    """What mmdet's CocoMetric computes, quickly and in full digits.

    hotcoco does the work if it is installed, pycocotools otherwise; the figures are equal. No file is written and read
    again, detections are kept as arrays, and processes send each other bytes instead of pickles. All twelve figures of
    COCO are given, not six, and not rounded. Every image of the data set has to be scored, and once.

    Args:
        ann_file: COCO file of the ground truth; without it the data set's own annotations count.
        metric: any of 'bbox', 'segm' and 'proposal', or one of them.
        classwise: give the AP of each class among the metrics, and log a table of them. ``class_scores`` has them
            anyway.
        proposal_nums: three limits on the detections of an image, in any order. COCO's own are 1, 10 and 100; mAP is
            always at 100.
        iou_thrs: thresholds of IoU; default COCO's ten.
        metric_items: names of the figures to give, as mmdet names them or by the limits; default all.
        format_only: write the result files and compute nothing.
        outfile_prefix: path of the result files but for their end, .bbox.json and .segm.json.
        backend_args: of the storage of ``ann_file``.
        collect_device: makes no difference; as mmdet's class takes it.
        prefix: of the names of the metrics; default 'coco'.
        sort_categories: makes no difference: classes go by their names.
        use_mp_eval: mmdet's evaluation in several processes, where pycocotools does the work.
        engine: 'hotcoco' or 'pycocotools'; default the first that is installed.

    Attributes:
        class_scores: by metric and class, six figures named as in ``CLASS_COLUMNS``, of the last evaluation in the
            first process; -1 where there is nothing to measure.

    Raises:
        FileNotFoundError: if ``ann_file`` is missing.
        ValueError: if an argument cannot be used.
    """

    def __init__(
        self,
        ann_file: str | None = None,
        metric: str | Sequence[str] = 'bbox',
        classwise: bool = False,
        proposal_nums: Sequence[int] = (100, 300, 1000),
        iou_thrs: float | Sequence[float] | None = None,
        metric_items: Sequence[str] | None = None,
        format_only: bool = False,
        outfile_prefix: str | None = None,
        backend_args: dict | None = None,
        collect_device: str = 'cpu',
        prefix: str | None = None,
        sort_categories: bool = False,
        use_mp_eval: bool = False,
        engine: str | None = None,
    ) -> None:
        super().__init__(
            metric=[metric] if isinstance(metric, str) else list(metric),
            classwise=classwise,
            proposal_nums=proposal_nums,
            iou_thrs=None if iou_thrs is None else np.atleast_1d(np.asarray(iou_thrs, dtype=np.float64)),
            metric_items=metric_items,
            outfile_prefix=outfile_prefix,
            backend_args=backend_args,
            use_mp_eval=use_mp_eval,
            collect_device=collect_device,
            prefix=prefix,
        )
        if 'proposal_fast' in self.metrics:
            raise ValueError(
                "metric has 'proposal_fast', which mmdet 3.3.0 computes with NumPy below 1.24 only: 'proposal'"
            )
        if format_only and not outfile_prefix:
            raise ValueError('format_only=True writes result files and nothing else; give outfile_prefix, their path')
        if len(set(self.proposal_nums)) != 3:
            raise ValueError(
                f'proposal_nums is {tuple(proposal_nums)}; give three different limits, such as 1, 10, 100'
            )
        self.limits = sorted(self.proposal_nums)
        self.format_only = format_only
        self.engine = coco_engine.choose(engine)
        self.class_scores: dict[str, dict[str, dict[str, float]]] = {}
        known = dict.fromkeys([*figure_names(self.limits), *STOCK_FIGURES])
        unknown = [item for item in metric_items or () if item not in known]
        if unknown:
            raise ValueError(f'metric_items has {unknown[0]!r}; there are {", ".join(known)}')
        if ann_file is not None:
            with get_local_path(ann_file, backend_args=backend_args) as path:
                self._coco_api = coco_engine.load(path, self.engine)

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Keeps the detections of a batch, their masks as run lengths.

        Args:
            data_batch: not used.
            data_samples: the model's output: ``pred_instances`` of each image, ``img_id`` and ``ori_shape``.

        Raises:
            ValueError: if there is neither ``ann_file`` nor the data set's own ground truth.
        """
        for sample in data_samples:
            found = sample['pred_instances']
            result = {'img_id': sample['img_id']}
            result |= {key: found[key].detach().cpu().numpy() for key in ('bboxes', 'scores', 'labels')}
            if 'masks' in found:
                result['masks'] = _rles(found['masks'])
            if 'mask_scores' in found:
                result['mask_scores'] = found['mask_scores'].detach().cpu().numpy()
            height, width = sample['ori_shape'][:2]
            truth = {'width': width, 'height': height, 'img_id': sample['img_id']}
            if self._coco_api is None:
                if 'instances' not in sample:
                    raise ValueError('there is no ground truth to score against: give ann_file, or load annotations')
                truth['anns'] = sample['instances']
            self.results.append((truth, result))

    def evaluate(self, size: int) -> dict[str, float]:
        """Gathers the detections of all processes in the first one, which scores them.

        Args:
            size: images in the data set.

        Returns:
            The metrics; the same in every process.

        Raises:
            ValueError: if they cannot be scored.
        """
        rank, world_size = get_dist_info()
        parts = [self.results[:]]
        self.results.clear()
        if world_size > 1:
            content = gather_bytes(pack(parts[0]))
            parts = [unpack(part) for part in content]
        failure: Exception | None = None
        metrics: dict[str, float] = {}
        if rank == 0:
            try:
                metrics = self.compute_metrics(_in_order(parts, size))
            except Exception as error:  # the others wait
                failure = error
        said = json.loads(from_first(json.dumps([failure is not None, metrics])))
        if failure is not None:
            raise failure
        if said[0]:
            raise ValueError('the first process cannot score the detections; its message says why')
        return {f'{self.prefix}/{name}' if self.prefix else name: value for name, value in said[1].items()}

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Scores the detections.

        Args:
            results: of each image its size or ground truth, and its detections.

        Returns:
            The metrics as fractions, -1 where there is nothing to measure.
        """
        truths, found = zip(*results, strict=True)
        truth = self._coco_api or self._converted(truths)
        self.cat_ids = ids_by_name(self.dataset_meta['classes'], truth.cats.values())
        self.img_ids = sorted(truth.imgs)
        self._check(found)
        if self.outfile_prefix:
            Path(self.outfile_prefix).parent.mkdir(parents=True, exist_ok=True)
            files = self.results2json(found, self.outfile_prefix)
            print_log(f'Detections are written to {", ".join(sorted(set(files.values())))}', 'current')
        metrics: dict[str, float] = {}
        for metric in [] if self.format_only else self.metrics:
            metrics |= self._scored(truth, found, metric)
        return metrics

    def _scored(self, truth: Any, found: Sequence[dict], metric: str) -> dict[str, float]:
        precision, recall = coco_engine.score(
            truth,
            coco_engine.columns(found, self.cat_ids, masks=metric == 'segm'),
            category_ids=self.cat_ids,
            image_ids=self.img_ids,
            limits=self.limits,
            thresholds=self.iou_thrs,
            by_class=metric != 'proposal',
            several_processes=self.use_mp_eval,
        )
        figures = summary(precision, recall, self.iou_thrs, self.limits)
        if metric == 'proposal':
            return self._chosen(figures, list(figures)[len(PRECISIONS) :])
        metrics = {f'{metric}_{item}': value for item, value in self._chosen(figures, list(figures)).items()}
        self.class_scores[metric] = self._by_class(precision)
        if self.classwise:
            rows = [
                [name, *('-' if value == -1 else f'{100 * value:.1f}' for value in scores.values())]
                for name, scores in self.class_scores[metric].items()
            ]
            print_log(f'{metric} by class in %:\n{format_table(["class", *CLASS_COLUMNS], rows)}', 'current')
            metrics |= {f'{metric}_AP/{name}': scores['AP'] for name, scores in self.class_scores[metric].items()}
        return metrics

    def _by_class(self, precision: np.ndarray) -> dict[str, dict[str, float]]:
        """Six figures for each class, at the highest limit."""
        ids = sorted(self.cat_ids)
        table = {}
        for name, category_id in zip(self.dataset_meta['classes'], self.cat_ids, strict=False):
            values = precision[:, :, ids.index(category_id), :, -1]
            by_threshold = [values[self.iou_thrs == threshold, :, 0] for threshold in (0.5, 0.75)]
            figures = [values[:, :, 0], *by_threshold, *(values[:, :, area] for area in (1, 2, 3))]
            table[name] = {column: average(part) for column, part in zip(CLASS_COLUMNS, figures, strict=True)}
        return table

    def _chosen(self, figures: Mapping[str, float], default: Sequence[str]) -> dict[str, float]:
        """Those of the figures that were asked for; mmdet has the same names of recalls whatever the limits are."""
        by_position = zip(STOCK_FIGURES, figures.values(), strict=True)
        named = dict(by_position) | dict(figures)
        return {item: named[item] for item in self.metric_items or default}

    def _check(self, found: Sequence[dict]) -> None:
        """That the detections are of this data set's images and classes."""
        ids = [result['img_id'] for result in found]
        known, seen = set(self.img_ids), set()
        for img_id in ids:
            if img_id not in known:
                raise ValueError(
                    f'image {img_id!r} was scored and is not in the ground truth, whose first is '
                    f'{next(iter(self.img_ids), None)!r}; ann_file of the evaluator and of the data set have to agree'
                )
            if img_id in seen:
                raise ValueError(
                    f"image {img_id!r} was scored twice. Validate with sampler=dict(type='DefaultSampler', "
                    'shuffle=False).'
                )
            seen.add(img_id)
        highest = max((int(result['labels'].max()) for result in found if len(result['labels'])), default=-1)
        if highest >= len(self.cat_ids):
            raise ValueError(
                f'the model found label {highest}, and the ground truth has {len(self.cat_ids)} of the '
                f"data set's classes: labels 0 to {len(self.cat_ids) - 1}. Mend num_classes of the head."
            )
        if 'segm' in self.metrics and any('masks' not in result for result in found):
            raise ValueError("metric has 'segm', and the model gives no masks; leave it out")
        if missing := len(known - seen):
            print_log(
                f'{missing} of the {len(known)} images of the ground truth were not looked at; their objects count as '
                'not found',
                'current',
            )

    def _converted(self, truths: Sequence[dict]) -> Any:
        """The data set's own annotations as a ground truth."""
        with TemporaryDirectory() as folder:
            return coco_engine.load(self.gt_to_coco_json(truths, f'{folder}/truth'), self.engine)


def _in_order(parts: Sequence[Sequence[Any]], size: int) -> list[Any]:
    """What processes had in turn, in the order of the data set; what a sampler repeated comes last and goes."""
    results = [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)][:size]
    if len(results) != size:
        raise ValueError(
            f'{len(results)} images were scored, and the data set has {size}. Validate with sampler=dict(type='
            "'DefaultSampler', shuffle=False) and without drop_last."
        )
    return results


def _rles(masks: Any) -> list[dict[str, Any]]:
    if isinstance(masks, torch.Tensor):
        return encode(masks.detach().cpu().numpy())
    return masks.rles if isinstance(masks, RleMasks) else list(masks)
