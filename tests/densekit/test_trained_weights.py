"""Trained detectors and segmentors of other projects load into our recipes: the published files, in small.

The files themselves (``coco/mask_rcnn_convnext_tiny_1k_3x.pth``, six ``coco/cascade_mask_rcnn_convnext_*_3x.pth``, six
``ade20k/upernet_convnext_*.pth`` of facebookresearch/ConvNeXt) differ in depths and widths only.
"""

import re
from itertools import product

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS, DefaultScope

from densekit.engine.runner import DensekitRunner
from densekit.predictor import Predictor

pytestmark = pytest.mark.usefixtures('quick_mmengine')

CHANNELS = [8, 16, 24, 32]
RECIPES = {
    'mask': 'configs/detection/mask_rcnn_convnext_t_coco.py',
    'cascade': 'configs/detection/cascade_convnext_t_coco.py',
    'upernet': 'configs/segmentation/upernet_convnext_t_ade20k.py',
}
LAYOUTS = ['official', 'openmmlab', 'openmmlab_conv']
ROI = {'conv_out_channels': 16, 'in_channels': 16}


def small(name):
    """A recipe with narrow layers, shallow stages and small images; heads and classes are its own."""
    cfg = Config.fromfile(RECIPES[name])
    cfg.model.backbone.update(arch=dict(depths=(1, 2, 1, 1), channels=CHANNELS), init_cfg=None)
    (resize,) = (step for step in cfg.test_dataloader.dataset.pipeline if step['type'] == 'Resize')
    resize.scale = (64, 64)
    if name == 'upernet':
        cfg.model.decode_head.update(in_channels=CHANNELS, channels=8)
        cfg.model.auxiliary_head.update(in_channels=CHANNELS[2], channels=8)
        cfg.model.test_cfg = dict(mode='whole')
        return cfg
    cfg.model.neck.update(in_channels=CHANNELS, out_channels=16)
    cfg.model.rpn_head.update(in_channels=16, feat_channels=16)
    roi_head = cfg.model.roi_head
    roi_head.bbox_roi_extractor.out_channels = roi_head.mask_roi_extractor.out_channels = 16
    roi_head.mask_head.update(ROI)
    for head in roi_head.bbox_head if name == 'cascade' else [roi_head.bbox_head]:
        head.update(ROI if name == 'cascade' else {'in_channels': 16}, fc_out_channels=32)
    cfg.model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=10)
    cfg.model.test_cfg.rpn.update(nms_pre=50, max_per_img=20)
    return cfg


def build(cfg):
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model)


def random_model(cfg):
    """A model in which every tensor has values of its own, running statistics included."""
    model = build(cfg).eval()
    generator = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        if key.endswith('num_batches_tracked'):
            value.fill_(7)
        elif key.endswith('running_var'):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif value.ndim == 1:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2 + (not key.endswith(('bias', 'mean'))))
        else:
            value.copy_(torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5)
    return model


def written(model, layout):
    """A checkpoint of the model as the official trainers (mmdet 2, mmseg 0) or OpenMMLab's write it."""
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    if layout == 'official':
        return {'meta': {'CLASSES': ('thing',) * number_of(model), 'epoch': 36}, 'state_dict': weights, 'optimizer': {}}
    names = {'dwconv': 'depthwise_conv', 'pwconv1': 'pointwise_conv1', 'pwconv2': 'pointwise_conv2'}
    weights = {re.sub('|'.join(names), lambda found: names[found[0]], key): value for key, value in weights.items()}
    if layout == 'openmmlab_conv':  # its ConvNeXt with linear_pw_conv=False
        for key in weights:
            if re.search(r'pointwise_conv\d\.weight', key):
                weights[key] = weights[key][..., None, None]
    return {'meta': {'dataset_meta': {'CLASSES': ['thing'] * number_of(model)}}, 'state_dict': weights}


def number_of(model):
    return model.decode_head.num_classes if hasattr(model, 'decode_head') else 80


@pytest.fixture(scope='module', params=RECIPES)
def source(request, tmp_path_factory):
    """A small recipe's config file, and a model of it."""
    cfg = small(request.param)
    path = tmp_path_factory.mktemp('small') / f'{request.param}.py'
    cfg.dump(str(path))
    return str(path), random_model(cfg)


