"""A trained model as a function from an image to plain arrays, and what tools/predict.py does with it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, MODELS, init_default_scope
from pycocotools import mask as rle

from backbones.files import read_checkpoint
from densekit.cli import UserError, check_writable, user_errors
from densekit.engine.class_transfer import checkpoint_classes
from densekit.engine.config import load_config
from densekit.engine.weights import fitting_weights
from densekit.report.pictures import draw_instances, draw_label_map, read_image, save_png


@dataclass
class Detections:
    """Objects in an image, best first.

    Attributes:
        boxes: ``(n, 4)`` float32: x1, y1, x2, y2 in pixels of the image.
        labels: ``(n,)`` int64: indices into the classes.
        scores: ``(n,)`` float32 in [0, 1].
        masks: ``(n, H, W)`` bool, or None if the model has no masks.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    masks: np.ndarray | None


class Predictor:
    """A trained detector or segmentor.

    Args:
        config: path of the config file.
        checkpoint: of the whole model.
        device: such as 'cpu' or 'cuda:1'; default the first GPU if there is one.
        options: ``key=value`` texts that change the config.

    Attributes:
        classes: names, by label.
        palette: RGB colours, by label.

    Raises:
        FileNotFoundError: if the config or the checkpoint is missing.
        ValueError: if either cannot be used.
    """

    def __init__(self, config: str, checkpoint: str, *, device: str | None = None, options: Sequence[str] = ()) -> None:
        where = _device(device)
        cfg = load_config(config, options)
        init_default_scope(cfg.get('default_scope', 'mmengine'))
        model = MODELS.build(cfg.model)  # its init_cfg is not used: the weights come from the checkpoint
        content = read_checkpoint(checkpoint)
        model.load_state_dict(fitting_weights(checkpoint, content, model))
        self.model = model.to(where).eval()
        self.classes, self.palette = _classes_and_palette(cfg, content)
        self.pipeline = Compose(_array_pipeline(cfg.test_dataloader.dataset.pipeline))

    def __call__(self, image: np.ndarray) -> Detections | np.ndarray:
        """Finds what is in an image.

        Args:
            image: ``(H, W, 3)`` uint8, RGB.

        Returns:
            :class:`Detections` from a detector, a label map ``(H, W)`` of class indices from a segmentor.
        """
        # Pipelines take BGR, as OpenCV reads it.
        data = self.pipeline({'img': np.ascontiguousarray(image[..., ::-1]), 'img_id': 0, 'img_path': ''})
        with torch.no_grad():
            sample = self.model.test_step({'inputs': [data['inputs']], 'data_samples': [data['data_samples']]})[0]
        if 'pred_sem_seg' in sample:
            return sample.pred_sem_seg.data[0].cpu().numpy()
        found = sample.pred_instances.cpu()
        order = torch.argsort(found.scores, descending=True).numpy()
        masks = found.masks.numpy()[order] if 'masks' in found else None
        return Detections(found.bboxes.numpy()[order], found.labels.numpy()[order], found.scores.numpy()[order], masks)


def predict(
    config: str,
    checkpoint: str,
    images: Sequence[str],
    *,
    out: str,
    score_thr: float = 0.3,
    device: str | None = None,
    options: Sequence[str] = (),
) -> None:
    """Writes a picture per image, and results.json, to a folder.

    Args:
        config: path of the config file.
        checkpoint: of the whole model.
        images: paths.
        out: folder, made if missing.
        score_thr: draw boxes from this score on; results.json has all of them.
        device: see :class:`Predictor`.
        options: ``key=value`` texts that change the config.

    Raises:
        UserError: if something given cannot be used. Images that cannot be read are left out, the others are written
            before the error is raised.
    """
    with user_errors():
        check_writable(out, '--out')
        predictor = Predictor(config, checkpoint, device=device, options=options)
    results, unreadable = [], []
    for path, picture_name in zip(images, _picture_names(images), strict=True):
        try:
            image = read_image(path)
        except (OSError, ValueError) as error:
            unreadable.append(str(error))
            continue
        found = predictor(image)
        save_png(Path(out, picture_name), draw(image, found, predictor, score_thr))
        results.append({'image': path, 'picture': picture_name, **_as_json(found, predictor.classes)})
    if results:
        Path(out, 'results.json').write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
    if unreadable:
        done = f'The other {len(results)} are in {out}.' if results else 'Nothing was predicted.'
        raise UserError(
            '\n'.join([f'{len(unreadable)} of {len(images)} images could not be read. {done}', *unreadable])
        )


