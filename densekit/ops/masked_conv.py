"""The two halves of a convolution that is computed at some pixels only."""

import torch
import torch.nn.functional as F
from torch import Tensor

from densekit.ops.registry import substitute


@substitute
def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """What a convolution sees at some pixels, for one that is computed there only (mmdet's guided anchoring).

    Args:
        im: One image (1, C, H, W).
        mask_h_idx: Rows of the K pixels of the output, int64.
        mask_w_idx: Their columns, int64.
        col: (C * kernel_h * kernel_w, K), filled in place.
        kernel_h: Rows of the kernel.
        kernel_w: Columns of the kernel.
        pad_h: Zeros above and below the image.
        pad_w: Zeros left and right of it.
    """
    padded = F.pad(im[0], (pad_w, pad_w, pad_h, pad_h))
    rows = mask_h_idx + torch.arange(kernel_h, device=im.device)[:, None, None]
    columns = mask_w_idx + torch.arange(kernel_w, device=im.device)[:, None]
    col.copy_(padded[:, rows, columns].flatten(0, 2))


@substitute
def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    """Put the pixels that were computed where they belong.

    Args:
        col: (channels, K).
        mask_h_idx: Rows of the K pixels, int64.
        mask_w_idx: Their columns, int64.
        im: One image (1, channels, height, width), filled in place at these pixels.
        height: Rows of the image.
        width: Columns of the image.
        channels: Channels of the image.
    """
    im[0, :, mask_h_idx, mask_w_idx] = col.to(im.dtype)
