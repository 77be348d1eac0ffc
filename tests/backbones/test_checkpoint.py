"""Whole files of weights into the backbone: all of them, or an error."""

import logging
import re

import pytest
import torch
from checkpoint_helpers import MINI, assert_equal, detector, load_on_rank, official, openmmlab, saved, state
from mmengine.logging import MMLogger
from mmengine.model import BaseModule
from mmengine.model.weight_init import PretrainedInit
from mmengine.registry import MODELS
from safetensors.torch import save_file
from torch import nn

from backbones import ConvNeXt, convert_state_dict, load_pretrained

# Weights that fit.


def test_official_classifier_through_init_cfg(source, tmp_path):
    path = saved(official(source), tmp_path)
    model = MODELS.build(dict(type='ConvNeXt', arch=MINI, init_cfg=dict(type='Pretrained', checkpoint=path)))
    norms = [key for key in state(model) if key.startswith('norm')]
    fresh = state(model)
    model.init_weights()
    assert_equal(model, state(source), [key for key in fresh if key not in norms])
    assert_equal(model, fresh, norms)


@pytest.mark.parametrize('kind', ['Pretrained', 'mmengine.Pretrained', PretrainedInit, 'PretrainedBackbone'])
def test_every_form_of_pretrained_is_ours(kind, source, tmp_path):
    path = saved(official(source), tmp_path)
    others = dict(type='TruncNormal', layer=['Conv2d', 'Linear'], std=0.02, bias=0.0)
    for init_cfg in (dict(type=kind, checkpoint=path), [dict(type=kind, checkpoint=path), others]):
        model = ConvNeXt(MINI, init_cfg=init_cfg)
        model.init_weights()
        assert_equal(model, state(source), ['stages.2.1.pwconv1.weight', 'downsample_layers.0.0.bias'])


def test_inside_a_detector(source, tmp_path):
    path = saved(official(source), tmp_path)

    class Detector(BaseModule):
        def __init__(self):
            super().__init__()
            self.backbone = ConvNeXt(MINI, init_cfg=dict(type='Pretrained', checkpoint=path))

    model = Detector()
    model.init_weights()
    assert_equal(model.backbone, state(source), ['stages.3.0.gamma'])


@pytest.mark.parametrize('prefix', ['backbone.', 'backbone', None])
def test_trained_detector(prefix, source, tmp_path):
    path = saved(detector(state(source)), tmp_path)
    model = ConvNeXt(MINI, init_cfg=dict(type='Pretrained', checkpoint=path, prefix=prefix, map_location='cpu'))
    model.init_weights()
    assert_equal(model, state(source), state(source))


def test_heads_left_out_are_reported(source, target):
    report = load_pretrained(target, detector(state(source)))
    assert report.dropped == ['neck.lateral_convs.0.conv.weight', 'rpn_head.rpn_conv.bias']
    assert report.missing == []
    assert 'left out on purpose: neck.lateral_convs.0.conv.weight' in str(report)


@pytest.mark.parametrize('wrap', ['plain', 'detector', 'classifier'])
@pytest.mark.parametrize('use_grn', [False, True])
def test_openmmlab_names(wrap, use_grn, mini):
    source = mini(use_grn=use_grn)
    weights = openmmlab(state(source))
    if wrap == 'detector':
        weights = detector(weights)['state_dict']
    elif wrap == 'classifier':
        weights = {f'backbone.{k}': v for k, v in weights.items() if not re.match('norm[012]', k)}
        weights.update({'head.fc.weight': torch.zeros(10, 32), 'head.fc.bias': torch.zeros(10)})
    target = ConvNeXt(MINI, layer_scale_init_value=1.0, use_grn=use_grn)
    report = load_pretrained(target, {'state_dict': weights})
    assert report.source == 'openmmlab'
    assert_equal(target, state(source), [k for k in state(source) if k not in report.missing])
    expected = [f'norm{i}.{part}' for i in range(3) for part in ('weight', 'bias')] if wrap == 'classifier' else []
    assert report.missing == expected
    assert len(report.reshaped) == (14 if use_grn else 0)


def test_module_prefix_of_distributed_training(source, target):
    load_pretrained(target, {'state_dict': {f'module.backbone.{k}': v for k, v in state(source).items()}})
    assert_equal(target, state(source), state(source))


def test_report_of_a_classifier(source, target):
    report = load_pretrained(target, official(source))
    assert report.source == 'official'
    assert report.missing == [f'norm{i}.{part}' for i in range(4) for part in ('weight', 'bias')]
    assert sorted(report.loaded + report.missing) == sorted(target.state_dict())
    assert sorted(report.dropped) == ['head.bias', 'head.weight', 'norm.bias', 'norm.weight']
    assert 'left at their initial values: norm0.weight' in str(report)
    assert 'and 3 more' in str(report)


