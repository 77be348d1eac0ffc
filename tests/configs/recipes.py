"""The configs under test, and models and batches made from them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from torch import nn

from densekit.engine.config import load_config, set_amp

CONFIGS = Path(__file__).parents[2] / 'configs'
RECIPES = sorted(path for path in CONFIGS.glob('*/*.py') if path.parent.name != '_base_')
BASES = sorted(CONFIGS.glob('_base_/**/*.py'))
SAMPLE_SIZES = [(96, 80), (64, 96)]  # unlike each other, so that a batch is padded


def recipe(path: Path) -> Config:
    """A checked config whose weights need no download."""
    cfg = load_config(str(path))
    cfg.model.backbone.init_cfg = None
    return cfg


def shrink(cfg: Config) -> Config:
    """Makes steps on ``make_batch`` cheap and their gradients complete; the model keeps its parameters."""
    cfg.model.backbone.drop_path_rate = 0.0
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (96, 96)
        return cfg
    cfg.model.train_cfg.rpn_proposal.max_per_img = 16
    cfg.model.test_cfg.rpn.max_per_img = 16
    cfg.model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=4)  # a random model finds something too
    stages = cfg.model.train_cfg.rcnn
    for stage in stages if isinstance(stages, list) else [stages]:
        stage.sampler.num = 16
    return cfg


@contextmanager
def scope_of(cfg: Config) -> Iterator[None]:
    """Lets names be found as the config's ``default_scope`` says."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        yield


def build_model(cfg: Config, device: str) -> nn.Module:
    """The model of a config, without SyncBN, as the runner has it in one process; on 'meta' without memory."""
    with scope_of(cfg), torch.device(device):
        return revert_sync_batchnorm(MODELS.build(cfg.model))


def build_wrapper(cfg: Config, model: nn.Module, amp: str) -> OptimWrapper:
    """The optimizer of a config; ``amp`` is 'bf16' or 'off'."""
    set_amp(cfg, amp)
    with scope_of(cfg):
        return build_optim_wrapper(model, cfg.optim_wrapper)


def make_batch(cfg: Config) -> dict[str, list[Any]]:
    """Two small random images of different size, with labels of the config's task."""
    generator = torch.Generator().manual_seed(0)
    sample = _boxes_and_masks if cfg.default_scope == 'mmdet' else _label_map
    images = [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in SAMPLE_SIZES]
    return {'inputs': images, 'data_samples': [sample(*size) for size in SAMPLE_SIZES]}


def losses_of(model: nn.Module, wrapper: OptimWrapper, data: dict[str, Any]) -> dict[str, float]:
    """Forward and backward pass in the wrapper's precision; gradients stay, and the losses are returned."""
    with wrapper.optim_context(model):
        data = model.data_preprocessor(data, True)
        total, losses = model.parse_losses(model(**data, mode='loss'))
    wrapper.backward(total)
    return {name: float(value.detach()) for name, value in losses.items()}


def _boxes_and_masks(height: int, width: int) -> Any:
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    boxes = torch.tensor([[4, 6, 36, 44], [30, 10, 74, 60]])
    masks = np.zeros((len(boxes), height, width), dtype=np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    sample = DetDataSample(metainfo=_metainfo(height, width))
    sample.gt_instances = InstanceData(
        bboxes=boxes.float(), labels=torch.tensor([0, 3]), masks=BitmapMasks(masks, height, width)
    )
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    return sample


def _label_map(height: int, width: int) -> Any:
    from mmseg.structures import SegDataSample

    labels = torch.zeros(1, height, width, dtype=torch.long)
    labels[:, : height // 2] = 3
    labels[:, :, -8:] = 255
    return SegDataSample(metainfo=_metainfo(height, width), gt_sem_seg=PixelData(data=labels))


def _metainfo(height: int, width: int) -> dict[str, Any]:
    return {
        'img_shape': (height, width),
        'ori_shape': (height, width),
        'pad_shape': (height, width),
        'scale_factor': (1.0, 1.0),
        'img_path': '',
    }
