"""Label maps from logits, without all classes in the size of the image at once."""

import itertools
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel
from mmengine.registry import HOOKS
from torch import Tensor

import densekit.ops  # noqa: F401  importing mmseg needs mmcv's ops

# isort: split
from mmseg.evaluation import IoUMetric
from mmseg.models.utils import resize

from densekit.evaluation.iou import ExactIoUMetric

# A multiple of 16, and the last ones with those before: on a CPU torch (2.11) rounds the last numbers of a tensor,
# those that fill no vector of AVX-512, otherwise than the rest.
CLASSES_AT_ONCE = 16


def label_map(logits: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """The class with the greatest logit at each pixel, the first of several: that of mmseg.

    On a CPU with several threads, where the last bit of resized logits depends on who does which part, two logits that
    are equal but for rounding may come out the other way round, as with another number of threads.

    Args:
        logits: ``(classes, h, w)``.
        size: H, W of the result, to which the logits are resized bilinearly.
        align_corners: whether the centres of the corner pixels stay where they are.

    Returns:
        ``(1, H, W)`` int64.
    """
    labels = best = None
    starts = [CLASSES_AT_ONCE * i for i in range(max(len(logits) // CLASSES_AT_ONCE, 1))]
    for first, end in itertools.pairwise([*starts, len(logits)]):
        resized = resize(logits[None, first:end], size, None, 'bilinear', align_corners)[0]
        index = resized.argmax(dim=0, keepdim=True)
        value = resized.gather(0, index)
        if labels is None or best is None:
            labels, best = index, value
        else:
            better = ~(value <= best) & ~best.isnan()  # argmax takes NaN for the greatest
            labels, best = torch.where(better, index + first, labels), torch.where(better, value, best)
    assert labels is not None
    return labels


@HOOKS.register_module()
class LabelMapsHook(Hook):
    """Spares BatchedSlideEncoderDecoder the logits during validation and test, if all metrics look at labels alone."""

    def before_val(self, runner: Any) -> None:
        """Does without logits."""
        _set_label_maps(runner, _labels_suffice(runner, runner.val_loop.evaluator))

    def after_val(self, runner: Any) -> None:
        """Gives them again."""
        _set_label_maps(runner, False)

    def before_test(self, runner: Any) -> None:
        """Does without logits."""
        _set_label_maps(runner, _labels_suffice(runner, runner.test_loop.evaluator))

    def after_test(self, runner: Any) -> None:
        """Gives them again."""
        _set_label_maps(runner, False)


def _labels_suffice(runner: Any, evaluator: Any) -> bool:
    """Test-time augmentation adds up the logits of its views."""
    views = any(isinstance(module, BaseTTAModel) for module in runner.model.modules())
    return not views and all(type(metric) in (IoUMetric, ExactIoUMetric) for metric in evaluator.metrics)


def _set_label_maps(runner: Any, value: bool) -> None:
    for module in runner.model.modules():
        if hasattr(module, 'label_maps_only'):
            module.label_maps_only = value