@pytest.fixture(params=LAYOUTS)
def checkpoint(request, source):
    return written(source[1], request.param)


def saved(content, folder):
    torch.save(content, folder / 'weights.pth')
    return str(folder / 'weights.pth')


def predictions(predictor, model=None):
    """What a predictor, or another model in it, says of a picture."""
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    predictor.model = model or predictor.model
    found = predictor(image)
    return [found] if isinstance(found, np.ndarray) else [found.boxes, found.labels, found.scores, found.masks]


def test_predictions_are_those_of_the_source(source, checkpoint, tmp_path):
    config, model = source
    predictor = Predictor(config, saved(checkpoint, tmp_path), fold=False)
    found, expected = predictions(predictor), predictions(predictor, model)
    assert len(np.unique(expected[-1])) > 1
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    # The comparison can fail: one block's layer scale matters.
    with torch.no_grad():
        other = random_model(Config.fromfile(config))
        other.backbone.stages[1][1].gamma.neg_()
    assert not all(np.array_equal(one, other) for one, other in zip(found, predictions(predictor, other), strict=True))


def runner_of(config, folder):
    cfg = Config.fromfile(config)
    return DensekitRunner(model=cfg.model, work_dir=str(folder), default_scope=cfg.default_scope)


def test_a_runner_loads_every_tensor(source, checkpoint, tmp_path):
    config, model = source
    runner = runner_of(config, tmp_path)
    runner.load_checkpoint(saved(checkpoint, tmp_path))
    expected = model.state_dict()
    loaded = runner.model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.items())
    log = max(tmp_path.glob('*/*.log')).read_text()
    assert 'Loaded every weight of the model' in log
    renamed = any('depthwise_conv' in key for key in checkpoint['state_dict'])
    assert ('the backbone had openmmlab names' in log) == renamed
    reshaped = any('pointwise_conv1.weight' in key and v.ndim == 4 for key, v in checkpoint['state_dict'].items())
    assert ('10 of its tensors were reshaped' in log) == reshaped


class SeesCheckpoints(Hook):
    """As mmengine's hook of averaged weights does, which loads what it finds with ``strict=False``."""

    def after_load_checkpoint(self, runner, checkpoint):
        self.names = checkpoint['state_dict'].keys()


def test_hooks_get_the_weights_under_our_names(source, tmp_path):
    runner = runner_of(source[0], tmp_path)
    hook = SeesCheckpoints()
    runner.register_hook(hook)
    runner.load_checkpoint(saved(written(source[1], 'openmmlab'), tmp_path))
    assert hook.names == source[1].state_dict().keys()


def last_convolution(weights):
    """A tensor of the heads that does not depend on the classes."""
    return next(key for key in reversed(weights) if key.endswith(('conv.weight', 'upsample.weight')))


@pytest.mark.parametrize(
    ('part', 'harm', 'said'),
    [
        ('backbone', 'missing', '1 missing in the file: {}'),
        ('backbone', 'renamed', r'have other keys as well: (backbone\.)?norm2.weight_'),
        ('backbone', 'misshapen', r'1 of another shape \(file, model\): {} \(1,'),
        ('heads', 'missing', '1 missing in the file: {}'),
        ('heads', 'renamed', r'(?s)1 missing in the file: {0}\n.*1 unknown to the model: {0}_'),
        ('heads', 'misshapen', r'1 of another shape \(file, model\): {} \(1,'),
    ],
)
def test_what_does_not_fit_is_refused(source, tmp_path, part, harm, said):
    config, model = source
    content = written(model, 'openmmlab')
    weights = content['state_dict']
    own = {'backbone': 'backbone.norm2.weight', 'heads': last_convolution(weights)}[part]
    value = weights.pop(own)
    if harm == 'misshapen':
        weights[own] = value[:1]
    elif harm == 'renamed':
        weights[f'{own}_'] = value
    path = saved(content, tmp_path)
    runner = runner_of(config, tmp_path)
    before = {key: tensor.clone() for key, tensor in runner.model.state_dict().items()}
    for load in (lambda: Predictor(config, path), lambda: runner.load_checkpoint(path)):
        with pytest.raises(ValueError, match='nothing was loaded') as refused:
            load()
        assert re.search(said.format(re.escape(own)), str(refused.value))
    assert all(torch.equal(tensor, before[key]) for key, tensor in runner.model.state_dict().items())


