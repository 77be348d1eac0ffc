"""Every naming that the loader knows, written out here by other means than its tables, and what it must refuse."""

import re

import pytest
import torch
from checkpoint_helpers import MINI, assert_equal, openmmlab, state

from backbones import ConvNeXt, convert_state_dict, load_pretrained
from backbones.formats import FORMATS

HEAD = {'norm.weight': torch.ones(32), 'norm.bias': torch.zeros(32), 'head.weight': torch.zeros(10, 32)}


def trunk(model):
    return {key: value for key, value in state(model).items() if not key.startswith('norm')}


def official(model):
    return {**trunk(model), **HEAD, 'head.bias': torch.zeros(10)}


def dinov3(model):
    """As DINOv3's code saves it: one norm under two names."""
    last = {'norm.weight': model.norm3.weight.detach(), 'norm.bias': model.norm3.bias.detach()}
    return {**trunk(model), **last, 'norms.3.weight': last['norm.weight'], 'norms.3.bias': last['norm.bias']}


def eupe(model):
    return {**dinov3(model), 'projectors.dino.0.weight': torch.ones(4, 32), 'projectors.dino.0.bias': torch.ones(4)}


def sparse_kernel(weight):
    """A dense kernel as MinkowskiEngine keeps it, position by position, column after column."""
    out, _, rows, columns = weight.shape
    positions = [weight[:, :, row, column] for column in range(columns) for row in range(rows)]
    if weight.shape[1] == 1 and out > 1:
        return torch.stack([position[:, 0] for position in positions])
    return torch.stack([position.t() for position in positions])


def fcmae(model):
    """As ConvNeXt V2's pretraining saves its sparse encoder, with the decoder."""
    weights = {}
    for key, value in trunk(model).items():
        is_stem = key.startswith('downsample_layers.0')
        module, _, part = key.rpartition('.')
        if not is_stem and value.ndim == 4 and '.grn' not in module:
            weights[f'{module}.kernel'] = sparse_kernel(value)
        elif 'pwconv' in module:
            weights[f'{module}.linear.{part}'] = value
        elif '.grn' in module:
            weights[key] = value.reshape(1, -1)
        elif not is_stem and (module.endswith('.norm') or re.fullmatch(r'downsample_layers\.\d\.0', module)):
            weights[f'{module}.ln.{part}'] = value
        elif not is_stem and part == 'bias':
            weights[key] = value.reshape(1, -1)
        else:
            weights[key] = value
    weights = {f'encoder.{key}': value for key, value in weights.items()}
    others = ['mask_token', 'proj.weight', 'proj.bias', 'pred.weight', 'decoder.0.dwconv.weight', 'decoder.0.grn.gamma']
    return {**weights, **dict.fromkeys(others, torch.ones(1))}


def timm(model, conv_mlp=False):
    weights = {}
    for key, value in trunk(model).items():
        for old, new in (
            ('downsample_layers.0.', 'stem.'),
            ('downsample_layers', 'stages'),
            ('dwconv', 'conv_dw'),
            ('pwconv', 'mlp.fc'),
            ('grn.gamma', 'mlp.grn.weight'),
            ('grn.beta', 'mlp.grn.bias'),
        ):
            key = key.replace(old, new)
        key = re.sub(r'^(stages\.\d)\.(\d+)\.(\w+)$', r'\1.downsample.\2.\3', key)
        if '.downsample.' not in key:
            key = re.sub(r'^(stages\.\d)\.(\d+)\.', r'\1.blocks.\2.', key)
        key = re.sub(r'\.downsample\.(\d)\.gamma', r'.blocks.\1.gamma', key)
        if conv_mlp and '.mlp.fc' in key and value.ndim == 2:
            value = value[..., None, None]
        weights[key] = value.flatten() if '.grn.' in key else value
    return {**weights, 'head.norm.weight': torch.ones(32), 'head.fc.weight': torch.ones(10, 32)}


