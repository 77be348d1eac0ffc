"""The catalogue against what others say: timm, torchvision, the papers, and the models themselves."""

import re
from urllib.parse import urlsplit

import pytest
import timm
import torch
from mmengine.registry import MODELS
from torchvision import models

from backbones import ARCHS
from backbones.isotropic import ISOTROPIC_ARCHS
from backbones.zoo import _TABLE, ZOO, nearest

# Weights in timm that are of other networks.
EXCEPTIONS = {
    'convnext_atto_ols.a2_in1k': 'overlapping stem',
    'convnext_femto_ols.d1_in1k': 'overlapping stem',
    'convnext_pico_ols.d1_in1k': 'overlapping stem',
    'convnext_nano_ols.d1h_in1k': 'overlapping stem',
    'convnext_zepto_rms.ra4_e3600_r224_in1k': 'no LayerNorm',
    'convnext_zepto_rms_ols.ra4_e3600_r224_in1k': 'no LayerNorm',
    'test_convnext.r160_in1k': 'for timm itself',
    'test_convnext2.r160_in1k': 'for timm itself',
    'test_convnext3.r160_in1k': 'for timm itself',
}
TIMM = set(timm.list_pretrained('*convnext*'))
FROM_TIMM = sorted(TIMM & set(ZOO))

# In percent, as in the READMEs of facebookresearch/ConvNeXt at 048efce and ConvNeXt-V2 at 1e48272.
TOP1 = {
    'fb_in1k': dict(tiny=82.1, small=83.1, base=83.8, large=84.3),
    'fb_in1k_384': dict(base=85.1, large=85.5),
    'fb_in22k_ft_in1k': dict(tiny=82.9, small=84.6, base=85.8, large=86.6, xlarge=87.0),
    'fb_in22k_ft_in1k_384': dict(tiny=84.1, small=85.8, base=86.8, large=87.5, xlarge=87.8),
    'fcmae_ft_in1k': dict(atto=76.7, femto=78.5, pico=80.3, nano=81.9, tiny=83.0, base=84.9, large=85.8, huge=86.3),
    'fcmae_ft_in22k_in1k': dict(nano=82.1, tiny=83.9, base=86.8, large=87.3),
    'fcmae_ft_in22k_in1k_384': dict(nano=83.4, tiny=85.1, base=87.7, large=88.2, huge=88.7),
    'fcmae_ft_in22k_in1k_512': dict(huge=88.9),
}
ISOTROPIC_TOP1 = dict(small=79.7, base=82.0, large=82.6)  # the V1 paper's Table 2
# Parameters of the published classifiers: V1 and V2 from mmpretrain's metafiles, isotropic counted from the official.
CLASSIFIERS = {
    'convnext_tiny.fb_in1k': 28_589_128,
    'convnext_small.fb_in1k': 50_223_688,
    'convnext_base.fb_in1k': 88_591_464,
    'convnext_large.fb_in1k': 197_767_336,
    'convnext_xlarge.fb_in22k_ft_in1k': 350_196_968,
    'convnextv2_atto.fcmae_ft_in1k': 3_708_400,
    'convnextv2_femto.fcmae_ft_in1k': 5_233_240,
    'convnextv2_pico.fcmae_ft_in1k': 9_066_280,
    'convnextv2_nano.fcmae_ft_in1k': 15_623_800,
    'convnextv2_tiny.fcmae_ft_in1k': 28_635_496,
    'convnextv2_base.fcmae_ft_in1k': 88_717_800,
    'convnextv2_large.fcmae_ft_in1k': 197_956_840,
    'convnextv2_huge.fcmae_ft_in1k': 660_289_640,
    'convnext_iso_small.fb_in1k': 22_308_712,
    'convnext_iso_base.fb_in1k': 87_083_752,
    'convnext_iso_large.fb_in1k': 305_942_504,
}
TRUNK = ('downsample_layers.', 'stages.', 'stem.', 'blocks.')


def one_of_each(key, names=tuple(ZOO)):
    """The first name of the catalogue for each value of ``key``."""
    return list({key(ZOO[name]): name for name in reversed(names)}.values())


def cfg(name):
    return timm.models.get_pretrained_cfg(name)


def parameters(model, parts):
    return sum(parameter.numel() for key, parameter in model.named_parameters() if key.startswith(parts))


@pytest.mark.parametrize('name', ZOO)
def test_every_field_is_of_its_kind(name):
    weights = ZOO[name]
    assert weights.name == name
    assert re.fullmatch(r'convnext(v2|_iso)?_[a-z_]+\.[a-z0-9_]+', name)
    assert f'_{weights.arch}' in name
    assert weights.use_grn == name.startswith('convnextv2_')
    assert weights.model == ('ConvNeXtIsotropic' if name.startswith('convnext_iso_') else 'ConvNeXt')
    assert weights.pretraining
    assert weights.resolution in (224, 256, 320, 384, 512)
    assert weights.license in (
        'apache-2.0',
        'bsd-3-clause',
        'cc-by-nc-4.0',
        'dinov3-license',
        'fair-noncommercial-research-license',
        'mit',
    )
    assert weights.top1 is None or 75 < weights.top1 < 90
    assert weights.sha256 is None or re.fullmatch('[0-9a-f]{8}|[0-9a-f]{64}', weights.sha256)


def test_names_addresses_and_files_are_unique():
    assert len(_TABLE) == len(ZOO)
    parts = [urlsplit(weights.address) for weights in ZOO.values()]
    assert {part.scheme for part in parts} == {'https'}
    assert {part.netloc for part in parts} == {'huggingface.co', 'dl.fbaipublicfiles.com', 'download.pytorch.org'}
    assert len({weights.address for weights in ZOO.values()}) == len(ZOO)
    assert len({weights.file for weights in ZOO.values()}) == len(ZOO)


