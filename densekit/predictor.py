"""A trained model as a function from an image to plain arrays."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, MODELS, init_default_scope
from torch import nn

from backbones import folding
from backbones.files import read_checkpoint
from densekit.engine.class_transfer import checkpoint_classes
from densekit.engine.config import load_config
from densekit.engine.memory_format import lay_out_weights
from densekit.engine.weights import fitting_weights
from densekit.evaluation.rle import RleMasks
from densekit.report.pictures import check_image, draw_instances, draw_label_map, read_image


@dataclass
class Detections:
    """Objects in an image, best first.

    Attributes:
        boxes: ``(n, 4)`` float32: x1, y1, x2, y2 in pixels of the image.
        labels: ``(n,)`` int64: indices into the classes.
        scores: ``(n,)`` float32 in [0, 1].
        masks: ``(n, H, W)`` bool, or None if the model has no masks. From :meth:`Predictor.batch` without ``drawn``
            they may be :class:`densekit.evaluation.rle.RleMasks`.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    masks: np.ndarray | RleMasks | None


class Predictor:
    """A trained detector or segmentor.

    Args:
        config: path of the config file.
        checkpoint: of the whole model.
        device: such as 'cpu' or 'cuda:1'; default the first GPU if there is one.
        options: ``key=value`` texts that change the config.
        fold: fold the ConvNeXt blocks, which takes less time and gives the same within rounding (see
            :mod:`backbones.folding`). Models without such blocks, in float16, on Triton kernels or with other layers
            in the blocks are left as they are.

    Attributes:
        folded: whether the blocks were folded.
        classes: names, by label.
        palette: RGB colours, by label.
        is_segmentor: whether results are label maps.

    Raises:
        FileNotFoundError: if the config or the checkpoint is missing.
        ValueError: if either cannot be used.
    """

    def __init__(
        self,
        config: str | os.PathLike,
        checkpoint: str | os.PathLike,
        *,
        device: str | None = None,
        options: Sequence[str] = (),
        fold: bool = True,
    ) -> None:
        for name, given in (('config', config), ('checkpoint', checkpoint)):
            if not isinstance(given, str | os.PathLike):
                raise ValueError(f'{name} is {given!r}; give the path of a file')
        where = device_of(device)
        cfg = load_config(os.fspath(config), options)
        self.model, content = load_model(cfg, os.fspath(checkpoint), where)
        self.folded = fold and folding.why_not(self.model) is None and not folding.runs_on_triton(self.model)
        if self.folded:
            folding.fold(self.model, in_place=True)
        self.classes, self.palette = _classes_and_palette(cfg, content)
        self.is_segmentor = hasattr(self.model, 'encode_decode')  # mmseg's
        self.pipeline = Compose(_array_pipeline(cfg.test_dataloader.dataset.pipeline))

    def __call__(self, image: np.ndarray | str | os.PathLike) -> Detections | np.ndarray:
        """Finds what is in an image.

        Args:
            image: ``(H, W, 3)`` uint8, RGB; or the path of a file.

        Returns:
            :class:`Detections` from a detector, a label map ``(H, W)`` of class indices from a segmentor.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the image is no such array, or its file cannot be read.
        """
        return self.batch([image if isinstance(image, np.ndarray) else read_image(image)])[0]

    def batch(self, images: Sequence[np.ndarray], drawn: bool = True) -> list[Detections | np.ndarray]:
        """Finds what is in each of several images. Those of one size go through the model together.

        Args:
            images: each ``(H, W, 3)`` uint8, RGB.
            drawn: masks as arrays. Without it they stay run lengths where the model can give these, which takes next to
                no memory: a hundred drawn masks of 12 megapixels take 1.2 GB.

        Returns:
            For each image what a call with it alone returns, but for the rounding of sums.

        Raises:
            ValueError: if an image is no such array.
        """
        loaded = [self.load(image) for image in images]
        # Images padded to a common size would give other results than each alone.
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, data in enumerate(loaded):
            shape = (*data['inputs'].shape, *data['data_samples'].ori_shape[:2])
            groups.setdefault(shape, []).append(i)
        found: list[Any] = [None] * len(images)
        for members in groups.values():
            inputs = [loaded[i]['inputs'] for i in members]
            with torch.no_grad(), run_lengths(self.model):
                samples = self.model.test_step(
                    {'inputs': inputs, 'data_samples': [loaded[i]['data_samples'] for i in members]}
                )
            for i, sample in zip(members, samples, strict=True):
                found[i] = as_arrays(sample, drawn)
        return found

    def load(self, image: np.ndarray) -> dict[str, Any]:
        """What the test pipeline makes of an image ``(H, W, 3)`` uint8, RGB: ``inputs`` and ``data_samples``."""
        check_image(image)
        # Pipelines take BGR, as OpenCV reads it.
        return self.pipeline({'img': np.ascontiguousarray(image[..., ::-1]), 'img_id': 0, 'img_path': ''})


