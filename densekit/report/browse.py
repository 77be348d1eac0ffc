"""What a recipe's pipeline feeds to the model, sample by sample, and sheets of it: what tools/browse_data.py does."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.runner import Runner

from densekit.cli import check_writable, user_errors
from densekit.data.locate import check_dataset_files
from densekit.data.sampling import KeyedBatches, NamedSamples, SampleKey
from densekit.engine.config import load_config
from densekit.predictor import colours_for
from densekit.report.pictures import GREY, draw_instances, draw_label_map, hatch, save_png
from densekit.report.progress import ProgressBar
from densekit.report.sheets import contact_sheet

SPLITS = ('train', 'val')
PER_SHEET, COLUMNS = 16, 4
_OF_WORKERS = {'num_workers', 'persistent_workers', 'prefetch_factor', 'timeout'}
CELL = 480  # pixels of the longer side of a picture


@dataclass
class Fed:
    """One image as it enters the model, with its annotations in the same pixels.

    Attributes:
        image: ``(H, W, 3)`` uint8, RGB; normalization undone, padding included.
        height: of the part that is not padding.
        width: likewise.
        boxes: ``(n, 4)``: x1, y1, x2, y2; None if the data has none.
        labels: ``(n,)``.
        masks: ``(n, H, W)`` bool; None if the data has none.
        ignored: ``(n,)`` bool.
        label_map: ``(H, W)`` of class indices; None if the data has none.
        caption: the file, sizes, flips.
    """

    image: np.ndarray
    height: int
    width: int
    boxes: np.ndarray | None
    labels: np.ndarray
    masks: np.ndarray | None
    ignored: np.ndarray
    label_map: np.ndarray | None
    caption: str


def browse(
    config: str, *, out: str | None = None, number: int = 64, split: str = 'train', options: Sequence[str] = ()
) -> None:
    """Writes sheets of what the pipeline of a config feeds to the model.

    Args:
        config: path of the config file.
        out: folder, made if missing; default ``browse`` in the config's work folder.
        number: of images.
        split: 'train' or 'val'.
        options: ``key=value`` texts that change the config.

    Raises:
        UserError: if something given cannot be used.
    """
    with user_errors():
        if number < 1:
            raise ValueError(f'--number {number}: give 1 or more')
        cfg = load_config(config, options)
        folder = Path(out if out is not None else Path(cfg.work_dir, 'browse'))
        check_writable(str(folder), '--out')
        check_dataset_files(cfg, (split,))
        feed = Feed(cfg, split)
        bar = ProgressBar()
        number = number if split == 'train' else min(number, len(feed.samples))
        sheets = -(-number // PER_SHEET)
        fed = iter(feed)
        for sheet in range(sheets):
            pictures: list[np.ndarray] = []
            captions: list[str] = []
            for one in islice(fed, min(PER_SHEET, number - sheet * PER_SHEET)):
                bar('Samples', sheet * PER_SHEET + len(pictures), number)
                pictures.append(picture_of(one, feed.classes, feed.palette))
                captions.append(one.caption)
            if not pictures:
                break
            title = f'{split} data of {Path(config).stem}, seed {feed.seed}, sheet {sheet + 1} of {sheets}'
            name = folder / f'{split}_{sheet + 1:02d}.png'
            save_png(name, contact_sheet(pictures, captions, columns=COLUMNS, title=title, cell=CELL))
            bar.clear()
            sys.stdout.write(f'{name}\n')


class Feed:
    """The images that a run with a config and its seed feeds to the model, in the run's order.

    For training, those of one process from the first iteration on, with the augmentation that they get there. (Which
    images share a batch, and so the padding, changes with the number of processes.)

    Args:
        cfg: a config as :func:`densekit.engine.config.load_config` gives it.
        split: 'train' or 'val'.

    Attributes:
        seed: of the config; 0 where it leaves it to chance.
        samples: the data set.
        classes: names, by label.
        palette: RGB colours, by label.

    Raises:
        ValueError: if the config has no such data, or another split is asked for.
    """

    def __init__(self, cfg: Config, split: str = 'train') -> None:
        if split not in SPLITS:
            raise ValueError(f'split {split} is unknown; choose from {", ".join(SPLITS)}')
        if not cfg.get(f'{split}_dataloader'):
            raise ValueError(f'the config has no {split}_dataloader, so there is nothing to show of it')
        self.training = split == 'train'
        self.seed = (cfg.get('randomness') or {}).get('seed') or 0
        self._late_annotations = not self.training and _annotated_after_resize(cfg[f'{split}_dataloader'].dataset)
        init_default_scope(cfg.get('default_scope', 'mmengine'))
        # Loaded in this process, so that there is nothing to wait for and to clean up.
        loader = {key: value for key, value in cfg[f'{split}_dataloader'].items() if key not in _OF_WORKERS}
        built = Runner.build_dataloader({**loader, 'num_workers': 0}, seed=self.seed)
        if built.batch_sampler is None:
            raise ValueError(f'{split}_dataloader makes its batches itself; only data sets with an index can be shown')
        endless = 'max_iters' in (cfg.get('train_cfg') or {})
        self._batches = KeyedBatches(built.batch_sampler, endless and self.training)
        self.samples = NamedSamples(built.dataset, self.seed)
        self._preprocessor = _built_preprocessor(cfg)
        self.classes, self.palette = _names_and_colours(self.samples)

    def __iter__(self) -> Iterator[Fed]:
        for batch in self.batches():
            samples = [self.samples[key] for key in batch]
            for image, sample in self._preprocessed(samples):
                yield self._fed(image, sample)

    def batches(self) -> Iterator[list[SampleKey]]:
        """Which samples are fed together, and the keys to their random numbers; those of training without an end."""
        for epoch in count():
            self._batches.start_at(epoch, 0)
            if hasattr(self._batches.sampler, 'set_epoch'):
                self._batches.sampler.set_epoch(epoch)
            yield from self._batches
            if not self.training:
                return

    def _preprocessed(self, samples: list[dict[str, Any]]) -> Iterator[tuple[np.ndarray, Any]]:
        """The images as RGB uint8 after the model's preprocessor, with their data samples."""
        # In validation each alone: of a batch of several sizes the preprocessors make no tensor.
        parts = [samples] if self.training else [[sample] for sample in samples]
        for part in parts:
            data = {name: [sample[name] for sample in part] for name in ('inputs', 'data_samples')}
            ready = self._preprocessor(data, self.training)
            for tensor, sample in zip(ready['inputs'], ready['data_samples'], strict=True):
                yield _as_image(tensor, self._preprocessor), sample

    def _fed(self, image: np.ndarray, sample: Any) -> Fed:
        meta = sample.metainfo
        height, width = meta.get('img_shape', image.shape)[:2]
        fed = Fed(image, height, width, None, np.zeros(0, int), None, np.zeros(0, bool), None, caption(image, meta))
        scale = meta.get('scale_factor', (1, 1)) if self._late_annotations else (1, 1)
        if 'gt_instances' in sample and 'bboxes' in sample.gt_instances:
            _add_instances(fed, sample, scale)
        if 'gt_sem_seg' in sample:
            data = sample.gt_sem_seg
            fed.label_map = _padded(np.asarray(data.get('data', data.get('sem_seg')))[0], fed)
        return fed