def openclip(model):
    weights = {f'visual.trunk.{key}': value for key, value in timm(model).items() if not key.startswith('head.fc')}
    others = ['visual.head.proj.weight', 'positional_embedding', 'transformer.resblocks.0.ln_1.weight', 'logit_scale']
    return {**weights, **dict.fromkeys(others, torch.ones(1))}


def detector(weights):
    inner = {f'backbone.{key}': value for key, value in weights.items()}
    return {**inner, 'neck.lateral_convs.0.conv.weight': torch.ones(1), 'bbox_head.fc_cls.bias': torch.ones(1)}


def openmmlab_detector(model):
    return detector(openmmlab(state(model)))


def timm_conv_mlp(model):
    return timm(model, conv_mlp=True)


WRITERS = {
    'official': (official, 'official'),
    'ours': (state, 'official'),
    'detector': (lambda model: detector(state(model)), 'official'),
    'DINOv3': (dinov3, 'DINOv3'),
    'EUPE': (eupe, 'EUPE'),
    'FCMAE': (fcmae, 'FCMAE'),
    'openmmlab': (openmmlab_detector, 'openmmlab'),
    'timm': (timm, 'timm'),
    'timm conv_mlp': (timm_conv_mlp, 'timm'),
    'OpenCLIP': (openclip, 'OpenCLIP'),
}


@pytest.fixture(params=['V1', 'V2'])
def version(request):
    return dict(use_grn=request.param == 'V2', layer_scale_init_value=float(request.param == 'V1'))


@pytest.mark.parametrize('name', WRITERS)
def test_every_tensor_arrives(name, version, mini):
    write, expected = WRITERS[name]
    source = mini(**version)
    target = ConvNeXt(MINI, **version)
    report = load_pretrained(target, write(source))
    assert report.source == expected
    assert_equal(target, state(source), report.loaded)
    assert set(trunk(source)) <= set(report.loaded)
    has_norms = {'ours': 4, 'detector': 4, 'openmmlab': 4, 'DINOv3': 1, 'EUPE': 1}.get(name, 0)
    assert len(report.missing) == 8 - 2 * has_norms
    assert report.unexpected == report.misshapen == []


@pytest.mark.parametrize('name', WRITERS)
def test_what_is_dropped_is_named(name, mini):
    source = mini()
    weights = WRITERS[name][0](source)
    converted, _ = convert_state_dict(weights)
    dropped = [key for key, value in converted.items() if value is None]
    kept = [key for key, value in converted.items() if value is not None]
    assert len(dropped) + len(kept) == len(weights)
    assert not any('dwconv' in key or 'conv_dw' in key or 'depthwise' in key for key in dropped if 'decoder' not in key)


@pytest.mark.parametrize('name', WRITERS)
def test_an_unknown_key_is_an_error(name, mini, target):
    weights = WRITERS[name][0](mini())
    key = next(key for key in weights if re.search(r'dwconv|conv_dw|depthwise_conv', key))
    weights[re.sub(r'dwconv|conv_dw|depthwise_conv', 'attention', key)] = torch.ones(8)
    with pytest.raises(ValueError, match=r'but have other keys as well: .*attention'):
        load_pretrained(target, weights)


