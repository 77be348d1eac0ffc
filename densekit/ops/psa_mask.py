"""The masks of point-wise spatial attention, spread over the map."""

import torch
from torch import Tensor

from densekit.ops.registry import substitute


def _psa_index(
    h: int, w: int, h_mask: int, w_mask: int, half_h_mask: int, half_w_mask: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return for each pair of pixels (h * w, h * w) where the second's mask has the first, and whether it has it."""
    rows = torch.arange(h, device=device).repeat_interleave(w)
    columns = torch.arange(w, device=device).repeat(h)
    row = rows[:, None] - rows + half_h_mask
    column = columns[:, None] - columns + half_w_mask
    inside = (row >= 0) & (row < h_mask) & (column >= 0) & (column < w_mask)
    return torch.where(inside, row * w_mask + column, 0), inside


@substitute
def psamask_forward(
    input: Tensor,
    output: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Spread the masks of point-wise spatial attention, each centred at its pixel, over the map (Zhao et al., 2018).

    Args:
        input: A mask at each pixel (N, h_mask * w_mask, H, W).
        output: (N, H * W, H, W), filled in place.
        psa_type: 0 (collect): the mask is along the channels of the output; 1 (distribute): along its pixels.
        num_: N.
        h_feature: H.
        w_feature: W.
        h_mask: Rows of a mask.
        w_mask: Columns of a mask.
        half_h_mask: The row of its centre.
        half_w_mask: The column of its centre.
    """
    index, inside = _psa_index(h_feature, w_feature, h_mask, w_mask, half_h_mask, half_w_mask, input.device)
    result = input.flatten(2).gather(1, index.expand(num_, -1, -1)) * inside
    output.copy_((result.transpose(1, 2) if psa_type == 1 else result).reshape(output.shape))


@substitute
def psamask_backward(
    grad_output: Tensor,
    grad_input: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Gradient of ``psamask_forward``.

    Args:
        grad_output: (N, H * W, H, W).
        grad_input: (N, h_mask * w_mask, H, W), filled in place.
        psa_type: As in the forward, like the rest.
        num_: N.
        h_feature: H.
        w_feature: W.
        h_mask: Rows of a mask.
        w_mask: Columns of a mask.
        half_h_mask: The row of its centre.
        half_w_mask: The column of its centre.
    """
    index, inside = _psa_index(h_feature, w_feature, h_mask, w_mask, half_h_mask, half_w_mask, grad_output.device)
    grad = grad_output.flatten(2)
    grad = (grad.transpose(1, 2) if psa_type == 1 else grad) * inside
    # Each element of a mask goes to one pixel at most: nothing is summed but zeros.
    result = torch.zeros_like(grad_input).flatten(2).scatter_add(1, index.expand(num_, -1, -1), grad)
    grad_input.copy_(result.view(grad_input.shape))