def test_a_swin_is_refused_with_the_reason(tmp_path):
    config = tmp_path / 'mask.py'
    small('mask').dump(str(config))
    weights = {
        'backbone.patch_embed.projection.weight': torch.zeros(8, 3, 4, 4),
        'rpn_head.rpn_cls.bias': torch.zeros(3),
    }
    with pytest.raises(ValueError, match=r'does not fit the MaskRCNN.*(?s:.*)names of its backbone: .*not the weights'):
        Predictor(str(config), saved({'state_dict': weights}, tmp_path))


def test_resuming_takes_own_names_only(source, checkpoint, tmp_path):
    config, _ = source
    runner = runner_of(config, tmp_path)
    runner._resume = True
    path = saved(checkpoint, tmp_path)
    if any('depthwise_conv' in key for key in checkpoint['state_dict']):
        with pytest.raises(ValueError, match=r'unknown to the model: backbone\.stages\.0\.0\.depthwise_conv'):
            runner.load_checkpoint(path)
    else:
        runner.load_checkpoint(path)


# The names of mmdet 2.11's and mmseg 0.x's heads, written down from their sources.
WEIGHT_BIAS = ('weight', 'bias')
BN = ('conv.weight', *(f'bn.{name}' for name in (*WEIGHT_BIAS, 'running_mean', 'running_var', 'num_batches_tracked')))


def keys(*parts):
    """Every combination, joined by dots."""
    return {'.'.join(map(str, combination)) for combination in product(*parts)}


def backbone_names(depths):
    found = keys(['backbone.downsample_layers'], range(4), range(2), WEIGHT_BIAS)
    found |= keys(['backbone'], [f'norm{i}' for i in range(4)], WEIGHT_BIAS)
    for stage, depth in enumerate(depths):
        layers = [*keys(['dwconv', 'norm', 'pwconv1', 'pwconv2'], WEIGHT_BIAS), 'gamma']
        found |= keys([f'backbone.stages.{stage}'], range(depth), layers)
    return found


def detector_names():
    return (
        keys(['neck'], ['lateral_convs', 'fpn_convs'], range(4), ['conv'], WEIGHT_BIAS)
        | keys(['rpn_head'], ['rpn_conv', 'rpn_cls', 'rpn_reg'], WEIGHT_BIAS)
        | backbone_names((3, 3, 9, 3))
    )


MASK = [*keys(['convs'], range(4), ['conv'], WEIGHT_BIAS), *keys(['upsample', 'conv_logits'], WEIGHT_BIAS)]
NAMES = {
    'mask': detector_names()
    | keys(['roi_head.bbox_head'], ['shared_fcs.0', 'shared_fcs.1', 'fc_cls', 'fc_reg'], WEIGHT_BIAS)
    | keys(['roi_head.mask_head'], MASK),
    'cascade': detector_names()
    | keys(['roi_head.bbox_head'], range(3), ['shared_convs'], range(4), BN)
    | keys(['roi_head.bbox_head'], range(3), ['shared_fcs.0', 'fc_cls', 'fc_reg'], WEIGHT_BIAS)
    | keys(['roi_head.mask_head'], range(3), MASK),
    'upernet': backbone_names((3, 3, 9, 3))
    | keys(['decode_head.conv_seg', 'auxiliary_head.conv_seg'], WEIGHT_BIAS)
    | keys(['decode_head.psp_modules'], range(4), [1], BN)
    | keys(['decode_head'], ['lateral_convs', 'fpn_convs'], range(3), BN)
    | keys(['decode_head.bottleneck', 'decode_head.fpn_bottleneck', 'auxiliary_head.convs.0'], BN),
}


@pytest.mark.parametrize('name', RECIPES)
def test_the_recipes_have_the_names_of_the_official_files(name):
    with torch.device('meta'):
        assert build(Config.fromfile(RECIPES[name])).state_dict().keys() == NAMES[name]
