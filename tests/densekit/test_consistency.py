"""Channels and classes that do not fit are found before the first step."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from densekit.engine.consistency import check_channels, check_classes

SHAPES = ('circle', 'square', 'triangle', 'star', 'cross')


@pytest.fixture(params=['detection/mask_rcnn_convnext_mini_shapes.py', 'segmentation/upernet_convnext_mini_shapes.py'])
def cfg(request):
    return Config.fromfile(f'configs/{request.param}')


def build(cfg):
    with torch.device('meta'), DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model)


def test_what_fits_passes(cfg):
    model = build(cfg)
    check_channels(model)
    check_classes(model, SHAPES if 'roi_head' in cfg.model else ('background', *SHAPES), 'train')
    check_classes(model, None, 'train')


def test_a_backbone_of_another_size(cfg):
    cfg.merge_from_dict({'model.backbone.arch': 'small'})
    with pytest.raises(ValueError, match=r'in_channels is \[24, 48, 96, 192\].*\[96, 192, 384, 768\]'):
        check_channels(build(cfg))


def test_an_auxiliary_head_on_another_stage():
    cfg = Config.fromfile('configs/segmentation/upernet_convnext_mini_shapes.py')
    cfg.model.auxiliary_head.in_index = 1
    with pytest.raises(ValueError, match=r'auxiliary_head\.in_channels is \[96\].*emits \[48\]'):
        check_channels(build(cfg))


@pytest.mark.parametrize('number', [3, 9])
def test_heads_with_another_number_of_classes(cfg, number):
    heads = (
        ('roi_head.bbox_head', 'roi_head.mask_head') if 'roi_head' in cfg.model else ('decode_head', 'auxiliary_head')
    )
    for head in heads:
        cfg.merge_from_dict({f'model.{head}.num_classes': number})
    with pytest.raises(
        ValueError, match=rf'5 classes \(circle.*model\.{heads[0]} {number}, model\.{heads[1]} {number}'
    ):
        check_classes(build(cfg), SHAPES, 'train')


def test_all_heads_of_a_cascade_are_named():
    cfg = Config.fromfile('configs/detection/cascade_convnext_t_coco.py')
    with pytest.raises(ValueError, match=r'bbox_head\.0 80, .*bbox_head\.2 80, .*mask_head\.2 80'):
        check_classes(build(cfg), SHAPES, 'train')
