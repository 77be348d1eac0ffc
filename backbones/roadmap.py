"""The road from a ResNet to a ConvNeXt, one rung for each step of the paper.

Paper: "A ConvNet for the 2020s" (arXiv 2201.03545), section 2, Figure 2 and the detailed results in its appendix. The
official code has the last rung only. Where the text leaves a choice, the one that gives the published FLOPs is taken
(the hidden width of a stage's first block is four times its output), and otherwise the one that changes least:

- the patchify stem keeps ResNet's norm; its activation goes with the pooling;
- "fewer norms" is about the branch of a block, so that the norm of a 1x1 shortcut stays;
- a convolution has a bias unless BatchNorm follows, which would cancel it;
- every rung has ConvNeXt's initial weights, so that rungs differ in their design alone.

Layouts: N images, C channels, H rows, W columns.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from mmengine.registry import MODELS
from timm.layers import DropPath
from torch import Tensor, nn

from backbones.convnext import DEFAULT_LAYER_SCALE, NUM_STAGES, ConvNeXt, _init_parameters
from backbones.layers import LayerNorm2d

# Blocks of each stage and width of the first, which doubles from stage to stage, from the rung on that is named.
SIZES: dict[str, dict[str, tuple[tuple[int, ...], int]]] = {
    'tiny': {
        'resnet': ((3, 4, 6, 3), 64),
        'stage_ratio': ((3, 3, 9, 3), 64),
        'width': ((3, 3, 9, 3), 96),
    },
    'base': {
        'resnet': ((3, 24, 36, 3), 64),
        'stage_ratio': ((3, 3, 27, 3), 84),
        'width': ((3, 3, 27, 3), 128),
    },
}

_RELU = functools.partial(nn.ReLU, inplace=True)


@dataclasses.dataclass(frozen=True)
class Rung:
    """The design of one rung.

    Attributes:
        change: what is different from the rung before.
        size: a key of ``SIZES[arch]``.
        patchify: a stem of one 4x4 convolution of stride 4, for ResNet's 7x7 of stride 2 and max pooling.
        depthwise: the spatial convolution of a block is depthwise.
        inverted: a block is wide inside (4 x width) and narrow outside, for the reverse.
        depthwise_first: the spatial convolution comes first in a block, for second.
        kernel_size: of the spatial convolution.
        act: makes an activation.
        fewer_activations: one in each block, between the two 1x1 convolutions, for one behind each convolution.
        fewer_norms: one in each branch, behind the spatial convolution, for one behind each convolution.
        layer_norm: LayerNorm for BatchNorm.
        separate_downsampling: a LayerNorm and a 2x2 convolution of stride 2 between stages, for a stride in the first
            block. With it the network is ConvNeXt.
    """

    change: str
    size: str = 'resnet'
    patchify: bool = False
    depthwise: bool = False
    inverted: bool = False
    depthwise_first: bool = False
    kernel_size: int = 3
    act: Callable[[], nn.Module] = _RELU
    fewer_activations: bool = False
    fewer_norms: bool = False
    layer_norm: bool = False
    separate_downsampling: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, '__doc__', self.change)  # what help(RUNGS['patchify']) says


# Behind the first rung: name, what changes, and the switches that do it.
_STEPS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ('modern_recipe', 'training only: 300 epochs, AdamW, more augmentation and regularization', {}),
    (
        'stage_ratio',
        'blocks (3, 4, 6, 3) become (3, 3, 9, 3); in base (3, 24, 36, 3) become (3, 3, 27, 3), and width 64 becomes 84',
        dict(size='stage_ratio'),
    ),
    ('patchify', 'the stem is a 4x4 convolution of stride 4', dict(patchify=True)),
    ('depthwise', 'the 3x3 convolutions are depthwise', dict(depthwise=True)),
    ('width', 'width 64 becomes 96; in base 84 becomes 128', dict(size='width')),
    ('inverted_bottleneck', 'blocks are four times as wide inside as outside', dict(inverted=True)),
    ('move_up_depthwise', 'the depthwise convolution comes first in a block', dict(depthwise_first=True)),
    ('kernel_5', 'depthwise kernel 5', dict(kernel_size=5)),
    ('kernel_7', 'depthwise kernel 7, which is kept', dict(kernel_size=7)),
    ('kernel_9', 'depthwise kernel 9, a side branch', dict(kernel_size=9)),
    ('kernel_11', 'depthwise kernel 11, a side branch', dict(kernel_size=11)),
    ('gelu', 'after kernel_7: GELU for ReLU', dict(kernel_size=7, act=nn.GELU)),
    ('fewer_activations', 'one activation in a block, between the 1x1 convolutions', dict(fewer_activations=True)),
    ('fewer_norms', 'one norm in a branch, before the 1x1 convolutions', dict(fewer_norms=True)),
    ('layer_norm', 'LayerNorm for BatchNorm', dict(layer_norm=True)),
    (
        'separate_downsampling',
        'LayerNorm and a 2x2 convolution of stride 2 between stages, a norm at the end, layer scale: ConvNeXt',
        dict(separate_downsampling=True),
    ),
)


def _ladder() -> dict[str, Rung]:
    rung = Rung('ResNet-50, in base ResNet-200, with strides on the 3x3 convolutions (v1.5)')
    rungs = {'resnet': rung}
    for name, change, switches in _STEPS:
        rung = rungs[name] = dataclasses.replace(rung, change=change, **switches)
    return rungs


RUNGS = _ladder()


class RoadmapBlock(nn.Module):
    """Residual block of every rung before the last: three convolutions, one of which is spatial.

    Args:
        rung: its design.
        in_channels: C_in.
        width: of the stage.
        stride: of the spatial convolution; with it, or where channels change, the shortcut is a 1x1 convolution.
        drop_path: probability of dropping the branch of a sample in training.

    Attributes:
        channels: C_out, the width or four times the width.
    """

    def __init__(self, rung: Rung, in_channels: int, width: int, *, stride: int, drop_path: float) -> None:
        super().__init__()
        hidden, self.channels = (4 * width, width) if rung.inverted else (width, 4 * width)
        inner = in_channels if rung.depthwise_first else hidden  # of the spatial convolution
        spatial = (inner, inner, rung.kernel_size, stride, inner if rung.depthwise else 1)
        first = (in_channels, hidden, 1, 1, 1)
        shapes = [spatial, first] if rung.depthwise_first else [first, spatial]
        shapes.append((hidden, self.channels, 1, 1, 1))
        has_norm = (True, not rung.fewer_norms, not rung.fewer_norms)
        has_act = (not rung.fewer_activations, True, not rung.fewer_activations)

        self.conv1, self.conv2, self.conv3 = (
            _conv(*shape, bias=not normed or rung.layer_norm) for shape, normed in zip(shapes, has_norm, strict=True)
        )
        self.norm1, self.norm2, self.norm3 = (
            _norm(rung, shape[1]) if normed else nn.Identity() for shape, normed in zip(shapes, has_norm, strict=True)
        )
        self.act1, self.act2, self.act3 = (rung.act() if acts else nn.Identity() for acts in has_act)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.shortcut = nn.Sequential()
        if stride > 1 or in_channels != self.channels:
            conv = _conv(in_channels, self.channels, 1, stride, 1, bias=rung.layer_norm)
            self.shortcut = nn.Sequential(conv, _norm(rung, self.channels))

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(N, C_in, H, W)`` to ``(N, C_out, H', W')``, H' and W' being H and W over the stride, rounded up."""
        y = self.act1(self.norm1(self.conv1(x)))
        y = self.act2(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return self.act3(self.shortcut(x) + self.drop_path(y))


@MODELS.register_module()
class ConvNeXtRoadmap(ConvNeXt):
    """A ConvNeXt with the later steps of its design taken back, as far as a ResNet.

    Stages, outputs, freezing and the depths for layer-wise learning-rate decay are ConvNeXt's. The last step is
    ConvNeXt itself, with its parameter names, norms of the outputs and layer scale: the paper adds the final norm in
    that step, and layer scale is no step of its own. The steps before emit a stage's features as they are, as ResNets
    do; the strides of the later stages lie in their first blocks there.

    BatchNorm makes the steps before ``layer_norm`` depend on the batch of each GPU; for detectors take SyncBN, which
    ``sync_bn = 'torch'`` in a config turns it into.

    Args:
        arch: 'tiny' (ResNet-50 to ConvNeXt-T) or 'base' (ResNet-200 to ConvNeXt-B).
        step: a name in ``RUNGS``, which say what each of them changes.
        in_channels: of the image.
        drop_path_rate: of the last block; it rises linearly from 0 at the first.
        layer_scale_init_value: of the last step; the others have no layer scale.
        out_indices: as ConvNeXt's.
        frozen_stages: as ConvNeXt's. What is frozen also keeps the statistics of its BatchNorm.
        init_cfg: as ConvNeXt's.

    Attributes:
        channels: C of each output.
        strides: of each output, in pixels of the input.

    Raises:
        ValueError: if an argument is not allowed; the message says what is.
    """

    def __init__(
        self,
        arch: str = 'tiny',
        step: str = 'separate_downsampling',
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = DEFAULT_LAYER_SCALE,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = 0,
        init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        rung = _rung(arch, step)
        depths, width = SIZES[arch][rung.size]
        widths = tuple(width * 2**i for i in range(NUM_STAGES))
        # Of the layers of a ConvNeXt nothing stays on the earlier rungs: on the meta device they cost nothing.
        with nullcontext() if rung.separate_downsampling else torch.device('meta'):
            super().__init__(
                arch=dict(depths=depths, channels=widths),
                in_channels=in_channels,
                drop_path_rate=drop_path_rate,
                layer_scale_init_value=layer_scale_init_value,
                out_indices=out_indices,
                frozen_stages=frozen_stages,
                init_cfg=init_cfg,
            )
        if not rung.separate_downsampling:
            self._take_back(rung, widths, in_channels, drop_path_rate)

    @staticmethod
    def describe_weights(weights: Mapping[str, Tensor]) -> str:
        """Says in words of which step some weights are, as far as their names tell.

        Args:
            weights: names and tensors, under our names.
        """
        if any('.conv2.' in key for key in weights):
            return 'a step before ' + list(RUNGS)[-1]
        return ConvNeXt.describe_weights(weights)

    def _take_back(self, rung: Rung, widths: Sequence[int], in_channels: int, drop_path_rate: float) -> None:
        """Puts the layers of an earlier rung in the place of ConvNeXt's."""
        self.downsample_layers = nn.ModuleList([_stem(rung, in_channels, widths[0])])
        self.downsample_layers.extend(nn.Sequential() for _ in range(NUM_STAGES - 1))
        rates = iter(torch.linspace(0, drop_path_rate, sum(self.depths), device='cpu').tolist())
        self.stages = nn.ModuleList()
        channels = widths[0]
        emitted = []
        for i, (depth, width) in enumerate(zip(self.depths, widths, strict=True)):
            blocks: list[RoadmapBlock] = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(RoadmapBlock(rung, channels, width, stride=stride, drop_path=next(rates)))
                channels = blocks[-1].channels
            self.stages.append(nn.Sequential(*blocks))
            emitted.append(channels)
        for i in self.out_indices:
            self.add_module(f'norm{i}', nn.Identity())
        self.channels = tuple(emitted[i] for i in self.out_indices)
        self.apply(_init_parameters)
        self._freeze()


def _rung(arch: str, step: str) -> Rung:
    if arch not in SIZES:
        raise ValueError(f"arch {arch!r} is not on the roadmap; choose 'tiny' or 'base'")
    if step not in RUNGS:
        nearest = difflib.get_close_matches(step, RUNGS, n=1)
        hint = f' Did you mean {nearest[0]!r}?' if nearest else ''
        raise ValueError(f'step {step!r} is unknown.{hint} Choose from {", ".join(RUNGS)}.')
    return RUNGS[step]


def _stem(rung: Rung, in_channels: int, channels: int) -> nn.Sequential:
    if rung.patchify:
        conv = nn.Conv2d(in_channels, channels, kernel_size=4, stride=4, bias=rung.layer_norm)
        return nn.Sequential(conv, _norm(rung, channels))
    conv = _conv(in_channels, channels, 7, 2, 1, bias=False)
    return nn.Sequential(conv, _norm(rung, channels), rung.act(), nn.MaxPool2d(3, stride=2, padding=1))


def _conv(in_channels: int, channels: int, kernel_size: int, stride: int, groups: int, *, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias)


def _norm(rung: Rung, channels: int) -> nn.Module:
    return LayerNorm2d(channels, eps=1e-6) if rung.layer_norm else nn.BatchNorm2d(channels)
