"""The recipes of the ConvNeXt paper are the paper's: hyper-parameters, sizes, learning rates of the layers.

Two sources that know nothing of each other: numbers written here from the paper and the official configs, and the
whole of mmdet's and mmseg's own ConvNeXt-T configs.
"""

import re
from pathlib import Path

import mmdet
import mmseg
import pytest
from mmengine.config import Config
from recipes import CONFIGS, build_model, build_wrapper, recipe

from densekit.engine.config import load_config

MASK_T = 'detection/mask_rcnn_convnext_t_coco'
CASCADE_T = 'detection/cascade_convnext_t_coco'
UPERNET_T = 'segmentation/upernet_convnext_t_ade20k'
RECIPES_T = (MASK_T, CASCADE_T, UPERNET_T)

# Tables 3 and 4 of arXiv 2201.03545, in millions; those of segmentation include the auxiliary head.
PARAMETERS = {MASK_T: 48, CASCADE_T: 86, UPERNET_T: 60}

# Appendix A.3 of the paper and the configs of facebookresearch/ConvNeXt at 048efce:
# learning rate, drop path, layer decay and its kind.
HYPER_PARAMETERS = {
    MASK_T: (1e-4, 0.4, 0.95, 'layer_wise'),
    CASCADE_T: (2e-4, 0.4, 0.7, 'layer_wise'),
    UPERNET_T: (1e-4, 0.4, 0.9, 'stage_wise'),
}

# decay ** (distance from the head), computed by the official optimizer constructor; a parameter group with weight
# decay and one without for each.
LAYER_SCALES = {
    MASK_T: (0.69834, 0.73509, 0.77378, 0.81451, 0.85737, 0.9025, 0.95, 1),
    CASCADE_T: (0.08235, 0.11765, 0.16807, 0.2401, 0.343, 0.49, 0.7, 1),
    UPERNET_T: (0.4783, 0.53144, 0.59049, 0.6561, 0.729, 1),
}

STOCK = {
    MASK_T: (mmdet, 'mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py'),
    CASCADE_T: (mmdet, 'cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py'),
    UPERNET_T: (mmseg, 'convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py'),
}
COMPARED = ('model', 'optim_wrapper', 'param_scheduler', 'auto_scale_lr', 'default_hooks', 'env_cfg', 'log_processor')
COMPARED += tuple(f'{loop}_{part}' for loop in ('train', 'val', 'test') for part in ('cfg', 'dataloader', 'evaluator'))
COMPARED += ('tta_model', 'tta_pipeline', 'default_scope')
# What we do otherwise, and why; * stands for a position in a list.
OTHERWISE = {
    'model.backbone.type': 'ours',
    'model.backbone.gap_before_final_norm': 'False is the only choice here',
    'model.backbone.init_cfg.checkpoint': 'the official file, which mmdet has converted',
    'model.backbone.init_cfg.prefix': 'the official file has none',
    'optim_wrapper.type': 'bf16 for fp16',
    'optim_wrapper.constructor': 'ours',
    'optim_wrapper.paramwise_cfg.num_layers': 'follows from the backbone',
    'default_hooks.checkpoint.max_keep_ckpts': '36 checkpoints of a detector fill a disk',
}
OTHERWISE_DETECTION = {
    'model.rpn_head.type': 'float32 boxes under bf16',
    'model.roi_head.bbox_roi_extractor.type': 'float32 boxes under bf16',
    'model.roi_head.mask_roi_extractor.type': 'float32 boxes under bf16',
    **{f'{loop}_dataloader.num_workers': 'JPEG decoding keeps two busy' for loop in ('train', 'val', 'test')},
}
OTHERWISE_SEGMENTATION = {
    'model.pretrained': 'deprecated; None',
    'optim_wrapper.loss_scale': 'bf16 needs none',
    'auto_scale_lr.base_batch_size': "tells when the batch is not the recipe's",
    'auto_scale_lr.enable': 'off, as without it',
    'train_dataloader.dataset.pipeline.*.reduce_zero_label': 'the dataset class says so',
    'val_dataloader.dataset.pipeline.*.reduce_zero_label': 'the dataset class says so',
    'test_dataloader.dataset.pipeline.*.reduce_zero_label': 'the dataset class says so',
    'tta_pipeline.*.backend_args': 'None, the default',
    'tta_pipeline.*.transforms.*.*.scale_factor': 'the official code scales 2048 x 512, not the image',
    'tta_pipeline.*.transforms.*.*.scale.*': 'the official code scales 2048 x 512, not the image',
}

every_t = pytest.mark.parametrize('name', RECIPES_T)


def file_of(name):
    return CONFIGS / f'{name}.py'


