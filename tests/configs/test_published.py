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
from recipes import CONFIGS, build_wrapper, config_of, meta_model, recipe

from densekit.engine.config import load_config

MASK_T = 'detection/mask_rcnn_convnext_t_coco'
CASCADE_T = 'detection/cascade_convnext_t_coco'
UPERNET_T = 'segmentation/upernet_convnext_t_ade20k'

# Of each recipe of the paper's tables 3 and 4 (arXiv 2201.03545) and its appendix A.3, with the configs of
# facebookresearch/ConvNeXt at 048efce: learning rate, drop path, layer decay and its kind, weights to start from,
# whether in float32, and millions of parameters (those of segmentation include the auxiliary head).
V1 = {
    MASK_T: (1e-4, 0.4, 0.95, 'layer_wise', 'tiny_1k', False, 48),
    CASCADE_T: (2e-4, 0.4, 0.7, 'layer_wise', 'tiny_1k', False, 86),
    'detection/cascade_convnext_s_coco': (2e-4, 0.6, 0.7, 'layer_wise', 'small_1k', False, 108),
    'detection/cascade_convnext_b_coco': (2e-4, 0.7, 0.8, 'layer_wise', 'base_1k', False, 146),
    'detection/cascade_convnext_b_in22k_coco': (1e-4, 0.6, 0.8, 'layer_wise', 'base_22k', False, 146),
    'detection/cascade_convnext_l_in22k_coco': (1e-4, 0.7, 0.7, 'layer_wise', 'large_22k', True, 255),
    'detection/cascade_convnext_xl_in22k_coco': (1e-4, 0.8, 0.7, 'layer_wise', 'xlarge_22k', True, 407),
    UPERNET_T: (1e-4, 0.4, 0.9, 'stage_wise', 'tiny_1k', False, 60),
    'segmentation/upernet_convnext_s_ade20k': (1e-4, 0.3, 0.9, 'stage_wise', 'small_1k', False, 82),
    'segmentation/upernet_convnext_b_ade20k': (1e-4, 0.4, 0.9, 'stage_wise', 'base_1k', False, 122),
    'segmentation/upernet_convnext_b_in22k_640_ade20k': (1e-4, 0.4, 0.9, 'stage_wise', 'base_22k', False, 122),
    'segmentation/upernet_convnext_l_in22k_640_ade20k': (1e-4, 0.4, 0.9, 'stage_wise', 'large_22k', True, 235),
    'segmentation/upernet_convnext_xl_in22k_640_ade20k': (8e-5, 0.4, 0.9, 'stage_wise', 'xlarge_22k', True, 391),
}
DETECTORS = [name for name in V1 if name.startswith('detection')]
SEGMENTORS = [name for name in V1 if name.startswith('segmentation')]

# decay ** (distance from the head), computed by the official optimizer constructor; a parameter group with weight
# decay and one without for each. By decay and the number of layers, which is 6 in T and 12 in the others.
LAYER_SCALES = {
    (0.95, 6): (0.69834, 0.73509, 0.77378, 0.81451, 0.85737, 0.9025, 0.95, 1),
    (0.7, 6): (0.08235, 0.11765, 0.16807, 0.2401, 0.343, 0.49, 0.7, 1),
    (0.7, 12): (
        *(0.00969, 0.01384, 0.01977, 0.02825, 0.04035, 0.05765, 0.08235, 0.11765, 0.16807),
        *(0.2401, 0.343, 0.49, 0.7, 1),
    ),
    (0.8, 12): (
        *(0.05498, 0.06872, 0.0859, 0.10737, 0.13422, 0.16777, 0.20972, 0.26214, 0.32768),
        *(0.4096, 0.512, 0.64, 0.8, 1),
    ),
    (0.9, 6): (0.4783, 0.53144, 0.59049, 0.6561, 0.729, 1),
    (0.9, 12): (0.25419, 0.28243, 0.31381, 0.34868, 0.38742, 1),
}

