"""The recipes of ConvNeXt V2 are within what arXiv 2301.00808 gives (appendix A); of V2-B they are mmdet's."""

import pytest
from recipes import CONFIGS, config_of, meta_model

# Drop path, layer decay, whether in float32. V2-B: mmdet's projects/ConvNeXt-V2; the paper has ranges only.
COCO = {
    'a': (0.2, 0.9, False),
    'n': (0.2, 0.9, False),
    't': (0.3, 0.95, False),
    'b': (0.4, 0.95, False),
    'l': (0.5, 0.95, True),
    'h': (0.5, 0.95, True),
}
ADE20K = {'t': False, 'b': False, 'l': True, 'h': True, 'h_in22k_640': True}
MODELS = [f'detection/mask_rcnn_convnextv2_{size}_coco' for size in COCO]
MODELS += [f'segmentation/upernet_convnextv2_{size}_ade20k' for size in ADE20K]


def config(name):
    return config_of(CONFIGS / f'{name}.py')


@pytest.mark.parametrize('name', MODELS)
def test_backbone_has_grn_and_no_layer_scale(name):
    backbone = config(name).model.backbone
    assert backbone.use_grn and backbone.layer_scale_init_value == 0.0
    block = meta_model(CONFIGS / f'{name}.py').backbone.stages[0][0]
    assert block.grn is not None and block.gamma is None
    tag = 'fcmae_ft_in22k_in1k_512' if 'in22k' in name else 'fcmae_ft_in1k'  # never bare FCMAE
    assert backbone.init_cfg.checkpoint == f'convnextv2_{backbone.arch}.{tag}'


@pytest.mark.parametrize('size', COCO)
def test_detector(size):
    cfg = config(f'detection/mask_rcnn_convnextv2_{size}_coco')
    drop_path, rate, float32 = COCO[size]
    wrapper = cfg.optim_wrapper
    assert cfg.model.backbone.drop_path_rate == drop_path and 0.2 <= drop_path <= 0.5
    assert wrapper.paramwise_cfg == dict(decay_rate=rate, decay_type='layer_wise') and rate in (0.9, 0.95)
    assert wrapper.optimizer == dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05, fused=True)
    assert wrapper.type == ('OptimWrapper' if float32 else 'AutocastOptimWrapper') and 'clip_grad' not in wrapper
    assert cfg.train_cfg.max_epochs == 36 and cfg.param_scheduler[1].milestones == [27, 33]
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 32
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert (steps['RandomResize'].scale, steps['RandomResize'].ratio_range) == ((1024, 1024), (0.1, 2.0))
    assert steps['RandomCrop'].crop_size == (1024, 1024) and 'RandomChoice' not in steps
    assert cfg.model.test_cfg.rcnn.nms == dict(type='soft_nms', iou_threshold=0.5)
    assert cfg.model.test_cfg.rpn.nms.type == 'nms'


@pytest.mark.parametrize('size', ADE20K)
def test_segmentor(size):
    cfg = config(f'segmentation/upernet_convnextv2_{size}_ade20k')
    wrapper, crop = cfg.optim_wrapper, 640 if '640' in size else 512
    assert 0.1 <= cfg.model.backbone.drop_path_rate <= 0.4
    assert wrapper.paramwise_cfg.decay_rate in (0.8, 0.9) and wrapper.optimizer.lr in (1e-4, 2e-4, 3e-4)
    assert wrapper.type == ('OptimWrapper' if ADE20K[size] else 'AutocastOptimWrapper')
    assert cfg.train_cfg.max_iters == 160000
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.model.data_preprocessor.size == cfg.model.test_cfg.crop_size == (crop, crop)
    crops = [step.crop_size for step in cfg.train_dataloader.dataset.pipeline if step.type == 'RandomCrop']
    assert crops == [(crop, crop)]


def test_parameters_of_huge_as_printed():
    model = meta_model(CONFIGS / 'segmentation/upernet_convnextv2_h_ade20k.py')
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == 707  # Table 7
