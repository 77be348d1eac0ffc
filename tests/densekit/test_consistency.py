"""Channels and classes that do not fit are found before the first step."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

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


def model_of(**parts):
    """A module whose attributes are modules, or numbers, by their name."""
    model = nn.Module()
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def test_heads_of_boxes_know_things_only():
    heads = model_of(bbox_head=model_of(num_classes=3))
    panoptic = model_of(roi_head=heads, panoptic_fusion_head=model_of(num_things_classes=3, num_stuff_classes=2))
    check_classes(panoptic, SHAPES, 'train')
    check_classes(panoptic, SHAPES[:3], 'val')  # a data set of instances
    for model, classes in ((panoptic, SHAPES[:4]), (model_of(roi_head=heads), SHAPES)):
        with pytest.raises(ValueError, match=r'model\.roi_head\.bbox_head 3'):
            check_classes(model, classes, 'train')


def test_heads_of_models_that_read_class_names_fit_any():
    reader = model_of(bbox_head=model_of(num_classes=256), language_model=nn.Identity())
    check_classes(reader, SHAPES, 'train')
    check_classes(model_of(detector=reader), SHAPES, 'train')
    with pytest.raises(ValueError, match=r'model\.bbox_head 256'):
        check_classes(model_of(bbox_head=reader.bbox_head, detector=reader), SHAPES, 'train')


def test_heads_of_edges_fit_any():
    class STDCHead(nn.Module):
        num_classes = 2

    check_classes(model_of(auxiliary_head=nn.ModuleList([STDCHead()])), SHAPES, 'train')
    with pytest.raises(ValueError, match=r'model\.auxiliary_head\.0 2'):
        check_classes(model_of(auxiliary_head=nn.ModuleList([model_of(num_classes=2)])), SHAPES, 'train')


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