def test_initialization_is_said_in_one_line(source, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr('backbones.checkpoint.print_log', lambda message, **_: lines.append(message))
    path = saved(official(source), tmp_path)
    ConvNeXt(MINI, init_cfg=dict(type='Pretrained', checkpoint=path)).init_weights()
    assert len(lines) == 1
    assert path in lines[0]
    assert '\n' not in lines[0]


def test_mmengine_records_where_the_values_come_from(source, tmp_path):
    records = []

    class Collect(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    path = saved(official(source), tmp_path)
    model = ConvNeXt(MINI, init_cfg=dict(type='Pretrained', checkpoint=path))
    logger, handler = MMLogger.get_current_instance(), Collect(logging.INFO)
    logger.addHandler(handler)
    model.init_weights()
    logger.removeHandler(handler)
    [gamma] = [record for record in records if record.startswith('\nstages.0.0.gamma ')]
    assert f'PretrainedBackbone: loaded from {path}' in gamma
    [norm] = [record for record in records if record.startswith('\nnorm0.weight ')]
    assert 'loaded from' not in norm


def test_norms_of_stages_not_emitted_are_reported(source):
    target = ConvNeXt(MINI, out_indices=(1, 2))
    report = load_pretrained(target, state(source))
    assert report.dropped == ['norm0.weight', 'norm0.bias', 'norm3.weight', 'norm3.bias']
    assert_equal(target, state(source), state(target))


@pytest.mark.parametrize(('use_grn', 'reshaped'), [(False, 14), (True, 28)])
def test_other_shapes_of_the_same_weights(use_grn, reshaped, mini):
    source = mini(use_grn=use_grn)
    weights = official(source)['model']
    for key in weights:
        if 'pwconv' in key and key.endswith('weight'):
            weights[key] = weights[key][:, :, None, None]  # as 1x1 convolutions
        elif '.grn.' in key:
            weights[key] = weights[key].flatten()
    target = ConvNeXt(MINI, layer_scale_init_value=1.0, use_grn=use_grn)
    report = load_pretrained(target, {'model': weights})
    assert len(report.reshaped) == reshaped
    assert_equal(target, state(source), report.loaded)


def test_half_precision_weights_are_widened(source, target):
    load_pretrained(target, {key: value.half() for key, value in state(source).items()})
    assert target.norm0.weight.dtype == torch.float32
    torch.testing.assert_close(target.norm0.weight, source.norm0.weight, rtol=1e-3, atol=1e-3)


def test_safetensors(source, target, tmp_path):
    path = tmp_path / 'weights.safetensors'
    save_file(official(source)['model'], path)
    report = load_pretrained(target, path)
    assert_equal(target, state(source), report.loaded)


def test_convert_names_what_it_drops(source):
    converted, name = convert_state_dict(official(source)['model'])
    assert name == 'official'
    assert [key for key, value in converted.items() if value is None] == [
        'norm.weight',
        'norm.bias',
        'head.weight',
        'head.bias',
    ]


# Weights that do not fit: an error that says why, and nothing changed.


def without(key):
    return lambda weights: weights.pop(key)


def with_key(key, *shape):
    return lambda weights: weights.update({key: torch.ones(shape)})


@pytest.mark.parametrize(
    ('spoil', 'said'),
    [
        (without('stages.1.1.pwconv2.bias'), r'1 missing in the file: stages\.1\.1\.pwconv2\.bias'),
        (without('downsample_layers.0.0.weight'), r'1 missing in the file: downsample_layers\.0\.0\.weight'),
        (with_key('stages.3.1.gamma', 32), r'1 unknown to the model: stages\.3\.1\.gamma'),
        (with_key('stages.0.0.grn.beta', 32), r'1 unknown to the model: stages\.0\.0\.grn\.beta'),
        (with_key('stages.0.0.gamma', 9), r'1 of another shape \(file, model\): stages\.0\.0\.gamma \(9,\) for \(8,\)'),
        (with_key('norm2.weight', 25), r'norm2\.weight \(25,\) for \(24,\)'),
        (with_key('stages.0.0.attn.weight', 8), r'official ConvNeXt, but have other keys.*attn'),
        (with_key('norm1.weight', 16), r'7 missing in the file: norm0\.weight'),  # a detector has all norms or none
    ],
)
def test_one_wrong_key(spoil, said, source, target, tmp_path):
    content = official(source)
    spoil(content['model'])
    path = saved(content, tmp_path)
    before = state(target)
    with pytest.raises(ValueError, match=said) as error:
        load_pretrained(target, path)
    assert path in str(error.value)
    assert_equal(target, before, before)

    model = ConvNeXt(MINI, init_cfg=dict(type='Pretrained', checkpoint=path))
    with pytest.raises(ValueError, match=said):
        model.init_weights()


def test_weights_of_another_size(source):
    target = ConvNeXt('atto')
    before = state(target)
    with pytest.raises(ValueError) as error:
        load_pretrained(target, official(source))
    message = str(error.value)
    assert re.search(r'of another shape \(file, model\): downsample_layers.0.0.weight \(8, 3, 4, 4\) for', message)
    assert re.search(r'\d+ missing in the file: (\S+, ){4}\S+ and \d+ more', message)
    assert 'Nothing was loaded' in message
    assert len(message) < 1200  # some names, the rest counted
    assert_equal(target, before, before)


def test_a_misshapen_tensor_is_not_called_missing(source):
    with pytest.raises(ValueError, match=r'7 of another shape.*dwconv') as error:
        load_pretrained(ConvNeXt(MINI, kernel_size=5), official(source))
    assert 'missing' not in str(error.value)
    assert 'kernel size' in str(error.value)


@pytest.mark.parametrize('strict', [True, False])
def test_weights_of_which_nothing_fits(strict, source):
    with pytest.raises(ValueError, match='Nothing was loaded'):
        load_pretrained(ConvNeXt('tiny'), official(source), strict=strict)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_values_that_are_not_finite(value, source, target):
    content, before = official(source), state(target)
    content['model']['stages.2.0.pwconv1.weight'][3, 5] = value
    with pytest.raises(ValueError, match=r'not finite: stages\.2\.0\.pwconv1\.weight'):
        load_pretrained(target, content)
    assert_equal(target, before, before)


def test_the_same_tensor_with_and_without_module(source, target):
    weights = state(source)
    weights['module.norm1.weight'] = weights['norm1.weight'] + 1
    with pytest.raises(ValueError, match=r"some tensors twice, with 'module\.' before their names"):
        load_pretrained(target, weights)


def test_v1_weights_into_v2(source):
    with pytest.raises(ValueError, match=r'14 missing in the file: stages\.0\.0\.grn\.gamma'):
        load_pretrained(ConvNeXt(MINI, use_grn=True, layer_scale_init_value=1.0), official(source))


def test_not_strict_reports_what_did_not_fit(source, target, monkeypatch):
    lines = []
    monkeypatch.setattr('backbones.checkpoint.print_log', lambda message, **_: lines.append(message))
    content = official(source)
    content['model']['stages.0.0.gamma'] = torch.ones(9)
    content['model']['stages.3.1.gamma'] = torch.ones(32)
    del content['model']['stages.0.0.norm.bias']
    before = state(target)
    report = load_pretrained(target, content, strict=False)
    assert report.misshapen == ['stages.0.0.gamma (9,) for (8,)']
    assert report.unexpected == ['stages.3.1.gamma']
    assert len(lines) == 1 and 'of another shape (file, model): stages.0.0.gamma' in lines[0]
    assert {'stages.0.0.gamma', 'stages.0.0.norm.bias'} <= set(report.missing)
    assert_equal(target, before, report.missing)
    assert_equal(target, state(source), report.loaded)
    for part in ('of another shape', 'not known to the backbone', 'left at their initial values'):
        assert part in str(report)


@pytest.mark.parametrize('prefix', ['backbone.', 'encoder.', 'back'])
def test_wrong_prefix(prefix, source, target):
    with pytest.raises(ValueError, match=rf"no key begins with the prefix '{prefix.rstrip('.')}\.'.*downsample_layers"):
        load_pretrained(target, official(source), prefix=prefix)


def test_backbone_deeper_in_the_model(source, target):
    weights = {f'student.backbone.{key}': value for key, value in state(source).items()}
    with pytest.raises(ValueError, match=r"give prefix='student\.backbone\.'"):
        load_pretrained(target, weights)
    load_pretrained(target, weights, prefix='student.backbone.')
    assert_equal(target, state(source), state(source))


@pytest.mark.parametrize(
    'content',
    [{'model': {}}, {}, {'epoch': 3}, {1: 2}, {'resnet': torch.ones(1)}, {'layer1.0.conv1.weight': torch.ones(1)}],
)
def test_no_weights_of_a_convnext(content, target, tmp_path):
    with pytest.raises(ValueError, match=r'no weights found|not the weights of a ConvNeXt'):
        load_pretrained(target, saved(content, tmp_path))


def test_raises_on_every_rank(source, tmp_path):
    content = official(source)
    del content['model']['stages.0.0.gamma']
    path = saved(content, tmp_path)
    torch.multiprocessing.spawn(load_on_rank, args=(str(tmp_path), path), nprocs=2)
    for rank in range(2):
        assert '1 missing in the file: stages.0.0.gamma' in (tmp_path / f'rank{rank}').read_text()


def test_mmengine_loads_nothing_and_raises_nothing(source, target, tmp_path):
    """The fault that the strict loader is there for."""
    before = state(target)
    PretrainedInit(saved(official(source), tmp_path))(target)
    assert_equal(target, before, before)


def test_a_plain_module_can_be_loaded(source):
    """``load_pretrained`` asks nothing of the backbone but its state_dict."""
    wrapper = nn.Module()
    wrapper.downsample_layers, wrapper.stages = ConvNeXt(MINI).downsample_layers, ConvNeXt(MINI).stages
    load_pretrained(wrapper, official(source))
    assert_equal(wrapper, state(source), wrapper.state_dict())
