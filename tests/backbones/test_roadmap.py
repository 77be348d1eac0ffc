import ast
import re
from pathlib import Path

import pytest
import torch
import torchvision
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from backbones import ConvNeXt
from backbones.roadmap import RUNGS, SIZES, ConvNeXtRoadmap
from densekit.engine.config import load_config
from densekit.engine.consistency import check_channels
from densekit.report.roadmap_table import PUBLISHED, UNEXPLAINED, measure

CONFIG = Path(__file__).parents[2] / 'configs/detection/mask_rcnn_roadmap_coco.py'
LAST = 'separate_downsampling'
WITH_BN = [step for step, rung in RUNGS.items() if not rung.layer_norm]
DEPTHS = (1, 2, 3, 1)
CHANNELS = (12, 24, 48, 96)

every_step = pytest.mark.parametrize('step', RUNGS)


@pytest.fixture
def narrow(monkeypatch):
    """Builds a rung with few blocks and channels."""
    sizes = {'resnet': ((2, 1, 2, 1), 8), 'stage_ratio': (DEPTHS, 8), 'width': (DEPTHS, 12)}
    monkeypatch.setitem(SIZES, 'tiny', sizes)
    return lambda step, **kwargs: ConvNeXtRoadmap('tiny', step, **kwargs)


def image(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


# The paper's figures.


def test_there_is_a_rung_for_every_row_of_the_paper():
    assert list(RUNGS) == list(PUBLISHED)
    assert len(RUNGS) == len({rung.change for rung in RUNGS.values()}) == 17
    assert all(rung.__doc__ == rung.change for rung in RUNGS.values())
    assert {('tiny', 'layer_norm')} == UNEXPLAINED


@pytest.mark.parametrize(
    ('arch', 'step'), [(arch, step) for arch in SIZES for step in PUBLISHED if (arch, step) not in UNEXPLAINED]
)
def test_as_many_multiply_adds_as_the_paper_says(arch, step):
    tolerance = 0.01 if step == LAST else 0.0015
    assert measure(arch, step)[0] / 1e9 == pytest.approx(PUBLISHED[step][arch][1], rel=tolerance)


# The ends of the ladder.


def torchvision_resnet(blocks):
    return torchvision.models.resnet.ResNet(torchvision.models.resnet.Bottleneck, blocks)


def renamed(resnet):
    """The weights of torchvision's ResNet under our names."""
    names = (
        (r'^conv1\.', 'downsample_layers.0.0.'),
        (r'^bn1\.', 'downsample_layers.0.1.'),
        (r'^layer(\d)\.', lambda match: f'stages.{int(match[1]) - 1}.'),
        (r'\.bn(\d)\.', r'.norm\1.'),
        (r'\.downsample\.', '.shortcut.'),
    )
    weights = {}
    for key, value in resnet.state_dict().items():
        for pattern, name in names:
            key = re.sub(pattern, name, key)
        weights[key] = value
    return {key: value for key, value in weights.items() if not key.startswith('fc.')}


def resnet_features(resnet, x):
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))
    features = []
    for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
        x = layer(x)
        features.append(x)
    return features


@pytest.fixture
def resnets(randomize):
    """torchvision's ResNet-50 with statistics of its own, and the first rung with its weights."""
    theirs = torchvision_resnet([3, 4, 6, 3])
    randomize(theirs)
    with torch.no_grad():
        resnet_features(theirs.train(), image())
    ours = ConvNeXtRoadmap('tiny', 'resnet')
    ours.load_state_dict(renamed(theirs))
    return ours.eval(), theirs.eval()


def errors(outputs, expected):
    return [((a - b).norm() / b.norm()).item() for a, b in zip(outputs, expected, strict=True)]


@torch.no_grad()
def test_first_rung_is_torchvisions_resnet50(resnets):
    ours, theirs = resnets
    assert max(errors(ours(image(96)), resnet_features(theirs, image(96)))) < 1e-5


@torch.no_grad()
def test_strides_on_the_1x1_convolutions_are_seen(resnets):
    ours, theirs = resnets
    block = ours.stages[1][0]
    block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    found = errors(ours(image(96)), resnet_features(theirs, image(96)))
    assert found[0] < 1e-5 and min(found[1:]) > 1e-2


def test_first_rung_of_base_has_the_parameters_of_resnet200():
    with torch.device('meta'):
        theirs = torchvision_resnet([3, 24, 36, 3])
        ours = ConvNeXtRoadmap('base', 'resnet')
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in renamed(theirs).items()}


def test_modern_recipe_changes_no_layer(narrow):
    torch.manual_seed(0)
    first = narrow('resnet').eval()
    second = narrow('modern_recipe').eval()
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second(image()), first(image()), rtol=0, atol=0)