@pytest.mark.parametrize('name', WRITERS)
def test_half_of_the_keys_are_an_error(name, mini, target):
    weights = WRITERS[name][0](mini())
    for half in (list(weights)[::2], list(weights)[: len(weights) // 2]):
        before = state(target)
        with pytest.raises(ValueError, match=r'missing in the file|not the weights of|but have other keys'):
            load_pretrained(target, {key: weights[key] for key in half})
        assert_equal(target, before, before)


@pytest.mark.parametrize('name', WRITERS)
def test_transposed_and_swapped_layers_are_an_error(name, mini, target):
    weights = WRITERS[name][0](mini())
    for first, second in (('pwconv1', 'pwconv2'), ('fc1', 'fc2'), ('pointwise_conv1', 'pointwise_conv2')):
        swapped = {
            key.replace(first, '?').replace(second, first).replace('?', second): value for key, value in weights.items()
        }
        if list(swapped) != list(weights):
            with pytest.raises(ValueError, match='of another shape'):
                load_pretrained(target, swapped)


def test_two_names_of_one_tensor_are_an_error(mini, target):
    weights = {**official(mini()), 'stages.0.0.depthwise_conv.weight': torch.ones(8, 1, 7, 7)}
    with pytest.raises(ValueError, match=r'other keys as well: stages\.0\.0\.depthwise_conv'):
        load_pretrained(target, weights)
    both = {**openmmlab(trunk(mini())), 'stages.0.0.dwconv.weight': torch.ones(8, 1, 7, 7)}
    with pytest.raises(ValueError, match=r'other keys as well|two tensors of the weights are our stages'):
        load_pretrained(target, both)


def test_a_kernel_column_by_column(mini, target):
    """The negative control of FCMAE: a kernel read row by row is another one."""
    source = mini()
    weights = fcmae(source)
    load_pretrained(target, weights)
    wrong = weights['encoder.stages.0.0.dwconv.kernel'].reshape(7, 7, 8).permute(2, 0, 1).unsqueeze(1)
    torch.testing.assert_close(target.stages[0][0].dwconv.weight, source.stages[0][0].dwconv.weight)
    assert not torch.allclose(wrong, source.stages[0][0].dwconv.weight)


def test_a_stem_of_other_convolutions_is_refused(mini, target):
    weights = timm(mini())
    weights['stem.3.weight'] = torch.ones(8)  # timm's overlapping stems have more layers
    with pytest.raises(ValueError, match=r'1 unknown to the model: downsample_layers\.0\.3\.weight'):
        load_pretrained(target, weights)


@pytest.mark.parametrize('prefix', ['student.backbone.', 'model.encoder.', 'teacher.'])
def test_a_deeper_model_is_found(prefix, mini, target):
    weights = {f'{prefix}{key}': value for key, value in timm(mini()).items()}
    with pytest.raises(ValueError, match=rf"give prefix='{re.escape(prefix)}'"):
        load_pretrained(target, weights)
    load_pretrained(target, weights, prefix=prefix)
    assert_equal(target, state(mini()), trunk(target))


def test_every_format_is_written_here():
    # test_isotropic, test_roadmap, test_parity_others
    other_tests = {'isotropic', 'roadmap', 'torchvision', 'Hugging Face', 'Hugging Face DINOv3'}
    assert {source for _, source in WRITERS.values()} - {'OpenCLIP'} == set(FORMATS) - other_tests


# The message says whose weights these are.

ATTO = dict(arch='atto')


@pytest.mark.parametrize(
    ('weights', 'model', 'said'),
    [
        (dict(arch='femto'), ATTO, 'are of ConvNeXt V1 femto, with layer scale; the model is ConvNeXt V1 atto, with'),
        (ATTO, dict(ATTO, use_grn=True), 'are of ConvNeXt V1 atto, with layer scale; the model is ConvNeXt V2 atto'),
        (dict(ATTO, use_grn=True), ATTO, 'are of ConvNeXt V2 atto, without layer scale; the model is ConvNeXt V1'),
        (dict(ATTO, layer_scale_init_value=0), ATTO, 'V1 atto, without layer scale; the model is ConvNeXt V1 atto, w'),
        (dict(arch=MINI), ATTO, r'ConvNeXt V1 with \(1, 2, 3, 1\) blocks of \(8, 16, 24, 32\) channels, with layer'),
    ],
)
def test_the_size_of_the_weights_is_named(weights, model, said):
    with pytest.raises(ValueError, match=said):
        load_pretrained(ConvNeXt(**model), ConvNeXt(**weights).state_dict())


def test_another_kernel_size_is_named(mini):
    with pytest.raises(ValueError, match=r'of another shape.*dwconv\.weight \(8, 1, 7, 7\) for \(8, 1, 5, 5\)'):
        load_pretrained(ConvNeXt(MINI, kernel_size=5), official(mini()))
