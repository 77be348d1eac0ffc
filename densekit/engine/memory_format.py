"""Weights of convolutions laid out as the features that they meet are, which a ConvNeXt emits in channels_last.

Weights in NCHW are rearranged in each step by cuDNN and oneDNN, and their gradients back.
"""

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.model import BaseTTAModel
from torch import nn

from backbones.convnext import DepthwiseConv2d

BACKBONE = 'backbone'


def lay_out_weights(cfg: Mapping[str, Any], model: nn.Module) -> None:
    """Lays out depthwise weights as their gradients come, and neck and heads in channels_last if the config says so.

    A depthwise weight ``(C, 1, K, K)`` stays where it is in memory and only its strides are written otherwise: by them
    DistributedDataParallel lays out what it exchanges, and where gradients have others it copies them in each step,
    with a warning.

    With ``channels_last=True`` in the config all weights of convolutions behind the backbone are in channels_last.
    Values, names and checkpoints stay the same, results are equal within rounding, and checkpoints of both layouts
    load.

    Args:
        cfg: of a run.
        model: a detector or segmentor that is not wrapped yet, changed in place; its parameters stay the same objects.

    Raises:
        ValueError: if ``channels_last`` is neither True nor False, the model has no backbone, or is to be sharded.
    """
    wanted = cfg.get('channels_last', False)
    if not isinstance(wanted, bool):
        raise ValueError(f'channels_last={wanted!r}: give True or False')
    if wanted and cfg.get('sharding') is not None:
        raise ValueError('channels_last=True and sharding: FSDP cuts weights in NCHW only; give one of the two')
    for module in model.modules():
        if isinstance(module, DepthwiseConv2d):
            _to_channels_last(module)
    if not wanted:
        return
    bare = model.module if isinstance(model, BaseTTAModel) else model
    if not hasattr(bare, BACKBONE):
        raise ValueError(f'channels_last=True is for what follows a backbone, and {type(bare).__name__} has none')
    for name, part in bare.named_children():
        if name != BACKBONE:
            _to_channels_last(part)


def _to_channels_last(module: nn.Module) -> None:
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
