"""Swin, ResNets and ViTs in our recipes: heads, augmentation and schedule are ConvNeXt's, the rest is their own.

Their figures: SwinTransformer/Swin-Transformer-{Object-Detection,Semantic-Segmentation}, README; mmdet's and mmseg's
own Swin configs, mmseg's ViT configs.
"""

import re
import runpy
from pathlib import Path

import mmdet
import mmseg
import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from recipes import CONFIGS, build_wrapper, config_of, meta_model, recipe, scope_of

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
# The isotropic ConvNeXt beside it, no printed parameters, name in timm.
VITS = {
    'segmentation/upernet_vit_s_ade20k': ('iso_s', None, 'deit_small_patch16_224'),
    'segmentation/upernet_vit_b_ade20k': ('iso_b', None, 'deit_base_patch16_224'),
}
ALL = SWIN | RESNETS | VITS
# Besides the backbone, its channels, and how its parameters learn. Not compared: names of the run.
OWN = {'optim_wrapper', 'work_dir', 'filename'}


def renamed(weights):
    """DeiT's weights as mmseg's converter renames them."""
    file = Path(mmseg.__file__).parent / '.mim/tools/model_converters/vit2mmseg.py'
    return runpy.run_path(str(file))['convert_vit'](weights)


def config(name):
    return config_of(CONFIGS / f'{name}.py')


def without_own(cfg):
    """The config without what may differ."""
    cfg = {key: value for key, value in cfg.to_dict().items() if key not in OWN}
    cfg['model'].pop('backbone')
    if cfg['default_scope'] == 'mmseg':
        cfg['model'].pop('neck', None)  # a ViT's, which makes the pyramid that others emit
    for part in ('neck', 'decode_head', 'auxiliary_head'):
        cfg['model'].get(part, {}).pop('in_channels', None)
    return cfg


@pytest.mark.parametrize('name', ALL)
def test_heads_data_and_schedule_are_convnexts(name):
    twin = re.sub('_(swin_.|vit_.|r50|x101)_', f'_convnext_{ALL[name][0]}_', name)
    assert without_own(config(name)) == without_own(config(twin))


@pytest.mark.parametrize('size', ['s', 'b'])
def test_isotropic_convnext_stands_in_the_recipe_of_convnext(size):
    isotropic = config(f'segmentation/upernet_convnext_iso_{size}_ade20k')
    convnext = config(f'segmentation/upernet_convnext_{size}_ade20k')
    assert without_own(isotropic) == without_own(convnext)
    assert isotropic.model.backbone.drop_path_rate == convnext.model.backbone.drop_path_rate
    isotropic.optim_wrapper.paramwise_cfg.decay_type = 'stage_wise'  # all blocks would be one stage
    assert isotropic.optim_wrapper == convnext.optim_wrapper
    vit = config(f'segmentation/upernet_vit_{size}_ade20k').model
    for part in ('decode_head', 'auxiliary_head'):
        assert isotropic.model[part] == vit[part]


@pytest.mark.parametrize('name', [name for name in ALL if ALL[name][1]])
def test_parameters_as_printed(name):
    count = sum(parameter.numel() for parameter in meta_model(CONFIGS / f'{name}.py').parameters())
    assert round(count / 1e6) == ALL[name][1]


@pytest.mark.parametrize('name', SWIN)
def test_swin_learns_as_its_authors_have_it(name):
    cfg = config(name)
    lr, weight_decay = (1e-4, 0.05) if name.startswith('detection') else (6e-5, 0.01)
    adamw = dict(type='AdamW', lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay, fused=True)
    assert cfg.optim_wrapper.optimizer == adamw
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


@pytest.mark.parametrize('name', VITS)
def test_vit_is_the_stock_one(name):
    size = name.split('_')[2]
    file = f'.mim/configs/vit/vit_deit-{size}16_mln_upernet_8xb2-160k_ade20k-512x512.py'
    stock, ours = Config.fromfile(Path(mmseg.__file__).parent / file), config(name)
    assert ours.model.backbone.pop('patch_bias')  # left out in mmseg 1.2.2, but not in DeiT's weights
    ours.model.backbone.pop('init_cfg')
    for key, value in ours.model.backbone.items():
        assert stock.model.backbone[key] == value, key
    defaults = {'in_channels': 3, 'attn_drop_rate': 0.0, 'drop_rate': 0.0, 'with_cls_token': True, 'norm_eval': False}
    defaults |= {'act_cfg': dict(type='GELU'), 'interpolate_mode': 'bicubic'}
    left_out = stock.model.backbone.keys() - ours.model.backbone.keys()
    assert {key: stock.model.backbone[key] for key in left_out} == defaults
    assert ours.model.neck == stock.model.neck and ours.param_scheduler == stock.param_scheduler
    assert ours.optim_wrapper.optimizer == {**stock.optim_wrapper.optimizer, 'fused': True}
    groups = {}
    for which, wrapper in (('ours', ours.optim_wrapper), ('stock', stock.optim_wrapper)):
        cfg = recipe(CONFIGS / f'{name}.py')
        cfg.optim_wrapper = wrapper
        optimizer = build_wrapper(cfg, meta_model(CONFIGS / f'{name}.py'), 'off').optimizer
        groups[which] = {
            id(group['params'][0]): (group['lr'], group['weight_decay']) for group in optimizer.param_groups
        }
    assert groups['ours'] == groups['stock']
    assert sorted(set(groups['ours'].values())) == [(6e-5, 0.0), (6e-5, 0.01)]


@pytest.mark.parametrize('name', VITS)
def test_vit_takes_the_published_weights_once_renamed(name):
    with torch.device('meta'):
        published = timm.create_model(VITS[name][2], num_classes=1000).state_dict()
    own = meta_model(CONFIGS / f'{name}.py').backbone.state_dict()
    weights = renamed(published)
    assert own.keys() <= weights.keys() and weights.keys() - own.keys() == {'ln1.weight', 'ln1.bias'}
    assert {key for key in own if own[key].shape != weights[key].shape} == {'pos_embed'}  # mmseg resizes it
    assert own.keys() & published.keys() == {'cls_token', 'pos_embed'}  # all that mmseg would take as they are


def test_vit_computes_what_deit_does(tmp_path):
    torch.manual_seed(0)
    deit = timm.create_model('deit_small_patch16_224', depth=2).eval()
    for parameter in deit.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    torch.save(renamed(deit.state_dict()), tmp_path / 'deit.pth')
    cfg = config('segmentation/upernet_vit_s_ade20k')
    cfg.model.backbone.update(img_size=(224, 224), num_layers=2, out_indices=(0, 1))
    cfg.model.backbone.init_cfg.checkpoint = str(tmp_path / 'deit.pth')
    with scope_of(cfg):
        vit = MODELS.build(cfg.model.backbone)
    vit.init_weights()
    vit.eval()
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = deit.get_intermediate_layers(image, n=[0, 1], reshape=True)
        for ours, theirs in zip(vit(image), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
