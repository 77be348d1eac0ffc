"""Sliding windows, several in one forward, and label maps without the logits of the whole image."""

import itertools
from typing import Any

import torch

import densekit.ops  # noqa: F401  importing mmseg needs mmcv's ops

# isort: split
from mmengine.registry import MODELS
from mmengine.structures import PixelData
from mmseg.models.segmentors import EncoderDecoder
from torch import Tensor

from densekit.models.label_maps import label_map


@MODELS.register_module()
class BatchedSlideEncoderDecoder(EncoderDecoder):
    """mmseg's EncoderDecoder, whose sliding windows go through the network in batches.

    The arguments are those of mmseg's class. ``test_cfg.window_batch`` is how many windows of each image are in a
    batch; default 1, as mmseg does it. The sums over the windows are in mmseg's order: where the network gives the same
    logits for a window alone and in a batch, the results are equal to the bit.

    Attributes:
        label_maps_only: give ``pred_sem_seg`` without ``seg_logits``, which take 4 bytes for each pixel and class. Off,
            but while :class:`densekit.models.label_maps.LabelMapsHook` has it on.
    """

    label_maps_only = False

    def slide_inference(self, inputs: Tensor, batch_img_metas: list[dict[str, Any]]) -> Tensor:
        """The mean of the logits that overlapping windows have.

        Args:
            inputs: ``(N, 3, H, W)``.
            batch_img_metas: of the N images.

        Returns:
            ``(N, classes, H, W)``.

        Raises:
            ValueError: if ``test_cfg.window_batch`` is no positive number, or the windows leave gaps.
        """
        at_once = self.test_cfg.get('window_batch', 1)
        if not isinstance(at_once, int) or at_once < 1:
            raise ValueError(
                f'test_cfg.window_batch is {at_once!r}; give how many windows to compute at once, 1 or more'
            )
        count, _, height, width = inputs.shape
        rows = _starts(height, self.test_cfg.crop_size[0], self.test_cfg.stride[0])
        columns = _starts(width, self.test_cfg.crop_size[1], self.test_cfg.stride[1])
        windows = list(itertools.product(rows, columns))
        total = inputs.new_zeros((count, self.out_channels, height, width))
        covered = inputs.new_zeros((1, 1, height, width))
        for first in range(0, len(windows), at_once):
            batch = windows[first : first + at_once]
            crops = torch.cat([inputs[:, :, row, column] for row, column in batch])
            # a torch.Size, by which mmseg's heads know windows
            metas = [{**meta, 'img_shape': crops.shape[2:]} for _ in batch for meta in batch_img_metas]
            logits = self.encode_decode(crops, metas)
            for (row, column), part in zip(batch, logits.split(count), strict=True):
                total[:, :, row, column] += part
                covered[:, :, row, column] += 1
        return total / covered

    def postprocess_result(self, seg_logits: Tensor, data_samples: Any = None) -> Any:
        """The results of each image, in its original size.

        Args:
            seg_logits: ``(N, classes, H, W)``.
            data_samples: of the N images, with ``ori_shape``.

        Returns:
            The samples with ``pred_sem_seg`` and, unless ``label_maps_only``, ``seg_logits``.
        """
        if not self.label_maps_only or data_samples is None or seg_logits.shape[1] == 1:
            return super().postprocess_result(seg_logits, data_samples)
        for logits, sample in zip(seg_logits, data_samples, strict=True):
            kept = _without_padding(logits, sample.metainfo)
            if sample.metainfo.get('flip'):
                kept = kept.flip(-1 if sample.metainfo['flip_direction'] == 'horizontal' else -2)
            labels = label_map(kept, sample.metainfo['ori_shape'], self.align_corners)
            sample.set_data({'pred_sem_seg': PixelData(data=labels)})
        return data_samples


def _without_padding(logits: Tensor, meta: dict[str, Any]) -> Tensor:
    left, right, top, bottom = meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0)))
    return logits[:, top : logits.shape[1] - bottom, left : logits.shape[2] - right]


def _starts(length: int, window: int, stride: int) -> list[slice]:
    """Where windows lie along a side; the last ends with the image, so all are equally long."""
    window = min(window, length)
    count = -(-(length - window) // stride) + 1
    starts = [min(i * stride, length - window) for i in range(count)]
    if any(after - before > window for before, after in itertools.pairwise(starts)):
        raise ValueError(
            f'windows of {window} pixels every {stride} leave gaps; give a test_cfg.stride no larger than crop_size'
        )
    return [slice(start, start + window) for start in starts]