def load_model(cfg: Config, checkpoint: str, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The model of a config with the weights of a checkpoint, for evaluation; and what else the checkpoint holds.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it is not of this model.
    """
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    model = MODELS.build({**cfg.model, 'init_cfg': None})  # the weights come from the checkpoint
    content = read_checkpoint(checkpoint)
    model.load_state_dict(fitting_weights(checkpoint, content, model))
    lay_out_weights(cfg, model)
    return model.to(device).eval(), content


@contextmanager
def run_lengths(model: nn.Module) -> Iterator[None]:
    """Within this context mask heads that can give run lengths do, instead of drawing every mask."""
    heads: list[Any] = [module for module in model.modules() if isinstance(getattr(module, 'run_lengths', None), bool)]
    before = [head.run_lengths for head in heads]
    for head in heads:
        head.run_lengths = True
    try:
        yield
    finally:
        for head, value in zip(heads, before, strict=True):
            head.run_lengths = value


def as_arrays(sample: Any, drawn: bool = True) -> Detections | np.ndarray:
    """A model's data sample as plain arrays, objects best first; without ``drawn`` run lengths stay such.

    Raises:
        ValueError: if the sample holds neither objects nor a label map.
    """
    if 'pred_sem_seg' in sample:
        return sample.pred_sem_seg.data[0].cpu().numpy()
    if 'pred_instances' not in sample:
        raise ValueError(f'the model gives {", ".join(sample.keys())}; pred_instances or pred_sem_seg can be read')
    found = sample.pred_instances.detach().cpu()
    order = best_first(found.scores).numpy()
    masks = found.get('masks')
    if isinstance(masks, RleMasks):
        masks = masks[order].numpy() if drawn else masks[order]
    elif masks is not None:
        masks = masks.numpy()[order]
    return Detections(found.bboxes.numpy()[order], found.labels.numpy()[order], found.scores.numpy()[order], masks)


def best_first(scores: torch.Tensor) -> torch.Tensor:
    """The order of :class:`Detections`: indices ``(n,)`` of scores ``(n,)``."""
    return torch.argsort(scores.detach().cpu(), descending=True)


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
    masks = None if found.masks is None else found.masks[keep]
    return draw_instances(
        image,
        boxes=found.boxes[keep],
        labels=found.labels[keep],
        scores=found.scores[keep],
        masks=masks.numpy() if isinstance(masks, RleMasks) else masks,
        **style,
    )


def device_of(name: str | None) -> torch.device:
    """A device by its name, the first GPU or the CPU for None.

    Raises:
        ValueError: if this machine has none of that name.
    """
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
    return classes, colours_for(classes, meta.get('palette'))


def colours_for(classes: Sequence[str], palette: Sequence[Any] | None) -> list[Any]:
    """A palette with as many different RGB colours more as it lacks, the same ones every time."""
    given = list(palette or [])
    missing = max(0, len(classes) - len(given))
    return given + np.random.default_rng(0).integers(40, 255, (missing, 3)).tolist()
