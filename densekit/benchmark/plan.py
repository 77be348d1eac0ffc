"""What ``make bench`` and ``make bench-gpu`` measure, in tiers, the most important first."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from densekit.benchmark.backbone import BackboneCase
from densekit.benchmark.case import Case, Images
from densekit.benchmark.depthwise import DepthwiseCase
from densekit.benchmark.multiscale import MultiScaleCase
from densekit.benchmark.peers import OURS, builders
from densekit.benchmark.steps import StepCase

# 800 x 1333 as a detector sees it: padded to a multiple of 32.
SATURATED: tuple[Images, ...] = ((16, 512, 512), (8, 800, 1344))
OFFICIAL: tuple[Images, ...] = ((2, 512, 512), (2, 800, 1344))

_CONFIGS = Path(__file__).parents[2] / 'configs'
MASK_RCNN = _CONFIGS / 'detection/mask_rcnn_convnext_t_coco.py'
CASCADE = _CONFIGS / 'detection/cascade_convnext_t_coco.py'
UPERNET = _CONFIGS / 'segmentation/upernet_convnext_t_ade20k.py'

_BOTH = (True, False)
_KERNELS = (OURS, f'{OURS} triton')  # on CUDA the first is eager until the kernels are proven
_ON_TRITON = ('model.backbone.kernels=triton',)
_SMALL = (1, 224, 224)  # what a CPU is given by default
_SMALL_SIDES = (96, 128, 160, 192)
_SMALL_STAGES = ((96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7))


def cases_of(tier: int, device: torch.device, images: Sequence[Images] = ()) -> list[Case]:
    """The cases of a tier.

    Args:
        tier: 1 backbone T, 2 backbone B, 3 the other precision, 4 compiled, 5 many sizes, 6 whole steps, 7 depthwise
            convolution.
        device: decides on sizes and precision.
        images: instead of the sizes of tiers 1 to 4 and 6.
    """
    return list(
        _on_cuda(tier, device, tuple(images)) if device.type == 'cuda' else _on_cpu(tier, device, tuple(images))
    )


def _on_cuda(tier: int, device: torch.device, images: tuple[Images, ...]) -> Sequence[Case]:
    if tier in (1, 2):
        arch = 'tiny' if tier == 1 else 'base'
        return [BackboneCase(arch, one, 'bf16', train) for one in images or SATURATED + OFFICIAL for train in _BOTH]
    if tier == 3:
        return [BackboneCase('tiny', one, 'fp32', train) for one in images or SATURATED for train in _BOTH]
    if tier == 4:
        theirs, saturated = _theirs(device), images or SATURATED
        return [
            *(case for arch in ('tiny', 'base') for case in _compiled(arch, saturated[:1], 'bf16', _KERNELS, theirs)),
            *(
                BackboneCase('tiny', one, 'bf16', train, ('eager', 'graphed'), ('nhwc',))  # a graph keeps its memory
                for one in OFFICIAL
                for train in _BOTH
            ),
            *(case for arch in ('tiny', 'base') for case in _compiled(arch, saturated[1:], 'bf16', _KERNELS, theirs)),
        ]
    if tier == 5:
        return [MultiScaleCase('tiny', 2, layouts=(layout,)) for layout in ('nhwc', 'nchw')]
    if tier == 6:
        detection, segmentation = images or OFFICIAL[1:], images or (SATURATED[0], OFFICIAL[0])
        steps = [
            *(StepCase(str(MASK_RCNN), one, 'bf16', train) for one in detection for train in _BOTH),
            *(StepCase(str(UPERNET), one, 'bf16', train) for one in segmentation for train in _BOTH),
            *(StepCase(str(CASCADE), one, 'bf16', train) for one in detection for train in _BOTH),
        ]
        return [*steps, *(replace(step, options=_ON_TRITON) for step in steps)]
    return [DepthwiseCase(8), DepthwiseCase(2), DepthwiseCase(8, 'fp32')]


def _on_cpu(tier: int, device: torch.device, images: tuple[Images, ...]) -> Sequence[Case]:
    images = images or (_SMALL,)
    if tier in (1, 2):
        arch = 'tiny' if tier == 1 else 'base'
        return [BackboneCase(arch, one, 'fp32', train) for one in images for train in _BOTH]
    if tier == 3:
        return [BackboneCase('tiny', one, 'bf16', train) for one in images for train in _BOTH]
    if tier == 4:
        return _compiled('tiny', images, 'fp32', (OURS,), ('timm',))  # minutes for each
    if tier == 5:
        return [MultiScaleCase('tiny', 1, 'fp32', _SMALL_SIDES, layouts=('nhwc',))]
    if tier == 6:
        return [
            StepCase(str(path), one, 'fp32', train)
            for path in (MASK_RCNN, UPERNET)
            for one in images
            for train in _BOTH
        ]
    return [DepthwiseCase(1, 'fp32', _SMALL_STAGES)]


def _compiled(arch: str, images: Sequence[Images], dtype: str, ours: Sequence[str], peers: Sequence[str]) -> list[Case]:
    """A case for each peer beside all of ours: compiling takes minutes, and a case is the least that is kept."""
    modes, layouts = ('eager', 'compiled'), ('nhwc',)  # an inductor graph keeps the layout that it is given
    return [
        BackboneCase(arch, one, dtype, train, modes, layouts, (*ours, peer))
        for one in images
        for train in _BOTH
        for peer in peers
    ]


def _theirs(device: torch.device) -> list[str]:
    return [name for name in builders(device)[0] if name.partition(' ')[0] != OURS]
