"""Isotropic ConvNeXt, which has one resolution, with the pyramid of four that detectors and segmentors need.

Papers: "A ConvNet for the 2020s" (arXiv 2201.03545) section 3.3, for the trunk; "Exploring Plain Vision Transformer
Backbones for Object Detection" (ViTDet, arXiv 2203.16527) section 3, for the pyramid.
Source of the architecture: facebookresearch/ConvNeXt at 048efce, models/convnext_isotropic.py; facebookresearch/
detectron2 at 0818132, detectron2/modeling/backbone/vit.py (SimpleFeaturePyramid). Differs from them:

- the classifier's ``norm`` is left out: it normalizes the mean over a map, not a map, and ViTDet's pyramid as well
  takes the last block's output as it is;
- an image of any size is padded with zeros to a multiple of the coarsest stride, and the outputs are cut to its size.

Layouts: N images, C channels, H rows, W columns.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from backbones.convnext import (
    ConvNeXtBlock,
    _activation,
    _check_rates,
    _init_parameters,
    _layer_norm_eps,
    _stage_indices,
    _with_strict_loader,
)
from backbones.kernels.choice import check_kernels
from backbones.layers import LayerNorm2d

ISOTROPIC_ARCHS: dict[str, tuple[int, int]] = {
    # blocks, channels
    'small': (18, 384),
    'base': (18, 768),
    'large': (36, 1024),
}


@MODELS.register_module()
class ConvNeXtIsotropic(BaseModule):
    """Isotropic ConvNeXt that emits a simple feature pyramid: one LayerNormed map per requested level.

    Every level is made from the last block's output alone. Where a head wants the four levels as they are, a detector
    needs no neck. Parameter names of the trunk are the official ones (``stem``, ``blocks.j``), so official checkpoints
    load without renaming; their ``norm`` and ``head`` belong to the classifier and have no place here. The pyramid
    (``pyramid.i`` for level i, whichever others exist) is new to a detector and starts from random values.

    Args:
        arch: a name in ``ISOTROPIC_ARCHS`` or ``dict(depth=..., channels=...)``, channels a multiple of 4.
        in_channels: of the image. Weights for three channels are adapted to another number when they are loaded.
        stem_patch_size: kernel and stride of the stem, a multiple of 4. The levels have a quarter of it, half of it,
            itself and twice it as strides.
        out_channels: of every level.
        norm_cfg: ``dict(type='LN2d', eps=...)``; LayerNorm is the only kind.
        act_cfg: of blocks and pyramid, ``dict(type=..., **arguments)``, with a type in
            ``backbones.convnext.ACTIVATIONS``.
        drop_path_rate: of the last block; it rises linearly from 0 at the first.
        layer_scale_init_value: 0 for no layer scale. Not given, it is as published: 1e-6 for large, else 0.
        out_indices: levels to emit, 0 the finest, in any order, negative ones counted from the end. Outputs are
            finest first; levels not named are not built.
        frozen_blocks: freezes the stem and the first n blocks (0 or -1: nothing).
        with_cp: recompute the blocks' activations in the backward pass instead of keeping them.
        init_cfg: mmengine's. ``dict(type='Pretrained', checkpoint=..., prefix=...)`` goes through
            :class:`backbones.checkpoint.PretrainedBackbone`, which fails unless the weights fit.
        kernels: 'auto', 'eager' or 'triton', as of :class:`backbones.ConvNeXt`.

    Attributes:
        channels: C of each output.
        strides: of each output, in pixels of the input.

    Raises:
        ValueError: if an argument is not allowed; the message says what is.
    """

    def __init__(
        self,
        arch: str | Mapping[str, int] = 'small',
        in_channels: int = 3,
        stem_patch_size: int = 16,
        out_channels: int = 256,
        norm_cfg: Mapping[str, Any] = dict(type='LN2d', eps=1e-6),
        act_cfg: Mapping[str, Any] = dict(type='GELU'),
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float | None = None,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_blocks: int = 0,
        with_cp: bool = False,
        init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        kernels: str = 'auto',
    ) -> None:
        super().__init__(init_cfg=_with_strict_loader(init_cfg))
        depth, channels = _size(arch)
        self.out_indices = _stage_indices(out_indices)
        if stem_patch_size < 4 or stem_patch_size % 4:
            raise ValueError(f'stem_patch_size={stem_patch_size}: give a multiple of 4; the finest level quarters it')
        if out_channels < 1:
            raise ValueError(f'out_channels={out_channels}: give a positive number')
        if layer_scale_init_value is None:
            layer_scale_init_value = 1e-6 if arch == 'large' else 0.0
        _check_rates(drop_path_rate, layer_scale_init_value)
        if not -1 <= frozen_blocks <= depth:
            raise ValueError(f'frozen_blocks={frozen_blocks}: give 0 (or -1) for none, up to {depth} for all blocks')
        self.frozen_blocks = max(frozen_blocks, 0)
        eps = _layer_norm_eps(norm_cfg)

        self.stem = nn.Conv2d(in_channels, channels, stem_patch_size, stem_patch_size)
        block = functools.partial(
            ConvNeXtBlock,
            channels,
            layer_scale=layer_scale_init_value,
            use_grn=False,
            eps=eps,
            with_cp=with_cp,
            kernels=check_kernels(kernels),
        )
        rates = torch.linspace(0, drop_path_rate, depth, device='cpu').tolist()
        self.blocks = nn.Sequential(*(block(drop_path=rate, act=_activation(act_cfg)) for rate in rates))
        self.apply(_init_parameters)
        # As in detectron2, the pyramid keeps torch's initial values.
        self.pyramid = nn.ModuleDict(
            {str(i): _pyramid_level(i, channels, out_channels, eps, act_cfg) for i in self.out_indices}
        )

        self.channels = (out_channels,) * len(self.out_indices)
        self.strides = tuple(stem_patch_size * 2**i // 4 for i in self.out_indices)
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Computes the features of a batch of images.

        Args:
            x: ``(N, in_channels, H, W)`` of any height and width. Zeros are added on the right and below up to
                multiples of the coarsest stride, as detectors add them to a batch.

        Returns:
            One ``(N, channels[k], H // strides[k], W // strides[k])`` per entry of ``out_indices``, finest first
            (at least 1 x 1 each), as :class:`backbones.ConvNeXt` has it: what lies in the padding is cut off.
        """
        height, width = x.shape[2:]
        coarsest = 2 * self.stem.stride[0]
        # Not -height % coarsest, of which torch.export cannot prove what it does to the pooling.
        rows, columns = ((side + coarsest - 1) // coarsest * coarsest - side for side in (height, width))
        x = self.blocks(self.stem(F.pad(x, (0, columns, 0, rows))))
        levels = zip(self.pyramid.values(), self.strides, strict=True)
        return tuple(_cut(level(x), max(height // s, 1), max(width // s, 1)) for level, s in levels)

    def train(self, mode: bool = True) -> 'ConvNeXtIsotropic':
        """Sets the training mode; what is frozen stays frozen and in evaluation mode."""
        super().train(mode)
        self._freeze()
        return self

    def layer_depth(self, name: str, mode: str = 'layer_wise') -> tuple[int, int]:
        """The depth of a parameter, for layer-wise learning-rate decay.

        ``layer_wise`` is the rule of plain ViTs: the stem at 0, block j at j + 1, and the pyramid, which is new to a
        detector as its heads are, at the last depth; ``blocks + 2`` depths. ``stage_wise`` takes all blocks for the
        one stage that they are: the stem at 0, every block at 1, the pyramid at 2. It decays far less than layer_wise.

        Source: get_vit_lr_decay_rate in facebookresearch/detectron2 at 0818132, modeling/backbone/vit.py.

        Args:
            name: of a parameter or module, relative to this backbone.
            mode: 'layer_wise' or 'stage_wise'.

        Returns:
            The depth, and the number of depths.

        Raises:
            ValueError: if the mode is neither of the two.
        """
        if mode not in ('layer_wise', 'stage_wise'):
            raise ValueError(f"mode {mode!r} is unknown; choose 'layer_wise' or 'stage_wise'")
        num_depths = 3 if mode == 'stage_wise' else len(self.blocks) + 2
        if re.match(r'stem\b', name):
            return 0, num_depths
        if match := re.match(r'blocks\.(\d+)', name):
            return (1 if mode == 'stage_wise' else int(match[1]) + 1), num_depths
        return num_depths - 1, num_depths

    @staticmethod
    def describe_weights(weights: Mapping[str, Tensor]) -> str:
        """Says in words of which isotropic ConvNeXt some weights are, such as 'isotropic ConvNeXt small, ...'.

        Args:
            weights: names and tensors, under our names.
        """
        blocks = {match[1] for key in weights if (match := re.match(r'blocks\.(\d+)\.', key))}
        if not blocks:
            return 'no isotropic ConvNeXt'
        bias = weights.get('blocks.0.dwconv.bias')
        size = (len(blocks), 0 if bias is None else bias.shape[0])
        names = [name for name, sizes in ISOTROPIC_ARCHS.items() if sizes == size]
        scale = 'with' if any(key.endswith('.gamma') for key in weights) else 'without'
        what = names[0] if names else 'with {} blocks of {} channels'.format(*size)
        return f'isotropic ConvNeXt {what}, {scale} layer scale'

    def _freeze(self) -> None:
        if self.frozen_blocks:
            for module in (self.stem, *list(self.blocks)[: self.frozen_blocks]):
                module.eval()
                module.requires_grad_(False)


def _pyramid_level(
    level: int, channels: int, out_channels: int, eps: float, act_cfg: Mapping[str, Any]
) -> nn.Sequential:
    """From the trunk's map to one level: a change of resolution, then a 1x1 and a 3x3 convolution, each LayerNormed."""
    half, quarter = channels // 2, channels // 4
    layers: list[nn.Module]
    width = channels
    if level == 0:
        first, second = nn.ConvTranspose2d(channels, half, 2, 2), nn.ConvTranspose2d(half, quarter, 2, 2)
        layers, width = [first, LayerNorm2d(half, eps=eps), _activation(act_cfg), second], quarter
    elif level == 1:
        layers, width = [nn.ConvTranspose2d(channels, half, 2, 2)], half
    elif level == 2:
        layers = []
    else:
        layers = [nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers,
        nn.Conv2d(width, out_channels, 1, bias=False),
        LayerNorm2d(out_channels, eps=eps),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels, eps=eps),
    )


def _cut(x: Tensor, height: int, width: int) -> Tensor:
    """The upper left part of ``(N, C, H, W)``. A slice would make torch.export hold on to the size it is shown."""
    return F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))


def _size(arch: str | Mapping[str, int]) -> tuple[int, int]:
    """Blocks and channels."""
    if isinstance(arch, str):
        if arch not in ISOTROPIC_ARCHS:
            raise ValueError(
                f'arch {arch!r} is unknown. Isotropic ConvNeXt has {", ".join(ISOTROPIC_ARCHS)}; '
                'or give dict(depth=..., channels=...).'
            )
        return ISOTROPIC_ARCHS[arch]
    if not isinstance(arch, Mapping) or set(arch) != {'depth', 'channels'}:
        raise ValueError(f'arch={arch!r}: give a name or a dict of exactly depth and channels, a number each')
    depth, channels = arch['depth'], arch['channels']
    if not (isinstance(depth, int) and isinstance(channels, int) and depth >= 1 and channels >= 4 and not channels % 4):
        raise ValueError(
            f'arch has depth={depth!r} and channels={channels!r}; give a depth of at least 1 and channels '
            'in a multiple of 4, which the pyramid halves and quarters'
        )
    return depth, channels
