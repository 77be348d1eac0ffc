"""Runs a checkpoint on validation images, and keeps what it says in the work folder for the next report."""

import contextlib
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from densekit.engine.config import load_config
from densekit.engine.runner import DensekitRunner
from densekit.files import write_whole
from densekit.predictor import device_of, load_model, run_lengths
from densekit.report.page.run_folder import Run
from densekit.report.progress import ProgressBar

FOLDER = 'report'  # in the work folder
FACTS, DETECTIONS, LABEL_MAPS = 'predictions.json', 'detections.json', 'label_maps'


@dataclass
class Predictions:
    """What a model found in validation images.

    Attributes:
        cfg: config of the run.
        dataset: those images, with ground truth.
        total: images that the validation set has.
        path: COCO's file of results, or a folder of label maps as ``ExactIoUMetric`` writes them.
        source: where it comes from, for the reader.
    """

    cfg: Config
    dataset: Any
    total: int
    path: Path
    source: str

    @property
    def is_detection(self) -> bool:
        """Objects and not label maps."""
        return self.path.suffix == '.json'


def predictions(run: Run, images: int, results: str | None = None, device: str | None = None) -> Predictions:
    """The predictions of a run: those given, those kept from an earlier report, or new ones.

    Args:
        run: with config and checkpoint.
        images: at most as many, spread over the validation set; more than 0.
        results: COCO's file of results, or a folder of label maps; then nothing is run.
        device: such as 'cuda:1'; default the first GPU if there is one.

    Raises:
        FileNotFoundError: if something of the data is missing.
        ValueError: if there is no config or checkpoint, or what there is cannot be used.
    """
    if run.config is None:
        raise ValueError('the run left no config, so its validation set and model are not known')
    cfg = load_config(str(run.config))
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if cfg.get('val_dataloader') is None:
        raise ValueError('the config has no val_dataloader')
    with contextlib.redirect_stdout(io.StringIO()):  # "creating index..."
        dataset = DATASETS.build(cfg.val_dataloader.dataset)
    total = len(dataset)
    if results is not None:
        return _given(cfg, dataset, total, Path(results))
    if images < total:
        dataset.get_subset_([i * total // images for i in range(images)])
    if run.checkpoint is None:
        raise ValueError('there is no checkpoint that could be evaluated')
    is_detection = cfg.get('default_scope') != 'mmseg'
    path = run.folder / FOLDER / (DETECTIONS if is_detection else LABEL_MAPS)
    facts = _facts(run, len(dataset), total)
    facts_file = run.folder / FOLDER / FACTS
    if not path.exists() or _kept(facts_file) != facts:
        facts_file.unlink(missing_ok=True)
        (_detect if is_detection else _segment)(cfg, str(run.checkpoint), dataset, path, device)
        write_whole(facts_file, json.dumps(facts, indent=1) + '\n')
    return Predictions(cfg, dataset, total, path, run.checkpoint.name)


def _kept(file: Path) -> Any:
    """What an earlier report wrote; None if it did not, or was killed while it did."""
    try:
        return json.loads(file.read_text('utf-8'))
    except (OSError, ValueError):
        return None


def annotation_file(dataset: Any) -> str:
    """COCO's file of the validation set.

    Raises:
        ValueError: if there is none.
    """
    file = getattr(dataset, 'ann_file', '')
    if not str(file).endswith('.json'):
        raise ValueError(f'its data set, {type(dataset).__name__}, has no COCO file')
    return str(file)


def _given(cfg: Config, dataset: Any, total: int, path: Path) -> Predictions:
    if not path.exists() or not (path.is_dir() or path.suffix == '.json'):
        raise FileNotFoundError(f"--results {path}: expected COCO's file of results (.json) or a folder of label maps")
    if path.is_dir() == (cfg.get('default_scope') != 'mmseg'):
        wanted = 'a folder of label maps' if cfg.get('default_scope') == 'mmseg' else "COCO's file of results (.json)"
        raise ValueError(f'--results {path}: the run is of another kind; give {wanted}')
    return Predictions(cfg, dataset, total, path, str(path))


def _facts(run: Run, images: int, total: int) -> dict[str, Any]:
    """What predictions depend on."""
    assert run.checkpoint is not None and run.config is not None
    state = run.checkpoint.stat()
    return {
        'checkpoint': run.checkpoint.name,
        'bytes': state.st_size,
        'written': state.st_mtime_ns,
        'images': images,
        'of': total,
        'config': hashlib.sha256(run.config.read_bytes()).hexdigest(),
    }


def _samples(cfg: Config, checkpoint: str, dataset: Any, device: str | None) -> Any:
    """Yields batches of the model's output."""
    model, _ = load_model(cfg, checkpoint, device_of(device))
    loader = DensekitRunner.build_dataloader({**cfg.val_dataloader, 'dataset': dataset})
    bar, done = ProgressBar(), 0
    for batch in loader:
        with torch.no_grad(), run_lengths(model):
            samples = model.test_step(batch)
        yield [sample.to_dict() for sample in samples]
        done += len(samples)
        bar('evaluation', done, len(dataset))
    bar.clear()


def _detect(cfg: Config, checkpoint: str, dataset: Any, path: Path, device: str | None) -> None:
    """Writes COCO's file of results."""
    from densekit.data.class_order import ids_by_name
    from densekit.evaluation import coco_engine
    from densekit.evaluation.coco import FastCocoMetric

    metric = FastCocoMetric(annotation_file(dataset))
    categories = coco_engine.load(annotation_file(dataset), coco_engine.choose(None)).cats
    category_ids = ids_by_name(dataset.metainfo['classes'], categories.values())
    for samples in _samples(cfg, checkpoint, dataset, device):
        metric.process(None, samples)
    rows = [row for _, found in metric.results for row in _rows(found, category_ids)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding='utf-8')


def _rows(found: dict[str, Any], category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """The objects of an image as COCO has them, in full digits."""
    boxes = found['bboxes'].astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    rows = [
        {'image_id': found['img_id'], 'category_id': category_ids[label], 'bbox': box, 'score': score}
        for box, label, score in zip(
            boxes.tolist(), found['labels'].tolist(), found['scores'].astype(np.float64).tolist(), strict=True
        )
    ]
    for row, rle in zip(rows, found.get('masks', ()), strict=False):
        row['segmentation'] = {'size': list(rle['size']), 'counts': _decoded(rle['counts'])}
    for row, score in zip(rows, found.get('mask_scores', ()), strict=False):
        row['mask_score'] = float(score)
    return rows


def _decoded(counts: str | bytes) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts


def _segment(cfg: Config, checkpoint: str, dataset: Any, path: Path, device: str | None) -> None:
    """Writes label maps."""
    from densekit.evaluation.iou import ExactIoUMetric

    metric = ExactIoUMetric(output_dir=str(path), format_only=True, prefix='report')
    metric.dataset_meta = dataset.metainfo
    for samples in _samples(cfg, checkpoint, dataset, device):
        metric.process(None, samples)