@torch.no_grad()
def test_last_rung_is_convnext(narrow, randomize):
    convnext = ConvNeXt(dict(depths=DEPTHS, channels=CHANNELS), layer_scale_init_value=1.0)
    last = narrow(LAST)
    randomize(convnext)
    randomize(last, seed=1)
    assert min(errors(last(image()), convnext(image()))) > 0.1
    last.load_state_dict(convnext.state_dict())
    torch.testing.assert_close(last(image()), convnext(image()), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match='Missing key'):
        narrow('layer_norm').load_state_dict(convnext.state_dict())


@pytest.mark.parametrize('arch', SIZES)
def test_last_rung_has_the_names_and_shapes_of_convnext(arch):
    with torch.device('meta'):
        ours, convnext = ConvNeXtRoadmap(arch), ConvNeXt(arch)
    assert [(key, value.shape) for key, value in ours.state_dict().items()] == [
        (key, value.shape) for key, value in convnext.state_dict().items()
    ]


# What the steps change.

BOTTLENECK = ['1x1', 'BatchNorm2d', 'ReLU', '3x3', 'BatchNorm2d', 'ReLU', '1x1', 'BatchNorm2d', 'ReLU']
MOVED_UP = ['dw7', 'BatchNorm2d', 'ReLU', '1x1', 'BatchNorm2d', 'ReLU', '1x1', 'BatchNorm2d', 'ReLU']
BLOCKS = {
    'resnet': BOTTLENECK,
    'patchify': BOTTLENECK,
    'depthwise': ['dw3' if layer == '3x3' else layer for layer in BOTTLENECK],
    'inverted_bottleneck': ['dw3' if layer == '3x3' else layer for layer in BOTTLENECK],
    'kernel_7': MOVED_UP,
    'kernel_9': ['dw9', *MOVED_UP[1:]],
    'gelu': ['GELU' if layer == 'ReLU' else layer for layer in MOVED_UP],
    'fewer_activations': ['dw7', 'BatchNorm2d', '1x1', 'BatchNorm2d', 'GELU', '1x1', 'BatchNorm2d'],
    'fewer_norms': ['dw7', 'BatchNorm2d', '1x1', 'GELU', '1x1'],
    'layer_norm': ['dw7', 'LayerNorm2d', '1x1', 'GELU', '1x1'],
}


def called(module, x):
    """The kinds of the layers of a module in the order in which they are computed."""
    order = []

    def note(layer, *_):
        if isinstance(layer, nn.Conv2d):
            kernel = layer.kernel_size[0]
            order.append(f'dw{kernel}' if layer.groups > 1 else f'{kernel}x{kernel}')
        elif not isinstance(layer, nn.Identity):
            order.append(type(layer).__name__)

    for layer in module.modules():
        if not list(layer.children()) and not isinstance(layer, nn.Sequential):
            layer.register_forward_hook(note)
    module(x)
    return order


@pytest.mark.parametrize('step', BLOCKS)
def test_layers_of_a_block(narrow, step):
    model = narrow(step)
    assert called(model.stages[2][1], torch.randn(2, model.channels[2], 4, 4)) == BLOCKS[step]


@pytest.mark.parametrize(
    ('step', 'stem'),
    [
        ('stage_ratio', ['7x7', 'BatchNorm2d', 'ReLU', 'MaxPool2d']),
        ('patchify', ['4x4', 'BatchNorm2d']),
        ('layer_norm', ['4x4', 'LayerNorm2d']),
    ],
)
def test_layers_of_the_stem(narrow, step, stem):
    assert called(narrow(step).downsample_layers[0], image()) == stem


@pytest.mark.parametrize('step', WITH_BN)
def test_no_bias_that_batchnorm_cancels(narrow, step):
    biased = {name for name, layer in narrow(step).named_modules() if getattr(layer, 'bias', None) is not None}
    convs = {name.split('.')[-1] for name in biased if 'norm' not in name and re.search(r'conv\d$', name)}
    assert convs == ({'conv2', 'conv3'} if RUNGS[step].fewer_norms else set())


# As a backbone.


