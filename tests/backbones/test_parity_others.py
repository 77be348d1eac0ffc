"""Against torchvision's and Hugging Face's ConvNeXt on the same weights, through the converter."""

import pytest
import torch
import transformers
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.convnext import ConvNeXt as TorchvisionConvNeXt

from backbones import ConvNeXt, load_pretrained

DEPTHS, CHANNELS = (1, 2, 3, 1), (8, 16, 24, 32)
MINI = dict(depths=DEPTHS, channels=CHANNELS)
STAGES = ['stage1', 'stage2', 'stage3', 'stage4']


def torchvision_model():
    widths = [*CHANNELS, None]
    return TorchvisionConvNeXt([CNBlockConfig(widths[i], widths[i + 1], DEPTHS[i]) for i in range(4)], num_classes=5)


def huggingface(kind):
    """A model of transformers, and the module whose stages put out the features."""
    name, version = kind
    sizes = dict(depths=list(DEPTHS), hidden_sizes=list(CHANNELS))
    config = getattr(transformers, f'{version}Config')(**sizes)
    if name == 'Backbone':
        config.out_features = STAGES
    if name == 'UperNet':
        backbone = transformers.ConvNextConfig(**sizes, out_features=STAGES)
        config = transformers.UperNetConfig(backbone_config=backbone, hidden_size=8, auxiliary_in_channels=24)
        return transformers.UperNetForSemanticSegmentation(config)
    return getattr(transformers, f'{version}{name}')(config)


KINDS = {
    'torchvision': None,
    'V1': ('Model', 'ConvNext'),
    'V1 classifier': ('ForImageClassification', 'ConvNext'),
    'V1 backbone': ('Backbone', 'ConvNext'),
    'V2': ('Model', 'ConvNextV2'),
    'V2 classifier': ('ForImageClassification', 'ConvNextV2'),
    'V2 backbone': ('Backbone', 'ConvNextV2'),
    'UperNet': ('UperNet', 'ConvNext'),
    'DINOv3': ('Model', 'DINOv3ConvNext'),
    'DINOv3 backbone': ('Backbone', 'DINOv3ConvNext'),
}


def their_stages(model):
    """The four modules that put out the features of the stages."""
    if isinstance(model, TorchvisionConvNeXt):
        return [model.features[i] for i in (1, 3, 5, 7)]
    [stages] = [m for name, m in model.named_modules() if name.split('.')[-1] == 'stages' and len(m) == 4]
    return list(stages)


def features_of(model, stages, x):
    found = []
    hooks = [s.register_forward_hook(lambda _module, _args, out: found.append(out)) for s in stages]
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return [out[0] if isinstance(out, tuple) else out for out in found]


def errors(ours, theirs):
    x = 0.1 * torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(5))
    pairs = zip(features_of(ours, ours.stages, x), features_of(theirs, their_stages(theirs), x), strict=True)
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]


def loaded(kind, randomize):
    theirs = torchvision_model() if kind == 'torchvision' else huggingface(KINDS[kind])
    randomize(theirs)
    use_grn = 'V2' in kind
    ours = ConvNeXt(MINI, use_grn=use_grn)
    randomize(ours, seed=1)
    return ours, theirs, load_pretrained(ours, theirs.state_dict())


@pytest.mark.parametrize('kind', KINDS)
def test_same_features(kind, randomize):
    ours, theirs, report = loaded(kind, randomize)
    assert max(errors(ours, theirs)) < 1e-5
    norms = {'DINOv3': [3], 'V1 backbone': [0, 1, 2, 3], 'V2 backbone': [0, 1, 2, 3]}
    norms['UperNet'] = norms['V1 backbone']
    assert report.missing == [
        f'norm{i}.{p}' for i in range(4) if i not in norms.get(kind, []) for p in ('weight', 'bias')
    ]
    expected = 'torchvision' if kind == 'torchvision' else 'Hugging Face DINOv3' if 'DINO' in kind else 'Hugging Face'
    assert report.source == expected


@pytest.mark.parametrize('kind', KINDS)
def test_swapped_blocks_are_seen(kind, randomize):
    ours, theirs, _ = loaded(kind, randomize)
    ours.stages[2] = nn.Sequential(*[ours.stages[2][i] for i in (1, 0, 2)])
    found = errors(ours, theirs)
    assert max(found[:2]) < 1e-5
    assert min(found[2:]) > 1e-2


@pytest.mark.parametrize('kind', ['V1 backbone', 'V2 backbone'])
def test_same_norms_of_the_stages(kind, randomize):
    _, theirs, _ = loaded(kind, randomize)
    ours = ConvNeXt(MINI, use_grn='V2' in kind, norm_cfg=dict(type='LN2d', eps=theirs.hidden_states_norms.stage1.eps))
    load_pretrained(ours, theirs.state_dict())
    for i in range(4):
        x = torch.randn(2, CHANNELS[i], 5, 7)
        expected = getattr(theirs.hidden_states_norms, f'stage{i + 1}')(x)
        torch.testing.assert_close(getattr(ours, f'norm{i}')(x), expected, rtol=1e-5, atol=1e-5)


def test_the_last_norm_of_dinov3(randomize):
    ours, theirs, _ = loaded('DINOv3', randomize)
    torch.testing.assert_close(ours.norm3.weight, theirs.layer_norm.weight)