def draw(image: np.ndarray, found: Detections | np.ndarray, predictor: Predictor, score_thr: float) -> np.ndarray:
    """Draws a prediction over its image.

    Args:
        image: ``(H, W, 3)`` uint8, RGB.
        found: what the predictor returned for it.
        predictor: for the names and colours of the classes.
        score_thr: lowest score of the objects drawn.

    Returns:
        RGB uint8.
    """
    style: dict[str, Any] = {'classes': predictor.classes, 'palette': predictor.palette}
    if isinstance(found, np.ndarray):
        return draw_label_map(image, found, **style)
    keep = found.scores >= score_thr
    return draw_instances(
        image,
        boxes=found.boxes[keep],
        labels=found.labels[keep],
        scores=found.scores[keep],
        masks=None if found.masks is None else found.masks[keep],
        **style,
    )


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        known = ', '.join(['cpu', *(f'cuda:{i}' for i in range(torch.cuda.device_count()))])
        raise ValueError(f'device {name} cannot be used; this machine has {known}') from error
    return device


def _array_pipeline(pipeline: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The test pipeline for an image in memory, without its annotations."""
    steps = [dict(step) for step in pipeline if not str(step['type']).endswith('Annotations')]
    if not str(steps[0]['type']).endswith('LoadImageFromFile'):
        raise ValueError(f'the test pipeline begins with {steps[0]["type"]}; expected LoadImageFromFile')
    scope = str(steps[0]['type']).rpartition('.')[0]
    steps[0] = {'type': f'{scope}.LoadImageFromNDArray' if scope else 'LoadImageFromNDArray'}
    return steps


def _classes_and_palette(cfg: Config, content: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """From the checkpoint, which knows what it was trained on, else from the config's data set."""
    meta = content.get('meta') or {}
    classes = list(checkpoint_classes(content) or [])
    if classes:
        meta = meta.get('dataset_meta') or {'palette': meta.get('PALETTE')}
    else:
        dataset = cfg.test_dataloader.dataset
        with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
            meta = {**getattr(registry.get(dataset.type), 'METAINFO', {}), **dataset.get('metainfo', {})}
        classes = list(meta.get('classes') or [])
    if not classes:
        raise ValueError('neither the checkpoint nor the data set of test_dataloader names the classes (metainfo)')
    palette = list(meta.get('palette') or [])
    if len(palette) < len(classes):
        # As many different colours as are missing, the same ones every time.
        palette += np.random.default_rng(0).integers(40, 255, (len(classes) - len(palette), 3)).tolist()
    return classes, palette


def _as_json(found: Detections | np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    if isinstance(found, np.ndarray):
        labels, counts = np.unique(found, return_counts=True)
        return {
            'size': list(found.shape),
            'label_map_rle': [
                {'category': classes[label], 'pixels': int(count), 'segmentation': _rle(found == label)}
                for label, count in zip(labels, counts, strict=True)
            ],
        }
    detections = []
    for i, (x1, y1, x2, y2) in enumerate(found.boxes.tolist()):
        detection = {
            'category': classes[found.labels[i]],
            'score': round(float(found.scores[i]), 5),
            'bbox': [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)],  # x, y, width, height, as in COCO
        }
        if found.masks is not None:
            detection['segmentation'] = _rle(found.masks[i])
        detections.append(detection)
    return {'detections': detections}


def _rle(mask: np.ndarray) -> dict[str, Any]:
    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {'size': list(encoded['size']), 'counts': encoded['counts'].decode()}


def _picture_names(images: Sequence[str]) -> list[str]:
    """One PNG name per image; images of one name from several folders are numbered."""
    names: list[str] = []
    for path in images:
        name, number = f'{Path(path).stem}.png', 1
        while name in names:
            number += 1
            name = f'{Path(path).stem}_{number}.png'
        names.append(name)
    return names