STOCK = {
    MASK_T: (mmdet, 'mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py'),
    CASCADE_T: (mmdet, 'cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py'),
    DETECTORS[2]: (mmdet, 'cascade-mask-rcnn_convnext-s-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py'),
    UPERNET_T: (mmseg, 'convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py'),
    SEGMENTORS[1]: (mmseg, 'convnext-small_upernet_8xb2-amp-160k_ade20k-512x512.py'),
    SEGMENTORS[2]: (mmseg, 'convnext-base_upernet_8xb2-amp-160k_ade20k-512x512.py'),
    SEGMENTORS[3]: (mmseg, 'convnext-base_upernet_8xb2-amp-160k_ade20k-640x640.py'),
    SEGMENTORS[4]: (mmseg, 'convnext-large_upernet_8xb2-amp-160k_ade20k-640x640.py'),
    SEGMENTORS[5]: (mmseg, 'convnext-xlarge_upernet_8xb2-amp-160k_ade20k-640x640.py'),
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
    'optim_wrapper.optimizer.fused': 'the same steps within rounding, in one kernel',
    'default_hooks.checkpoint.max_keep_ckpts': '36 checkpoints of a detector fill a disk',
}
OTHERWISE_DETECTION = {
    'model.rpn_head.type': 'float32 boxes under bf16',
    'model.roi_head.bbox_roi_extractor.type': 'float32 boxes under bf16',
    'model.roi_head.mask_roi_extractor.type': 'float32 boxes under bf16',
    **{f'{loop}_dataloader.num_workers': 'JPEG decoding keeps two busy' for loop in ('train', 'val', 'test')},
    'model.roi_head.mask_head.type': 'can give run lengths, to the pixel the same',
    'default_hooks.masks.type': 'has it do so',
    **{
        f'model.{part}.type': 'the same, without waiting for the device'
        for part in (
            *('data_preprocessor', 'rpn_head.bbox_coder', 'roi_head', 'roi_head.bbox_head'),
            *('roi_head.bbox_head.bbox_coder', 'train_cfg.rpn.assigner', 'train_cfg.rpn.sampler'),
            *('train_cfg.rcnn.assigner', 'train_cfg.rcnn.sampler'),
        )
    },
    'tta_model.type': 'mmdet has none for masks',
    **{
        f'tta_pipeline.*.{key}': 'mmdet has none for masks'
        for key in (
            *('type', 'backend_args', 'transforms.*.*.type', 'transforms.*.*.scale.*', 'transforms.*.*.keep_ratio'),
            *('transforms.*.*.prob', 'transforms.*.*.with_bbox', 'transforms.*.*.with_mask'),
        )
    },
    **{f'{loop}_evaluator.type': 'equal figures in full digits, sooner' for loop in ('val', 'test')},
    **{
        f'{loop}_evaluator.proposal_nums.*': "COCO's own limits, with which all twelve figures differ"
        for loop in ('val', 'test')
    },
}
OTHERWISE_SEGMENTATION = {
    'model.pretrained': 'deprecated; None',
    'model.type': 'windows several at a time where asked for; label maps without the logits of the whole image',
    'default_hooks.label_maps.type': 'keeps no logits that nothing looks at',
    'optim_wrapper.loss_scale': 'bf16 needs none',
    'auto_scale_lr.base_batch_size': "tells when the batch is not the recipe's",
    'auto_scale_lr.enable': 'off, as without it',
    'train_dataloader.dataset.pipeline.*.reduce_zero_label': 'the dataset class says so',
    'val_dataloader.dataset.pipeline.*.reduce_zero_label': 'the dataset class says so',
    'test_dataloader.dataset.pipeline.*.reduce_zero_label': 'the dataset class says so',
    'val_evaluator.type': 'counts exactly, at any size',
    'test_evaluator.type': 'counts exactly, at any size',
    'tta_pipeline.*.backend_args': 'None, the default',
    'tta_pipeline.*.transforms.*.*.scale_factor': 'the official code scales 2048 x 512, not the image',
    'tta_pipeline.*.transforms.*.*.scale.*': 'the official code scales 2048 x 512, not the image',
}

# The paper's grids (appendix A.3), from which each of its recipes has its values: option, COCO, ADE20K.
GRIDS = {
    'optim_wrapper.optimizer.lr': ({1e-4, 2e-4}, {8e-5, 1e-4}),
    'optim_wrapper.paramwise_cfg.decay_rate': ({0.7, 0.8, 0.9, 0.95}, {0.8, 0.9}),
    'model.backbone.drop_path_rate': ({0.3, 0.4, 0.5, 0.6, 0.7, 0.8}, {0.3, 0.4, 0.5}),
}

every_v1 = pytest.mark.parametrize('name', V1)


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


@pytest.mark.parametrize('name', STOCK)
def test_recipe_differs_from_the_stock_one_only_on_purpose(name):
    package, file = STOCK[name]
    ours, stock = compared(file_of(name)), compared(Path(package.__file__).parent / '.mim/configs/convnext' / file)
    missing = object()
    differing = {key for key in ours.keys() | stock.keys() if ours.get(key, missing) != stock.get(key, missing)}
    expected = OTHERWISE | (OTHERWISE_SEGMENTATION if package is mmseg else OTHERWISE_DETECTION)
    general = {re.sub(r'\.\d+(?=\.|$)', '.*', key) for key in differing}
    one_stage = {re.sub(r'(rcnn|bbox_head)\.\*', r'\1', key) for key in general}  # a cascade has three
    assert one_stage == set(expected)


@every_v1
def test_hyper_parameters(name):
    cfg = config_of(file_of(name))
    wrapper, backbone = cfg.optim_wrapper, cfg.model.backbone
    decay = wrapper.paramwise_cfg
    lr, drop_path, rate, kind, weights, float32, _ = V1[name]
    assert (backbone.drop_path_rate, decay.decay_rate, decay.decay_type) == (drop_path, rate, kind)
    assert wrapper.optimizer == dict(type='AdamW', lr=lr, betas=(0.9, 0.999), weight_decay=0.05, fused=True)
    assert wrapper.type == ('OptimWrapper' if float32 else 'AutocastOptimWrapper') and 'clip_grad' not in wrapper
    assert backbone.layer_scale_init_value == 1.0
    address = f'https://dl.fbaipublicfiles.com/convnext/convnext_{weights}_224.pth'
    assert backbone.init_cfg == dict(type='Pretrained', checkpoint=address)
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 16
    assert not cfg.auto_scale_lr.enable


