"""UPerHead that joins its levels without copies, in one memory format if asked to."""

from collections.abc import Sequence
from typing import Any

import torch

import densekit.ops  # noqa: F401  importing mmseg needs mmcv's ops

# isort: split
from mmengine.registry import MODELS
from mmseg.models.decode_heads import UPerHead
from mmseg.models.utils import resize
from torch import Tensor

from densekit.models.resize import resized_and_joined


@MODELS.register_module()
class LeanUPerHead(UPerHead):
    """mmseg's UPerHead, with its levels resized into what joins them, which mmseg holds besides.

    The parameters are those of mmseg's class, and so are logits and gradients, to the bit.

    Args:
        channels_last: go on in channels_last behind the pooled maps. Their sides of 1 have no memory format, so that
            mmseg falls back to NCHW there. Equal within rounding.
        **kwargs: of mmseg's class.
    """

    def __init__(self, *, channels_last: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits ``(N, classes, H, W)``, of the first level's size, in NCHW, from ``(N, C_i, H_i, W_i)`` each."""
        return super().forward(inputs).contiguous()  # of few classes, the losses are quicker so

    def psp_forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The pooling pyramid on the last level.

        Args:
            inputs: ``(N, C_i, H_i, W_i)`` each.

        Returns:
            ``(N, channels, H, W)``, of the last level's size.
        """
        x = inputs[-1]
        maps = [x, *(module(x) for module in self.psp_modules)]
        return self.bottleneck(resized_and_joined(maps, self.align_corners, self.memory_format))

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        """``(N, channels, H, W)``, of the first level's size, from the features of all levels."""
        inputs = self._transform_inputs(inputs)
        levels = [conv(x) for conv, x in zip(self.lateral_convs, inputs[:-1], strict=True)]
        levels.append(self.psp_forward(inputs))
        for i in range(len(levels) - 1, 0, -1):
            size = levels[i - 1].shape[2:]
            levels[i - 1] = levels[i - 1] + resize(levels[i], size, None, 'bilinear', self.align_corners)
        maps = [*(conv(x) for conv, x in zip(self.fpn_convs, levels[:-1], strict=True)), levels[-1]]
        return self.fpn_bottleneck(resized_and_joined(maps, self.align_corners, self.memory_format))
