"""DINO, Mask2Former and RTMDet are the stock ones with another backbone; any recipe starts from other weights."""

from pathlib import Path

import mmdet
import mmseg
import pytest
from recipes import CONFIGS, build_model, build_wrapper, losses_of, make_batch, shrink
from test_published import compared

from backbones import ZOO
from densekit.engine.config import load_config

DINO = 'detection/dino_convnext_t_12e_coco'
RTMDET = 'detection/rtmdet_l_convnext_b_coco'
STOCK = {
    DINO: (mmdet, 'dino/dino-4scale_r50_8xb2-12e_coco'),
    RTMDET: (mmdet, 'rtmdet/rtmdet_l_convnext_b_4xb32-100e_coco'),
    'detection/mask2former_convnext_t_coco': (mmdet, 'mask2former/mask2former_r50_8xb2-lsj-50e_coco'),
    'detection/mask2former_panoptic_convnext_t_coco': (mmdet, 'mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic'),
    'segmentation/mask2former_convnext_t_ade20k': (mmseg, 'mask2former/mask2former_r50_8xb2-160k_ade20k-512x512'),
}
# Besides the channels of the backbone: how mmseg writes "no dropout", and what is the default.
NO_DROPOUT = {'attn_drop', 'proj_drop', 'dropout', 'dropout_layer', 'add_identity'}
DEFAULTS = {'init_cfg', 'norm_cfg', 'im2col_step'}

MODERN = {
    'dinov3': ('convnext_tiny.dinov3_lvd1689m', ()),
    'eupe': ('convnext_tiny.eupe_lvd1689m', ()),
    'clip': ('convnext_base.clip_laion2b', ('model.backbone.arch=base',)),
}
NECKS = {
    'segmentation/upernet_convnext_t_ade20k': (
        'model.decode_head.in_channels=[128,256,512,1024]',
        'model.auxiliary_head.in_channels=512',
    ),
    'detection/mask_rcnn_convnext_t_coco': ('model.neck.in_channels=[128,256,512,1024]',),
    DINO: ('model.neck.in_channels=[256,512,1024]',),
}


@pytest.mark.parametrize('name', STOCK)
def test_model_is_the_stock_one(name):
    package, file = STOCK[name]
    ours = compared(CONFIGS / f'{name}.py')
    stock = compared(Path(package.__file__).parent / f'.mim/configs/{file}.py')
    missing = object()
    for key in sorted(ours.keys() | stock.keys()):
        if not key.startswith('model.') or key.startswith('model.backbone.') or '.in_channels.' in key:
            continue
        ending = key.rsplit('.', 1)[1]
        if ours.get(key, missing) != stock.get(key, missing):
            assert ending in NO_DROPOUT | DEFAULTS, key
            values = {entries[key] for entries in (ours, stock) if key in entries}
            assert ending == 'im2col_step' or values <= {None, 0.0, True}, key


@pytest.mark.parametrize('name', STOCK)
def test_optimizer_and_data_are_the_stock_ones(name):
    package, file = STOCK[name]
    ours = compared(CONFIGS / f'{name}.py')
    stock = compared(Path(package.__file__).parent / f'.mim/configs/{file}.py')
    keys = ['optimizer.type', 'optimizer.lr', 'optimizer.weight_decay', 'clip_grad.max_norm']
    keys += ['paramwise_cfg.custom_keys.backbone.lr_mult', 'paramwise_cfg.custom_keys.query_embed.decay_mult']
    for key in keys:
        assert ours.get(f'optim_wrapper.{key}') == stock.get(f'optim_wrapper.{key}'), key
    for key in ('train_cfg.max_epochs', 'train_cfg.max_iters', 'train_dataloader.batch_size'):
        assert ours.get(key) == stock.get(key), key
    if name in (DINO, RTMDET):  # Mask2Former trains on the large-scale jitter and the crops that we have for others
        pipelines = [{key: value for key, value in cfg.items() if '.pipeline.' in key} for cfg in (ours, stock)]
        assert pipelines[0] == pipelines[1]
        schedules = [{key: value for key, value in cfg.items() if 'param_scheduler' in key} for cfg in (ours, stock)]
        assert schedules[0] == schedules[1]


def test_rtmdet_decays_by_layers():
    cfg = load_config(str(CONFIGS / f'{RTMDET}.py'))
    assert cfg.optim_wrapper.paramwise_cfg == dict(decay_rate=0.8, decay_type='layer_wise')
    backbone = cfg.model.backbone
    assert (backbone.drop_path_rate, backbone.with_cp, backbone.out_indices) == (0.7, True, (1, 2, 3))
    assert [hook.type for hook in cfg.custom_hooks] == ['EMAHook', 'PipelineSwitchHook']
    assert cfg.custom_hooks[1].switch_epoch == 90


@pytest.mark.parametrize(
    ('start', 'frozen'), [('dinov3', True), *((start, False) for start in MODERN)], ids=lambda value: str(value)
)
@pytest.mark.parametrize('name', NECKS)
def test_starts_from_modern_weights_by_one_option(name, start, frozen):
    weights, size = MODERN[start]
    options = [f'model.backbone.init_cfg.checkpoint={weights}', *size, *(NECKS[name] if size else ())]
    options += ['model.backbone.frozen_stages=4'] if frozen else []
    cfg = load_config(str(CONFIGS / f'{name}.py'), options)
    assert ZOO[cfg.model.backbone.init_cfg.checkpoint].arch == cfg.model.backbone.arch
    cfg.model.backbone.init_cfg = None
    model = build_model(shrink(cfg), 'cpu')
    trainable = [name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad]
    assert any(not name.startswith('norm') for name in trainable) != frozen
    wrapper = build_wrapper(cfg, model, 'off')
    before = {key: value.clone() for key, value in model.backbone.named_parameters()}
    losses_of(model, wrapper, make_batch(cfg))
    wrapper.step()
    changed = {key for key, value in model.backbone.named_parameters() if not value.equal(before[key])}
    assert changed == set(trainable)
