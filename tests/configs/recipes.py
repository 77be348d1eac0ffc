"""The configs under test, and models and batches made from them."""

import copy
import functools
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

from backbones import ARCHS, ISOTROPIC_ARCHS
from densekit.engine.config import load_config, set_amp
from densekit.report.meta import build_on_meta

CONFIGS = Path(__file__).parents[2] / 'configs'
RECIPES = sorted(path for path in CONFIGS.glob('*/*.py') if path.parent.name != '_base_')
BASES = sorted(CONFIGS.glob('_base_/**/*.py'))
SAMPLE_SIZES = [(96, 80), (64, 96)]  # unlike each other, so that a batch is padded


def config_of(path: Path) -> Config:
    """A checked config, the caller's own; each file is read once."""
    return copy.deepcopy(_read(path))


@functools.cache
def _read(path: Path) -> Config:
    return load_config(str(path))


def recipe(path: Path) -> Config:
    """As ``config_of``, with weights that need no download."""
    cfg = config_of(path)
    cfg.model.backbone.init_cfg = None
    return cfg


def shrink(cfg: Config) -> Config:
    """Makes steps on ``make_batch`` cheap and their gradients complete: one block a stage, few boxes and queries."""
    backbone, model = cfg.model.backbone, cfg.model
    if backbone.type == 'ConvNeXt' and isinstance(backbone.get('arch'), str):
        backbone.arch = dict(depths=(1, 1, 1, 1), channels=ARCHS[backbone.arch][1])
    elif backbone.type == 'ConvNeXtIsotropic':
        backbone.arch = dict(depth=1, channels=ISOTROPIC_ARCHS[backbone.arch][1])
    elif 'SwinTransformer' in backbone.type:
        backbone.depths = (1, 1, 1, 1)
    elif backbone.type == 'VisionTransformer':
        backbone.num_layers, backbone.out_indices = 4, (0, 1, 2, 3)
    elif backbone.get('depth') == 101:
        backbone.depth = 50
    if 'drop_path_rate' in backbone:
        backbone.drop_path_rate = 0.0
    if cfg.default_scope == 'mmseg':
        model.data_preprocessor.size = (96, 96)
        if 'num_queries' in model.decode_head:
            _shrink_mask2former(model.decode_head, model.decode_head.train_cfg)
        else:
            model.decode_head.channels = model.auxiliary_head.channels = 64
    elif 'roi_head' in model:
        _shrink_two_stages(model)
    elif model.type == 'DINO':
        model.num_queries = 20
        model.dn_cfg.group_cfg.num_dn_queries = 4
        model.encoder.num_layers = model.decoder.num_layers = 2
    elif 'panoptic_head' in model:
        _shrink_mask2former(model.panoptic_head, model.train_cfg)
        model.data_preprocessor.batch_augments[0].size = (96, 96)
    elif model.type == 'RTMDet':
        model.data_preprocessor.pad_size_divisor = 32  # its own images are 640 x 640
    return cfg


def _shrink_two_stages(model: Any) -> None:
    model.train_cfg.rpn_proposal.max_per_img = 16
    model.test_cfg.rpn.max_per_img = 16
    model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=4)  # a random model finds something too
    stages = model.train_cfg.rcnn
    for stage in stages if isinstance(stages, list) else [stages]:
        stage.sampler.num = 16


def _shrink_mask2former(head: Any, train_cfg: Any) -> None:
    head.num_queries = 8
    head.pixel_decoder.encoder.num_layers = 1
    head.transformer_decoder.num_layers = 3  # one for each level
    train_cfg.num_points = 64


@contextmanager
def scope_of(cfg: Config) -> Iterator[None]:
    """Lets names be found as the config's ``default_scope`` says."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        yield


def build_model(cfg: Config, device: str) -> nn.Module:
    """The model of a config, without SyncBN, as the runner has it in one process."""
    with scope_of(cfg), torch.device(device):
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
    if 'level_embed' in dict(model.named_parameters(recurse=False)):
        nn.init.normal_(model.level_embed)  # DINO's is unset memory before init_weights
    return model


@functools.cache
def meta_model(path: Path) -> nn.Module:
    """The model of a recipe as it is, on the meta device, for tests that leave it unchanged."""
    return build_on_meta(recipe(path))


def build_wrapper(cfg: Config, model: nn.Module, amp: str) -> OptimWrapper:
    """The optimizer of a config; ``amp`` is 'bf16' or 'off'."""
    set_amp(cfg, amp)
    with scope_of(cfg):
        return build_optim_wrapper(model, cfg.optim_wrapper)


def make_batch(cfg: Config) -> dict[str, list[Any]]:
    """Two small random images of different size, with labels of the config's task."""
    generator = torch.Generator().manual_seed(0)
    if cfg.default_scope == 'mmseg':
        sample = _label_map
    else:  # some losses make use of masks where there are any
        sample = functools.partial(_boxes_and_masks, masks='segm' in str(cfg.val_evaluator))
    images = [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in SAMPLE_SIZES]
    return {'inputs': images, 'data_samples': [sample(*size) for size in SAMPLE_SIZES]}


def losses_of(model: nn.Module, wrapper: OptimWrapper, data: dict[str, Any]) -> dict[str, float]:
    """Forward and backward pass in the wrapper's precision; gradients stay, and the losses are returned."""
    with wrapper.optim_context(model):
        data = model.data_preprocessor(data, True)
        total, losses = model.parse_losses(model(**data, mode='loss'))
    wrapper.backward(total)
    return {name: float(value.detach()) for name, value in losses.items()}


def _boxes_and_masks(height: int, width: int, *, masks: bool) -> Any:
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    boxes = torch.tensor([[4, 6, 36, 44], [30, 10, 74, 60]])
    bitmaps = np.zeros((len(boxes), height, width), dtype=np.uint8)
    for bitmap, (x1, y1, x2, y2) in zip(bitmaps, boxes.tolist(), strict=True):
        bitmap[y1:y2, x1:x2] = 1
    sample = DetDataSample(metainfo=_metainfo(height, width))
    sample.gt_instances = InstanceData(bboxes=boxes.float(), labels=torch.tensor([0, 3]))
    if masks:
        sample.gt_instances.masks = BitmapMasks(bitmaps, height, width)
    sample.gt_sem_seg = PixelData(sem_seg=_stuff(height, width))
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    return sample


def _label_map(height: int, width: int) -> Any:
    from mmseg.structures import SegDataSample

    labels = _stuff(height, width, (0, 3))
    return SegDataSample(metainfo=_metainfo(height, width), gt_sem_seg=PixelData(data=labels))


def _stuff(height: int, width: int, classes: tuple[int, int] = (81, 90)) -> torch.Tensor:
    """``(1, H, W)``: one class above, one below, and a column to be ignored."""
    labels = torch.full((1, height, width), classes[0])
    labels[:, : height // 2] = classes[1]
    labels[:, :, -8:] = 255
    return labels


def _metainfo(height: int, width: int) -> dict[str, Any]:
    return {
        'img_shape': (height, width),
        'ori_shape': (height, width),
        'pad_shape': (height, width),
        'scale_factor': (1.0, 1.0),
        'img_path': '',
    }
