"""Sliding windows, several in one forward."""

import itertools
from typing import Any

import torch

import densekit.ops  # noqa: F401  importing mmseg needs mmcv's ops

# isort: split
from mmengine.registry import MODELS
from mmseg.models.segmentors import EncoderDecoder
from torch import Tensor


@MODELS.register_module()
class BatchedSlideEncoderDecoder(EncoderDecoder):
    """mmseg's EncoderDecoder, whose sliding windows go through the network in batches.

    The arguments are those of mmseg's class. ``test_cfg.window_batch`` is how many windows of each image are in a
    batch; default 1, as mmseg does it. The sums over the windows are in mmseg's order: where the network gives the same
    logits for a window alone and in a batch, the results are equal to the bit.
    """

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