@pytest.mark.parametrize('option', GRIDS)
def test_sweeps_are_options_and_recipes_lie_on_the_grids(option):
    for name in V1:
        grid = GRIDS[option][name in SEGMENTORS]
        assert flat(config_of(file_of(name)).to_dict())[option] in grid, name
    for name, grid in zip((MASK_T, UPERNET_T), GRIDS[option], strict=True):
        for value in grid:
            cfg = load_config(str(file_of(name)), [f'{option}={value:g}'])
            assert flat(cfg.to_dict())[option] == value
    assert load_config(str(file_of(MASK_T)), ['randomness.seed=3']).randomness.seed == 3


def test_short_schedules():
    warm_up, steps = config_of(file_of('detection/mask_rcnn_convnext_t_1x_coco')).param_scheduler
    assert (warm_up.end, steps.milestones, steps.gamma, steps.end) == (1000, [8, 11], 0.1, 12)  # mmdet's 1x
    warm_up, poly = config_of(file_of('segmentation/upernet_convnext_t_80k_ade20k')).param_scheduler
    assert (warm_up.end, poly.begin, poly.end, poly.power) == (1500, 1500, 80000, 1.0)
    for short, whole in (('mask_rcnn_convnext_t_1x_coco', MASK_T), ('upernet_convnext_t_80k_ade20k', UPERNET_T)):
        ours, theirs = (flat(config_of(file_of(name)).to_dict()) for name in (f'{Path(whole).parent}/{short}', whole))
        differing = {key for key in ours | theirs if ours.get(key) != theirs.get(key)}
        allowed = ('param_scheduler.', 'train_cfg.', 'default_hooks.checkpoint.interval', 'max_', 'work_dir')
        assert all(key.startswith(allowed) for key in differing), differing


@pytest.mark.parametrize('name', DETECTORS)
def test_detection_schedule_and_augmentation(name):
    cfg = config_of(file_of(name))
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


@pytest.mark.parametrize('name', DETECTORS[1:])
def test_cascade_box_heads(name):
    cfg = config_of(file_of(name))
    for head in cfg.model.roi_head.bbox_head:
        assert (head.type, head.num_shared_convs, head.num_shared_fcs) == ('WholeConvFCBBoxHead', 4, 1)
        assert head.norm_cfg.type == 'SyncBN' and head.reg_decoded_bbox and not head.reg_class_agnostic
        assert head.loss_bbox == dict(type='GIoULoss', loss_weight=10.0)


@pytest.mark.parametrize('name', SEGMENTORS)
def test_segmentation_schedule_augmentation_and_slide_test(name):
    cfg = config_of(file_of(name))
    crop, stride = (640, 426) if '_640_' in name else (512, 341)
    warm_up, poly = cfg.param_scheduler
    assert (warm_up.type, warm_up.start_factor, warm_up.begin, warm_up.end) == ('LinearLR', 1e-6, 0, 1500)
    assert (poly.type, poly.power, poly.eta_min, poly.begin, poly.end) == ('PolyLR', 1.0, 0.0, 1500, 160000)
    assert cfg.train_cfg.max_iters == 160000
    train = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert (train['RandomResize'].scale, train['RandomResize'].ratio_range) == ((4 * crop, crop), (0.5, 2.0))
    assert (train['RandomCrop'].crop_size, train['RandomCrop'].cat_max_ratio) == ((crop, crop), 0.75)
    assert cfg.model.data_preprocessor.size == (crop, crop)
    assert cfg.model.test_cfg == dict(mode='slide', crop_size=(crop, crop), stride=(stride, stride))
    assert {step.type: step for step in cfg.test_dataloader.dataset.pipeline}['Resize'].scale == (4 * crop, crop)
    ratios = [step.scale[1] / crop for step in cfg.tta_pipeline[1].transforms[0]]
    assert ratios == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]


@every_v1
def test_parameters_as_printed(name):
    parameters = meta_model(file_of(name)).parameters()
    assert round(sum(parameter.numel() for parameter in parameters) / 1e6) == V1[name][-1]


@every_v1
def test_layer_decay_groups(name):
    cfg = recipe(file_of(name))
    groups = build_wrapper(cfg, meta_model(file_of(name)), 'off').optimizer.param_groups
    scales = LAYER_SCALES[V1[name][2], 6 if '_t_' in name else 12]
    found = sorted((round(group['lr_scale'], 5), group['weight_decay']) for group in groups)
    assert found == [(scale, decay) for scale in scales for decay in (0.0, 0.05)]
    base_lr = V1[name][0]
    assert all(group['lr'] == pytest.approx(base_lr * group['lr_scale']) for group in groups)