def test_sizes_ascend_within_a_group():
    order = ['atto', 'femto', 'pico', 'nano', 'tiny', 'small', 'base', 'large', 'xlarge', 'xxlarge', 'huge']
    groups = {}
    for weights in ZOO.values():
        architecture, tag = weights.name.split('.')
        groups.setdefault((architecture.split('_')[0], weights.model, tag), []).append(order.index(weights.arch))
    assert len(groups) > 30
    assert all(sizes == sorted(sizes) for sizes in groups.values())


def test_timms_weights_are_in_the_catalogue_or_known_not_to_fit():
    assert TIMM - set(ZOO) == set(EXCEPTIONS)
    assert len(FROM_TIMM) == len(TIMM) - len(EXCEPTIONS)
    assert {name for name in ZOO if 'huggingface.co' in ZOO[name].address} == set(FROM_TIMM)


@pytest.mark.parametrize('name', FROM_TIMM)
def test_timm_says_the_same(name):
    assert ZOO[name].address == f'https://huggingface.co/{cfg(name).hf_hub_id}/resolve/main/model.safetensors'
    assert ZOO[name].resolution == cfg(name).input_size[-1]
    assert ZOO[name].license == cfg(name).license
    mean, std = ZOO[name].normalization
    assert mean == pytest.approx([255 * value for value in cfg(name).mean], abs=1e-3)
    assert std == pytest.approx([255 * value for value in cfg(name).std], abs=1e-3)


@pytest.mark.parametrize('size', ['tiny', 'small', 'base', 'large'])
def test_torchvision_says_the_same(size):
    theirs = getattr(models, f'ConvNeXt_{size.capitalize()}_Weights').IMAGENET1K_V1
    ours = ZOO[f'convnext_{size}.tv_in1k']
    assert ours.address == theirs.url
    assert ours.sha256 == re.search(r'-(\w{8})\.pth', theirs.url)[1]
    assert ours.top1 == theirs.meta['_metrics']['ImageNet-1K']['acc@1']
    assert ours.resolution == theirs.transforms.keywords['crop_size']


def test_top1_is_the_papers():
    published = {
        f'convnext{"v2" * tag.startswith("fcmae")}_{size}.{tag}': value
        for tag, row in TOP1.items()
        for size, value in row.items()
    }
    published |= {f'convnext_iso_{size}.fb_in1k': value for size, value in ISOTROPIC_TOP1.items()}
    ours = {name: weights.top1 for name, weights in ZOO.items() if weights.top1 is not None and 'tv_in1k' not in name}
    assert ours == published


@pytest.mark.parametrize('name', one_of_each(lambda weights: weights.name.split('.')[0]))
def test_parameters_are_those_of_our_model(name):
    """With the arguments that the catalogue gives, on no device."""
    weights = ZOO[name]
    with torch.device('meta'):
        model = MODELS.build(dict(type=weights.model, **weights.kwargs))
    assert parameters(model, TRUNK) == weights.parameters
    assert any(key.endswith('grn.gamma') for key, _ in model.named_parameters()) == weights.use_grn


@pytest.mark.parametrize('name', one_of_each(lambda weights: weights.name.split('.')[0], FROM_TIMM))
def test_parameters_and_epsilon_are_those_of_timms_model(name):
    weights = ZOO[name]
    with torch.device('meta'):
        model = timm.create_model(name, pretrained=False, num_classes=0)
    assert parameters(model, ('stem.', 'stages.')) == weights.parameters
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {weights.kwargs.get('norm_cfg', {}).get('eps', 1e-6)}


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_with_norm_and_head_they_are_the_published_classifiers(name):
    weights = ZOO[name]
    isotropic = weights.model == 'ConvNeXtIsotropic'
    width = ISOTROPIC_ARCHS[weights.arch][1] if isotropic else ARCHS[weights.arch][1][-1]
    assert weights.parameters + 2 * width + 1000 * (width + 1) == CLASSIFIERS[name]


@pytest.mark.parametrize('name', [name for name in FROM_TIMM if 'fbaipublicfiles' in cfg(name).url])
def test_the_authors_file_name_leads_to_the_weights(name):
    """To the file itself where the catalogue has it, else to timm's copy."""
    expected = f'{name}_pth' if f'{name}_pth' in ZOO else name
    assert nearest(cfg(name).url.rsplit('/', 1)[-1]) == expected


@pytest.mark.parametrize(
    ('given', 'meant'),
    [
        ('convnext-tiny.fb_in1k', 'convnext_tiny.fb_in1k'),
        ('timm/ConvNeXt_tiny.fb_in1k', 'convnext_tiny.fb_in1k'),
        ('convnext_tiny', 'convnext_tiny.fb_in1k'),
        ('convnextv2_nano', 'convnextv2_nano.fcmae_ft_in1k'),
        ('convnext_xlarge', 'convnext_xlarge.fb_in22k'),
        ('convnext_small.fb_in1', 'convnext_small.fb_in1k'),
        ('weights/convnext_tiny_1k_224.pth', 'convnext_tiny.fb_in1k_no_ema'),
        ('facebook/convnext-tiny-224', 'convnext_tiny.fb_in1k'),
        ('convnext_base-6075fbad.pth', 'convnext_base.tv_in1k'),
        ('resnet50', None),
        ('work_dirs/run/epoch_12.pth', None),
        ('', None),
    ],
)
def test_the_nearest_name(given, meant):
    assert nearest(given) == meant
