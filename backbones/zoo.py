"""The catalogue of published weights: what they are, whose, under which license, and where they lie.

A name is enough where a checkpoint is asked for, as in ``init_cfg=dict(type='Pretrained',
checkpoint='convnext_tiny.fb_in1k')``. Names are timm's ``architecture.tag``. Those that timm does not have follow its
form: ``fb_in1k_no_ema``, ``fb_in1k_384``, ``fb_in22k_pth`` and ``convnext_iso_*`` are the authors' own files, and
``tv_in1k`` torchvision's.

Left out of timm's are the weights of other networks: ``convnext_*_ols`` (a stem of two overlapping convolutions),
``convnext_zepto_rms*`` (no LayerNorm), and ``test_convnext*`` (made for timm's own tests, tanh GELU).

Sources: the READMEs of facebookresearch/ConvNeXt at 048efce and ConvNeXt-V2 at 1e48272 (addresses, top-1, licenses);
timm 1.0.31, models/convnext.py (names, resolutions, licenses of its copies); torchvision 0.26, models/convnext.py.
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

SUFFIXES = ('.safetensors', '.pth', '.pt', '.bin', '.ckpt')
"""Of files of weights."""


@dataclass(frozen=True)
class Weights:
    """One file of published weights.

    Attributes:
        name: in the catalogue.
        model: the registered backbone that they fit.
        arch: its size.
        use_grn: whether they are of ConvNeXt V2.
        pretraining: data, and method unless it is classification, in their order; 1k, 12k and 22k are of ImageNet.
        resolution: of the last training, in pixels.
        license: SPDX identifier, or the name of the publisher's own license.
        parameters: of the backbone without its output norms or pyramid: what detectors and segmentors take over.
        top1: accuracy on ImageNet-1k in percent at that resolution, as published; None where the sources have none.
        address: of the file.
        sha256: of the file, or how it begins; None where it is not known.
    """

    name: str
    model: str
    arch: str
    use_grn: bool
    pretraining: str
    resolution: int
    license: str
    parameters: int
    top1: float | None
    address: str
    sha256: str | None = None

    @property
    def file(self) -> str:
        """Name of the file in a folder of many; Hugging Face calls every one ``model.safetensors``."""
        file = self.address.rsplit('/', 1)[-1]
        return f'{self.name}.safetensors' if file == 'model.safetensors' else file

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the three channels that they were trained with, of values from 0 to 255."""
        if '.clip_' in self.name:  # OpenAI's, also where ImageNet followed
            return (122.771, 116.746, 104.094), (68.501, 66.632, 70.323)
        return (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

    @property
    def kwargs(self) -> dict[str, Any]:
        """The arguments of the backbone that these weights need."""
        kwargs: dict[str, Any] = dict(arch=self.arch)
        if self.use_grn:
            kwargs.update(use_grn=True)
        if self.arch == 'xxlarge':
            kwargs.update(norm_cfg=dict(type='LN2d', eps=1e-5))
        return kwargs


_HUGGING_FACE = 'https://huggingface.co/timm/{name}/resolve/main/model.safetensors'
_AUTHORS = 'https://dl.fbaipublicfiles.com/convnext/'
_TORCHVISION = 'https://download.pytorch.org/models/'

# A test counts them.
_PARAMETERS = {
    'convnext': dict(
        atto=3_373_880,
        femto=4_832_016,
        pico=8_531_648,
        nano=14_951_280,
        tiny=27_818_592,
        small=49_453_152,
        base=87_564_416,
        large=196_227_264,
        xlarge=348_143_872,
        xxlarge=843_391_872,
    ),
    'convnextv2': dict(
        atto=3_386_760,
        femto=4_847_472,
        pico=8_552_256,
        nano=14_981_520,
        tiny=27_864_960,
        base=87_690_752,
        large=196_416_768,
        huge=657_467_008,
    ),
    'convnext_iso': dict(small=21_922_944, base=86_313_216, large=304_915_456),
}

# Of some files of Hugging Face, as their pages show it. In torchvision's file names it begins behind the hyphen.
_SHA256 = {
    'convnext_small.fb_in1k': '5ec5ed9e97fb835093aaf3e6c3fce406b160b367117b6a2b8c7b703386218d1b',
    'convnext_small.fb_in22k_ft_in1k': '2457488bec2ffcb2061b9e3fdd63360114549615e3e35ef6dc5c5efe549cbbc9',
    'convnext_tiny.in12k': 'f25a356273cc0205cb4df469b79e8652624fde0e11377b8415c0aa368224c67b',
    'convnext_tiny.in12k_ft_in1k': 'a1aefa409b513cf209b085424eb3efffe4e4a9f511491bc2c12ea35209e6bb95',
    'convnext_tiny.in12k_ft_in1k_384': '2a372497fe2d9d5994e9d69e979ac48625e40792f9f8965f498a0f68821f2adb',
    'convnextv2_nano.fcmae_ft_in1k': 'c9b5106b30a4593916f1ad5a3fa4f659d48e8ce0107bb9901c457a3686d27a44',
    'convnextv2_tiny.fcmae_ft_in1k': 'fdfb4edfa5abb3b4ea29ab17e6fae5c117dc6cc32ecfb1d0726a156f40a4c1a5',
    'convnextv2_base.fcmae': '4c2c0ab209f18d9dc1d4cf85e92dda8c834f377d27c5485c284e38daa9c060db',
}


def _rows(
    family: str, tag: str, pretraining: str, resolution: int, license: str, address: str, **sizes: float | None
) -> Iterator[Weights]:
    """Weights that differ in size alone: ``size=top1``, with ``{size}`` or ``{name}`` in the address."""
    for size, top1 in sizes.items():
        arch, name = size.split('_')[0], f'{family}_{size}.{tag}'
        file = address.format(size=size, name=name)
        in_name = re.search(r'-([0-9a-f]{8})\.pth$', file)
        yield Weights(
            name=name,
            model='ConvNeXtIsotropic' if family == 'convnext_iso' else 'ConvNeXt',
            arch=arch,
            use_grn=family == 'convnextv2',
            pretraining=pretraining,
            resolution=resolution,
            license=license,
            parameters=_PARAMETERS[family][arch],
            top1=top1,
            address=file,
            sha256=in_name[1] if in_name else _SHA256.get(name),
        )


def _v1(
    tag: str, pretraining: str, resolution: int, license: str = 'apache-2.0', **sizes: float | None
) -> list[Weights]:
    return list(_rows('convnext', tag, pretraining, resolution, license, _HUGGING_FACE, **sizes))


def _v2(tag: str, pretraining: str, resolution: int, **sizes: float | None) -> list[Weights]:
    return list(_rows('convnextv2', tag, pretraining, resolution, 'cc-by-nc-4.0', _HUGGING_FACE, **sizes))


def _authors(
    tag: str, pretraining: str, resolution: int, file: str, family: str = 'convnext', **sizes: float | None
) -> list[Weights]:
    return list(_rows(family, tag, pretraining, resolution, 'mit', _AUTHORS + file, **sizes))


def _torchvision(size: str, top1: float, digits: str) -> list[Weights]:
    address = f'{_TORCHVISION}convnext_{size}-{digits}.pth'
    return list(_rows('convnext', 'tv_in1k', 'ImageNet-1k', 224, 'bsd-3-clause', address, **{size: top1}))


# fmt: off
_TABLE = [
    # V1 by its authors. The paper's recipes with 22k start from fb_in22k, which was not fine-tuned on 1k.
    *_v1('fb_in1k', 'ImageNet-1k', 224, tiny=82.1, small=83.1, base=83.8, large=84.3),
    *_v1('fb_in22k', 'ImageNet-22k', 224, tiny=None, small=None, base=None, large=None, xlarge=None),
    *_v1('fb_in22k_ft_in1k', 'ImageNet-22k, then 1k', 224, tiny=82.9, small=84.6, base=85.8, large=86.6, xlarge=87.0),
    *_v1('fb_in22k_ft_in1k_384', 'ImageNet-22k, then 1k', 384,
         tiny=84.1, small=85.8, base=86.8, large=87.5, xlarge=87.8),

    # V1 by its authors, their own files: what the papers' recipes start from (no_ema, in22k), and what timm has not.
    *_authors('fb_in1k_no_ema', 'ImageNet-1k', 224, 'convnext_{size}_1k_224.pth', tiny=None, small=None, base=None),
    *_authors('fb_in1k_384', 'ImageNet-1k', 384, 'convnext_{size}_1k_384.pth', base=85.1, large=85.5),
    *_authors('fb_in22k_pth', 'ImageNet-22k', 224, 'convnext_{size}_22k_224.pth', base=None, large=None, xlarge=None),
    # Isotropic; top-1 as in the paper's Table 2 (small is 78.7 in the README).
    *_authors('fb_in1k', 'ImageNet-1k', 224, 'convnext_iso_{size}_1k_224_ema.pth', family='convnext_iso',
              small=79.7, base=82.0, large=82.6),

    # V1 by torchvision.
    *_torchvision('tiny', 82.52, '983f1562'),
    *_torchvision('small', 83.616, '0c510722'),
    *_torchvision('base', 84.062, '6075fbad'),
    *_torchvision('large', 84.414, 'ea097f82'),

    # V1 by timm.
    *_v1('d2_in1k', 'ImageNet-1k', 224, atto=None),
    *_v1('d1_in1k', 'ImageNet-1k', 224, femto=None, pico=None),
    *_v1('d1h_in1k', 'ImageNet-1k', 224, nano=None),
    *_v1('a2h_in1k', 'ImageNet-1k', 224, tiny_hnf=None),
    *_v1('in12k', 'ImageNet-12k', 224, nano=None, tiny=None, small=None),
    *_v1('in12k_ft_in1k', 'ImageNet-12k, then 1k', 224, nano=None, tiny=None, small=None),
    *_v1('in12k_ft_in1k_384', 'ImageNet-12k, then 1k', 384, tiny=None, small=None),
    *_v1('r384_in12k', 'ImageNet-12k', 384, nano=None),
    *_v1('r384_ad_in12k', 'ImageNet-12k', 384, nano=None),
    *_v1('r384_in12k_ft_in1k', 'ImageNet-12k, then 1k', 384, nano=None),

    # V1 as the image tower of OpenCLIP, and fine-tuned from it by timm; laiona is LAION-Aesthetic.
    *_v1('clip_laion2b', 'LAION-2B CLIP', 256, base=None),
    *_v1('clip_laion2b_augreg', 'LAION-2B CLIP', 256, base=None, large_mlp=None),
    *_v1('clip_laion2b_soup', 'LAION-2B CLIP', 256, xxlarge=None),
    *_v1('clip_laion2b_rewind', 'LAION-2B CLIP', 256, xxlarge=None),
    *_v1('clip_laion2b_ft_320', 'LAION-2B CLIP', 320, large_mlp=None),
    *_v1('clip_laion2b_ft_soup_320', 'LAION-2B CLIP', 320, large_mlp=None),
    *_v1('clip_laiona', 'LAION-A CLIP', 256, base=None),
    *_v1('clip_laiona_320', 'LAION-A CLIP', 320, base=None),
    *_v1('clip_laiona_augreg_320', 'LAION-A CLIP', 320, base=None),
    *_v1('clip_laiona_augreg_ft_in1k_384', 'LAION-A CLIP, then 1k', 384, base=None),
    *_v1('clip_laion2b_augreg_ft_in1k', 'LAION-2B CLIP, then 1k', 256, base=None, large_mlp=None),
    *_v1('clip_laion2b_augreg_ft_in1k_384', 'LAION-2B CLIP, then 1k', 384, large_mlp=None),
    *_v1('clip_laion2b_soup_ft_in1k', 'LAION-2B CLIP, then 1k', 256, xxlarge=None),
    *_v1('clip_laion2b_augreg_ft_in12k', 'LAION-2B CLIP, then 12k', 256, base=None),
    *_v1('clip_laion2b_augreg_ft_in12k_384', 'LAION-2B CLIP, then 12k', 384, large_mlp=None),
    *_v1('clip_laion2b_soup_ft_in12k', 'LAION-2B CLIP, then 12k', 256, xxlarge=None),
    *_v1('clip_laion2b_soup_ft_in12k_320', 'LAION-2B CLIP, then 12k', 320, large_mlp=None),
    *_v1('clip_laion2b_soup_ft_in12k_384', 'LAION-2B CLIP, then 12k', 384, large_mlp=None),
    *_v1('clip_laion2b_augreg_ft_in12k_in1k', 'LAION-2B CLIP, then 12k, 1k', 256, base=None),
    *_v1('clip_laion2b_augreg_ft_in12k_in1k_384', 'LAION-2B CLIP, then 12k, 1k', 384, base=None),
    *_v1('clip_laion2b_soup_ft_in12k_in1k_320', 'LAION-2B CLIP, then 12k, 1k', 320, large_mlp=None),
    *_v1('clip_laion2b_soup_ft_in12k_in1k_384', 'LAION-2B CLIP, then 12k, 1k', 384, large_mlp=None),

    # V1 distilled by Meta.
    *_v1('dinov3_lvd1689m', 'LVD-1689M (DINOv3)', 224, 'dinov3-license', tiny=None, small=None, base=None, large=None),
    *_v1('eupe_lvd1689m', 'LVD-1689M (EUPE)', 256, 'fair-noncommercial-research-license',
         tiny=None, small=None, base=None),

    # V2. The paper's detectors and segmentors start from weights fine-tuned on 1k, not from bare FCMAE.
    *_v2('fcmae_ft_in1k', 'FCMAE, then 1k', 224,
         atto=76.7, femto=78.5, pico=80.3, nano=81.9, tiny=83.0, base=84.9, large=85.8, huge=86.3),
    *_v2('fcmae_ft_in22k_in1k', 'FCMAE, then 22k, 1k', 224, nano=82.1, tiny=83.9, base=86.8, large=87.3),
    *_v2('fcmae_ft_in22k_in1k_384', 'FCMAE, then 22k, 1k', 384,
         nano=83.4, tiny=85.1, base=87.7, large=88.2, huge=88.7),
    *_v2('fcmae_ft_in22k_in1k_512', 'FCMAE, then 22k, 1k', 512, huge=88.9),
    *_v2('fcmae', 'FCMAE on ImageNet-1k', 224,
         atto=None, femto=None, pico=None, nano=None, tiny=None, base=None, large=None, huge=None),
]
# fmt: on

ZOO: dict[str, Weights] = {weights.name: weights for weights in _TABLE}


# Names of published files, and of Hugging Face's copies, that are not in the catalogue under that name.
_OTHER_NAMES = (
    (r'(convnext_[a-z]+)_(?:1k_)?224(?:_ema)?', r'\1.fb_in1k'),
    (r'(convnext_[a-z]+)_(?:1k_)?384', r'\1.fb_in1k_384'),
    (r'(convnext_[a-z]+)_22k_224', r'\1.fb_in22k'),
    (r'(convnext_[a-z]+)_22k_1k_224(?:_ema)?', r'\1.fb_in22k_ft_in1k'),
    (r'(convnext_[a-z]+)_22k_1k_384(?:_ema)?', r'\1.fb_in22k_ft_in1k_384'),
    (r'(convnextv2_[a-z]+)_1k_224_fcmae', r'\1.fcmae'),
    (r'(convnextv2_[a-z]+)_1k_224(?:_ema)?', r'\1.fcmae_ft_in1k'),
    (r'(convnextv2_[a-z]+)_22k_224(?:_ema)?', r'\1.fcmae_ft_in22k_in1k'),
    (r'(convnextv2_[a-z]+)_22k_(384|512)(?:_ema)?', r'\1.fcmae_ft_in22k_in1k_\2'),
)


def nearest(name: str) -> str | None:
    """The name of the catalogue that a misspelling, a published file or an architecture means, if any comes near."""
    path = PurePosixPath(re.split(r'[/\\]', name.lower())[-1].replace('-', '_'))
    plain = path.stem if path.suffix in SUFFIXES else path.name
    for weights in ZOO.values():  # an architecture alone means the first of its weights
        file = weights.file.rsplit('.', 1)[0].replace('-', '_')
        if plain in (weights.name, file, weights.name.split('.')[0]):
            return weights.name
    for pattern, template in _OTHER_NAMES:
        if match := re.fullmatch(pattern, plain):
            plain = match.expand(template)
    return next(iter(difflib.get_close_matches(plain, ZOO, n=1, cutoff=0.8)), None)
