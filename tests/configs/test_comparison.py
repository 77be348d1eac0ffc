"""Swin and ResNets in our recipes: heads, augmentation and schedule are ConvNeXt's, the rest is their own.

Their figures: SwinTransformer/Swin-Transformer-{Object-Detection,Semantic-Segmentation}, README; mmdet's and mmseg's
own Swin configs.
"""

import re
from pathlib import Path

import mmdet
import mmseg
import pytest
from mmengine.config import Config
from recipes import CONFIGS, build_wrapper, meta_model, recipe

from densekit.engine.config import load_config

# The ConvNeXt in whose recipe it stands, millions of parameters as printed, drop path.
SWIN = {
    'detection/cascade_swin_t_coco': ('t', 86, 0.2),
    'detection/cascade_swin_s_coco': ('s', 107, 0.2),
    'detection/cascade_swin_b_coco': ('b', 145, 0.3),
    'segmentation/upernet_swin_t_ade20k': ('t', 60, 0.3),
    'segmentation/upernet_swin_s_ade20k': ('s', 81, 0.3),
    'segmentation/upernet_swin_b_ade20k': ('b', 121, 0.3),
}
# Weights in the place of drop path; the parameters are those of Table 2 of the Swin paper, arXiv 2103.14030.
RESNETS = {
    'detection/cascade_r50_coco': ('t', 82, 'resnet50'),
    'detection/cascade_x101_coco': ('t', 140, 'resnext101_64x4d.imagenet1k_v1'),
    'segmentation/upernet_r50_ade20k': ('t', None, 'resnet50'),
    'segmentation/upernet_x101_ade20k': ('t', None, 'resnext101_64x4d.imagenet1k_v1'),
}
ALL = SWIN | RESNETS
# Besides the backbone, its channels, and how its parameters learn. Not compared: names of the run.
OWN = {'optim_wrapper', 'work_dir', 'filename'}


def config(name):
    return load_config(str(CONFIGS / f'{name}.py'))


def without_own(cfg):
    """The config without what may differ."""
    cfg = {key: value for key, value in cfg.to_dict().items() if key not in OWN}
    cfg['model'].pop('backbone')
    for part in ('neck', 'decode_head', 'auxiliary_head'):
        cfg['model'].get(part, {}).pop('in_channels', None)
    return cfg


@pytest.mark.parametrize('name', ALL)
def test_heads_data_and_schedule_are_convnexts(name):
    twin = re.sub('_(swin_.|r50|x101)_', f'_convnext_{ALL[name][0]}_', name)
    assert without_own(config(name)) == without_own(config(twin))


@pytest.mark.parametrize('name', [name for name in ALL if ALL[name][1]])
def test_parameters_as_printed(name):
    count = sum(parameter.numel() for parameter in meta_model(CONFIGS / f'{name}.py').parameters())
    assert round(count / 1e6) == ALL[name][1]


@pytest.mark.parametrize('name', SWIN)
def test_swin_learns_as_its_authors_have_it(name):
    cfg = config(name)
    lr, weight_decay = (1e-4, 0.05) if name.startswith('detection') else (6e-5, 0.01)
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay)
    assert cfg.model.backbone.drop_path_rate == SWIN[name][2]
    groups = build_wrapper(
        recipe(CONFIGS / f'{name}.py'), meta_model(CONFIGS / f'{name}.py'), 'off'
    ).optimizer.param_groups
    assert {group['lr'] for group in groups} == {lr}  # no layer decay
    assert {group['weight_decay'] for group in groups} == {0.0, weight_decay}
    release = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/'
    size = {'t': 'tiny', 's': 'small', 'b': 'base'}[SWIN[name][0]]
    assert cfg.model.backbone.init_cfg.checkpoint == f'{release}swin_{size}_patch4_window7_224.pth'
    assert cfg.model.backbone.convert_weights


@pytest.mark.parametrize('name', RESNETS)
def test_resnet_learns_alike_in_all_layers(name):
    cfg, path = config(name), CONFIGS / f'{name}.py'
    optimizer = build_wrapper(recipe(path), meta_model(path), 'off').optimizer
    kind, lr = ('AdamW', 1e-4) if name.startswith('detection') else ('SGD', 0.01)
    assert type(optimizer).__name__ == kind and {group['lr'] for group in optimizer.param_groups} == {lr}
    assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint=f'torchvision://{RESNETS[name][2]}')


@pytest.mark.parametrize(
    ('name', 'package', 'file'),
    [
        ('detection/cascade_swin_t_coco', mmdet, 'mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco'),
        (
            'segmentation/upernet_swin_t_ade20k',
            mmseg,
            'swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512',
        ),
    ],
)
def test_swin_is_the_stock_one(name, package, file):
    stock = Config.fromfile(Path(package.__file__).parent / f'.mim/configs/swin/{file}.py')
    ours = config(name)
    assert ours.optim_wrapper.paramwise_cfg == stock.optim_wrapper.paramwise_cfg
    assert ours.param_scheduler == stock.param_scheduler
    ours.model.backbone.pop('init_cfg'), stock.model.backbone.pop('init_cfg')
    differing = {key for key, value in ours.model.backbone.items() if stock.model.backbone.get(key, value) != value}
    assert {key for key in differing if key != 'type'} <= {'depths', 'num_heads'}  # tuples for lists
    assert all(list(ours.model.backbone[key]) == stock.model.backbone[key] for key in ('depths', 'num_heads'))
