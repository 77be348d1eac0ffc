"""Against timm's ConvNeXt on the same weights. Inputs are faint, so that a LayerNorm's eps matters at the stem."""

import re

import pytest
import timm
import torch
from torch import nn

from backbones import ConvNeXt, load_pretrained

MINI = dict(depths=(1, 2, 3, 1), channels=(8, 16, 24, 32))
V2 = dict(use_grn=True, ls_init_value=None)

# timm's names and ours; None: the classifier.
NAMES = [
    (r'stem\.(\d\.\w+)', r'downsample_layers.0.\1'),
    (r'stages\.(\d)\.downsample\.(\d\.\w+)', r'downsample_layers.\1.\2'),
    (r'stages\.(\d)\.blocks\.(\d+)\.gamma', r'stages.\1.\2.gamma'),
    (r'stages\.(\d)\.blocks\.(\d+)\.norm\.(\w+)', r'stages.\1.\2.norm.\3'),
    (r'stages\.(\d)\.blocks\.(\d+)\.conv_dw\.(\w+)', r'stages.\1.\2.dwconv.\3'),
    (r'stages\.(\d)\.blocks\.(\d+)\.mlp\.fc([12])\.(\w+)', r'stages.\1.\2.pwconv\3.\4'),
    (r'stages\.(\d)\.blocks\.(\d+)\.mlp\.grn\.weight', r'stages.\1.\2.grn.gamma'),
    (r'stages\.(\d)\.blocks\.(\d+)\.mlp\.grn\.bias', r'stages.\1.\2.grn.beta'),
    (r'head\..*', None),
]


def renamed(state_dict):
    """timm's weights under our names; their shapes stay (4-D with conv_mlp, 1-D GRN)."""
    ours = {}
    for key, value in state_dict.items():
        pattern, name = next((p, n) for p, n in NAMES if re.fullmatch(p, key))
        if name is not None:
            ours[re.sub(pattern, name, key)] = value
    return ours


def timm_model(arch, randomize, **options):
    if isinstance(arch, str):
        model = timm.create_model(arch, pretrained=False, **options)
    else:
        model = timm.models.convnext.ConvNeXt(depths=arch['depths'], dims=arch['channels'], **options)
    randomize(model)
    return model.eval()


def stage_features(model, x):
    """What each stage puts out, before any output norm."""
    features = []
    hooks = [s.register_forward_hook(lambda _module, _args, out: features.append(out)) for s in model.stages]
    outputs = model(x)
    for hook in hooks:
        hook.remove()
    return features, outputs


def differences(ours, theirs, size=64):
    """The largest difference of each stage and each output, relative to the largest value there."""
    x = 0.1 * torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        our_features, outputs = stage_features(ours.eval(), x)
        their_features, _ = stage_features(theirs, x)
        expected = []
        for i, feature in enumerate(their_features):
            norm = nn.LayerNorm(feature.shape[1], eps=1e-6)
            norm.load_state_dict(getattr(ours, f'norm{i}').state_dict())
            expected.append(norm(feature.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    assert len(our_features) == len(their_features) == len(outputs) == 4
    return [
        ((a - b).abs().max() / b.abs().max()).item()
        for a, b in zip([*our_features, *outputs], [*their_features, *expected], strict=True)
    ]


def ours_with_weights_of(theirs, arch, randomize, **options):
    ours = ConvNeXt(arch, **options)
    randomize(ours, seed=1)  # of which only the output norms stay
    load_pretrained(ours, renamed(theirs.state_dict()))
    return ours


CASES = {
    'linear': (MINI, MINI, {}, {}),
    'conv_mlp': (MINI, MINI, dict(conv_mlp=True), {}),
    'v2': (MINI, MINI, V2, dict(use_grn=True)),
    'v2_conv_mlp': (MINI, MINI, dict(conv_mlp=True, **V2), dict(use_grn=True)),
    'v2_with_layer_scale': (MINI, MINI, dict(use_grn=True), dict(use_grn=True, layer_scale_init_value=1.0)),
    'relu': (MINI, MINI, dict(act_layer='relu'), dict(act_cfg=dict(type='ReLU'))),
    'atto': ('convnext_atto', 'atto', {}, {}),
    'tiny': ('convnext_tiny', 'tiny', {}, {}),
    'v2_atto': ('convnextv2_atto', 'atto', {}, dict(use_grn=True)),
}


@pytest.mark.parametrize('case', CASES)
def test_same_features_as_timm(case, randomize):
    their_arch, our_arch, their_options, our_options = CASES[case]
    theirs = timm_model(their_arch, randomize, **their_options)
    ours = ours_with_weights_of(theirs, our_arch, randomize, **our_options)
    assert max(differences(ours, theirs)) < 1e-5


def test_same_features_as_timm_for_an_odd_size(randomize):
    theirs = timm_model(MINI, randomize)
    assert max(differences(ours_with_weights_of(theirs, MINI, randomize), theirs, size=75)) < 1e-5


def test_same_gradients_as_timm(randomize):
    theirs = timm_model(MINI, randomize)
    ours = ours_with_weights_of(theirs, MINI, randomize)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    stage_features(ours, x)[0][-1].square().mean().backward()
    stage_features(theirs, x)[0][-1].square().mean().backward()
    expected = renamed({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        if not name.startswith('norm'):
            error = (parameter.grad - expected[name]).abs().max() / expected[name].abs().max()
            assert error < 1e-5, name


# What the comparison must not let pass.


def test_a_wrong_eps_is_seen(randomize):
    theirs = timm_model(MINI, randomize)
    ours = ours_with_weights_of(theirs, MINI, randomize, norm_cfg=dict(type='LN2d', eps=1e-5))
    assert min(differences(ours, theirs)) > 1e-4


def test_swapped_blocks_are_seen(randomize):
    theirs = timm_model(MINI, randomize)
    ours = ours_with_weights_of(theirs, MINI, randomize)
    ours.stages[2] = nn.Sequential(*[ours.stages[2][i] for i in (1, 0, 2)])
    errors = differences(ours, theirs)
    assert max(errors[:2]) < 1e-5  # the stages before are untouched
    assert min(errors[2:4]) > 1e-2


def test_a_missing_layer_scale_is_seen(randomize):
    theirs = timm_model(MINI, randomize)
    ours = ours_with_weights_of(theirs, MINI, randomize)
    ours.stages[0][0].gamma.data.fill_(1.0)
    assert min(differences(ours, theirs)) > 1e-2


def test_tanh_gelu_is_seen(randomize):
    theirs = timm_model(MINI, randomize)
    ours = ours_with_weights_of(theirs, MINI, randomize, act_cfg=dict(type='GELU', approximate='tanh'))
    assert min(differences(ours, theirs)) > 1e-5