def picture_of(fed: Fed, classes: Sequence[str], palette: Sequence[Any]) -> np.ndarray:
    """Draws an image with its annotations, RGB uint8; padding is hatched. Large ones are reduced first."""
    scale = min(1.0, CELL / max(fed.image.shape[:2]))
    height, width = (max(1, round(side * scale)) for side in fed.image.shape[:2])
    image = cv2.resize(fed.image, (width, height), interpolation=cv2.INTER_AREA) if scale < 1 else fed.image
    padding = np.ones((height, width), bool)
    padding[: max(1, round(fed.height * scale)), : max(1, round(fed.width * scale))] = False
    image = hatch(image, padding, GREY)
    # One that is reduced would be enlarged for its names, and they be reduced with it.
    style: dict[str, Any] = {'classes': classes, 'palette': palette, 'min_side': 1 if scale < 1 else 320}
    if fed.label_map is not None and fed.boxes is None:
        return draw_label_map(image, _reduced(fed.label_map, height, width), **style, alpha=0.5)
    if fed.boxes is None:
        return image
    masks = None if fed.masks is None else np.array([_reduced(mask, height, width) for mask in fed.masks], bool)
    return draw_instances(
        image,
        boxes=fed.boxes * scale,
        labels=fed.labels,
        masks=None if masks is None else masks.reshape(-1, height, width),
        ignored=fed.ignored,
        **style,
    )