@every_step
def test_features_and_gradients(narrow, randomize, step):
    model = narrow(step)
    randomize(model)
    outputs = model.train()(image())
    assert model.strides == (4, 8, 16, 32)
    assert [tuple(out.shape) for out in outputs] == [
        (2, c, 64 // s, 64 // s) for c, s in zip(model.channels, (4, 8, 16, 32), strict=True)
    ]
    sum(out.square().mean() for out in outputs).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@every_step
def test_norms_of_the_outputs_and_layer_scale_come_last(narrow, step):
    names = {name for name, _ in narrow(step).named_parameters()}
    assert any(name.startswith('norm') for name in names) == (step == LAST)
    assert any(name.endswith('.gamma') for name in names) == (step == LAST)


@every_step
def test_out_indices(narrow, step):
    model = narrow(step, out_indices=[2, 0])
    everything = narrow(step)
    everything.load_state_dict(model.state_dict(), strict=False)
    outputs = everything.eval()(image())
    assert model.strides == (4, 16)
    assert model.channels == (everything.channels[0], everything.channels[2])
    torch.testing.assert_close(model.eval()(image()), (outputs[0], outputs[2]), rtol=0, atol=0)
    assert {name.split('.')[1] for name, p in model.named_parameters() if not p.requires_grad} <= {'3'}


@pytest.mark.parametrize('step', ['resnet', 'kernel_7', 'layer_norm', LAST])
def test_frozen_stages_stay_frozen(narrow, step):
    model = narrow(step, frozen_stages=2)
    assert model.train() is model
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    sum(out.square().mean() for out in model(image())).backward()
    for name, parameter in model.named_parameters():
        frozen = not name.startswith('norm') and int(name.split('.')[1]) < 2
        assert parameter.requires_grad == (not frozen), name
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]) == (int(name.split('.')[1]) < 2), name


def test_drop_path_rises_to_the_last_block(narrow):
    model = narrow('kernel_7', drop_path_rate=0.6)
    rates = [getattr(block.drop_path, 'drop_prob', 0.0) for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.1 * i for i in range(7)])
    assert not torch.equal(model.train()(image())[-1], model(image())[-1])


@pytest.mark.parametrize('mode', ['layer_wise', 'stage_wise'])
@every_step
def test_layer_decay(narrow, step, mode):
    model = narrow(step)
    wrapper = dict(
        constructor='LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05),
        paramwise_cfg=dict(decay_rate=0.5, decay_type=mode),
    )
    placed = {}
    for group in build_optim_wrapper(model, wrapper).optimizer.param_groups:
        placed.update(dict.fromkeys(group['param_names'], (group['lr'], group['weight_decay'])))
    modules = dict(model.named_modules())
    for name, (lr, weight_decay) in placed.items():
        owner = modules[name.rpartition('.')[0]]
        assert (weight_decay > 0) == (name.endswith('weight') and isinstance(owner, nn.Conv2d | nn.Linear)), name
        if name.startswith('stages.'):
            stage = int(name.split('.')[1])
            expected = (1, 2, 3, 6)[stage] if mode == 'layer_wise' else stage + 1
            assert lr == 0.5 ** (7 - expected), name
        elif name.startswith('downsample_layers.0.'):
            assert lr == 0.5**7


def test_resnet200_has_more_depths():
    with torch.device('meta'):
        assert ConvNeXtRoadmap('base', 'resnet').layer_depth('stages.2.35.conv1.weight') == (3 + 35 // 3, 17)


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (
            dict(step='kernel7'),
            "step 'kernel7' is unknown. Did you mean 'kernel_7'? Choose from resnet, modern_recipe, ",
        ),
        (dict(step='swin'), "step 'swin' is unknown. Choose from resnet"),
        (dict(arch='small'), "arch 'small' is not on the roadmap; choose 'tiny' or 'base'"),
        (dict(step='resnet', out_indices=(4,)), 'give different stages from 0 to 3'),
        (dict(step='resnet', drop_path_rate=2), 'drop_path_rate=2 is not in'),
    ],
)
def test_a_wrong_argument(arguments, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        ConvNeXtRoadmap(**arguments)


# In the recipe.


def detector(*options):
    with DefaultScope.overwrite_default_scope('mmdet'), torch.device('meta'):
        return MODELS.build(load_config(str(CONFIG), options).model)


def test_recipe_names_the_channels_of_every_step():
    text = ast.get_docstring(ast.parse(CONFIG.read_text()))
    steps = list(RUNGS)
    told = {}
    for first, last, channels in re.findall(
        r'^ +(\w+)(?: to (\w+))? +model\.neck\.in_channels=\[([\d,]+)\]$', text, re.M
    ):
        for step in steps[steps.index(first) : steps.index(last or first) + 1]:
            told[step] = tuple(map(int, channels.split(',')))
    for step in steps:
        with torch.device('meta'):
            assert ConvNeXtRoadmap('tiny', step).channels == told.get(step, (96, 192, 384, 768))


def test_recipe_trains_other_steps_and_says_what_the_neck_needs():
    check_channels(detector('model.backbone.step=kernel_7'))
    with pytest.raises(ValueError, match=r'Set model\.neck\.in_channels') as error:
        check_channels(detector('model.backbone.step=resnet'))
    assert 'the backbone emits [256, 512, 1024, 2048] channels' in str(error.value)
    model = detector('model.backbone.step=resnet', 'model.neck.in_channels=[256,512,1024,2048]')
    check_channels(model)
    assert isinstance(model.backbone, ConvNeXtRoadmap)
