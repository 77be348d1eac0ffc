"""Against timm's ConvNeXt on the same weights, through the converter.

Inputs are faint, so that a LayerNorm's eps matters at the stem."""

import pytest
import timm
import torch
from torch import nn

from backbones import ConvNeXt, convert_state_dict, load_pretrained

MINI = dict(depths=(1, 2, 3, 1), channels=(8, 16, 24, 32))
V2 = dict(use_grn=True, ls_init_value=None)


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
    channels = ours.downsample_layers[0][0].in_channels
    x = 0.1 * torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        our_features, outputs = stage_features(ours.eval(), x)
        their_features, _ = stage_features(theirs, x)
        expected = []
        for i, feature in enumerate(their_features):
            norm = nn.LayerNorm(feature.shape[1], eps=ours.norm0.eps)
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
    report = load_pretrained(ours, theirs.state_dict())
    assert report.source == 'timm'
    return ours


CASES = {
    'linear': (MINI, MINI, {}, {}),
    'conv_mlp': (MINI, MINI, dict(conv_mlp=True), {}),
    'v2': (MINI, MINI, V2, dict(use_grn=True)),
    'v2_conv_mlp': (MINI, MINI, dict(conv_mlp=True, **V2), dict(use_grn=True)),
    'v2_with_layer_scale': (MINI, MINI, dict(use_grn=True), dict(use_grn=True, layer_scale_init_value=1.0)),
    'relu': (MINI, MINI, dict(act_layer='relu'), dict(act_cfg=dict(type='ReLU'))),
    'kernel_11': (MINI, MINI, dict(kernel_sizes=11), dict(kernel_size=11)),
    'kernel_3': (MINI, MINI, dict(kernel_sizes=3), dict(kernel_size=3)),
    'output_stride_16': (MINI, MINI, dict(output_stride=16), dict(output_stride=16)),
    'output_stride_8': (MINI, MINI, dict(output_stride=8), dict(output_stride=8)),
    'one_channel': (MINI, MINI, dict(in_chans=1), dict(in_channels=1)),
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
    expected, _ = convert_state_dict({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    for name, parameter in ours.named_parameters():
        if not name.startswith('norm'):
            error = (parameter.grad - expected[name]).abs().max() / expected[name].abs().max()
            assert error < 1e-5, name


@pytest.mark.parametrize('channels', [1, 2, 4, 7])
def test_weights_of_the_stem_for_other_channels(channels, randomize, monkeypatch):
    """As timm adapts them while it loads pretrained weights."""
    rgb = timm_model(MINI, randomize)
    ours = ConvNeXt(MINI, in_channels=channels)
    report = load_pretrained(ours, rgb.state_dict())
    assert report.adapted == ['downsample_layers.0.0.weight']
    assert 'adapted to the channels of the image: downsample_layers.0.0.weight' in str(report)

    theirs = timm.models.convnext.ConvNeXt(
        depths=MINI['depths'], dims=MINI['channels'], in_chans=channels, num_classes=0
    )
    theirs.pretrained_cfg = dict(
        first_conv='stem.0', classifier='head.fc', num_classes=1000, state_dict=rgb.state_dict()
    )
    timm.models.load_pretrained(theirs, in_chans=channels, num_classes=0, strict=False)
    load_pretrained(ours, rgb.state_dict())
    assert max(differences(ours, theirs.eval())) < 1e-5


def test_a_layer_norm_of_clip(randomize):
    theirs = timm_model(MINI, randomize, norm_eps=1e-5)
    assert (
        max(differences(ours_with_weights_of(theirs, MINI, randomize, norm_cfg=dict(type='LN2d', eps=1e-5)), theirs))
        < 1e-5
    )
    with torch.device('meta'):
        assert ConvNeXt('xxlarge').norm3.eps == ConvNeXt('xxlarge').stages[0][0].norm.eps == 1e-5
        assert ConvNeXt('xxlarge', norm_cfg=dict(type='LN2d', eps=1e-6)).norm3.eps == 1e-6
        assert ConvNeXt('huge').norm3.eps == 1e-6


def test_features_only(randomize):
    features = timm.create_model('convnext_atto', pretrained=False, features_only=True)
    randomize(features)
    ours = ConvNeXt('atto')
    for weights in (features.state_dict(), {f'backbone.timm_model.{k}': v for k, v in features.state_dict().items()}):
        load_pretrained(ours, weights)
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            for out, expected in zip(stage_features(ours.eval(), x)[0], features.eval()(x), strict=True):
                torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


# What the comparison must not let pass.


def test_a_wrong_dilation_is_seen(randomize):
    theirs = timm_model(MINI, randomize, output_stride=16)
    ours = ours_with_weights_of(theirs, MINI, randomize, output_stride=16)
    ours.stages[3][0].dwconv.dilation, ours.stages[3][0].dwconv.padding = (1, 1), (3, 3)
    errors = differences(ours, theirs)
    assert max(errors[:3]) < 1e-5
    assert errors[3] > 1e-2


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