def caption(image: np.ndarray, meta: dict[str, Any]) -> str:
    """The file; its size and what the pipeline and the padding made of it; flips."""
    first, second, padded = (
        f'{shape[1]} x {shape[0]}'
        for shape in (meta.get('ori_shape', image.shape), meta.get('img_shape', image.shape), image.shape)
    )
    sizes = f'{first} to {second}' if first != second else first
    flip = f'{meta.get("flip_direction") or ""} flip' if meta.get('flip') else 'no flip'
    pads = f'padded to {padded}, ' if padded != second else ''
    return f'{Path(str(meta.get("img_path", "?"))).name}\n{sizes}\n{pads}{flip}'


def _add_instances(fed: Fed, sample: Any, scale: tuple[float, float]) -> None:
    boxes, labels, masks, ignored = [], [], [], []
    for name in ('gt_instances', 'ignored_instances'):
        found = sample.get(name)
        if found is None or 'bboxes' not in found:
            continue
        tensor = getattr(found.bboxes, 'tensor', found.bboxes)
        boxes.append(tensor.reshape(-1, 4).numpy() * np.tile(scale, 2))
        labels.append(found.labels.numpy())
        ignored.append(np.full(len(tensor), name == 'ignored_instances'))
        if 'masks' in found:
            drawn = found.masks.to_ndarray().astype(bool)
            masks += [_padded(mask, fed) for mask in drawn]
    fed.boxes, fed.labels, fed.ignored = np.concatenate(boxes), np.concatenate(labels), np.concatenate(ignored)
    # Ignored ones come without masks from some pipelines.
    if len(masks) == len(fed.boxes):
        fed.masks = np.array(masks, bool).reshape(-1, *fed.image.shape[:2])
    elif len(masks) == (~fed.ignored).sum():
        empty = np.zeros((int(fed.ignored.sum()), *fed.image.shape[:2]), bool)
        fed.masks = np.concatenate([np.array(masks, bool).reshape(-1, *fed.image.shape[:2]), empty])


def _padded(values: np.ndarray, fed: Fed) -> np.ndarray:
    """A mask or label map ``(h, w)`` of the image as large as it is fed, with 255, or False, on the padding."""
    if values.shape == fed.image.shape[:2]:
        return values
    if values.shape != (fed.height, fed.width):  # loaded after the image was resized
        kind = values.astype(np.uint8) if values.dtype == bool else values
        kind = cv2.resize(kind, (fed.width, fed.height), interpolation=cv2.INTER_NEAREST)
        values = kind.astype(values.dtype)
    whole = np.full(fed.image.shape[:2], False if values.dtype == bool else 255, values.dtype)
    whole[: fed.height, : fed.width] = values
    return whole


def _reduced(values: np.ndarray, height: int, width: int) -> np.ndarray:
    kind = np.uint8 if values.dtype == bool else np.int32
    reduced = cv2.resize(values.astype(kind), (width, height), interpolation=cv2.INTER_NEAREST)
    return reduced.astype(values.dtype)


def _as_image(tensor: Any, preprocessor: Any) -> np.ndarray:
    """``(3, H, W)`` as the network gets it, back to RGB uint8 ``(H, W, 3)``."""
    values = tensor.detach().cpu().float()
    if getattr(preprocessor, '_enable_normalize', False):
        values = values * preprocessor.std.cpu() + preprocessor.mean.cpu()
    image = values.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    # mmengine's and mmdet's name for it, and mmseg's.
    swapped = getattr(preprocessor, '_channel_conversion', getattr(preprocessor, 'channel_conversion', False))
    return np.ascontiguousarray(image if swapped else image[..., ::-1])  # images are read as BGR


def _built_preprocessor(cfg: Config) -> Any:
    """The model's own; without one in the config, mmengine's, which changes nothing."""
    preprocessor = (cfg.get('model') or {}).get('data_preprocessor') or {'type': 'mmengine.BaseDataPreprocessor'}
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        return MODELS.build(preprocessor)


def _annotated_after_resize(dataset: Any) -> bool:
    """Whether annotations are those of the image before it is resized, as in the test pipelines of mmdet and mmseg."""
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset['dataset']
    kinds = [str(step['type']) for step in dataset.get('pipeline', ())]
    loading = [i for i, kind in enumerate(kinds) if kind.endswith('Annotations')]
    resizing = [i for i, kind in enumerate(kinds) if 'Resize' in kind]
    return bool(loading and resizing and min(loading) > max(resizing))


def _names_and_colours(samples: Any) -> tuple[list[str], list[Any]]:
    meta: dict[str, Any] = {}
    with suppress(AttributeError):
        meta = samples.metainfo
    classes = list(meta.get('classes') or ())
    if not classes:
        raise ValueError('the data set names no classes (metainfo); give it classes')
    return classes, colours_for(classes, meta.get('palette'))