def flat(node, path=''):
    """``{'model.neck.in_channels.0': 96, ...}``; an empty dictionary or list is a value."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    entries = {}
    for key, value in items:
        entries.update(flat(value, f'{path}.{key}' if path else str(key)))
    return entries or {path: node if not isinstance(node, tuple) else list(node)}


def compared(path):
    cfg = Config.fromfile(path, import_custom_modules=False)
    return flat({key: cfg[key] for key in COMPARED if key in cfg})


@every_t
def test_recipe_differs_from_the_stock_one_only_on_purpose(name):
    package, file = STOCK[name]
    ours, stock = compared(file_of(name)), compared(Path(package.__file__).parent / '.mim/configs/convnext' / file)
    missing = object()
    differing = {key for key in ours.keys() | stock.keys() if ours.get(key, missing) != stock.get(key, missing)}
    expected = OTHERWISE | (OTHERWISE_SEGMENTATION if package is mmseg else OTHERWISE_DETECTION)
    assert {re.sub(r'\.\d+(?=\.|$)', '.*', key) for key in differing} == set(expected)


@every_t
def test_hyper_parameters(name):
    cfg = load_config(str(file_of(name)))
    wrapper, backbone = cfg.optim_wrapper, cfg.model.backbone
    decay = wrapper.paramwise_cfg
    found = (wrapper.optimizer.lr, backbone.drop_path_rate, decay.decay_rate, decay.decay_type)
    assert found == HYPER_PARAMETERS[name]
    assert wrapper.optimizer == dict(type='AdamW', lr=found[0], betas=(0.9, 0.999), weight_decay=0.05)
    assert wrapper.type == 'AutocastOptimWrapper' and 'clip_grad' not in wrapper
    assert backbone.layer_scale_init_value == 1.0
    assert backbone.init_cfg.checkpoint == 'https://dl.fbaipublicfiles.com/convnext/convnext_tiny_1k_224.pth'
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 16
    assert not cfg.auto_scale_lr.enable


@pytest.mark.parametrize('name', [MASK_T, CASCADE_T])
def test_detection_schedule_and_augmentation(name):
    cfg = load_config(str(file_of(name)))
    warm_up, steps = cfg.param_scheduler
    assert (warm_up.type, warm_up.start_factor, warm_up.begin, warm_up.end) == ('LinearLR', 0.001, 0, 1000)
    assert (steps.type, steps.milestones, steps.gamma, steps.end) == ('MultiStepLR', [27, 33], 0.1, 36)
    assert cfg.train_cfg.max_epochs == 36
    whole, cropped = cfg.train_dataloader.dataset.pipeline[3].transforms
    scales = [(480 + 32 * i, 1333) for i in range(11)]
    assert scales[-1] == (800, 1333)
    assert [step.type for step in whole] == ['RandomChoiceResize'] and whole[0].scales == scales
    assert [step.type for step in cropped] == ['RandomChoiceResize', 'RandomCrop', 'RandomChoiceResize']
    assert cropped[0].scales == [(400, 1333), (500, 1333), (600, 1333)] and cropped[2].scales == scales
    assert (cropped[1].crop_type, cropped[1].crop_size) == ('absolute_range', (384, 600))
    assert cfg.test_dataloader.dataset.pipeline[1] == dict(type='Resize', scale=(1333, 800), keep_ratio=True)


def test_cascade_box_heads():
    cfg = load_config(str(file_of(CASCADE_T)))
    for head in cfg.model.roi_head.bbox_head:
        assert (head.type, head.num_shared_convs, head.num_shared_fcs) == ('ConvFCBBoxHead', 4, 1)
        assert head.norm_cfg.type == 'SyncBN' and head.reg_decoded_bbox and not head.reg_class_agnostic
        assert head.loss_bbox == dict(type='GIoULoss', loss_weight=10.0)


def test_segmentation_schedule_augmentation_and_slide_test():
    cfg = load_config(str(file_of(UPERNET_T)))
    warm_up, poly = cfg.param_scheduler
    assert (warm_up.type, warm_up.start_factor, warm_up.begin, warm_up.end) == ('LinearLR', 1e-6, 0, 1500)
    assert (poly.type, poly.power, poly.eta_min, poly.begin, poly.end) == ('PolyLR', 1.0, 0.0, 1500, 160000)
    assert cfg.train_cfg.max_iters == 160000
    train = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert (train['RandomResize'].scale, train['RandomResize'].ratio_range) == ((2048, 512), (0.5, 2.0))
    assert (train['RandomCrop'].crop_size, train['RandomCrop'].cat_max_ratio) == ((512, 512), 0.75)
    assert cfg.model.data_preprocessor.size == (512, 512)
    assert cfg.model.test_cfg == dict(mode='slide', crop_size=(512, 512), stride=(341, 341))
    ratios = [step.scale[1] / 512 for step in cfg.tta_pipeline[1].transforms[0]]
    assert ratios == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]


@every_t
def test_parameters_as_printed(name):
    model = build_model(recipe(file_of(name)), 'meta')
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == PARAMETERS[name]


@every_t
def test_layer_decay_groups(name):
    cfg = recipe(file_of(name))
    groups = build_wrapper(cfg, build_model(cfg, 'meta'), 'off').optimizer.param_groups
    found = sorted((round(group['lr_scale'], 5), group['weight_decay']) for group in groups)
    assert found == [(scale, decay) for scale in LAYER_SCALES[name] for decay in (0.0, 0.05)]
    base_lr = HYPER_PARAMETERS[name][0]
    assert all(group['lr'] == pytest.approx(base_lr * group['lr_scale']) for group in groups)
