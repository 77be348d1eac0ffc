"""ConvNeXt as others have it, each emitting the four LayerNormed stage outputs, built from what is installed.

Nothing of theirs is changed. timm's and torchvision's models have no norms at the outputs; theirs are plain
``nn.LayerNorm`` here.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from backbones import ARCHS, ConvNeXt
from backbones.folding import fold
from densekit.benchmark.mmpretrain import convnext_class

Arch = str | Mapping[str, Sequence[int]]
"""A name in ``ARCHS``, or ``dict(depths=(..4..), channels=(..4..))``."""

Builder = Callable[[Arch, float], nn.Module]
"""From sizes and a rate of drop path to a model: ``(N, 3, H, W)`` to four feature maps."""

OURS = 'densekit'
FOLDED = f'{OURS} folded'
_EPS = 1e-6
_OUTPUTS = (0, 1, 2, 3)
_OFFICIAL = 'no installed package has facebookresearch/ConvNeXt; its order of additions is that of transformers'


class StageOutputs(nn.Module):
    """Runs stages one after another, with a LayerNorm for each one's output.

    Args:
        stages: each with its downsampling.
        channels: of each.
    """

    def __init__(self, stages: Sequence[nn.Module], channels: Sequence[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=_EPS) for width in channels)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps ``(N, 3, H, W)`` to one ``(N, C, H, W)`` per stage."""
        outputs = []
        for stage, norm in zip(self.stages, self.norms, strict=True):
            x = stage(x)
            outputs.append(norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return tuple(outputs)


class FeatureMaps(nn.Module):
    """A backbone of transformers, whose feature maps are a field of its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps ``(N, 3, H, W)`` to one ``(N, C, H, W)`` per stage."""
        return tuple(self.model(x).feature_maps)


def sizes(arch: Arch) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Blocks and channels of each stage."""
    depths, channels = ARCHS[arch] if isinstance(arch, str) else (arch['depths'], arch['channels'])
    return tuple(depths), tuple(channels)


def builders(device: torch.device, *, training: bool = True) -> tuple[dict[str, Builder], dict[str, str]]:
    """All that can be built here, ours first, and those left out with the reason.

    Ours is as it is by default; where it can choose its kernels, also with each choice that this device has; and for
    inference with folded blocks.

    Args:
        device: to run on.
        training: whether all have to train.
    """
    found: dict[str, Builder] = {OURS: _ours}
    if 'kernels' in inspect.signature(ConvNeXt).parameters:
        for kernels in ('eager', 'triton') if device.type == 'cuda' else ('eager',):
            found[f'{OURS} {kernels}'] = partial(_ours, kernels=kernels)
    left_out = {'official': _OFFICIAL}
    if training:
        left_out[FOLDED] = 'for inference only: --phase infer'
    else:
        found[FOLDED] = _folded
    theirs: dict[str, tuple[str, Builder]] = {
        'timm': ('timm.models.convnext', _timm),
        'timm conv_mlp': ('timm.models.convnext', partial(_timm, conv_mlp=True)),
        'torchvision': ('torchvision.models.convnext', _torchvision),
        'transformers': ('transformers', _transformers),
    }
    for name, (module, build) in theirs.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            left_out[name] = str(error)
        else:
            found[name] = build
    try:
        convnext_class()
    except ImportError as error:
        left_out['mmpretrain'] = str(error)
    else:
        found['mmpretrain'] = _mmpretrain
        found['mmpretrain conv'] = partial(_mmpretrain, linear_pw_conv=False)
    return found, left_out


def _ours(arch: Arch, drop_path: float, **kwargs: Any) -> nn.Module:
    return ConvNeXt(arch, drop_path_rate=drop_path, layer_scale_init_value=1.0, **kwargs)


def _folded(arch: Arch, drop_path: float) -> nn.Module:
    return fold(_ours(arch, drop_path), in_place=True)


def _timm(arch: Arch, drop_path: float, conv_mlp: bool = False) -> nn.Module:
    from timm.models.convnext import ConvNeXt as Timm

    depths, channels = sizes(arch)
    model = Timm(
        depths=depths, dims=channels, ls_init_value=1.0, drop_path_rate=drop_path, conv_mlp=conv_mlp, num_classes=0
    )
    stages = list(model.stages)
    return StageOutputs([nn.Sequential(model.stem, stages[0]), *stages[1:]], channels)


def _torchvision(arch: Arch, drop_path: float) -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig
    from torchvision.models.convnext import ConvNeXt as Torchvision

    depths, channels = sizes(arch)
    settings = [CNBlockConfig(*size) for size in zip(channels, [*channels[1:], None], depths, strict=True)]
    layers = Torchvision(settings, stochastic_depth_prob=drop_path, layer_scale=1.0, num_classes=1).features
    return StageOutputs([nn.Sequential(layers[2 * i], layers[2 * i + 1]) for i in range(4)], channels)


def _transformers(arch: Arch, drop_path: float) -> nn.Module:
    from transformers import ConvNextBackbone, ConvNextConfig

    depths, channels = sizes(arch)
    config = ConvNextConfig(
        depths=list(depths), hidden_sizes=list(channels), drop_path_rate=drop_path, layer_scale_init_value=1.0
    )
    config.out_features = [f'stage{i + 1}' for i in range(4)]
    return FeatureMaps(ConvNextBackbone(config))


def _mmpretrain(arch: Arch, drop_path: float, linear_pw_conv: bool = True) -> nn.Module:
    depths, channels = sizes(arch)
    return convnext_class()(
        arch=dict(depths=list(depths), channels=list(channels)),
        drop_path_rate=drop_path,
        layer_scale_init_value=1.0,
        out_indices=_OUTPUTS,
        gap_before_final_norm=False,
        linear_pw_conv=linear_pw_conv,
    )
